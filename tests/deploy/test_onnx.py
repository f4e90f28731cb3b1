"""The recipes for ONNX Runtime: tf2onnx on a SavedModel."""

import subprocess

import pytest

ort = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("tf2onnx", reason="tf2onnx is not installed")

COMMAND = r"""
python -m tf2onnx.convert --saved-model served --tag serve --signature_def serving_default \
    --opset 18 --output served.onnx
"""


def run(path, images):
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    (outputs,) = session.run(None, {given.name: images})
    return outputs


@pytest.mark.slow
def test_tf2onnx(deployed, here, on_path):
    subprocess.run(COMMAND, shell=True, check=True, capture_output=True)
    deployed.check(run("served.onnx", deployed.images))


@pytest.mark.slow
def test_what_tf2onnx_does_not_find_is_said(here, on_path):
    command = COMMAND.replace("serving_default", "serving_elsewhere")
    result = subprocess.run(command, shell=True, check=False, capture_output=True, text=True)
    assert result.returncode
    assert "serving_elsewhere" in result.stderr
    assert (here / "served" / "saved_model.pb").exists()

"""The recipe for OpenVINO."""

import pytest

ov = pytest.importorskip("openvino", reason="openvino is not installed: pip install '.[deploy]'")


def run(model, images):
    settings = {"INFERENCE_PRECISION_HINT": "f32"}  # or bfloat16, where the CPU has it
    (outputs,) = ov.compile_model(model, "CPU", settings)(images).values()
    return outputs


def test_openvino(deployed):
    deployed.check(run(ov.convert_model(deployed.folder / "served"), deployed.images))


def test_a_file_that_openvino_writes(deployed, tmp_path):
    model = ov.convert_model(deployed.folder / "served")
    ov.save_model(model, tmp_path / "served.xml", compress_to_fp16=False)
    deployed.check(run(tmp_path / "served.xml", deployed.images))

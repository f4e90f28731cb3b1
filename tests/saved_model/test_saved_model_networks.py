"""Well-known networks and trained models as SavedModels: as much goes as from Keras layers."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
import tf_keras

import mbn_rewrite as mbn
from benchmarks.models.networks import build, random_images, real_inputs, set_statistics
from benchmarks.models.networks import typical_statistics as typical
from tests.keras.test_applications import EXPECTED as NETWORKS
from tests.keras.test_real_models import EXPECTED as TRAINED
from tests.support.checks import save_with_signature
from tools.real_models import fetch

pytestmark = pytest.mark.slow

# benchmarks/saved_model.py has more of them, at full size.
NETWORKS_OF = (
    ("MobileNetV2", "tf_keras"),
    ("MobileNetV2", "keras"),
    pytest.param("EfficientNetB0", "tf_keras", marks=pytest.mark.thorough),
    pytest.param("ResNet50V2", "keras", marks=pytest.mark.thorough),
)


def left_in_graph(ops):
    """BatchNormalizations among counted operations: fused, and roots of variances."""
    fused = sum(n for op, n in ops.items() if op.startswith("FusedBatchNorm"))
    return fused + ops.get("Rsqrt", 0)


def check(model, inputs, directory, expected):
    """Rewrites a model and asserts how many BatchNormalizations it had and has left."""
    given = save_with_signature(model, inputs, directory / "in")
    report = mbn.rewrite_saved_model(directory / "in", directory / "out", "fold", inputs=given)
    assert report.ok
    assert (len(report.plan.decisions), report.plan.left) == expected
    assert left_in_graph(report.before.ops) == expected[0]
    assert left_in_graph(report.after.ops) == report.plan.left


@pytest.mark.parametrize(("name", "keras_name"), NETWORKS_OF)
def test_network(name, keras_name, tmp_path):
    model = build(name, seed=0, image_size=96)
    rng = np.random.default_rng(0)
    set_statistics(model, typical, rng)
    images = random_images(model, rng)
    if keras_name == "keras":
        import keras

        three = getattr(keras.applications, name)(
            weights=None, input_shape=(96, 96, 3), classifier_activation=None
        )
        three.set_weights(model.get_weights())
        model = three
    total, _ = NETWORKS[name]
    check(model, images, tmp_path, (total, 0))  # no gamma is negative


@pytest.mark.network
@pytest.mark.parametrize("name", ["fer", "ina_male_female", "spliceai1"])
def test_trained_model(name, tmp_path):
    model = tf_keras.models.load_model(fetch(name), compile=False)
    check(model, real_inputs(name, model, seed=0)["real"], tmp_path, TRAINED[name])


@pytest.mark.network
def test_trained_saved_model(tmp_path):
    """One that normalises audio, whose three outputs it names itself."""
    report = mbn.rewrite_saved_model(fetch("basic_pitch"), tmp_path / "out", "fold")
    assert report.ok
    assert report.plan.counts == {"folded": 2, "kept": 1}
    (kept,) = [d for d in report.plan.decisions if d.action == "kept"]
    assert "DivNoNan" in kept.reason
    assert "pads with zeros, which a shift cannot pass" in kept.reason
    assert len(report.comparisons["serving_default"].to_dict()) > 0
    audio = np.random.default_rng(1).uniform(-0.5, 0.5, (2, 43844, 1)).astype(np.float32)
    given = {"input_2": tf.constant(audio)}
    old, new = (tf.saved_model.load(str(p)) for p in (fetch("basic_pitch"), tmp_path / "out"))
    expected, results = (m.signatures["serving_default"](**given) for m in (old, new))
    assert sorted(expected) == sorted(results) == ["contour", "note", "onset"]
    for key, value in expected.items():
        np.testing.assert_allclose(results[key], value, atol=2e-4)


# ------------------------------------------------------------------- tools that come after


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A folded network of the kind that people convert, and an input for it."""
    directory = tmp_path_factory.mktemp("small")
    model = build("MobileNetV2", seed=0, image_size=32)
    rng = np.random.default_rng(0)
    set_statistics(model, typical, rng)
    images = random_images(model, rng)
    save_with_signature(model, images, directory / "in")
    mbn.rewrite_saved_model(directory / "in", directory / "out", "fold")
    owner = tf.saved_model.load(str(directory / "out"))
    output = owner.signatures["serving_default"](input_0=images)["output_0"].numpy()
    return directory / "out", images.numpy(), output


def run(*command):
    """A program of the environment that the tests run in."""
    quiet = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"}
    return subprocess.run(command, capture_output=True, text=True, env=quiet, check=False)


def test_onnx_takes_the_result(small, tmp_path):
    import onnxruntime

    directory, images, output = small
    file = tmp_path / "m.onnx"
    done = run(
        *(sys.executable, "-m", "tf2onnx.convert", "--opset", "15"),
        *("--saved-model", str(directory), "--output", str(file)),
    )
    assert done.returncode == 0, done.stderr
    session = onnxruntime.InferenceSession(str(file))
    (result,) = session.run(None, {session.get_inputs()[0].name: images})
    np.testing.assert_allclose(result, output, atol=1e-4 * np.abs(output).max())


def test_command_line_of_tensorflow_takes_the_result(small, tmp_path):
    directory, images, output = small
    np.save(tmp_path / "images.npy", images)
    done = run(
        str(Path(sys.executable).with_name("saved_model_cli")),
        *("run", "--dir", str(directory), "--tag_set", "serve"),
        *("--signature_def", "serving_default", "--outdir", str(tmp_path)),
        *("--inputs", f"input_0={tmp_path / 'images.npy'}"),
    )
    assert done.returncode == 0, done.stderr
    result = np.load(tmp_path / "output_0.npy")
    np.testing.assert_allclose(result, output, atol=1e-4 * np.abs(output).max())

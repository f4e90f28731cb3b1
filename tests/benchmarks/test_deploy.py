"""`benchmarks/deploy.py`, as a program, and the pieces that decide what its table says."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
import tf_keras

from benchmarks.deployment import images
from benchmarks.deployment.forms import relative_error
from benchmarks.deployment.models import calibrated, conv_relu_norm, mobile, spread_scales
from benchmarks.deployment.tables import model_table, summary
from benchmarks.models import networks
from benchmarks.peer_tools.bn_count import Node, per_channel
from tests.support.programs import run_program

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


run = partial(run_program, "deploy")


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures" / "of_a_class"
    folder.mkdir(parents=True)
    for number in range(6):
        pixels = np.random.default_rng(number).integers(0, 255, (9, 9, 3), np.uint8)
        tf.io.write_file(str(folder / f"{number}.png"), tf.io.encode_png(pixels))
    return folder.parent


def test_models_on_disk_in_each_form(pictures, tmp_path):
    pytest.importorskip("ai_edge_litert", reason="ai-edge-litert is not installed")
    layers = tf_keras.layers
    x = image = tf_keras.Input((8, 8, 3))
    x = layers.BatchNormalization()(layers.Conv2D(4, 3, activation="relu")(x))
    x = layers.GlobalAveragePooling2D()(layers.Conv2D(4, 3)(x))
    model, rng = tf_keras.Model(image, x), np.random.default_rng(0)
    model.set_weights([rng.uniform(0.5, 1.5, w.shape) for w in model.get_weights()])
    model.save(tmp_path / "saved", save_format="tf")
    (tmp_path / "broken").mkdir()
    code, out, err = run(
        f"--models={tmp_path / 'saved'},{tmp_path / 'broken'}", "--variants=fold",
        "--forms=litert,litert_int8", f"--images={pictures}", "--calibrating=2", "--testing=4",
        "--seconds=0.01", f"--json={tmp_path / 'd.json'}",
    )  # fmt: skip
    assert code == 1, err  # one is no model
    good, bad = json.loads((tmp_path / "d.json").read_text())["models"]
    floats, int8 = good["forms"]["litert"], good["forms"]["litert_int8"]
    steps = {name: (row["left"], row["mul"], row["add"]) for name, row in floats.items()}
    assert steps == {"original": (1, 1, 1), "fold": (0, 0, 0)}
    assert floats["fold"]["error"] < 1e-5 < int8["fold"]["error"] < 1
    assert int8["fold"]["x original"] > 0
    assert floats["fold"]["faster"]["median"] > 0
    assert bad["note"].startswith("FAILED: ")
    assert "int8" in out


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--models=ResNet500", "unknown model 'ResNet500'; known are fer, "),
        ("--images=/nowhere", "384 images are needed, and /nowhere has 0"),
    ],
)
def test_mistakes_are_one_line(argument, message):
    code, _, err = run(argument)
    assert code == 1
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1


def test_images_of_a_folder(pictures):
    grey = images.load(str(pictures), (5, 4), 6)
    assert grey.shape == (6, 5, 4)
    assert len({image.tobytes() for image in grey}) == 6
    assert 0 <= grey.min() < grey.max() <= 255
    np.testing.assert_array_equal(grey[:3], images.load(str(pictures), (5, 4), 3))


def test_statistics_are_those_of_the_images():
    model = conv_relu_norm(16, "same")
    data = tf.constant(np.random.default_rng(0).normal(size=(8, 16, 16, 3)), tf.float32)
    networks.set_statistics(model, calibrated, np.random.default_rng(0), data)
    last = networks.batch_norms(model)[-1]
    reads = tf_keras.Model(model.inputs, last.input)(data).numpy()
    np.testing.assert_allclose(last.moving_mean, reads.mean((0, 1, 2)), atol=1e-5)
    np.testing.assert_allclose(last.moving_variance, reads.var((0, 1, 2)), rtol=1e-4)


def test_scales_are_spread_and_the_function_stays():
    model, rng = mobile(16), np.random.default_rng(0)
    data = tf.constant(rng.normal(size=(4, 16, 16, 3)), tf.float32)
    networks.set_statistics(model, calibrated, rng, data)
    before, kernels = model(data).numpy(), [k.numpy() for k in model.trainable_weights]
    spread_scales(model, rng)
    np.testing.assert_allclose(model(data), before, atol=1e-4 * np.abs(before).max())
    changed = [np.any(k != old) for k, old in zip(model.trainable_weights, kernels, strict=True)]
    assert sum(changed) == 8 * 3  # kernel, gamma and beta, of what is between two convolutions


def test_errors_are_those_of_the_median_image():
    expected = np.float32([[9, 10], [11, 10], [10, 10]])  # about its mean by 1, 1 and 0, and by 0
    spread = (2 / 6) ** 0.5
    given = expected + np.float32([[0.5, 0.5], [-0.1, 0.1], [90, 0]])
    assert relative_error(expected, given) == pytest.approx(0.5 / spread)


def test_steps_with_a_constant_per_channel_are_counted():
    nodes = [
        Node("x", "input"),
        Node("c", "constant", (), (4,)),
        Node("one", "constant", (), (1,)),
        Node("a", "multiply", ("x", "c")),
        Node("b", "add", ("a", "c")),
        Node("halved", "multiply", ("b", "one")),
        Node("sum", "add", ("b", "halved")),
    ]
    assert per_channel(nodes) == {"multiply": 1, "add": 1}


def test_tables_show_what_failed():
    rows = {
        "original": {"error": 0.2, "x original": 1.0, "agreement": 0.5},
        "fold": {"note": "FAILED: no"},
    }
    model = {"model": "m", "forms": {"litert_int8": rows}}
    assert "FAILED: no" in model_table(model)
    assert "0.200" in summary([model])

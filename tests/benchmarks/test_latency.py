"""`benchmarks/latency.py`, as a program: it takes seconds to start, so it is started twice."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
import tf_keras

from benchmarks.common.latencies import measured
from tests.support.programs import run_program

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


run = partial(run_program, "latency")


@pytest.fixture
def saved(tmp_path):
    """A model on disk with one BatchNormalization that folds and one that does not."""
    layers = tf_keras.layers
    x = inputs = tf_keras.Input((8, 8, 3))
    x = layers.BatchNormalization()(layers.Conv2D(4, 3)(x))
    x = layers.BatchNormalization()(layers.ReLU()(x))
    model = tf_keras.Model(inputs, layers.Activation("tanh")(x))
    rng = np.random.default_rng(0)
    for layer in model.layers:
        layer.set_weights([rng.uniform(0.5, 1.5, w.shape) for w in layer.get_weights()])
    model.save(tmp_path / "saved", save_format="tf")
    return tmp_path / "saved"


def test_rows_that_fail_are_said_and_the_others_are_measured(saved, tmp_path):
    broken, report = tmp_path / "broken", tmp_path / "latency.json"
    broken.mkdir()
    code, out, err = run(
        f"--models={saved},{broken}", "--batch_sizes=2", "--repeats=3", "--seconds=0",
        f"--json={report}", f"--chart={tmp_path / 'latency.png'}", "--device=CPU",
    )  # fmt: skip
    assert code == 1, err
    good, bad = json.loads(report.read_text())["rows"]
    variants = good["variants"]
    left = {name: v.get("left") for name, v in variants.items()}
    assert left.pop("auto") in (0, 1)  # as it is measured
    assert left == {"original": None, "fold": 1, "depthwise": 0, "floor": None}
    for name in ("fold", "depthwise", "auto"):
        assert variants[name]["error"] < 2e-4
        assert len(variants[name]["milliseconds"]) == 3
        assert variants[name]["x original"]["median"] > 0
    assert "form" in variants["auto"]
    assert variants["floor"] == {"note": "no floor of a model on disk"}
    assert all("FAILED" in v["note"] for name, v in bad["variants"].items() if name != "floor")
    assert "FAILED" in out
    assert (tmp_path / "latency.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.thorough
def test_networks_of_both_kerases_and_their_floor(tmp_path):
    report = tmp_path / "latency.json"
    code, _, err = run(
        "--models=MobileNet", "--size=32", "--batch_sizes=1", "--repeats=2", "--seconds=0",
        "--variants=fold,frozen,floor", f"--json={report}", "--device=CPU",
    )  # fmt: skip
    assert code == 0, err
    rows = json.loads(report.read_text())["rows"]
    assert [row["keras"] for row in rows] == ["tf_keras", "keras_3"]
    for row in rows:
        variants = row["variants"]
        assert {name: v["left"] for name, v in variants.items()} == {
            "original": 27, "fold": 0, "frozen": 0, "floor": 0,
        }  # fmt: skip
        assert variants["fold"]["error"] < 2e-4
        for facts in variants.values():
            assert len(facts["milliseconds"]) == 2
            assert facts["x floor"]["median"] > 0


def test_what_fails_while_it_is_timed_costs_the_others_nothing():
    def bad():
        raise MemoryError

    known = {"original": {}, "fold": {}, "auto": {"note": "WRONG"}}
    measured({"original": lambda: None, "fold": bad}, known, seconds=0, repeats=2)
    assert known["fold"] == {"note": "OUT OF MEMORY"}
    assert known["auto"] == {"note": "WRONG"}
    assert len(known["original"]["milliseconds"]) == 2


def test_what_is_not_known_is_one_line():
    code, out, err = run("--models=ResNet500")
    assert (code, out) == (1, "")
    assert err.strip().split("\n")[-1].startswith("error: --models: 'ResNet500' is no path")


def test_the_floor_has_no_batch_norm_and_is_no_copy_of_the_original():
    from benchmarks.models.floor import without_batch_norm
    from tests.support.kerases import norms

    layers = tf_keras.layers
    x = inputs = tf_keras.Input((8, 8, 3))
    x = layers.BatchNormalization()(layers.Conv2D(4, 3, use_bias=False)(x))
    model = tf_keras.Model(inputs, layers.BatchNormalization(center=False)(x))
    floor = without_batch_norm(model)
    assert not norms(floor)
    kernel = model.layers[1].kernel.numpy()
    (new,) = [weight.numpy() for weight in floor.weights]
    np.testing.assert_array_equal(new, kernel)
    data = tf.ones((1, 8, 8, 3))
    assert floor(data).shape == model(data).shape

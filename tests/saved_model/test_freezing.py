"""Rewritten models whose weights are constants."""

import numpy as np
import pytest
import tensorflow as tf
import tf_keras

import mbn_rewrite as mbn
from mbn_rewrite import latency
from mbn_rewrite.frontends.saved_model import freezing
from mbn_rewrite.measurement import Latencies, Timing, ratio
from tests.support import saved_models

pytestmark = pytest.mark.slow

WRITERS = (
    saved_models.tf_keras_functional,
    saved_models.keras_3_exported,
    saved_models.module,
    saved_models.two_signatures,
    saved_models.frozen_fused,
    saved_models.tf1_resource_variables,
)


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_weights_become_constants(write, tmp_path):
    write(tmp_path / "in")
    original = tf.saved_model.load(str(tmp_path / "in"))
    report = mbn.rewrite_saved_model(tmp_path / "in", tmp_path / "out", "fold", freeze=True)
    assert report.ok
    assert report.frozen
    assert set(report.comparisons) == set(original.signatures)
    assert "frozen: its weights are constants" in str(report)
    new = tf.saved_model.load(str(tmp_path / "out"))
    assert set(new.signatures) == set(original.signatures)
    for name, function in new.signatures.items():
        assert not function.graph.variables
        was = original.signatures[name]
        assert function.structured_input_signature[1] == was.structured_input_signature[1]
        assert function.structured_outputs.keys() == was.structured_outputs.keys()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_methods_are_left_out_and_said_to_be(tmp_path):
    saved_models.tf_keras_functional(tmp_path / "in")
    plain = mbn.rewrite_saved_model(tmp_path / "in", tmp_path / "plain", "fold")
    report = mbn.rewrite_saved_model(tmp_path / "in", tmp_path / "out", "fold", freeze=True)
    methods = set(plain.comparisons) - {"serving_default"}
    assert methods
    assert all("signatures and nothing else" in report.left_out[name] for name in methods)


@pytest.mark.parametrize(
    ("milliseconds", "frozen", "said"),
    [
        (9.0, True, "frozen: its weights are constants, 1.11 times as fast here"),
        (9.95, False, "with constants, no difference beyond noise here"),
        (12.0, False, "with constants, 0.83 times as fast here"),
    ],
)
def test_auto_freezes_what_is_faster_frozen(milliseconds, frozen, said, tmp_path, monkeypatch):
    saved_models.tf_keras_functional(tmp_path / "in")

    def on_disk(models, options, seconds, names):
        assert names == ("variables", "constants")
        loaded = [tf.saved_model.load(str(model.path)) for model in models]
        with_variables = [bool(m.signatures["serving_default"].graph.variables) for m in loaded]
        assert with_variables == [True, False]
        times = [[10.0] * 30, [milliseconds] * 30]
        timings = (
            Timing("variables", (*times[0],)),
            Timing("constants", (*times[1],), ratio(*times)),
        )
        return Latencies("device", options.run_config, timings)

    monkeypatch.setattr(latency, "on_disk", on_disk)
    report = mbn.rewrite_saved_model(tmp_path / "in", tmp_path / "out", freeze=True)
    assert report.ok
    assert report.frozen is frozen
    assert said in str(report)
    assert report.to_dict()["freezing"]["figure"] == report.freezing.figure
    new = tf.saved_model.load(str(tmp_path / "out"))
    assert bool(new.signatures["serving_default"].graph.variables) is not frozen
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


@pytest.mark.parametrize("write", [saved_models.vocabulary, saved_models.counter])
def test_auto_says_what_cannot_be_frozen(write, tmp_path):
    write(tmp_path / "in")
    report = mbn.rewrite_saved_model(tmp_path / "in", tmp_path / "out", freeze=True)
    assert not report.frozen
    assert "cannot be frozen: it " in report.freezing.why
    assert "not frozen: its weights stay variables; with constants, not measured: " in str(report)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["in", "out"]


def test_what_cannot_be_measured_names_no_working_folder(tmp_path):
    x = tf_keras.Input((8, 8, 3), batch_size=3)
    y = tf_keras.layers.BatchNormalization()(tf_keras.layers.Conv2D(4, 3)(x))
    tf_keras.Model(x, y).save(tmp_path / "in", save_format="tf")
    report = mbn.rewrite_saved_model(tmp_path / "in", tmp_path / "out", batch_size=4, freeze=True)
    assert not report.frozen
    assert report.freezing.why.startswith("the model with variables for weights takes batches of 3")


def test_methods_that_were_not_compared_are_left_out_too(tmp_path):
    saved_models.tf_keras_functional(tmp_path / "in")
    plain = mbn.rewrite_saved_model(tmp_path / "in", tmp_path / "plain", "fold")
    method = next(name for name in plain.comparisons if name != "serving_default")
    report = mbn.rewrite_saved_model(
        tmp_path / "in", tmp_path / "out", "fold", freeze=True, unverified=[method]
    )
    assert method in report.left_out
    assert method not in report.unverified


def test_signatures_that_do_the_same_share_their_constants(tmp_path):
    class Twice(tf.Module):
        def __init__(self):
            super().__init__()
            self.kernel = tf.Variable(np.ones((300, 300), np.float32))

        @tf.function(input_signature=[tf.TensorSpec((None, 300), tf.float32, "x")])
        def serve(self, x):
            return {"y": tf.nn.relu(x @ self.kernel)}

    module = Twice()
    both = {"serving_default": module.serve, "serve": module.serve}
    tf.saved_model.save(module, str(tmp_path / "model"), both)
    freezing.freeze(tmp_path / "model", tmp_path / "frozen")
    size = (tmp_path / "frozen" / "saved_model.pb").stat().st_size
    assert 4 * 300 * 300 < size < 1.5 * 4 * 300 * 300
    loaded = tf.saved_model.load(str(tmp_path / "frozen"))
    x = tf.ones((1, 300))
    for name in both:
        np.testing.assert_array_equal(loaded.signatures[name](x=x)["y"], np.full((1, 300), 300.0))


@pytest.mark.parametrize(
    ("write", "why"),
    [
        (saved_models.vocabulary, "it uses tables or the like"),
        (saved_models.counter, "it writes to its variables"),
    ],
    ids=["tables", "state"],
)
def test_what_cannot_be_frozen_says_why(write, why, tmp_path):
    write(tmp_path / "in")
    with pytest.raises(mbn.RewriteError, match=f"cannot be frozen: {why}"):
        mbn.rewrite_saved_model(tmp_path / "in", tmp_path / "out", "fold", freeze=True)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_graph_has_no_room_for_large_weights(tmp_path, monkeypatch):
    saved_models.tf_keras_functional(tmp_path / "in")
    monkeypatch.setattr(freezing, "_MOST_BYTES", 10)
    with pytest.raises(mbn.RewriteError, match="a graph holds less than 2"):
        mbn.rewrite_saved_model(tmp_path / "in", tmp_path / "out", "fold", freeze=True)

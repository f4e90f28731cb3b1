"""Calls that share a stored array, each with a BatchNormalization of its own, in SavedModels."""

import numpy as np
import pytest
import tensorflow as tf

import mbn_rewrite as mbn
from mbn_rewrite.frontends.saved_model.function_graph import op_counts
from tests.saved_model.test_saved_model_forms import (
    CHANNELS,
    IMAGE,
    SEQUENCE,
    Case,
    Weights,
    norm_operations,
    normalised,
    rewritten,
    save,
    tokens,
)
from tests.support.saved_models import kernel

pytestmark = pytest.mark.slow


def levels(shared, call, norms=(True, True)):
    """A function that calls what shares weights twice, and puts norms behind some calls."""

    def function(x, w):
        held = shared(x, w)
        results = []
        for number, has_norm in enumerate(norms):
            y = call(x + float(number), *held)
            results.append(tf.sigmoid(normalised(y, w) if has_norm else y))
        return tf.concat(results, -1)

    return function


def conv(x, k):
    return tf.nn.conv2d(x, k, 1, "SAME")


def plain(x, w):
    return [w.kernel(3, 3, x.shape[-1], CHANNELS)]


def with_bias(x, w):
    return [*plain(x, w), w.kernel(CHANNELS)]


def computed(x, w):
    k = w.kernel(3, 3, x.shape[-1], CHANNELS)
    return [k * tf.constant(np.triu(np.ones((x.shape[-1], CHANNELS))), k.dtype)]


def matrix(x, w):
    return [w.kernel(x.shape[-1], CHANNELS)]


def rows(x, k):
    return tf.linalg.matmul(tf.reduce_mean(x, [1, 2]), k)


SHARED = {
    "conv": (plain, conv),
    "conv_with_bias": (with_bias, lambda x, k, b: tf.nn.bias_add(conv(x, k), b)),
    "conv_with_sum": (with_bias, lambda x, k, b: tf.reshape(b, [1, 1, 1, -1]) + conv(x, k)),
    "reshaped": (
        lambda x, w: [w.kernel(9 * x.shape[-1], CHANNELS)],
        lambda x, k: conv(x, tf.reshape(k, [3, 3, x.shape[-1], CHANNELS])),
    ),
    "computed": (computed, conv),
    "matmul": (matrix, rows),
    "matmul_of_a_transposed_kernel": (
        lambda x, w: [w.kernel(CHANNELS, x.shape[-1])],
        lambda x, k: rows(x, tf.transpose(k)),
    ),
    "matmul_that_transposes": (
        lambda x, w: [w.kernel(CHANNELS, x.shape[-1])],
        lambda x, k: tf.linalg.matmul(tf.reduce_mean(x, [1, 2]), k, transpose_b=True),
    ),
    "einsum": (matrix, lambda x, k: tf.einsum("abcd,de->abce", x, k)),
    "depthwise": (
        lambda x, w: [w.kernel(3, 3, x.shape[-1], 2)],
        lambda x, k: tf.nn.depthwise_conv2d(x, k, [1, 1, 1, 1], "SAME"),
    ),
    "transposed_conv": (
        lambda x, w: [w.kernel(2, 2, CHANNELS, x.shape[-1])],
        lambda x, k: tf.nn.conv2d_transpose(x, k, [tf.shape(x)[0], 12, 12, CHANNELS], 2),
    ),
}


def narrow(x, k):
    return tf.cast(conv(tf.cast(x, tf.float16), tf.cast(k, tf.float16)), tf.float32)


def test_what_a_cast_keeps_from_folding_has_no_weights_of_its_own(tmp_path):
    decisions, _ = rewritten(tmp_path, Case(levels(plain, narrow), IMAGE))
    assert {d.action for d in decisions} == {"kept"}


@pytest.mark.parametrize("constant", [False, True], ids=["variables", "constants"])
@pytest.mark.parametrize("form", SHARED)
def test_each_call_absorbs_what_follows(form, constant, tmp_path):
    case = Case(levels(*SHARED[form]), IMAGE)
    weights = Weights(constant)
    decisions, result = rewritten(tmp_path, case, weights=weights)
    assert [d.action for d in decisions] == ["folded"] * 2
    (first,), (second,) = (d.into for d in decisions)
    assert first != second
    assert norm_operations(result) == []


@pytest.mark.parametrize("constant", [False, True], ids=["variables", "constants"])
def test_each_call_of_a_table_absorbs_what_follows(constant, tmp_path):
    function = levels(
        lambda x, w: [w.kernel(9, CHANNELS)], lambda x, table: tf.gather(table, tokens(x))
    )
    decisions, result = rewritten(tmp_path, Case(function, SEQUENCE), weights=Weights(constant))
    assert [d.action for d in decisions] == ["folded"] * 2
    assert norm_operations(result) == []
    assert op_counts(result)["GatherV2" if constant else "ResourceGather"] == 2


def test_half_precision_stays_in_half(tmp_path):
    case = Case(levels(*SHARED["conv_with_bias"]), IMAGE, dtype=tf.float16)
    decisions, _ = rewritten(tmp_path, case)
    assert [d.action for d in decisions] == ["folded"] * 2


def test_a_kernel_kept_in_float32_and_used_in_float16(tmp_path):
    def function(x, w):
        k, results = w.of(kernel(w.rng, 3, 3, x.shape[-1], CHANNELS)), []
        for number in range(2):
            y = conv(x + tf.cast(number, x.dtype), tf.cast(k, tf.float16))
            gamma, beta, mean, variance = (tf.cast(p, tf.float16) for p in w.norm(CHANNELS))
            y = tf.nn.batch_normalization(y, mean, variance, beta, gamma, 1e-3)
            results.append(tf.sigmoid(y))
        return tf.concat(results, -1)

    decisions, _ = rewritten(tmp_path, Case(function, IMAGE, dtype=tf.float16))
    assert [d.action for d in decisions] == ["folded"] * 2


def test_a_call_without_a_norm_keeps_what_is_stored(tmp_path):
    weights = Weights()
    function = levels(*SHARED["conv_with_bias"], norms=(True, False, True))
    decisions, _ = rewritten(tmp_path, Case(function, IMAGE), weights=weights)
    assert [d.action for d in decisions] == ["folded"] * 2
    new = tf.saved_model.load(str(tmp_path / "out"))
    stored = [v.numpy() for v in new.signatures["serving_default"].graph.variables]
    assert any(np.array_equal(weights.held[0].numpy(), array) for array in stored)


@pytest.mark.parametrize("mode", ["fold", "auto"])
def test_it_can_be_forbidden(mode, tmp_path):
    weights = Weights()
    save(tmp_path / "in", Case(levels(*SHARED["conv"]), IMAGE), weights)
    options = {"budget": 3.0} if mode == "auto" else {}
    report = mbn.rewrite_saved_model(
        tmp_path / "in", tmp_path / "out", mode, keep_shared=True, **options
    )
    assert report.ok
    assert not report.plan.unshared
    assert any("to stay shared" in decision.reason for decision in report.plan.decisions)


def test_auto_measures_with_weights_of_their_own(tmp_path):
    """Those of a form that is tried, too, are of its own: what is stored stays as it is."""

    def function(x, w):
        before = normalised(tf.sigmoid(x), w)  # which stays, so that there is something to measure
        return tf.sigmoid(levels(*SHARED["conv"])(tf.nn.elu(before), w))

    weights = Weights()
    save(tmp_path / "in", Case(function, IMAGE), weights)
    report = mbn.rewrite_saved_model(tmp_path / "in", tmp_path / "out", budget=3.0)
    assert report.ok
    assert report.plan.measurement is not None


def test_the_report_says_by_how_much_it_grew(tmp_path):
    weights = Weights()
    save(tmp_path / "in", Case(levels(*SHARED["conv"]), IMAGE), weights)
    report = mbn.rewrite_saved_model(tmp_path / "in", tmp_path / "out", "fold")
    (unshared,) = report.plan.unshared.values()
    kernel_and_bias = 9 * 3 * CHANNELS + CHANNELS
    assert unshared.weights == kernel_and_bias
    # Both calls get a bias, and two BatchNormalizations go.
    grown = report.after.weights - report.before.weights
    assert grown == kernel_and_bias + CHANNELS - 2 * 4 * CHANNELS
    assert f"{kernel_and_bias} more" in str(report)
    assert report.to_dict()["plan"]["unshared"][0]["weights"] == kernel_and_bias


class TwoSignatures(tf.Module):
    """One signature calls what is shared on two levels, the other gives what it gives on one."""

    def __init__(self):
        super().__init__()
        self.weights = Weights()
        self.kernel = tf.Variable(kernel(np.random.default_rng(1), 3, 3, 3, CHANNELS))
        self.norms = [
            [tf.Variable(array) for array in self.weights.norm(CHANNELS)] for _ in range(2)
        ]

    def level(self, x, number):
        gamma, beta, mean, variance = self.norms[number]
        y = conv(x, self.kernel)
        return tf.sigmoid(tf.nn.batch_normalization(y, mean, variance, beta, gamma, 1e-3))

    @tf.function(input_signature=[tf.TensorSpec([None, *IMAGE])])
    def serve(self, x):
        return {"y": tf.concat([self.level(x, 0), self.level(x + 1.0, 1)], -1)}

    @tf.function(input_signature=[tf.TensorSpec([None, *IMAGE])])
    def features(self, x):
        return {"y": conv(x, self.kernel)}


def test_what_another_signature_needs_as_it_is_is_there_too(tmp_path):
    module = TwoSignatures()
    signatures = {"serve": module.serve, "features": module.features}
    tf.saved_model.save(module, str(tmp_path / "in"), signatures)
    report = mbn.rewrite_saved_model(tmp_path / "in", tmp_path / "out", "fold")
    assert report.ok
    assert report.plan.left == 0
    (unshared,) = report.plan.unshared.values()
    # Each level in two functions, the signature and the method; what is stored in the others.
    assert len(set(unshared.calls)) == 3
    x = np.random.default_rng(2).normal(0, 1, (2, *IMAGE)).astype("float32")
    new = tf.saved_model.load(str(tmp_path / "out")).signatures
    for name, function in signatures.items():
        np.testing.assert_allclose(new[name](x=x)["y"], function(x)["y"], atol=1e-5)

"""Weights and parameters that a model computes of stored arrays: constants, once evaluated."""

import numpy as np
import pytest
import tensorflow as tf

from mbn_rewrite.frontends.saved_model.function_graph import op_counts
from tests.saved_model.test_saved_model_forms import (
    CHANNELS,
    EPSILON,
    IMAGE,
    Case,
    Weights,
    assert_all_gone,
    conv,
    normalised,
    numbers,
    rewritten,
)
from tests.saved_model.test_saved_model_hard_cases import actions, assert_same_signatures, rewrite
from tests.support.saved_models import statistics

pytestmark = pytest.mark.slow

raw = tf.raw_ops


# ----------------------------------------------------------------------------- parameters


def norm_of(gamma, beta, mean, variance):
    return lambda x: tf.nn.batch_normalization(x, mean, variance, beta, gamma, EPSILON)


def packed(w):
    """All four parameters in one array."""
    return w.of(np.stack(statistics(w.rng, CHANNELS)))


def packed_rows(w):
    return norm_of(*tf.unstack(packed(w)))


def packed_slices(w):
    flat = tf.reshape(packed(w), [-1])
    return norm_of(*(flat[i * CHANNELS : (i + 1) * CHANNELS] for i in range(4)))


def packed_split(w):
    return norm_of(*(tf.squeeze(part, [0]) for part in tf.split(packed(w), 4)))


def packed_gathered(w):
    array = packed(w)
    return norm_of(*(tf.gather(array, i) for i in range(4)))


def averages_of_replicas(w):
    pairs = zip(w.norm(CHANNELS), w.norm(CHANNELS), strict=True)
    gamma, beta, mean, variance = ((a + b) / 2.0 for a, b in pairs)
    return norm_of(gamma, beta, mean, variance)


def means_of_replicas(w):
    pairs = zip(w.norm(CHANNELS), w.norm(CHANNELS), strict=True)
    gamma, beta, mean, variance = (tf.reduce_mean(tf.stack(pair), 0) for pair in pairs)
    return norm_of(gamma, beta, mean, variance)


def added_replicas(w):
    gamma, beta, mean, variance = w.norm(CHANNELS)
    return norm_of(gamma, tf.add_n([beta, beta, mean]), mean, variance)


def partitions(w):
    halves = [w.norm(CHANNELS // 2), w.norm(CHANNELS // 2)]
    return norm_of(*(tf.concat(parts, 0) for parts in zip(*halves, strict=True)))


def one_plus_gamma(w):
    gamma, beta, mean, variance = w.norm(CHANNELS)
    return norm_of(1.0 + gamma, beta, mean, variance)


def log_scale(w):
    beta, mean, variance = w.norm(CHANNELS)[1:]
    return norm_of(tf.exp(w.of(numbers(7))), beta, mean, variance)


def softplus_scale(w):
    beta, mean, variance = w.norm(CHANNELS)[1:]
    return norm_of(tf.nn.softplus(w.of(numbers(7))), beta, mean, variance)


def bounded_variance(w):
    gamma, beta, mean, variance = w.norm(CHANNELS)
    return norm_of(gamma, beta, mean, tf.where(variance > 1.0, variance, tf.fill([CHANNELS], 1.0)))


def deviation_stored(w):
    gamma, beta, mean, _ = w.norm(CHANNELS)
    return norm_of(tf.clip_by_value(gamma, -1.0, 1.0), beta, mean, tf.square(w.of(numbers(8))))


def cast_to_half(w):
    gamma, beta, mean, variance = w.norm(CHANNELS)
    halves = (tf.cast(tf.cast(p, tf.float16), tf.float32) for p in (gamma, beta, mean))
    return norm_of(*halves, variance)


def tiled(w):
    beta, mean, variance = w.norm(CHANNELS)[1:]
    one = w.of(np.array([0.7], np.float32))
    return norm_of(tf.tile(one, [CHANNELS]), beta, tf.reverse(mean, [0]), variance)


PARAMETERS = {
    function.__name__: function
    for function in (
        packed_rows, packed_slices, packed_split, packed_gathered, averages_of_replicas,
        means_of_replicas, added_replicas, partitions, one_plus_gamma, log_scale, softplus_scale,
        bounded_variance, deviation_stored, cast_to_half, tiled,
    )
}  # fmt: skip


@pytest.mark.parametrize("constant", [True, False], ids=["constants", "variables"])
@pytest.mark.parametrize("form", PARAMETERS)
def test_parameters_that_are_computed_fold(form, constant, tmp_path):
    case = Case(lambda x, w: PARAMETERS[form](w)(conv(x, w, 3)))
    assert_all_gone(*rewritten(tmp_path, case, weights=Weights(constant=constant)))


def test_fused_operation_with_computed_parameters_folds(tmp_path):
    def function(x, w):
        gamma, beta, mean, variance = w.norm(CHANNELS)
        return raw.FusedBatchNormV3(
            x=conv(x, w, 3), scale=tf.exp(gamma), offset=tf.reduce_sum(tf.stack([beta, mean]), 0),
            mean=mean, variance=tf.nn.softplus(variance), epsilon=EPSILON, is_training=False,
        ).y  # fmt: skip

    assert_all_gone(*rewritten(tmp_path, Case(function)))


INVERSES = {
    "minus_mean": lambda x, g, b, m, i: (x - m) * (g * i) + b,
    "in_turn": lambda x, g, b, m, i: ((x - m) * i) * g + b,
    "once": lambda x, g, b, m, i: x * (g * i) + (b - m * (g * i)),
}


@pytest.mark.parametrize("form", INVERSES)
def test_root_that_was_taken_beforehand_folds(form, tmp_path):
    def function(x, w):
        gamma, beta, mean, variance = statistics(w.rng, CHANNELS)
        inverse = (1.0 / np.sqrt(variance + EPSILON)).astype(np.float32)
        return INVERSES[form](conv(x, w, 3), gamma, beta, mean, inverse)

    assert_all_gone(*rewritten(tmp_path, Case(function), weights=Weights(constant=True)))


# -------------------------------------------------------------------------------- kernels


def masked(w, shape):
    return w.kernel(*shape) * tf.cast(w.of((numbers(9, shape) > 0).astype(np.float32)), tf.float32)


def weight_normalised(w, shape):
    direction, length = w.kernel(*shape), w.of(numbers(9, shape[-1]))
    return tf.nn.l2_normalize(direction, list(range(len(shape) - 1))) * length


def standardised(w, shape):
    kernel = w.kernel(*shape)
    mean, variance = tf.nn.moments(kernel, list(range(len(shape) - 1)), keepdims=True)
    return (kernel - mean) * tf.math.rsqrt(variance + EPSILON)


def averaged(w, shape):
    return tf.add_n([w.kernel(*shape), w.kernel(*shape)]) / 2.0


def of_partitions(w, shape):
    *rest, outputs = shape
    return tf.concat([w.kernel(*rest, outputs // 2), w.kernel(*rest, outputs // 2)], -1)


def part_of_another(w, shape):
    *rest, outputs = shape
    return w.kernel(*rest, outputs + 3)[..., 1 : outputs + 1]


def quantised(w, shape):
    return tf.cast(w.of((numbers(9, shape) * 80).astype(np.int8)), tf.float32) * 0.01


KERNELS = {
    function.__name__: function
    for function in (
        masked, weight_normalised, standardised, averaged, of_partitions, part_of_another,
        quantised,
    )
}  # fmt: skip


@pytest.mark.parametrize("constant", [True, False], ids=["constants", "variables"])
@pytest.mark.parametrize("form", KERNELS)
def test_computed_kernel_absorbs_both_sides(form, constant, tmp_path):
    def function(x, w):
        kernel = KERNELS[form](w, (3, 3, x.shape[-1], CHANNELS))
        return normalised(tf.nn.conv2d(normalised(x, w), kernel, 1, "VALID"), w)

    decisions, result = rewritten(tmp_path, Case(function), weights=Weights(constant=constant))
    assert_all_gone(decisions, result, norms=2)
    assert set(op_counts(result)) <= {"Conv2D", "BiasAdd"}  # nothing is left to compute


def test_computed_kernel_and_bias_of_a_product(tmp_path):
    def function(x, w):
        product = tf.matmul(x, masked(w, (x.shape[-1], CHANNELS)))
        return normalised(product + tf.nn.softplus(w.of(numbers(5))), w)

    decisions, result = rewritten(tmp_path, Case(function, (5,)))
    assert_all_gone(decisions, result)
    assert set(op_counts(result)) == {"MatMul", "AddV2"}


def test_computed_kernel_that_leaves_as_output_stays(tmp_path):
    root = Weights()
    root.both = [tf.Variable(numbers(1, (6, CHANNELS))), tf.Variable(numbers(2, (6, CHANNELS)))]
    norm = root.norm(CHANNELS)

    @tf.function(input_signature=[tf.TensorSpec([None, 6], name="x")])
    def serve(x):
        kernel = tf.add_n(root.both)
        y = tf.nn.batch_normalization(x @ kernel, norm[2], norm[3], norm[1], norm[0], EPSILON)
        return {"y": y, "kernel": kernel}

    report, model, new = rewrite(tmp_path, root, serve)
    assert actions(report) == ["kept"]
    assert_same_signatures(model, new, x=tf.constant(numbers(3, (4, 6))))


def two_products(second):
    """A signature whose kernel is computed of an array, and one that uses it otherwise."""
    root = Weights()
    root.stored = tf.Variable(numbers(1, (6, CHANNELS)))
    norm = root.norm(CHANNELS)
    spec = tf.TensorSpec([None, 6], name="x")

    def block(x):
        y = x @ (root.stored * 0.5)
        return tf.nn.batch_normalization(y, norm[2], norm[3], norm[1], norm[0], EPSILON)

    first = tf.function(lambda x: {"y": block(x)}, input_signature=[spec])
    other = tf.function(lambda x: {"y": second(root, x, block)}, input_signature=[spec])
    return root, {"serving_default": first, "other": other}


def test_array_behind_a_computed_kernel_stays_as_it_is_for_others(tmp_path):
    root, signatures = two_products(lambda root, x, _: x @ root.stored)
    report, model, new = rewrite(tmp_path, root, signatures)
    assert actions(report) == ["folded"]
    assert_same_signatures(model, new, x=tf.constant(numbers(3, (4, 6))))


def test_computed_kernel_of_two_signatures_is_one(tmp_path):
    root, signatures = two_products(lambda root, x, block: tf.nn.relu(block(x)))
    report, model, new = rewrite(tmp_path, root, signatures)
    assert actions(report) == ["folded"]
    assert_same_signatures(model, new, x=tf.constant(numbers(3, (4, 6))))


def test_computed_kernel_that_another_signature_needs_as_it_is_stays(tmp_path):
    root, signatures = two_products(lambda root, x, _: x @ (root.stored * 0.5))
    report, model, new = rewrite(tmp_path, root, signatures)
    assert actions(report) == ["kept"]
    assert_same_signatures(model, new, x=tf.constant(numbers(3, (4, 6))))


def test_kernel_computed_of_an_array_that_is_written_stays(tmp_path):
    root, signatures = two_products(
        lambda root, x, _: root.stored.assign_add(tf.reduce_mean(x) * tf.ones_like(root.stored))
    )
    report, model, new = rewrite(tmp_path, root, signatures)
    (decision,) = report.plan.decisions
    assert decision.action == "kept"
    assert "writes to" in decision.reason
    x = tf.constant(numbers(3, (4, 6)))
    for _ in range(2):
        assert_same_signatures(model, new, x=x)


def test_kernel_computed_of_the_data_stays(tmp_path):
    def function(x, w):
        kernel = w.kernel(1, 1, x.shape[-1], CHANNELS) * tf.reduce_mean(x)
        return normalised(tf.nn.conv2d(x, kernel, 1, "VALID"), w)

    (decision,), _ = rewritten(tmp_path, Case(function, IMAGE))
    assert decision.action == "kept"
    assert "computed while the model runs" in decision.reason


def test_kernel_on_a_grid_stays_there(tmp_path):
    """Converters look for it."""

    def function(x, w):
        kernel = tf.quantization.fake_quant_with_min_max_args(w.kernel(3, 3, 3, CHANNELS), -1, 1)
        return normalised(tf.nn.conv2d(x, kernel, 1, "VALID"), w)

    (decision,), _ = rewritten(tmp_path, Case(function, IMAGE))
    assert decision.action == "kept"


def test_random_kernel_stays(tmp_path):
    """It differs from run to run, so that nothing can be verified either."""
    root = Weights()
    norm = root.norm(CHANNELS)

    @tf.function(input_signature=[tf.TensorSpec([None, 6], name="x")])
    def serve(x):
        y = x @ tf.random.normal([6, CHANNELS])
        return {
            "y": tf.nn.batch_normalization(y, norm[2], norm[3], norm[1], norm[0], EPSILON) * 0.0
        }

    report, *_ = rewrite(tmp_path, root, serve)
    assert actions(report) == ["kept"]


def test_computed_kernel_in_another_dtype_is_another(tmp_path):
    """Numbers that are the same in float32 and float64 are two arrays all the same."""
    rng = np.random.default_rng(3)
    module = tf.Module()
    module.kernel = tf.Variable(rng.integers(-2, 3, (3, 3, 2, 4)).astype("float32"))
    module.factor = tf.Variable(rng.integers(1, 4, 4).astype("float32"))
    module.norm = [tf.Variable(array.astype("float32")) for array in statistics(rng, 4)]

    def serving(dtype):
        @tf.function(input_signature=[tf.TensorSpec([None, 8, 8, 2], dtype)])
        def serve(x):
            kernel = tf.cast(module.kernel, dtype) * tf.cast(module.factor, dtype)
            gamma, beta, mean, variance = (tf.cast(array, dtype) for array in module.norm)
            y = tf.nn.conv2d(x, kernel, 1, "VALID")
            return {"y": tf.nn.batch_normalization(y, mean, variance, beta, gamma, EPSILON)}

        return serve

    signatures = {dtype.name: serving(dtype) for dtype in (tf.float32, tf.float64)}
    report, _, _ = rewrite(tmp_path, module, signatures)
    assert actions(report) == ["folded", "folded"]

"""Statistics of a sample: equal, with their gradient, to automatic differentiation.

The reference is the definition, unfused, in float64, differentiated by TensorFlow.
"""

from dataclasses import replace

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from mbn_rewrite.training.tensorflow.sampled_batch_norm import normalize, normalize_by_sample
from tests.training.sampled_cases import CASES, EPSILON, NAMES, TOLERANCE, Case, cases

pytestmark = pytest.mark.slow


def tensors_of(case, seed=0):
    """x, dy, gamma, beta and the mask, or None."""
    x, dy, gamma, beta, mask = case.arrays(seed)
    return (
        tf.cast(x, case.dtype),
        tf.cast(dy, case.dtype),
        tf.constant(gamma),
        tf.constant(beta),
        None if mask is None else tf.constant(mask),
    )


def ours(case):
    def function(x, dy, gamma, beta, mask):
        with tf.GradientTape() as tape:
            tape.watch([x, gamma, beta])
            y, moments = normalize_by_sample(x, gamma, beta, case.sampling, mask)
        gradients = tape.gradient(y, [x, gamma, beta], dy)
        return y, *gradients, moments.mean, moments.variance, moments.count

    return function


def reference(case, x, dy, gamma, beta, mask):
    x, dy, gamma, beta = (tf.cast(t, tf.float64) for t in (x, dy, gamma, beta))
    last = case.axis == len(case.shape) - 1
    steps = [1, *case.strides, 1] if last else [1, 1, *case.strides]
    places = tuple(slice(None, None, step) for step in steps)
    along = [-1 if i == case.axis else 1 for i in range(len(case.shape))]
    axes = [i for i in range(len(case.shape)) if i != case.axis]
    counted = np.ones(case.shape)
    if mask is not None:
        counted *= np.expand_dims(mask.numpy(), case.axis)
    counted = tf.constant(counted[places])
    count = tf.reduce_sum(counted, axes, keepdims=True)
    with tf.GradientTape() as tape:
        tape.watch([x, gamma, beta])
        mean = tf.reduce_sum(counted * x[places], axes, keepdims=True) / count
        variance = tf.reduce_sum(counted * (x[places] - mean) ** 2, axes, keepdims=True) / count
        xhat = (x - mean) * tf.math.rsqrt(variance + EPSILON)
        y = xhat * tf.reshape(gamma, along) + tf.reshape(beta, along)
    gradients = tape.gradient(y, [x, gamma, beta], dy)
    return (
        y,
        *gradients,
        *(tf.reshape(t, [-1]) for t in (mean, variance)),
        tf.reshape(count, [-1])[0],
    )


def check(case, run=lambda function: function, seed=0):
    tensors = tensors_of(case, seed)
    expected = reference(case, *tensors)
    got = run(ours(case))(*tensors)
    assert got[0].dtype == tensors[0].dtype
    assert got[1].dtype == tensors[0].dtype
    wide = [tf.cast(t, tf.float64).numpy() for t in tensors[:3]]
    case.check(wide, [tf.cast(t, tf.float64).numpy() for t in got], [t.numpy() for t in expected])


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equations_are_those_of_automatic_differentiation(case):
    """Those in numpy, by which other backends are tested."""
    case = replace(case, dtype="float64")
    tensors = tensors_of(case)
    expected = reference(case, *tensors)
    for name, a, b in zip(NAMES, case.expected(*case.arrays()), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12, err_msg=name)


RUNS = {
    "eager": lambda function: function,
    "graph": lambda function: tf.function(function),
    "xla": lambda function: tf.function(function, jit_compile=True),
}


@pytest.mark.parametrize("run", ["eager", "graph", "xla"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_automatic_differentiation(case, run):
    check(case, RUNS[run])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_dtypes(case, dtype):
    check(replace(case, dtype=dtype))


@settings(max_examples=150)
@given(cases(), st.integers(0, 1000))
def test_random_cases(case, seed):
    check(case, seed=seed)


@pytest.mark.parametrize("open_axes", [(0,), (1, 2), (0, 1, 2)])
@pytest.mark.parametrize("name", ["rank_4", "does_not_divide", "rows", "mask", "channels_first"])
def test_open_sizes(name, open_axes):
    case = CASES[name]
    opened = [i for i in range(4) if i != case.axis]
    sizes = [None if i in [opened[j] for j in open_axes] else s for i, s in enumerate(case.shape)]
    x, _, gamma, beta, mask = tensors_of(case)
    dense = tf.TensorSpec(sizes, x.dtype)
    specs = [dense, dense, *(tf.TensorSpec(t.shape, t.dtype) for t in (gamma, beta))]
    if mask is not None:
        specs.append(tf.TensorSpec([None] * 3, mask.dtype))

    def traced(function):
        run = tf.function(lambda *tensors: function(*tensors[:4], (*tensors, None)[4]), specs)
        return lambda *tensors: run(*(t for t in tensors if t is not None))

    check(case, traced)


def test_a_wrong_gradient_is_seen():
    """Without the share of the statistics, the gradient does not pass."""
    case = CASES["rank_4"]

    def fixed_statistics(function):
        def wrong(x, dy, gamma, beta, mask):
            y, _, *rest = function(x, dy, gamma, beta, mask)
            slope = gamma * tf.math.rsqrt(rest[3] + EPSILON)
            return y, dy * slope, *rest

        return wrong

    with pytest.raises(AssertionError, match="dx is"):
        check(case, fixed_statistics)


# ------------------------------------------------------------------------ edges of the domain


@pytest.mark.parametrize("run", ["eager", "graph", "xla"])
@pytest.mark.parametrize("strides", [(1, 1), (2, 2)])
def test_one_position(run, strides):
    """The variance of one position is 0, and its output beta."""
    case = Case((1, 1, 1, 3), 3, strides)
    y, dx, *_, variance, count = RUNS[run](ours(case))(*tensors_of(case))
    np.testing.assert_allclose(y[0, 0, 0], tensors_of(case)[3], atol=1e-6)
    np.testing.assert_allclose(dx, 0, atol=1e-5)
    np.testing.assert_array_equal(variance, 0)
    assert count == 1


@pytest.mark.parametrize("depthwise", [False, True])
def test_constant_input(depthwise):
    """A variance of 0 gives finite numbers."""
    case = Case((4, 8, 8, 3), 3, (2, 2), depthwise=depthwise)
    _, dy, gamma, beta, _ = tensors_of(case)
    results = ours(case)(tf.fill(case.shape, 7.0), dy, gamma, beta, None)
    assert all(np.all(np.isfinite(result)) for result in results)
    np.testing.assert_allclose(results[0], np.broadcast_to(beta, case.shape), atol=1e-3)


def test_everything_masked():
    """No positions give finite numbers too, and a count that says so."""
    case = CASES["mask"]
    x, dy, gamma, beta, mask = tensors_of(case)
    results = ours(case)(x, dy, gamma, beta, tf.zeros_like(mask))
    assert all(np.all(np.isfinite(result)) for result in results)
    assert results[-1] == 0


@pytest.mark.parametrize("run", ["eager", "xla"])
@pytest.mark.parametrize("strides", [(1, 1), (2, 2)])
def test_large_mean(strides, run):
    """A mean of a thousand standard deviations does not spoil the variance."""
    case = Case((4, 16, 16, 4), 3, strides)
    x, dy, gamma, beta, _ = tensors_of(case)
    *_, variance, _ = RUNS[run](ours(case))(x + 2000, dy, gamma, beta, None)
    *_, expected, _ = reference(case, x + 2000, dy, gamma, beta, None)
    np.testing.assert_allclose(variance, expected, rtol=1e-3)


@pytest.mark.parametrize("apart", [0, 3, 1e4])
@pytest.mark.parametrize("strides", [(1, 1), (2, 2)])
def test_sums_of_one_pass_do_not_cancel(strides, apart):
    """The variance loses the rounding of sums once for each example, wherever the first lies."""
    case = Case((8, 16, 16, 4), 3, strides)
    x, dy, gamma, beta, _ = tensors_of(case)
    x = x + 1e5 + apart * np.eye(8, 1, dtype=np.float32)[:, :, None, None]
    *_, variance, _ = RUNS["xla"](ours(case))(x, dy, gamma, beta, None)
    *_, expected, _ = reference(case, x, dy, gamma, beta, None)
    np.testing.assert_allclose(variance, expected, rtol=8 * TOLERANCE["float32"])


@pytest.mark.parametrize("case", [CASES[n] for n in ("rank_2", "rank_4", "channels_first")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_given_statistics(case, dtype):
    case = replace(case, dtype=dtype)
    x, _, gamma, beta, _ = tensors_of(case)
    mean, variance = tf.zeros_like(gamma) + 0.5, tf.ones_like(gamma) * 2
    along = [-1 if i == case.axis else 1 for i in range(len(case.shape))]
    y = normalize(x, gamma, beta, mean, variance, case.sampling)
    slope = np.float64(gamma) / np.sqrt(2 + EPSILON)
    expected = (tf.cast(x, tf.float64) - 0.5) * slope.reshape(along) + np.reshape(beta, along)
    assert y.dtype == x.dtype
    np.testing.assert_allclose(
        tf.cast(y, tf.float64), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * 10
    )


# ------------------------------------------------------------------------- what really runs


def operations(case, jit=False):
    """The types of all operations of a training step's graph, those in its functions too."""
    function = tf.function(ours(case), jit_compile=jit).get_concrete_function(*tensors_of(case))
    graph = function.graph.as_graph_def()
    nodes = [*graph.node, *(node for f in graph.library.function for node in f.node_def)]
    return {node.op for node in nodes}


def test_fused_operations_run():
    everything, sampled = operations(CASES["everything"]), operations(CASES["rank_4"])
    assert {"FusedBatchNormV3", "FusedBatchNormGradV3"} <= everything
    assert "InplaceAdd" not in everything
    assert {"FusedBatchNormV3", "FusedBatchNormGradV3", "GatherV2", "InplaceAdd"} <= sampled


def test_depthwise_convolution_runs():
    assert "DepthwiseConv2dNative" in operations(CASES["depthwise"])
    assert "DepthwiseConv2dNative" not in operations(CASES["rank_4"])


@pytest.mark.parametrize("depthwise", [False, True])
def test_only_the_input_is_kept_for_the_gradient(depthwise):
    """Of all tensors of the forward pass, the gradient reads x and vectors."""
    case = Case((4, 32, 32, 16), 3, (4, 4), depthwise=depthwise)
    x, dy, gamma, beta, _ = tensors_of(case)
    kept = []

    def step(x, dy, gamma, beta):
        with tf.GradientTape() as tape:
            tape.watch([x, gamma, beta])
            y, _ = normalize_by_sample(x, gamma, beta, case.sampling)
        graph = tf.compat.v1.get_default_graph()
        forward = {op.name for op in graph.get_operations()}
        gradients = tape.gradient(y, [x, gamma, beta], dy)
        for op in graph.get_operations():
            if op.name not in forward:
                kept.extend(t for t in op.inputs if t.op.name in forward)
        return gradients

    tf.function(step).get_concrete_function(x, dy, gamma, beta)
    sizes = {t.op.name: t.shape.num_elements() or 0 for t in kept}
    large = {name for name, size in sizes.items() if size > 16}
    assert large == {"x", "dy"}

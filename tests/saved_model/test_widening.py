"""Graphs in a wider dtype: the same function, fused operations included."""

import numpy as np
import pytest
import tensorflow as tf

from mbn_rewrite.errors import RewriteError
from mbn_rewrite.frontends.saved_model.function_graph import function_graph_of
from mbn_rewrite.frontends.saved_model.runnable_graph import runnable_graph_of
from mbn_rewrite.frontends.saved_model.widening import TO_FLOAT64

SIZES = {"NHWC": (2, 3, 3, 4), "NCHW": (2, 4, 3, 3)}


def normalised(data_format, nested, output=0, is_training=False):
    """A graph with a fused operation, in a function of its own or not, and the same in numpy."""
    rng = np.random.default_rng(0)
    gamma, beta, mean = rng.standard_normal((3, 4)).astype(np.float32)
    variance = rng.uniform(0.5, 2, 4).astype(np.float32)

    def fused(x):
        given = [tf.zeros([0])] * 2 if is_training else [mean, variance]
        return tf.raw_ops.FusedBatchNormV3(
            x=x,
            scale=gamma,
            offset=beta,
            mean=given[0],
            variance=given[1],
            epsilon=1e-3,
            data_format=data_format,
            is_training=is_training,
        )[output]

    inner = tf.function(fused) if nested else fused
    spec = tf.TensorSpec(SIZES[data_format])
    concrete = tf.function(lambda x: inner(x) * 3).get_concrete_function(spec)
    graph = function_graph_of("f", concrete, lambda name: None)

    def expected(x):
        def along(vector):
            shape = [-1, 1, 1] if data_format == "NCHW" else [-1]
            return vector.astype(np.float64).reshape(shape)

        root = np.sqrt(variance.astype(np.float64) + np.float32(1e-3))
        return 3 * ((x - along(mean)) / along(root) * along(gamma) + along(beta))

    return graph, expected


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "in_a_function"])
@pytest.mark.parametrize("data_format", SIZES)
def test_fused_operations_are_exact_in_float64(data_format, nested):
    graph, expected = normalised(data_format, nested)
    x = np.random.default_rng(1).standard_normal(SIZES[data_format], np.float32)
    wide = TO_FLOAT64.applied(runnable_graph_of(graph))
    (y,) = wide.run([TO_FLOAT64.tensor(tf.constant(x))], graph.results)
    assert y.dtype == np.float64
    np.testing.assert_allclose(y, expected(x), rtol=1e-12, atol=1e-12)


def test_loops_run_in_both_dtypes():
    def looped(x):
        return tf.while_loop(lambda i, _: i < 3, lambda i, y: (i + 1, y / 3), [0, x])[1]

    concrete = tf.function(looped).get_concrete_function(tf.TensorSpec([2]))
    graph = function_graph_of("f", concrete, lambda name: None)
    narrow, x = runnable_graph_of(graph), tf.constant([1.0, 2.0])
    for runnable, given in (
        (narrow, x),
        (TO_FLOAT64.applied(narrow), TO_FLOAT64.tensor(x)),
        (narrow, x),
    ):
        (y,) = runnable.run([given], graph.results)
        assert y.dtype == given.dtype.as_numpy_dtype
        rtol = 4 * np.finfo(y.dtype).eps
        np.testing.assert_allclose(y, np.array([1, 2]) / 27, rtol=rtol)


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "in_a_function"])
@pytest.mark.parametrize("kinds", [{"output": 1}, {"is_training": True}], ids=str)
def test_what_has_no_arithmetic_is_not_widened(kinds, nested):
    graph, _ = normalised("NHWC", nested, **kinds)
    with pytest.raises(RewriteError, match=r"normalises by the batch|is read"):
        TO_FLOAT64.applied(runnable_graph_of(graph))

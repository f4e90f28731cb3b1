"""Clips in graphs, such as Relu: how they are read, and how they get bounds per channel."""

import numpy as np
import pytest
import tensorflow as tf

from mbn_rewrite.errors import RewriteError
from mbn_rewrite.frontends.saved_model.function_graph import (
    Writes,
    function_graph_of,
    op_counts,
)
from mbn_rewrite.frontends.saved_model.reader import read
from mbn_rewrite.frontends.saved_model.source import SavedModelDirectory
from mbn_rewrite.ir.graph import Affine, Clip, Input, Merge, MergeKind, Opaque
from mbn_rewrite.plans import Plan, Reclip
from tests.support.clips import moved_into_clip
from tests.support.saved_models import arithmetic_norm, fused_norm, kernel, statistics

pytestmark = pytest.mark.slow

INF = np.inf
SHAPE = (3, 5, 4)
LOWER, UPPER = np.array([0.5, -0.25, -INF, 0.125]), np.array([1.0, INF, 0.75, 0.25])
BOUNDS = {"lower": (LOWER, None), "upper": (None, UPPER), "both": (LOWER, UPPER)}


def graph_of(function, dtype=tf.float32, shape=SHAPE):
    concrete = tf.function(function).get_concrete_function(tf.TensorSpec([None, *shape], dtype))
    return read([function_graph_of("f", concrete, lambda name: None)], Writes()).graph


# --------------------------------------------------------------------------------- reading


def clip_by_value(lower, upper):
    return lambda x: tf.raw_ops.ClipByValue(t=x, clip_value_min=lower, clip_value_max=upper)


VARIABLE = tf.Variable(0.5)
CLIPS = {
    "relu": (tf.nn.relu, Clip()),
    "relu6": (tf.nn.relu6, Clip(0.0, 6.0)),
    "clip": (clip_by_value(-1.0, 2.0), Clip(-1.0, 2.0)),
    "clip by a variable": (lambda x: clip_by_value(-1.0, VARIABLE)(x), Clip(-1.0, 0.5)),
    "clip to nothing": (clip_by_value(-INF, INF), Affine()),
    "clip crossed": (clip_by_value(2.0, 1.0), Opaque()),
    "clip by what is computed": (
        lambda x: clip_by_value(-1.0, tf.reduce_sum(x) / 100)(x),
        Opaque(),
    ),
    "maximum": (lambda x: tf.maximum(x, 0.5), Clip(0.5, INF)),
    "maximum, number first": (lambda x: tf.maximum(0.0, x), Clip()),
    "maximum of one number": (lambda x: tf.maximum(x, [[0.5]]), Clip(0.5, INF)),
    "minimum": (lambda x: tf.minimum(x, 0.5), Clip(-INF, 0.5)),
    "maximum per channel": (
        lambda x: tf.maximum(x, [1.0, 2.0, 3.0, 4.0]),
        Opaque("compares it with several numbers"),
    ),
    "maximum that adds an axis": (
        lambda x: tf.maximum(x, tf.ones((1,) * 5)),
        Opaque("compares it with several numbers"),
    ),
    "maximum of two": (lambda x: tf.maximum(x, tf.reverse(x, [1])), Merge(MergeKind.MAXIMUM)),
}


@pytest.mark.parametrize("name", CLIPS)
def test_operations_that_clip(name):
    function, expected = CLIPS[name]
    graph = graph_of(function)
    assert [node.op for node in graph.nodes if graph.outputs & set(node.outputs)] == [expected]


def test_numbers_that_are_no_floats_are_not_clipped():
    graph = graph_of(lambda x: tf.maximum(x, 1), tf.int32)
    assert Opaque() in [node.op for node in graph.nodes]


def test_what_a_clip_reads_is_its_data():
    graph = graph_of(lambda x: tf.maximum(1.0, x))
    (given,) = [node for node in graph.nodes if isinstance(node.op, Input)]
    (clip,) = [node for node in graph.nodes if isinstance(node.op, Clip)]
    assert clip.inputs == given.outputs
    assert len(graph.nodes) == 2


def test_a_clip_has_the_dtype_of_its_tensor():
    (clip,) = [n for n in graph_of(tf.nn.relu, tf.float16).nodes if isinstance(n.op, Clip)]
    assert clip.dtype == "float16"


# --------------------------------------------------------------------------------- writing


def save(tmp_path, *functions, dtype=tf.float32, module=None):
    """Saves functions of a tensor, which may use variables of a module, as signatures."""
    spec = tf.TensorSpec([None, *SHAPE], dtype, "x")
    signatures = {
        f"f{number}": tf.function(lambda x, f=function: {"y": f(x)}).get_concrete_function(spec)
        for number, function in enumerate(functions)
    }
    tf.saved_model.save(module or tf.Module(), str(tmp_path / "in"), signatures)


def rewritten(tmp_path, *reclips):
    """The signatures of what was saved, once its clips have got bounds, in order."""
    source = SavedModelDirectory(tmp_path / "in", None, None)
    owners = [node.owner for node in source.graph.nodes if isinstance(node.op, Clip)]
    source.write(Plan("fold", (), dict(zip(owners, reclips, strict=True))), tmp_path / "out")
    loaded = tf.saved_model.load(str(tmp_path / "out"))
    return [loaded.signatures[name] for name in sorted(loaded.signatures)]


def clipped(x, lower, upper, axis=3):
    shape = [-1 if i == axis else 1 for i in range(4)]
    for function, bounds in ((np.maximum, lower), (np.minimum, upper)):
        x = x if bounds is None else function(x, bounds.astype(x.dtype).reshape(shape))
    return x


@pytest.fixture
def x():
    return np.random.default_rng(5).standard_normal((2, *SHAPE)).astype(np.float32)


@pytest.mark.parametrize("name", ["relu", "relu6", "clip", "maximum, number first", "minimum"])
@pytest.mark.parametrize("sides", BOUNDS)
def test_a_clip_with_bounds_per_channel(name, sides, x, tmp_path):
    function, _ = CLIPS[name]
    save(tmp_path, lambda x: 2.0 * function(x + x))
    (new,) = rewritten(tmp_path, Reclip(*BOUNDS[sides], 3))
    np.testing.assert_array_equal(new(x=x)["y"], 2 * clipped(2 * x, *BOUNDS[sides]))
    ops = op_counts(new)
    assert (ops.get("Maximum", 0), ops.get("Minimum", 0)) == (sides != "upper", sides != "lower")
    assert set(ops) <= {"Maximum", "Minimum", "Mul", "AddV2"}


@pytest.mark.parametrize("axis", [1, 2, 3])
def test_channels_lie_on_any_axis(axis, x, tmp_path):
    save(tmp_path, tf.nn.relu)
    bounds = np.linspace(-1, 1, x.shape[axis])
    (new,) = rewritten(tmp_path, Reclip(bounds, None, axis))
    np.testing.assert_array_equal(new(x=x)["y"], clipped(x, bounds, None, axis))


def test_a_clip_that_is_read_twice_and_is_an_output(x, tmp_path):
    save(tmp_path, lambda x: tf.concat([tf.nn.relu(x)] * 2, -1), lambda x: tf.nn.relu(x))
    twice, output = rewritten(tmp_path, Reclip(LOWER, None, 3), Reclip(None, UPPER, 3))
    expected = clipped(x, LOWER, None)
    np.testing.assert_array_equal(twice(x=x)["y"], np.concatenate([expected] * 2, -1))
    np.testing.assert_array_equal(output(x=x)["y"], clipped(x, None, UPPER))


def test_clips_called_the_same_in_two_functions_are_two(x, tmp_path):
    save(tmp_path, tf.nn.relu, lambda x: tf.nn.relu(x) + 0.0 * x)
    source = SavedModelDirectory(tmp_path / "in", None, None)
    owners = [node.owner for node in source.graph.nodes if isinstance(node.op, Clip)]
    assert owners == ["Relu", "Relu#2"]
    for new, bounds in zip(
        rewritten(tmp_path, Reclip(LOWER, None, 3), Reclip(-UPPER, None, 3)),
        (LOWER, -UPPER),
        strict=True,
    ):
        np.testing.assert_array_equal(new(x=x)["y"], clipped(x, bounds, None))


@pytest.mark.parametrize("norm", [arithmetic_norm, fused_norm])
def test_with_the_batch_normalization_before_it_gone(norm, x, tmp_path):
    rng = np.random.default_rng(6)
    module = tf.Module()
    module.norm = [tf.Variable(array) for array in statistics(rng, 4)]
    module.kernel = tf.Variable(kernel(rng, 2, 2, 4, 3))

    def function(x):
        return tf.nn.conv2d(tf.nn.relu(norm(x, *module.norm)), module.kernel, 1, "VALID")

    save(tmp_path, function, module=module)
    source = SavedModelDirectory(tmp_path / "in", None, None)
    source.write(moved_into_clip(source.graph), tmp_path / "out")
    new = tf.saved_model.load(str(tmp_path / "out"))
    actual = new.signatures["f0"](x=x)["y"]
    np.testing.assert_allclose(actual, function(x), rtol=1e-4, atol=1e-5)
    assert op_counts(new.signatures["f0"]) == {
        **{"Maximum": 1, "Minimum": 1},
        **{"Conv2D": 1, "BiasAdd": 1},
    }


@pytest.mark.parametrize("stored", [True, False], ids=["variables", "constants"])
def test_bounds_are_stored_as_the_weights_are(stored, x, tmp_path):
    module = tf.Module()
    module.factor = tf.Variable(2.0) if stored else 2.0
    save(tmp_path, lambda x: tf.nn.relu(x * module.factor), module=module)
    (new,) = rewritten(tmp_path, Reclip(LOWER, None, 3))
    np.testing.assert_array_equal(new(x=x)["y"], clipped(2 * x, LOWER, None))
    assert len(new.captured_inputs) == 2 * stored  # the factor and the bounds


def test_bounds_in_float16(x, tmp_path):
    save(tmp_path, tf.nn.relu, dtype=tf.float16)
    (new,) = rewritten(tmp_path, Reclip(LOWER, UPPER, 3))
    x = x.astype(np.float16)
    np.testing.assert_array_equal(new(x=x)["y"], clipped(x, LOWER, UPPER))


def test_bounds_that_the_dtype_cannot_hold_are_refused(tmp_path):
    save(tmp_path, tf.nn.relu, dtype=tf.float16)
    why = "'Relu' cannot clip per channel: its bounds reach 7e.04, more than float16 can hold. Use"
    with pytest.raises(RewriteError, match=why):
        rewritten(tmp_path, Reclip(np.array([0, 7e4, 0, 0]), None, 3))

"""Operations in all the forms that graphs hold them in: one small SavedModel for each.

Every case is a function of a tensor and of `Weights`. It is saved, rewritten, and compared with
the original on inputs of the test's own.
"""

import gc
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras

import mbn_rewrite as mbn
from mbn_rewrite.frontends.saved_model.function_graph import FunctionGraph, Writes, op_counts
from mbn_rewrite.frontends.saved_model.match_batchnorm import fused_norm
from mbn_rewrite.frontends.saved_model.weights import Constants
from tests.support.saved_models import EPSILON, kernel, statistics

pytestmark = pytest.mark.slow

v1 = tf.compat.v1
raw = tf.raw_ops

TOLERANCES = {tf.float32: 1e-4, tf.float16: 1e-2}
IMAGE = (6, 6, 3)
IMAGE_FIRST = (3, 6, 6)
SEQUENCE = (8, 4)
VOLUME = (4, 4, 4, 3)
CHANNELS = 4


@pytest.fixture(autouse=True)
def _little_to_collect():
    """The exporter collects garbage; all that was made before need not be looked through."""
    gc.freeze()


class Weights(tf.Module):
    """Random weights, made when a function that asks for them is traced first.

    Args:
        constant: whether they are constants of the graph; else they are variables.
        dtype: of kernels.
    """

    def __init__(self, constant=False, dtype=tf.float32):
        super().__init__()
        self.constant, self.dtype = constant, dtype
        self.rng = np.random.default_rng(21)
        self.held, self.given = [], 0

    def of(self, array):
        if self.constant:
            return tf.constant(array)
        if self.given == len(self.held):
            self.held.append(tf.Variable(array))
        self.given += 1
        return self.held[self.given - 1]

    def kernel(self, *shape):
        return self.of(kernel(self.rng, *shape).astype(self.dtype.as_numpy_dtype))

    def norm(self, channels, **given):
        """gamma, beta, mean and variance; some may be given for all channels."""
        arrays = statistics(self.rng, channels)
        for name, value in given.items():
            arrays[["gamma", "beta", "mean", "variance"].index(name)][:] = value
        return [self.of(array) for array in arrays]


def stored_both_ways(block):
    """A block with variables, and behind it a block with constants; between them ReLU."""

    def function(x, w):
        w.constant = False
        x = tf.nn.relu(block(x, w))
        w.constant = True
        return block(x, w)

    return function


def both_ways_beside(block):
    """A block with variables, and beside it a block with constants."""

    def function(x, w):
        w.constant = False
        first = block(x, w)
        w.constant = True
        return tf.concat([first, block(x, w)], -1)

    return function


class Case(NamedTuple):
    """What is saved.

    Attributes:
        function: of a tensor and of weights.
        shape: of the tensor, without the batch.
        axis: of the channels of what goes in and of what comes out.
        compiled: whether it takes XLA to run it here.
        dtype: of the tensor.
    """

    function: Callable[[Any, Weights], Any]
    shape: tuple[int | None, ...] = IMAGE
    axis: int = -1
    compiled: bool = False
    dtype: Any = tf.float32


def save(directory, case, weights):
    """Saves a case as the signature that is served by default; gives it as it is in memory."""

    def serve(x):
        weights.given = 0  # variables are made in one trace and used in the next
        return {"y": case.function(x, weights)}

    spec = tf.TensorSpec([None, *case.shape], case.dtype, "x")
    serve = tf.function(serve, autograph=False)
    signature = serve.get_concrete_function(spec)
    tf.saved_model.save(weights, str(directory), {"serving_default": signature})
    return signature


def assert_same_answers(signature, new, case):
    rng = np.random.default_rng(22)
    if case.compiled:
        signature, new = (
            tf.function(s, jit_compile=True, autograph=False) for s in (signature, new)
        )
    shape = [3, *(size or 10 for size in case.shape)]
    x = tf.constant(rng.normal(0, 2, shape), case.dtype)
    expected, actual = signature(x=x)["y"], new(x=x)["y"]
    assert actual.dtype == expected.dtype
    expected = expected.numpy().astype(np.float64)
    atol = TOLERANCES[case.dtype] * np.abs(expected).max()
    assert atol > 0
    np.testing.assert_allclose(actual.numpy().astype(np.float64), expected, rtol=0, atol=atol)


def norm_operations(signature):
    """The operations that a function runs and that only a BatchNormalization has."""
    fused = ("FusedBatchNorm", "BatchNormWith")
    roots = ("Rsqrt", "Sqrt", "Pow")
    return [op for op in op_counts(signature) if op.startswith(fused) or op in roots]


def rewritten(tmp_path, case, mode="fold", weights=None):
    """Saves and rewrites a case, and compares; gives the decisions and the new signature."""
    weights = weights or Weights(dtype=case.dtype)  # which are to outlive the comparison
    signature = save(tmp_path / "in", case, weights)
    report = mbn.rewrite_saved_model(tmp_path / "in", tmp_path / "out", mode)
    assert report.ok
    assert list(report.comparisons) == ["serving_default"]
    new = tf.saved_model.load(str(tmp_path / "out"))  # holds the variables
    result = new.signatures["serving_default"]
    assert_same_answers(signature, result, case)
    return report.plan.decisions, result


def assert_all_gone(decisions, result, into=1, norms=1, action="folded"):
    assert [d.reason for d in decisions] == [""] * norms
    assert [(d.action, len(d.into)) for d in decisions] == [(action, into)] * norms
    assert norm_operations(result) == []


def shaped(vector, rank, axis):
    """A vector as it is broadcast to channels on an axis."""
    return vector if axis == -1 else tf.reshape(vector, [-1] + [1] * (rank - 1 - axis))


def normalised(x, weights, axis=-1, **given):
    """Some BatchNormalization of the channels on an axis; not what is tested here."""
    gamma, beta, mean, variance = (
        shaped(p, len(x.shape), axis) for p in weights.norm(x.shape[axis], **given)
    )
    return tf.nn.batch_normalization(x, mean, variance, beta, gamma, EPSILON)


def conv(x, w, size=1, channels=CHANNELS, padding="VALID"):
    return tf.nn.conv2d(x, w.kernel(size, size, x.shape[-1], channels), 1, padding)


# ------------------------------------------------------------- what is BatchNormalization


def inverse(variance):
    return tf.math.rsqrt(variance + EPSILON)


def deviation(variance):
    return tf.sqrt(variance + EPSILON)


def fused(operation, x, norm, **kwargs):
    gamma, beta, mean, variance = norm
    return operation(
        x=x, scale=gamma, offset=beta, mean=mean, variance=variance, epsilon=EPSILON,
        is_training=False, **kwargs,
    ).y  # fmt: skip


def with_parameters(change):
    """tf.nn.batch_normalization with its parameters changed in shape."""

    def form(x, *norm):
        gamma, beta, mean, variance = map(change, norm)
        return tf.nn.batch_normalization(x, mean, variance, beta, gamma, EPSILON)

    return form


def in_two_steps(x, g, b, m, v):
    scale = g * inverse(v)
    return x * scale + (b - m * scale)


FORMS = {
    "FusedBatchNorm": lambda x, *norm: fused(raw.FusedBatchNorm, x, norm),
    "FusedBatchNormV2": lambda x, *norm: fused(raw.FusedBatchNormV2, x, norm),
    "FusedBatchNormV3": lambda x, *norm: fused(raw.FusedBatchNormV3, x, norm),
    "nn": lambda x, g, b, m, v: tf.nn.batch_normalization(x, m, v, b, g, EPSILON),
    "nn_no_gamma": lambda x, g, b, m, v: tf.nn.batch_normalization(x, m, v, b, None, EPSILON),
    "nn_no_beta": lambda x, g, b, m, v: tf.nn.batch_normalization(x, m, v, None, g, EPSILON),
    "nn_neither": lambda x, g, b, m, v: tf.nn.batch_normalization(x, m, v, None, None, EPSILON),
    "divided": lambda x, g, b, m, v: ((x - m) / deviation(v)) * g + b,
    "divided_gamma_first": lambda x, g, b, m, v: g * ((x - m) / deviation(v)) + b,
    "divided_late": lambda x, g, b, m, v: g * (x - m) / deviation(v) + b,
    "divided_alone": lambda x, g, b, m, v: (x - m) / deviation(v),
    "rsqrt": lambda x, g, b, m, v: (x - m) * inverse(v) * g + b,
    "rsqrt_alone": lambda x, g, b, m, v: (x - m) * inverse(v),
    "rsqrt_gamma_last": lambda x, g, b, m, v: b + (inverse(v) * (x - m)) * g,
    "scale_computed": lambda x, g, b, m, v: (x - m) * (g * inverse(v)) + b,
    "in_two_steps": in_two_steps,
    "shift_subtracted": lambda x, g, b, m, v: x * (g * inverse(v)) - (m * g * inverse(v) - b),
    "each_divided": lambda x, g, b, m, v: (x / deviation(v) - m / deviation(v)) * g + b,
    "mean_minus_x": lambda x, g, b, m, v: b - (m - x) * (g * inverse(v)),
    "reciprocal": lambda x, g, b, m, v: (x - m) * tf.math.reciprocal(deviation(v)) * g + b,
    "power": lambda x, g, b, m, v: (x - m) / (v + EPSILON) ** 0.5 * g + b,
    "negative_power": lambda x, g, b, m, v: (x - m) * tf.pow(v + EPSILON, -0.5) * g + b,
    "variance_clipped": lambda x, g, b, m, v: (x - m) * inverse(tf.maximum(v, 0.0)) * g + b,
    "bias_add": lambda x, g, b, m, v: tf.nn.bias_add((x - m) * (g * inverse(v)), b),
    "Add": lambda x, g, b, m, v: raw.Add(x=raw.Sub(x=x, y=m) * (inverse(v) * g), y=b),
    "handed_on": lambda x, g, b, m, v: tf.identity(tf.identity(x - m) * inverse(v)) * g + b,
    "reshaped": with_parameters(lambda p: tf.reshape(p, [1, 1, 1, -1])),
    "reshaped_to_3": with_parameters(lambda p: tf.reshape(p, [1, 1, CHANNELS])),
    "expanded": with_parameters(lambda p: tf.expand_dims(tf.expand_dims(p, 0), 0)),
    "indexed": with_parameters(lambda p: tf.convert_to_tensor(p)[None, None, None, :]),
    "broadcast": with_parameters(lambda p: tf.broadcast_to(p, [1, 1, 1, CHANNELS])),
    "cast_parameters": with_parameters(lambda p: tf.cast(tf.cast(p, tf.float64), tf.float32)),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_batch_norm_folds(form, tmp_path):
    def block(x, w):
        size = 1 if w.constant else 3
        return FORMS[form](conv(x, w, size, padding="SAME"), *w.norm(CHANNELS))

    assert_all_gone(*rewritten(tmp_path, Case(stored_both_ways(block))), norms=2)


def numbers(seed, size=CHANNELS):
    return np.random.default_rng(seed).uniform(-1.5, 1.5, size).astype(np.float32)


PRECOMPUTED = {
    "mul_add": lambda x: x * numbers(1) + numbers(2),
    "mul_sub": lambda x: x * numbers(1) - numbers(2),
    "mul_bias_add": lambda x: tf.nn.bias_add(x * numbers(1), numbers(2)),
    "flipped": lambda x: numbers(2) + numbers(1) * x,
    "shaped": lambda x: x * numbers(1).reshape(1, 1, 1, -1) + numbers(2).reshape(1, 1, 1, -1),
}


@pytest.mark.parametrize("form", PRECOMPUTED)
def test_constants_computed_beforehand_fold(form, tmp_path):
    case = Case(stored_both_ways(lambda x, w: PRECOMPUTED[form](conv(x, w))))
    decisions, result = rewritten(tmp_path, case)
    assert_all_gone(decisions, result, norms=2)
    assert "Mul" not in op_counts(result)


def in_float32(form):
    return lambda x, *norm: tf.cast(form(tf.cast(x, tf.float32), *norm), x.dtype)


def in_float16(x, *norm):
    gamma, beta, mean, variance = (tf.cast(p, tf.float16) for p in norm)
    return tf.nn.batch_normalization(x, mean, variance, beta, gamma, EPSILON)


HALF = {
    "arithmetic_between_casts": in_float32(FORMS["nn"]),
    "divided_between_casts": in_float32(FORMS["divided"]),
    "fused_between_casts": in_float32(FORMS["FusedBatchNormV3"]),
    "parameters_cast": in_float16,
    "FusedBatchNormV3": FORMS["FusedBatchNormV3"],
}


@pytest.mark.parametrize("form", HALF)
def test_batch_norm_of_float16_folds(form, tmp_path):
    def block(x, w):
        return HALF[form](conv(x, w), *w.norm(CHANNELS))

    case = Case(stored_both_ways(block), dtype=tf.float16)
    assert_all_gone(*rewritten(tmp_path, case), norms=2)


def conv_first(x, w, size=1):
    return tf.nn.conv2d(x, w.kernel(size, size, x.shape[1], CHANNELS), 1, "VALID", "NCHW")


CHANNELS_FIRST = {
    "four_axes": with_parameters(lambda p: tf.reshape(p, [1, CHANNELS, 1, 1])),
    "three_axes": with_parameters(lambda p: tf.reshape(p, [CHANNELS, 1, 1])),
    "indexed": with_parameters(lambda p: tf.convert_to_tensor(p)[None, :, None, None]),
    "FusedBatchNormV3": lambda x, *norm: fused(raw.FusedBatchNormV3, x, norm, data_format="NCHW"),
    "precomputed": lambda x, *norm: x * numbers(1, (1, 4, 1, 1)) + numbers(2, (1, 4, 1, 1)),
}


@pytest.mark.parametrize("form", CHANNELS_FIRST)
def test_batch_norm_with_channels_first_folds(form, tmp_path):
    def block(x, w):
        return CHANNELS_FIRST[form](conv_first(x, w, 3), *w.norm(CHANNELS))

    case = Case(stored_both_ways(block), IMAGE_FIRST, compiled=True)
    assert_all_gone(*rewritten(tmp_path, case), norms=2)


def through_images(x, *norm):
    """What Keras makes of a fused BatchNormalization of sequences."""
    return tf.squeeze(FORMS["FusedBatchNormV3"](tf.expand_dims(x, 1), *norm), [1])


def dense(x, w):
    return tf.matmul(x, w.kernel(x.shape[-1], CHANNELS))


def conv1d(x, w, padding="VALID"):
    return tf.nn.conv1d(x, w.kernel(3, x.shape[-1], CHANNELS), 1, padding)


def conv3d(x, w, padding="VALID"):
    return tf.nn.conv3d(x, w.kernel(2, 2, 2, x.shape[-1], CHANNELS), [1] * 5, padding)


def fused_volume(x, *norm):
    return fused(raw.FusedBatchNormV3, x, norm, data_format="NDHWC")


RANKS = {
    "rank_2": (dense, FORMS["nn"], (5,)),
    "rank_2_divided": (dense, FORMS["divided"], (5,)),
    "rank_2_precomputed": (dense, lambda x, *norm: PRECOMPUTED["mul_add"](x), (5,)),
    "rank_3": (conv1d, FORMS["nn"], SEQUENCE),
    "rank_3_divided": (conv1d, FORMS["divided"], SEQUENCE),
    "rank_3_through_images": (conv1d, through_images, SEQUENCE),
    "rank_5": (conv3d, FORMS["nn"], VOLUME),
    "rank_5_divided": (conv3d, FORMS["divided"], VOLUME),
    "rank_5_fused": (conv3d, fused_volume, VOLUME),
}


@pytest.mark.parametrize("rank", RANKS)
def test_batch_norm_of_every_rank_folds(rank, tmp_path):
    linear, form, shape = RANKS[rank]
    case = Case(stored_both_ways(lambda x, w: form(linear(x, w), *w.norm(CHANNELS))), shape)
    assert_all_gone(*rewritten(tmp_path, case), norms=2)


# ----------------------------------------------------------- BatchNormalization of old graphs


def old_graph(scaled, producer=8):
    """A GraphDef of the time of BatchNormWithGlobalNormalization, and what it has to give."""
    rng = np.random.default_rng(23)
    gamma, beta, mean, variance = arrays = statistics(rng, CHANNELS)
    with tf.Graph().as_default() as graph:
        x = v1.placeholder(tf.float32, [None, *IMAGE], "x")
        y = conv(x, Weights(constant=True))
        norm = [tf.constant(array) for array in arrays]
        y, *_ = v1.nn.fused_batch_norm(y, *norm, EPSILON, is_training=False, name="norm")
        tf.identity(y, "y")
    graph_def = graph.as_graph_def()
    graph_def.versions.producer = producer
    (node,) = (node for node in graph_def.node if node.op.startswith("FusedBatchNorm"))
    x, g, b, m, v = node.input
    node.op = "BatchNormWithGlobalNormalization"
    node.input[:] = [x, m, v, b, g]
    node.attr.clear()
    node.attr["T"].type = tf.float32.as_datatype_enum
    node.attr["variance_epsilon"].f = EPSILON
    node.attr["scale_after_normalization"].b = scaled
    scale = (gamma if scaled else 1.0) / np.sqrt(variance + EPSILON)
    return graph_def, scale, beta - mean * scale


@pytest.mark.parametrize("scaled", [True, False])
def test_batch_norm_with_global_normalization_is_read(scaled):
    """On a graph alone: `tf.saved_model.load` refuses SavedModels with it."""
    graph_def, scale, shift = old_graph(scaled)
    with tf.Graph().as_default() as graph:
        tf.import_graph_def(graph_def, name="")
    function = FunctionGraph("old", graph_def, graph, False, ("x",), ("y:0",), {}, {})
    norm = fused_norm(Constants(function, Writes()), graph.get_operation_by_name("norm"))
    assert norm.reason is None
    assert (norm.axis, norm.rank) == (3, 4)
    assert norm.source.op.type == "Conv2D"
    np.testing.assert_allclose(norm.map.scale, scale, rtol=1e-6)
    np.testing.assert_allclose(norm.map.shift, shift, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------ what is none of them


def layer_norm(x, w):
    gamma, beta, _, _ = w.norm(x.shape[-1])
    mean, variance = tf.nn.moments(x, [-1], keepdims=True)
    return (x - mean) * tf.math.rsqrt(variance + EPSILON) * gamma + beta


def layer_norm_divided(x, w):
    gamma, beta, _, _ = w.norm(x.shape[-1])
    mean = tf.reduce_mean(x, -1, keepdims=True)
    variance = tf.reduce_mean(tf.square(x - mean), -1, keepdims=True)
    return gamma * ((x - mean) / tf.sqrt(variance + EPSILON)) + beta


def layer_norm_nn(x, w):
    gamma, beta, _, _ = w.norm(x.shape[-1])
    mean, variance = tf.nn.moments(x, [-1], keepdims=True)
    return tf.nn.batch_normalization(x, mean, variance, beta, gamma, EPSILON)


def instance_norm(x, w):
    gamma, beta, _, _ = w.norm(x.shape[-1])
    mean, variance = tf.nn.moments(x, [1, 2], keepdims=True)
    return (x - mean) / tf.sqrt(variance + EPSILON) * gamma + beta


def group_norm(x, w):
    gamma, beta, _, _ = w.norm(x.shape[-1])
    _, height, width, channels = x.shape
    grouped = tf.reshape(x, [-1, height, width, 2, channels // 2])
    mean, variance = tf.nn.moments(grouped, [1, 2, 4], keepdims=True)
    grouped = (grouped - mean) * tf.math.rsqrt(variance + EPSILON)
    return tf.reshape(grouped, [-1, height, width, channels]) * gamma + beta


def rms_norm(x, w):
    gamma, *_ = w.norm(x.shape[-1])
    return x * tf.math.rsqrt(tf.reduce_mean(tf.square(x), -1, keepdims=True) + EPSILON) * gamma


def length_norm(x, w):
    return tf.math.l2_normalize(x, -1)


def scores_by(scaled):
    """Scores of positions against each other, at a temperature, as attention computes them."""

    def function(x, w):
        x = tf.reshape(x, [-1, 36, x.shape[-1]])
        queries, keys = dense(x, w), dense(x, w)
        return tf.nn.softmax(scaled(tf.matmul(queries, keys, transpose_b=True), w))

    return function


def weight_norm(x, w):
    raw_kernel, gamma = w.kernel(1, 1, x.shape[-1], CHANNELS), w.norm(CHANNELS)[0]
    length = tf.reduce_sum(tf.square(raw_kernel), [0, 1, 2])
    return tf.nn.conv2d(x, raw_kernel * gamma * tf.math.rsqrt(length + EPSILON), 1, "VALID")


MEAN, DEVIATION = numbers(3, 3), np.abs(numbers(4, 3)) + 0.5

NO_NORMS = {
    "layer_norm": layer_norm,
    "layer_norm_divided": layer_norm_divided,
    "layer_norm_nn": layer_norm_nn,
    "instance_norm": instance_norm,
    "group_norm": group_norm,
    "rms_norm": rms_norm,
    "length_norm": length_norm,
    "temperature_rsqrt": scores_by(lambda x, w: x * tf.math.rsqrt(tf.constant(4.0))),
    "temperature_sqrt": scores_by(lambda x, w: x / tf.sqrt(float(CHANNELS))),
    "temperature_variable": scores_by(lambda x, w: x * tf.math.rsqrt(w.of(np.float32(4)))),
    "weight_norm": weight_norm,
}


@pytest.mark.parametrize("form", NO_NORMS)
def test_what_is_no_batch_norm_is_left_alone(form, tmp_path):
    def block(x, w):
        return NO_NORMS[form](conv(x, w, 3, padding="SAME"), w)

    decisions, _ = rewritten(tmp_path, Case(both_ways_beside(block)))
    assert decisions == ()


PREPARATIONS = {
    "divided": lambda x: (x - MEAN) / DEVIATION,
    "multiplied": lambda x: (x - MEAN) * (1 / DEVIATION),
    "from_pixels": lambda x: (x / 255.0 - MEAN) / DEVIATION,
    "numbers": lambda x: x / 127.5 - 1.0,
    "variance": lambda x: (x - MEAN) / tf.sqrt(DEVIATION),
}


@pytest.mark.parametrize("form", PREPARATIONS)
def test_preparation_of_inputs_is_no_batch_norm(form, tmp_path):
    decisions, _ = rewritten(tmp_path, Case(lambda x, w: conv(PREPARATIONS[form](x), w, 3)))
    assert decisions == ()


@pytest.mark.parametrize("library", [keras, tf_keras], ids=["keras_3", "tf_keras"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("LayerNormalization", {}),
        ("LayerNormalization", {"center": False}),
        ("LayerNormalization", {"scale": False}),
        ("LayerNormalization", {"axis": [1, 2, 3]}),
        ("GroupNormalization", {"groups": 2}),
    ],
    ids=["layer", "layer_without_beta", "layer_without_gamma", "layer_of_all", "group"],
)
def test_other_layers_are_left_alone(name, options, library, tmp_path):
    weights = Weights()
    layer = weights.layer = getattr(library.layers, name)(**options)
    layer.build((None, *IMAGE[:2], CHANNELS))
    layer.set_weights([weights.rng.normal(1, 0.5, v.shape) for v in layer.get_weights()])
    decisions, _ = rewritten(tmp_path, Case(lambda x, w: layer(conv(x, w))), weights=weights)
    assert decisions == ()


@pytest.mark.parametrize("mode", ["fold", "depthwise"])
@pytest.mark.parametrize("operation", ["FusedBatchNorm", "FusedBatchNormV2", "FusedBatchNormV3"])
def test_statistics_of_the_batch_are_kept(operation, mode, tmp_path):
    def function(x, w):
        gamma, beta, _, _ = w.norm(CHANNELS)
        return getattr(raw, operation)(
            x=conv(x, w), scale=gamma, offset=beta, mean=[], variance=[], epsilon=EPSILON,
            is_training=True,
        ).y  # fmt: skip

    (decision,), _ = rewritten(tmp_path, Case(function), mode)
    assert decision.action == "kept"
    assert "training" in decision.reason


# ------------------------------------------------------------------------ linear operations


def biased(function, add=tf.nn.bias_add):
    def with_bias(x, w):
        y = function(x, w)
        return add(y, w.of(numbers(5, y.shape[-1])))

    return with_bias


def convolution(dilations, padding, spatial=1):
    def function(x, w):
        weights = w.kernel(*[3] * spatial, x.shape[-1], CHANNELS)
        return tf.nn.convolution(x, weights, padding=padding, dilations=dilations)

    return function


def blocked(padding):
    """A dilated convolution as TensorFlow 1 makes it: of blocks of every other position."""

    def function(x, w):
        def inner(blocks, spatial, padding):
            return tf.nn.conv2d(blocks, weights, 1, padding)

        weights = w.kernel(3, 3, x.shape[-1], CHANNELS)
        return v1.nn.with_space_to_batch(x, [2, 2], padding, inner, filter_shape=[3, 3])

    return function


def explicit_blocks(pads):
    """Blocks of a sequence, convolved with 1x1 or 3x1 kernels, and put together again."""

    def function(x, w):
        blocks = tf.space_to_batch_nd(x, [2], [[pads, pads]])
        y = tf.nn.conv1d(blocks, w.kernel(1 + pads, x.shape[-1], CHANNELS), 1, "VALID")
        return tf.batch_to_space(y, [2], [[0, 0]])

    return function


def blocks_kept(x, w):
    """Zeros are added behind, and one result too few is cut off."""
    blocks = tf.space_to_batch_nd(x, [2], [[0, 2]])
    y = tf.nn.conv1d(blocks, w.kernel(3, x.shape[-1], CHANNELS), 1, "VALID")
    return tf.batch_to_space(y, [2], [[0, 1]])


def blocks_strided(x, w):
    """A convolution that moves by two positions reads other ones than are counted by."""
    blocks = tf.space_to_batch_nd(x, [2], [[0, 1]])
    y = tf.nn.conv1d(blocks, w.kernel(3, x.shape[-1], CHANNELS), 2, "VALID")
    return tf.batch_to_space(y, [2], [[0, 1]])


def depthwise_dilated(padding):
    def function(x, w):
        weights = w.kernel(3, 3, x.shape[-1], 1)
        return tf.nn.depthwise_conv2d(x, weights, [1] * 4, padding, dilations=[2, 2])

    return function


def depthwise(multiplier, padding="VALID"):
    def function(x, w):
        weights = w.kernel(3, 3, x.shape[-1], multiplier)
        return tf.nn.depthwise_conv2d(x, weights, [1, 1, 1, 1], padding)

    return function


def grouped(x, w):
    return tf.nn.conv2d(x, w.kernel(3, 3, x.shape[-1] // 2, 6), 1, "VALID")


def transposed(size, stride):
    def function(x, w):
        side = x.shape[1] * stride
        shape = tf.stack([tf.shape(x)[0], side, side, CHANNELS])
        weights = w.kernel(size, size, CHANNELS, x.shape[-1])
        return tf.nn.conv2d_transpose(x, weights, shape, stride, "SAME")

    return function


def transposed_volume(size, stride):
    def function(x, w):
        side = x.shape[1] * stride
        shape = tf.stack([tf.shape(x)[0], side, side, side, CHANNELS])
        weights = w.kernel(size, size, size, CHANNELS, x.shape[-1])
        return tf.nn.conv3d_transpose(x, weights, shape, stride, "SAME")

    return function


def batched(turned):
    def function(x, w):
        shape = (CHANNELS, x.shape[-1]) if turned else (x.shape[-1], CHANNELS)
        return raw.BatchMatMulV2(x=x, y=w.kernel(*shape), adj_y=turned)

    return function


def dense_turned(x, w):
    return tf.matmul(x, w.kernel(CHANNELS, x.shape[-1]), transpose_b=True)


def kernel_transposed(x, w):
    return tf.matmul(x, tf.transpose(w.kernel(CHANNELS, x.shape[-1])))


def tensordot(x, w):
    return tf.tensordot(x, w.kernel(x.shape[-1], CHANNELS), [[2], [0]])


def einsum(equation, *order):
    def function(x, w):
        sizes = {"c": x.shape[-1], "d": CHANNELS}
        return tf.einsum(equation, x, w.kernel(*(sizes[letter] for letter in order)))

    return function


def first_biased(x, w):
    return tf.nn.bias_add(conv_first(x, w, 3), w.of(numbers(5)), "NCHW")


def first_depthwise(x, w):
    weights = w.kernel(3, 3, x.shape[1], 2)
    return tf.nn.depthwise_conv2d(x, weights, [1, 1, 1, 1], "VALID", "NCHW")


# Where every output reads only real inputs: a BatchNormalization may be on either side.
EXACT = {
    "conv2d_1x1": Case(conv),
    "conv2d_3x3": Case(lambda x, w: conv(x, w, 3)),
    "conv2d_BiasAdd": Case(biased(lambda x, w: conv(x, w, 3))),
    "conv2d_AddV2": Case(biased(lambda x, w: conv(x, w, 3), tf.add)),
    "conv2d_Add": Case(biased(lambda x, w: conv(x, w, 3), lambda x, b: raw.Add(x=x, y=b))),
    "conv2d_bias_first": Case(biased(lambda x, w: conv(x, w, 3), lambda x, b: b + x)),
    "conv2d_open_size": Case(lambda x, w: conv(x, w, 3), (None, None, 3)),
    "conv1d": Case(conv1d, SEQUENCE),
    "conv1d_bias": Case(biased(conv1d), SEQUENCE),
    "conv1d_open_length": Case(biased(conv1d), (None, 4)),
    "dilated_1d": Case(convolution(2, "VALID"), SEQUENCE),
    "dilated_1d_bias": Case(biased(convolution(2, "VALID")), SEQUENCE),
    "dilated_1d_open_length": Case(convolution(2, "VALID"), (None, 4)),
    "dilated_1d_left_over": Case(convolution(3, "VALID"), (11, 4)),
    "dilated_2d": Case(convolution([2, 2], "VALID", 2)),
    "dilated_2d_open_size": Case(convolution([2, 2], "VALID", 2), (None, None, 3)),
    "dilated_depthwise_open_size": Case(depthwise_dilated("VALID"), (None, None, 3)),
    "blocks_2d": Case(blocked("VALID")),
    "blocks_2d_bias": Case(biased(blocked("VALID"))),
    "blocks_1d": Case(explicit_blocks(0), SEQUENCE),
    "conv3d": Case(conv3d, VOLUME),
    "depthwise": Case(depthwise(1)),
    "depthwise_multiplier_2": Case(depthwise(2)),
    "grouped": Case(grouped, (6, 6, 4)),
    "grouped_bias": Case(biased(grouped), (6, 6, 4), compiled=True),
    "transposed_1x1": Case(transposed(1, 1)),
    "matmul": Case(dense, (5,)),
    "matmul_BiasAdd": Case(biased(dense), (5,)),
    "matmul_AddV2": Case(biased(dense, tf.add), (5,)),
    "matmul_transpose_b": Case(dense_turned, (5,)),
    "matmul_kernel_transposed": Case(kernel_transposed, (5,)),
    "batch_matmul": Case(batched(False), SEQUENCE),
    "batch_matmul_bias": Case(biased(batched(False), tf.add), SEQUENCE),
    "batch_matmul_adj_y": Case(batched(True), SEQUENCE),
    "tensordot": Case(tensordot, SEQUENCE),
    "tensordot_bias": Case(biased(tensordot), SEQUENCE),
    "tensordot_open_length": Case(biased(tensordot, tf.add), (None, 4)),
    "einsum": Case(einsum("abc,cd->abd", "c", "d"), SEQUENCE),
    "einsum_turned": Case(einsum("abc,dc->abd", "d", "c"), SEQUENCE),
    "einsum_ellipsis": Case(einsum("...c,cd->...d", "c", "d"), SEQUENCE),
    "conv2d_first_1x1": Case(conv_first, IMAGE_FIRST, 1, True),
    "conv2d_first_BiasAdd": Case(first_biased, IMAGE_FIRST, 1, True),
    "depthwise_first": Case(first_depthwise, IMAGE_FIRST, 1, True),
}

# Where some read zeros, or nothing: only behind it.
PADDED = {
    "conv2d": Case(lambda x, w: conv(x, w, 3, padding="SAME")),
    "conv2d_bias": Case(biased(lambda x, w: conv(x, w, 3, padding="SAME"))),
    "conv2d_explicit": Case(lambda x, w: conv(x, w, 3, padding=[[0, 0], [1, 1], [1, 1], [0, 0]])),
    "conv1d": Case(lambda x, w: conv1d(x, w, "SAME"), SEQUENCE),
    "dilated_1d": Case(convolution(2, "SAME"), SEQUENCE),
    "dilated_1d_open_length": Case(biased(convolution(2, "SAME")), (None, 4)),
    "dilated_2d": Case(biased(convolution([2, 2], "SAME", 2))),
    "dilated_2d_open_size": Case(convolution([2, 2], "SAME", 2), (None, None, 3)),
    "blocks_1d": Case(explicit_blocks(1), SEQUENCE),
    "blocks_2d": Case(biased(blocked("SAME"))),
    "blocks_2d_open_size": Case(biased(blocked("SAME")), (None, None, 3)),
    "conv3d": Case(lambda x, w: conv3d(x, w, "SAME"), VOLUME),
    "depthwise": Case(depthwise(2, "SAME")),
    "dilated_depthwise_open_size": Case(depthwise_dilated("SAME"), (None, None, 3)),
    "blocks_of_padding_that_is_kept": Case(blocks_kept, SEQUENCE),
    "blocks_of_a_moving_convolution": Case(blocks_strided, (13, 4)),
    "transposed_3x3": Case(transposed(3, 2)),
    "transposed_bias": Case(biased(transposed(2, 2))),
    "transposed_volume_3x3": Case(transposed_volume(3, 2), VOLUME),
}


def followed(case):
    def function(x, w):
        return normalised(case.function(x, w), w, case.axis)

    return case._replace(function=function)


def preceded(case, **given):
    def function(x, w):
        return case.function(normalised(x, w, case.axis, **given), w)

    return case._replace(function=function)


@pytest.mark.parametrize("name", EXACT)
def test_linear_operation_absorbs_what_follows_and_what_precedes(name, tmp_path):
    assert_all_gone(*rewritten(tmp_path, followed(preceded(EXACT[name]))), norms=2)


@pytest.mark.parametrize("name", PADDED)
def test_padding_stops_the_shift_of_what_precedes_only(name, tmp_path):
    (first, second), _ = rewritten(tmp_path, followed(preceded(PADDED[name])))
    assert (first.action, second.action) == ("kept", "folded")
    why = "adds up another number" if name.startswith("transposed") else "pad"
    assert why in first.reason


@pytest.mark.parametrize("name", ["conv2d", "conv1d", "blocks_2d", "transposed_3x3"])
def test_scale_alone_passes_padding(name, tmp_path):
    assert_all_gone(*rewritten(tmp_path, preceded(PADDED[name], beta=0, mean=0)))


@pytest.mark.parametrize("name", ["conv2d_BiasAdd", "dilated_1d_bias", "matmul_BiasAdd"])
def test_constant_kernel_absorbs_both_sides(name, tmp_path):
    case = followed(preceded(EXACT[name]))
    assert_all_gone(*rewritten(tmp_path, case, weights=Weights(constant=True)), norms=2)


# -------------------------------------------------------------------- what lets a map pass


class Way(NamedTuple):
    """What lies between a linear operation and a BatchNormalization.

    Attributes:
        function: all but the BatchNormalization.
        shape: of the inputs.
        axis: of the channels that are normalised.
        given: parameters of the BatchNormalization that are not random.
        into: how many operations absorb it.
    """

    function: Callable[[Any, Weights], Any]
    shape: tuple[int | None, ...] = IMAGE
    axis: int = -1
    given: dict[str, float] = {}  # noqa: RUF012
    into: int = 1


def behind_conv(function, **kwargs):
    return Way(lambda x, w: function(conv(x, w, 3, padding="SAME")), **kwargs)


OF_CODE = tf.constant([2.0, -1.0, 0.5, 4.0])  # functions capture it, as an argument of theirs


def prelu(x, alpha):
    return tf.nn.relu(x) - alpha * tf.nn.relu(-x)


WAYS = {
    "max_pool": behind_conv(lambda x: tf.nn.max_pool2d(x, 2, 2, "VALID"), given={"gamma": 0.7}),
    "max_pool_same": behind_conv(lambda x: tf.nn.max_pool2d(x, 3, 2, "SAME"), given={"gamma": 0.7}),
    "reduce_max": behind_conv(lambda x: tf.reduce_max(x, [1, 2]), given={"gamma": 0.7}),
    "avg_pool": behind_conv(lambda x: tf.nn.avg_pool2d(x, 2, 2, "VALID")),
    "avg_pool_same": behind_conv(lambda x: tf.nn.avg_pool2d(x, 3, 1, "SAME")),
    "reduce_mean": behind_conv(lambda x: tf.reduce_mean(x, [1, 2])),
    "reduce_mean_keepdims": behind_conv(lambda x: tf.reduce_mean(x, [1, 2], keepdims=True)),
    "reduce_mean_negative_axes": behind_conv(lambda x: tf.reduce_mean(x, [-3, -2])),
    "mirror_pad": behind_conv(lambda x: tf.pad(x, [[0, 0], [1, 1], [2, 0], [0, 0]], "REFLECT")),
    "pad_without_shift": behind_conv(
        lambda x: tf.pad(x, [[0, 0], [1, 1], [1, 1], [0, 0]]), given={"mean": 0, "beta": 0}
    ),
    "flatten_one_position": Way(lambda x, w: tf.reshape(conv(x, w, 3), [-1, CHANNELS]), (3, 3, 3)),
    "unflatten": Way(lambda x, w: tf.reshape(dense(x, w), [-1, 2, 1, 2]), (5,)),
    "to_channels_first": behind_conv(lambda x: tf.transpose(x, [0, 3, 1, 2]), axis=1),
    "concat": Way(lambda x, w: tf.concat([conv(x, w), conv(x, w)], -1), into=2),
    "concat_of_positions": Way(lambda x, w: tf.concat([conv(x, w), conv(x, w)], 1), into=2),
    # Of values of their own; branches of one value are merged.
    "add": Way(lambda x, w: conv(x, w) + conv(tf.nn.relu(x), w), into=2),
    "add_n": Way(
        lambda x, w: tf.add_n([conv(f(x), w) for f in (tf.identity, tf.abs, tf.nn.relu)]), into=3
    ),
    "subtract": Way(lambda x, w: conv(x, w) - conv(tf.nn.relu(x), w), into=2),
    "maximum": Way(lambda x, w: tf.maximum(conv(x, w), conv(x, w)), given={"gamma": 0.7}, into=2),
    "strided_slice": behind_conv(lambda x: x[:, 1:-1, ::2]),
    "tensor_of_code": behind_conv(lambda x: x * OF_CODE + OF_CODE[0]),
    "slice_of_channels": behind_conv(lambda x: x[..., 1:]),
    "slice": behind_conv(lambda x: tf.slice(x, [0, 1, 1, 0], [-1, 3, 4, -1])),
    "resize_nearest": behind_conv(lambda x: tf.image.resize(x, [9, 9], "nearest")),
    "resize_bilinear": behind_conv(lambda x: tf.image.resize(x, [9, 9])),
    "tile": behind_conv(lambda x: tf.tile(x, [1, 2, 2, 1])),
    "prelu_without_shift": Way(
        lambda x, w: prelu(conv(x, w), w.of(numbers(6))),
        given={"gamma": 0.7, "mean": 0, "beta": 0},
    ),
    "relu_without_shift": behind_conv(tf.nn.relu, given={"gamma": 0.7, "mean": 0, "beta": 0}),
}


@pytest.mark.parametrize("name", WAYS)
def test_scale_and_shift_pass(name, tmp_path):
    way = WAYS[name]

    def function(x, w):
        return normalised(way.function(x, w), w, way.axis, **way.given)

    assert_all_gone(*rewritten(tmp_path, Case(function, way.shape)), way.into)


BLOCKED = {
    "max_pool": (WAYS["max_pool"], "negative scale"),
    "reduce_max": (WAYS["reduce_max"], "negative scale"),
    "maximum": (WAYS["maximum"], "negative scale"),
    "pad": (WAYS["pad_without_shift"], "pads with zeros"),
    "prelu": (WAYS["prelu_without_shift"], "activation"),
    "relu": (WAYS["relu_without_shift"], "activation"),
    "flatten": (behind_conv(lambda x: tf.reshape(x, [-1, 6 * 6 * CHANNELS])), "mixes"),
    "reduce_mean_of_channels": (behind_conv(lambda x: tf.reduce_mean(x, [1, 3])), "axis"),
}


@pytest.mark.parametrize("name", BLOCKED)
def test_what_does_not_pass_stays_with_a_reason(name, tmp_path):
    way, words = BLOCKED[name]

    def function(x, w):
        return normalised(way.function(x, w), w, way.axis)

    (decision,), _ = rewritten(tmp_path, Case(function, way.shape))
    assert decision.action == "kept"
    assert words in decision.reason


ONWARD = {
    "flatten": lambda x, w: dense(tf.reshape(x, [-1, 6 * 6 * 3]), w),
    "reduce_mean": lambda x, w: dense(tf.reduce_mean(x, [1, 2]), w),
    "avg_pool": lambda x, w: conv(tf.nn.avg_pool2d(x, 2, 2, "VALID"), w, 3),
    "slice": lambda x, w: conv(x[:, 1:-1, ::2], w, 3),
    "concat": lambda x, w: conv(tf.concat([x, conv(w.image, w)], -1), w, 3),
    "resize_nearest": lambda x, w: conv(tf.image.resize(x, [9, 9], "nearest"), w, 3),
}


@pytest.mark.parametrize("name", ONWARD)
def test_scale_and_shift_pass_onward(name, tmp_path):
    def function(x, w):
        w.image = x
        return ONWARD[name](normalised(x, w), w)

    assert_all_gone(*rewritten(tmp_path, Case(function)))


def tokens(x):
    return tf.cast(tf.minimum(tf.abs(x), 8.0), tf.int32)


TABLES = {
    "gather": lambda x, table: tf.gather(table, tokens(x)),
    "lookup": lambda x, table: tf.nn.embedding_lookup(table, tokens(x)),
    "read": lambda x, table: tf.gather(tf.convert_to_tensor(table), tokens(x)),
}


@pytest.mark.parametrize("form", TABLES)
def test_an_embedding_absorbs_what_follows(form, tmp_path):
    def block(x, w):
        return normalised(TABLES[form](x, w.kernel(9, CHANNELS)), w)

    decisions, result = rewritten(tmp_path, Case(both_ways_beside(block), SEQUENCE))
    assert_all_gone(decisions, result, norms=2)
    assert not {"BiasAdd", "Mul"} & set(op_counts(result))


NO_TABLES = {
    "columns": lambda x, w: tf.gather(w.kernel(CHANNELS, 9), tokens(x), axis=1),
    "transposed": lambda x, w: tf.gather(tf.transpose(w.kernel(CHANNELS, 9)), tokens(x)),
    "shared": lambda x, w: w.twice(lambda table: tf.gather(table, tokens(x))),
}


@pytest.mark.parametrize("form", NO_TABLES)
def test_what_is_no_embedding_of_its_own_is_left_alone(form, tmp_path):
    def function(x, w):
        def twice(rows):
            table = w.kernel(9, CHANNELS)
            return rows(table) + tf.reduce_sum(table)

        w.twice = twice
        return normalised(NO_TABLES[form](x, w), w)

    (decision,), _ = rewritten(tmp_path, Case(function, SEQUENCE))
    assert decision.action == "kept"


def test_prelu_stays_behind_a_batch_norm_that_goes(tmp_path):
    def function(x, w):
        gamma, _, mean, variance = w.norm(CHANNELS)
        x = tf.nn.batch_normalization(conv(x, w), mean, variance, None, gamma, EPSILON)
        return conv(prelu(x, w.of(numbers(6))), w, 3)

    decisions, result = rewritten(tmp_path, Case(function))
    assert_all_gone(decisions, result)
    assert op_counts(result)["Relu"] == 2


# ---------------------------------------------------------------------------- mode depthwise


def fused_first(x, *norm):
    return fused(raw.FusedBatchNormV3, x, norm, data_format="NCHW")


IN_PLACE = {
    "rank_2": (FORMS["nn"], (4,), {}),
    "rank_2_divided": (FORMS["divided"], (4,), {}),
    "rank_3": (FORMS["nn"], (8, 4), {}),
    "rank_3_open_length": (FORMS["rsqrt"], (None, 4), {}),
    "rank_4": (FORMS["nn"], (6, 6, 4), {}),
    "rank_4_fused": (FORMS["FusedBatchNormV3"], (6, 6, 4), {}),
    "rank_4_open_size": (FORMS["FusedBatchNorm"], (None, None, 4), {}),
    "rank_4_first": (CHANNELS_FIRST["four_axes"], (4, 6, 6), {}),
    "rank_4_first_fused": (fused_first, (4, 6, 6), {"compiled": True}),
    "rank_5": (FORMS["nn"], (4, 4, 4, 4), {}),
    "rank_5_fused": (fused_volume, (4, 4, 4, 4), {}),
    "float16": (FORMS["FusedBatchNormV3"], (6, 6, 4), {"dtype": tf.float16}),
    "float16_between_casts": (HALF["arithmetic_between_casts"], (6, 6, 4), {"dtype": tf.float16}),
}


@pytest.mark.parametrize("form", IN_PLACE)
def test_batch_norm_of_every_rank_is_replaced_in_place(form, tmp_path):
    function, shape, kwargs = IN_PLACE[form]
    block = stored_both_ways(lambda x, w: function(x, *w.norm(CHANNELS)))
    decisions, result = rewritten(tmp_path, Case(block, shape, **kwargs), "depthwise")
    assert_all_gone(decisions, result, norms=2, action="depthwise")

"""Clips, such as ReLU: how layers and functions are read, and clips with bounds per channel."""

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from keras import ops

from mbn_rewrite.errors import RewriteError
from mbn_rewrite.frontends.keras3.adapter import KERAS_3
from mbn_rewrite.frontends.registry import front_end_of
from mbn_rewrite.frontends.tf_keras.adapter import TF_KERAS
from mbn_rewrite.ir.graph import Affine, Clip, Input, Opaque, PositivelyHomogeneous
from mbn_rewrite.plans import Plan, Reclip
from tests.support.clips import moved_into_clip
from tests.support.kerases import K, Model, names, package
from tests.support.round_trips import through
from tests.support.saved_models import statistics

pytestmark = pytest.mark.slow

INF = np.inf


def read(model):
    return front_end_of(model).read(model)


def op_of(function):
    """How a model of one layer, or one function, is read."""
    x = K.Input((5, 4))
    (op,) = [n.op for n in read(Model(x, function(x))).graph.nodes if not isinstance(n.op, Input)]
    return op


# --------------------------------------------------------------------------------- reading

LIMITED = "is an activation with a limit"
LAYERS = {
    "relu": (lambda: K.ReLU(), Clip()),
    "limited": (lambda: K.ReLU(6.0), Clip(0.0, 6.0)),
    "limited to 0": (lambda: K.ReLU(0.0), Clip(0.0, 0.0)),
    "threshold": (lambda: K.ReLU(threshold=1.0), Opaque(LIMITED)),
    "sloping": (lambda: K.ReLU(negative_slope=0.5), PositivelyHomogeneous()),
    "limited and sloping": (lambda: K.ReLU(6.0, negative_slope=0.5), Opaque(LIMITED)),
    "leaky": (lambda: K.LeakyReLU(), PositivelyHomogeneous()),
    "activation": (lambda: K.Activation("relu"), Clip()),
    "tanh": (lambda: K.Activation("tanh"), Opaque("is a tanh activation")),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_that_clip(name, each_keras):
    make, expected = LAYERS[name]
    assert op_of(make()) == expected


def test_a_limited_relu_says_why_it_blocks(each_keras):
    assert op_of(K.ReLU(6.0)).why == LIMITED


OF_KERAS_3 = {
    "relu6 layer": (lambda x: K.Activation("relu6")(x), Clip(0.0, 6.0)),
    "hard_tanh layer": (lambda x: K.Activation("hard_tanh")(x), Clip(-1.0, 1.0)),
    "ops.relu layer": (lambda x: K.Activation(ops.relu)(x), Clip()),
    "ops.relu": (ops.relu, Clip()),
    "ops.relu6": (ops.relu6, Clip(0.0, 6.0)),
    "ops.hard_tanh": (ops.hard_tanh, Clip(-1.0, 1.0)),
    "ops.clip": (lambda x: ops.clip(x, -2, 0.5), Clip(-2.0, 0.5)),
    "ops.clip below": (lambda x: ops.clip(x, -INF, 0.5), Clip(-INF, 0.5)),
    "ops.clip to nothing": (lambda x: ops.clip(x, -INF, INF), Affine()),
    "ops.clip crossed": (lambda x: ops.clip(x, 1.0, 0.0), Opaque()),
    "ops.maximum": (lambda x: ops.maximum(x, 0.5), Clip(0.5, INF)),
    "ops.maximum turned": (lambda x: ops.maximum(0.5, x), Clip(0.5, INF)),
    "ops.minimum": (lambda x: ops.minimum(x, np.float32(6.0)), Clip(-INF, 6.0)),
    "ops.maximum per channel": (lambda x: ops.maximum(x, np.zeros(4)), Opaque()),
    "ops.clip per channel": (lambda x: ops.clip(x, [0.0] * 4, 1.0), Opaque()),
    "relu": (keras.activations.relu, Clip()),
    "relu limited": (lambda x: keras.activations.relu(x, max_value=3.0), Clip(0.0, 3.0)),
    "relu sloping": (
        lambda x: keras.activations.relu(x, negative_slope=0.1),
        PositivelyHomogeneous(),
    ),
}


@pytest.mark.parametrize("name", OF_KERAS_3)
@pytest.mark.parametrize("each_keras", ["keras"], indirect=True)
def test_functions_of_keras_3_that_clip(name, each_keras):
    function, expected = OF_KERAS_3[name]
    assert op_of(function) == expected


OF_TENSORFLOW = {
    "relu": (tf.nn.relu, Clip()),
    "relu6": (tf.nn.relu6, Clip(0.0, 6.0)),
    "relu6 layer": (lambda x: K.Activation(tf.nn.relu6)(x), Clip(0.0, 6.0)),
    "backend": (lambda x: tf_keras.activations.relu(x, max_value=6.0), Clip(0.0, 6.0)),
    "clip": (lambda x: tf.clip_by_value(x, -2, 0.5), Clip(-2.0, 0.5)),
    "clip by names": (
        lambda x: tf.clip_by_value(t=x, clip_value_max=0.5, clip_value_min=-2.0, name="clip"),
        Clip(-2.0, 0.5),
    ),
    "clip crossed": (lambda x: tf.clip_by_value(x, 1.0, 0.0), Opaque()),
    "maximum": (lambda x: tf.maximum(x, 0.5), Clip(0.5, INF)),
    "maximum turned": (lambda x: tf.maximum(0.5, x), Clip(0.5, INF)),
    "minimum": (lambda x: tf.math.minimum(x, tf.constant(6.0)), Clip(-INF, 6.0)),
    "maximum per channel": (lambda x: tf.maximum(x, np.zeros(4)), Opaque()),
    "clip per channel": (lambda x: tf.clip_by_value(x, np.zeros(4), 1.0), Opaque()),
}


@pytest.mark.parametrize("name", OF_TENSORFLOW)
def test_functions_of_tensorflow_that_clip(name):
    function, expected = OF_TENSORFLOW[name]
    assert op_of(function) == expected


def test_functions_compute_in_the_dtype_that_they_are_given(each_keras):
    each_keras.mixed_precision.set_global_policy("mixed_float16")
    x = K.Input((4,), dtype="float16")
    function = tf.nn.relu if each_keras is tf_keras else ops.relu
    for y, expected in ((K.ReLU()(x), "float16"), (function(x), "float16")):
        *_, node = read(Model(x, y)).graph.nodes
        assert node.dtype == expected


# ------------------------------------------------------------------------- the layer itself

LOWER, UPPER = np.array([0.5, -0.25, -INF, 0.125]), np.array([1.0, INF, 0.75, 0.25])
BOUNDS = {"lower": (LOWER, None), "upper": (None, UPPER), "both": (LOWER, UPPER)}


def clipped(x, lower, upper, axis=-1):
    shape = [1] * x.ndim
    shape[axis] = -1
    for function, bounds in ((np.maximum, lower), (np.minimum, upper)):
        x = x if bounds is None else function(x, bounds.astype(x.dtype).reshape(shape))
    return x


def clip_layer(lower, upper, **kwargs):
    return adapter().channel_clip(
        use_lower=lower is not None, use_upper=upper is not None, **kwargs
    )


def set_bounds(layer, *bounds):
    layer.set_weights([each for each in bounds if each is not None])


def adapter():
    return KERAS_3 if package() is keras else TF_KERAS


@pytest.fixture
def rng():
    return np.random.default_rng(5)


@pytest.mark.parametrize("sides", BOUNDS)
@pytest.mark.parametrize(
    ("shape", "axis"), [((4,), 1), ((3, 4), 2), ((4, 3), 1), ((4, 4, 3), 1), ((2, 3, 2, 4), 4)]
)
def test_the_layer_clips_each_channel(shape, axis, sides, rng, each_keras):
    layer = clip_layer(*BOUNDS[sides], axis=axis)
    x = rng.standard_normal((2, *shape)).astype(np.float32)
    layer(x)
    set_bounds(layer, *BOUNDS[sides])
    np.testing.assert_array_equal(layer(x), clipped(x, *BOUNDS[sides], axis))


def test_a_new_layer_is_relu(rng, each_keras):
    x = rng.standard_normal((3, 4)).astype(np.float32)
    np.testing.assert_array_equal(adapter().channel_clip()(x), np.maximum(x, 0))


def test_the_layer_needs_to_know_its_channels(each_keras):
    with pytest.raises(ValueError, match="needs to know how many channels"):
        adapter().channel_clip(1).build((None, None))


# --------------------------------------------------------------------------------- writing


def relu(x):
    """The function of the Keras in use."""
    return (ops.relu if package() is keras else tf.nn.relu)(x)


def clip(x):
    """A function with arguments of its own."""
    return (ops.clip if package() is keras else tf.clip_by_value)(x, -1.0, 0.5)


def reclipped(model, *reclips):
    """A copy of a model with bounds for its clips; for a plan made by hand."""
    reading = read(model)
    owners = dict.fromkeys(node.owner for node in reading.graph.nodes if isinstance(node.op, Clip))
    plan = Plan("fold", (), dict(zip(owners, reclips, strict=True)))
    return front_end_of(model).write(model, reading, plan)


def clips_of(model):
    return [layer for layer in model.layers if isinstance(layer, adapter().channel_clip)]


def data_for(model, rng):
    shape = [size or 2 for size in model.inputs[0].shape]
    return rng.standard_normal(shape).astype(np.float32)


KINDS = {
    "layer": lambda x: K.ReLU()(x),
    "limited": lambda x: K.ReLU(6.0)(x),
    "activation": lambda x: K.Activation("relu")(x),
    "function": relu,
    "function of numbers": clip,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sides", BOUNDS)
def test_a_clip_gets_bounds_per_channel(kind, sides, rng, each_keras):
    x = K.Input((5, 4))
    y = K.Cropping1D(1)(KINDS[kind](x))
    model = Model(x, [y, y])
    new = reclipped(model, Reclip(*BOUNDS[sides], 2))
    data = data_for(model, rng)
    for output in new(data):
        np.testing.assert_array_equal(output, clipped(data, *BOUNDS[sides])[:, 1:-1])
    (layer,) = clips_of(new)
    called = getattr(model, "operations", model.layers)  # Keras 3 does not list functions
    assert [layer.name for layer in new.layers] == [each.name for each in called]
    assert (layer.use_lower, layer.use_upper) == (sides != "upper", sides != "lower")
    np.testing.assert_array_equal(model(data)[0], KINDS[kind](data)[:, 1:-1])


@pytest.mark.parametrize("kind", ["layer", "function"])
def test_a_clip_that_is_an_output(kind, rng, each_keras):
    x = K.Input((4,))
    model = Model(x, KINDS[kind](x))
    new = reclipped(model, Reclip(LOWER, None, 1))
    data = data_for(model, rng)
    np.testing.assert_array_equal(new(data), clipped(data, LOWER, None))
    assert names(new) == names(model)


def test_in_a_sequential_model(rng, each_keras):
    layers = [K.Input((3, 3, 4)), K.Permute((3, 1, 2)), K.ReLU(name="first"), K.ReLU(3.0)]
    model = each_keras.Sequential(layers)
    new = reclipped(model, Reclip(LOWER, None, 1), Reclip(None, UPPER, 1))
    data = data_for(model, rng)
    np.testing.assert_array_equal(new(data), clipped(np.moveaxis(data, 3, 1), LOWER, UPPER, axis=1))
    assert type(new) is each_keras.Sequential


def test_in_a_nested_model_that_is_called_twice(rng, each_keras):
    x, inner = K.Input((4,)), K.Input((4,))
    block = Model(inner, K.ReLU(name="relu")(inner), name="block")
    model = Model(x, K.Subtract()([block(x), block(K.Activation("tanh")(x))]))
    new = reclipped(model, Reclip(LOWER, UPPER, 1))
    data = data_for(model, rng)
    expected = clipped(data, LOWER, UPPER) - clipped(np.tanh(data), LOWER, UPPER)
    np.testing.assert_allclose(new(data), expected, rtol=1e-6, atol=1e-6)


def test_one_layer_called_on_tensors_of_other_sizes(rng, each_keras):
    shared = K.ReLU()
    inputs = [K.Input((5, 4)), K.Input((2, 4))]
    model = Model(inputs, [shared(x) for x in inputs])
    new = reclipped(model, Reclip(LOWER, None, 2))
    data = [rng.standard_normal((2, size, 4)).astype(np.float32) for size in (5, 2)]
    for output, array in zip(new(data), data, strict=True):
        np.testing.assert_array_equal(output, clipped(array, LOWER, None))
    assert len(clips_of(new)) == 1


def test_with_the_batch_normalization_before_it_gone(rng, each_keras):
    """relu(s x + t) = s clip(x) + t, with a bound of -t / s, which is an upper one where s < 0."""
    x = K.Input((6, 6, 4))
    y = K.ReLU(name="relu")(K.BatchNormalization(name="bn")(x))
    model = Model(x, K.Conv2D(3, 3, name="conv")(y))
    model.get_layer("bn").set_weights(statistics(rng, 4))
    plan = moved_into_clip(read(model).graph)
    new = front_end_of(model).write(model, read(model), plan)
    assert [layer.name for layer in new.layers][1:] == ["relu", "conv"]
    data = data_for(model, rng)
    np.testing.assert_allclose(new(data), model(data), rtol=1e-4, atol=1e-5)


def test_a_clip_in_an_attribute_is_the_new_one(each_keras):
    class Named(each_keras.Model):
        pass

    x, layer = K.Input((4,)), K.ReLU()
    model = Named(x, layer(x))
    model.clip = layer
    new = reclipped(model, Reclip(LOWER, None, 1))
    assert new.clip is clips_of(new)[0]


def test_a_clip_that_another_layer_holds_too_takes_no_bounds(rng, each_keras):
    class Holder(each_keras.layers.Layer):
        def __init__(self, held=None, **kwargs):
            super().__init__(**kwargs)
            self.held = held or each_keras.layers.ReLU()

        def call(self, x):
            if type(x).__name__ == "KerasTensor":
                raise ValueError("it cannot be seen into")
            return self.held(x)

    x, holder = K.Input((4,)), Holder()
    graph = read(Model(x, holder(holder.held(x)))).graph
    assert [node.op.why for node in graph.nodes if node.kind == "ReLU"] == [
        "is held by Holder 'holder', whose calls cannot be seen, too"
    ]


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float16", "float64"])
@pytest.mark.parametrize("given", ["float16", "float32"])
@pytest.mark.parametrize("kind", ["layer", "function"])
def test_dtypes_are_those_of_the_original(kind, given, policy, rng, each_keras):
    each_keras.mixed_precision.set_global_policy(policy)
    x = K.Input((4,), dtype=given)
    model = Model(x, KINDS[kind](x))
    new = reclipped(model, Reclip(LOWER, UPPER, 1))
    assert new.output.dtype == model.output.dtype
    data = rng.standard_normal((3, 4)).astype(given)
    expected = tf.cast(data, new.output.dtype)
    for function, bounds in ((tf.maximum, LOWER), (tf.minimum, UPPER)):
        expected = function(expected, tf.cast(bounds, expected.dtype))
    np.testing.assert_array_equal(new(data), expected)


def test_bounds_that_the_dtype_cannot_hold_are_refused(each_keras):
    each_keras.mixed_precision.set_global_policy("mixed_float16")
    x = K.Input((4,))
    model = Model(x, K.ReLU(name="relu")(x))
    why = "ReLU 'relu' cannot clip per channel: its bounds reach 7e.04, more than float16 can hold"
    with pytest.raises(RewriteError, match=why):
        reclipped(model, Reclip(np.array([0, 7e4, 0, 0]), None, 1))


@pytest.mark.parametrize("kind", ["layer", "function"])
def test_masks_flow_as_they_did(kind, rng, each_keras):
    """Layers pass them on; functions do not."""
    x = K.Input((6, 4))
    model = Model(x, K.GlobalAveragePooling1D()(KINDS[kind](K.Masking()(x))))
    new = reclipped(model, Reclip(LOWER, None, 2))
    data = data_for(model, rng)
    data[:, 3:] = 0
    counted = data[:, :3] if kind == "layer" else data
    expected = clipped(counted, LOWER, None).mean(1)
    np.testing.assert_allclose(new(data), expected, rtol=1e-5, atol=1e-6)
    assert np.ptp([model(data), np.maximum(counted, 0).mean(1)], 0).max() < 1e-5


def test_frozen_as_the_original_was(each_keras):
    x = K.Input((4,))
    model = Model(x, K.ReLU()(K.ReLU(trainable=False)(x)))
    frozen, free = clips_of(reclipped(model, *[Reclip(LOWER, UPPER, 1)] * 2))
    assert (frozen.trainable, free.trainable) == (False, True)


# ------------------------------------------------------------------------------- coming back


def nest():
    """Clips of every kind, in a model, in a model in it and in a wrapper."""
    x, inner = K.Input((5, 4)), K.Input((5, 4))
    block = Model(inner, K.ReLU(2.0)(inner), name="block")
    return Model(x, block(relu(K.Activation("relu", name="first")(x))))


WAYS = [
    *(("tf_keras", how) for how in ("clone", "keras", "h5", "tf")),
    *(("keras", how) for how in ("clone", "keras", "h5", "export")),
]


@pytest.mark.parametrize(("each_keras", "how"), WAYS, indirect=["each_keras"])
@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file")
def test_clips_come_back_as_they_were(each_keras, how, rng, tmp_path):
    model = nest()
    bounds = [Reclip(LOWER, None, 2), Reclip(LOWER, UPPER, 2), Reclip(None, UPPER, 2)]
    new = reclipped(model, *bounds)
    data = data_for(model, rng)
    expected = clipped(data, LOWER, UPPER)
    np.testing.assert_array_equal(new(data), expected)
    loaded = through(how, new, tmp_path)
    np.testing.assert_array_equal(loaded(data), expected)


def test_a_configuration_says_all(each_keras):
    kind = adapter().channel_clip
    layer = kind(1, use_lower=False, use_upper=True, pass_mask=False, name="clip", dtype="float16")
    config = layer.get_config()
    assert {key: config[key] for key in ("axis", "use_lower", "use_upper", "pass_mask")} == {
        **{"axis": 1, "use_lower": False},
        **{"use_upper": True, "pass_mask": False},
    }
    again = kind.from_config(config)
    assert again.get_config() == config
    assert again.compute_dtype == "float16"


def test_in_a_wrapper(each_keras, rng, tmp_path):
    x = K.Input((5, 4))
    model = Model(x, K.TimeDistributed(clip_layer(LOWER, None))(x))
    set_bounds(model.layers[-1].layer, LOWER)
    data = data_for(model, rng)
    loaded = through("keras", model, tmp_path)
    np.testing.assert_array_equal(loaded(data), clipped(data, LOWER, None))

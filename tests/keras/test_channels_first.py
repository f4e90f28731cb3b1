"""Keras 3, channels first: a bias per channel, also where the width equals the number of channels.

There `keras.ops.add` of TensorFlow's backend adds it along the width. Whatever takes the place of a
BatchNormalization must not, and what a layer of the original computes must stay as it is.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf

import mbn_rewrite as mbn
from mbn_rewrite.frontends.execution import called
from mbn_rewrite.frontends.keras3.adapter import KERAS_3
from mbn_rewrite.frontends.keras3.inference_layers import (
    BiasedConvolution,
    BorderedConvolution,
    ScaleAndShift,
)
from mbn_rewrite.frontends.keras_common.calls import Call
from mbn_rewrite.frontends.keras_common.op_table import describe
from mbn_rewrite.ir.graph import BatchNorm
from tests.support.checks import outputs

K = keras.layers
FIRST = {"data_format": "channels_first"}
SAME = {**FIRST, "padding": "same"}
FREE = {**SAME, "use_bias": False}


@pytest.fixture
def rng():
    return np.random.default_rng(5)


def randomised(model, rng):
    """A model with weights of all kinds that are neither 0 nor 1."""
    for variable in model.weights:
        low = 0.4 if variable.name in ("gamma", "moving_variance") else -1.0
        variable.assign(rng.uniform(low, 1.5, variable.shape))
    return model


def net(shape, *layers, rng):
    x = y = keras.Input(shape)
    for layer in (*layers, K.ReLU()):
        y = layer(y)
    return randomised(keras.Model(x, y), rng)


def norm():
    return K.BatchNormalization(axis=1)


def conv(**options):
    """A convolution with twice the channels of its input."""
    return K.DepthwiseConv2D(3, depth_multiplier=2, **FREE, **options)


def assert_same(model, new, rng, width=None):
    shape = [size or width or 6 for size in model.inputs[0].shape[1:]]
    data = rng.standard_normal((3, *shape)).astype(np.float32)
    assert_same_outputs(model, new, data)


def assert_same_outputs(model, new, data):
    """Compares what two models compute, by XLA where TensorFlow's CPU kernels lack the layout."""
    for expected, result in zip(outputs(model, data), outputs(new, data), strict=True):
        np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def classes(model):
    return [type(layer).__name__ for layer in model.layers[1:-1]]


# ------------------------------------------------------------------- convolutions without bias

SHAPES = {1: (3, 6), 2: (3, 5, 6), 3: (3, 2, 4, 6)}
LAYERS = {
    "Conv1D": lambda: (1, K.Conv1D(6, 3, **FREE)),
    "Conv2D": lambda: (2, K.Conv2D(6, 3, **FREE)),
    "strided": lambda: (2, K.Conv2D(3, 3, 2, **FREE)),
    "Conv3D": lambda: (3, K.Conv3D(6, 3, **FREE)),
    "DepthwiseConv1D": lambda: (1, K.DepthwiseConv1D(3, depth_multiplier=2, **FREE)),
    "DepthwiseConv2D": lambda: (2, K.DepthwiseConv2D(3, depth_multiplier=2, **FREE)),
    "SeparableConv2D": lambda: (2, K.SeparableConv2D(6, 3, **FREE)),
    "Conv2DTranspose": lambda: (2, K.Conv2DTranspose(6, 3, **FREE)),
    "Conv3DTranspose": lambda: (3, K.Conv3DTranspose(6, 3, **FREE)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_that_stands_for_the_convolution_adds_the_bias(name, rng):
    rank, layer = LAYERS[name]()
    model = net(SHAPES[rank], layer, norm(), rng=rng)
    new, plan = mbn.convert_with_plan(model, "fold")
    (decision,) = plan.decisions
    assert decision.action == "folded"
    assert f"'{layer.name}' may add a bias along its last axis" in decision.reason
    assert classes(new) == ["BiasedConvolution"]
    assert new.layers[1].name == layer.name
    assert_same(model, new, rng)


@pytest.mark.parametrize("width", [7, 5])
def test_a_convolution_of_another_width_stays_one(width, rng):
    model = net((3, 6, width), conv(), norm(), rng=rng)
    new, plan = mbn.convert_with_plan(model, "fold")
    assert classes(new) == ["DepthwiseConv2D"]
    assert plan.decisions[0].reason == ""
    assert_same(model, new, rng)


def test_one_channel_is_as_wide_as_any(rng):
    model = net((1, 4, 1), K.DepthwiseConv2D(3, **FREE), norm(), rng=rng)
    new = mbn.convert(model, "fold")
    assert classes(new) == ["DepthwiseConv2D"]
    assert_same(model, new, rng)


def test_a_scale_alone_takes_no_bias(rng):
    model = net((3, 5, 6), conv(), norm(), rng=rng)
    model.layers[2].beta.assign(np.zeros(6))
    model.layers[2].moving_mean.assign(np.zeros(6))
    new = mbn.convert(model, "fold")
    assert classes(new) == ["DepthwiseConv2D"]
    assert_same(model, new, rng)


def test_a_shift_before_a_convolution(rng):
    valid = K.DepthwiseConv2D(3, activation="relu", use_bias=False, **FIRST)
    model = net((6, 5, 8), K.ReLU(), norm(), valid, rng=rng)
    new, plan = mbn.convert_with_plan(model, "fold")
    assert plan.left == 0
    assert classes(new) == ["ReLU", "BiasedConvolution"]
    assert new.layers[2].activation is keras.activations.relu
    assert_same(model, new, rng)


def test_a_border_map(rng):
    from tests.keras.test_border_maps import with_borders

    model = net((3, 5, 6), K.ReLU(), norm(), conv(), rng=rng)
    new, plan = with_borders(model)
    assert plan.left == 0
    assert classes(new) == ["ReLU", "BorderedConvolution"]
    assert_same(model, new, rng)


@pytest.mark.parametrize("width", [6, 7])
def test_open_sizes(width, rng):
    model = net((3, None, None), conv(), norm(), rng=rng)
    new = mbn.convert(model, "fold")
    assert classes(new) == ["BiasedConvolution"]
    assert_same(model, new, rng, width)


def test_sequential_models_take_other_sizes_than_they_declare(rng):
    layers = [keras.Input((3, 5, 7)), conv(), norm()]
    model = randomised(keras.Sequential(layers), rng)
    new = mbn.convert(model, "fold")
    data = rng.standard_normal((2, 3, 5, 6)).astype(np.float32)
    assert_same_outputs(model, new, data)


def test_a_convolution_that_is_called_on_several_widths(rng):
    shared, bn = conv(), norm()
    inputs = [keras.Input((3, 4, width)) for width in (6, 7)]
    model = randomised(keras.Model(inputs, [K.ReLU()(bn(shared(x))) for x in inputs]), rng)
    new, plan = mbn.convert_with_plan(model, "fold")
    assert plan.left == 0
    data = [rng.standard_normal((2, 3, 4, width)).astype(np.float32) for width in (6, 7)]
    assert_same_outputs(model, new, data)


def test_an_activation_that_is_a_layer_keeps_it(rng):
    layer = K.DepthwiseConv2D(3, activation=K.LeakyReLU(), use_bias=False, **FIRST)
    model = net((6, 5, 8), K.ReLU(), norm(), layer, rng=rng)
    new, plan = mbn.convert_with_plan(model, "fold")
    assert "and its activation is a layer" in plan.decisions[0].reason
    assert_same(model, new, rng)


@pytest.mark.parametrize("dtype", ["mixed_float16", "float64"])
def test_other_dtypes(dtype, rng):
    x = keras.Input((3, 5, 6), dtype="float64" if dtype == "float64" else "float32")
    y = K.BatchNormalization(1, dtype=dtype)(conv(dtype=dtype)(x))
    model = randomised(keras.Model(x, y), rng)
    new = mbn.convert(model, "fold")
    assert new.outputs[0].dtype == model.outputs[0].dtype
    assert mbn.verify(model, new).ok


def test_flags_and_a_second_conversion(rng):
    model = net((3, 5, 6), conv(), norm(), rng=rng)
    model.layers[1].trainable = False
    new = mbn.convert(model, "fold")
    assert not new.layers[1].trainable_weights
    assert [tuple(v.shape) for v in new.layers[1].weights] == [(6,), (3, 3, 3, 2)]
    assert_same(model, mbn.convert(new, "fold"), rng)


# ---------------------------------------------------------------------- convolutions with a bias

BIASED = {
    "Conv1D": ((3, 6), K.Conv1D),
    "transpose": ((3, 5, 6), K.Conv2DTranspose),
    "separable": ((3, 5, 6), K.SeparableConv2D),
    "open": ((3, None, None), K.Conv2D),
}


@pytest.mark.parametrize("name", BIASED)
def test_a_bias_that_keras_misplaces_stays_where_it_is(name, rng):
    shape, kind = BIASED[name]
    model = net(shape, kind(6, 3, **SAME), norm(), rng=rng)
    new, plan = mbn.convert_with_plan(model, "fold")
    assert "may add a bias along its last axis" in plan.decisions[0].reason
    assert "and it has one" in plan.decisions[0].reason
    assert_same(model, new, rng)


def test_a_bias_that_keras_adds_right_takes_more(rng):
    model = net((3, 5, 7), K.Conv2D(6, 3, **SAME), norm(), rng=rng)
    new = mbn.convert(model, "fold")
    assert classes(new) == ["Conv2D"]
    assert_same(model, new, rng)


def test_a_keras_that_adds_biases_right_is_trusted_with_those_it_has(monkeypatch):
    from mbn_rewrite.frontends.keras3 import adapter

    monkeypatch.setattr(adapter, "_adds_along_the_last_axis", lambda: False)
    layers = K.Conv2D(6, 3, **SAME), K.Conv2D(6, 3, **FREE)
    for layer in layers:
        layer.build((None, 3, 5, 6))
    shapes = ((None, 3, 5, 6),), (None, 6, 5, 6)
    with_bias, without = (describe(Call(KERAS_3, layer, *shapes)) for layer in layers)
    assert with_bias.bias == "bias"
    assert without.bias_doubt  # a file may be loaded with another Keras, or on another backend


# ------------------------------------------------------------------------------ in its own place


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((6, 5, 6), "ScaleAndShift"),
        ((6, None, None), "ScaleAndShift"),
        ((6, 6, 5), "DepthwiseConv2D"),
        ((6, 6), "ScaleAndShift"),
        ((6, 3, 2, 6), "ScaleAndShift"),
    ],
)
def test_what_stands_in_for_a_batch_normalization(shape, expected, rng):
    model = net(shape, K.Activation("tanh"), norm(), rng=rng)
    new = mbn.convert(model, "depthwise")
    assert classes(new) == ["Activation", expected]
    assert_same(model, new, rng)


@pytest.mark.parametrize("mode", ["depthwise", "strided", "mbn"])
def test_a_batch_normalization_that_a_layer_holds(mode, rng):
    model = Holder()
    model(np.zeros((1, 6, 5, 6), np.float32))
    randomised(model, rng)
    new = mbn.convert(model, mode)
    data = rng.standard_normal((2, 6, 5, 6)).astype(np.float32)
    assert_same_outputs(model, new, data)


class Holder(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.norm = norm()

    def build(self, shape):
        self.norm.build(shape)

    def call(self, x):
        return self.norm(x) + 1.0


def test_shared_by_calls_of_which_one_could_not_be_a_convolution(rng):
    bn = norm()
    inputs = [keras.Input((6, 4, width)) for width in (6, 7)]
    outputs = [K.Activation("tanh")(bn(K.ReLU()(x))) for x in inputs]
    model = randomised(keras.Model(inputs, outputs), rng)
    new = mbn.convert(model, "depthwise")
    assert type(new.get_layer(bn.name)) is ScaleAndShift
    data = [rng.standard_normal((2, 6, 4, width)).astype(np.float32) for width in (6, 7)]
    assert_same_outputs(model, new, data)


@pytest.mark.parametrize("shape", [(4, 6, 6), (4, 6, 3, 6), (4, 6, 3, 2, 6)])
def test_scale_and_shift_itself(shape, rng):
    layer = ScaleAndShift(axis=1)
    x = rng.standard_normal(shape).astype(np.float32)
    layer(x)
    scale, shift = rng.standard_normal((2, 6)).astype(np.float32)
    layer.scale.assign(scale)
    layer.shift.assign(shift)
    broadcast = (6, *[1] * (len(shape) - 2))
    expected = x * scale.reshape(broadcast) + shift.reshape(broadcast)
    np.testing.assert_allclose(layer(x), expected, rtol=1e-5, atol=1e-6)


def test_only_channels_first_of_one_width_is_in_doubt():
    doubtful = [(1, (None, 6, 6)), (1, (None, 6, 5, 6)), (1, (None, 6, None, None))]
    clear = [(3, (None, 6, 6, 6)), (1, (None, 6, 6, 5)), (1, (None, 1, 5, 1)), (1, (None, 6))]
    assert all(KERAS_3.may_misplace_bias(*case) for case in doubtful)
    assert not any(KERAS_3.may_misplace_bias(*case) for case in clear)


def test_what_is_held_out_of_sight_is_in_doubt_in_any_size():
    from mbn_rewrite.frontends.keras_common.batch_norm import batch_norm

    layers = [K.BatchNormalization(axis) for axis in (1, 3)]
    for layer in layers:
        layer.build((None, 6, 5, 6))
    ops = [batch_norm(layer, False, KERAS_3) for layer in layers]
    assert all(isinstance(op, BatchNorm) for op in ops)
    assert [op.convolvable for op in ops] == [False, True]


# ------------------------------------------------------------------------------ files and copies


@pytest.fixture(scope="module")
def folded():
    rng = np.random.default_rng(3)
    last = K.DepthwiseConv2D(3, activation="relu", **FREE)
    layers = conv(), norm(), K.ReLU(), K.DepthwiseConv2D(1, **FREE), norm(), last
    model = net((3, None, None), *layers, rng=rng)
    new = mbn.convert(model, "fold")
    assert classes(new) == ["BiasedConvolution", "ReLU", "BiasedConvolution", "DepthwiseConv2D"]
    return model, new


@pytest.mark.parametrize("width", [6, 5])
@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file")
@pytest.mark.parametrize("how", ["keras", "h5", "clone", "export"])
def test_right_wherever_it_is_brought(how, width, folded, rng, tmp_path):
    model, new = folded
    if how == "clone":
        brought = keras.models.clone_model(new)
        brought.set_weights(new.get_weights())
    elif how == "export":
        new.export(tmp_path / "new", verbose=False)
        loaded = tf.saved_model.load(tmp_path / "new")

        def brought(data, training):
            return loaded.serve(data)
    else:
        new.save(tmp_path / f"new.{how}")
        brought = keras.models.load_model(tmp_path / f"new.{how}")
        assert classes(brought) == classes(new)
    assert_same(model, brought, rng, width)


def test_a_bordered_convolution_of_a_row_and_a_column(rng):
    for shape in ((3, 1, 6), (3, 6, 1), (6, 1, 1)):
        layer = BorderedConvolution(conv())
        x = rng.standard_normal((2, *shape)).astype(np.float32)
        (before,) = called(layer, x, "the layer")
        border = rng.standard_normal(layer.border.shape).astype(np.float32)
        layer.border.assign(border)
        (after,) = called(layer, x, "the layer")
        np.testing.assert_allclose(after, before + border, rtol=1e-5, atol=1e-6)


def test_a_bias_along_another_axis_would_be_noticed(folded, rng):
    model, new = folded
    wrong = keras.models.clone_model(new)
    wrong.set_weights(new.get_weights())
    layer = wrong.layers[1]
    assert isinstance(layer, BiasedConvolution)
    layer._offset = lambda: layer.bias  # along the width
    with pytest.raises(AssertionError):
        assert_same(model, wrong, rng, 6)

"""Border maps: a shift before a convolution that pads its input with zeros, absorbed exactly.

The planner is asked for them apart from any mode. Models of whole numbers must give the same
outputs bit for bit.
"""

import numpy as np
import pytest
import tensorflow as tf

import mbn_rewrite as mbn
from mbn_rewrite import layouts
from mbn_rewrite.algebra import Border, ChannelMap, Window, fold
from mbn_rewrite.comparison import compare_outputs
from mbn_rewrite.front_ends import front_end_of
from mbn_rewrite.graph import BatchNorm, Graph, Input, Linear, Node, Opaque, Value
from mbn_rewrite.keras_layers.files import load
from mbn_rewrite.planner import _plan_fold
from tests.kerases import K, Model, package, policy, set_policy
from tests.whole_numbers import assert_equal_bits, inputs_for, norm, outputs, randomise

IMAGE, SEQUENCE, VOLUME = (8, 7, 4), (8, 4), (4, 5, 4, 3)


@pytest.fixture
def rng():
    return np.random.default_rng(7)


@pytest.fixture
def kerases(_fresh_keras, each_keras):
    set_policy("float64")


def model_of(shape, *layers):
    x = y = K.Input(shape, dtype=policy().compute_dtype)
    for layer in layers:
        y = layer(y)
    return Model(x, y)


def with_borders(model):
    """A model rewritten with border maps, and the plan."""
    front_end = front_end_of(model)
    reading = front_end.read(model)
    plan = _plan_fold(reading.graph, borders=True)
    return front_end.write(model, reading, plan), plan


def bordered(model):
    return [layer for layer in model.layers if type(layer).__name__ == "BorderedConvolution"]


def assert_exact_with_border(model, rng, compiled=False):
    randomise(model, rng)
    new, plan = with_borders(model)
    assert plan.left == 0, plan
    assert len(bordered(new)) == 1
    assert_equal_bits(model, new, inputs_for(model, rng), compiled)
    assert mbn.plan(model).left == 1
    return new


CONVOLUTIONS = {
    "conv1d": (SEQUENCE, lambda **k: K.Conv1D(5, 3, padding="same", **k)),
    "conv1d_strided": (SEQUENCE, lambda **k: K.Conv1D(5, 4, 3, padding="same", **k)),
    "conv1d_causal": (SEQUENCE, lambda **k: K.Conv1D(5, 3, padding="causal", **k)),
    "conv1d_causal_dilated": (
        SEQUENCE,
        lambda **k: K.Conv1D(5, 3, padding="causal", dilation_rate=2, **k),
    ),
    "conv1d_wider_than_its_input": (SEQUENCE, lambda **k: K.Conv1D(5, 19, padding="same", **k)),
    "conv2d": (IMAGE, lambda **k: K.Conv2D(5, 3, padding="same", **k)),
    "conv2d_even": (IMAGE, lambda **k: K.Conv2D(5, (2, 4), padding="same", **k)),
    "conv2d_strided": (IMAGE, lambda **k: K.Conv2D(5, 3, 2, padding="same", **k)),
    "conv2d_steps_over": (IMAGE, lambda **k: K.Conv2D(5, (3, 1), 4, padding="same", **k)),
    "conv2d_one_output": (IMAGE, lambda **k: K.Conv2D(5, 9, 8, padding="same", **k)),
    "conv2d_dilated": (IMAGE, lambda **k: K.Conv2D(5, 3, padding="same", dilation_rate=2, **k)),
    "conv2d_groups": (IMAGE, lambda **k: K.Conv2D(6, 3, groups=2, padding="same", **k)),
    "conv3d": (VOLUME, lambda **k: K.Conv3D(4, (3, 2, 1), padding="same", **k)),
    "conv3d_strided": (VOLUME, lambda **k: K.Conv3D(4, 3, 2, padding="same", **k)),
    "depthwise1d": (SEQUENCE, lambda **k: K.DepthwiseConv1D(3, padding="same", **k)),
    "depthwise2d_multiplier": (
        IMAGE,
        lambda **k: K.DepthwiseConv2D(3, depth_multiplier=3, padding="same", **k),
    ),
    "depthwise2d_dilated": (
        IMAGE,
        lambda **k: K.DepthwiseConv2D(3, dilation_rate=2, padding="same", **k),
    ),
    "depthwise2d_strided": (IMAGE, lambda **k: K.DepthwiseConv2D(3, 2, padding="same", **k)),
    "separable1d": (SEQUENCE, lambda **k: K.SeparableConv1D(5, 3, padding="same", **k)),
    "separable2d_multiplier": (
        IMAGE,
        lambda **k: K.SeparableConv2D(5, 3, 2, depth_multiplier=2, padding="same", **k),
    ),
}


@pytest.mark.usefixtures("kerases")
@pytest.mark.parametrize("use_bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_padded_convolution_absorbs_a_shift(name, use_bias, rng):
    shape, layer = CONVOLUTIONS[name]
    model = model_of(shape, norm(), layer(use_bias=use_bias, activation="relu"))
    assert_exact_with_border(model, rng)

"""Convolutions that read no padding take a shift, and are not said to pad."""

import numpy as np
import pytest
import tensorflow as tf

import mbn_rewrite as mbn
from mbn_rewrite.ir.kernels import Window
from tests.support.checks import check_rewrite, check_saved_rewrites
from tests.support.kerases import K, Model, assign, norms
from tests.support.random_models import randomise

# Convolutions with padding="same" of an input of 9 x 9, and whether they read padding.
SAME = {
    "1x1": ({"kernel_size": 1}, False),
    "1x1_strided": ({"kernel_size": 1, "strides": 2}, False),
    "3x3": ({"kernel_size": 3}, True),
    "3x3_stride_3": ({"kernel_size": 3, "strides": 3}, False),
    "3x3_stride_2": ({"kernel_size": 3, "strides": 2}, True),
    "2x2_stride_2": ({"kernel_size": 2, "strides": 2}, True),  # 9 is odd
    "1x1_stride_3": ({"kernel_size": 1, "strides": 3}, False),
}


def network(convolution, size=9):
    x = K.Input((size, size, 4))
    y = K.BatchNormalization()(K.Activation("tanh")(x))
    model = Model(x, convolution(y))
    randomise(model, np.random.default_rng(1))
    assign(norms(model)[0].beta, [0.5, -1.0, 2.0, 0.1])
    return model


def given(size=9):
    return tf.constant(np.random.default_rng(2).normal(size=(2, size, size, 4)), tf.float32)


@pytest.mark.parametrize("kind", ["Conv2D", "DepthwiseConv2D"])
@pytest.mark.parametrize("name", SAME)
def test_same_padding_of_a_known_size(name, kind, each_keras):
    arguments, pads = SAME[name]
    first = (3,) if kind == "Conv2D" else ()
    model = network(getattr(K, kind)(*first, padding="same", **arguments))
    (decision,) = mbn.plan(model, "fold").decisions
    assert (decision.action == "kept") == pads
    assert ("pads its input with zeros" in decision.reason) == pads
    if not pads:
        check_rewrite(model, given(), "fold")


@pytest.mark.parametrize("name", ["3x3_stride_3", "3x3"])
def test_same_padding_in_a_saved_model(name, tmp_path):
    arguments, pads = SAME[name]
    model = network(K.Conv2D(3, padding="same", **arguments))
    plan = check_saved_rewrites(model, given(), tmp_path, ["fold"])["fold"]
    assert plan.left == pads


def test_same_padding_of_an_open_size(each_keras):
    model = network(K.Conv2D(3, 3, strides=3, padding="same"), size=None)
    (decision,) = mbn.plan(model, "fold").decisions
    assert "pads its input with zeros" in decision.reason


def test_a_transposed_convolution_is_not_said_to_pad(each_keras):
    model = network(K.Conv2DTranspose(3, 2, strides=2, padding="valid"))
    (decision,) = mbn.plan(model, "fold").decisions
    assert "pads" not in decision.reason
    assert "another number of inputs for one output than for the next" in decision.reason


@pytest.mark.parametrize(
    ("window", "positions", "expected"),
    [
        (Window(1, 1, 1, "same"), None, False),
        (Window(3, 1, 1, (0, 0)), None, False),
        (Window(3, 1, 1, "same"), None, True),
        (Window(2, 2, 1, "same"), 8, False),
        (Window(2, 2, 1, "same"), 7, True),
        (Window(2, 1, 3, "same"), 9, True),
        (Window(3, 3, 1, (0, 1)), 9, False),  # no output reaches the zero
        (Window(3, 3, 1, (1, 0)), 9, True),
    ],
)
def test_windows(window, positions, expected):
    assert window.pads(positions) == expected

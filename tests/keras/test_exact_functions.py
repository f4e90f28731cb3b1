"""Functions of tensors between layers, proved as test_exact_motion.py does: without rounding.

`keras.ops` in Keras 3, TensorFlow functions in tf_keras, and the layers that do the same.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.support.kerases import K, Model, package, set_policy
from tests.support.whole_numbers import assert_exact, norm

pytestmark = [pytest.mark.slow, pytest.mark.alternating]


@pytest.fixture(autouse=True)
def _float64(_fresh_keras, each_keras):
    set_policy("float64")


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def ops(name_in_keras, name_in_tensorflow=""):
    """A function of the Keras in use."""
    if package() is keras:
        return getattr(keras.ops, name_in_keras)
    place = tf
    for part in (name_in_tensorflow or name_in_keras).split("."):
        place = getattr(place, part)
    return place


def behind(function, **kwargs):
    """A model in which a function stands between a convolution and a BatchNormalization."""
    x = K.Input((8, 8, 4), dtype="float64")
    y = norm(**kwargs)(function(K.Conv2D(4, 1)(x)))
    return Model(x, K.Activation("relu")(y))


def before(function):
    """A model in which a function stands between a BatchNormalization and a Dense layer."""
    x = K.Input((8, 8, 4), dtype="float64")
    return Model(x, K.Dense(3)(function(norm()(K.ReLU()(x)))))


def kept(plan):
    return [decision.reason for decision in plan.decisions if decision.action == "kept"]


# ------------------------------------------------------------------------------ constants

CHANNELS = np.array([1.0, 2.0, -4.0, 0.5])

MULTIPLIED = {
    "times": lambda x: x * 2.0,
    "times_from_left": lambda x: 2.0 * x,
    "divided": lambda x: x / 4.0,
    "negative": lambda x: -x,
    "per_channel": lambda x: x * CHANNELS,
    "per_channel_of_all_ranks": lambda x: x * CHANNELS.reshape(1, 1, 1, 4),
    "rescaling": lambda x: K.Rescaling(-0.5)(x),
}


@pytest.mark.parametrize("place", [behind, before])
@pytest.mark.parametrize("name", MULTIPLIED)
def test_factors_pass_all(name, place, rng):
    assert assert_exact(place(MULTIPLIED[name]), rng).left == 0


ADDED = {
    "plus": lambda x: x + 1.0,
    "plus_from_left": lambda x: 3.0 + x,
    "minus": lambda x: x - 2.0,
    "minus_from_left": lambda x: 2.0 - x,
    "per_channel": lambda x: x + CHANNELS,
    "eager_tensor": lambda x: x + tf.constant(CHANNELS),
    "both": lambda x: x * 2.0 + 1.0,
    "several": lambda x: (1.0 - x * CHANNELS) / 2.0 + CHANNELS,
    "rescaling": lambda x: K.Rescaling(2.0, offset=-1.0)(x),
    "normalization": lambda x: K.Normalization(mean=[1.0, 2.0, 3.0, 4.0], variance=[4.0] * 4)(x),
    "normalization_inverted": lambda x: K.Normalization(mean=1.0, variance=4.0, invert=True)(x),
}


@pytest.mark.parametrize("place", [behind, before])
@pytest.mark.parametrize("name", ADDED)
def test_constants_that_are_added_pass_all_but_0(name, place, rng):
    assert assert_exact(place(ADDED[name]), rng, gamma="powers").left == 0
    assert assert_exact(place(ADDED[name]), rng, gamma="mixed").left in (0, 1)


def residual(x):
    y = K.Conv2D(4, 1)(K.ReLU()(norm()(x)))
    return K.Add()([x, y * 2.0 + 1.0])


def two_sums(x):
    y, z = K.Conv2D(4, 1)(x), K.Conv2D(4, 1)(K.ReLU()(x))
    return K.Add()([norm()(y + 1.0), norm()(z - CHANNELS)])


AROUND = {
    "residual": lambda x: norm()(residual(residual(K.Conv2D(4, 1)(x)))),
    "sums": lambda x: norm()(two_sums(x)),
    "a_maximum_with_itself": lambda x: (lambda y: K.Maximum()([norm()(y), norm()(y * 2.0)]))(
        K.Conv2D(4, 1)(x)
    ),
    "a_sum_with_itself": lambda x: (lambda y: K.Add()([norm()(y), norm()(y + 1.0)]))(
        K.Conv2D(4, 1)(x)
    ),
    "repeated_channels": lambda x: (lambda y: norm()(y * np.arange(1.0, 17.0)))(
        K.Flatten()(K.Conv2D(4, 4, 4)(x))
    ),
    "repeated_channels_joined_again": lambda x: norm()(
        K.Reshape((2, 2, 4))(K.Flatten()(K.Conv2D(4, 4, 4)(x)) * np.arange(1.0, 17.0))
    ),
    "repeated_channels_plus": lambda x: norm()(
        K.Reshape((2, 2, 4))(K.Flatten()(K.Conv2D(4, 4, 4)(x)) + np.arange(1.0, 17.0))
    ),
    "between_norms": lambda x: norm()(norm()(K.Conv2D(4, 1)(x)) + 1.0),
    "relu_behind": lambda x: norm()(K.LeakyReLU(0.5)(K.Conv2D(4, 1)(x) + 1.0)),
}


@pytest.mark.parametrize(("gamma", "shift"), [("powers", True), ("mixed", False)])
@pytest.mark.parametrize("name", AROUND)
def test_constants_among_values_that_others_read_stay_exact(name, gamma, shift, rng):
    x = K.Input((8, 8, 4), dtype="float64")
    model = Model(x, K.Activation("relu")(AROUND[name](x)))
    assert_exact(model, rng, gamma=gamma, shift=shift)


CONSTANTS_KEPT = {
    "by_position": (lambda x: x * np.arange(1.0, 9.0).reshape(8, 1), "channels on axis 2"),
    "by_two_axes": (lambda x: x * np.arange(1.0, 33.0).reshape(8, 4), "differ by position"),
    "by_0": (lambda x: x * np.array([1.0, 0.0, 1.0, 1.0]), "multiplies by 0"),
    "divides": (lambda x: 1.0 / (x * x + 1.0), "divides by it"),
}


@pytest.mark.parametrize("name", CONSTANTS_KEPT)
def test_other_constants_take_the_identity_alone(name, rng):
    function, why = CONSTANTS_KEPT[name]
    (reason,) = kept(assert_exact(behind(function), rng))
    assert why in reason


# -------------------------------------------------------------------------- reductions


def reduce(name, **kwargs):
    def function(x):
        return ops(name, f"reduce_{name}")(x, **kwargs)

    return function


def last_axis(x):
    return len(x.shape) - 1


REDUCED = {
    "mean": reduce("mean", axis=[1, 2]),
    "mean_of_rows": reduce("mean", axis=1),
    "mean_keepdims": reduce("mean", axis=(1, 2), keepdims=True),
    "sum": reduce("sum", axis=[1, 2]),
    "sum_keepdims": reduce("sum", axis=-2, keepdims=True),
}


@pytest.mark.parametrize("name", REDUCED)
def test_means_and_sums_pass_all(name, rng):
    assert assert_exact(behind(REDUCED[name]), rng).left == 0


EXTREMA = {
    "max": reduce("max", axis=[1, 2]),
    "min": reduce("min", axis=1, keepdims=True),
    "pool": lambda x: (
        keras.ops.max_pool(x, 2, 2) if package() is keras else tf.nn.max_pool2d(x, 2, 2, "VALID")
    ),
}


@pytest.mark.parametrize("name", EXTREMA)
def test_extrema_pass_positive_scales(name, rng):
    assert assert_exact(behind(EXTREMA[name]), rng, gamma="positive").left == 0
    (reason,) = kept(assert_exact(behind(EXTREMA[name]), rng))
    assert "negative scale" in reason
    assert ("minimum" in reason) == (name == "min")


def test_a_sum_over_an_open_size_takes_no_shift(rng):
    def model():
        x = K.Input((None, 8, 4), dtype="float64")
        y = norm()(reduce("sum", axis=1)(K.Conv2D(4, 1)(x)))
        return Model(x, K.Activation("relu")(y))

    assert assert_exact(model(), rng, shift=False).left == 0
    (reason,) = kept(assert_exact(model(), rng))
    assert "adds up an unknown number of positions, which a shift cannot pass" in reason


REDUCED_KEPT = {
    "channels": (reduce("mean", axis=-1, keepdims=True), "works along axis 3"),
    "batch": (reduce("mean", axis=0, keepdims=True), "reduces over the batch"),
}


@pytest.mark.parametrize("name", REDUCED_KEPT)
def test_reductions_of_channels_or_the_batch_are_kept(name, rng):
    function, why = REDUCED_KEPT[name]
    (reason,) = kept(assert_exact(behind(function), rng))
    assert why in reason


# ------------------------------------------------------------------------ positions


def padding(mode="constant", **kwargs):
    def function(x):
        return ops("pad")(x, [[0, 0], [1, 1], [0, 2], [0, 0]], mode=mode, **kwargs)

    return function


def space_to_depth(x):
    return tf.nn.space_to_depth(x, 2)


MOVED = {
    "rows": lambda x: x[:, 1:-1],
    "every_other": lambda x: x[:, ::2, ::-1],
    "ellipsis": lambda x: x[..., 1:3, :],
    "one_row": lambda x: x[:, 0],
    "one_row_and_new_axis": lambda x: x[:, 2, :, None, :],
    "average_pool": lambda x: (
        keras.ops.average_pool(x, 2, 2, "same")
        if package() is keras
        else tf.nn.avg_pool2d(x, 2, 2, "SAME")
    ),
    "reshape": lambda x: ops("reshape")(x, (-1, 64, 4)),
    "transpose": lambda x: ops("transpose")(x, [0, 2, 1, 3]),
    "expand": lambda x: ops("expand_dims")(x, 1),
    "squeeze": lambda x: ops("squeeze")(x[:, :1], 1),
    "roll": lambda x: ops("roll")(x, 1, 1),
    "reflect": padding("reflect"),
    "resize": lambda x: K.Activation("linear")(
        (keras.ops.image if package() is keras else tf.image).resize(x, (16, 16), "nearest")
    ),
    "resizing": lambda x: K.Activation("linear")(K.Resizing(16, 16, interpolation="nearest")(x)),
    "resizing_bilinear": lambda x: K.Activation("linear")(K.Resizing(16, 16)(x)),
    "tile": lambda x: ops("tile")(x, [1, 2, 1, 1]),
    "repeat": lambda x: ops("repeat")(x, 2, 1),
    "flip": lambda x: keras.ops.flip(x, 1) if package() is keras else tf.reverse(x, [1]),
}


@pytest.mark.parametrize("place", [behind, before])
@pytest.mark.parametrize("name", MOVED)
def test_positions_may_be_moved(name, place, rng):
    assert assert_exact(place(MOVED[name]), rng).left == 0


def test_zeros_around_pass_a_scale_alone(rng):
    assert assert_exact(behind(padding()), rng, shift=False).left == 0
    (reason,) = kept(assert_exact(behind(padding()), rng))
    assert "pads with zeros, which a shift cannot pass" in reason


def test_other_constants_around_pass_nothing(rng):
    (reason,) = kept(assert_exact(behind(padding(constant_values=1)), rng, shift=False))
    assert "pads with a constant" in reason


# ------------------------------------------------------------------------- channels

CHANNELS_TAKEN = {
    "some": lambda x: x[..., :2],
    "in_reverse": lambda x: x[..., ::-1],
    "some_rows_of_some": lambda x: x[:, 1:3, :, 1:],
    "by_a_list": lambda x: (
        keras.ops.take(x, [3, 0, 0], -1) if package() is keras else tf.gather(x, [3, 0, 0], axis=-1)
    ),
    "tiled": lambda x: ops("tile")(x, [1, 1, 1, 2]),
    "rolled": lambda x: ops("roll")(x, 1, -1),
    "repeated": lambda x: ops("repeat")(x, 2, -1),
}


@pytest.mark.parametrize("place", [behind, before])
@pytest.mark.parametrize("name", CHANNELS_TAKEN)
def test_channels_may_be_taken(name, place, rng):
    if place is behind and name in ("by_a_list", "tiled", "repeated"):
        gamma = "powers"  # copies of one channel that are scaled differently
        (reason,) = kept(assert_exact(place(CHANNELS_TAKEN[name]), rng, gamma=gamma))
        assert reason
        return
    assert assert_exact(place(CHANNELS_TAKEN[name]), rng).left == 0


def halves(x):
    return ops("split")(x, 2, -1)


def test_one_part_of_a_split_may_be_normalised(rng):
    x = K.Input((8, 8, 4), dtype="float64")
    a, b = halves(K.Conv2D(8, 1)(x))
    model = Model(x, K.Concatenate()([K.Activation("relu")(norm()(a)), b]))
    assert assert_exact(model, rng).left == 0


def test_all_parts_of_a_split_may_be_normalised(rng):
    x = K.Input((8, 8, 4), dtype="float64")
    a, b = halves(K.Conv2D(8, 1)(x))
    model = Model(x, K.Activation("relu")(K.Add()([norm()(a), norm()(b)])))
    assert assert_exact(model, rng).left == 0


def test_a_split_of_rows_has_one_scale(rng):
    x = K.Input((8, 8, 4), dtype="float64")
    a, b = ops("split")(K.Conv2D(4, 1)(x), 2, 1)
    model = Model(x, [K.Activation("relu")(norm()(a)), b])
    (reason,) = kept(assert_exact(model, rng))
    assert "is also an output of the model" in reason


def test_parts_that_are_read_before_a_norm_are_kept(rng):
    x = K.Input((8, 8, 4), dtype="float64")
    y = K.Conv2D(8, 1)(x)
    a, b = halves(y)
    model = Model(x, [K.Activation("relu")(norm()(a)), b, y])
    assert len(kept(assert_exact(model, rng))) == 1


def test_an_unstacked_row_may_be_normalised(rng):
    x = K.Input((8, 8, 4), dtype="float64")
    first, *_ = ops("unstack")(K.Conv2D(4, 1)(x), axis=1)
    model = Model(x, K.Activation("relu")(norm()(first)))
    assert assert_exact(model, rng).left == 0


@pytest.mark.parametrize("axis", [1, -2, 0])
def test_what_is_stacked_has_one_scale_and_shift(axis, rng):
    x = K.Input((8, 8, 4), dtype="float64")
    parts = [K.Conv2D(4, 1)(y) for y in (x, K.ReLU()(x))]
    model = Model(x, K.Activation("relu")(norm()(ops("stack")(parts, axis=axis))))
    assert assert_exact(model, rng).left == 0


def test_what_is_stacked_as_channels_keeps_its_own(rng):
    x = K.Input((8, 8, 4), dtype="float64")
    parts = [K.Conv2D(4, 1)(y) for y in (x, K.ReLU()(x))]
    model = Model(x, K.Activation("relu")(norm()(ops("stack")(parts, axis=-1))))
    (reason,) = kept(assert_exact(model, rng))
    assert "joins its inputs along the axis of the channels" in reason


def test_examples_may_be_taken_and_moved(rng):
    x = K.Input((8, 8, 4), dtype="float64")
    y = ops("transpose")(K.Conv2D(4, 1)(x)[1:, ...], [1, 0, 2, 3])
    model = Model(x, K.Activation("relu")(norm()(ops("transpose")(y[2, ...], [1, 0, 2]))))
    assert assert_exact(model, rng).left == 0


@pytest.mark.alternating(only="tf_keras")
@pytest.mark.parametrize("inverse", [False, True])
def test_blocks_become_channels_and_back(inverse, rng):
    if package() is keras:
        pytest.skip("is a function of TensorFlow")
    function = tf.nn.depth_to_space if inverse else tf.nn.space_to_depth
    model = before(lambda x: function(x, 2))
    plan = assert_exact(model, rng)
    assert plan.left == int(inverse)  # where it makes four channels one, they differ
    plan = assert_exact(behind(lambda x: function(x, 2)), rng)
    assert plan.left == int(not inverse)


@pytest.mark.parametrize("place", [behind, before])
def test_parts_without_channels_are_no_part(place, rng):
    model = place(lambda x: K.Concatenate()([x[..., :0], x]))
    assert assert_exact(model, rng).left == 0


@pytest.mark.alternating(only="keras")
def test_code_may_compute_a_constant_in_every_call(rng):
    if package() is not keras:
        pytest.skip("such code is not traced in tf_keras")

    class Scaled(K.Layer):
        def build(self, shape):
            self.factor = self.add_weight(name="factor", shape=(4,), initializer="ones")
            self.norm = norm()
            self.norm.build(shape)
            super().build(shape)

        def call(self, x):
            return self.norm(x * ops("exp")(ops("zeros_like")(self.factor)))

    x = K.Input((8, 8, 4), dtype="float64")
    model = Model(x, K.Activation("relu")(Scaled()(K.Conv2D(4, 1)(x))))
    assert len(kept(assert_exact(model, rng))) == 1

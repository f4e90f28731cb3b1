"""Every row of the table of units, proved on real layers without rounding.

Each case is a model whose BatchNormalizations fold into what is before them, behind them or
around them, or must not. In either case the rewritten model gives the original's outputs bit for
bit.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras

import mbn_rewrite as mbn
from tests.support.kerases import K, Model, function, set_policy
from tests.support.whole_numbers import (
    assert_equal_bits,
    assert_exact,
    assert_exact_when_saved,
    norm,
    randomise,
)

pytestmark = [pytest.mark.slow, pytest.mark.alternating]


@pytest.fixture(autouse=True)
def _float64(_fresh_keras, each_keras):
    set_policy("float64")


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def model_of(shape, wire):
    """A model from a shape without batch and a function of its input."""
    x = K.Input(shape, dtype="float64")
    return Model(x, wire(x))


def chain(*layers):
    def wire(x):
        for layer in layers:
            x = layer(x)
        return x

    return wire


def as_float64():
    """Casts back what TensorFlow's image functions give in float32."""
    return K.Activation("linear")


@keras.saving.register_keras_serializable("tests")
@tf_keras.utils.register_keras_serializable("tests")
def sign(x):
    """A saturating activation that gives whole numbers, so that states are not rounded."""
    return tf.sign(x)


IMAGE, SEQUENCE, VOLUME, FLAT = (8, 8, 4), (8, 4), (4, 4, 4, 3), (6,)

# --------------------------------------------------------------- backward: must be absorbed

LINEAR = {
    "conv1d": (SEQUENCE, lambda **k: K.Conv1D(5, 3, **k)),
    "conv1d_causal_dilated": (
        SEQUENCE,
        lambda **k: K.Conv1D(5, 2, padding="causal", dilation_rate=2, **k),
    ),
    "conv2d_valid": (IMAGE, lambda **k: K.Conv2D(5, 3, **k)),
    "conv2d_same_strided": (IMAGE, lambda **k: K.Conv2D(5, 3, 2, padding="same", **k)),
    "conv2d_dilated": (IMAGE, lambda **k: K.Conv2D(5, 3, dilation_rate=2, **k)),
    "conv2d_groups": (IMAGE, lambda **k: K.Conv2D(6, 3, groups=2, **k)),
    "conv3d": (VOLUME, lambda **k: K.Conv3D(4, 2, **k)),
    "depthwise1d": (SEQUENCE, lambda **k: K.DepthwiseConv1D(3, **k)),
    "depthwise2d": (IMAGE, lambda **k: K.DepthwiseConv2D(3, padding="same", **k)),
    "depthwise2d_multiplier": (IMAGE, lambda **k: K.DepthwiseConv2D(3, depth_multiplier=3, **k)),
    "separable1d": (SEQUENCE, lambda **k: K.SeparableConv1D(5, 3, **k)),
    "separable2d_multiplier": (
        IMAGE,
        lambda **k: K.SeparableConv2D(5, 3, depth_multiplier=2, padding="same", **k),
    ),
    "transpose1d": (SEQUENCE, lambda **k: K.Conv1DTranspose(5, 3, 2, **k)),
    "transpose2d": (IMAGE, lambda **k: K.Conv2DTranspose(5, 3, 2, padding="same", **k)),
    "transpose3d": (VOLUME, lambda **k: K.Conv3DTranspose(2, 2, 2, **k)),
    "dense": (FLAT, lambda **k: K.Dense(5, **k)),
    "dense_rank4": (IMAGE, lambda **k: K.Dense(5, **k)),
    "time_distributed_dense": (SEQUENCE, lambda **k: K.TimeDistributed(K.Dense(5, **k))),
}


@pytest.mark.parametrize("use_bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("name", LINEAR)
def test_linear_absorbs_what_follows(name, use_bias, rng):
    shape, layer = LINEAR[name]
    model = model_of(shape, chain(layer(use_bias=use_bias), norm(), K.ReLU()))
    assert assert_exact(model, rng).left == 0


def test_an_embedding_absorbs_what_follows(rng):
    tokens = K.Input((8,), dtype="int32")
    model = Model(tokens, chain(K.Embedding(9, 4), norm(), K.ReLU())(tokens))
    randomise(model, rng)
    new, plan = mbn.convert_with_plan(model, "fold", check=False)
    assert plan.left == 0
    numbers = tf.constant(rng.integers(0, 9, (2, 8)), tf.int32)
    assert_equal_bits(model, new, numbers)
    assert assert_exact_when_saved(model, numbers).left == 0


@pytest.mark.parametrize("bias_axes", [None, "d"])
@pytest.mark.parametrize("equation", ["abc,cd->abd", "...x,xd->...d", "abc,bcd->ad"])
def test_einsum_dense_absorbs_what_follows(equation, bias_axes, rng):
    output = (None, 5) if equation == "abc,cd->abd" else 5
    layer = K.EinsumDense(equation, output, bias_axes=bias_axes)
    assert assert_exact(model_of(SEQUENCE, chain(layer, norm(), K.ReLU())), rng).left == 0


@pytest.mark.parametrize(
    ("scale", "center"), [(True, False), (False, True), (False, False)], ids=str
)
def test_batch_norm_without_gamma_or_beta(scale, center, rng):
    model = model_of(IMAGE, chain(K.Conv2D(5, 3), norm(scale=scale, center=center), K.ReLU()))
    assert assert_exact(model, rng).left == 0


def merged(merge, *branches):
    return lambda x: merge([branch(x) for branch in branches])


def conv():
    """A convolution of a value of its own, so that it is no parallel of others."""
    return chain(K.ReLU(), K.Conv2D(4, 1))


BACKWARD = {
    "average_pool": lambda: chain(K.Conv2D(4, 1), K.AveragePooling2D(2), norm()),
    "average_pool_same": lambda: chain(
        K.Conv2D(4, 2), K.AveragePooling2D(2, 2, padding="same"), norm()
    ),
    "global_average_pool": lambda: chain(K.Conv2D(4, 1), K.GlobalAveragePooling2D(), norm()),
    "global_average_pool_keepdims": lambda: chain(
        K.Conv2D(4, 1), K.GlobalAveragePooling2D(keepdims=True), norm()
    ),
    "cropping": lambda: chain(K.Conv2D(4, 1), K.Cropping2D(1), norm()),
    "upsampling_nearest": lambda: chain(K.Conv2D(4, 1), K.UpSampling2D(2), norm()),
    "upsampling_bilinear": lambda: chain(
        K.Conv2D(4, 1), K.UpSampling2D(2, interpolation="bilinear"), as_float64(), norm()
    ),
    "dropout": lambda: chain(K.Conv2D(4, 1), K.Dropout(0.5), K.SpatialDropout2D(0.5), norm()),
    "noise": lambda: chain(K.Conv2D(4, 1), K.GaussianNoise(0.5), K.GaussianDropout(0.5), norm()),
    "identity": lambda: chain(K.Conv2D(4, 1), K.Identity(), K.Activation("linear"), norm()),
    "reshape_keeps_channels": lambda: chain(K.Conv2D(4, 1), K.Reshape((-1, 4)), norm()),
    "permute": lambda: chain(K.Conv2D(4, 1), K.Permute((3, 1, 2)), norm(axis=1)),
    "flatten_of_one_position": lambda: chain(K.Conv2D(4, 8), K.Flatten(), norm()),
    "dense_taken_apart": lambda: chain(K.Flatten(), K.Dense(12), K.Reshape((2, 2, 3)), norm()),
    "repeat_vector": lambda: chain(K.GlobalMaxPooling2D(), K.Dense(4), K.RepeatVector(3), norm()),
    "add": lambda: merged(chain(K.Add(), norm()), conv(), conv(), conv()),
    "subtract": lambda: merged(chain(K.Subtract(), norm()), conv(), conv()),
    "average": lambda: merged(chain(K.Average(), norm()), conv(), conv()),
    "concatenate": lambda: merged(chain(K.Concatenate(), norm()), K.Conv2D(3, 1), K.Conv2D(5, 1)),
    "concatenate_rows": lambda: merged(
        chain(K.Concatenate(1), norm()), K.Conv2D(4, 1), K.Conv2D(4, 1)
    ),
    "add_of_adds": lambda: merged(chain(K.Add(), norm()), merged(K.Add(), conv(), conv()), conv()),
    # Padding takes no shift, so the shift must go to the other branch.
    "add_with_padded_branch": lambda: merged(
        chain(K.Add(), norm()), chain(K.Conv2D(4, 3), K.ZeroPadding2D(1)), K.Conv2D(4, 1)
    ),
    "another_batch_norm": lambda: chain(K.Conv2D(4, 1), norm(), norm()),
    "operator": lambda: lambda x: norm()(K.Conv2D(4, 1)(x) + K.Conv2D(4, 1)(x)),
    "function": lambda: (
        lambda x: norm()(function("concatenate")([K.Conv2D(4, 1)(x), K.Conv2D(2, 1)(x)], -1))
    ),
}


@pytest.mark.parametrize("name", BACKWARD)
def test_moves_backward(name, rng):
    # A function that is not linear behind it leaves no other way than backward.
    model = model_of(IMAGE, chain(BACKWARD[name](), K.Activation("relu")))
    assert assert_exact(model, rng).left == 0


POSITIVE_ONLY = {
    "max_pool": lambda: chain(K.Conv2D(4, 1), K.MaxPooling2D(2), norm()),
    "max_pool_same": lambda: chain(K.Conv2D(4, 1), K.MaxPooling2D(3, 2, padding="same"), norm()),
    "global_max_pool": lambda: chain(K.Conv2D(4, 1), K.GlobalMaxPooling2D(), norm()),
    "maximum": lambda: merged(chain(K.Maximum(), norm()), K.Conv2D(4, 1), K.Conv2D(4, 1)),
    "minimum": lambda: merged(chain(K.Minimum(), norm()), K.Conv2D(4, 1), K.Conv2D(4, 1)),
}


@pytest.mark.parametrize("name", POSITIVE_ONLY)
def test_maxima_pass_positive_scales(name, rng):
    model = model_of(IMAGE, chain(POSITIVE_ONLY[name](), K.ReLU()))
    assert assert_exact(model, rng, gamma="positive").left == 0


@pytest.mark.parametrize("name", POSITIVE_ONLY)
def test_maxima_block_negative_scales(name, rng):
    plan = assert_exact(model_of(IMAGE, chain(POSITIVE_ONLY[name](), K.ReLU())), rng)
    assert plan.left == 1
    assert "negative scale" in plan.decisions[0].reason


def test_zero_padding_passes_without_shift(rng):
    wire = chain(K.Conv2D(4, 1), K.ZeroPadding2D(1), norm(), K.Activation("relu"))
    assert assert_exact(model_of(IMAGE, wire), rng, shift=False).left == 0


@pytest.mark.parametrize(
    "activation",
    [lambda: K.ReLU(negative_slope=0.5), lambda: K.LeakyReLU(0.25), lambda: K.PReLU(),
     lambda: K.Activation("relu"), lambda: K.Activation(function("relu"))],
    ids=["relu", "leaky_relu", "prelu", "activation", "function"],
)  # fmt: skip
def test_homogeneous_activations_pass_positive_scales_without_shift(activation, rng):
    wire = chain(norm(), activation(), K.Conv2D(3, 1), K.Activation("tanh"))
    assert assert_exact(model_of(IMAGE, wire), rng, gamma="positive", shift=False).left == 0


# -------------------------------------------------------------------- forward: must be absorbed

SIGNS = {"activation": sign, "recurrent_activation": sign}

FORWARD_LINEAR = {
    "conv1d": (SEQUENCE, lambda **k: K.Conv1D(5, 3, **k)),
    "conv2d_valid": (IMAGE, lambda **k: K.Conv2D(5, 3, **k)),
    "conv2d_one_by_one_same": (IMAGE, lambda **k: K.Conv2D(5, 1, 2, padding="same", **k)),
    "conv2d_groups": (IMAGE, lambda **k: K.Conv2D(6, 3, groups=2, **k)),
    "conv3d": (VOLUME, lambda **k: K.Conv3D(4, 2, **k)),
    "depthwise1d": (SEQUENCE, lambda **k: K.DepthwiseConv1D(3, **k)),
    "depthwise2d_multiplier": (IMAGE, lambda **k: K.DepthwiseConv2D(3, depth_multiplier=3, **k)),
    "separable2d_multiplier": (IMAGE, lambda **k: K.SeparableConv2D(5, 3, depth_multiplier=2, **k)),
    "transpose2d_one_by_one": (IMAGE, lambda **k: K.Conv2DTranspose(5, 1, **k)),
    "dense": (FLAT, lambda **k: K.Dense(5, **k)),
    "dense_rank4": (IMAGE, lambda **k: K.Dense(5, **k)),
    "time_distributed_dense": (SEQUENCE, lambda **k: K.TimeDistributed(K.Dense(5, **k))),
    "fused_activation": (IMAGE, lambda **k: K.Conv2D(5, 3, activation="tanh", **k)),
    "gru": (SEQUENCE, lambda **k: K.GRU(3, **SIGNS, **k)),
    "gru_reset_before": (SEQUENCE, lambda **k: K.GRU(3, **SIGNS, reset_after=False, **k)),
    "lstm": (SEQUENCE, lambda **k: K.LSTM(3, **SIGNS, return_sequences=True, **k)),
    "simple_rnn": (SEQUENCE, lambda **k: K.SimpleRNN(3, activation=sign, **k)),
    "bidirectional_gru": (SEQUENCE, lambda **k: K.Bidirectional(K.GRU(3, **SIGNS, **k))),
    "bidirectional_lstm": (
        SEQUENCE,
        lambda **k: K.Bidirectional(
            K.LSTM(3, **SIGNS, return_sequences=True, **k), merge_mode="sum"
        ),
    ),
}


@pytest.mark.parametrize("use_bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("name", FORWARD_LINEAR)
def test_linear_absorbs_what_precedes(name, use_bias, rng):
    shape, layer = FORWARD_LINEAR[name]
    model = model_of(shape, chain(norm(), layer(use_bias=use_bias)))
    is_recurrent = any(kind in name for kind in ("gru", "lstm", "rnn"))
    left_when_saved = int(is_recurrent and not use_bias)
    assert assert_exact(model, rng, left_when_saved=left_when_saved).left == 0


@pytest.mark.parametrize("bias_axes", [None, "d"])
def test_einsum_dense_absorbs_what_precedes(bias_axes, rng):
    layer = K.EinsumDense("abc,cd->abd", (None, 5), bias_axes=bias_axes)
    assert assert_exact(model_of(SEQUENCE, chain(norm(), layer)), rng).left == 0


PADDED = {
    "conv1d_causal": (SEQUENCE, lambda: K.Conv1D(5, 2, padding="causal")),
    "conv2d_same": (IMAGE, lambda: K.Conv2D(5, 3, padding="same")),
    "depthwise2d_same": (IMAGE, lambda: K.DepthwiseConv2D(3, padding="same")),
    "separable2d_same": (IMAGE, lambda: K.SeparableConv2D(5, 3, padding="same")),
    "transpose2d": (IMAGE, lambda: K.Conv2DTranspose(5, 2, 2)),
    "transpose2d_one_by_one_strided": (IMAGE, lambda: K.Conv2DTranspose(5, 1, 2)),
}


@pytest.mark.parametrize("name", PADDED)
def test_padded_convolution_takes_a_scale(name, rng):
    shape, layer = PADDED[name]
    assert assert_exact(model_of(shape, chain(norm(), layer())), rng, shift=False).left == 0


@pytest.mark.parametrize("name", PADDED)
def test_padded_convolution_blocks_a_shift(name, rng):
    shape, layer = PADDED[name]
    plan = assert_exact(model_of(shape, chain(norm(), layer())), rng)
    assert plan.left == 1
    why = "adds up another number" if name.startswith("transpose") else "pads its input with zeros"
    assert why in plan.decisions[0].reason
    assert "which a shift cannot pass" in plan.decisions[0].reason


FORWARD = {
    "average_pool": lambda: chain(norm(), K.AveragePooling2D(2), K.Conv2D(3, 2)),
    "global_average_pool": lambda: chain(norm(), K.GlobalAveragePooling2D(), K.Dense(3)),
    "cropping": lambda: chain(norm(), K.Cropping2D(1), K.Conv2D(3, 2)),
    "upsampling": lambda: chain(norm(), K.UpSampling2D(2), K.Conv2D(3, 2)),
    "dropout": lambda: chain(norm(), K.Dropout(0.5), K.Conv2D(3, 2)),
    "flatten_repeats_the_map": lambda: chain(norm(), K.Flatten(), K.Dense(3)),
    "reshape": lambda: chain(norm(), K.Reshape((-1, 4)), K.Conv1D(3, 2)),
    "permute": lambda: chain(norm(), K.Permute((2, 1, 3)), K.Conv2D(3, 2)),
    "several_readers": lambda: (
        lambda x: (lambda y: K.Maximum()([K.Conv2D(3, 1)(y), K.Conv2D(3, 1)(y)]))(norm()(x))
    ),
    "concatenate": lambda: lambda x: K.Conv2D(3, 2)(K.Concatenate()([norm()(x), K.ReLU()(x)])),
    "another_batch_norm": lambda: chain(norm(), norm(), K.Conv2D(3, 2)),
}


@pytest.mark.parametrize("name", FORWARD)
def test_moves_forward(name, rng):
    # What stands before is an activation, so there is no other way than forward.
    model = model_of(IMAGE, chain(K.Activation("relu"), FORWARD[name]()))
    assert assert_exact(model, rng).left == 0


def test_max_pool_passes_forward_with_positive_scales(rng):
    wire = chain(K.ReLU(), norm(), K.MaxPooling2D(2), K.Conv2D(3, 2))
    assert assert_exact(model_of(IMAGE, wire), rng, gamma="positive").left == 0


def test_zero_padding_passes_forward_without_shift(rng):
    wire = chain(K.ReLU(), norm(), K.ZeroPadding2D(1), K.Conv2D(3, 2))
    assert assert_exact(model_of(IMAGE, wire), rng, shift=False).left == 0


# ----------------------------------------------- values that are read by others: must be absorbed


def residual(x):
    """Pre-activation residual blocks: both what a block reads and what it gives are read twice."""
    for _ in range(2):
        y = K.Conv2D(4, 1)(K.ReLU()(norm()(x)))
        x = K.Add()([x, y])
    return K.Conv2D(3, 1)(K.ReLU()(norm()(x)))


def dense(x):
    """Two BatchNormalizations of one value, each with a ReLU behind it."""
    y, z = K.ReLU()(norm()(x)), K.ReLU()(norm()(x))
    return K.Conv2D(3, 2)(K.Concatenate()([y, z]))


def parallel(x):
    """A BatchNormalization beside a convolution, and a value read by both."""
    y = K.Add()([norm()(x), norm()(K.Conv2D(4, 1)(x))])
    return K.Conv2D(3, 1)(K.ReLU()(y))


def gated(x):
    """A gate of one position, whose product is scaled."""
    y = K.Conv2D(4, 1)(K.GlobalAveragePooling2D(keepdims=True)(x))
    return K.Activation("tanh")(norm()(K.Multiply()([K.Conv2D(4, 1)(x), y])))


SHARED_VALUES = {
    "add_of_one_value_twice": (lambda x: K.ReLU()(norm()(K.Add()([x, x]))), True),
    "residual": (residual, True),
    "dense": (dense, True),
    "parallel": (parallel, True),
    "gated": (gated, False),
}


@pytest.mark.parametrize("name", SHARED_VALUES)
def test_values_that_are_read_by_others_change_their_units(name, rng):
    wire, shift = SHARED_VALUES[name]
    model = model_of(IMAGE, chain(K.Conv2D(4, 1), wire))
    assert assert_exact(model, rng, gamma="powers", shift=shift).left == 0


# --------------------------------------------------------------------------- must be kept

KEPT = {
    "activation_between": (
        lambda: chain(K.Conv2D(4, 1), K.ReLU(), norm(), K.Activation("tanh")),
        "is an activation",
    ),
    "fused_activation": (
        lambda: chain(K.Conv2D(4, 1, activation="relu"), norm(), K.Activation("tanh")),
        "applies a fused activation",
    ),
    "zero_padding_before": (
        lambda: chain(K.Conv2D(4, 1), K.ZeroPadding2D(1), norm(), K.ReLU()),
        "pads with zeros",
    ),
    "zero_padding_after": (
        lambda: chain(K.ReLU(), norm(), K.ZeroPadding2D(1), K.Conv2D(3, 3)),
        "pads with zeros",
    ),
    "other_axis": (
        lambda: chain(K.Conv2D(4, 1), norm(axis=1), K.ReLU()),
        "output channels on axis 3",
    ),
    "flatten_mixes": (
        lambda: chain(K.Conv2D(4, 4), K.Flatten(), norm(), K.ReLU()),
        "mixes channels",
    ),
    "input": (lambda: chain(norm(), K.ReLU()), "is an input of the model"),
    "multiply": (
        lambda: chain(merged(K.Multiply(), K.Conv2D(4, 1), K.Conv2D(4, 1)), norm(), K.ReLU()),
        "multiplies it by other values, which a shift cannot pass",
    ),
    "add_with_blocked_branch": (
        lambda: chain(merged(K.Add(), K.Conv2D(4, 1), K.ReLU()), norm(), K.ReLU()),
        "is an input of the model",
    ),
    "concatenate_with_blocked_branch": (
        lambda: chain(merged(K.Concatenate(), K.Conv2D(4, 1), K.ReLU()), norm(), K.ReLU()),
        "is an input of the model",
    ),
    "broadcasting_add": (
        lambda: chain(merged(K.Add(), K.Conv2D(4, 1), K.Conv2D(1, 1)), norm(), K.ReLU()),
        "repeats one of its inputs",
    ),
    "bicubic_upsampling": (
        lambda: chain(
            K.Conv2D(4, 1),
            K.UpSampling2D(2, interpolation="bicubic"),
            as_float64(),
            norm(),
            K.ReLU(),
        ),
        "interpolates by bicubic",
    ),
    "one_of_several_readers": (
        lambda: chain(
            K.ReLU(), norm(), lambda x: K.Add()([K.Conv2D(4, 1)(x), K.Activation("tanh")(x)])
        ),
        "is a tanh activation",
    ),
    "relu6": (
        lambda: chain(K.ReLU(), norm(), K.ReLU(6.0), K.Conv2D(3, 1)),
        "activation with a limit",
    ),
}


@pytest.mark.parametrize("name", KEPT)
def test_is_kept_with_its_reason(name, rng):
    wire, reason = KEPT[name]
    plan = assert_exact(model_of(IMAGE, wire()), rng)
    assert [decision.action for decision in plan.decisions] == ["kept"]
    assert reason in plan.decisions[0].reason


@pytest.mark.parametrize("activation", ["relu", "linear"])
def test_fused_relu_takes_positive_scale_without_shift(activation, rng):
    wire = chain(K.Conv2D(4, 1, activation=activation), norm(), K.Activation("tanh"))
    assert assert_exact(model_of(IMAGE, wire), rng, gamma="positive", shift=False).left == 0


# ------------------------------------------------------------------------- channels first


def first(layer, *args, **kwargs):
    return layer(*args, data_format="channels_first", **kwargs)


CHANNELS_FIRST = {
    "conv2d": lambda: chain(first(K.Conv2D, 4, 3, padding="same"), norm(axis=1), K.ReLU()),
    "depthwise": lambda: chain(
        first(K.DepthwiseConv2D, 3, depth_multiplier=2), norm(axis=1), K.ReLU()
    ),
    "separable": lambda: chain(first(K.SeparableConv2D, 4, 3), norm(axis=1), K.ReLU()),
    "transpose": lambda: chain(first(K.Conv2DTranspose, 4, 3), norm(axis=1), K.ReLU()),
    "pool": lambda: chain(
        first(K.Conv2D, 4, 1), first(K.AveragePooling2D, 2), first(K.Cropping2D, 1), norm(axis=1),
        K.ReLU(),
    ),
    "global_pool": lambda: chain(
        first(K.Conv2D, 4, 1), first(K.GlobalAveragePooling2D), norm(axis=1), K.ReLU()
    ),
    "concatenate": lambda: chain(
        merged(K.Concatenate(1), first(K.Conv2D, 4, 1), first(K.Conv2D, 2, 1)), norm(axis=1),
        K.ReLU(),
    ),
    "flatten_forward": lambda: chain(K.ReLU(), norm(axis=1), K.Flatten(), K.Dense(3)),
    "conv_forward": lambda: chain(K.ReLU(), norm(axis=1), first(K.Conv2D, 4, 3)),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANNELS_FIRST)
def test_channels_first(name, rng):
    model = model_of((4, 8, 8), CHANNELS_FIRST[name]())
    # TensorFlow's own CPU kernels take channels last only; XLA takes both.
    assert assert_exact(model, rng, compiled=True).left == 0


def test_flatten_that_moves_channels_is_kept(rng):
    wire = chain(K.ReLU(), norm(axis=1), first(K.Flatten), K.Dense(3))
    plan = assert_exact(model_of((4, 8, 8), wire), rng)
    assert "moves the channels last" in plan.decisions[0].reason

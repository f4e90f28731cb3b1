"""Parallel branches of either Keras as one layer, without rounding: equal bit for bit."""

import keras
import numpy as np
import pytest
import tf_keras

import mbn_rewrite as mbn
from tests.support.kerases import K, Model, adapter_of, package, set_policy
from tests.support.whole_numbers import assert_equal_bits, inputs_for, norm, randomise

pytestmark = [pytest.mark.slow, pytest.mark.alternating]

LINE, IMAGE, ODD, VOLUME, FLAT = (8, 4), (8, 8, 4), (7, 9, 4), (4, 4, 4, 3), (6,)
SAME = {"padding": "same"}
FREE = {"padding": "same", "use_bias": False}


@pytest.fixture(autouse=True)
def _float64(_fresh_keras, each_keras):
    set_policy("float64")


@pytest.fixture
def rng():
    return np.random.default_rng(17)


def merged(model, rng, compiled=False):
    """The model with its branches merged, and the plan; both give the same, bit for bit."""
    randomise(model, rng)
    new = mbn.convert(model, mode="fold", check=False)
    assert_equal_bits(model, new, inputs_for(model, rng), compiled)
    return new, mbn.plan(model, mode="fold")


def classes(model):
    return [type(layer).__name__ for layer in model.layers]


def joined(*branches, merge=None):
    """A function that joins branches, each a list of layers, or one; none for the value itself."""

    def wire(x):
        ends = []
        for branch in branches:
            y = x
            for layer in branch if isinstance(branch, (list, tuple)) else [branch]:
                y = layer(y)
            ends.append(y)
        return (merge or K.Add())(ends)

    return wire


def net(shape, wire):
    """A model with a nonlinear layer on either side of what is wired."""
    x = K.Input(shape, dtype="float64")
    return Model(x, K.ReLU()(wire(K.ReLU()(x))))


ITSELF = ()

MERGES = {
    "conv1d": lambda: (LINE, joined(K.Conv1D(4, 3, **SAME), K.Conv1D(4, 1), [norm()], ITSELF)),
    "conv1d_causal": lambda: (
        LINE,
        joined(K.Conv1D(5, 3, padding="causal"), K.Conv1D(5, 1),
               K.Conv1D(5, 2, padding="causal"))),
    "conv2d": lambda: (
        IMAGE,
        joined([K.Conv2D(4, 3, **FREE), norm()], [K.Conv2D(4, 1, **FREE), norm()], [norm()])),
    "conv2d_biases": lambda: (IMAGE, joined(K.Conv2D(5, 1), [K.Conv2D(5, 3, **SAME), norm()])),
    "conv2d_no_bias": lambda: (IMAGE, joined(K.Conv2D(4, 3, **FREE), ITSELF)),
    "conv2d_even": lambda: (IMAGE, joined(K.Conv2D(4, (4, 2), **SAME), K.Conv2D(4, 1), ITSELF)),
    "conv2d_valid": lambda: (IMAGE, joined(K.Conv2D(5, 3), [norm(), K.Conv2D(5, 3), norm()])),
    "conv2d_strided": lambda: (
        IMAGE, joined([K.Conv2D(5, 3, 2, **FREE), norm()], [K.Conv2D(5, 1, 2, **FREE), norm()])),
    "conv2d_strided_odd": lambda: (
        ODD, joined([K.Conv2D(5, 3, 2, **FREE), norm()], [K.Conv2D(5, 1, 2), norm()])),
    "conv2d_crosses": lambda: (
        ODD, joined(K.Conv2D(5, (1, 3), **SAME), K.Conv2D(5, (3, 1), **SAME),
                    K.Conv2D(5, 3, **SAME))),
    "conv2d_dilated": lambda: (
        IMAGE, joined(K.Conv2D(4, 3, dilation_rate=2, **SAME), K.Conv2D(4, 5, **SAME), ITSELF)),
    "conv2d_groups": lambda: (
        IMAGE, joined(K.Conv2D(4, 3, groups=2, **SAME), K.Conv2D(4, 1, groups=2), [norm()])),
    "conv3d": lambda: (VOLUME, joined(K.Conv3D(3, 3, **SAME), [K.Conv3D(3, 1), norm()], ITSELF)),
    "depthwise1d": lambda: (
        LINE, joined(K.DepthwiseConv1D(3, **SAME), K.DepthwiseConv1D(1), [norm()])),
    "depthwise2d": lambda: (
        IMAGE, joined([K.DepthwiseConv2D(3, **FREE), norm()], K.DepthwiseConv2D(1), ITSELF)),
    "depthwise2d_multiplier": lambda: (
        IMAGE, joined(K.DepthwiseConv2D(3, depth_multiplier=2, **SAME),
                      [norm(), K.DepthwiseConv2D(1, depth_multiplier=2)])),
    "dense": lambda: (FLAT, joined([K.Dense(6), norm()], K.Dense(6), [norm()], ITSELF)),
    "dense_no_bias": lambda: (FLAT, joined([K.Dense(5, use_bias=False), norm()], K.Dense(5))),
    "dense_at_positions": lambda: (LINE, joined(K.Dense(4, use_bias=False), [norm()])),
    "time_distributed": lambda: (
        LINE, joined(K.TimeDistributed(K.Dense(4, use_bias=False)), K.TimeDistributed(K.Dense(4)),
                     [norm()])),
    "open_sizes": lambda: ((None, None, 4), joined(K.Conv2D(4, 3, **SAME), [norm()])),
    "dropout": lambda: (IMAGE, joined([K.Conv2D(4, 3, **SAME), K.Dropout(0.5)], ITSELF)),
    "subtract": lambda: (IMAGE, joined(K.Conv2D(4, 3, **SAME), [norm()], merge=K.Subtract())),
    "average": lambda: (IMAGE, joined([K.Conv2D(4, 3, **SAME), norm()], ITSELF,
                                      merge=K.Average())),
    "python_sum": lambda: (
        IMAGE, joined([norm()], K.Conv2D(4, 1, **SAME), K.Conv2D(4, 3, **SAME), merge=sum)),
    "operator": lambda: (
        IMAGE, joined([K.Conv2D(4, 1, **SAME), norm()], [norm()], K.Conv2D(4, 3, **SAME),
                      merge=lambda ends: ends[0] + ends[1] + ends[2])),
}  # fmt: skip


@pytest.mark.parametrize("name", MERGES)
def test_merges(name, rng):
    new, plan = merged(net(*MERGES[name]()), rng)
    assert plan.left == 0
    assert len(plan.merged) == 1
    assert len(new.layers) == 4  # an input, two ReLU, and it


def beside_zeros(rank, size, strides, *others, separate=False):
    """Branches of which one puts zeros around the value first, as those of RepVGG with strides."""

    def wire(x):
        convolution = getattr(K, "DepthwiseConv2D" if separate else f"Conv{rank}D")
        how = {} if separate else {"filters": 4}
        zeros = getattr(K, f"ZeroPadding{rank}D")(size // 2)
        wide = convolution(kernel_size=size, strides=strides, use_bias=False, **how)
        narrow = convolution(kernel_size=1, strides=strides, **how)
        return K.Add()([norm()(wide(zeros(x))), norm()(narrow(x)), *(f(x) for f in others)])

    return wire


ZEROS = {
    "conv1d": lambda: (LINE, beside_zeros(1, 3, 1, norm())),
    "conv2d": lambda: (IMAGE, beside_zeros(2, 3, 1, norm())),
    "conv2d_strided": lambda: (IMAGE, beside_zeros(2, 3, 2)),
    "conv2d_strided_odd": lambda: (ODD, beside_zeros(2, 5, 2)),
    "conv2d_open_sizes": lambda: ((None, None, 4), beside_zeros(2, 3, 2)),
    "conv3d": lambda: ((*VOLUME[:-1], 4), beside_zeros(3, 3, 1)),
    "depthwise": lambda: (IMAGE, beside_zeros(2, 3, 2, separate=True)),
}


@pytest.mark.parametrize("name", ZEROS)
def test_merges_where_zeros_are_put_around_the_value_for_one(name, rng):
    new, plan = merged(net(*ZEROS[name]()), rng)
    assert plan.left == 0
    assert len(plan.merged) == 1
    assert len(new.layers) == 5  # an input, two ReLU, the zeros, and it


KEEPS = {
    "dilation": lambda: joined(K.Conv2D(4, 3, dilation_rate=2, **SAME), K.Conv2D(4, 3, **SAME)),
    "groups": lambda: joined(K.Conv2D(4, 3, groups=2, **SAME), K.Conv2D(4, 1)),
    "activation": lambda: joined(K.Conv2D(4, 3, **SAME), [K.Conv2D(4, 1), K.ReLU()]),
    "fused_activation": lambda: joined(K.Conv2D(4, 3, **SAME), K.Conv2D(4, 1, activation="relu")),
    "depthwise": lambda: joined(K.DepthwiseConv2D(3, **SAME), K.Conv2D(4, 1)),
    "separable": lambda: joined(K.SeparableConv2D(4, 3, **SAME), ITSELF),
    "transposed": lambda: joined(K.Conv2DTranspose(4, 3, **SAME), ITSELF),
    "shift_into_padding": lambda: joined([norm(), K.Conv2D(4, 3, **SAME)], ITSELF),
    "even_valid": lambda: joined(K.Conv2D(4, 4, **SAME), [K.ZeroPadding2D(1), K.Conv2D(4, 3)]),
    "maximum": lambda: joined(K.Conv2D(4, 3, **SAME), ITSELF, merge=K.Maximum()),
    "einsum": lambda: joined(K.EinsumDense("abcd,de->acbe", (8, 8, 4)), K.Dense(4)),
}


@pytest.mark.parametrize("name", KEEPS)
def test_keeps(name, rng):
    _, plan = merged(net(IMAGE, KEEPS[name]()), rng)
    assert not plan.merged


def test_strides_that_differ(rng):
    layers = (K.Conv2D(4, 3, 2, **SAME), [K.Conv2D(4, 3, 1, **SAME), K.MaxPooling2D(2)])
    assert not merged(net(IMAGE, joined(*layers)), rng)[1].merged


@pytest.mark.parametrize("also", ["read", "output"])
def test_what_others_read_is_kept(also, rng):
    x = K.Input(IMAGE, dtype="float64")
    a, b = K.Conv2D(4, 3, **SAME)(x), K.Conv2D(4, 1)(x)
    y = K.ReLU()(K.Add()([a, b]))
    outputs = [y, b] if also == "output" else K.Concatenate()([y, K.ReLU()(b)])
    assert not merged(Model(x, outputs), rng)[1].merged


def test_a_layer_that_is_called_elsewhere_too(rng):
    x = K.Input(IMAGE, dtype="float64")
    shared = K.Conv2D(4, 1)
    y = K.Add()([K.Conv2D(4, 3, **SAME)(x), shared(x)])
    model = Model(x, K.Concatenate()([K.ReLU()(y), shared(K.ReLU()(x))]))
    assert not merged(model, rng)[1].merged


def test_a_block_that_is_called_twice(rng):
    inner = K.Input(IMAGE, dtype="float64")
    block = Model(inner, joined([K.Conv2D(4, 3, **FREE), norm()], [norm()])(inner), name="block")
    x = K.Input(IMAGE, dtype="float64")
    new, plan = merged(Model(x, K.ReLU()(block(K.ReLU()(block(x))))), rng)
    assert len(plan.merged) == 1
    assert plan.left == 0
    # An Activation keeps the name of the output.
    assert classes(new.get_layer("block")) == ["InputLayer", "Conv2D", "Activation"]


def test_branches_that_are_models(rng):
    wide = package().Sequential([K.Conv2D(4, 3, **FREE), norm()], name="wide")
    narrow = package().Sequential([K.Conv2D(4, 1, **FREE), norm()], name="narrow")
    new, plan = merged(net(IMAGE, joined(wide, narrow, [norm()])), rng)
    assert plan.left == 0
    ((layer, others),) = plan.merged.items()
    assert layer.startswith("wide/")
    assert others[0].startswith("narrow/")
    assert "narrow" not in [layer.name for layer in new.layers]
    assert classes(new)[1:] == ["ReLU", "Sequential", "ReLU"]


@keras.saving.register_keras_serializable("tests")
class Holding3(keras.layers.Layer):
    """Calls a model where nobody sees it."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.block = hidden_block()

    def call(self, x):
        return self.block(x)


@tf_keras.utils.register_keras_serializable("tests")
class Holding2(tf_keras.layers.Layer):
    """The same for tf_keras."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.block = hidden_block()

    def call(self, x):
        return self.block(x)


def hidden_block():
    return net(IMAGE, joined([K.Conv2D(4, 3, **FREE), norm()], [norm()]))


def test_a_block_in_a_layer_of_the_users(rng, each_keras):
    holding = Holding3 if each_keras is keras else Holding2
    x = K.Input(IMAGE, dtype="float64")
    new, plan = merged(Model(x, holding()(x)), rng)
    assert plan.left == 0
    assert len(plan.merged) == 1
    # Code may have the layers of the block by their numbers.
    kept = ["InputLayer", "ReLU", "Conv2D", "PassThrough", "PassThrough", "ReLU"]
    assert classes(new.layers[-1].block) == kept


@pytest.mark.parametrize("operator", [False, True], ids=["layer", "operator"])
def test_a_sum_that_is_an_output_keeps_its_name(operator, rng):
    x = K.Input(IMAGE, dtype="float64")
    a, b = norm()(K.Conv2D(4, 3, **SAME)(x)), K.Conv2D(4, 1)(x)
    y = a + b if operator else K.Add(name="sum")([a, b])
    model = Model(x, [K.ReLU()(y), y])
    new, plan = merged(model, rng)
    assert len(plan.merged) == 1
    assert new.output_names == model.output_names
    assert [adapter_of(new).dtype_of(t) for t in new.outputs] == ["float64"] * 2


def test_a_norm_after_the_sum_and_one_before(rng):
    def wire(x):
        y = joined([K.Conv2D(4, 3, use_bias=False), norm()], K.Conv2D(4, 3))(norm()(x))
        return norm()(y)

    new, plan = merged(net(IMAGE, wire), rng)
    assert plan.left == 0
    assert classes(new) == ["InputLayer", "ReLU", "Conv2D", "ReLU"]


def test_blocks_whose_layers_methods_call_are_kept(rng):
    """What a method of the model calls cannot be seen, and must not be half of a sum."""

    class WithParts(package().Model):
        pass

    x = K.Input(IMAGE, dtype="float64")
    wide, narrow = K.Conv2D(4, 3, **SAME), K.Conv2D(4, 1)
    model = WithParts(x, K.ReLU()(K.Add()([wide(x), narrow(x)])))
    assert len(merged(model, rng)[1].merged) == 1
    model.narrow = narrow
    assert not merged(model, rng)[1].merged


@pytest.mark.parametrize("use_bias", [True, False])
def test_channels_first(use_bias, rng):
    first = {"data_format": "channels_first", **SAME}
    branches = [
        [K.Conv2D(4, 3, use_bias=use_bias, **first), norm(axis=1)],
        K.Conv2D(4, 1, use_bias=use_bias, **first),
        [norm(axis=1)],
    ]
    # The width is as long as the channels are many, where Keras 3 may misplace a bias.
    new, plan = merged(net((4, 6, 4), joined(*branches)), rng, compiled=True)
    if package().__name__ == "tf_keras" or not use_bias:
        assert len(plan.merged) == 1
        assert len(new.layers) == 4


def random_branches(rng):
    """Branches of an image with four channels that one convolution can stand for."""
    stride, groups = int(rng.integers(1, 3)), int(rng.choice([1, 1, 2]))

    def convolution(size):
        bias = bool(rng.integers(2))
        return K.Conv2D(4, size, stride, padding="same", groups=groups, use_bias=bias)

    def branch(kind):
        after = [norm() for _ in range(rng.integers(3))]
        if kind == "itself":
            return after
        if kind == "wide":
            return [convolution(tuple(rng.choice([1, 3], 2).tolist())), *after]
        return [norm(), convolution(1), *after]  # which reads no padding

    kinds = ["wide", "narrow"] + ["itself"] * (stride == 1)
    others = [branch(kind) for kind in rng.choice(kinds, rng.integers(1, 4))]
    return [*others[:1], [convolution(3), norm()], *others[1:]]


@pytest.mark.parametrize("seed", range(12))
def test_random_branches(seed):
    rng = np.random.default_rng(seed)
    shape = (*rng.integers(5, 9, 2).tolist(), 4)
    new, plan = merged(net(shape, joined(*random_branches(rng))), rng)
    assert len(plan.merged) == 1
    assert plan.left == 0
    assert classes(new) == ["InputLayer", "ReLU", "Conv2D", "ReLU"]


def test_masks_flow_on(rng):
    x = K.Input(LINE, dtype="float64")
    y = K.Masking()(x)
    model = Model(x, K.GlobalAveragePooling1D()(K.Add()([K.Conv1D(4, 3, **SAME)(y), y])))
    assert not merged(model, rng)[1].merged

"""Border maps: a shift before a convolution that pads its input with zeros, absorbed exactly.

The planner is asked for them apart from any mode. Models of whole numbers must give the same
outputs bit for bit.
"""

from functools import partial

import numpy as np
import pytest
import tensorflow as tf

import mbn_rewrite as mbn
from mbn_rewrite.comparison import compare_outputs
from mbn_rewrite.frontends.keras_common.files import load
from mbn_rewrite.frontends.registry import front_end_of
from mbn_rewrite.ir import layouts
from mbn_rewrite.ir.algebra import Border, fold
from mbn_rewrite.ir.channel_map import ChannelMap
from mbn_rewrite.ir.graph import Activation, BatchNorm, Graph, Input, Linear, Node, Opaque, Value
from mbn_rewrite.ir.kernels import Window
from mbn_rewrite.passes import planner
from mbn_rewrite.passes.fold import plan_fold
from mbn_rewrite.plans import Fold
from tests.support.kerases import K, Model, package, policy, set_policy
from tests.support.whole_numbers import assert_equal_bits, inputs_for, norm, outputs, randomise

pytestmark = pytest.mark.slow

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
    plan = plan_fold(reading.graph, borders=True)
    return front_end.write(model, reading, plan), plan


def bordered(model):
    return [layer for layer in model.layers if type(layer).__name__ == "BorderedConvolution"]


def assert_exact_with_border(model, rng, compiled=False):
    randomise(model, rng)
    new, plan = with_borders(model)
    assert plan.left == 0, plan
    assert len(bordered(new)) == 1
    assert_equal_bits(model, new, inputs_for(model, rng), compiled)
    assert mbn.plan(model, "fold").left == 1
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
    "conv2d_steps_over": (IMAGE, lambda **k: K.Conv2D(5, (3, 1), 3, padding="same", **k)),
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


@pytest.mark.usefixtures("kerases")
@pytest.mark.parametrize("layer", ["Conv2D", "DepthwiseConv2D"])
def test_channels_first(layer, rng):
    how = {"padding": "same", "data_format": "channels_first"}
    conv = K.Conv2D(5, 3, **how) if layer == "Conv2D" else K.DepthwiseConv2D(3, **how)
    # TensorFlow's own CPU kernels take channels last only; XLA takes both.
    assert_exact_with_border(model_of((4, 8, 7), norm(axis=1), conv), rng, compiled=True)


@pytest.mark.usefixtures("kerases")
def test_what_follows_is_absorbed_too(rng):
    model = model_of(IMAGE, K.ReLU(), norm(), K.Conv2D(5, 3, padding="same"), norm(), K.ReLU())
    randomise(model, rng)
    new, plan = with_borders(model)
    assert [decision.action for decision in plan.decisions] == ["folded", "folded"]
    assert_equal_bits(model, new, inputs_for(model, rng))


@pytest.mark.usefixtures("kerases")
def test_norms_in_a_row_become_one_border(rng):
    model = model_of(IMAGE, norm(), K.AveragePooling2D(1), norm(), K.Conv2D(5, 3, padding="same"))
    randomise(model, rng)
    new, plan = with_borders(model)
    assert plan.left == 0
    assert_equal_bits(model, new, inputs_for(model, rng))


@pytest.mark.usefixtures("kerases")
def test_layer_called_twice_on_inputs_of_one_size(rng):
    first, second = K.Input(IMAGE, dtype="float64"), K.Input(IMAGE, dtype="float64")
    bn, conv = norm(), K.Conv2D(5, 3, padding="same")
    model = Model([first, second], K.Add()([conv(bn(first)), conv(bn(second))]))
    assert_exact_with_border(model, rng)


@pytest.mark.usefixtures("kerases")
def test_sequential_models(rng):
    layers = [
        K.InputLayer(IMAGE, dtype="float64"),
        K.ReLU(),
        norm(),
        K.Conv2D(5, 3, padding="same", name="conv", activation="relu"),
    ]
    model = package().Sequential(layers)
    new = assert_exact_with_border(model, rng)
    assert [type(layer).__name__ for layer in new.layers] == ["ReLU", "BorderedConvolution"]
    assert new.layers[-1].name == "conv"


# ------------------------------------------------------------------------- must be kept


def _open_sizes():
    return model_of((None, 8, 4), K.ReLU(), norm(), K.Conv2D(5, 3, padding="same"))


def _transposed():
    return model_of(IMAGE, K.ReLU(), norm(), K.Conv2DTranspose(5, 3, 2))


def _shared_on_two_sizes():
    first, second = K.Input((8, 8, 4), dtype="float64"), K.Input((6, 6, 4), dtype="float64")
    bn, conv = norm(), K.Conv2D(5, 3, padding="same")
    return Model([first, second], [conv(bn(first)), conv(bn(second))])


def _output():
    x = K.Input(IMAGE, dtype="float64")
    y = norm()(K.ReLU()(x))
    return Model(x, [y, K.Conv2D(5, 3, padding="same")(y)])


def _other_consumer():
    x = K.Input(IMAGE, dtype="float64")
    y = norm()(K.ReLU()(x))
    return Model(x, [K.Activation("tanh")(y), K.Conv2D(5, 3, padding="same")(y)])


def _explicit_padding():
    return model_of(IMAGE, K.ReLU(), norm(), K.ZeroPadding2D(1), K.Conv2D(5, 3))


KEPT = {
    "open_sizes": (_open_sizes, "pads its input with zeros and its sizes are open"),
    "transposed": (_transposed, "another number of inputs for one output than for the next"),
    "shared_on_two_sizes": (_shared_on_two_sizes, "inputs of different sizes"),
    "output": (_output, "is an output of the model"),
    "other_consumer": (_other_consumer, "is a tanh activation"),
    "explicit_padding": (_explicit_padding, "pads with zeros"),
}


@pytest.mark.usefixtures("kerases")
@pytest.mark.parametrize("name", KEPT)
def test_is_kept_with_its_reason(name, rng):
    build, reason = KEPT[name]
    model = build()
    randomise(model, rng)
    new, plan = with_borders(model)
    assert [decision.action for decision in plan.decisions] == ["kept"]
    assert reason in plan.decisions[0].reason
    assert not bordered(new)


# -------------------------------------------------------------------- files, other dtypes


@pytest.mark.usefixtures("_fresh_keras", "each_keras")
@pytest.mark.parametrize("ending", ["keras", "h5"])
@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file")
def test_survives_a_file(ending, rng, tmp_path):
    conv = K.Conv2D(5, 3, padding="same", activation="relu", name="conv")
    model = model_of(IMAGE, K.ReLU(), norm(), conv)
    randomise(model, rng)
    new, _ = with_borders(model)
    new.save(tmp_path / f"model.{ending}")
    loaded = load(tmp_path / f"model.{ending}", False, package())
    assert_equal_bits(new, loaded, inputs_for(model, rng))
    assert len(bordered(loaded)) == 1


@pytest.mark.parametrize("dtype", ["mixed_float16", "mixed_bfloat16"])
@pytest.mark.usefixtures("_fresh_keras", "each_keras")
def test_mixed_precision(dtype, rng):
    set_policy(dtype)
    model = model_of(IMAGE, norm(), K.Conv2D(5, 3, padding="same"))
    randomise(model, rng)
    new, plan = with_borders(model)
    assert plan.left == 0
    data = inputs_for(model, rng)
    assert mbn.verify(model, new, data).ok
    assert [tensor.dtype for tensor in new.outputs] == [tensor.dtype for tensor in model.outputs]


@pytest.mark.usefixtures("kerases")
def test_another_size_is_refused(rng):
    model = model_of(IMAGE, norm(), K.Conv2D(5, 9, 8, padding="same"))
    randomise(model, rng)
    (layer,) = bordered(with_borders(model)[0])
    with pytest.raises(ValueError, match="incompatible with the layer"):
        layer(np.zeros((1, 16, 16, 4)))


@pytest.mark.usefixtures("kerases")
def test_a_border_that_is_off_by_one_position_is_noticed(rng):
    model = model_of(IMAGE, norm(), K.Conv2D(5, 3, padding="same"))
    randomise(model, rng)
    new, _ = with_borders(model)
    data = inputs_for(model, rng)
    (layer,) = bordered(new)
    layer.border.assign(np.roll(layer.border.numpy(), 1, axis=0))
    assert not compare_outputs(outputs(model, data), outputs(new, data), 5e-2).ok


# ----------------------------------------------------------------------------- SavedModels


@pytest.fixture
def fold_with_borders(monkeypatch):
    monkeypatch.setitem(planner._PLANNERS, "fold", partial(plan_fold, borders=True))


SAVED = {
    name: CONVOLUTIONS[name]
    for name in (
        "conv1d", "conv2d_strided", "conv2d_one_output", "conv3d",
        "depthwise2d_multiplier", "separable2d_multiplier",
    )
}  # fmt: skip


@pytest.mark.usefixtures("_fresh_keras", "each_keras", "fold_with_borders")
@pytest.mark.parametrize("use_bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("name", SAVED)
def test_saved_models(name, use_bias, rng, tmp_path):
    shape, layer = SAVED[name]
    # A dilated one is taken apart into blocks, padded in an operation of its own: it is kept.
    # A function that is no activation behind it leaves only the way forward.
    model = model_of(shape, K.ReLU(), norm(), layer(use_bias=use_bias), K.Activation("tanh"))
    randomise(model, rng)
    model.export(tmp_path / "in")
    report = mbn.rewrite_saved_model(tmp_path / "in", tmp_path / "out", "fold")
    assert report.ok
    assert report.plan.left == 0, report.plan
    assert "adds a border map of" in report.plan.decisions[0].reason


@pytest.mark.usefixtures("fold_with_borders")
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    "padding", ["SAME", [[0, 0], [2, 0], [1, 3], [0, 0]]], ids=["same", "explicit"]
)
def test_graph_operations(padding, groups, with_bias, rng, tmp_path):
    module = tf.Module()
    module.kernel = tf.Variable(rng.standard_normal((3, 3, 4 // groups, 6)).astype(np.float32))
    module.bias = tf.Variable(rng.standard_normal(6).astype(np.float32))
    module.beta = tf.Variable(rng.standard_normal(4).astype(np.float32))
    one = np.ones(4, np.float32)

    def serve(x):
        y = tf.nn.relu(x)
        y = tf.nn.batch_normalization(y, 0 * one, one, module.beta, 2 * one, 1e-3)
        y = tf.nn.conv2d(y, module.kernel, 2, padding)
        return tf.nn.tanh(tf.nn.bias_add(y, module.bias) if with_bias else y)

    module.serve = tf.function(
        serve, input_signature=[tf.TensorSpec([None, 8, 7, 4])], jit_compile=groups > 1
    )
    tf.saved_model.save(module, str(tmp_path / "in"), {"serving_default": module.serve})
    report = mbn.rewrite_saved_model(tmp_path / "in", tmp_path / "out", "fold")
    assert report.ok
    assert report.plan.left == 0, report.plan


# ------------------------------------------------------------------- without TensorFlow


def _graph(size, padding="same", dtype="float32", shift=1.0):
    """Opaque -> BatchNormalization -> a convolution of 3 along one axis -> Opaque."""
    window = Window(3, 1, 1, padding)
    conv = Linear(
        (layouts.conv("kernel", (3, 2, 5)),), "bias", 2, 2, True, Activation.LINEAR, (window,)
    )
    ops = [Input(), BatchNorm(ChannelMap(np.full(2, 2.0), np.full(2, shift), 2)), conv, Opaque()]
    nodes = tuple(
        Node(name, name, op, (i - 1,) if i else (), (i,), dtype)
        for i, (name, op) in enumerate(zip(("input", "bn", "conv", "relu"), ops, strict=True))
    )
    values = tuple(Value((None, size, channels), "float32") for channels in (2, 2, 5, 5))
    return Graph(values, nodes, frozenset({3}), read_weight=lambda owner, name: _WEIGHTS[name])


_WEIGHTS = {"kernel": np.ones((3, 2, 5)), "bias": np.zeros(5)}


def test_fold_plans_no_border():
    graph = _graph(14)
    for plan in (planner.make_plan(graph, "fold"), plan_fold(graph)):
        assert [decision.action for decision in plan.decisions] == ["kept"]
        assert "pads its input with zeros, which a shift cannot pass" in plan.decisions[0].reason


def test_the_decision_says_where_the_border_is_added():
    plan = plan_fold(_graph(14), borders=True)
    (decision,) = plan.decisions
    assert (decision.action, decision.into) == ("folded", ("conv",))
    assert decision.reason == (
        "conv 'conv' pads its input with zeros: it adds a border map of 14 x 5."
    )
    (edit,) = plan.to_dict()["edits"]
    assert edit["border"] == [14]


def test_a_border_is_planned_for_a_shift_only():
    plan = plan_fold(_graph(14, shift=0.0), borders=True)
    assert plan.of(Fold)["conv"].border is None
    assert plan.decisions[0].reason == ""


def test_a_border_out_of_range_is_declined():
    plan = plan_fold(_graph(14, dtype="float16", shift=40000.0), borders=True)
    assert "more than float16 can hold" in plan.decisions[0].reason


@pytest.mark.parametrize(
    ("padding", "expected"),
    [
        ("same", [[0, 1, 1], [1, 1, 1], [1, 1, 1], [1, 1, 0]]),
        ((2, 0), [[0, 0, 1], [0, 1, 1], [1, 1, 1], [1, 1, 1]]),
        ((0, 0), [[1, 1, 1], [1, 1, 1]]),
    ],
)
def test_where_a_window_reads(padding, expected):
    np.testing.assert_array_equal(Window(3, 1, 1, padding).reads(4), expected)


def test_border_by_hand():
    kernel = layouts.conv("kernel", (3, 2, 1))
    array = np.array([[1.0, 10], [2, 20], [3, 30]]).reshape(3, 2, 1)
    before = ChannelMap(np.ones(2), np.ones(2), 2)
    after = ChannelMap(np.full(1, 2.0), np.full(1, 1.0), 2)
    border = Border((Window(3, 1, 1, "same"),), (3,))
    _, bias = fold([(kernel, array)], np.array([5.0]), before=before, after=after, border=border)
    np.testing.assert_array_equal(bias[:, 0], [121, 143, 77])

"""Copies of layers: what their configurations say, and what comes back when they are saved.

A rewritten model is right only if it still is once it was saved and loaded, or cloned.
"""

import keras as keras_3
import numpy as np
import pytest
import tf_keras

import mbn_rewrite as mbn
from mbn_rewrite.frontends.registry import front_end_of
from mbn_rewrite.passes.planner import make_plan
from tests.support import kerases, stock_layers
from tests.support.kerases import K, Model
from tests.support.random_models import randomise
from tests.support.round_trips import KNOWN, through
from tests.support.stock_layers import bent, odd_bound, odd_penalty

pytestmark = pytest.mark.slow

GROUPS = 6  # in which all layers of a Keras are copied: to copy each alone takes longer


@pytest.fixture
def rng():
    return np.random.default_rng(11)


def copied(model):
    front_end = front_end_of(model)
    reading = front_end.read(model)
    return front_end.write(model, reading, make_plan(reading.graph, "fold"))


def plain(value):
    """A configuration of comparable things; without the shapes that layers were built for."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items() if k != "build_config"}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value.tolist() if isinstance(value, np.ndarray) else value


def configurations(model):
    return {layer.name: plain(layer.get_config()) for layer in model.layers}


# ---------------------------------------------------------------------------- configurations


@pytest.mark.parametrize("group", range(GROUPS))
@pytest.mark.filterwarnings("ignore:.*includes a `lambda`")
def test_copies_have_the_configurations_and_the_weights_of_the_originals(group, each_keras):
    names = sorted([*stock_layers.names(), *stock_layers.nested()])[group::GROUPS]
    pairs = [stock_layers.made(name) for name in names]
    outputs = [layer(inputs) for layer, inputs in pairs]
    model = Model([inputs for _, inputs in pairs], outputs)
    new = copied(model)
    assert configurations(new) == configurations(model)
    for old, now in zip(model.get_weights(), new.get_weights(), strict=True):
        np.testing.assert_array_equal(old, now)


def test_what_is_said_to_stand_in_no_model_is_there():
    known = {*dir(tf_keras.layers), *dir(keras_3.layers)}
    assert set(stock_layers.NO_LAYER) <= known


def test_a_configuration_that_differs_is_noticed(each_keras):
    layer, inputs = stock_layers.made("TimeDistributed Bidirectional")
    model = Model(inputs, layer(inputs))
    new = copied(model)
    new.layers[-1].layer.forward_layer.cell.activation = each_keras.activations.linear
    if each_keras is tf_keras:
        new.layers[-1].layer.layer.cell.activation = each_keras.activations.linear
    assert configurations(new) != configurations(model)


def test_an_option_is_tried_wherever_it_is_taken(each_keras):
    assert stock_layers._options(K.Dense, 1).keys() >= {
        "activation", "kernel_initializer", "kernel_regularizer", "kernel_constraint",
        "bias_initializer", "bias_regularizer", "bias_constraint", "activity_regularizer",
    }  # fmt: skip


# ------------------------------------------------------------------------------- round trips


def fed():
    """A Bidirectional that takes in a BatchNormalization."""
    x = K.Input((4, 3), name="sequence")
    y = K.BatchNormalization(name="before")(K.Activation("tanh")(x))
    lstm = K.LSTM(3, activation="softsign", use_bias=False, return_sequences=True)
    return Model(x, K.Bidirectional(lstm, name="fed")(y))


def sequences():
    """Other layers that keep configurations of layers, behind one that changes."""
    inner = kerases.package().Sequential(
        [K.Input((4, 6)), K.Conv1D(3, 1), K.BatchNormalization(name="in"), K.ELU()], name="inner"
    )
    first = fed()
    gru = K.GRU(2, recurrent_activation="elu", kernel_constraint="non_neg")
    y = K.Reshape((2, 2, 3))(inner(first.outputs[0]))
    y = K.TimeDistributed(K.Bidirectional(gru, merge_mode="sum"), name="spread")(y)
    cells = [K.SimpleRNNCell(3, activation="gelu"), K.SimpleRNNCell(2, activation="relu")]
    y = K.RNN(K.StackedRNNCells(cells))(K.BatchNormalization(name="inside")(K.ReLU()(y)))
    return Model(first.inputs, K.Dense(2, activation="exponential")(y))


@pytest.fixture(scope="module")
def cases():
    """Of a Keras and a function that makes a model: inputs, what it gives, and it rewritten."""
    found = {}

    def case(package, build, mode):
        kerases.use(package)
        if (package, build, mode) not in found:
            rng = np.random.default_rng(2)
            model = build()
            randomise(model, rng)
            data = rng.standard_normal((3, 4, 3)).astype("float32")
            found[package, build, mode] = data, np.asarray(model(data)), mbn.convert(model, mode)
        return found[package, build, mode]

    yield case
    kerases.use("tf_keras")


def assert_gives(model, data, expected):
    assert np.abs(expected).max() > 1e-3
    tolerance = 2e-4 * np.abs(expected).max()
    np.testing.assert_allclose(np.asarray(model(data)), expected, atol=tolerance)


WAYS = [
    *(("tf_keras", sequences, how) for how in ("clone", "keras", "h5")),
    ("tf_keras", fed, "tf"),
    *(("keras", sequences, how) for how in ("clone", "keras", "h5")),
    ("keras", fed, "export"),
]


@pytest.mark.parametrize(("package", "build", "how"), WAYS)
@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file")
def test_a_rewritten_model_comes_back_as_it_was(package, build, how, cases, tmp_path):
    data, expected, new = cases(package, build, "fold")
    assert_gives(new, data, expected)
    assert_gives(through(how, new, tmp_path), data, expected)


@pytest.mark.parametrize("mode", ["depthwise", "strided"])
@pytest.mark.parametrize("package", ["tf_keras", "keras"])
def test_clones_are_right_in_every_mode(package, mode, cases, tmp_path):
    data, expected, new = cases(package, fed, mode)
    assert_gives(new, data, expected)
    assert_gives(through("clone", new, tmp_path), data, expected)


def holders():
    """Layers of ours in a wrapper and in a model in a model."""
    inner = kerases.package().Sequential(
        [K.Input((4, 3)), K.Dense(3, activation="tanh"), K.BatchNormalization(name="in")]
    )
    x = K.Input((4, 3))
    return Model(x, inner(K.TimeDistributed(K.BatchNormalization(name="held"))(x)))


@pytest.mark.parametrize("how", ["clone", "keras", "h5"])
@pytest.mark.parametrize("mode", ["depthwise", "strided"])
@pytest.mark.parametrize("package", ["tf_keras", "keras"])
@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file")
def test_what_takes_a_place_within_comes_back(package, mode, how, cases, tmp_path):
    data, expected, new = cases(package, holders, mode)
    assert_gives(through(how, new, tmp_path), data, expected)


@pytest.mark.parametrize("given", [True, False])
def test_a_sequential_model_in_another_behind_a_layer(given, each_keras, rng):
    inner = each_keras.Sequential([K.Input((3,)), K.BatchNormalization(), K.Dense(2)])
    model = each_keras.Sequential([*([K.Input((3,))] if given else []), K.Dense(3), inner])
    data = rng.standard_normal((2, 3)).astype("float32")
    model(data)
    randomise(model, rng)
    assert_gives(mbn.convert(model, "fold"), data, np.asarray(model(data)))


@pytest.mark.parametrize("package", ["tf_keras", "keras"])
def test_what_a_fold_changes_is_in_every_configuration(package, cases):
    _, _, new = cases(package, sequences, "fold")
    config = new.get_layer("fed").get_config()
    held = [config[key]["config"] for key in ("layer", "backward_layer") if key in config]
    assert all(each["use_bias"] for each in held)
    assert all(each["activation"] == "softsign" for each in held)


def test_a_backward_layer_of_its_own(each_keras, rng, tmp_path):
    x = K.Input((4, 3))
    with each_keras.utils.custom_object_scope(KNOWN):
        layer = K.Bidirectional(
            K.SimpleRNN(3, use_bias=False, kernel_regularizer=odd_penalty),
            backward_layer=K.SimpleRNN(
                3, activation=bent, use_bias=False, go_backwards=True, kernel_constraint=odd_bound
            ),
        )
    model = Model(x, layer(K.BatchNormalization()(K.ReLU()(x))))
    randomise(model, rng)
    new, plan = mbn.convert_with_plan(model, "fold")
    assert plan.left == 0
    data = rng.standard_normal((2, 4, 3)).astype("float32")
    expected = np.asarray(model(data))
    assert_gives(new, data, expected)
    assert_gives(through("keras", new, tmp_path), data, expected)
    config = new.layers[-1].get_config()["backward_layer"]["config"]
    assert config["kernel_constraint"] is None  # it was meant for the kernel as it was
    assert config["go_backwards"]


# ------------------------------------------------------------------- functions by their names


def test_functions_of_one_name_are_told_apart(each_keras, rng):
    def twice(factor):
        def bent(x):
            return x * factor

        return bent

    x = K.Input((4, 3))
    cells = K.StackedRNNCells(
        [K.SimpleRNNCell(3, activation=twice(0.5)), K.SimpleRNNCell(2, activation=twice(2.0))]
    )
    y = K.RNN(cells)(K.BatchNormalization()(x))
    model = Model(x, K.Lambda(twice(3.0))(K.Dense(2, activation=twice(5.0))(y)))
    randomise(model, rng)
    data = rng.standard_normal((2, 4, 3)).astype("float32")
    assert_gives(mbn.convert(model, "fold"), data, np.asarray(model(data)))


def test_a_function_that_changes_the_shape_in_a_model_that_is_held(each_keras, rng):
    def halves(x):
        return x[..., ::2] * x[..., 1::2]

    inner = each_keras.Sequential([K.Input((4,)), K.Dense(6), K.Lambda(halves), K.Dense(2)])
    x = K.Input((5, 4))
    model = Model(x, K.TimeDistributed(inner)(K.BatchNormalization()(x)))
    randomise(model, rng)
    data = rng.standard_normal((2, 5, 4)).astype("float32")
    assert_gives(mbn.convert(model, "fold"), data, np.asarray(model(data)))

"""Normalisations, recurrent cells and wrappers, proved as test_exact_motion.py does."""

import numpy as np
import pytest

import mbn_rewrite as mbn
from tests.keras.test_exact_motion import SIGNS, chain, model_of, sign
from tests.support.kerases import K, Model, package, set_policy
from tests.support.whole_numbers import (
    assert_close,
    assert_equal_bits,
    assert_exact,
    inputs_for,
    norm,
    randomise,
)

pytestmark = [pytest.mark.slow, pytest.mark.alternating]

SEQUENCE, FRAMES, IMAGE = (8, 4), (3, 8, 8, 2), (8, 8, 4)


@pytest.fixture(autouse=True)
def _float64(_fresh_keras, each_keras):
    set_policy("float64")


@pytest.fixture
def rng():
    return np.random.default_rng(7)


# -------------------------------------------------------------- normalisations of examples

NORMALIZED = {
    "layer": lambda: K.LayerNormalization(),
    "layer_other_axis": lambda: K.LayerNormalization(axis=1),
    "group": lambda: K.GroupNormalization(2),
    "group_of_all": lambda: K.GroupNormalization(1),
    "groups_of_one": lambda: K.GroupNormalization(4),
}


@pytest.mark.parametrize("policy", ["float64", "float32"])  # in which tf_keras fuses them
@pytest.mark.parametrize("name", NORMALIZED)
def test_gamma_and_beta_absorb_what_follows(name, policy, rng):
    set_policy(policy)
    axis = 1 if name == "layer_other_axis" else -1
    x = K.Input(IMAGE, dtype=policy)
    model = Model(x, chain(NORMALIZED[name](), norm(axis=axis), K.ReLU())(x))
    tolerance = 1e-12 if policy == "float64" else 1e-5
    assert assert_close(model, rng, tolerance).left == 0


KEPT = {
    "before": (lambda: chain(K.ReLU(), norm(), K.LayerNormalization()), "input channels on axis 3"),
    "no_scale": (
        lambda: chain(K.LayerNormalization(scale=False), norm(), K.ReLU()),
        "without a gamma and a beta",
    ),
    "axes": (
        lambda: chain(K.LayerNormalization(axis=(2, 3)), norm(), K.ReLU()),
        "over several axes",
    ),
    "unit": (lambda: chain(K.UnitNormalization(), norm(), K.ReLU()), "no operation"),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_is_before_a_normalisation_is_kept(name, rng):
    wire, why = KEPT[name]
    model = model_of(IMAGE, wire())
    randomise(model, rng)
    (decision,) = mbn.plan(model, "fold").decisions
    assert decision.action == "kept"
    assert why in decision.reason


# --------------------------------------------------------------------------- recurrent


def whole(kind, units, **kwargs):
    """A cell whose activations give whole numbers."""
    gates = {} if kind == "SimpleRNNCell" else {"recurrent_activation": sign}
    return getattr(K, kind)(units, activation=sign, **gates, **kwargs)


CELLS = {
    "one": lambda: whole("LSTMCell", 3),
    "gru": lambda: whole("GRUCell", 3),
    "several": lambda: [whole("LSTMCell", 3), whole("GRUCell", 2)],
    "several_gru_first": lambda: [whole("GRUCell", 3), whole("SimpleRNNCell", 2)],
}


@pytest.mark.parametrize("name", CELLS)
def test_the_first_cell_absorbs_what_precedes(name, rng):
    model = model_of(SEQUENCE, chain(norm(), K.RNN(CELLS[name]())))
    assert assert_exact(model, rng).left == 0


def test_a_cell_without_bias_keeps_it(rng):
    model = model_of(SEQUENCE, chain(norm(), K.RNN(whole("LSTMCell", 3, use_bias=False))))
    plan = assert_exact(model, rng)
    assert "without a bias" in plan.decisions[0].reason


@pytest.mark.parametrize("use_bias", [True, False])
def test_a_recurrent_convolution_absorbs_what_precedes(use_bias, rng):
    layer = K.ConvLSTM2D(3, 3, use_bias=use_bias, **SIGNS)
    model = model_of(FRAMES, chain(norm(), layer))
    assert assert_exact(model, rng, left_when_saved=int(not use_bias)).left == 0


@pytest.mark.parametrize("shift", [True, False])
def test_a_padded_recurrent_convolution_takes_a_scale(shift, rng):
    layer = K.ConvLSTM2D(3, 3, padding="same", **SIGNS)
    plan = assert_exact(model_of(FRAMES, chain(norm(), layer)), rng, shift=shift)
    assert plan.left == int(shift)
    if shift:
        assert "pads its input with zeros, which a shift cannot pass" in plan.decisions[0].reason


def sequel(x):
    """A sequence that is read backwards, beside one that begins with a state."""
    y, state = K.GRU(3, return_sequences=True, return_state=True)(norm()(x))
    return K.Add()([K.GRU(3, go_backwards=True)(norm()(x)), K.GRU(3)(y, initial_state=state)])


def twice(x):
    layer, before = K.LSTM(3), norm()
    return K.Add()([layer(before(x)), layer(before(K.ReLU()(x)))])


# With Keras's activations, for which tf_keras calls a function that it exchanges by device.
STOCK = {
    "lstm": lambda: chain(norm(), K.LSTM(3, return_sequences=True), K.LSTM(2)),
    "gru": lambda: chain(norm(), K.GRU(3)),
    "gru_reset_before": lambda: chain(norm(), K.GRU(3, reset_after=False)),
    "bidirectional": lambda: chain(norm(), K.Bidirectional(K.LSTM(3, return_sequences=True))),
    "masked": lambda: chain(K.Masking(), norm(), K.LSTM(3)),
    "unrolled": lambda: chain(norm(), K.LSTM(3, unroll=True)),
    "sequel": lambda: sequel,
    "twice": lambda: twice,
}


@pytest.mark.parametrize("name", STOCK)
def test_a_stock_layer_absorbs_what_precedes(name, rng):
    assert assert_close(model_of(SEQUENCE, STOCK[name]()), rng).left == 0


def test_a_sequence_that_is_also_used_otherwise_takes_the_identity_alone(rng):
    model = model_of(SEQUENCE, lambda x: (lambda y: [K.LSTM(3)(y), K.ReLU()(y)])(norm()(x)))
    (decision,) = assert_close(model, rng).decisions
    assert decision.action == "kept"


# --------------------------------------------------------------------- at every time step


def each(layer):
    return K.TimeDistributed(layer)


AFTER = {
    "conv": lambda: chain(each(K.Conv2D(4, 3)), norm()),
    "conv_no_bias": lambda: chain(each(K.Conv2D(4, 3, use_bias=False)), norm()),
    "depthwise": lambda: chain(each(K.DepthwiseConv2D(3, padding="same")), norm()),
    "transpose": lambda: chain(each(K.Conv2DTranspose(4, 3, 2)), norm()),
    "pooled": lambda: chain(each(K.Conv2D(4, 3)), each(K.GlobalAveragePooling2D()), norm()),
    "cropped": lambda: chain(each(K.Conv2D(4, 3)), each(K.Cropping2D(1)), norm()),
    "dense": lambda: chain(each(K.Flatten()), each(K.Dense(4)), norm()),
    "permuted": lambda: chain(each(K.Conv2D(4, 3)), each(K.Permute((2, 1, 3))), norm()),
    "nested": lambda: chain(K.Reshape((3, 2, 32, 2)), each(each(K.Conv1D(4, 3))), norm()),
}


@pytest.mark.parametrize("name", AFTER)
def test_what_is_done_at_every_step_absorbs_what_follows(name, rng):
    model = model_of((3, 8, 8, 2), chain(AFTER[name](), K.ReLU()))
    assert assert_exact(model, rng).left == 0


BEFORE = {
    "conv": lambda: each(K.Conv2D(4, 3)),
    "conv_no_bias": lambda: each(K.Conv2D(4, 3, use_bias=False)),
    "flatten": lambda: chain(each(K.Flatten()), each(K.Dense(4))),
    "pooled": lambda: chain(each(K.AveragePooling2D(2)), each(K.Conv2D(4, 3))),
    "recurrent": lambda: chain(each(K.Reshape((64, 2))), each(K.LSTM(3, **SIGNS))),
}


@pytest.mark.parametrize("name", BEFORE)
def test_what_is_done_at_every_step_absorbs_what_precedes(name, rng):
    model = model_of(FRAMES, chain(K.ReLU(), norm(), BEFORE[name]()))
    assert assert_exact(model, rng).left == 0


def test_padding_at_every_step_takes_no_shift(rng):
    def model():
        return model_of(FRAMES, chain(K.ReLU(), norm(), each(K.Conv2D(4, 3, padding="same"))))

    assert assert_exact(model(), rng, shift=False).left == 0
    assert "pads its input with zeros" in assert_exact(model(), rng).decisions[0].reason


@pytest.mark.parametrize("gamma", ["positive", "mixed"])
def test_a_relu_at_every_step_takes_positive_scales(gamma, rng):
    wire = chain(norm(), each(K.ReLU()), each(K.Conv2D(4, 3)), K.Activation("tanh"))
    model = model_of(FRAMES, chain(K.Activation("relu"), wire))
    assert assert_exact(model, rng, gamma=gamma, shift=False).left == int(gamma == "mixed")


def network():
    """A model with a BatchNormalization of its own, and one that follows."""
    x = K.Input((8, 8, 2), dtype="float64")
    return Model(x, norm()(K.ReLU()(norm()(K.Conv2D(4, 3)(x)))))


def shared(x):
    again = each(norm())
    return K.Add()([K.ReLU()(again(each(K.Conv2D(4, 3))(x))) for _ in range(2)])


DISTRIBUTED = {
    "after": lambda: chain(each(K.Conv2D(4, 3)), each(norm()), K.ReLU()),
    "before": lambda: chain(K.ReLU(), each(norm()), each(K.Conv2D(3, 3))),
    "between": lambda: chain(each(K.Conv2D(4, 3)), each(norm()), norm(), K.ReLU()),
    "output": lambda: chain(each(K.Conv2D(4, 3)), each(norm())),
    "shared": lambda: shared,
    "model": lambda: chain(each(network()), K.LeakyReLU(0.5), norm(), each(K.Conv2D(3, 3))),
}


@pytest.mark.parametrize("name", DISTRIBUTED)
def test_a_batch_norm_at_every_step_goes(name, rng):
    model = model_of(FRAMES, DISTRIBUTED[name]())
    assert assert_exact(model, rng, gamma="powers", shift=name != "model").left == 0


def test_a_batch_norm_at_every_step_that_stays_says_why(rng):
    model = model_of(FRAMES, chain(K.ReLU(), each(norm()), K.Activation("relu")))
    (decision,) = assert_exact(model, rng).decisions
    assert decision.action == "kept"
    assert "is an activation" in decision.reason or "is an input" in decision.reason


def test_what_stays_of_a_batch_norm_at_every_step_can_be_saved(rng, tmp_path):
    model = model_of(FRAMES, DISTRIBUTED["after"]())
    randomise(model, rng)
    new = mbn.convert(model, "fold", check=False)
    new.save(tmp_path / "new.keras")
    loaded = package().models.load_model(tmp_path / "new.keras")
    assert_equal_bits(model, loaded, inputs_for(model, rng))


# ------------------------------------------------------------------------------ attention


def attended(before, after, **kwargs):
    """A model of an attention layer, with BatchNormalizations on its sides."""
    x = K.Input((6, 4), dtype="float64")
    y = norm()(x) if before else K.ReLU()(x)
    z = K.MultiHeadAttention(2, 3, **kwargs)(y, y)
    return Model(x, K.ReLU()(norm()(z)) if after else z)


@pytest.mark.parametrize(("before", "after"), [(True, False), (False, True), (True, True)])
def test_attention_absorbs_what_is_on_its_sides(before, after, rng):
    assert assert_close(attended(before, after), rng).left == 0


def test_attention_without_biases_keeps_it(rng):
    plan = assert_close(attended(False, True, use_bias=False), rng)
    assert "products without a bias" in plan.decisions[0].reason


def test_attention_to_another_value_takes_the_identity_alone(rng):
    x = K.Input((6, 4), dtype="float64")
    model = Model(x, K.MultiHeadAttention(2, 3)(norm()(x), K.ReLU()(x)))
    (decision,) = assert_close(model, rng).decisions
    assert "attends to several values" in decision.reason


def test_attention_that_is_called_twice_absorbs_what_follows_both(rng):
    x = K.Input((6, 4), dtype="float64")
    attention, after = K.MultiHeadAttention(2, 3), norm()
    model = Model(x, [K.ReLU()(after(attention(y, y))) for y in (x, K.ReLU()(x))])
    assert assert_close(model, rng).left == 0

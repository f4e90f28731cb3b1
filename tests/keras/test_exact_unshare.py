"""Calls of shared layers with weights of their own, proved as test_exact_motion.py does."""

import numpy as np
import pytest

import mbn_rewrite as mbn
from tests.keras.test_exact_motion import LINEAR, SEQUENCE, sign
from tests.support.checks import check_saved_rewrites
from tests.support.kerases import K, Model, package, set_policy
from tests.support.round_trips import through
from tests.support.whole_numbers import (
    assert_equal_bits,
    assert_exact,
    inputs_for,
    norm,
    randomise,
)

pytestmark = [pytest.mark.slow, pytest.mark.alternating]

LEVELS = ((8, 8, 4), (4, 4, 4), (2, 2, 4))


@pytest.fixture(autouse=True)
def _float64(_fresh_keras, each_keras):
    set_policy("float64")


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def end(x):
    """What no scale and no shift passes."""
    return K.ReLU(max_value=6.0)(x)


def levels(layer, shapes=LEVELS, norms=None):
    """A model that calls a layer on several levels, each with a BatchNormalization of its own."""
    inputs = [K.Input(shape, dtype="float64") for shape in shapes]
    norms = norms or [norm(name=f"norm_{i}") for i in range(len(shapes))]
    ends = [end(bn(layer(x)) if bn else layer(x)) for x, bn in zip(inputs, norms, strict=True)]
    return Model(inputs, ends)


def head(depth=4):
    """The head of a detector: shared convolutions, and BatchNormalizations of each level."""
    inputs = [K.Input(shape, dtype="float64") for shape in LEVELS]
    convs = [K.SeparableConv2D(4, 3, padding="same", name=f"conv_{i}") for i in range(depth)]
    ends = []
    for level, x in enumerate(inputs):
        for number, conv in enumerate(convs):
            x = end(norm(name=f"norm_{number}_{level}")(conv(x)))
        ends.append(x)
    scores = K.Conv2D(2, 1, name="scores")
    return Model(inputs, [scores(x) for x in ends])


def grown(model, plan):
    """By how many weights a model has to grow by a plan, in which all BatchNormalizations go."""
    of_norms = sum(layer.count_params() for layer in model.layers if layer.name.startswith("norm"))
    return sum(unshared.weights for unshared in plan.unshared.values()) - of_norms


@pytest.mark.parametrize("use_bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("name", LINEAR)
def test_every_call_absorbs_what_follows(name, use_bias, rng):
    shape, layer = LINEAR[name]
    model = levels(layer(use_bias=use_bias), [shape, shape])
    plan = assert_exact(model, rng)
    assert plan.left == 0
    (unshared,) = plan.unshared.values()
    assert len(set(unshared.calls)) == 2


def test_every_call_of_an_embedding_absorbs_what_follows(rng):
    inputs, table = [K.Input((8,), dtype="int32") for _ in range(2)], K.Embedding(9, 4)
    model = Model(inputs, [end(norm()(table(tokens))) for tokens in inputs])
    randomise(model, rng)
    new, plan = mbn.convert_with_plan(model, "fold", check=False)
    assert plan.left == 0
    assert_equal_bits(model, new, [rng.integers(0, 9, (2, 8)) for _ in range(2)])


def test_every_call_of_a_recurrent_layer_absorbs_what_is_before_it(rng):
    layer = K.SimpleRNN(3, activation=sign)
    inputs = [K.Input(SEQUENCE, dtype="float64") for _ in range(2)]
    model = Model(inputs, [layer(norm()(x)) for x in inputs])
    plan = assert_exact(model, rng, left_when_saved=2)  # where a loop reads its weights
    assert plan.left == 0
    assert plan.unshared


def test_a_head_has_no_batch_norm_left(rng):
    model = head()
    plan = assert_exact(model, rng)
    assert plan.left == 0
    assert sorted(plan.unshared) == [f"conv_{i}" for i in range(4)]
    # Named in the order of the calls.
    into = {decision.name: decision.into for decision in plan.decisions}
    assert [into[f"norm_0_{i}"] for i in range(3)] == [("conv_0",), ("conv_0_1",), ("conv_0_2",)]
    new = mbn.convert(model, "fold", check=False)
    made = {layer.name for layer in new.layers if layer.name.startswith("conv")}
    assert made == {f"conv_{i}{call}" for i in range(4) for call in ("", "_1", "_2")}
    assert new.count_params() - model.count_params() == grown(model, plan)


@pytest.mark.parametrize("how", ["keras", "h5", "clone"])
def test_a_head_comes_back_as_it_was(how, rng, tmp_path):
    model = head(depth=2)
    randomise(model, rng)
    new = mbn.convert(model, "fold", check=False)
    assert_equal_bits(model, through(how, new, tmp_path), inputs_for(model, rng))


def test_a_head_is_exported_as_it_was(each_keras, rng, tmp_path):
    model = head(depth=2)
    randomise(model, rng)
    new, data = mbn.convert(model, "fold", check=False), inputs_for(model, rng)
    if each_keras.__name__ == "tf_keras":
        results = through("tf", new, tmp_path)(data, training=False)
    else:
        results = through("export", new, tmp_path)(data)
    for a, b in zip(model(data, training=False), results, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_saved_head_has_no_batch_norm_left(rng, tmp_path):
    model = head(depth=2)
    randomise(model, rng, gamma="powers")
    plans = check_saved_rewrites(model, inputs_for(model, rng), tmp_path, ("fold",))
    assert plans["fold"].left == mbn.plan(model, "fold").left == 0
    assert len(plans["fold"].unshared) == 2  # the pointwise products


# ------------------------------------------------------------------------- which calls, which


def test_calls_without_a_batch_norm_keep_the_layer(rng):
    model = levels(K.Conv2D(4, 3, padding="same", name="conv"), norms=[norm(), None, norm()])
    plan = assert_exact(model, rng)
    assert plan.left == 0
    assert sorted(plan.unshared["conv"].calls) == ["conv", "conv_1", "conv_2"]
    new = mbn.convert(model, "fold", check=False)
    for a, b in zip(
        model.get_layer("conv").get_weights(), new.get_layer("conv").get_weights(), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_calls_with_one_batch_norm_share_their_weights(rng):
    shared = norm()
    model = levels(K.Conv2D(4, 3, padding="same", name="conv"), norms=[shared, norm(), shared])
    plan = assert_exact(model, rng)
    assert plan.left == 0
    assert len(set(plan.unshared["conv"].calls)) == 2


def test_a_layer_called_on_what_it_gives(rng):
    conv, x = K.Conv2D(4, 3, padding="same", name="conv"), K.Input(LEVELS[0], dtype="float64")
    model = Model(x, end(norm()(conv(end(norm()(conv(x)))))))
    assert assert_exact(model, rng).left == 0


def test_what_is_kept_in_training_keeps_the_layer_shared(rng):
    inputs = [K.Input(LEVELS[0], dtype="float64") for _ in range(2)]
    conv = K.Conv2D(4, 3, name="conv")
    model = Model(inputs, [end(norm()(conv(x), training=True)) for x in inputs])
    randomise(model, rng)
    assert not mbn.plan(model, "fold").unshared


@pytest.mark.parametrize("mode", ["depthwise", "strided", "mbn"])
def test_other_modes_keep_the_layer_shared(mode, rng):
    model = head(depth=1)
    randomise(model, rng)
    new, plan = mbn.convert_with_plan(model, mode, check=False)
    assert not plan.unshared
    assert len([layer for layer in new.layers if layer.name.startswith("conv")]) == 1


def test_it_can_be_forbidden(rng):
    model = head(depth=1)
    randomise(model, rng, gamma="powers")
    new, plan = mbn.convert_with_plan(model, "fold", check=False, keep_shared=True)
    assert plan.left == 2
    assert "it is to stay shared, as it was asked for" in plan.decisions[-1].reason
    assert_equal_bits(model, new, inputs_for(model, rng))


# -------------------------------------------------------------------- models within the model


def test_a_layer_shared_by_two_models_within_the_model(rng):
    conv = K.Conv2D(4, 3, padding="same", name="conv")
    inputs, ends = [K.Input(shape, dtype="float64") for shape in LEVELS[:2]], []
    for i, x in enumerate(inputs):
        inner = K.Input(LEVELS[i], dtype="float64")
        # In the other model its name is taken.
        y = K.Conv2D(4, 1, name="conv_1")(conv(inner)) if i == 0 else conv(inner)
        ends.append(end(norm()(Model(inner, y, name=f"part_{i}")(x))))
    plan = assert_exact(Model(inputs, ends), rng)
    assert plan.left == 0
    assert sorted(plan.unshared) == ["part_1/conv"]  # which is read first


@pytest.mark.parametrize("sequential", [False, True])
def test_a_model_called_on_several_levels_stays_one(sequential, rng):
    """It cannot have weights for each call without being several models."""
    x, conv = K.Input((None, None, 4), dtype="float64"), K.Conv2D(4, 3, padding="same")
    tower = package().Sequential([x, conv], name="tower") if sequential else None
    model = levels(tower or Model(x, conv(x), name="tower"))
    plan = assert_exact(model, rng, gamma="powers")
    assert plan.left == 2
    assert "'tower', which is called several times" in plan.decisions[-1].reason
    assert not plan.unshared


def test_a_model_with_its_batch_norm_called_on_several_levels_folds_as_one(rng):
    x = K.Input((None, None, 4), dtype="float64")
    tower = Model(x, end(norm()(K.Conv2D(4, 3, padding="same")(x))))
    inputs = [K.Input(shape, dtype="float64") for shape in LEVELS]
    plan = assert_exact(Model(inputs, [tower(x) for x in inputs]), rng)
    assert plan.left == 0
    assert not plan.unshared


def test_a_layer_shared_within_a_model_that_is_called_once(rng):
    inner = levels(K.Conv2D(4, 3, padding="same", name="conv"))
    inputs = [K.Input(shape, dtype="float64") for shape in LEVELS]
    plan = assert_exact(Model(inputs, inner(inputs)), rng)
    assert plan.left == 0
    assert plan.unshared


# --------------------------------------------------------------------------- code that calls


def make_head(package):
    class Head(package.layers.Layer):
        """Shared convolutions with BatchNormalizations of each level, called in code."""

        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.conv = package.layers.Conv2D(4, 3, padding="same")
            self.norms = [package.layers.BatchNormalization(epsilon=0.0) for _ in LEVELS]

        def call(self, levels):
            return [
                bn(self.conv(x), training=False) for bn, x in zip(self.norms, levels, strict=True)
            ]

    return Head


def test_what_code_calls_stays_shared(each_keras, rng):
    inputs = [K.Input(shape, dtype="float64") for shape in LEVELS]
    layer = make_head(each_keras)(name="head")
    model = Model(inputs, [end(x) for x in layer(inputs)])
    randomise(model, rng, gamma="powers")
    new, plan = mbn.convert_with_plan(model, "fold", check=False)
    assert plan.left == 2
    assert "code of Head 'head' calls it" in plan.decisions[-1].reason
    assert_equal_bits(model, new, inputs_for(model, rng))


def test_what_an_attribute_holds_stays_shared(each_keras, rng):
    class Detector(each_keras.Model):
        """A Functional model that keeps one of its layers."""

    conv = K.Conv2D(4, 3, padding="same", name="conv")
    plain = levels(conv)
    model = Detector(plain.inputs, plain.outputs)
    model.head = conv
    plan = assert_exact(model, rng, gamma="powers")
    assert plan.left == 2
    assert "it is held in an attribute, too" in plan.decisions[-1].reason

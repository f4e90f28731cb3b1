"""Holders whose code does what it should not: they are left alone, and what is written is right."""

import random

import keras as keras_3
import numpy as np
import pytest
import tensorflow as tf
import tf_keras

import mbn_rewrite as mbn
from mbn_rewrite.errors import RewriteError
from mbn_rewrite.frontends.keras_common.cloning import parts
from tests.support.holders import assert_same, images, state_of
from tests.support.kerases import K
from tests.support.random_models import randomise

pytestmark = pytest.mark.slow


class Counter:
    """An object of the user's."""

    def __init__(self):
        self.count = 0
        self.notes = [[]]


def acts(self, x, norm):
    """Changes what it has, at every call."""
    self.counter.count += 1
    self.counter.notes[0].append(1)
    self.memory.append(1)
    self.inner.memory[0].append(1)
    self.inner.numbers += 1
    self.inner.named["last"] = len(self.memory)
    self.weight.assign_add(1.0)
    self.other.assign_add(1.0)
    return norm(self.conv(x))


def draws(self, x, norm):
    """Draws random numbers, of every kind; they make no difference."""
    drawn = random.random() + np.random.rand()
    zero = tf.random.uniform(()) * 0.0 if isinstance(self, tf_keras.layers.Layer) else 0.0
    if self.drawn:
        zero = zero + self.ops.cast(self.drawn() * 0.0, x.dtype)
    return norm(self.conv(x)) + zero + (drawn < -1)


def adds_losses(self, x, norm):
    y = norm(self.conv(x))
    self.add_loss(self.ops.sum(y) * 0.0)
    return self.regular(y)


def changes_its_layers(self, x, norm):
    """Puts other layers in the places of its own."""
    self.norm, self.spare = self.spare, self.norm
    y = self.conv(x)
    return self.norm(y) + self.spare(y)


def gives_a_dictionary(self, x, norm):
    return {"of": (norm(self.conv(x)), [x])}


def gives_none_too(self, x, norm):
    return norm(self.conv(x)), None


def loops_over_data(self, x, norm):
    y = norm(self.conv(x))
    total = 0.0
    for example in y:
        total = total + self.ops.sum(example)
    return y + total * 0.0


def asserts_values(self, x, norm):
    assert float(self.ops.sum(x)) < 1e9, "it is too large"
    return norm(self.conv(x))


def calls_itself(self, x, norm):
    if self.depth:
        self.depth -= 1
        y = self(self.conv(x))
        self.depth += 1
        return y
    return norm(x)


def has_no_end(self, x, norm):
    if type(x).__name__ == "KerasTensor":
        return calls_without_end(self, x)
    return norm(self.conv(x))


def calls_without_end(self, x):
    return calls_without_end(self, x)


def fails(self, x, norm):
    if type(x).__name__ == "KerasTensor":
        raise RuntimeError("only values,\n  please")
    return norm(self.conv(x))


# What code does -> a part of the reason for which its BatchNormalization stays, or None.
BAD = {
    acts: None,
    draws: None,
    adds_losses: None,
    changes_its_layers: "it changes its layers when it is called",
    gives_a_dictionary: None,
    gives_none_too: "its calls cannot be seen: it",
    loops_over_data: "its calls cannot be seen: it",
    asserts_values: "its calls cannot be seen: it",
    calls_itself: "",
    has_no_end: "its code fails on Keras tensors (maximum recursion depth exceeded",
    fails: "its code fails on Keras tensors (only values, please)",
}


UNKNOWN_CALLS = (loops_over_data, asserts_values)  # Keras 3 notes nothing of them


def bad_holder(keras, own, act):
    """A holder with much to be changed in it, and in a holder within."""

    class Inner(own.Holder):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.memory, self.named, self.numbers = [[]], {}, np.zeros(2)

    class Bad(own.Holder):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.inner, self.spare = Inner(name="inner"), K.BatchNormalization(name="spare")
            self.listed = [K.Conv2D(4, 1), K.Conv2D(4, 1)]
            self.regular = K.Conv2D(4, 1, activity_regularizer="l2")
            self.weight = self.add_weight(name="w", shape=(), initializer="zeros", trainable=False)
            self.other = tf.Variable(0.0, trainable=False)
            self.counter, self.memory, self.depth = Counter(), [], 1
            self.ops = tf_ops if keras is tf_keras else keras_3.ops
            self.drawn = None

        def build(self, shape):
            within = (
                self.spare,
                self.norm,
                self.regular,
                *self.listed,
                self.inner.conv,
                self.inner.norm,
            )
            for layer in within:
                layer.build((None, 8, 8, 4))
            super().build(shape)

        def call(self, x, training=None):
            return act(self, x, lambda y: self.norm(y, training=training))

    return Bad


class tf_ops:  # noqa: N801 - as keras.ops
    sum, cast = tf.reduce_sum, tf.cast


def everything(model):
    """All that a call, or a trace, could change, as it can be compared."""
    bad = next(part for part in parts(model) if type(part).__name__ == "Bad")
    return (
        state_of(model),
        len(model.losses),
        [metric.name for metric in model.metrics],
        [len(getattr(part, "_inbound_nodes", ())) for part in parts(model)],
        [len(getattr(part, "_outbound_nodes", ())) for part in parts(model)],
        (bad.counter.count, len(bad.counter.notes[0]), len(bad.memory)),
        (len(bad.inner.memory[0]), dict(bad.inner.named), bad.inner.numbers.tolist()),
        float(bad.other),
    )


@pytest.mark.parametrize("act", BAD, ids=lambda act: act.__name__)
def test_code_that_does_what_it_should_not(act, own, each_keras):
    class Model(each_keras.Model):
        """It is called on values, so that code may do what Keras tensors do not take."""

        def __init__(self):
            super().__init__()
            self.bad = bad_holder(each_keras, own, act)(name="bad")

        def call(self, x):
            y = self.bad(x)
            if isinstance(y, dict):
                y = y["of"][0]
            return y[0] if isinstance(y, tuple) else y

    model = Model()
    try:
        model(images())
    except Exception as error:
        pytest.skip(f"Keras does not take it: {error}")
    randomise(model, np.random.default_rng(3))
    tf.random.set_seed(4)
    before = everything(model), random.getstate(), np.random.get_state()[1].tolist()
    plan = mbn.plan(model, "fold")
    assert (everything(model), random.getstate(), np.random.get_state()[1].tolist()) == before
    drawn = float(tf.random.uniform(()))
    tf.random.set_seed(4)
    assert float(tf.random.uniform(())) == drawn
    (decision,) = (d for d in plan.decisions if d.name.endswith("bad/norm"))
    words = BAD[act]
    if words is None:
        assert decision.action == "folded", decision.reason
    elif words:
        assert words in decision.reason
        assert "\n" not in decision.reason
    before = everything(model)
    if act in UNKNOWN_CALLS and each_keras is keras_3:
        with pytest.raises(RewriteError, match="Define build"):
            mbn.convert(model, "fold")
        return
    new = mbn.convert(model, "fold", check=False)
    assert everything(model) == before
    assert_same(model, new)

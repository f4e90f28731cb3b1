"""Layers that code calls where Keras tensors would not do: they are read all the same."""

from concurrent.futures import ThreadPoolExecutor

import keras as keras_3
import numpy as np
import pytest

import mbn_rewrite as mbn
from tests.support.kerases import K, Model, package
from tests.support.whole_numbers import (
    assert_equal_bits,
    inputs_for,
    inputs_like,
    norm,
    outputs,
    randomise,
)

SIZE = 6


@pytest.fixture
def rng():
    return np.random.default_rng(3)


def branched(size=SIZE, strides=1, identity=True, name="block"):
    """A block of two branches that are Sequential models, and of a BatchNormalization.

    Args:
        size: the size of images for which one branch is built.
        strides: of both branches.
        identity: whether the third branch is there.
    """

    class Branched(K.Layer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            kernels = ((1, "narrow"), (3, "wide"))
            self.branches = [
                package().Sequential(
                    [
                        K.Conv2D(4, kernel, strides, "same", use_bias=False, name="conv"),
                        norm(name="norm"),
                    ],
                    name=name,
                )
                for kernel, name in kernels
            ]
            self.identity = norm(name="identity") if identity else None
            self.relu = K.ReLU(name="relu")

        def build(self, shape):
            for branch, own_size in zip(self.branches, (size, SIZE), strict=True):
                branch.build((None, own_size, own_size, shape[-1]))
            if self.identity is not None:
                self.identity.build(shape)
            super().build(shape)

        def call(self, x):
            narrow, wide = self.branches
            y = narrow(x) + wide(x)
            return self.relu(y if self.identity is None else y + self.identity(x))

    return Branched(name=name)


def model_of(*layers):
    x = y = K.Input((SIZE, SIZE, 4))
    for layer in (*layers, K.Conv2D(2, 3, padding="same", name="head")):
        y = layer(y)
    return Model(x, y)


def test_branches_are_read_where_they_are_called(each_keras, rng):
    model = model_of(branched(), branched(name="second"))
    randomise(model, rng, gamma="powers")
    plan = mbn.plan(model, "fold")
    assert (plan.left, len(plan.decisions)) == (0, 6)
    assert_equal_bits(model, mbn.convert(model, "fold", check=False), inputs_for(model, rng))


@pytest.mark.parametrize("strides", [1, 2])
@pytest.mark.parametrize("declared", [SIZE + 2, SIZE - 1, 1])
def test_a_branch_that_was_built_for_another_size(declared, strides, each_keras, rng):
    model = model_of(branched(), branched(declared, strides, strides == 1, name="second"))
    randomise(model, rng, gamma="powers")
    plan = mbn.plan(model, "fold")
    assert plan.left == 0
    assert {d.name for d in plan.decisions} >= {"second/narrow/norm", "second/wide/norm"}
    assert_equal_bits(model, mbn.convert(model, "fold", check=False), inputs_for(model, rng))


def test_a_branch_that_others_may_call(each_keras, rng):
    """What an attribute of a model gives is an output of the model."""
    block = branched()
    model = model_of(block)
    model.inner = block.branches[1]
    randomise(model, rng, gamma="powers")
    new = mbn.convert(model, "fold", check=False)
    data = inputs_for(model, rng)
    assert_equal_bits(model, new, data)
    given = inputs_like(model.inner, [np.asarray(data)])
    for a, b in zip(outputs(model.inner, given), outputs(new.inner, given), strict=True):
        np.testing.assert_array_equal(a, b)


def test_models_that_a_model_has_keep_their_outputs(each_keras, rng):
    class Coder(package().Model):
        def __init__(self):
            super().__init__()
            conv = K.Conv2D(4, 1, name="conv")
            self.encoder = package().Sequential([K.Input((SIZE, SIZE, 4)), conv])
            head = K.Conv2D(2, 3, name="head", padding="same")
            self.decoder = package().Sequential([K.Input((SIZE, SIZE, 4)), norm(), head])

        def call(self, x):
            return self.decoder(self.encoder(x))

    model = Coder()
    data = rng.integers(-3, 4, (2, SIZE, SIZE, 4)).astype(np.float32)
    model(data)
    randomise(model, rng, gamma="powers")
    new = mbn.convert(model, "fold", check=False)
    assert_equal_bits(model, new, data)
    assert_equal_bits(model.encoder, new.encoder, data)
    assert_equal_bits(model.decoder, new.decoder, data)


def test_a_batch_normalization_that_is_called_with_more(each_keras, rng):
    """What would stand in for it takes no such argument."""

    class WithFlag(K.BatchNormalization):
        def call(self, x, training=None, mask=None, flag=None):
            return super().call(x, training=training)

    class Flagging(K.Layer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.conv = K.Conv2D(4, 1, name="conv")
            self.norm = WithFlag(epsilon=0.0, name="norm")

        def build(self, shape):
            self.conv.build(shape)
            self.norm.build(shape)
            super().build(shape)

        def call(self, x):
            return self.norm(self.conv(x), flag="on")

    model = model_of(Flagging(name="flagging"))
    randomise(model, rng, gamma="powers")
    assert mbn.plan(model, "fold").left == 1
    assert_equal_bits(model, mbn.convert(model, "fold", check=False), inputs_for(model, rng))


class UnlikeItsCall(keras_3.layers.Layer):
    """Its `call` takes what its `compute_output_spec` does not take."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.conv = keras_3.layers.Conv2D(4, 3, padding="same", name="conv")
        self.norm = keras_3.layers.BatchNormalization(epsilon=0.0, name="norm")

    def call(self, x, training=None):
        return self.norm(self.conv(x), training=training)

    def compute_output_spec(self, x):
        return keras_3.KerasTensor(x.shape, dtype=x.dtype)


class Caller(keras_3.layers.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.inner = UnlikeItsCall(name="inner")
        self.norm = keras_3.layers.BatchNormalization(epsilon=0.0, name="norm")

    def call(self, x):
        return self.norm(keras_3.ops.relu(self.inner(x)))


def test_a_layer_that_cannot_say_what_it_gives(rng):
    x = keras_3.Input((SIZE, SIZE, 4))
    y = keras_3.layers.Conv2D(2, 1)(Caller(name="caller")(x))
    model = keras_3.Model(x, y)
    randomise(model, rng, gamma="powers")
    plan = mbn.plan(model, "fold")
    assert {d.name: d.action for d in plan.decisions} == {
        "caller/inner/norm": "folded",
        "caller/norm": "folded",
    }
    assert_equal_bits(model, mbn.convert(model, "fold", check=False), inputs_for(model, rng))


def test_models_that_are_read_at_once_and_meanwhile_run(each_keras, rng):
    model = model_of(branched(), branched(name="second"))
    randomise(model, rng, gamma="powers")
    data, expected = inputs_for(model, rng), mbn.plan(model, "fold")
    call = K.Layer.__call__
    with ThreadPoolExecutor(4) as threads:
        results = [threads.submit(outputs, model, data) for _ in range(4)]
        plans = [threads.submit(mbn.plan, model, "fold") for _ in range(4)]
        assert all(each.result().decisions == expected.decisions for each in plans)
        assert all(each.result() for each in results)
    assert K.Layer.__call__ is call


def test_layers_that_another_thread_makes_meanwhile_have_names_of_their_own(each_keras):
    with ThreadPoolExecutor(1) as thread:

        def made():
            return thread.submit(lambda: K.Dense(1).name).result()

        names = [made()]

        class Making(K.Layer):
            def __init__(self, **kwargs):
                super().__init__(**kwargs)
                self.norm = K.BatchNormalization()

            def build(self, shape):
                self.norm.build(shape)
                super().build(shape)

            def call(self, x):
                names.append(made())
                return self.norm(x)

        x = K.Input((SIZE,))
        model = Model(x, K.Dense(3)(Making()(K.Dense(4)(x))))
        mbn.plan(model, "fold")
        names.append(made())
    assert len(names) > 3  # so that the plan called it
    assert len(set(names)) == len(names)

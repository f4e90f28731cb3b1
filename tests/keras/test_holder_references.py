"""Holders whose code has layers from elsewhere than their attributes."""

import numpy as np
import pytest
import tensorflow as tf
import tf_keras

import mbn_rewrite as mbn
from tests.support.holders import (
    assert_same,
    blocked,
    folded,
    images,
    model_with,
    state_of,
)
from tests.support.kerases import K, Model
from tests.support.random_models import randomise

pytestmark = pytest.mark.slow


@pytest.fixture
def rng():
    return np.random.default_rng(11)


def test_layers_of_a_sequential_model_by_their_number(own, each_keras, rng):
    class Indexes(each_keras.layers.Layer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            steps = [K.Conv2D(4, 3), K.BatchNormalization(), K.Conv2D(4, 1), K.Conv2D(4, 3)]
            self.model = each_keras.Sequential([K.Input((8, 8, 3)), *steps])

        def call(self, x):
            return self.model.layers[2](self.model(x))

    new = folded(model_with(Indexes(), rng=rng))
    assert len(new.layers[1].model.layers) == 4


def test_layers_of_a_sequential_model_one_after_the_other(own, each_keras, rng):
    class Iterates(each_keras.layers.Layer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            steps = [K.Conv2D(4, 3), K.BatchNormalization(), K.ReLU(), K.Conv2D(4, 1)]
            self.model = each_keras.Sequential([K.Input((8, 8, 3)), *steps])

        def call(self, x, training=None):
            for layer in self.model.layers:
                is_norm = layer.name.startswith("batch")
                x = layer(x, training=training) if is_norm else layer(x)
            return x

    folded(model_with(Iterates(), rng=rng))


def test_a_layer_of_a_functional_model_by_its_number(own, each_keras, rng):
    class Indexes(each_keras.layers.Layer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            x = K.Input((8, 8, 3))
            y = K.BatchNormalization()(K.Conv2D(3, 3, padding="same")(x))
            self.model = Model(x, K.Conv2D(3, 1)(y))

        def call(self, x):
            return self.model(x) + self.model.layers[3](x)

    folded(model_with(Indexes(), rng=rng))


def test_a_model_that_runs_its_layers_in_order(own, each_keras, rng):
    class InOrder(each_keras.Model):
        def __init__(self):
            super().__init__()
            self.first, self.norm = K.Conv2D(4, 3), K.BatchNormalization()
            self.rest = [K.ReLU(), K.Conv2D(4, 1), K.BatchNormalization()]

        def call(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    model = InOrder()
    model(images())
    randomise(model, rng)
    folded(model)


class Function:
    """A layer that calls a function which it was given, and says its shape without that."""

    def __init__(self, function=None, **kwargs):
        super().__init__(**kwargs)
        self.function = function

    def call(self, x):
        return self.function(x)

    def compute_output_shape(self, shape):
        return (*shape[:-1], 4)


@pytest.mark.parametrize("is_lambda", [False, True], ids=["own class", "Lambda"])
@pytest.mark.parametrize("in_holder", [False, True], ids=["model", "holder"])
def test_functions_that_refer_to_layers(in_holder, is_lambda, own, each_keras, rng):
    class Own(Function, each_keras.layers.Layer):
        pass

    def of(function):
        return K.Lambda(function, output_shape=(8, 8, 4)) if is_lambda else Own(function)

    class Refers(own.Holder):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.function = of(lambda x: self.conv(x))

        def call(self, x, training=None):
            return self.norm(self.conv(x)) + self.function(x)

    if in_holder:
        model = model_with(Refers(), rng=rng)
    else:
        conv, x = K.Conv2D(4, 3, padding="same"), K.Input((8, 8, 3))
        y = K.BatchNormalization()(conv(x))
        model = Model(x, K.Add()([y, of(lambda x: conv(x))(x)]))
        randomise(model, rng)
    blocked(model, "cannot have another layer")


def test_a_function_that_reads_a_weight(own, each_keras, rng):
    class Own(Function, each_keras.layers.Layer):
        pass

    class Refers(own.Holder):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.function = Own(lambda x: x * self.norm.gamma)

        def call(self, x, training=None):
            return self.function(self.norm(self.conv(x)))

    blocked(model_with(Refers(), rng=rng), "reads its parameters or statistics")


class Box:
    """An object of the user's that has a layer."""


def test_a_holder_in_an_object(own, rng):
    class Boxed(own.Holder):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.box = Box()
            self.box.inner = own.Holder()

        def call(self, x, training=None):
            return self.box.inner(self.norm(self.conv(x)))

    model = model_with(Boxed(), rng=rng)
    new = mbn.convert(model, "fold")
    assert_same(model, new)
    assert new.layers[1].box.inner is not model.layers[1].box.inner


def test_a_layer_of_a_global_is_left_as_it_is(own, each_keras, rng):
    norm = K.BatchNormalization()

    class Outside(own.Holder):
        def call(self, x, training=None):
            return norm(self.norm(self.conv(x)))

    model = model_with(Outside(), rng=rng)
    before = state_of(norm), len(norm._inbound_nodes), len(norm._outbound_nodes)
    plan = mbn.plan(model, "fold")
    assert [d.action for d in plan.decisions] == ["folded", "kept"]
    assert (state_of(norm), len(norm._inbound_nodes), len(norm._outbound_nodes)) == before
    assert_same(model, mbn.convert(model, "fold"))


def test_private_attributes_of_any_name(own, each_keras, rng):
    class Private(each_keras.layers.Layer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self._layers_of_mine = [K.Conv2D(4, 3), K.BatchNormalization()]
            self._operations_last = K.Conv2D(2, 1)

        def call(self, x):
            conv, norm = self._layers_of_mine
            return self._operations_last(norm(conv(x)))

    folded(model_with(Private(), rng=rng))


def test_a_module_in_the_place_of_an_activation(rng):
    """tf_keras finds its layers; they are no attribute that a layer has of its own class."""

    class Normalized(tf.Module):
        def __init__(self):
            super().__init__()
            self.norm = tf_keras.layers.BatchNormalization(name="inner")
            self.norm.build((None, 5))

        def __call__(self, x):
            return self.norm(x)

    layers = tf_keras.layers
    x = tf_keras.Input((6,))
    y = layers.BatchNormalization()(layers.Dense(5, activation=Normalized())(x))
    model = tf_keras.Model(x, layers.Dense(3)(y))
    randomise(model, rng)
    actions = [decision.action for decision in mbn.plan(model, "fold").decisions]
    assert sorted(actions) == ["folded", "kept"]

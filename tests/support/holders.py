"""Layers that call others in Python code, models of them, and what is expected of these."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import keras as keras_3
import numpy as np
import tensorflow as tf
import tf_keras

import mbn_rewrite as mbn
from mbn_rewrite.frontends.keras_common.cloning import parts
from tests.support.kerases import K, Model, norms
from tests.support.random_models import randomise

PACKAGES = {"tf_keras": tf_keras, "keras": keras_3}


def images(rng=None, channels=3):
    rng = rng or np.random.default_rng(5)
    return rng.standard_normal((2, 8, 8, channels)).astype(np.float32)


def assert_same(model, new, data=None):
    data = images() if data is None else data
    expected, given = (np.asarray(each(data, training=False)) for each in (model, new))
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(given, expected, atol=1e-4 * np.abs(expected).max())


def folded(model, left=0):
    """A model converted in mode fold, once that is checked."""
    plan = mbn.plan(model, "fold")
    assert plan.left == left, [d for d in plan.decisions if d.action == "kept"]
    new = mbn.convert(model, "fold")
    assert_same(model, new)
    assert len(norms(new)) == left
    return new


@functools.cache
def holders(name):
    """Holders of layers, of one Keras."""
    layers = PACKAGES[name].layers
    relu = tf.nn.relu if name == "tf_keras" else keras_3.ops.relu

    class Holder(layers.Layer):
        """What a test is about is in its `call`; it has a convolution, and a BatchNormalization."""

        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.conv = layers.Conv2D(4, 3, padding="same", use_bias=False, name="conv")
            self.norm = layers.BatchNormalization(name="norm")

        def call(self, x, training=None):
            return relu(self.norm(self.conv(x), training=training))

    class Nested(layers.Layer):
        """Layers in lists, tuples and dictionaries, and holders within."""

        def __init__(self, depth=2, **kwargs):
            super().__init__(**kwargs)
            self.depth = depth
            self.listed = [Holder(name=f"block_{i}") for i in range(depth)]
            self.named = {"last": (layers.Conv2D(4, 1), layers.BatchNormalization())}
            self.model = PACKAGES[name].Sequential(
                [layers.Conv2D(4, 3), layers.BatchNormalization(), layers.ReLU()]
            )

        def call(self, x):
            for block in self.listed:
                x = block(x)
            conv, norm = self.named["last"]
            return self.model(norm(conv(x)) + x)

        def get_config(self):
            return {**super().get_config(), "depth": self.depth}

    class Built(Holder):
        """Its layers are made when it is built."""

        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.later = None

        def build(self, shape):
            self.later = layers.Conv2D(3, 1)
            super().build(shape)

        def call(self, x, training=None):
            return self.later(super().call(x, training=training))

    class Subclassed(PACKAGES[name].Model):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.body = Nested()
            self.pool = layers.GlobalAveragePooling2D()
            self.head = layers.Dense(3)

        def call(self, x, training=None):
            return self.head(self.pool(self.body(x)))

    return SimpleNamespace(
        Holder=Holder, Nested=Nested, Built=Built, Subclassed=Subclassed, relu=relu
    )


def model_with(*layers, rng, shape=(8, 8, 3)):
    """A model of layers, one after the other, with random weights."""
    x = y = K.Input(shape)
    for layer in layers:
        y = layer(y)
    model = Model(x, y)
    randomise(model, rng)
    return model


def blocked(model, words, left=1):
    """The reason of what stays in a model that is converted all the same."""
    plan = mbn.plan(model, "fold")
    reasons = [d.reason for d in plan.decisions if d.action == "kept"]
    assert len(reasons) == left
    assert all(words in reason for reason in reasons), reasons
    assert_same(model, mbn.convert(model, "fold"))
    return reasons


def state_of(model):
    """All that Keras and code keep in a model, as it can be compared."""

    def shown(value):
        if isinstance(value, (list, tuple)):
            return [shown(item) for item in value]
        if isinstance(value, dict):
            return {key: shown(item) for key, item in value.items()}
        return value if isinstance(value, (bool, int, float, str)) else id(value)

    kept = {
        f"{part.name}.{name}": shown(value)
        for part in parts(model)
        for name, value in vars(part).items()
    }
    return kept | {"weights": [w.tobytes() for w in model.get_weights()]}

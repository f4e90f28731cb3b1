"""Layers and models that call others in Python code: what they call is read, and edited there."""

import numpy as np
import pytest
import tensorflow as tf
import tf_keras

import mbn_rewrite as mbn
from mbn_rewrite.errors import RewriteError
from mbn_rewrite.frontends.keras_common.cloning import parts
from tests.support.holders import (
    assert_same,
    folded,
    images,
    model_with,
    state_of,
)
from tests.support.kerases import K, Model
from tests.support.random_holders import check_holders, pair
from tests.support.random_models import randomise
from tests.support.thorough import thorough_but_for

pytestmark = pytest.mark.slow


@pytest.fixture
def rng():
    return np.random.default_rng(11)


# -------------------------------------------------------------------------- reading and writing


def test_layers_wherever_they_are_kept(own, rng):
    model = model_with(own.Nested(3, name="body"), K.Flatten(), K.Dense(2), rng=rng)
    names = {d.name: d.into for d in mbn.plan(model, "fold").decisions}
    assert names["body/block_1/norm"] == ("body/block_1/conv",)
    assert len(names) == 5
    new = folded(model)
    assert type(model.layers[1].listed[1].norm) is K.BatchNormalization
    assert type(new.layers[1].listed[1].norm) is not K.BatchNormalization


def test_layers_that_are_made_when_their_holder_is_built(own, rng):
    folded(model_with(own.Built(), rng=rng))


def test_a_subclassed_model(own, rng):
    model = own.Subclassed()
    model(images())
    randomise(model, rng)
    new = folded(model)
    assert type(new) is own.Subclassed
    assert type(model.body.listed[0].norm) is K.BatchNormalization


@pytest.mark.parametrize("mode", ["depthwise", "strided", "mbn"])
def test_other_modes(mode, own, rng):
    model = model_with(own.Nested(), rng=rng)
    plan = mbn.plan(model, mode)
    assert plan.left == 0
    new = mbn.convert(model, mode)
    assert_same(model, new)
    # Keras's functions for training call the copy's layers with `training`.
    new.compile("sgd", "mse")
    assert np.isfinite(new.train_on_batch(images(), np.zeros((2, 6, 6, 4), np.float32)))


def test_what_stands_in_is_called_as_a_batch_normalization(own, each_keras, rng):
    class Masked(own.Holder):
        def call(self, x, training=None):
            return self.norm(self.conv(x), training=False, mask=None)

    folded(model_with(Masked(), rng=rng))


def test_a_holder_that_is_called_twice(own, rng):
    holder = own.Holder()
    model = model_with(K.Conv2D(4, 3), K.ReLU(), rng=rng, shape=(8, 8, 4))
    x = K.Input((8, 8, 3))
    y = holder(x)
    model = Model(x, K.Concatenate()([y, holder(K.Conv2D(3, 1)(y))]))
    randomise(model, rng)
    folded(model)


def test_a_layer_of_the_model_that_a_holder_calls_too(own, each_keras, rng):
    class Borrower(each_keras.layers.Layer):
        def __init__(self, layer=None, **kwargs):
            super().__init__(**kwargs)
            self.layer = layer

        def call(self, x):
            return self.layer(x)

    norm = K.BatchNormalization()
    model = model_with(K.Conv2D(4, 3), norm, K.ReLU(), K.Conv2D(4, 1), Borrower(norm), rng=rng)
    new = folded(model)
    assert not {id(v) for v in model.variables} & {id(v) for v in new.variables}


@pytest.mark.parametrize("told", [{"size": 5}, {"padded": False}], ids=["another", "fewer layers"])
def test_a_configuration_that_makes_something_else(told, own, each_keras, rng):
    """Such as one that gives an attribute as the constructor has changed it."""

    class Grown(each_keras.layers.Layer):
        def __init__(self, size=3, padded=True, **kwargs):
            super().__init__(**kwargs)
            self.pad = K.ZeroPadding2D(1) if padded else None
            self.conv, self.other = K.Conv2D(4, size), K.Conv2D(4, 3, padding="same")
            self.norm = K.BatchNormalization()

        def call(self, x):
            y = self.conv(x if self.pad is None else self.pad(x))
            return self.norm(y) + self.other(x)

        def get_config(self):
            return {**super().get_config(), **told}

    folded(model_with(Grown(), rng=rng))


def test_mixed_precision(own, each_keras, rng):
    each_keras.mixed_precision.set_global_policy("mixed_float16")
    model = model_with(own.Nested(), rng=rng)
    plan = mbn.plan(model, "fold")
    assert plan.left == 0
    new = mbn.convert(model, "fold", check=False)
    expected, given = (np.asarray(m(images())).astype(np.float32) for m in (model, new))
    np.testing.assert_allclose(given, expected, atol=2e-2 * np.abs(expected).max())


def test_converting_what_was_converted(own, rng):
    model = model_with(own.Nested(), rng=rng)
    once = mbn.convert(model, "fold")
    assert_same(model, mbn.convert(once, "fold"))


# ---------------------------------------------------------- decisions equal those in sight


@pytest.mark.parametrize("seed", thorough_but_for(range(12), range(5)))
def test_decisions_are_those_of_the_network_without_holders(seed, each_keras):
    check_holders(seed, each_keras)


@pytest.mark.parametrize("seed", [3, 5])
def test_decisions_are_those_of_a_saved_model_of_it(seed, each_keras, tmp_path):
    _, held = pair(seed, each_keras)
    held.export(tmp_path / "model")
    report = mbn.rewrite_saved_model(tmp_path / "model", tmp_path / "out", "fold")
    actions = [sorted(d.action for d in p.decisions) for p in (report.plan, mbn.plan(held, "fold"))]
    assert actions[0] == actions[1]


@pytest.mark.parametrize("in_code", [False, True], ids=["in sight", "in code"])
def test_what_is_applied_at_every_time_step(in_code, own, each_keras, rng):
    class Step(own.Holder):
        def build(self, shape):
            self.conv.build(shape)
            self.norm.build((*shape[:-1], 4))
            super().build(shape)

        def compute_output_shape(self, shape):
            return (*shape[:-1], 4)

    class Outer(each_keras.layers.Layer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.steps = K.TimeDistributed(Step())

        def call(self, x, training=None):
            return self.steps(x)

    holder = Outer() if in_code else K.TimeDistributed(Step())
    model = model_with(holder, rng=rng, shape=(3, 8, 8, 3))
    assert mbn.plan(model, "fold").left == 0
    assert_same(model, mbn.convert(model, "fold"), np.stack([images()] * 3, axis=1))


# -------------------------------------------------------------------------------------- files


def test_files_of_what_cannot_be_loaded_are_not_written(own, each_keras, rng, tmp_path):
    model = model_with(own.Nested(name="body"), rng=rng)
    plan = mbn.plan(model, "fold")
    assert any("code of Nested 'body' makes the layers that it calls" in n for n in plan.notes)
    new = mbn.convert(model, "fold")
    with pytest.raises(RewriteError, match=r"Save its weights \(save_weights\)"):
        new.save(tmp_path / "model.keras")
    # tf_keras itself forgets the tuple in the dictionary in its newer format.
    path = tmp_path / ("new.h5" if each_keras is tf_keras else "new.weights.h5")
    new.save_weights(path)
    again = mbn.convert(model, "fold")
    for variable in again.variables:
        variable.assign(variable * 0)
    again.load_weights(path)
    assert_same(model, again)
    new.export(tmp_path / "served")
    served = tf.saved_model.load(str(tmp_path / "served"))
    np.testing.assert_allclose(served.serve(images()), model(images()), rtol=1e-3, atol=1e-3)
    assert mbn.rewrite_saved_model(tmp_path / "served", tmp_path / "again", "fold").ok


def test_decisions_are_those_of_the_saved_model(own, rng, tmp_path):
    model = model_with(own.Nested(), own.Holder(), rng=rng)
    model.export(tmp_path / "model")
    report = mbn.rewrite_saved_model(tmp_path / "model", tmp_path / "out", "fold")
    plan = mbn.plan(model, "fold")
    assert (report.plan.left, len(report.plan.decisions)) == (plan.left, len(plan.decisions))


# ---------------------------------------------------------------- classes of one's own


def own_norm(kind):
    """A class derived from BatchNormalization, by what its `call` does."""

    class Own(K.BatchNormalization):
        def call(self, x, training=None):
            return CALLS[kind](self, super().call, x, training)

    return Own


CALLS = {
    "passes_on": lambda self, call, x, training: call(x, training=training),
    "a_tensor": lambda self, call, x, training: call(
        x, training=tf.logical_and(tf.constant(bool(training)), self.trainable)
    ),
    "frozen": lambda self, call, x, training: call(x, training=False),
    "doubles": lambda self, call, x, training: call(x, training=training) * 2,
    "reads_double": lambda self, call, x, training: call(x * 2, training=training),
    "twice": lambda self, call, x, training: call(call(x, training=training), training=training),
    "trains": lambda self, call, x, training: call(x, training=True),
    "asks": lambda self, call, x, training: (
        y * 2 if hasattr(y := call(x, training=training), "dtype") else y
    ),
    "does_nothing": lambda self, call, x, training: x,
}


@pytest.mark.parametrize("kind", ["passes_on", "a_tensor", "frozen"])
def test_a_class_that_passes_on_is_batch_normalization(kind, each_keras, rng):
    model = model_with(K.Conv2D(4, 3), own_norm(kind)(), K.ReLU(), rng=rng)
    folded(model)
    before = state_of(model)
    for mode in ("depthwise", "strided"):
        new = mbn.convert(model, mode)
        assert_same(model, new)
        assert not any(type(layer).__name__ == "Own" for layer in parts(new))
    assert state_of(model) == before


@pytest.mark.parametrize(
    "kind", [kind for kind in CALLS if kind not in ("passes_on", "a_tensor", "frozen")]
)
def test_a_class_that_computes_something_else_stays(kind, each_keras, rng):
    model = model_with(K.Conv2D(4, 3), own_norm(kind)(), K.ReLU(), rng=rng)
    (decision,) = mbn.plan(model, "fold").decisions
    assert decision.action == "kept"
    assert "is a class of its own" in decision.reason

"""What the code of layers that hold others may do besides calling them."""

import functools

import keras as keras_3
import numpy as np
import pytest
import tensorflow as tf
import tf_keras

import mbn_rewrite as mbn
from mbn_rewrite.frontends.keras_common.known_results import KnownResults
from tests.support.holders import (
    assert_same,
    blocked,
    folded,
    images,
    model_with,
    state_of,
)
from tests.support.kerases import K, Model, adapter_of, norms
from tests.support.random_models import randomise

pytestmark = pytest.mark.slow


@pytest.fixture
def rng():
    return np.random.default_rng(11)


def test_code_that_refuses_keras_tensors(own, rng):
    class Odd(own.Holder):
        def call(self, x, training=None):
            if type(x).__name__ == "KerasTensor":
                raise ValueError("only values\nare taken")
            return self.norm(x)

    (reason,) = blocked(
        model_with(K.Conv2D(4, 1), Odd(name="odd"), rng=rng), "calls cannot be seen"
    )
    assert reason == (
        "Odd 'odd' holds it, and its calls cannot be seen: its code fails on Keras tensors "
        "(only values are taken)."
    )


@pytest.mark.parametrize("each_keras", ["tf_keras"], indirect=True)
def test_code_that_decides_by_values(own, rng):
    class Odd(own.Holder):
        def call(self, x, training=None):
            if tf.reduce_sum(x) > 0:
                return self.norm(x)
            return self.norm(-x)

    blocked(model_with(K.Conv2D(4, 1), Odd(), rng=rng), "its code fails on Keras tensors (")


def test_code_that_gives_something_else_when_it_is_traced(own, rng):
    class Odd(own.Holder):
        def call(self, x, training=None):
            if type(x).__name__ == "KerasTensor":
                return np.ones((2, 8, 8, 4), np.float32)
            return self.norm(x)

    model = model_with(K.Conv2D(4, 1), Odd(), rng=rng)
    blocked(model, "it returns something that is no tensor")


def test_code_that_reads_a_parameter(own, each_keras, rng):
    class Reads(own.Holder):
        def call(self, x, training=None):
            return super().call(x, training=training) * self.norm.gamma

    (reason,) = blocked(model_with(Reads(name="reads"), rng=rng), "reads its parameters")
    assert "Code of Reads 'reads'" in reason


def test_code_that_reads_a_kernel(own, each_keras, rng):
    class Reads(own.Holder):
        def call(self, x, training=None):
            y = super().call(x, training=training)
            conv = tf.nn.conv2d if each_keras is tf_keras else keras_3.ops.conv
            padding = {"padding": "SAME" if each_keras is tf_keras else "same", "strides": 1}
            return y + conv(x, self.conv.kernel, **padding)

    blocked(
        model_with(Reads(name="reads"), rng=rng), "has weights that code of Reads 'reads' reads"
    )


def test_a_batch_normalization_that_is_not_called(own, rng):
    class Idle(own.Holder):
        def build(self, shape):
            self.norm.build((None, 8, 8, 4))
            super().build(shape)

        def call(self, x, training=None):
            return self.norm(self.conv(x)) if training else self.conv(x)

    blocked(model_with(Idle(name="idle"), rng=rng), "Idle 'idle' does not call it at inference")


def test_code_that_acts_when_it_is_called(own, each_keras, rng):
    """It counts, adds a loss, draws numbers and remembers: none of that happens by being read."""

    class Acts(own.Holder):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.count = self.add_weight(
                name="count", shape=(), initializer="zeros", trainable=False
            )
            self.noise = K.GaussianNoise(0.1)
            self.seen = []

        def call(self, x, training=None):
            if type(x).__name__ != "KerasTensor":
                self.count.assign_add(1.0)
            self.seen.append(1)
            self.add_loss(x[0, 0, 0, 0] * 0.0)
            return super().call(self.noise(x), training=training)

    model = model_with(Acts(), rng=rng)
    before = state_of(model)
    mbn.plan(model, "fold")
    assert state_of(model) == before
    new = mbn.convert(model, "fold", check=False)
    assert len(norms(new)) == 0, mbn.plan(model, "fold")


def test_reading_changes_nothing(own, each_keras, rng):
    model = model_with(own.Nested(), own.Holder(), rng=rng)
    subclassed = own.Subclassed()
    subclassed(images())
    for each in (model, subclassed):
        before = state_of(each), len(each.losses), len(each.metrics)
        mbn.plan(each, "fold")
        mbn.convert(each, "fold", check=False)
        assert (state_of(each), len(each.losses), len(each.metrics)) == before


def test_new_layers_are_named_as_they_would_have_been(own, each_keras, rng):
    def names():
        each_keras.backend.clear_session()
        model = model_with(own.Nested(), rng=rng)
        yield model
        x = K.Input((8, 8, 3))
        yield [K.Dense(1).name, K.Conv2D(1, 1).name, Model(x, own.relu(x)).layers[-1].name]

    found = []
    for plans in (False, True):
        each = names()
        model = next(each)
        if plans:
            mbn.plan(model, "fold")
        found.append(next(each))
    assert found[0] == found[1]


OTHER_PATHS = {
    "partial": lambda self: functools.partial(self.norm),
    "closure": lambda self: (lambda norm: lambda x: norm(x))(self.norm),
    "method": lambda self: self.norm.__call__,
    "frozen_set": lambda self: next(iter(frozenset([self.norm]))).__call__,
}


@pytest.mark.parametrize("path", OTHER_PATHS)
def test_a_layer_that_is_called_by_another_way_than_its_attribute(path, own, rng):
    """In a copy, what is in the attribute is another layer than what is called."""

    class Other(own.Holder):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.way = OTHER_PATHS[path](self)

        def call(self, x, training=None):
            return self.way(self.conv(x))

    blocked(model_with(Other(), rng=rng), "holds it where it cannot be exchanged")


def test_code_that_asks_what_its_layers_are(own, rng):
    class Asks(own.Holder):
        def call(self, x, training=None):
            y = self.conv(x)
            return self.norm(y) if isinstance(self.norm, K.BatchNormalization) else y * 2

    blocked(model_with(Asks(), rng=rng), "does something else where it has another layer")


def test_a_convolution_that_code_calls_unseen_too(own, each_keras, rng):
    class Unseen(each_keras.layers.Layer):
        def __init__(self, conv=None, **kwargs):
            super().__init__(**kwargs)
            self.conv = conv

        def call(self, x):
            if type(x).__name__ == "KerasTensor":
                raise ValueError("it cannot be seen into")
            return self.conv(x)

    conv, x = K.Conv2D(4, 3, padding="same"), K.Input((8, 8, 3))
    y = conv(K.Conv2D(4, 1, activation="tanh")(x))
    model = Model(x, Unseen(conv)(K.ReLU()(K.BatchNormalization()(y))))
    randomise(model, rng)
    blocked(model, "is held by Unseen 'unseen', whose calls cannot be seen, too")


@pytest.mark.parametrize("mode", ["fold", "depthwise", "strided"])
def test_a_holder_that_is_called_in_training(mode, own, each_keras, rng):
    class Outer(each_keras.layers.Layer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.inner = own.Holder()

        def call(self, x):
            return self.inner(x, training=True)

    model = model_with(Outer(), rng=rng)
    (decision,) = mbn.plan(model, mode).decisions
    assert decision.action == "kept"
    assert "training=True" in decision.reason


def test_a_model_that_was_never_called_works_after_it_was_planned(own, each_keras, rng):
    class Late(each_keras.layers.Dense):
        """Its layers are built by their first call, and it says its shape without one."""

        def __init__(self, units, **kwargs):
            super().__init__(units, **kwargs)
            self.norm = K.BatchNormalization()

        def call(self, x):
            return self.norm(super().call(x))

        def compute_output_shape(self, shape):
            return (*shape[:-1], self.units)

    x = K.Input((4,))
    model = Model(x, Late(3)(x))
    mbn.plan(model, "fold")
    assert np.asarray(model(np.ones((2, 4), np.float32))).shape == (2, 3)


def test_a_pass_through_can_be_made_again(own, each_keras, rng):
    layer = adapter_of(model_with(K.Dense(1), rng=rng, shape=(3,))).pass_through(name="gone")
    again = type(layer).from_config(layer.get_config())
    assert (again.name, type(again)) == ("gone", type(layer))


# ------------------------------------------------------------------- what code asks of its layers

ASKS = {
    "has a bias": (lambda self: 1 if self.conv.use_bias else 2, "is asked by code of"),
    "its bias": (lambda self: 1 if self.conv.bias is not None else 2, "is asked by code of"),
    "epsilon": (lambda self: 1 + self.norm.epsilon, "does something else where it has another"),
    "weights": (lambda self: len(self.weights), "does something else where it has another"),
}


@pytest.mark.parametrize("asked", ASKS)
def test_code_that_asks_something_of_its_layers(asked, own, rng):
    ask, words = ASKS[asked]

    class Asks(own.Holder):
        def call(self, x, training=None):
            return self.norm(self.conv(x)) * ask(self)

    blocked(model_with(Asks(), rng=rng), words)


@pytest.mark.parametrize("mode", ["depthwise", "strided"])
def test_other_modes_leave_what_code_asks_about(mode, own, rng):
    class Asks(own.Holder):
        def call(self, x, training=None):
            y = self.conv(x)
            return self.norm(y) if isinstance(self.norm, K.BatchNormalization) else y * 2

    model = model_with(Asks(), rng=rng)
    assert mbn.plan(model, mode).left == 1
    assert_same(model, mbn.convert(model, mode))


def test_code_that_asks_for_a_size_that_is_open(own, rng):
    class Asks(own.Holder):
        def call(self, x, training=None):
            y = self.conv(x)
            return self.norm(y) if x.shape[1] is None else y * 2

    model = model_with(Asks(), rng=rng, shape=(None, None, 3))
    blocked(model, "calls something else where the sizes of its input are known")


@pytest.mark.parametrize("each_keras", ["tf_keras"], indirect=True)
def test_code_that_computes_with_sizes_that_are_open(own, rng):
    class Flattens(own.Holder):
        def call(self, x, training=None):
            y = self.norm(self.conv(x))
            rows = tf.shape(x)[1] if x.shape[1] is None else x.shape[1]
            return tf.reshape(y, (-1, rows * 1, 4))

    model = model_with(Flattens(), K.Dense(2), rng=rng, shape=(None, None, 3))
    assert mbn.plan(model, "fold").left == 0


def test_a_class_with_a_call_of_its_own(own, rng):
    """What Keras records is what it does besides, and the call of Keras's class."""

    class Adds(own.Holder):
        def __call__(self, x, *args, **kwargs):
            return super().__call__(x, *args, **kwargs) + self.conv(x)

    class Outer(own.Holder):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.inner = Adds()

        def call(self, x, training=None):
            return self.inner(super().call(x, training=training))

    model = model_with(Adds(), Outer(), rng=rng)
    assert_same(model, mbn.convert(model, "fold"))
    assert not any("cannot be seen" in d.reason for d in mbn.plan(model, "fold").decisions)


@pytest.mark.parametrize("each_keras", ["keras"], indirect=True)
def test_seeds_of_a_holder_that_is_copied_by_its_attributes(own, rng):
    class Draws(own.Holder):
        def __init__(self, width, **kwargs):
            super().__init__(**kwargs)
            self.seeds = keras_3.random.SeedGenerator(7)

        def get_config(self):
            raise NotImplementedError

    model = model_with(Draws(4), rng=rng)
    model.layers[1].seeds.next()
    new = folded(model)
    assert new.layers[1].seeds.state is not model.layers[1].seeds.state
    assert np.array_equal(new.layers[1].seeds.next(), model.layers[1].seeds.next())


@pytest.mark.parametrize("mode", ["fold", "depthwise"])
def test_what_is_found_not_to_be_right_is_left_as_it_is(mode, own, each_keras, rng):
    """Code that is not traced as it runs."""

    class Lies(own.Holder):
        def call(self, x, training=None):
            y = self.norm(self.conv(x), training=training)
            is_other = not isinstance(self.norm, K.BatchNormalization)
            return y * 2.0 if is_other and type(x).__name__ != "KerasTensor" else y

    model = model_with(K.Conv2D(3, 1), K.BatchNormalization(), Lies(name="lies"), rng=rng)
    new, plan = mbn.convert_with_plan(model, mode)
    assert_same(model, new)
    last = plan.decisions[-1]
    assert (last.name, last.action) == ("lies/norm", "kept")
    assert last.reason == "Lies 'lies' gave something else when it had other layers."
    assert plan.verification.ok


def test_what_a_layer_gave_is_known_for_the_same_structure_alone(each_keras):
    x, layer = K.Input((3,)), K.Activation("linear")
    known = KnownResults(adapter_of(Model(x, layer(x))))
    known.note(layer, ([x, x],), {"mask": None}, x)
    assert known.of(layer, ([x, x],), {"mask": None}) is x
    for other in ((x, x), [x], x, {"a": x, "b": x}, [x, [x]], [x, True], [x, 1]):
        assert known.of(layer, (other,), {"mask": None}) is None
    assert known.of(layer, ([x, x],), {}) is None
    known.note(layer, ({"a": x},), {}, x)
    assert known.of(layer, ({"b": x},), {}) is None


@pytest.mark.parametrize("each_keras", ["tf_keras"], indirect=True)
def test_layers_of_two_sequential_models_that_keras_builds_anew(own):
    class Odd(own.Holder):
        def call(self, x, training=None):
            return (
                self.part(x) + self.part(x[:, 2:-2, 2:-2])[:, :1, :1] + self.relu(x)[:, :1, :1, :1]
            )

        def part(self, x):
            return self.second(self.first(x)) + self.first(self.conv(x))

    odd = Odd(name="odd")
    odd.relu, shared = K.ReLU(), K.BatchNormalization()
    odd.conv = K.Conv2D(3, 1)
    odd.first = tf_keras.Sequential([K.Conv2D(4, 3, padding="same"), shared, odd.relu])
    odd.second = tf_keras.Sequential([K.Conv2D(4, 3, padding="same"), odd.relu, shared])
    x = K.Input((12, 12, 3))
    model = Model(x, odd(x))
    with pytest.raises(
        mbn.RewriteError, match=r"Keras has lost calls.*A SavedModel .* hides nothing"
    ):
        mbn.plan(model, "fold")

"""Layers and models that call others in Python code: what they call is read, and edited there."""

import functools
from types import SimpleNamespace

import keras as keras_3
import numpy as np
import pytest
import tensorflow as tf
import tf_keras

import mbn_rewrite as mbn
from mbn_rewrite.errors import RewriteError
from mbn_rewrite.frontends.keras_common.cloning import parts
from tests.support.kerases import K, Model, adapter_of, norms
from tests.support.random_models import randomise

pytestmark = pytest.mark.slow

PACKAGES = {"tf_keras": tf_keras, "keras": keras_3}


@pytest.fixture
def rng():
    return np.random.default_rng(11)


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


@pytest.fixture
def own(each_keras):
    return holders(each_keras.__name__)


def model_with(*layers, rng, shape=(8, 8, 3)):
    """A model of layers, one after the other, with random weights."""
    x = y = K.Input(shape)
    for layer in layers:
        y = layer(y)
    model = Model(x, y)
    randomise(model, rng)
    return model


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


def layers_of(rng, depth=0):
    """A random network, as a list of layers, and of lists for what runs beside the value itself."""
    steps = []
    for _ in range(int(rng.integers(2, 5))):
        kind = rng.choice(["conv", "norm", "relu", "pool", "beside"] if depth < 2 else ["conv"])
        if kind == "conv":
            size = int(rng.choice([1, 3]))
            steps.append(K.Conv2D(4, size, padding="same", use_bias=bool(rng.integers(2))))
        elif kind == "norm":
            steps += [K.Conv2D(4, 1), K.BatchNormalization()]
        elif kind == "relu":
            steps += [K.BatchNormalization(), K.ReLU()]
        elif kind == "pool":
            steps.append(K.AveragePooling2D(2, 1, padding="valid"))
            steps.append(K.ZeroPadding2D(((1, 0), (0, 1))))
        else:
            steps.append([*layers_of(rng, depth + 1), K.BatchNormalization(), K.Add()])
    return steps


def run(steps, x):
    for step in steps:
        if isinstance(step, list):
            *inner, add = step
            x = add([x, run(inner, x)])
        else:
            x = step(x)
    return x


def wrapped(steps, rng, base):
    """The same with parts of it in holders, which may lie in holders."""

    class Part(base):
        def __init__(self, steps, **kwargs):
            super().__init__(**kwargs)
            self.steps = steps

        def call(self, x):
            return run(self.steps, x)

    found = [[*wrapped(s[:-1], rng, base), s[-1]] if isinstance(s, list) else s for s in steps]
    start = int(rng.integers(0, len(found)))
    stop = int(rng.integers(start + 1, len(found) + 1))
    return [*found[:start], Part(found[start:stop]), *found[stop:]]


@pytest.mark.parametrize("seed", range(12))
def test_decisions_are_those_of_the_network_without_holders(seed, each_keras):
    models = []
    for wrap in (False, True):
        each_keras.backend.clear_session()  # so that layers have the same names
        rng = np.random.default_rng(seed)
        steps = [K.Conv2D(4, 1), *layers_of(rng)]
        if wrap:
            steps = wrapped(steps, rng, each_keras.layers.Layer)
        x = K.Input((8, 8, 3))
        models.append(Model(x, K.Dense(2)(run(steps, x))))
    plain, held = models
    randomise(plain, np.random.default_rng(seed))
    layers = {layer.name: layer for layer in parts(plain)}
    for layer in parts(held):
        if layer.weights and not list(layer._flatten_layers(include_self=False)):
            layer.set_weights(layers[layer.name].get_weights())
    assert_same(plain, held)
    decided = [
        sorted((d.name.rpartition("/")[2], d.action) for d in mbn.plan(model, "fold").decisions)
        for model in models
    ]
    assert decided[0] == decided[1]
    assert_same(held, mbn.convert(held, "fold"))


# ---------------------------------------------------------------------- what code may do besides


def blocked(model, words, left=1):
    """The reason of what stays in a model that is converted all the same."""
    plan = mbn.plan(model, "fold")
    reasons = [d.reason for d in plan.decisions if d.action == "kept"]
    assert len(reasons) == left
    assert all(words in reason for reason in reasons), reasons
    assert_same(model, mbn.convert(model, "fold"))
    return reasons


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

"""Models of classes of their own that build a Functional or Sequential model in __init__."""

import functools
import types

import keras as keras_3
import numpy as np
import pytest
import tensorflow as tf
import tf_keras

import mbn_rewrite as mbn
from mbn_rewrite.api import convert_with_plan
from mbn_rewrite.errors import RewriteError
from tests.support.kerases import K, Model, adapter_of, norms
from tests.support.random_models import randomise

pytestmark = pytest.mark.slow

PACKAGES = {"tf_keras": tf_keras, "keras": keras_3}


def block(x, filters=4):
    return K.ReLU()(K.BatchNormalization()(K.Conv2D(filters, 3, use_bias=False)(x)))


@functools.cache
def classes(name):
    """The classes under test, derived from the Model and Sequential of one Keras."""
    package = PACKAGES[name]

    class Detector(package.Model):
        """Takes other arguments than Functional models; predicts something else than it gives."""

        def __init__(self, width, labels, **kwargs):
            x = K.Input((8, 8, 3))
            y = block(block(x, width))
            features = K.GlobalAveragePooling2D()(y)
            head = K.Dense(len(labels), name="head")
            super().__init__(x, head(features), **kwargs)
            self.width, self.labels = width, list(labels)
            self.head = head
            self.backbone = package.Model(x, y, name="backbone")
            self.scaling = K.Rescaling(1 / 255)
            self.seen = package.metrics.Mean(name="seen")
            self.stages = {"last": [y]}
            self.decode = lambda scores: [self.labels[i] for i in np.argmax(scores, -1)]

        def predict_step(self, data):
            x = data[0] if isinstance(data, tuple) else data
            return tf.argmax(self(self.scaling(x), training=False), axis=-1)

        def logits_of_features(self, features):
            return self.head(tf.reduce_mean(features, axis=(1, 2)))

        def get_config(self):
            return {"width": self.width, "labels": list(self.labels), "name": self.name}

    class Tagger(package.Model):
        """Is given the network whose outputs it tags."""

        def __init__(self, backbone, tags=2, **kwargs):
            super().__init__(backbone.inputs, K.Dense(tags)(backbone.outputs[0]), **kwargs)
            self.backbone, self.tags = backbone, tags

        def get_config(self):
            serialize = package.saving.serialize_keras_object
            return {"backbone": serialize(self.backbone), "tags": self.tags, "name": self.name}

        @classmethod
        def from_config(cls, config):
            config = dict(config)
            config["backbone"] = package.saving.deserialize_keras_object(config["backbone"])
            return cls(**config)

    class Halving(package.Model):
        """Is made as Functional models are."""

        def predict_step(self, data):
            return super().predict_step(data) / 2

    class Chain(package.Sequential):
        def __init__(self, width=4, **kwargs):
            layers = [K.Input((8,)), K.Dense(width), K.BatchNormalization(), K.Dense(2)]
            super().__init__(layers, **kwargs)
            self.width = width

        def predict_step(self, data):
            return super().predict_step(data) * self.width

    return types.SimpleNamespace(Detector=Detector, Tagger=Tagger, Halving=Halving, Chain=Chain)


@pytest.fixture
def own(each_keras):
    return classes(each_keras.__name__)


def images(seed=3):
    return np.random.default_rng(seed).uniform(0, 255, (2, 8, 8, 3)).astype("float32")


def randomised(model):
    randomise(model, np.random.default_rng(5))
    return model


def equal(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max())


# ----------------------------------------------------------------------- what they are and do


@pytest.mark.parametrize("mode", ["fold", "depthwise", "strided"])
def test_class_methods_and_attributes_stay(mode, own):
    model = randomised(own.Detector(4, ["cat", "dog", "owl"], name="detector"))
    before = [w.copy() for w in model.get_weights()]
    new, plan = convert_with_plan(model, mode)
    assert type(new) is own.Detector
    assert plan.counts == {{"fold": "folded"}.get(mode, mode): 2}
    assert mbn.verify(model, new).ok
    np.testing.assert_array_equal(
        new.predict(images(), verbose=0), model.predict(images(), verbose=0)
    )
    assert new.labels == model.labels
    assert new.labels is not model.labels
    assert new.width == 4
    assert new.scaling is model.scaling  # it has no weights
    scores = np.eye(3)[[2, 0]]
    new.labels[0] = "lion"
    assert new.decode(scores) == ["owl", "lion"]
    assert model.decode(scores) == ["owl", "cat"]
    for array, weights in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(array, weights)


def test_layers_and_models_among_the_attributes_are_those_of_the_copy(own):
    model = randomised(own.Detector(4, "abc"))
    new = mbn.convert(model, "fold")
    assert new.head is new.get_layer("head")
    assert new.head is not model.head
    assert not norms(new.backbone)
    equal(model.backbone(images()), new.backbone(images()))
    features = model.backbone(images())
    equal(model.logits_of_features(features), new.logits_of_features(features))
    new.head.bias.assign(np.full(3, 7.0))  # used by the model and by its method alike
    zeros = np.zeros((1, 2, 2, 4), "float32")
    np.testing.assert_allclose(new.logits_of_features(zeros), np.full((1, 3), 7.0))
    assert not np.allclose(new(images()), model(images()))


def test_a_metric_is_copied_with_its_state(own):
    model = own.Detector(4, "abc")
    model.seen.update_state([2.0, 4.0])
    new = mbn.convert(model, "fold")
    assert new.seen is not model.seen
    assert float(new.seen.result()) == 3.0
    new.seen.update_state([9.0])
    assert float(model.seen.result()) == 3.0


def test_tensors_among_the_attributes_are_those_of_the_copy(own, each_keras):
    model = randomised(own.Detector(4, "abc"))
    new = mbn.convert(model, "fold")
    last = each_keras.Model(new.inputs, new.stages["last"][0])
    equal(last(images()), model.backbone(images()))


def test_what_a_held_model_gives_keeps_its_value(each_keras):
    """A BatchNormalization does not fold into a layer whose output a held model gives."""
    x = K.Input((8, 8, 3))
    y = K.Conv2D(4, 3)(x)
    model = Model(x, K.ReLU()(K.BatchNormalization()(y)))
    model.before = each_keras.Model(x, y)
    randomised(model)
    new, plan = convert_with_plan(model, "fold")
    assert "is also an output of the model" in plan.decisions[0].reason
    equal(new.before(images()), model.before(images()))
    model.before, model.tensor = None, y
    assert "is also an output of the model" in mbn.plan(model, "fold").decisions[0].reason
    model.tensor = None
    assert mbn.plan(model, "fold").left == 0


def test_a_held_normalization_gives_way_to_an_identity(each_keras):
    x = K.Input((8, 8, 3))
    convolution, norm = K.Conv2D(4, 3), K.BatchNormalization()
    model = Model(x, K.ReLU()(norm(convolution(x))))
    model.parts = [convolution, norm]
    randomised(model)
    new = mbn.convert(model, "fold")
    assert not norms(new)
    expected = norm(convolution(images()), training=False)
    equal(new.parts[1](new.parts[0](images())), expected)


def test_layers_beside_the_network_are_copied(each_keras):
    x = K.Input((8,))
    model = Model(x, K.Dense(2)(K.BatchNormalization()(K.Dense(4)(x))))
    model.teacher = Model(t := K.Input((8,)), K.Dense(2)(K.BatchNormalization()(K.Dense(3)(t))))
    model.auxiliary = [K.Dense(5)]
    model.auxiliary[0](np.ones((1, 8), "float32"))
    randomised(model)
    new, plan = convert_with_plan(model, "fold")
    assert plan.counts == {"folded": 2}
    data = np.random.default_rng(0).normal(size=(3, 8)).astype("float32")
    equal(new.teacher(data), model.teacher(data))
    assert new.auxiliary[0] is not model.auxiliary[0]
    np.testing.assert_array_equal(new.auxiliary[0](data), model.auxiliary[0](data))


def test_hidden_normalizations_beside_the_network(each_keras):
    x = K.Input((8,))
    model = Model(x, K.Dense(2)(x))
    model.norm = K.BatchNormalization(name="aside")
    model.norm(np.ones((1, 8), "float32"))
    randomised(model)
    (decision,) = mbn.plan(model, "fold").decisions
    assert (decision.name, decision.action) == ("aside", "kept")
    assert f"'{model.name}' holds it" in decision.reason
    data = np.random.default_rng(0).normal(size=(3, 8)).astype("float32")
    for mode in ("fold", "depthwise", "strided"):
        new = mbn.convert(model, mode)
        assert len(norms(new)) == (mode != "depthwise")
        equal(new.norm(data, training=False), model.norm(data, training=False))


class Helper:
    """A plain object that refers to layers."""

    def __init__(self, model, layer):
        self.model, self.layers = model, {"layer": layer}

    def __call__(self, data):
        return self.layers["layer"](self.model(data, training=False))


def test_objects_and_functions_that_refer_to_the_model(each_keras):
    x = K.Input((8,))
    model = Model(x, K.Dense(4)(K.BatchNormalization()(K.Dense(4)(x))))
    last = model.layers[-1]

    def twice(self, data):
        return self(data, training=False) * 2

    model.helper = Helper(model, last)
    model.twice = types.MethodType(twice, model)
    model.compiled_twice = tf.function(lambda data: model(data, training=False) * 2)
    model.unrelated = min
    randomised(model)
    data = np.random.default_rng(0).normal(size=(3, 8)).astype("float32")
    model.compiled_twice(tf.constant(data))
    expected = [f(data) for f in (model.helper, model.twice)]
    new = mbn.convert(model, "fold")
    assert new.helper.model is new
    assert new.helper.layers["layer"] is new.layers[-1]
    assert model.helper.model is model
    assert new.unrelated is min
    equal(new.helper(data), expected[0])
    equal(new.twice(data), expected[1])
    equal(new.compiled_twice(tf.constant(data)), expected[1])
    new.layers[-1].set_weights([np.zeros_like(w) for w in new.layers[-1].get_weights()])
    for function in (new.helper, new.twice, new.compiled_twice):
        assert not np.any(function(tf.constant(data)))


def test_variables_among_the_attributes_are_copied(each_keras):
    x = K.Input((8,))
    model = Model(x, K.Dense(2)(K.BatchNormalization()(K.Dense(4)(x))))
    model.temperature = model.add_weight(name="temperature", shape=(), initializer="ones")
    model.temperature.assign(3.0)
    new = mbn.convert(model, "fold")
    assert float(new.temperature) == 3.0
    new.temperature.assign(4.0)
    assert float(model.temperature) == 3.0
    assert len(new.weights) == 5


# ------------------------------------------------------------------ Sequential, nested, made alike


def test_sequential_classes(own, each_keras):
    model = randomised(own.Chain(4))
    data = np.random.default_rng(0).normal(size=(3, 8)).astype("float32")
    new = mbn.convert(model, "fold")
    assert type(new) is own.Chain
    assert not norms(new)
    equal(new.predict(data, verbose=0), model.predict(data, verbose=0))


def test_nested_models_stay_of_their_class(own):
    inner = own.Detector(4, "abcd", name="inner")
    x = K.Input((8, 8, 3))
    model = randomised(Model(x, K.Dense(2)(K.ReLU()(inner(x)))))
    new, plan = convert_with_plan(model, "fold")
    assert plan.left == 0
    assert type(new.get_layer("inner")) is own.Detector
    assert new.get_layer("inner").head is not inner.head
    assert mbn.verify(model, new).ok
    equal(new.get_layer("inner").backbone(images()), inner.backbone(images()))


def test_an_exchanged_call_is_refused(each_keras):
    x = K.Input((8,))
    model = Model(x, K.Dense(2)(K.BatchNormalization()(K.Dense(4)(x))))
    model.call = lambda inputs, training=None, mask=None: inputs
    for function in (mbn.plan, mbn.convert):
        with pytest.raises(RewriteError, match="call method was exchanged on the object"):
            function(model, "fold")


def test_a_configuration_that_says_too_little(each_keras):
    class Unmade(K.Layer):
        def __init__(self, units, **kwargs):
            super().__init__(**kwargs)
            self.units = units

        def get_config(self):
            return {"name": self.name}

        def call(self, x):
            return x * self.units

    x = K.Input((8,))
    model = Model(x, K.Dense(2)(K.BatchNormalization()(Unmade(3)(x))))
    assert mbn.verify(model, mbn.convert(model, "depthwise")).ok


# --------------------------------------------------------------------------------- files


def loaded(each_keras, path, own):
    scope = each_keras.utils.custom_object_scope
    with scope(dict(vars(own))):
        return each_keras.models.load_model(path, compile=False)


def test_what_its_configuration_can_make_is_saved_and_loaded(own, each_keras, tmp_path):
    x = K.Input((8, 8, 3))
    backbone = each_keras.Model(x, K.GlobalAveragePooling2D()(block(x)), name="backbone")
    for model in (own.Tagger(backbone, 3), own.Halving(backbone.inputs, backbone.outputs)):
        randomised(model)
        new = mbn.convert(model, "fold")
        assert not norms(new)
        new.save(tmp_path / "new.keras")
        again = loaded(each_keras, tmp_path / "new.keras", own)
        assert type(again) is type(model)
        equal(again(images()), model(images()))
        equal(again.predict(images(), verbose=0), model.predict(images(), verbose=0))


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file")
def test_what_its_configuration_cannot_make_is_not_saved(nested, suffix, own, each_keras, tmp_path):
    model = own.Detector(4, "abc", name="detector")
    if nested:
        x = K.Input((8, 8, 3))
        model = Model(x, K.Dense(2)(model(x)))
    (note,) = mbn.plan(model, "fold").notes
    assert "so that saving it as .keras or .h5 raises an error" in note
    new = mbn.convert(model, "fold")
    with pytest.raises(RewriteError, match=r"'detector' has no configuration.*save_weights"):
        new.save(tmp_path / f"new{suffix}")
    # What the message advises works.
    new.save_weights(tmp_path / "new.weights.h5")
    fresh = own.Detector(4, "abc", name="detector")
    if nested:
        fresh = Model(x, K.Dense(2)(fresh(x)))
    again = mbn.convert(fresh, "fold")
    again.load_weights(tmp_path / "new.weights.h5")
    np.testing.assert_array_equal(new(images()), again(images()))
    # So does a rewrite of the rewritten.
    assert type(mbn.convert(new, "fold")) is type(new)


def test_saved_models_of_models_without_configuration(own, each_keras, tmp_path):
    model = randomised(own.Detector(4, "abc"))
    new = mbn.convert(model, "fold")
    if each_keras is keras_3:
        new.export(tmp_path / "new", verbose=False)
        again = tf.saved_model.load(str(tmp_path / "new"))
        given = again.serve(images())
    else:
        new.save(tmp_path / "new", save_format="tf")
        given = tf_keras.models.load_model(tmp_path / "new")(images())
    equal(given, model(images()))


def test_a_model_that_was_not_changed_is_saved_and_loaded(own, each_keras, tmp_path):
    model = own.Detector(4, "abc", name="detector")
    new = mbn.convert(mbn.convert(model, "strided", stride=1), "strided")
    new = mbn.convert(model, "fold")
    assert new.get_config
    untouched = own.Tagger(each_keras.Model(x := K.Input((8, 8, 3)), K.Flatten()(x)))
    assert mbn.plan(untouched, "fold").notes == ()
    mbn.convert(untouched, "fold").save(tmp_path / "new.keras")
    again = loaded(each_keras, tmp_path / "new.keras", own)
    np.testing.assert_array_equal(again(images()), untouched(images()))


# ----------------------------------------------------------------------------- what is Keras's


@pytest.mark.parametrize("kind", ["functional", "sequential"])
@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file")
def test_attributes_of_keras_are_known(kind, each_keras, tmp_path):
    """What compiling, running and saving leave on a model is not taken for its user's."""
    from mbn_rewrite.frontends.keras_common.custom_models import attributes

    x = K.Input((4,))
    model = Model(x, K.Dense(2)(x)) if kind == "functional" else each_keras.Sequential(
        [x, K.Dense(2)]
    )  # fmt: skip
    keras = adapter_of(model)
    made = set(vars(model))
    data, wanted = np.ones((4, 4), "float32"), np.ones((4, 2), "float32")
    model.compile("sgd", "mse", metrics=["mae"])
    model.fit(data, wanted, validation_data=(data, wanted), verbose=0)
    model.evaluate(data, wanted, verbose=0)
    model.predict(data, verbose=0)
    model.save(tmp_path / "model.keras")
    model.save(tmp_path / "model.h5")
    assert set(attributes(model, keras)) <= made
    model.added = 1
    assert set(attributes(model, keras)) - made == {"added"}

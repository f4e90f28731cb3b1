"""Models that TensorFlow Model Optimization has put into training for a target, or is to.

Where it is not installed, classes with its names, which work as its own do, stand for its own.
"""

import numpy as np
import pytest
import tensorflow as tf
import tf_keras

import mbn_rewrite as mbn
from tests.support.checks import save_with_signature
from tests.support.kerases import norms
from tests.support.random_models import randomise

pytestmark = pytest.mark.slow

K = tf_keras.layers
MODES = ("fold", "depthwise", "auto", "strided")


class Config:
    """What of a layer is quantised."""

    def __init__(self, weight):
        self.weight = weight

    def get_config(self):
        return {"weight": self.weight}

    @classmethod
    def from_config(cls, config):
        return cls(**config)


class QuantizeWrapperV2(K.Wrapper):
    """Has a layer compute with a kernel on a grid, which it keeps itself."""

    def __init__(self, layer, quantize_config, **kwargs):
        super().__init__(layer, **{"name": f"quant_{layer.name}", **kwargs})
        self.quantize_config = quantize_config

    def build(self, input_shape):
        super().build(input_shape)
        self.low = self.add_weight("low", initializer=tf_keras.initializers.Constant(-1.0))
        self.high = self.add_weight("high", initializer=tf_keras.initializers.Constant(1.0))
        if self.quantize_config.weight:
            self.moved = getattr(self.layer, self.quantize_config.weight)

    def call(self, inputs, training=None):
        with tf.name_scope("LastValueQuant"):
            if self.quantize_config.weight:
                grid = tf.quantization.fake_quant_with_min_max_vars(self.moved, self.low, self.high)
                setattr(self.layer, self.quantize_config.weight, grid)
        if isinstance(self.layer, K.BatchNormalization):
            return self.layer.call(inputs, training=training)
        return self.layer.call(inputs)

    def get_config(self):
        config = tf_keras.utils.serialize_keras_object(self.quantize_config)
        return {**super().get_config(), "quantize_config": config}

    @classmethod
    def from_config(cls, config):
        layer = K.deserialize(config.pop("layer"))
        quantize = tf_keras.utils.deserialize_keras_object(config.pop("quantize_config"))
        return cls(layer, quantize, **config)


class PruneLowMagnitude(K.Wrapper):
    """Has a layer compute with a part of its kernel."""

    def call(self, inputs, training=None):
        if isinstance(self.layer, K.BatchNormalization):
            return self.layer.call(inputs, training=training)
        return self.layer.call(inputs)


def network(wrapped=lambda layer, weight="": layer):
    x = K.Input((8, 8, 3), name="image")
    y = wrapped(K.Conv2D(4, 3, use_bias=False, name="conv"), "kernel")(x)
    y = K.ReLU()(wrapped(K.BatchNormalization(name="bn"))(y))
    y = K.GlobalAveragePooling2D()(y)
    model = tf_keras.Model(x, wrapped(K.Dense(3, name="dense"), "kernel")(y))
    randomise(model, np.random.default_rng(0))
    return model


def quantised():
    return network(lambda layer, weight="": QuantizeWrapperV2(layer, Config(weight)))


def images(seed=1):
    return np.random.default_rng(seed).uniform(-1, 1, (4, 8, 8, 3)).astype("float32")


def assert_kept(plan, *said):
    assert plan.left == len(plan.decisions) > 0
    for decision in plan.decisions:
        assert all(part in decision.reason for part in said), decision


def options(mode):
    return {"budget": 3.0} if mode == "auto" else {}


TOLD = ("trains it for quantisation", "then quantise what that gives (quantize_model)")


@pytest.mark.parametrize("mode", MODES)
def test_a_model_trained_for_quantisation_is_left_alone(mode):
    model = quantised()
    before = model.get_weights()
    new, plan = mbn.convert_with_plan(model, mode, check=False, **options(mode))
    assert_kept(plan, "QuantizeWrapperV2 'quant_bn'", *TOLD)
    np.testing.assert_array_equal(new(images()), model(images()))
    for old, now in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, now)


@pytest.mark.parametrize("mode", ["fold", "depthwise"])
def test_so_is_its_saved_model(mode, tmp_path):
    model = quantised()
    given = save_with_signature(model, tf.constant(images()), tmp_path / "in")
    report = mbn.rewrite_saved_model(tmp_path / "in", tmp_path / "out", mode, inputs=given)
    assert report.ok
    assert_kept(report.plan, "Wrapper 'quant_bn'", *TOLD)


@pytest.mark.parametrize("mode", ["fold", "depthwise"])
def test_pruned_layers_are_named_with_what_takes_the_wrapper_away(mode):
    model = network(lambda layer, weight="": PruneLowMagnitude(layer, name=f"prune_{layer.name}"))
    new, plan = mbn.convert_with_plan(model, mode, check=False)
    assert_kept(plan, "PruneLowMagnitude 'prune_bn' wraps it", "tfmot.sparsity.keras.strip_pruning")
    np.testing.assert_array_equal(new(images()), model(images()))


FILES = {
    "trained for quantisation": quantised,
    "strip_pruning": lambda: network(
        lambda layer, weight="": PruneLowMagnitude(layer, name=f"prune_{layer.name}")
    ),
}


@pytest.mark.parametrize("trusted", [False, True])
@pytest.mark.parametrize("kind", ["keras", "h5"])
@pytest.mark.parametrize("said", FILES)
def test_files_of_them_are_refused(said, kind, trusted, tmp_path):
    FILES[said]().save(tmp_path / f"model.{kind}")
    with pytest.raises(mbn.RewriteError, match=said):
        mbn.rewrite_saved_model(
            tmp_path / f"model.{kind}", tmp_path / "out", "fold", trusted=trusted
        )


def test_what_trains_goes_into_a_pruning_wrapper():
    model = network(lambda layer, weight="": PruneLowMagnitude(layer, name=f"prune_{layer.name}"))
    assert mbn.plan(model, "strided").left == 0


# ------------------------------------------------------------------------ the toolkit itself


@pytest.fixture
def tfmot():
    return pytest.importorskip(
        "tensorflow_model_optimization",
        reason="tensorflow-model-optimization is not installed: extra model-optimization",
    )


def behind_activations():
    x = K.Input((8, 8, 3))
    y = K.BatchNormalization()(K.Conv2D(4, 3, activation="relu")(x))
    y = K.BatchNormalization()(K.SeparableConv2D(4, 3, activation="relu")(y))
    model = tf_keras.Model(x, K.Dense(3)(K.GlobalAveragePooling2D()(K.Conv2D(4, 1)(y))))
    randomise(model, np.random.default_rng(0))
    return model


@pytest.mark.parametrize("build", [network, behind_activations])
def test_what_folds_can_be_quantised(build, tfmot):
    new, plan = mbn.convert_with_plan(build(), "fold")
    assert plan.left == 0
    quantised = tfmot.quantization.keras.quantize_model(new)
    assert norms(quantised) == []
    quantised.compile("sgd", "mse")
    quantised.fit(images(), np.zeros((4, 3), "float32"), verbose=0)


def trained(model, **kwargs):
    model.compile("sgd", "mse")
    model.fit(images(), np.zeros((4, 3), "float32"), verbose=0, **kwargs)
    return model


@pytest.mark.parametrize("mode", MODES)
def test_what_the_toolkit_quantised_is_left_alone(mode, tfmot):
    model = trained(tfmot.quantization.keras.quantize_model(network()))
    new, plan = mbn.convert_with_plan(model, mode, **options(mode))
    assert_kept(plan, *TOLD)
    np.testing.assert_array_equal(new(images(2)), model(images(2)))


def test_so_is_what_it_saved(tfmot, tmp_path):
    model = trained(tfmot.quantization.keras.quantize_model(network()))
    model.save(tmp_path / "in", save_format="tf")
    report = mbn.rewrite_saved_model(tmp_path / "in", tmp_path / "out", "fold")
    assert report.ok
    assert_kept(report.plan, *TOLD)


def test_what_it_pruned_folds_once_it_is_stripped(tfmot):
    sparsity = tfmot.sparsity.keras
    model = trained(
        sparsity.prune_low_magnitude(network()), callbacks=[sparsity.UpdatePruningStep()]
    )
    assert_kept(mbn.plan(model, "fold"), "strip_pruning")
    stripped = sparsity.strip_pruning(model)
    new, plan = mbn.convert_with_plan(stripped, "fold")
    assert plan.left == 0
    kernel, folded = (each.get_layer("conv").get_weights()[0] for each in (stripped, new))
    np.testing.assert_array_equal(kernel == 0, folded == 0)

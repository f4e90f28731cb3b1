"""Layers and classes of one's own that normalise by the batch in training, as SavedModels.

At inference all of them are one scale and one shift per channel.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from tf_keras.src.layers.normalization.batch_normalization_v1 import BatchNormalization as Version1

import mbn_rewrite as mbn
from tests.saved_model.test_saved_model_forms import (
    CHANNELS,
    EPSILON,
    Case,
    assert_all_gone,
    conv,
    numbers,
    rewritten,
)
from tests.saved_model.test_saved_model_hard_cases import assert_same_signatures

pytestmark = pytest.mark.slow

CLIPPING = {"rmax": 3.0, "rmin": 0.3, "dmax": 5.0}
SHAPES = {"Conv2D": (6, 6, 3), "Conv1D": (8, 3), "Dense": (5,)}


def save_network(directory, package, norm, kind="Conv2D", size=None):
    """Saves a layer with weights, a BatchNormalization and ReLU."""
    layers = package.layers
    x = layers.Input(SHAPES[kind])
    layer = (
        layers.Dense(CHANNELS) if kind == "Dense" else getattr(layers, kind)(size or CHANNELS, 3)
    )
    model = package.Model(x, layers.ReLU()(norm(layer(x))))
    randomise(model)
    if package is keras:
        model.export(directory, verbose=False)
    else:
        model.save(directory, save_format="tf")


def randomise(model):
    """Random weights for layers of any class; variances are positive."""
    rng = np.random.default_rng(41)
    for variable in model.weights:
        array = rng.normal(0, 0.5, variable.shape)
        if "variance" in variable.name or "stddev" in variable.name:
            array = rng.uniform(0.5, 2.0, variable.shape)
        variable.assign(array)


def rewrite_network(tmp_path, mode="fold"):
    report = mbn.rewrite_saved_model(tmp_path / "in", tmp_path / "out", mode)
    assert report.ok
    model, new = (tf.saved_model.load(str(tmp_path / name)) for name in ("in", "out"))
    specs = model.signatures["serving_default"].structured_input_signature[1]
    ((name, spec),) = specs.items()
    x = tf.constant(numbers(2, (4, *spec.shape[1:])) * 3.0)
    assert_same_signatures(model, new, **{name: x})
    return report.plan.decisions


FOLDS = {
    "renorm": (tf_keras, lambda: Version1(renorm=True), "Conv2D"),
    "renorm_clipped": (tf_keras, lambda: Version1(renorm=True, renorm_clipping=CLIPPING), "Conv1D"),
    "renorm_dense": (tf_keras, lambda: Version1(renorm=True), "Dense"),
    "virtual": (tf_keras, lambda: Version1(virtual_batch_size=2), "Conv2D"),
    "virtual_1d": (tf_keras, lambda: Version1(virtual_batch_size=4), "Conv1D"),
    "virtual_renorm": (tf_keras, lambda: Version1(virtual_batch_size=2, renorm=True), "Conv2D"),
    "one_axis_in_a_list": (tf_keras, lambda: tf_keras.layers.BatchNormalization([3]), "Conv2D"),
    "negative_axis_in_a_list": (
        tf_keras, lambda: tf_keras.layers.BatchNormalization([-1]), "Conv1D"),
    "synchronised": (
        tf_keras, lambda: tf_keras.layers.BatchNormalization(synchronized=True), "Conv2D"),
    "synchronised_keras_3": (
        keras, lambda: keras.layers.BatchNormalization(synchronized=True), "Conv2D"),
    "negative_axis_keras_3": (keras, lambda: keras.layers.BatchNormalization(axis=-1), "Dense"),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDS)
def test_variant_folds(name, tmp_path):
    package, norm, kind = FOLDS[name]
    save_network(tmp_path / "in", package, norm(), kind)
    (decision,) = rewrite_network(tmp_path)
    assert decision.action == "folded"


STAYS = {
    "width": (tf_keras, lambda: tf_keras.layers.BatchNormalization(axis=-2)),
    "width_keras_3": (keras, lambda: keras.layers.BatchNormalization(axis=-2)),
    "height_keras_3": (keras, lambda: keras.layers.BatchNormalization(axis=1)),
    "all_axes": (tf_keras, lambda: tf_keras.layers.BatchNormalization(axis=[1, 2, 3])),
    "two_axes": (tf_keras, lambda: tf_keras.layers.BatchNormalization(axis=[1, -1])),
}


@pytest.mark.parametrize("name", STAYS)
def test_norm_of_other_axes_is_listed_and_stays(name, tmp_path):
    """As many channels as there are positions, so that a wrong axis fits."""
    package, norm = STAYS[name]
    save_network(tmp_path / "in", package, norm(), size=4)
    (decision,) = rewrite_network(tmp_path)
    assert decision.action == "kept"
    assert "batchnorm" not in decision.reason
    assert ("several axes" in decision.reason) == name.endswith("axes")


# ------------------------------------------------------------------- classes of one's own


def parameters(w):
    return w.norm(CHANNELS)


def epsilon_outside(x, w):
    gamma, beta, mean, variance = parameters(w)
    return (x - mean) / (tf.sqrt(variance) + EPSILON) * gamma + beta


def variance_bounded(x, w):
    gamma, beta, mean, variance = parameters(w)
    return (x - mean) / tf.sqrt(tf.maximum(variance, EPSILON)) * gamma + beta


def divided_if_not_zero(x, w):
    gamma, beta, mean, variance = parameters(w)
    return tf.math.divide_no_nan(x - mean, tf.sqrt(variance + EPSILON)) * gamma + beta


def broadcast_to_the_data(x, w):
    gamma, beta, mean, variance = (
        tf.broadcast_to(tf.reshape(p, [1, 1, 1, -1]), tf.shape(x)) for p in parameters(w)
    )
    return (x - mean) * (tf.math.rsqrt(variance + EPSILON) * gamma) + beta


def scale_broadcast(x, w):
    gamma, beta, mean, variance = parameters(w)
    scale = gamma * tf.math.rsqrt(variance + EPSILON)
    return x * tf.broadcast_to(scale, tf.shape(x)) + tf.broadcast_to(
        beta - mean * scale, tf.shape(x)
    )


def chosen_by_a_flag(x, w):
    gamma, beta, mean, variance = parameters(w)
    trains = w.of(np.array(False))
    batch_mean, batch_variance = tf.nn.moments(x, [0, 1, 2])
    return tf.nn.batch_normalization(
        x, tf.where(trains, batch_mean, mean), tf.where(trains, batch_variance, variance),
        beta, gamma, EPSILON,
    )  # fmt: skip


def deviation_as_parameter(x, w):
    gamma, beta, mean, variance = parameters(w)
    deviation = tf.exp(0.5 * tf.math.log(variance + EPSILON))
    return (x - mean) / tf.sqrt(tf.square(deviation) + EPSILON) * gamma + beta


OWN = {
    function.__name__: function
    for function in (
        epsilon_outside, variance_bounded, divided_if_not_zero, scale_broadcast, chosen_by_a_flag,
        deviation_as_parameter,
    )
}  # fmt: skip


@pytest.mark.parametrize("form", OWN)
def test_own_class_folds(form, tmp_path):
    assert_all_gone(*rewritten(tmp_path, Case(lambda x, w: OWN[form](conv(x, w, 3), w))))


def test_selection_by_the_data_is_not_decided(tmp_path):
    def function(x, w):
        y = conv(x, w, 3)
        gamma, beta, mean, variance = parameters(w)
        large = tf.reduce_mean(y) > 100.0
        mean = tf.where(large, tf.reduce_mean(y, [0, 1, 2]), mean)
        return tf.nn.batch_normalization(y, mean, variance, beta, gamma, EPSILON)

    decisions, _ = rewritten(tmp_path, Case(function))
    assert [decision.action for decision in decisions] == ["kept"] * len(decisions)


def test_broadcast_to_another_shape_is_not_taken_for_that_of_the_data(tmp_path):
    """The sum has more positions than the data has."""

    def function(x, w):
        y = tf.reduce_mean(conv(x, w, 3), [1, 2], keepdims=True)
        gamma, beta, mean, variance = parameters(w)
        scale = gamma * tf.math.rsqrt(variance + EPSILON)
        shift = tf.broadcast_to(beta - mean * scale, [1, 2, 2, CHANNELS])
        return y * scale + shift

    rewritten(tmp_path, Case(function))

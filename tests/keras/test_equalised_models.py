"""Keras models and SavedModels whose scales between layers are chosen for int8."""

import numpy as np
import pytest
import tensorflow as tf

import mbn_rewrite as mbn
from tests.support.kerases import K, Model, norms
from tests.support.round_trips import through

pytestmark = pytest.mark.slow


def inverted_residuals(activation):
    """A small network of the kind of MobileNetV2, with gammas of very different sizes."""
    x = inputs = K.Input((16, 16, 3))
    x = activation()(K.BatchNormalization()(K.Conv2D(8, 3, padding="same", use_bias=False)(x)))
    for _ in range(2):
        y = K.BatchNormalization()(K.Conv2D(24, 1, use_bias=False)(x))
        y = K.DepthwiseConv2D(3, padding="same", use_bias=False)(activation()(y))
        y = K.Conv2D(8, 1, use_bias=False)(activation()(K.BatchNormalization()(y)))
        x = K.Add()([x, K.BatchNormalization()(y)])
    model = Model(inputs, K.Dense(4)(K.GlobalAveragePooling2D()(x)))
    rng = np.random.default_rng(0)
    for layer in model.layers:
        layer.set_weights([rng.normal(0, 0.3, array.shape) for array in layer.get_weights()])
    for norm in norms(model):
        count = norm.gamma.shape[0]
        gamma, variance = np.exp(rng.normal(0, 1.5, count)), np.exp(rng.normal(0, 1, count))
        norm.set_weights([gamma, rng.normal(0, 0.3, count), rng.normal(0, 0.3, count), variance])
    return model


def pictures():
    return np.random.default_rng(1).normal(0, 1, (4, 16, 16, 3)).astype(np.float32)


def with_kernels_of_eight_bits(model):
    """A copy whose kernels have 255 values each, with one step for a whole kernel."""
    copy = mbn.convert(model, "fold", check=False)
    for layer in copy.layers:
        weights = layer.get_weights()
        for i, array in enumerate(weights):
            if array.ndim > 1:
                step = np.abs(array).max() / 127
                weights[i] = np.round(array / step) * step
        layer.set_weights(weights)
    return copy


def error_of(model, expected):
    found = np.asarray(with_kernels_of_eight_bits(model)(pictures()))
    return np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2))


@pytest.mark.parametrize("upper", [None, 6.0])
def test_outputs_are_the_same_and_eight_bits_lose_less(each_keras, upper, tmp_path):
    model = inverted_residuals(lambda: K.ReLU(upper) if upper else K.ReLU())
    plain = mbn.convert(model, "fold")
    equalised, plan = mbn.convert_with_plan(model, "fold", equalize=True)
    assert plan.left == 0
    assert "equalised for int8" in plan.notes[0]
    expected = np.asarray(plain(pictures()))
    np.testing.assert_array_equal(np.asarray(equalised(pictures())), expected)
    loaded = through("keras", equalised, tmp_path)
    np.testing.assert_array_equal(np.asarray(loaded(pictures())), expected)
    # What ReLU6 cuts off leaves less to gain.
    most = 0.7 if upper else 0.5
    assert error_of(equalised, expected) < most * error_of(plain, expected)


def test_in_a_saved_model(tmp_path):
    model = inverted_residuals(K.ReLU)
    tf.saved_model.save(model, str(tmp_path / "in"))
    report = mbn.rewrite_saved_model(tmp_path / "in", tmp_path / "out", "fold", equalize=True)
    assert report.ok
    assert report.plan.left == 0
    assert any("equalised" in note for note in report.plan.notes)


def padded():
    """A network in which zero padding keeps two of three BatchNormalizations."""
    x = inputs = K.Input((8, 8, 3))
    for _ in range(3):
        x = K.BatchNormalization()(K.Conv2D(6, 3, padding="same", activation="relu")(x))
    model = Model(inputs, K.Dense(4)(K.GlobalAveragePooling2D()(x)))
    rng = np.random.default_rng(0)
    for norm in norms(model):
        gamma, variance = rng.uniform(0.5, 1.5, (2, 6))
        norm.set_weights([gamma, *rng.normal(0, 0.3, (2, 6)), variance])
    return model


def test_what_stays_only_adds(each_keras, tmp_path):
    model = padded()
    new, plan = mbn.convert_with_plan(model, "fold", equalize=True)
    assert plan.left == 2
    assert plan.verification.ok
    for norm in norms(new):
        gamma, beta, mean, variance = norm.get_weights()
        assert np.all(gamma / np.sqrt(variance + np.float32(norm.epsilon)) == 1)
        assert not mean.any()
        assert beta.any()
    tf.saved_model.save(model, str(tmp_path / "in"))
    report = mbn.rewrite_saved_model(tmp_path / "in", tmp_path / "out", "fold", equalize=True)
    assert report.ok
    assert report.plan.left == 2
    ops = report.after.ops
    assert not any(kind.startswith("FusedBatchNorm") or kind == "Mul" for kind in ops)
    assert "2 that stay only add" in str(report)

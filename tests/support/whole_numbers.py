"""Models in which nothing is rounded.

Weights, inputs and BatchNormalization parameters are small whole numbers in float64, with
variance 1 and epsilon 0. Both a model and any exact rewrite of it then compute without
rounding, so their outputs must be equal bit for bit, and no tolerance can hide a mistake.
"""

from __future__ import annotations

import numpy as np
import tensorflow as tf

import mbn_rewrite as mbn
from mbn_rewrite.plans import Plan
from tests.support import traced
from tests.support.kerases import BATCH_NORMS, K, assign, inputs_like


def norm(**kwargs):
    """A BatchNormalization whose variance is not changed by its epsilon."""
    return K.BatchNormalization(epsilon=0.0, **kwargs)


def randomise(model, rng, *, gamma="mixed", shift=True):
    """Sets all weights to small whole numbers.

    Args:
        gamma: "mixed" for both signs and some zeros, "positive", or "powers" of two, by which can
            be divided.
        shift: whether BatchNormalizations shift; without, beta is mean * gamma.
    """
    for layer in model._flatten_layers(include_self=False):
        if isinstance(layer, BATCH_NORMS):
            _randomise_norm(layer, rng, gamma, shift)
        elif not list(layer._flatten_layers(include_self=False)):
            for variable in layer.weights:
                assign(variable, rng.integers(-2, 3, tuple(variable.shape)))


def _randomise_norm(layer, rng, gamma, shift):
    shape = tuple(layer.moving_mean.shape)
    values = 2.0 ** rng.integers(-1, 2, shape) if gamma == "powers" else rng.integers(1, 4, shape)
    if gamma == "mixed":
        values = values * rng.choice([-1, 1], shape)
        values.reshape(-1)[0] = -2
        if values.size > 2:
            values.reshape(-1)[1] = 0
    mean = rng.integers(-2, 3, shape)
    beta = rng.integers(-2, 3, shape)
    if not layer.scale:
        values = np.ones(shape)
    if not shift:
        beta = mean * values if layer.center else beta
        mean = mean if layer.center else np.zeros(shape)
    elif layer.center:
        beta.reshape(-1)[-1] = 1 + mean.reshape(-1)[-1] * values.reshape(-1)[-1]
    else:
        mean.reshape(-1)[-1] = 1
    if layer.scale:
        assign(layer.gamma, values)
    if layer.center:
        assign(layer.beta, beta)
    assign(layer.moving_mean, mean)
    assign(layer.moving_variance, np.ones(shape))


def inputs_for(model, rng, batch=2, open_size=5):
    """Small whole numbers in the shapes of the model's inputs."""
    shapes = [
        [batch, *(size or open_size for size in tuple(tensor.shape)[1:])] for tensor in model.inputs
    ]
    return inputs_like(model, [rng.integers(-3, 4, shape) for shape in shapes])


def outputs(model, data, compiled=False):
    """All outputs as arrays."""
    function = tf.function(model, jit_compile=True, autograph=False) if compiled else model
    return [np.asarray(t) for t in tf.nest.flatten(function(data, training=False))]


def assert_equal_bits(model, new, data, compiled=False):
    """Fails unless both models give the very same outputs."""
    for a, b in zip(outputs(model, data, compiled), outputs(new, data, compiled), strict=True):
        np.testing.assert_array_equal(a, b)


def assert_exact(model, rng, compiled=False, left_when_saved=None, **how) -> Plan:
    """Converts in every mode and compares bit for bit; returns the plan of `fold`.

    So it does with the function that the model is saved as, of which as much must fold, but where
    it is said how many stay.
    """
    randomise(model, rng, **how)
    data = inputs_for(model, rng)
    for mode in ("fold", "depthwise"):
        assert_equal_bits(model, mbn.convert(model, mode, check=False), data, compiled)
    assert mbn.plan(model, "depthwise").left == 0
    plan = mbn.plan(model, "fold")
    if not compiled:
        left = assert_exact_when_saved(model, data).left
        assert left <= plan.left if left_when_saved is None else left == left_when_saved
    return plan


def assert_exact_when_saved(model, data) -> Plan:
    """Folds the function that a model is saved as, and compares bit for bit; returns the plan."""
    plan, before, after = traced.folded(model, data)
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a, b)
    return plan


def assert_close(model, rng, tolerance=1e-11, **how) -> Plan:
    """As `assert_exact` of `fold`, for models that divide by what they compute."""
    randomise(model, rng, **how)
    data = inputs_for(model, rng)
    new, plan = mbn.convert_with_plan(model, "fold", check=False)
    when_saved, *arrays = traced.folded(model, data)
    for pair in ((outputs(model, data), outputs(new, data)), arrays):
        for a, b in zip(*pair, strict=True):
            np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)
    assert when_saved.left <= plan.left
    return plan

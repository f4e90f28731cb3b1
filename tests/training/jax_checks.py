"""What only JAX has, in a process with two CPU devices; see `backend_checks.py`."""

import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from jax.experimental import sparse

import mbn_rewrite as mbn
from mbn_rewrite.training.jax import sampled_batch_norm as room
from tests.training.sampled_cases import CASES

LAYERS = [mbn.StridedBatchNormalization, mbn.ModifiedBatchNormalization]


def numbers(shape, seed=0):
    return (np.random.default_rng(seed).standard_normal(shape) * 2 + 1).astype("float32")


def normalized(case, mask=None):
    """A function from x, gamma and beta to y."""
    return lambda *tensors: room.normalize_by_sample(*tensors, case.sampling, mask)[0]


@pytest.mark.parametrize("name", ["rank_4", "everything", "mask", "channels_first"])
def test_statistics_of_accelerators(name, monkeypatch):
    """The form that CPUs do not run gives the same."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    jax.clear_caches()
    case = CASES[name]
    x, dy, gamma, beta, mask = case.arrays()
    x = x + 20 * (mask is None)
    ran = room.implementation(x, case.sampling, mask, training=True)
    assert ("some examples" in ran) == (mask is None)
    y, pull = jax.vjp(normalized(case, mask), x, gamma, beta)
    moments = room.normalize_by_sample(x, gamma, beta, case.sampling, mask)[1]
    got = [y, *pull(jnp.asarray(dy)), moments.mean, moments.variance, moments.count]
    arrays = (x, dy, gamma, beta, mask)
    jax.clear_caches()
    case.check(arrays, got, case.expected(*arrays))


@pytest.mark.parametrize("name", ["rank_4", "everything", "mask"])
def test_second_derivatives_are_exact(name):
    """Against the definition, differentiated twice by JAX."""
    case = CASES[name]
    x, dy, gamma, beta, mask = case.arrays()
    steps = tuple(slice(None, None, step) for step in case.sampling.steps(x.ndim))

    def plainly(x, gamma, beta):
        sample = x[steps]
        weight = jnp.ones(sample.shape[:-1]) if mask is None else 1.0 * mask[steps[:-1]]
        weight = weight[..., None] / weight.sum()
        mean = jnp.sum(weight * sample, (0, 1, 2))
        variance = jnp.sum(weight * (sample - mean) ** 2, (0, 1, 2))
        slope = gamma / jnp.sqrt(variance + case.sampling.epsilon)
        return (x - mean) * slope + beta

    def penalty(function):
        def of(x):
            inner = jax.grad(lambda x: jnp.sum(dy * function(x, gamma, beta)))
            return jnp.sum(inner(x) ** 2)

        return jax.jit(jax.grad(of))(x)

    expected = penalty(plainly)
    error = jnp.max(jnp.abs(penalty(normalized(case, mask)) - expected))
    assert error < 1e-4 * jnp.max(jnp.abs(expected))


def test_vmap():
    case = CASES["everything"]
    x, _, gamma, beta, _ = case.arrays()
    stacked = jnp.stack([x, x * 3 + 500])
    got = jax.vmap(lambda x: normalized(case)(x, gamma, beta))(stacked)
    for one, y in zip(stacked, got, strict=True):
        np.testing.assert_allclose(y, normalized(case)(one, gamma, beta), atol=1e-4)


def test_only_the_input_is_kept_for_the_gradient():
    """Of all that the forward pass computes, the gradient keeps x and vectors."""
    case = CASES["rank_4"]
    x, _, gamma, beta, _ = case.arrays()
    _, pull = jax.vjp(normalized(case), *map(jnp.asarray, (x, gamma, beta)))
    large = [leaf for leaf in jax.tree.leaves(pull) if getattr(leaf, "size", 0) > 16]
    assert len(large) == 1
    np.testing.assert_array_equal(large[0], x)


# ------------------------------------------------------------------- across several devices


@pytest.fixture
def two_devices():
    keras.distribution.set_distribution(
        keras.distribution.DataParallel(devices=keras.distribution.list_devices())
    )
    yield
    keras.distribution.set_distribution(None)


def trained(layer):
    """Losses and moving statistics of a small model after some steps."""
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((8, 8, 3)), layer, keras.layers.Conv2D(2, 3)])
    model.compile(keras.optimizers.SGD(0.01), "mse")
    # Halves of a batch that are unlike each other.
    x = np.concatenate([numbers((8, 8, 8, 3)), numbers((8, 8, 8, 3), 1) * 4 + 9])
    losses = [float(model.train_on_batch(x, numbers((16, 6, 6, 2), i))) for i in range(3)]
    return losses, np.asarray(layer.moving_variance)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("stride", [1, 2])
def test_statistics_are_those_of_all_devices(kind, stride, two_devices):
    got = trained(kind(stride, synchronized=True))
    keras.distribution.set_distribution(None)
    for a, b in zip(got, trained(kind(stride)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4)


@pytest.mark.parametrize("kind", LAYERS)
def test_nothing_to_synchronize(kind):
    layer = kind(synchronized=True, name="norm")
    assert layer(numbers((4, 8, 8, 3))).shape == (4, 8, 8, 3)  # inference needs no distribution
    assert kind.from_config(layer.get_config()).synchronized
    with pytest.raises(mbn.RewriteError, match=r"'norm' has synchronized=True, and there is no"):
        layer(numbers((4, 8, 8, 3)), training=True)


@pytest.mark.parametrize("kind", LAYERS)
def test_sparse_arrays_are_refused(kind):
    layer = kind()
    layer.build((None, 6))
    with pytest.raises(mbn.RewriteError, match=r"was given a BCOO.*todense\(\)"):
        layer.call(sparse.BCOO.fromdense(jnp.eye(6)), training=True)


def test_models_are_compared_in_full_precision():
    seen = []

    class Asking(keras.layers.Layer):
        def call(self, x):
            seen.append(jax.config.jax_default_matmul_precision)
            return x + 0

    model = keras.Sequential([keras.Input((3,)), keras.layers.BatchNormalization(), Asking()])
    seen.clear()
    mbn.verify(model, model)
    assert set(seen) == {"highest"}
    assert jax.config.jax_default_matmul_precision is None

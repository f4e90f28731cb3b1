"""Batch normalisation by statistics of a sample, with its exact gradient, on JAX.

See `training.backends` for the equations. All is arithmetic, for XLA to fuse: a depthwise 1x1
convolution too, which XLA would make a multiplication. What is worth choosing is how sums over
positions are taken, since XLA reads x once for each of them that it cannot fuse.

On the CPU XLA sums what lies in memory, or products of two such, in one pass, and writes to memory
whatever else is to be summed. There the sums are those of x, x^2 and dy x:

    mu = sum x / |S|    var = sum x^2 / |S| - mu^2    dgamma = r (sum dy x - mu dbeta)

Their relative rounding errors grow with mu^2 / var and |mu| r. Where mu^2 > 64 (var + epsilon) in
any channel, sums of x - mu are taken in their place, while it runs: the error of var + epsilon is
then at most some 65 times that of a float32 sum.

Elsewhere XLA fuses more, and the statistics are sums of x - a, in one pass, with a the mean of the
first sixteenth of the batch. Then (mu - a)^2 <= 15 var, so that little cancels however large mu is.
"""

from __future__ import annotations

import math
from enum import Enum
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import sparse

from mbn_rewrite.errors import RewriteError
from mbn_rewrite.training.sampling import Moments, Sampling

# Above this mu^2 / (var + epsilon), sums are those of x - mu.
_CANCELS = 64
# The part of a batch whose mean is near enough to that of all.
_FIRST = 1 / 16


def normalize_by_sample(
    x: jax.Array,
    gamma: jax.Array,
    beta: jax.Array,
    sampling: Sampling,
    mask: jax.Array | None = None,
) -> tuple[jax.Array, Moments]:
    """See `backends.Backend`; second derivatives are exact too."""
    y, *statistics = _normalized(sampling, x, gamma, beta, mask)
    return y, Moments(*map(jax.lax.stop_gradient, statistics))


@partial(jax.jit, static_argnames="sampling")
def normalize(
    x: jax.Array,
    gamma: jax.Array,
    beta: jax.Array,
    mean: jax.Array,
    variance: jax.Array,
    sampling: Sampling,
) -> jax.Array:
    """See `backends.Backend`."""
    along = partial(_along, axis=sampling.axis, rank=x.ndim)
    slope = gamma * jax.lax.rsqrt(variance + sampling.epsilon)
    return ((_widened(x) - along(mean)) * along(slope) + along(beta)).astype(x.dtype)


def implementation(
    x: jax.Array, sampling: Sampling, mask: jax.Array | None = None, *, training: bool
) -> str:
    """See `backends.Backend`."""
    return (_form(mask) if training else _Form.INFERENCE).value


def check_input(x: Any, moving_mean: Any, label: str) -> None:
    """See `backends.Backend`."""
    if isinstance(x, sparse.JAXSparse):
        raise RewriteError(
            f"{label} was given a {type(x).__name__}. Dense arrays are needed: call its todense() "
            "before this layer"
        )


def check_synchronized(label: str) -> None:
    """See `backends.Backend`: under `keras.distribution`, an array is that of all devices."""
    import keras

    if keras.distribution.distribution() is None:
        raise RewriteError(
            f"{label} has synchronized=True, and there is no distribution whose devices it could "
            "synchronize. Call keras.distribution.set_distribution before, or leave it out"
        )


# ----------------------------------------------------------------------- choosing the form


class _Form(Enum):
    """How statistics are taken, in words."""

    RAW = "arithmetic by XLA: sums of x and x^2, about the mean where those would cancel"
    SHIFTED = "arithmetic by XLA: sums about the mean of some examples, in one pass"
    MASKED = "arithmetic by XLA: sums of what a mask leaves, in two passes"
    INFERENCE = "arithmetic by XLA, by given statistics"


def _form(mask: jax.Array | None) -> _Form:
    if mask is not None:
        return _Form.MASKED
    return _Form.RAW if jax.default_backend() == "cpu" else _Form.SHIFTED


# ------------------------------------------------------------------- output and gradient


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _normalized(
    sampling: Sampling, x: jax.Array, gamma: jax.Array, beta: jax.Array, mask: jax.Array | None
) -> tuple[jax.Array, ...]:
    return _forward(sampling, x, gamma, beta, mask)[0]


@partial(jax.jit, static_argnums=0)  # so that it is one program where nothing else is compiled
def _forward(
    sampling: Sampling, x: jax.Array, gamma: jax.Array, beta: jax.Array, mask: jax.Array | None
) -> tuple[tuple[jax.Array, ...], tuple[Any, ...]]:
    """y and the statistics; and what is kept for the gradient."""
    mean, variance, count = _moments(x, sampling, mask)
    y = normalize(x, gamma, beta, mean, variance, sampling)
    return (y, mean, variance, count), (x, gamma, mean, variance, count, mask)


@partial(jax.jit, static_argnums=0)
def _backward(
    sampling: Sampling, kept: tuple[Any, ...], cotangents: tuple[jax.Array, ...]
) -> tuple[jax.Array | None, ...]:
    x, gamma, mean, variance, count, mask = kept
    axes, along = _all_but(sampling.axis, x), partial(_along, axis=sampling.axis, rank=x.ndim)
    dy = _widened(cotangents[0])
    inverse = jax.lax.rsqrt(variance + sampling.epsilon)
    dbeta = jnp.sum(dy, axes)
    dgamma = inverse * _centred_products(x, dy, dbeta, mean, variance, sampling)
    slope = gamma * inverse
    # Of the sample: what its share in the statistics takes off dy.
    centred = _widened(_sampled(x, sampling)) - along(mean)
    due = along(dbeta) + centred * along(inverse * dgamma)
    due = due / jnp.maximum(count, 1)
    if mask is not None:
        due = jnp.where(_sampled(_like(mask, x, sampling.axis), sampling), due, 0)
    dx = along(slope) * (dy - _spread(due, x, sampling))
    return dx.astype(x.dtype), dgamma, dbeta, None


_normalized.defvjp(_forward, _backward)


# -------------------------------------------------------------------------------------- sums


def _moments(
    x: jax.Array, sampling: Sampling, mask: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Mean, variance and count of the sample."""
    sample = _widened(_sampled(x, sampling))
    along = partial(_along, axis=sampling.axis, rank=x.ndim)
    mean_of = partial(_mean, axis=sampling.axis)
    if mask is not None:
        counted = _sampled(_like(mask, x, sampling.axis), sampling)
        mean = mean_of(sample, counted=counted)
        variance = mean_of(jnp.square(sample - along(mean)), counted=counted)
        return mean, variance, jnp.sum(counted).astype(sample.dtype)
    positions = _positions(sample, sampling.axis)
    count = jnp.asarray(positions, sample.dtype)
    if _form(mask) is _Form.SHIFTED:
        first = sample[: math.ceil(len(sample) * _FIRST)]
        near = jax.lax.stop_gradient(mean_of(first))
        centred = sample - along(near)
        offset = mean_of(centred)
        return near + offset, _less(mean_of(jnp.square(centred)), offset), count
    mean = mean_of(sample)

    def about_the_mean(sample: jax.Array, mean: jax.Array, *_: jax.Array) -> jax.Array:
        return mean_of(jnp.square(sample - along(mean)))

    if positions == 1:  # whose variance is 0
        return mean, about_the_mean(sample, mean), count
    raw = _less(mean_of(jnp.square(sample)), mean)
    variance = jax.lax.cond(
        _cancels(mean, raw, sampling),
        about_the_mean,
        lambda sample, mean, raw: raw,
        *(sample, mean, raw),
    )
    return mean, variance, count


def _centred_products(
    x: jax.Array,
    dy: jax.Array,
    dbeta: jax.Array,
    mean: jax.Array,
    variance: jax.Array,
    sampling: Sampling,
) -> jax.Array:
    """The sums of dy (x - mu)."""
    axes, x = _all_but(sampling.axis, x), _widened(x)

    def about_the_mean(x: jax.Array, dy: jax.Array, *_: jax.Array) -> jax.Array:
        return jnp.sum(dy * (x - _along(mean, sampling.axis, x.ndim)), axes)

    if _form(None) is _Form.SHIFTED:
        return about_the_mean(x, dy)
    return jax.lax.cond(
        _cancels(mean, variance, sampling),
        about_the_mean,
        lambda x, dy, dbeta, mean: jnp.sum(dy * x, axes) - mean * dbeta,
        *(x, dy, dbeta, mean),
    )


def _cancels(mean: jax.Array, variance: jax.Array, sampling: Sampling) -> jax.Array:
    """Whether sums of x itself lose too much, in any channel."""
    kept = jnp.square(mean) <= _CANCELS * (variance + sampling.epsilon)
    return ~jnp.all(kept)  # of what is no number, too


def _less(mean_square: jax.Array, mean: jax.Array) -> jax.Array:
    """The variance, of the mean square."""
    return jnp.maximum(mean_square - jnp.square(mean), 0)


def _mean(x: jax.Array, axis: int, counted: jax.Array | None = None) -> jax.Array:
    """The mean over all axes but one, of what counts; 0 of nothing."""
    if counted is None:
        return jnp.sum(x, _all_but(axis, x)) / max(_positions(x, axis), 1)
    return jnp.sum(jnp.where(counted, x, 0), _all_but(axis, x)) / jnp.maximum(jnp.sum(counted), 1)


# ------------------------------------------------------------------------------- positions


def _positions(x: jax.Array, axis: int) -> int:
    return math.prod(size for i, size in enumerate(x.shape) if i != axis)


def _sampled(x: jax.Array, sampling: Sampling) -> jax.Array:
    if sampling.everything:
        return x
    return x[tuple(slice(None, None, step) for step in sampling.steps(x.ndim))]


def _spread(sample: jax.Array, x: jax.Array, sampling: Sampling) -> jax.Array:
    """An array of x's shape with the sample in its places, and zeros elsewhere."""
    if sampling.everything:
        return sample
    padding = [
        (0, size - max((taken - 1) * step + 1, 0), step - 1)
        for size, taken, step in zip(x.shape, sample.shape, sampling.steps(x.ndim), strict=True)
    ]
    return jax.lax.pad(sample, jnp.zeros((), sample.dtype), padding)


def _like(mask: jax.Array, x: jax.Array, axis: int) -> jax.Array:
    """A mask with an axis for the channels and the sizes of all others."""
    mask = jnp.expand_dims(jnp.asarray(mask, bool), axis)
    return jnp.broadcast_to(mask, [1 if i == axis else n for i, n in enumerate(x.shape)])


def _widened(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32) if x.dtype.itemsize == 2 else x


def _all_but(axis: int, x: jax.Array) -> tuple[int, ...]:
    return tuple(i for i in range(x.ndim) if i != axis)


def _along(vector: jax.Array, axis: int, rank: int) -> jax.Array:
    """A vector as an array that broadcasts along an axis of one of this rank."""
    return vector.reshape([-1 if i == axis else 1 for i in range(rank)])

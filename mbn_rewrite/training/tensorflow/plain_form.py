"""The plain form of `sampled_batch_norm`: arithmetic, for every layout and dtype and for XLA."""

from __future__ import annotations

import tensorflow as tf

from mbn_rewrite.training.sampling import Moments, Sampling
from mbn_rewrite.training.tensorflow.image_shapes import sizes_of
from mbn_rewrite.training.tensorflow.moments import gamma_r, gamma_r_per_sample


def sample_moments(x: tf.Tensor, sampling: Sampling, mask: tf.Tensor | None) -> Moments:
    """The moments of the sample, in two passes over it."""
    sample = _widened(_sampled(x, sampling))
    axes = _all_but(sampling.axis, x)
    if mask is None:
        count = tf.cast(tf.size(sample) // sample.shape[sampling.axis], sample.dtype)
        mean = tf.reduce_mean(sample, axes)
        centred = sample - _along(mean, sampling.axis, x)
        return Moments(mean, tf.reduce_mean(tf.square(centred), axes), count)
    counted = tf.cast(_sampled(_mask_like(mask, x, sampling), sampling), sample.dtype)
    count = tf.reduce_sum(counted)
    mean = tf.math.divide_no_nan(tf.reduce_sum(counted * sample, axes), count)
    squares = tf.square(sample - _along(mean, sampling.axis, x))
    variance = tf.math.divide_no_nan(tf.reduce_sum(counted * squares, axes), count)
    return Moments(mean, variance, count)


def sample_moments_at_once(x: tf.Tensor, sampling: Sampling) -> Moments:
    """The moments of the sample, in one pass over it where its two sums are one kernel, as in XLA.

    With k any number,

        mu = k + E[x - k]          var = E[(x - k)^2] - E[x - k]^2

    where the difference magnifies the rounding of the sums by 1 + (mu - k)^2 / var. The k of a
    channel is its mean over the first of n examples, for which that is at most n, whatever the
    values are: the variance is at least what the distance of that one mean from mu makes of it.
    """
    axis, axes = sampling.axis, _all_but(sampling.axis, x)
    sample = _widened(_sampled(x, sampling))
    count = tf.cast(tf.size(sample) // sample.shape[axis], sample.dtype)
    first = sample[:1]
    positions = tf.cast(tf.size(first) // sample.shape[axis], sample.dtype)
    origin = tf.math.divide_no_nan(tf.reduce_sum(first, axes), positions)
    moved = sample - _along(origin, axis, x)
    offset, square = tf.reduce_mean(moved, axes), tf.reduce_mean(tf.square(moved), axes)
    return Moments(origin + offset, tf.maximum(square - tf.square(offset), 0), count)


def normalized(
    x: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor, moments: Moments, sampling: Sampling
) -> tf.Tensor:
    """y with the given moments."""
    wide, axis = _widened(x), sampling.axis
    slope = gamma_r(gamma, moments, sampling.epsilon)
    centred = wide - _along(moments.mean, axis, x)
    return tf.cast(centred * _along(slope, axis, x) + _along(beta, axis, x), x.dtype)


def gradient(
    x: tf.Tensor, dy: tf.Tensor, gamma: tf.Tensor, moments: Moments, sampling: Sampling
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """dx, dgamma and dbeta with the moments taken for constants."""
    axis, axes = sampling.axis, _all_but(sampling.axis, x)
    inverse = tf.math.rsqrt(moments.variance + sampling.epsilon)
    wide = _widened(dy)
    centred = _widened(x) - _along(moments.mean, axis, x)
    dgamma = tf.reduce_sum(wide * centred, axes) * inverse
    return wide * _along(gamma * inverse, axis, x), dgamma, tf.reduce_sum(wide, axes)


def correction(
    dx: tf.Tensor,
    x: tf.Tensor,
    gamma: tf.Tensor,
    dgamma: tf.Tensor,
    dbeta: tf.Tensor,
    moments: Moments,
    sampling: Sampling,
    mask: tf.Tensor | None,
) -> tf.Tensor:
    """dx with the correction due in the sample."""
    axis = sampling.axis
    inverse = tf.math.rsqrt(moments.variance + sampling.epsilon)
    weight = gamma_r_per_sample(gamma, moments, sampling.epsilon)
    centred = _widened(_sampled(x, sampling)) - _along(moments.mean, axis, x)
    due = _along(weight * dbeta, axis, x) + centred * _along(weight * inverse * dgamma, axis, x)
    if mask is not None:
        due *= tf.cast(_sampled(_mask_like(mask, x, sampling), sampling), due.dtype)
    return tf.cast(_widened(dx) - _spread(due, x, sampling), x.dtype)


def _sampled(x: tf.Tensor, sampling: Sampling) -> tf.Tensor:
    steps = sampling.steps(x.shape.rank)
    return x[tuple(slice(None, None, step) for step in steps)] if max(steps) > 1 else x


def _spread(sample: tf.Tensor, x: tf.Tensor, sampling: Sampling) -> tf.Tensor:
    """A tensor of x's shape with the sample in its places, and zeros elsewhere."""
    steps = sampling.steps(x.shape.rank)
    if max(steps) == 1:
        return sample
    rank = x.shape.rank
    return tf.raw_ops.StridedSliceGrad(
        shape=tf.shape(x),
        begin=[0] * rank,
        end=[0] * rank,
        strides=steps,
        dy=sample,
        begin_mask=2**rank - 1,
        end_mask=2**rank - 1,
    )


def _mask_like(mask: tf.Tensor, x: tf.Tensor, sampling: Sampling) -> tf.Tensor:
    """A mask with an axis for the channels and the sizes of all others."""
    mask = tf.expand_dims(tf.cast(mask, tf.bool), sampling.axis)
    shape = [1 if i == sampling.axis else size for i, size in enumerate(sizes_of(x))]
    return tf.broadcast_to(mask, tf.stack(shape))


def _widened(x: tf.Tensor) -> tf.Tensor:
    return tf.cast(x, tf.float32) if x.dtype.size == 2 else x


def _all_but(axis: int, x: tf.Tensor) -> list[int]:
    return [i for i in range(x.shape.rank) if i != axis]


def _along(vector: tf.Tensor, axis: int, x: tf.Tensor) -> tf.Tensor:
    """A vector as a tensor that broadcasts along an axis of x."""
    return tf.reshape(vector, [-1 if i == axis else 1 for i in range(x.shape.rank)])

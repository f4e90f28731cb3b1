"""What follows from the moments of a sample, and their sum over replicas."""

from __future__ import annotations

import tensorflow as tf

from mbn_rewrite.training.sampling import Moments


def unbiased_variance(moments: Moments) -> tf.Tensor:
    """The variance with Bessel's correction, that of the fused operation."""
    return moments.variance * (moments.count / tf.maximum(moments.count - 1, 1))


def scale_and_shift(
    gamma: tf.Tensor, beta: tf.Tensor, moments: Moments, epsilon: float
) -> tuple[tf.Tensor, tf.Tensor]:
    """Scale and shift of the normalisation: y = scale x + shift."""
    scale = gamma_r(gamma, moments, epsilon)
    return scale, beta - moments.mean * scale


def gamma_r_per_sample(gamma: tf.Tensor, moments: Moments, epsilon: float) -> tf.Tensor:
    """gamma r / |S|."""
    return tf.math.divide_no_nan(gamma_r(gamma, moments, epsilon), moments.count)


def gamma_r(gamma: tf.Tensor, moments: Moments, epsilon: float) -> tf.Tensor:
    """gamma r."""
    return gamma * tf.math.rsqrt(moments.variance + epsilon)


def of_all_replicas(moments: Moments) -> Moments:
    """The moments of all replicas together, by one sum over them.

    Sums of squares are taken about 0, as no replica knows another's mean beforehand.
    """
    if _replicas() == 1:
        return moments
    mean, variance, count = moments.mean, moments.variance, moments.count
    squares = count * (variance + tf.square(mean))
    packed = tf.concat([count * mean, squares, [count]], axis=0)
    sums = summed_over_replicas(packed)
    channels = mean.shape[0]
    count = sums[-1]
    mean = tf.math.divide_no_nan(sums[:channels], count)
    squares = tf.math.divide_no_nan(sums[channels : 2 * channels], count)
    return Moments(mean, tf.maximum(squares - tf.square(mean), 0), count)


def _replicas() -> int:
    context = tf.distribute.get_replica_context()
    return 1 if context is None else int(context.num_replicas_in_sync)


def summed_over_replicas(tensor: tf.Tensor) -> tf.Tensor:
    """A tensor summed over the replicas of the distribution strategy."""
    if _replicas() == 1:
        return tensor
    context = tf.distribute.get_replica_context()
    return context.all_reduce(tf.distribute.ReduceOp.SUM, tensor)

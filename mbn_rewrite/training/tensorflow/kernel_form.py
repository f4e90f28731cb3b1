"""The kernel form of `sampled_batch_norm`: fused operations, channels last, in 16 or 32 bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from mbn_rewrite.training.sampling import Moments, Sampling
from mbn_rewrite.training.tensorflow.image_shapes import as_images, product, shaped_like, sizes_of
from mbn_rewrite.training.tensorflow.moments import gamma_r_per_sample, scale_and_shift

FUSED_DTYPES = (tf.float16, tf.bfloat16, tf.float32)


def fused_training(
    images: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor, epsilon: float, layout: str = "NHWC"
) -> tuple[tf.Tensor, Moments, list[tf.Tensor]]:
    """y, the moments of all positions, and the tensors kept for the gradient."""
    y, mean, unbiased, *kept = tf.raw_ops.FusedBatchNormV3(
        x=images,
        scale=gamma,
        offset=beta,
        mean=tf.zeros([0]),
        variance=tf.zeros([0]),
        epsilon=epsilon,
        data_format=layout,
        is_training=True,
    )
    count = tf.cast(tf.size(images) // mean.shape[0], mean.dtype)
    # The tensors kept differ between devices: a variance, or its inverse root.
    variance = unbiased * (tf.maximum(count - 1, 0) / tf.maximum(count, 1))
    return y, Moments(mean, variance, count), kept


def sample_moments(x: tf.Tensor, sampling: Sampling) -> Moments:
    """The moments of the sample, as the fused operation computes them in training."""
    channels = x.shape[-1]
    sample = tf.reshape(_Rows.of(x, sampling).taken(x), [-1, 1, 1, channels])
    one, zero = tf.ones([channels]), tf.zeros([channels])
    return fused_training(sample, one, zero, sampling.epsilon)[1]


def normalized(
    x: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor, moments: Moments, sampling: Sampling
) -> tf.Tensor:
    """y by the fused operation, with the given moments."""
    return _fused_inference(x, gamma, beta, moments.mean, moments.variance, sampling.epsilon)


def _fused_inference(
    x: tf.Tensor,
    gamma: tf.Tensor,
    beta: tf.Tensor,
    mean: tf.Tensor,
    variance: tf.Tensor,
    epsilon: float,
) -> tf.Tensor:
    y, *_ = tf.raw_ops.FusedBatchNormV3(
        x=as_images(x, x.shape.rank - 1),
        scale=gamma,
        offset=beta,
        mean=mean,
        variance=variance,
        epsilon=epsilon,
        is_training=False,
    )
    return shaped_like(y, x)


def depthwise(
    x: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor, moments: Moments, sampling: Sampling
) -> tf.Tensor:
    """y by a depthwise 1x1 convolution and a bias."""
    scale, shift = scale_and_shift(gamma, beta, moments, sampling.epsilon)
    kernel = tf.cast(tf.reshape(scale, [1, 1, -1, 1]), x.dtype)
    images = as_images(x, x.shape.rank - 1)
    y = tf.nn.depthwise_conv2d(images, kernel, [1, 1, 1, 1], "VALID")
    return shaped_like(tf.nn.bias_add(y, tf.cast(shift, x.dtype)), x)


def gradient(
    x: tf.Tensor, dy: tf.Tensor, gamma: tf.Tensor, moments: Moments, sampling: Sampling
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """dx, dgamma and dbeta with the moments taken for constants."""
    given = [moments.mean, moments.variance, tf.zeros([0])]
    return fused_gradient(x, dy, gamma, given, sampling.epsilon, is_training=False)


def fused_gradient(
    x: tf.Tensor,
    dy: tf.Tensor,
    gamma: tf.Tensor,
    kept: list[tf.Tensor],
    epsilon: float,
    is_training: bool,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """dx, dgamma and dbeta, by tensors that the fused operation kept or by given moments."""
    axis = x.shape.rank - 1
    dx, dgamma, dbeta, *_ = tf.raw_ops.FusedBatchNormGradV3(
        y_backprop=as_images(dy, axis),
        x=as_images(x, axis),
        scale=gamma,
        reserve_space_1=kept[0],
        reserve_space_2=kept[1],
        reserve_space_3=kept[2],
        epsilon=epsilon,
        is_training=is_training,
    )
    return shaped_like(dx, x), dgamma, dbeta


def correction(
    dx: tf.Tensor,
    x: tf.Tensor,
    gamma: tf.Tensor,
    dgamma: tf.Tensor,
    dbeta: tf.Tensor,
    moments: Moments,
    sampling: Sampling,
    mask: None,
) -> tf.Tensor:
    """dx with the correction due in the sample, added in place."""
    channels = x.shape[-1]
    rows = _Rows.of(x, sampling)
    sample = tf.reshape(rows.taken(x), [-1, 1, 1, channels])
    weight = gamma_r_per_sample(gamma, moments, sampling.epsilon)
    # -weight (dbeta + xhat dgamma) is itself a normalisation of the sample.
    due = _fused_inference(
        sample,
        -weight * dgamma,
        -weight * dbeta,
        moments.mean,
        moments.variance,
        sampling.epsilon,
    )
    # Nothing else reads dx, so it may be changed where it lies.
    flat = tf.raw_ops.InplaceAdd(
        x=tf.reshape(dx, [-1, rows.width]),
        i=rows.numbers(x),
        v=tf.reshape(due, [-1, rows.width]),
    )
    return shaped_like(flat, x)


@dataclass(frozen=True)
class _Rows:
    """The sample as rows of memory: x seen as [N, rows of an example, width].

    Attributes:
        taken_rows: the numbers of those in the sample, within an example; int32.
        per_example: how many rows an example has.
        width: how many elements a row has.
    """

    taken_rows: tf.Tensor | np.ndarray
    per_example: Any
    width: Any

    @classmethod
    def of(cls, x: tf.Tensor, sampling: Sampling) -> _Rows:
        """Rows for the sample of x, channels last; as long as whole rows are taken."""
        sizes = sizes_of(x)
        spatial, strides = sizes[1:-1], sampling.strides
        strided = max((i + 1 for i, s in enumerate(strides) if s > 1), default=0)
        numbers: Any = np.zeros([1], np.int32)
        for size, stride in zip(spatial[:strided], strides, strict=False):
            along = tf.range(0, size, stride) if tf.is_tensor(size) else np.arange(0, size, stride)
            numbers = numbers[:, None] * size + along[None, :]
            numbers = tf.reshape(numbers, [-1]) if tf.is_tensor(numbers) else numbers.reshape(-1)
        return cls(
            tf.cast(numbers, tf.int32), product(spatial[:strided]), product(sizes[1 + strided :])
        )

    def taken(self, x: tf.Tensor) -> tf.Tensor:
        """The sample, [N, rows of it in an example, width]."""
        if isinstance(self.per_example, int) and self.per_example == 1:
            return x
        return tf.gather(
            tf.reshape(x, tf.stack([-1, self.per_example, self.width])), self.taken_rows, axis=1
        )

    def numbers(self, x: tf.Tensor) -> tf.Tensor:
        """The numbers of the rows of the sample in the whole batch."""
        first = tf.range(tf.shape(x)[0])[:, None] * self.per_example
        return tf.reshape(first + self.taken_rows[None, :], [-1])

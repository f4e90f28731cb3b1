"""Batch normalisation by statistics of a sample, with its exact gradient.

With S the sampled positions, |S| their number (over the whole batch), mu and var the mean and
the population variance of x over S, and r = 1 / sqrt(var + epsilon), the output is, everywhere,

    xhat = (x - mu) r          y = gamma xhat + beta

and the gradient, with sums over all positions,

    dbeta = sum dy             dgamma = sum dy xhat
    dx = gamma r dy            everywhere, and in S also
    dx -= gamma r / |S| (dbeta + xhat dgamma)

which is that of Ioffe and Szegedy (2015, section 3) where S is everything. A mask takes
positions out of S. Across replicas, |S|, mu and var are those of all replicas together, and so
are dbeta and dgamma in the last line.

Two forms compute the same. That of *kernels* moves few bytes through fused operations where they
exist: on the CPU or a GPU, channels last, in 16 or 32 bits. The *plain* form is arithmetic: for
all else, and for XLA, which fuses it itself and has no addition in place.

x is all that is kept for the gradient; the sample is taken again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.python.framework import config

from mbn_rewrite.errors import RewriteError
from mbn_rewrite.training.xla import will_be_compiled

_FUSED_DTYPES = (tf.float16, tf.bfloat16, tf.float32)


@dataclass(frozen=True)
class Moments:
    """Statistics of a sample, per channel, in float32 (float64 for such an input).

    Attributes:
        mean: shape [C].
        variance: the population variance, shape [C].
        count: how many positions they are of, a scalar.
    """

    mean: tf.Tensor
    variance: tf.Tensor
    count: tf.Tensor

    @property
    def unbiased_variance(self) -> tf.Tensor:
        """The variance with Bessel's correction, that of the fused operation."""
        return self.variance * (self.count / tf.maximum(self.count - 1, 1))


@dataclass(frozen=True)
class Sampling:
    """Where statistics are taken, and how the result is applied.

    Attributes:
        axis: that of the channels, from 0: 1 or the last.
        strides: one for each spatial axis; () for none.
        epsilon: what is added to the variance.
        synchronized: whether the statistics are those of all replicas together.
        depthwise: apply scale and shift by a depthwise 1x1 convolution.
    """

    axis: int
    strides: tuple[int, ...]
    epsilon: float
    synchronized: bool = False
    depthwise: bool = False


def normalize_by_sample(
    x: tf.Tensor,
    gamma: tf.Tensor,
    beta: tf.Tensor,
    sampling: Sampling,
    mask: tf.Tensor | None = None,
) -> tuple[tf.Tensor, Moments]:
    """Batch normalisation in training.

    Args:
        x: shape [N, ..., C] or [N, C, ...], of rank 2 to 5; float16, bfloat16, float32 or
            float64.
        gamma, beta: shape [C], float32 (float64 for such an input).
        sampling: where statistics are taken.
        mask: true where positions count, of shape [N, ...], without the channels; or None.

    Returns:
        y, of the shape and dtype of x, and the statistics, through which no gradient flows.
    """
    if _is_stock(x, sampling, mask):
        if not sampling.depthwise:
            return _stock(x, gamma, beta, sampling)
        if _by_kernels(x, sampling):
            return _stock_statistics(x, gamma, beta, sampling)

    @tf.custom_gradient
    def normalized(x: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor) -> Any:
        moments = _moments(x, sampling, mask)
        y = _applied(x, gamma, beta, moments, sampling)

        def gradient(dy: tf.Tensor, *_: tf.Tensor) -> tuple[tf.Tensor, ...]:
            if _by_kernels(x, sampling, mask):
                return _differentiated_by_kernels(x, dy, gamma, moments, sampling)
            return _gradient(x, dy, gamma, moments, sampling, mask)

        return (y, moments.mean, moments.variance, moments.count), gradient

    y, *statistics = normalized(x, gamma, beta)
    return y, Moments(*map(tf.stop_gradient, statistics))


def normalize(
    x: tf.Tensor,
    gamma: tf.Tensor,
    beta: tf.Tensor,
    mean: tf.Tensor,
    variance: tf.Tensor,
    sampling: Sampling,
) -> tf.Tensor:
    """Batch normalisation by given statistics, as at inference; see `normalize_by_sample`.

    It is one fused operation where there is one, which other tools know too, and whose gradient
    is TensorFlow's own.
    """
    moments = Moments(mean, variance, tf.ones([], mean.dtype))
    fused = x.dtype in _FUSED_DTYPES and sampling.axis == x.shape.rank - 1
    form = _kernel_normalized if fused else _plain_normalized
    return form(x, gamma, beta, moments, sampling)


# --------------------------------------------------------------------- choosing the form


def _by_kernels(x: tf.Tensor, sampling: Sampling, mask: tf.Tensor | None = None) -> bool:
    """Whether kernels can compute this, here and now."""
    fused = x.dtype in _FUSED_DTYPES and sampling.axis == x.shape.rank - 1 and mask is None
    # The gradient of the fused operation with given statistics refuses to be deterministic.
    return fused and not config.is_op_determinism_enabled() and not will_be_compiled()


def _moments(x: tf.Tensor, sampling: Sampling, mask: tf.Tensor | None) -> Moments:
    """The statistics of the sample, of all replicas where they are synchronized."""
    moments = (
        _kernel_moments(x, sampling)
        if _by_kernels(x, sampling, mask)
        else _plain_moments(x, sampling, mask)
    )
    return _of_all_replicas(moments) if sampling.synchronized else moments


def _applied(
    x: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor, moments: Moments, sampling: Sampling
) -> tf.Tensor:
    if not _by_kernels(x, sampling):
        return _plain_normalized(x, gamma, beta, moments, sampling)
    kernel = _kernel_depthwise if sampling.depthwise else _kernel_normalized
    return kernel(x, gamma, beta, moments, sampling)


def _gradient(
    x: tf.Tensor,
    dy: tf.Tensor,
    gamma: tf.Tensor,
    moments: Moments,
    sampling: Sampling,
    mask: tf.Tensor | None,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """dx, dgamma and dbeta; the latter two are of this replica alone."""
    by_kernels = _by_kernels(x, sampling, mask)
    everywhere = _kernel_gradient if by_kernels else _plain_gradient
    in_sample: Any = _kernel_correction if by_kernels else _plain_correction
    dx, dgamma, dbeta = everywhere(x, dy, gamma, moments, sampling)
    sums = [dgamma, dbeta]
    if sampling.synchronized:
        sums = tf.unstack(_summed_over_replicas(tf.stack(sums)))
    dx = in_sample(dx, x, gamma, *sums, moments, sampling, mask)
    return dx, dgamma, dbeta


def _differentiated_by_kernels(
    x: tf.Tensor, dy: tf.Tensor, gamma: tf.Tensor, moments: Moments, sampling: Sampling
) -> tuple[tf.Tensor, ...]:
    """The gradient, which refuses to be differentiated.

    The gradients that TensorFlow has of the kernels take the statistics for constants, which
    would make second derivatives wrong.
    """

    @tf.custom_gradient
    def once(x: tf.Tensor, dy: tf.Tensor, gamma: tf.Tensor) -> Any:
        def refuse(*_: tf.Tensor) -> None:
            raise RewriteError(
                "Batch normalisation by fused operations has no second derivative. It has one in "
                "float64, and after tf.config.experimental.enable_op_determinism()"
            )

        return _gradient(x, dy, gamma, moments, sampling, None), refuse

    return once(x, dy, gamma)


# ------------------------------------------------------------------ everything is sampled


def _is_stock(x: tf.Tensor, sampling: Sampling, mask: tf.Tensor | None) -> bool:
    """Whether the statistics and the gradient are those of TensorFlow's fused operation."""
    whole = max(sampling.strides, default=1) == 1 and mask is None
    return whole and not sampling.synchronized and x.dtype in _FUSED_DTYPES


def _stock(
    x: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor, sampling: Sampling
) -> tuple[tf.Tensor, Moments]:
    last = sampling.axis == x.shape.rank - 1
    y, moments, _ = _fused_training(
        _as_images(x, sampling.axis), gamma, beta, sampling.epsilon, "NHWC" if last else "NCHW"
    )
    statistics = map(tf.stop_gradient, (moments.mean, moments.variance, moments.count))
    return _shaped_like(y, x), Moments(*statistics)


def _stock_statistics(
    x: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor, sampling: Sampling
) -> tuple[tf.Tensor, Moments]:
    """The fused operation's statistics and gradient, around an output of another operation."""
    axis = x.shape.rank - 1

    @tf.custom_gradient
    def normalized(x: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor) -> Any:
        _, moments, kept = _fused_training(_as_images(x, axis), gamma, beta, sampling.epsilon)

        def gradient(dy: tf.Tensor, *_: tf.Tensor) -> tuple[tf.Tensor, ...]:
            return _fused_gradient(x, dy, gamma, kept, sampling.epsilon, is_training=True)

        y = _kernel_depthwise(x, gamma, beta, moments, sampling)
        return (y, moments.mean, moments.variance, moments.count), gradient

    y, *statistics = normalized(x, gamma, beta)
    return y, Moments(*map(tf.stop_gradient, statistics))


def _fused_training(
    images: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor, epsilon: float, layout: str = "NHWC"
) -> tuple[tf.Tensor, Moments, list[tf.Tensor]]:
    """y, the statistics of all positions, and what the operation keeps for its gradient."""
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
    # What it keeps differs between devices: a variance, or its inverse root.
    variance = unbiased * (tf.maximum(count - 1, 0) / tf.maximum(count, 1))
    return y, Moments(mean, variance, count), kept


# ------------------------------------------------------------------------------- kernels


def _kernel_moments(x: tf.Tensor, sampling: Sampling) -> Moments:
    channels = x.shape[-1]
    sample = tf.reshape(_Rows.of(x, sampling).taken(x), [-1, 1, 1, channels])
    one, zero = tf.ones([channels]), tf.zeros([channels])
    return _fused_training(sample, one, zero, sampling.epsilon)[1]


def _kernel_normalized(
    x: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor, moments: Moments, sampling: Sampling
) -> tf.Tensor:
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
        x=_as_images(x, x.shape.rank - 1),
        scale=gamma,
        offset=beta,
        mean=mean,
        variance=variance,
        epsilon=epsilon,
        is_training=False,
    )
    return _shaped_like(y, x)


def _kernel_depthwise(
    x: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor, moments: Moments, sampling: Sampling
) -> tf.Tensor:
    scale, shift = _scale_and_shift(gamma, beta, moments, sampling.epsilon)
    kernel = tf.cast(tf.reshape(scale, [1, 1, -1, 1]), x.dtype)
    images = _as_images(x, x.shape.rank - 1)
    y = tf.nn.depthwise_conv2d(images, kernel, [1, 1, 1, 1], "VALID")
    return _shaped_like(tf.nn.bias_add(y, tf.cast(shift, x.dtype)), x)


def _kernel_gradient(
    x: tf.Tensor, dy: tf.Tensor, gamma: tf.Tensor, moments: Moments, sampling: Sampling
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    given = [moments.mean, moments.variance, tf.zeros([0])]
    return _fused_gradient(x, dy, gamma, given, sampling.epsilon, is_training=False)


def _fused_gradient(
    x: tf.Tensor,
    dy: tf.Tensor,
    gamma: tf.Tensor,
    kept: list[tf.Tensor],
    epsilon: float,
    is_training: bool,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """dx, dgamma and dbeta, from what the fused operation kept, or from given statistics."""
    axis = x.shape.rank - 1
    dx, dgamma, dbeta, *_ = tf.raw_ops.FusedBatchNormGradV3(
        y_backprop=_as_images(dy, axis),
        x=_as_images(x, axis),
        scale=gamma,
        reserve_space_1=kept[0],
        reserve_space_2=kept[1],
        reserve_space_3=kept[2],
        epsilon=epsilon,
        is_training=is_training,
    )
    return _shaped_like(dx, x), dgamma, dbeta


def _kernel_correction(
    dx: tf.Tensor,
    x: tf.Tensor,
    gamma: tf.Tensor,
    dgamma: tf.Tensor,
    dbeta: tf.Tensor,
    moments: Moments,
    sampling: Sampling,
    mask: None,
) -> tf.Tensor:
    """Adds what the sample is due to dx, in place."""
    channels = x.shape[-1]
    rows = _Rows.of(x, sampling)
    sample = tf.reshape(rows.taken(x), [-1, 1, 1, channels])
    weight = _weight(gamma, moments, sampling.epsilon)
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
    return _shaped_like(flat, x)


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
        sizes = _sizes(x)
        spatial, strides = sizes[1:-1], sampling.strides
        strided = max((i + 1 for i, s in enumerate(strides) if s > 1), default=0)
        numbers: Any = np.zeros([1], np.int32)
        for size, stride in zip(spatial[:strided], strides, strict=False):
            along = tf.range(0, size, stride) if tf.is_tensor(size) else np.arange(0, size, stride)
            numbers = numbers[:, None] * size + along[None, :]
            numbers = tf.reshape(numbers, [-1]) if tf.is_tensor(numbers) else numbers.reshape(-1)
        return cls(
            tf.cast(numbers, tf.int32), _product(spatial[:strided]), _product(sizes[1 + strided :])
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


# --------------------------------------------------------------------------------- plain


def _plain_moments(x: tf.Tensor, sampling: Sampling, mask: tf.Tensor | None) -> Moments:
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


def _plain_normalized(
    x: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor, moments: Moments, sampling: Sampling
) -> tf.Tensor:
    wide, axis = _widened(x), sampling.axis
    slope = _slope(gamma, moments, sampling.epsilon)
    centred = wide - _along(moments.mean, axis, x)
    return tf.cast(centred * _along(slope, axis, x) + _along(beta, axis, x), x.dtype)


def _plain_gradient(
    x: tf.Tensor, dy: tf.Tensor, gamma: tf.Tensor, moments: Moments, sampling: Sampling
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    axis, axes = sampling.axis, _all_but(sampling.axis, x)
    inverse = tf.math.rsqrt(moments.variance + sampling.epsilon)
    wide = _widened(dy)
    centred = _widened(x) - _along(moments.mean, axis, x)
    dgamma = tf.reduce_sum(wide * centred, axes) * inverse
    return wide * _along(gamma * inverse, axis, x), dgamma, tf.reduce_sum(wide, axes)


def _plain_correction(
    dx: tf.Tensor,
    x: tf.Tensor,
    gamma: tf.Tensor,
    dgamma: tf.Tensor,
    dbeta: tf.Tensor,
    moments: Moments,
    sampling: Sampling,
    mask: tf.Tensor | None,
) -> tf.Tensor:
    axis = sampling.axis
    inverse = tf.math.rsqrt(moments.variance + sampling.epsilon)
    weight = _weight(gamma, moments, sampling.epsilon)
    centred = _widened(_sampled(x, sampling)) - _along(moments.mean, axis, x)
    due = _along(weight * dbeta, axis, x) + centred * _along(weight * inverse * dgamma, axis, x)
    if mask is not None:
        due *= tf.cast(_sampled(_mask_like(mask, x, sampling), sampling), due.dtype)
    return tf.cast(_widened(dx) - _spread(due, x, sampling), x.dtype)


def _slices(x: tf.Tensor, sampling: Sampling) -> list[int]:
    """The stride along every axis of x."""
    strides = list(sampling.strides)
    return [1, *strides, 1] if sampling.axis == x.shape.rank - 1 else [1, 1, *strides]


def _sampled(x: tf.Tensor, sampling: Sampling) -> tf.Tensor:
    steps = _slices(x, sampling)
    return x[tuple(slice(None, None, step) for step in steps)] if max(steps) > 1 else x


def _spread(sample: tf.Tensor, x: tf.Tensor, sampling: Sampling) -> tf.Tensor:
    """A tensor of x's shape with the sample in its places, and zeros elsewhere."""
    steps = _slices(x, sampling)
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
    shape = [1 if i == sampling.axis else size for i, size in enumerate(_sizes(x))]
    return tf.broadcast_to(mask, tf.stack(shape))


def _widened(x: tf.Tensor) -> tf.Tensor:
    return tf.cast(x, tf.float32) if x.dtype.size == 2 else x


def _all_but(axis: int, x: tf.Tensor) -> list[int]:
    return [i for i in range(x.shape.rank) if i != axis]


def _along(vector: tf.Tensor, axis: int, x: tf.Tensor) -> tf.Tensor:
    """A vector as a tensor that broadcasts along an axis of x."""
    return tf.reshape(vector, [-1 if i == axis else 1 for i in range(x.shape.rank)])


# -------------------------------------------------------------------------------- helpers


def _scale_and_shift(
    gamma: tf.Tensor, beta: tf.Tensor, moments: Moments, epsilon: float
) -> tuple[tf.Tensor, tf.Tensor]:
    scale = _slope(gamma, moments, epsilon)
    return scale, beta - moments.mean * scale


def _weight(gamma: tf.Tensor, moments: Moments, epsilon: float) -> tf.Tensor:
    """gamma r / |S|."""
    return tf.math.divide_no_nan(_slope(gamma, moments, epsilon), moments.count)


def _slope(gamma: tf.Tensor, moments: Moments, epsilon: float) -> tf.Tensor:
    """gamma r."""
    return gamma * tf.math.rsqrt(moments.variance + epsilon)


def _of_all_replicas(moments: Moments) -> Moments:
    """The statistics of all replicas together, by one sum over them.

    Sums of squares are taken about 0, as no replica knows another's mean beforehand.
    """
    if _replicas() == 1:
        return moments
    mean, variance, count = moments.mean, moments.variance, moments.count
    squares = count * (variance + tf.square(mean))
    packed = tf.concat([count * mean, squares, [count]], axis=0)
    sums = _summed_over_replicas(packed)
    channels = mean.shape[0]
    count = sums[-1]
    mean = tf.math.divide_no_nan(sums[:channels], count)
    squares = tf.math.divide_no_nan(sums[channels : 2 * channels], count)
    return Moments(mean, tf.maximum(squares - tf.square(mean), 0), count)


def _replicas() -> int:
    context = tf.distribute.get_replica_context()
    return 1 if context is None else int(context.num_replicas_in_sync)


def _summed_over_replicas(tensor: tf.Tensor) -> tf.Tensor:
    if _replicas() == 1:
        return tensor
    context = tf.distribute.get_replica_context()
    return context.all_reduce(tf.distribute.ReduceOp.SUM, tensor)


def _as_images(x: tf.Tensor, axis: int) -> tf.Tensor:
    """x in rank 4, with its channels where they were: last or at 1."""
    rank = x.shape.rank
    if rank == 4:
        return x
    sizes = _sizes(x)
    if axis == rank - 1:
        shape = [-1, *sizes[2:]] if rank == 5 else [-1, *sizes[1:-1], *[1] * (4 - rank), sizes[-1]]
    else:
        shape = [-1, sizes[1], _product(sizes[2:]), 1]
    return tf.reshape(x, tf.stack(shape))


def _shaped_like(y: tf.Tensor, x: tf.Tensor) -> tf.Tensor:
    if y.shape.rank != x.shape.rank or not x.shape.is_fully_defined():
        y = tf.reshape(y, tf.shape(x))
    y.set_shape(x.shape)
    return y


def _sizes(x: tf.Tensor) -> list[Any]:
    """Sizes as ints where they are known, as scalars where they are not."""
    dynamic = tf.shape(x)
    return [dynamic[i] if size is None else size for i, size in enumerate(x.shape.as_list())]


def _product(sizes: list[Any]) -> Any:
    product: Any = 1
    for size in sizes:
        product = product * size
    return product

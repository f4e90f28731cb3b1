"""Batch normalisation by statistics of a sample, with its exact gradient, on TensorFlow.

Two forms compute the same. The *kernel* form moves few bytes, through fused operations where there
are any: on the CPU or a GPU, channels last, in 16 or 32 bits. The *plain* form is arithmetic, for
everything else and for XLA, which fuses it itself and has no in-place addition.
"""

from __future__ import annotations

from enum import Enum
from typing import Any

import tensorflow as tf
from tensorflow.python.framework import config

from mbn_rewrite.errors import RewriteError
from mbn_rewrite.training.sampling import Moments, Sampling
from mbn_rewrite.training.tensorflow import kernel_form, plain_form
from mbn_rewrite.training.tensorflow.image_shapes import as_images, shaped_like
from mbn_rewrite.training.tensorflow.kernel_form import FUSED_DTYPES, fused_gradient, fused_training
from mbn_rewrite.training.tensorflow.moments import of_all_replicas, summed_over_replicas
from mbn_rewrite.training.tensorflow.xla import will_be_compiled


def normalize_by_sample(
    x: tf.Tensor,
    gamma: tf.Tensor,
    beta: tf.Tensor,
    sampling: Sampling,
    mask: tf.Tensor | None = None,
) -> tuple[tf.Tensor, Moments]:
    """See `backends.Backend`."""
    form = _form(x, sampling, mask)
    if form is _Form.STOCK:
        return _stock(x, gamma, beta, sampling)
    if form is _Form.STOCK_STATISTICS:
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
    """See `backends.Backend`.

    It is one fused operation where there is one, which other tools know too, and whose gradient
    is TensorFlow's own.
    """
    moments = Moments(mean, variance, tf.ones([], mean.dtype))
    form = kernel_form.normalized if _has_kernels(x, sampling) else plain_form.normalized
    return form(x, gamma, beta, moments, sampling)


def implementation(
    x: tf.Tensor, sampling: Sampling, mask: tf.Tensor | None = None, *, training: bool
) -> str:
    """See `backends.Backend`."""
    if training:
        return _form(x, sampling, mask).value
    return _Form.INFERENCE.value if _has_kernels(x, sampling) else _Form.PLAIN.value


def check_input(x: Any, moving_mean: Any, label: str) -> None:
    """See `backends.Backend`."""
    if isinstance(x, (tf.RaggedTensor, tf.SparseTensor)):
        raise RewriteError(
            f"{label} was given a {type(x).__name__}. Dense tensors are needed: "
            "call its to_tensor(), or tf.sparse.to_dense, before this layer"
        )


def check_synchronized(label: str) -> None:
    """See `backends.Backend`; without a distribution strategy there is one replica."""


# --------------------------------------------------------------------- choosing the form


class _Form(Enum):
    """What may run, in words."""

    STOCK = "FusedBatchNormV3, with its own gradient"
    STOCK_STATISTICS = "FusedBatchNormV3's statistics and gradient, DepthwiseConv2dNative"
    KERNELS = "FusedBatchNormV3 of the sample and of everything, FusedBatchNormGradV3, InplaceAdd"
    DEPTHWISE = (
        "FusedBatchNormV3 of the sample, DepthwiseConv2dNative, FusedBatchNormGradV3, InplaceAdd"
    )
    PLAIN = "arithmetic"
    INFERENCE = "FusedBatchNormV3, by given statistics"


def _form(x: tf.Tensor, sampling: Sampling, mask: tf.Tensor | None) -> _Form:
    by_kernels = _by_kernels(x, sampling, mask)
    if _is_stock(x, sampling, mask):
        if not sampling.depthwise:
            return _Form.STOCK
        if by_kernels:
            return _Form.STOCK_STATISTICS
    if not by_kernels:
        return _Form.PLAIN
    return _Form.DEPTHWISE if sampling.depthwise else _Form.KERNELS


def _has_kernels(x: tf.Tensor, sampling: Sampling) -> bool:
    return x.dtype in FUSED_DTYPES and sampling.axis == x.shape.rank - 1


def _by_kernels(x: tf.Tensor, sampling: Sampling, mask: tf.Tensor | None = None) -> bool:
    """Whether kernels can compute this, here and now."""
    fused = _has_kernels(x, sampling) and mask is None
    # The gradient of the fused operation with given statistics refuses to be deterministic.
    return fused and not config.is_op_determinism_enabled() and not will_be_compiled()


def _moments(x: tf.Tensor, sampling: Sampling, mask: tf.Tensor | None) -> Moments:
    """The statistics of the sample, of all replicas where they are synchronized."""
    if _by_kernels(x, sampling, mask):
        moments = kernel_form.sample_moments(x, sampling)
    elif mask is None and will_be_compiled():
        moments = plain_form.sample_moments_at_once(x, sampling)
    else:
        moments = plain_form.sample_moments(x, sampling, mask)
    return of_all_replicas(moments) if sampling.synchronized else moments


def _applied(
    x: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor, moments: Moments, sampling: Sampling
) -> tf.Tensor:
    if not _by_kernels(x, sampling):
        return plain_form.normalized(x, gamma, beta, moments, sampling)
    kernel = kernel_form.depthwise if sampling.depthwise else kernel_form.normalized
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
    everywhere = kernel_form.gradient if by_kernels else plain_form.gradient
    in_sample: Any = kernel_form.correction if by_kernels else plain_form.correction
    dx, dgamma, dbeta = everywhere(x, dy, gamma, moments, sampling)
    sums = [dgamma, dbeta]
    if sampling.synchronized:
        sums = tf.unstack(summed_over_replicas(tf.stack(sums)))
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
    """Whether the statistics and the gradient are those of TensorFlow's fused operation.

    XLA would make arithmetic of it, with the variance as E[x^2] - E[x]^2, which may cancel.
    """
    whole = sampling.everything and mask is None and not sampling.synchronized
    return whole and x.dtype in FUSED_DTYPES and not will_be_compiled()


def _stock(
    x: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor, sampling: Sampling
) -> tuple[tf.Tensor, Moments]:
    last = sampling.axis == x.shape.rank - 1
    y, moments, _ = fused_training(
        as_images(x, sampling.axis), gamma, beta, sampling.epsilon, "NHWC" if last else "NCHW"
    )
    statistics = map(tf.stop_gradient, (moments.mean, moments.variance, moments.count))
    return shaped_like(y, x), Moments(*statistics)


def _stock_statistics(
    x: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor, sampling: Sampling
) -> tuple[tf.Tensor, Moments]:
    """The fused operation's statistics and gradient, around an output of another operation."""
    axis = x.shape.rank - 1

    @tf.custom_gradient
    def normalized(x: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor) -> Any:
        _, moments, kept = fused_training(as_images(x, axis), gamma, beta, sampling.epsilon)

        def gradient(dy: tf.Tensor, *_: tf.Tensor) -> tuple[tf.Tensor, ...]:
            return fused_gradient(x, dy, gamma, kept, sampling.epsilon, is_training=True)

        y = kernel_form.depthwise(x, gamma, beta, moments, sampling)
        return (y, moments.mean, moments.variance, moments.count), gradient

    y, *statistics = normalized(x, gamma, beta)
    return y, Moments(*map(tf.stop_gradient, statistics))


# --------------------------------------------------------------------------------- plain

"""Training layers with statistics of a sample: the part that tf_keras and Keras 3 share.

A layer of one Keras cannot be used in the other, so each has its own pair of classes, derived
from its own BatchNormalization. The two classes here hold what the pairs share, and are the public
names: calling one of them gives a layer of the Keras that is in use. The mathematics is that of
`training.backends`.

Nothing here loads Keras or a backend.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

from mbn_rewrite.errors import RewriteError
from mbn_rewrite.training import backends, strides
from mbn_rewrite.training.backends import Backend, Tensor
from mbn_rewrite.training.sampling import Moments, Sampling


class _SampledBatchNormalization:
    """Mixin before a BatchNormalization in a class's bases: statistics of a sample."""

    _DEPTHWISE = False

    # Of each Keras: what has its `convert_to_tensor`, `cast`, `reshape`, `ones` and `zeros`, and
    # the name of its backend.
    _ops: Any
    _backend_name: Callable[[], str]

    # Attributes of the BatchNormalization that follows in the bases.
    name: str
    axis: Any
    epsilon: float
    scale: bool
    center: bool
    synchronized: bool
    gamma: Any
    beta: Any
    moving_mean: Any
    moving_variance: Any
    compute_dtype: str

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        if cls.__module__ == __name__:
            cls = getattr(_module_of_keras_in_use(), cls.__name__)
        elif not hasattr(cls, "call"):
            modules = " or ".join(_MODULES.values())
            raise RewriteError(
                f"{cls.__name__} is no layer: derive it from the class of one Keras, in {modules}"
            )
        return super().__new__(cls, *args, **kwargs)

    def __init__(
        self,
        stride: int | tuple[int, int] = strides.DEFAULT_STRIDE,
        *,
        min_samples: int = strides.MIN_SAMPLES,
        **kwargs: Any,
    ) -> None:
        stride = strides.checked(stride)
        min_samples = strides.checked_min_samples(min_samples)
        for name in ("renorm", "virtual_batch_size", "adjustment"):
            if kwargs.get(name):
                raise RewriteError(
                    f"{type(self).__name__} has no {name}. Where it is needed, keep "
                    "BatchNormalization"
                )
        backends.named(type(self)._backend_name(), type(self).__name__)  # which may refuse
        super().__init__(**kwargs)
        self.stride = stride
        self.min_samples = min_samples
        self._implementation: str | None = None
        # Set by build, from the axis and the shape of the input.
        self._channel_axis = -1
        self._built_for: tuple[int | None, ...] = ()

    @property
    def implementation(self) -> str | None:
        """What the last call of the layer ran, or traced, in words; None before the first."""
        return self._implementation

    @property
    def strides(self) -> tuple[int, ...]:
        """The stride along each spatial axis, for inputs of the shape it was built for."""
        return self._strides_for(tuple(self._built_for))

    def _strides_for(self, shape: tuple[int | None, ...]) -> tuple[int, ...]:
        """The stride along each spatial axis, lowered where inputs of this shape are small."""
        sizes = [size for i, size in enumerate(shape) if i not in (0, self._channel_axis)]
        along = strides.along_axes(_plain(self.stride), len(sizes))
        return strides.lowered(along, sizes, self.min_samples)

    def _prepare(self, shape: tuple[int | None, ...]) -> None:
        """Settles the axis for an input shape.

        Raises:
            RewriteError: the layer cannot serve the axis or the rank.
        """
        rank = len(shape)
        if not 2 <= rank <= 5:
            raise RewriteError(
                f"{self._label} takes inputs of rank 2 to 5; it was given one of shape {shape}"
            )
        axes = list(self.axis) if isinstance(self.axis, (list, tuple)) else [self.axis]
        if len(axes) != 1 or axes[0] not in (1, rank - 1, -1, 1 - rank):
            raise RewriteError(
                f"{self._label} normalises along one axis, 1 or the last; it was given "
                f"{self.axis} for an input of shape {shape}"
            )
        channel_axis = axes[0] % rank
        if shape[channel_axis] is None:
            raise RewriteError(
                f"{self._label} needs to know how many channels there are; axis {channel_axis} of "
                f"its input of shape {shape} is open"
            )
        self._channel_axis = channel_axis
        self._built_for = shape

    @property
    def _backend(self) -> Backend:
        return backends.named(type(self)._backend_name(), type(self).__name__)

    @property
    def _label(self) -> str:
        return f"{type(self).__name__} '{self.name}'"

    def _sampling(self, inputs: Tensor) -> Sampling:
        return Sampling(
            axis=self._channel_axis,
            strides=self._strides_for(tuple(inputs.shape)),
            epsilon=self.epsilon,
            synchronized=bool(self.synchronized),
            depthwise=self._DEPTHWISE,
        )

    def _affine_weights(self) -> tuple[Any, Any]:
        return self.gamma, self.beta

    def _by_sample(self, inputs: Tensor, mask: Any) -> tuple[Tensor, Moments]:
        """The output in training, and the statistics of the batch."""
        if self.synchronized:
            self._backend.check_synchronized(self._label)
        sampling = self._sampling(inputs)
        self._implementation = self._backend.implementation(inputs, sampling, mask, training=True)
        gamma, beta = self._scale_and_offset()
        return self._backend.normalize_by_sample(inputs, gamma, beta, sampling, mask)

    def _by_moving_statistics(self, inputs: Tensor) -> Tensor:
        """The output at inference."""
        sampling = self._sampling(inputs)
        self._implementation = self._backend.implementation(inputs, sampling, training=False)
        statistics = (self.moving_mean, self.moving_variance)
        mean, variance = (self._vector(statistic) for statistic in statistics)
        gamma, beta = self._scale_and_offset()
        return self._backend.normalize(inputs, gamma, beta, mean, variance, sampling)

    def _scale_and_offset(self) -> tuple[Tensor, Tensor]:
        """Gamma and beta, or the weights in their place, as tensors of shape [C]."""
        gamma, beta = self._affine_weights()
        channels = tuple(self.moving_mean.shape)
        return (
            self._ops.ones(channels, self._wide) if gamma is None else self._vector(gamma),
            self._ops.zeros(channels, self._wide) if beta is None else self._vector(beta),
        )

    def _vector(self, weight: Any) -> Tensor:
        tensor = self._ops.convert_to_tensor(weight)
        return self._ops.cast(self._ops.reshape(tensor, [-1]), self._wide)

    @property
    def _wide(self) -> str:
        """The dtype of statistics."""
        return "float64" if self.compute_dtype == "float64" else "float32"

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        """A layer from its configuration; of the Keras in use, if asked of the public name."""
        if cls.__module__ == __name__:
            return getattr(_module_of_keras_in_use(), cls.__name__).from_config(config)
        return super().from_config(config)  # type: ignore[misc]

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),  # type: ignore[misc]
            "stride": _plain(self.stride),
            "min_samples": self.min_samples,
            "synchronized": self.synchronized,
        }


class StridedBatchNormalization(_SampledBatchNormalization):
    """BatchNormalization whose statistics, in training, are those of every stride-th position.

    Mean and variance are taken over x[:, ::s, ::s, :], the output is computed everywhere, and the
    gradient is the exact one of just that (see `training.backends`). At inference it is a
    BatchNormalization, and its weights are those of one. With stride 1 it is exact in training
    too, and runs the fused operation, which BatchNormalization of Keras 3 does not.

    Args:
        stride: a positive int, for every spatial axis, or a pair (rows, columns). (s, 1) samples
            whole rows, which lie together in memory. Inputs of rank 3 take the rows' stride, of
            rank 5 both, along their last two spatial axes; inputs of rank 2 have nothing to
            stride over.
        min_samples: the stride is lowered for inputs of which fewer positions of each example
            would be sampled, and to 1 where the sample would then be more than a fifth of all.
            In a graph whose inputs leave their sizes open it stays as it is.
        **kwargs: as for BatchNormalization: `axis` (that of the channels, the last or 1),
            `synchronized` (take the statistics over all replicas: on TensorFlow under
            tf.distribute, on JAX under keras.distribution, on torch not at all), `momentum`,
            `epsilon`, `center`, `scale`, initializers, regularizers, constraints, `trainable`,
            `name` and `dtype`.

    Input: rank 2 to 5, dense; float16, bfloat16, float32 (fused operations) or float64 (not
        fused). Output: the same shape, in the layer's compute dtype.

    The moving variance follows the BatchNormalization of the same Keras: with Bessel's
    correction in tf_keras where that is fused (rank 4 and 5), the population variance elsewhere.
    Where a channel has one position in a whole batch, its variance is 0 and its output beta. A
    batch of no examples leaves the moving statistics as they are. Masks are used as by the
    BatchNormalization of the same Keras; tf_keras ignores them in rank 4 and 5.

    Raises:
        RewriteError: the stride is not positive or not whole, the axis or the input cannot be
            served, or Keras 3 runs on another backend than TensorFlow, JAX and torch.
    """


class ModifiedBatchNormalization(_SampledBatchNormalization):
    """`StridedBatchNormalization` with a trainable depthwise 1x1 convolution as scale and shift.

    Weights: `depthwise_kernel`, of shape [1, 1, C, 1], where `scale`, and `bias`, of shape [C],
    where `center`; they have the initializers, regularizers and constraints named for gamma and
    beta. Mean and variance of the sample are folded into both, so that one depthwise convolution
    and one addition normalise, scale and shift in training (multiplication and addition under XLA,
    for channels first and in float64, where TensorFlow has no such convolution). At inference
    it is a BatchNormalization. Arguments, input, output and errors are those of
    `StridedBatchNormalization`.

    The idea is that of the study Modified Batch Normalization (2019-2020).
    """

    _DEPTHWISE = True

    # Arguments for `add_weight` of this Keras that keep the weight from being cast.
    _weight_options: Callable[[], dict[str, Any]]

    def build(self, input_shape: Any) -> None:
        scale, center = self.scale, self.center
        self.scale = self.center = False  # so that neither gamma nor beta is made
        super().build(input_shape)  # type: ignore[misc]
        self.scale, self.center = scale, center
        (channels,) = self.moving_mean.shape
        kernel_shape = (1, 1, channels, 1)
        self.depthwise_kernel = (
            self._made("depthwise_kernel", kernel_shape, "gamma") if scale else None
        )
        self.bias = self._made("bias", (channels,), "beta") if center else None

    def _made(self, name: str, shape: tuple[int, ...], like: str) -> Any:
        """A weight with the initializer, regularizer and constraint of another."""
        return self.add_weight(  # type: ignore[attr-defined]
            name=name,
            shape=shape,
            initializer=getattr(self, f"{like}_initializer"),
            regularizer=_of_channels(getattr(self, f"{like}_regularizer"), self._ops),
            constraint=_of_channels(getattr(self, f"{like}_constraint"), self._ops),
            **self._weight_options(),
        )

    def _affine_weights(self) -> tuple[Any, Any]:
        return self.depthwise_kernel, self.bias


# ---------------------------------------------------------------------- the Keras in use

_MODULES = {
    "tf_keras": "mbn_rewrite.frontends.tf_keras.training_layers",
    "keras": "mbn_rewrite.frontends.keras3.training_layers",
}


def _module_of_keras_in_use() -> Any:
    """The module with the layers of tf_keras, or of Keras 3 where that alone is loaded."""
    only_keras_3 = "keras" in sys.modules and "tf_keras" not in sys.modules
    return importlib.import_module(_MODULES["keras" if only_keras_3 else "tf_keras"])


# ------------------------------------------------------------------------------- helpers


def _plain(stride: Any) -> strides.Stride:
    """A stride without the wrapper that Keras puts around what its layers hold."""
    return stride if isinstance(stride, int) else (stride[0], stride[1])


def _of_channels(function: Any, ops: Any) -> Any:
    """A regularizer or constraint of vectors, for weights that are vectors in more dimensions."""
    if function is None:
        return None

    def applied(weight: Any) -> Any:
        result = function(ops.reshape(ops.convert_to_tensor(weight), [-1]))
        return ops.reshape(result, tuple(weight.shape)) if len(result.shape) else result

    return applied

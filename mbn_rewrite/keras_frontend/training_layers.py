"""The training layers for Keras 3 on TensorFlow; see `mbn_rewrite.training_layers`."""

from __future__ import annotations

from typing import Any

import keras

from mbn_rewrite import training_layers
from mbn_rewrite.errors import RewriteError


class _KerasLayer(keras.layers.BatchNormalization):
    """What the two layers add to the BatchNormalization of Keras 3."""

    def __init__(self, **kwargs: Any) -> None:
        backend = keras.backend.backend()
        if backend != "tensorflow":
            raise RewriteError(
                f"{type(self).__name__} needs Keras 3 on TensorFlow; it runs on {backend}. Set "
                "KERAS_BACKEND=tensorflow before Keras is imported"
            )
        super().__init__(**kwargs)

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        self._prepare(self.axis, tuple(input_shape))
        super().build(input_shape)

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
        self._check_dense(inputs)
        if not training or not self.trainable:
            return self._by_moving_statistics(inputs)
        outputs, moments = self._by_sample(inputs, mask)
        self._move(self.moving_mean, moments.mean, moments.count)
        self._move(self.moving_variance, moments.variance, moments.count)
        return outputs

    def _move(self, moving: Any, value: Any, count: Any) -> None:
        """Moves a statistic towards that of a batch, unless the batch was empty."""
        value = keras.ops.cast(value, moving.dtype)
        moved = moving * self.momentum + value * (1.0 - self.momentum)
        moving.assign(keras.ops.where(count > 0, moved, moving))


@keras.saving.register_keras_serializable(package="mbn_rewrite")
class StridedBatchNormalization(training_layers.StridedBatchNormalization, _KerasLayer):
    __doc__ = training_layers.StridedBatchNormalization.__doc__


@keras.saving.register_keras_serializable(package="mbn_rewrite")
class ModifiedBatchNormalization(training_layers.ModifiedBatchNormalization, _KerasLayer):
    __doc__ = training_layers.ModifiedBatchNormalization.__doc__

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        scale, center = self.scale, self.center
        self.scale = self.center = False  # so that neither gamma nor beta is made
        super().build(input_shape)
        self.scale, self.center = scale, center
        (channels,) = self.moving_mean.shape
        self.depthwise_kernel = self._weight(
            scale, "depthwise_kernel", (1, 1, channels, 1), "gamma"
        )
        self.bias = self._weight(center, "bias", (channels,), "beta")

    def _weight(self, wanted: bool, name: str, shape: tuple[int, ...], like: str) -> Any:
        if not wanted:
            return None
        return self.add_weight(
            name=name,
            shape=shape,
            initializer=getattr(self, f"{like}_initializer"),
            regularizer=getattr(self, f"{like}_regularizer"),
            constraint=getattr(self, f"{like}_constraint"),
            autocast=False,
        )

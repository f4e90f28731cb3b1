"""The training layers for Keras 3 on TensorFlow; see `mbn_rewrite.training.layers`."""

from __future__ import annotations

from typing import Any

import keras

from mbn_rewrite.errors import RewriteError
from mbn_rewrite.training import layers


class _Keras3Layer(keras.layers.BatchNormalization):
    """Part of both layers that is specific to the BatchNormalization of Keras 3."""

    def __init__(self, **kwargs: Any) -> None:
        backend = keras.backend.backend()
        if backend != "tensorflow":
            raise RewriteError(
                f"{type(self).__name__} needs Keras 3 on TensorFlow; it runs on {backend}. Set "
                "KERAS_BACKEND=tensorflow before Keras is imported"
            )
        super().__init__(**kwargs)

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        self._prepare(tuple(input_shape))
        super().build(input_shape)

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
        self._check_dense(inputs)
        inputs = keras.ops.cast(inputs, self.compute_dtype)
        if not training or not self.trainable:
            return self._by_moving_statistics(inputs)
        outputs, moments = self._by_sample(inputs, mask)
        self._move(self.moving_mean, moments.mean, moments.count)
        self._move(self.moving_variance, moments.variance, moments.count)
        return outputs

    def _weight_options(self) -> dict[str, Any]:
        return {"autocast": False}

    def _move(self, moving: Any, value: Any, count: Any) -> None:
        """Moves a statistic towards that of a batch, unless the batch is empty."""
        value = keras.ops.cast(value, moving.dtype)
        moved = moving * self.momentum + value * (1.0 - self.momentum)
        moving.assign(keras.ops.where(count > 0, moved, moving))


@keras.saving.register_keras_serializable(package="mbn_rewrite")
class StridedBatchNormalization(layers.StridedBatchNormalization, _Keras3Layer):
    """See `mbn_rewrite.training.layers.StridedBatchNormalization`."""


@keras.saving.register_keras_serializable(package="mbn_rewrite")
class ModifiedBatchNormalization(layers.ModifiedBatchNormalization, _Keras3Layer):
    """See `mbn_rewrite.training.layers.ModifiedBatchNormalization`."""

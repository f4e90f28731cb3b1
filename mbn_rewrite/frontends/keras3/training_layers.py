"""The training layers for Keras 3, on any of the backends; see `mbn_rewrite.training.layers`."""

from __future__ import annotations

from typing import Any

import keras

from mbn_rewrite.training import layers


class _Keras3Layer(keras.layers.BatchNormalization):
    """Part of both layers that is specific to the BatchNormalization of Keras 3."""

    _ops = keras.ops

    def __init__(self, *, synchronized: bool = False, **kwargs: Any) -> None:
        # The BatchNormalization of Keras refuses it on other backends than TensorFlow.
        super().__init__(**kwargs)
        self.synchronized = synchronized

    @staticmethod
    def _backend_name() -> str:
        return str(keras.backend.backend())

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        self._prepare(tuple(input_shape))
        super().build(input_shape)

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
        self._backend.check_input(inputs, self.moving_mean, self._label)
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
        old = keras.ops.convert_to_tensor(moving)
        value = keras.ops.cast(value, moving.dtype)
        moved = old * self.momentum + value * (1.0 - self.momentum)
        moving.assign(keras.ops.where(count > 0, moved, old))


@keras.saving.register_keras_serializable(package="mbn_rewrite")
class StridedBatchNormalization(layers.StridedBatchNormalization, _Keras3Layer):
    """See `mbn_rewrite.training.layers.StridedBatchNormalization`."""


@keras.saving.register_keras_serializable(package="mbn_rewrite")
class ModifiedBatchNormalization(layers.ModifiedBatchNormalization, _Keras3Layer):
    """See `mbn_rewrite.training.layers.ModifiedBatchNormalization`."""

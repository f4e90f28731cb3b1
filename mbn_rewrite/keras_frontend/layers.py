"""The one layer of ours that rewritten Keras 3 models may hold."""

from __future__ import annotations

from typing import Any

import keras


@keras.saving.register_keras_serializable(package="mbn_rewrite")
class ScaleAndShift(keras.layers.Layer):
    """y = scale * x + shift, per channel: what is left of a BatchNormalization.

    Stands in for the depthwise 1x1 convolution where Keras has none (ranks 2 and 5, channels
    first in rank 3) and where a mask has to flow on, which convolutions stop.

    Args:
        axis: the axis of the channels.

    Input: any shape, any floating dtype. Output: the same shape; the layer's compute dtype.
    """

    def __init__(self, axis: int = -1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.axis = axis
        self.supports_masking = True

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        channels = input_shape[self.axis]
        if channels is None:
            raise ValueError(
                f"{self.name} needs to know how many channels axis {self.axis} has; "
                f"it was given an input of shape {input_shape}"
            )
        self.scale = self.add_weight(shape=(channels,), initializer="ones", name="scale")
        self.shift = self.add_weight(shape=(channels,), initializer="zeros", name="shift")

    def call(self, inputs: Any, mask: Any = None) -> Any:
        shape = [1] * len(inputs.shape)
        shape[self.axis] = -1
        scale, shift = (keras.ops.reshape(weight, shape) for weight in (self.scale, self.shift))
        return inputs * scale + shift

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        return input_shape

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "axis": self.axis}

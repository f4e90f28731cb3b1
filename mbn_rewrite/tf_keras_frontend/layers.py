"""The one layer of ours that rewritten tf_keras models may hold."""

from __future__ import annotations

from typing import Any

import tensorflow as tf
import tf_keras


@tf_keras.utils.register_keras_serializable(package="mbn_rewrite")
class ScaleAndShift(tf_keras.layers.Layer):
    """y = scale * x + shift, per channel: what is left of a BatchNormalization.

    Stands in for the depthwise 1x1 convolution where TensorFlow has none (ranks 2 and 5,
    channels first in rank 3) and where a mask has to flow on, which convolutions stop.

    Args:
        axis: the axis of the channels.

    Input: any shape, any floating dtype. Output: the same shape; the layer's compute dtype.
    """

    def __init__(self, axis: int = -1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.axis = axis
        self.supports_masking = True

    def build(self, input_shape: tf.TensorShape) -> None:
        shape = tf.TensorShape(input_shape)
        channels = shape[self.axis]
        if channels is None:
            raise ValueError(
                f"{self.name} needs to know how many channels axis {self.axis} has; "
                f"it was given an input of shape {shape}"
            )
        self.scale = self.add_weight("scale", (channels,), initializer="ones")
        self.shift = self.add_weight("shift", (channels,), initializer="zeros")
        super().build(input_shape)

    def call(self, inputs: tf.Tensor, mask: tf.Tensor | None = None) -> tf.Tensor:
        rank = inputs.shape.rank
        shape = [1] * rank
        shape[self.axis] = -1
        return inputs * tf.reshape(self.scale, shape) + tf.reshape(self.shift, shape)

    def compute_output_shape(self, input_shape: tf.TensorShape) -> tf.TensorShape:
        return tf.TensorShape(input_shape)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "axis": self.axis}

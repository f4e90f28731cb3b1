"""The layers of ours that rewritten tf_keras models for inference may hold."""

from __future__ import annotations

from typing import Any

import tensorflow as tf
import tf_keras


def registered(cls: type) -> Any:
    """Has tf_keras load a class of ours from any file that it writes.

    What wrappers, and models in models in HDF5 files, hold is looked up without its package.
    """
    tf_keras.utils.get_custom_objects()[cls.__name__] = cls
    return tf_keras.utils.register_keras_serializable(package="mbn_rewrite")(cls)


@registered
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


@registered
class BorderedConvolution(tf_keras.layers.Wrapper):
    """y = activation(convolution(x) + border): a convolution that absorbed a shift before it.

    Where a convolution pads with zeros, a shift of its input adds less at the border than
    inside. What it adds does not depend on x, and takes the place of the bias.

    Args:
        layer: the convolution, which has neither a bias nor an activation of its own.
        activation: what comes last, as convolutions take it.

    Input: as the convolution's, of sizes that are all known but for the batch. Output: as the
    convolution's. Its weight `border` has the shape of the output without the batch.
    """

    def __init__(self, layer: Any, activation: Any = None, **kwargs: Any) -> None:
        super().__init__(layer, **kwargs)
        self.activation = tf_keras.activations.get(activation)
        self.supports_masking = layer.supports_masking

    def build(self, input_shape: tf.TensorShape) -> None:
        sizes = tuple(tf.TensorShape(input_shape).as_list())[1:]
        if None in sizes:
            raise ValueError(
                f"{self.name} needs to know all sizes of its input but that of the batch; it was "
                f"given an input of shape {input_shape}"
            )
        super().build(input_shape)
        shape = tuple(self.layer.compute_output_shape((None, *sizes)))[1:]
        self.border = self.add_weight("border", shape, initializer="zeros")
        # Of other sizes, an output of size 1 would be repeated without a word.
        self.input_spec = tf_keras.layers.InputSpec(shape=(None, *sizes))

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        convolved = self.layer(inputs)
        return self.activation(convolved + tf.cast(self.border, convolved.dtype))

    def compute_output_shape(self, input_shape: tf.TensorShape) -> tf.TensorShape:
        return tf.TensorShape(self.layer.compute_output_shape(input_shape))

    def get_config(self) -> dict[str, Any]:
        activation = tf_keras.activations.serialize(self.activation)
        return {**super().get_config(), "activation": activation}

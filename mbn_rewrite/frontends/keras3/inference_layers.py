"""The layers of ours that rewritten Keras 3 models for inference may hold."""

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
        # The operators of tensors: `keras.ops.add` may take the shift for a bias.
        return inputs * scale + shift

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        return input_shape

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "axis": self.axis}


class _ConvolutionAndMore(keras.layers.Wrapper):
    """y = activation(convolution(x) + what is added): what the layers below have in common."""

    def __init__(self, layer: Any, activation: Any = None, **kwargs: Any) -> None:
        super().__init__(layer, **kwargs)
        self.activation = keras.activations.get(activation)
        self.supports_masking = layer.supports_masking

    def _added(self) -> Any:
        """What is added, so that it broadcasts over the batch."""
        raise NotImplementedError

    def call(self, inputs: Any) -> Any:
        convolved = self.layer(inputs)
        # The operator of tensors: `keras.ops.add` may take what it adds for a bias.
        return self.activation(convolved + keras.ops.cast(self._added(), convolved.dtype))

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        return self.layer.compute_output_shape(input_shape)

    def get_config(self) -> dict[str, Any]:
        activation = keras.activations.serialize(self.activation)
        return {**super().get_config(), "activation": activation}


@keras.saving.register_keras_serializable(package="mbn_rewrite")
class BorderedConvolution(_ConvolutionAndMore):
    """y = activation(convolution(x) + border): a convolution that absorbed a shift before it.

    Where a convolution pads with zeros, a shift of its input adds less at the border than
    inside. What it adds does not depend on x, and takes the place of the bias.

    Args:
        layer: the convolution, which has neither a bias nor an activation of its own.
        activation: what comes last, as convolutions take it.

    Input: as the convolution's, of sizes that are all known but for the batch. Output: as the
    convolution's. Its weight `border` has the shape of the output without the batch.
    """

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        sizes = tuple(input_shape)[1:]
        if None in sizes:
            raise ValueError(
                f"{self.name} needs to know all sizes of its input but that of the batch; it was "
                f"given an input of shape {input_shape}"
            )
        super().build(input_shape)
        shape = tuple(self.layer.compute_output_shape((None, *sizes)))[1:]
        self.border = self.add_weight(shape=shape, initializer="zeros", name="border")
        # Of other sizes, an output of size 1 would be repeated without a word.
        self.input_spec = keras.InputSpec(shape=(None, *sizes))

    def _added(self) -> Any:
        return self.border


@keras.saving.register_keras_serializable(package="mbn_rewrite")
class BiasedConvolution(_ConvolutionAndMore):
    """y = activation(convolution(x) + bias), for channels first and any number of channels.

    Keras adds the bias of a convolution with `keras.ops.add`, which on TensorFlow adds it along
    the last axis wherever that is as long as the channels are many.

    Args:
        layer: the convolution, channels first, which has neither a bias nor an activation of
            its own.
        activation: what comes last, as convolutions take it.

    Input and output: as the convolution's. Its weight `bias` has the shape [channels].
    """

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        super().build(input_shape)
        channels = self.layer.compute_output_shape(tuple(input_shape))[1]
        self.bias = self.add_weight(shape=(channels,), initializer="zeros", name="bias")
        self._positions = len(input_shape) - 2

    def _added(self) -> Any:
        return keras.ops.reshape(self.bias, (-1, *[1] * self._positions))

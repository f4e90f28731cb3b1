"""The inference layers for Keras 3; see `keras_common.inference_layers`."""

from __future__ import annotations

from typing import Any

import keras

from mbn_rewrite.frontends.keras_common import inference_layers


class _Keras3Layer:
    _activations = keras.activations
    _cast = staticmethod(keras.ops.cast)
    _reshape = staticmethod(keras.ops.reshape)
    _maximum = staticmethod(keras.ops.maximum)
    _minimum = staticmethod(keras.ops.minimum)


class _Keras3Wrapper(_Keras3Layer, keras.layers.Wrapper):
    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        return self.layer.compute_output_shape(input_shape)


@keras.saving.register_keras_serializable(package="mbn_rewrite")
class ScaleAndShift(inference_layers.ScaleAndShift, _Keras3Layer, keras.layers.Layer):
    """See `keras_common.inference_layers.ScaleAndShift`."""

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        return input_shape


@keras.saving.register_keras_serializable(package="mbn_rewrite")
class PassThrough(inference_layers.PassThrough, _Keras3Layer, keras.layers.Layer):
    """See `keras_common.inference_layers.PassThrough`."""

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        return input_shape


@keras.saving.register_keras_serializable(package="mbn_rewrite")
class ChannelClip(inference_layers.ChannelClip, _Keras3Layer, keras.layers.Layer):
    """See `keras_common.inference_layers.ChannelClip`."""

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        return input_shape


@keras.saving.register_keras_serializable(package="mbn_rewrite")
class BorderedConvolution(inference_layers.BorderedConvolution, _Keras3Wrapper):
    """See `keras_common.inference_layers.BorderedConvolution`."""

    _specification = keras.InputSpec


@keras.saving.register_keras_serializable(package="mbn_rewrite")
class BiasedConvolution(inference_layers.ConvolutionPlusOffset, _Keras3Wrapper):
    """y = activation(convolution(x) + bias), for channels first and any number of channels.

    Keras adds the bias of a convolution with `keras.ops.add`, which on TensorFlow adds it along
    the last axis wherever that is as long as the channels are many.

    Args:
        layer: the convolution, channels first, which has neither a bias nor an activation of
            its own.
        activation: the activation, as convolutions take it.

    Input and output: as the convolution's. Its weight `bias` has the shape [channels].
    """

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        super().build(input_shape)
        channels = self.layer.compute_output_shape(tuple(input_shape))[1]
        self.bias = self.add_weight(name="bias", shape=(channels,), initializer="zeros")
        self._positions = len(input_shape) - 2

    def _offset(self) -> Any:
        return keras.ops.reshape(self.bias, (-1, *[1] * self._positions))

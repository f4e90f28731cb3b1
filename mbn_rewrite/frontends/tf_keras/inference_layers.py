"""The inference layers for tf_keras; see `keras_common.inference_layers`."""

from __future__ import annotations

from typing import Any

import tensorflow as tf
import tf_keras

from mbn_rewrite.frontends.keras_common import inference_layers


def registered(cls: type) -> Any:
    """Registers a layer class of ours, so that tf_keras loads it from any file that it writes.

    Layers in wrappers, and in nested models in HDF5 files, are looked up without their package.
    """
    tf_keras.utils.get_custom_objects()[cls.__name__] = cls
    return tf_keras.utils.register_keras_serializable(package="mbn_rewrite")(cls)


class _TfKerasLayer:
    _activations = tf_keras.activations
    _cast = staticmethod(tf.cast)
    _reshape = staticmethod(tf.reshape)
    _maximum = staticmethod(tf.maximum)
    _minimum = staticmethod(tf.minimum)


@registered
class ScaleAndShift(inference_layers.ScaleAndShift, _TfKerasLayer, tf_keras.layers.Layer):
    """See `keras_common.inference_layers.ScaleAndShift`."""

    def compute_output_shape(self, input_shape: tf.TensorShape) -> tf.TensorShape:
        return tf.TensorShape(input_shape)


@registered
class PassThrough(inference_layers.PassThrough, _TfKerasLayer, tf_keras.layers.Layer):
    """See `keras_common.inference_layers.PassThrough`."""

    def compute_output_shape(self, input_shape: tf.TensorShape) -> tf.TensorShape:
        return tf.TensorShape(input_shape)


@registered
class ChannelClip(inference_layers.ChannelClip, _TfKerasLayer, tf_keras.layers.Layer):
    """See `keras_common.inference_layers.ChannelClip`."""

    def compute_output_shape(self, input_shape: tf.TensorShape) -> tf.TensorShape:
        return tf.TensorShape(input_shape)


@registered
class BorderedConvolution(
    inference_layers.BorderedConvolution, _TfKerasLayer, tf_keras.layers.Wrapper
):
    """See `keras_common.inference_layers.BorderedConvolution`."""

    _specification = tf_keras.layers.InputSpec

    def compute_output_shape(self, input_shape: tf.TensorShape) -> tf.TensorShape:
        return tf.TensorShape(self.layer.compute_output_shape(input_shape))

"""The training layers for tf_keras; see `mbn_rewrite.training.layers`."""

from __future__ import annotations

from typing import Any

import tensorflow as tf
import tf_keras

from mbn_rewrite.frontends.tf_keras.inference_layers import registered
from mbn_rewrite.training import layers
from mbn_rewrite.training.tensorflow.moments import unbiased_variance


class _TfKerasLayer(tf_keras.layers.BatchNormalization):
    """Part of both layers that is specific to the BatchNormalization of tf_keras."""

    _ops = tf

    @staticmethod
    def _backend_name() -> str:
        return "tensorflow"

    def build(self, input_shape: tf.TensorShape) -> None:
        self._prepare(tuple(tf.TensorShape(input_shape).as_list()))
        super().build(input_shape)

    def call(self, inputs: Any, training: Any = None, mask: Any = None) -> tf.Tensor:
        self._backend.check_input(inputs, self.moving_mean, self._label)
        inputs = tf.cast(inputs, self.compute_dtype)
        return tf.__internal__.smart_cond.smart_cond(
            self._get_training_value(training),
            lambda: self._train(inputs, None if self.fused else mask),
            lambda: self._by_moving_statistics(inputs),
        )

    def _weight_options(self) -> dict[str, Any]:
        return {"dtype": self._param_dtype, "experimental_autocast": False}

    def _train(self, inputs: tf.Tensor, mask: Any) -> tf.Tensor:
        outputs, moments = self._by_sample(inputs, mask)
        variance = unbiased_variance(moments) if self.fused else moments.variance
        for moving, value in ((self.moving_mean, moments.mean), (self.moving_variance, variance)):
            self._assign_moving_average(moving, value, self.momentum, moments.count)
        return outputs


@registered
class StridedBatchNormalization(layers.StridedBatchNormalization, _TfKerasLayer):
    """See `mbn_rewrite.training.layers.StridedBatchNormalization`."""


@registered
class ModifiedBatchNormalization(layers.ModifiedBatchNormalization, _TfKerasLayer):
    """See `mbn_rewrite.training.layers.ModifiedBatchNormalization`."""

"""Old path of `mbn_rewrite.frontends.tf_keras.inference_layers`."""

from mbn_rewrite.frontends.tf_keras.inference_layers import BorderedConvolution, ScaleAndShift

__all__ = ["BorderedConvolution", "ScaleAndShift"]

"""Old path of `mbn_rewrite.frontends.tf_keras.inference_layers`."""

from mbn_rewrite.frontends.tf_keras.inference_layers import (
    BorderedConvolution,
    ChannelClip,
    PassThrough,
    ScaleAndShift,
)

__all__ = ["BorderedConvolution", "ChannelClip", "PassThrough", "ScaleAndShift"]

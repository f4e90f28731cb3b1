"""Old path of `mbn_rewrite.frontends.keras3.inference_layers`."""

from mbn_rewrite.frontends.keras3.inference_layers import (
    BiasedConvolution,
    BorderedConvolution,
    ChannelClip,
    PassThrough,
    ScaleAndShift,
)

__all__ = [
    "BiasedConvolution",
    "BorderedConvolution",
    "ChannelClip",
    "PassThrough",
    "ScaleAndShift",
]

"""Table of the layers that both Kerases have, as operations of the neutral graph.

`layer_table` lists every known layer class by its exact type: a subclass may compute anything,
so it is opaque. Each describer maps a `Call` to the operation that this call performs. Those of
linear layers are in `linear_layers`, that of BatchNormalization is in `batch_norm`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from mbn_rewrite.frontends.keras_common import linear_layers
from mbn_rewrite.frontends.keras_common.batch_norm import batch_norm, is_batch_norm
from mbn_rewrite.frontends.keras_common.calls import Call, Describer
from mbn_rewrite.frontends.keras_common.linear_layers import activation_kind, channel_axis
from mbn_rewrite.frontends.keras_common.time_distributed import time_distributed
from mbn_rewrite.ir.constants import as_array, constant_map
from mbn_rewrite.ir.graph import (
    Activation,
    Affine,
    Concat,
    Input,
    Merge,
    MergeKind,
    Monotone,
    Op,
    Opaque,
    Permute,
    PositivelyHomogeneous,
    Reshape,
    Several,
    ZeroPadding,
    clip,
)
from mbn_rewrite.ir.positions import resized


def describe(call: Call) -> Op | Several:
    """Operation that a call performs; `Opaque` if it is not known."""
    if is_batch_norm(call.layer, call.keras):
        return batch_norm(call.layer, call.training, call.keras, call.sure_output)
    op = call.keras.describe(call)
    if op is not None:
        return op
    describer = call.keras.describers.get(type(call.layer))
    if describer is None:
        return Opaque()
    if call.arguments:
        return Opaque("is called with constants")
    return describer(call)


# ----------------------------------------------------------------- layers without kernels


def _always(op: Op) -> Describer:
    return lambda call: op


def _spatial(
    kind: type[Affine] | type[Monotone],
) -> Callable[[Call], Op]:
    def describer(call: Call) -> Op:
        axis = channel_axis(call.layer, len(call.inputs[0]))
        return kind(axis, axis)

    return describer


def _zero_padding(call: Call) -> Op:
    axis = channel_axis(call.layer, len(call.inputs[0]))
    amounts = [(int(before), int(after)) for before, after in _pairs(call.layer.padding)]
    amounts.insert(axis - 1, (0, 0))
    return ZeroPadding(axis, axis, amounts=((0, 0), *amounts))


def _pairs(padding: Any) -> Any:
    """Amounts for each axis of positions; layers for one such axis have a single pair."""
    return padding if np.ndim(padding) == 2 else [padding]


def _global_pool(kind: type[Affine] | type[Monotone]) -> Describer:
    def describer(call: Call) -> Op:
        axis = channel_axis(call.layer, len(call.inputs[0]))
        return kind(axis, axis if call.layer.keepdims else 1)

    return describer


def _upsampling(call: Call) -> Op:
    if getattr(call.layer, "interpolation", "nearest") not in ("nearest", "bilinear"):
        return Opaque(f"interpolates by {call.layer.interpolation}")
    return _spatial(Affine)(call)


def _dropout(call: Call) -> Op:
    if call.training is False:
        return Affine()
    return Opaque("is random, since it is called with training=True")


def _flatten(call: Call) -> Op:
    if call.layer.data_format == "channels_first" and len(call.inputs[0]) > 2:
        return Opaque("moves the channels last before it flattens")
    return Reshape()


def _permute(call: Call) -> Op:
    return Permute((0, *call.layer.dims))


def _activation(call: Call) -> Op:
    function = call.layer.activation
    for clips, bounds in call.keras.clips:
        if clips is function:
            return clip_between(*bounds, f"is a {function.__name__} activation")
    kind = activation_kind(function, call.keras)
    if kind is Activation.LINEAR:
        return Affine()
    if kind is Activation.HOMOGENEOUS:
        return PositivelyHomogeneous()
    name = getattr(function, "__name__", "")
    return Opaque(f"is a {name} activation" if name else "is an activation")


def relu(call: Call) -> Op:
    """Layer or operation with the options of Keras's ReLU."""
    layer, limited = call.layer, "is an activation with a limit"
    if np.any(layer.threshold):
        return Opaque(limited)
    if np.any(layer.negative_slope):
        return PositivelyHomogeneous() if layer.max_value is None else Opaque(limited)
    return clip_between(0.0, layer.max_value, limited)


def clip_between(lower: Any, upper: Any, why: str = Opaque.why) -> Op:
    """Clip between two bounds as layers and operations hold them, None where there is none."""
    if not all(bound is None or is_number(bound) for bound in (lower, upper)):
        return Opaque(why)  # such as bounds per channel, or a variable
    return clip(
        -math.inf if lower is None else float(lower),
        math.inf if upper is None else float(upper),
        why,
    )


def clip_by_a_number(kind: MergeKind, arguments: tuple[Any, ...]) -> Op | None:
    """max(x, number) or min(x, number), by the arguments beside x; None where it is neither."""
    if kind not in (MergeKind.MAXIMUM, MergeKind.MINIMUM) or len(arguments) != 1:
        return None
    (bound,) = arguments
    return clip_between(*((bound, None) if kind is MergeKind.MAXIMUM else (None, bound)))


def is_number(value: Any) -> bool:
    """Whether an argument is one number, known beforehand."""
    return isinstance(value, (int, float, np.number, np.ndarray)) and np.ndim(value) == 0


def _resizing(call: Call) -> Op:
    layer = call.layer
    if getattr(layer, "pad_to_aspect_ratio", False):
        return Opaque("pads with a constant")
    layout = getattr(layer, "data_format", None)
    return resized(len(call.inputs[0]), layer.interpolation, layout)


def _rescaling(call: Call) -> Op:
    scale, offset = as_array(call.layer.scale), as_array(call.layer.offset)
    if scale is None or offset is None or scale.ndim + offset.ndim:
        return Opaque("has constants that are no numbers")  # whose axis Keras's settings decide
    return constant_map(scale, offset, call.output)


_LEAST_SPREAD = 1e-3  # well above Keras's epsilon, which takes its place below


def _normalization(call: Call) -> Op:
    """Statistics of data, which are constants once it is built."""
    layer = call.layer
    mean, variance = (getattr(layer, name, None) for name in ("mean", "variance"))
    if mean is None or variance is None or call.inputs[0] != call.output:
        return Opaque("has statistics that are not known")
    mean, spread = np.asarray(mean, np.float64), np.sqrt(np.asarray(variance, np.float64))
    if np.any(spread < _LEAST_SPREAD):
        return Opaque("divides by a variance near 0")
    if getattr(layer, "invert", False):
        return constant_map(spread, mean, call.output)
    return constant_map(1 / spread, -mean / spread, call.output)


def _concatenate(call: Call) -> Op:
    return Concat(call.layer.axis % len(call.output))


# ----------------------------------------------------------------------------- the table


_TABLE: dict[str, Describer] = {
    "InputLayer": _always(Input()),
    "Conv1D Conv2D Conv3D": linear_layers.conv,
    "Conv1DTranspose Conv2DTranspose Conv3DTranspose": linear_layers.conv_transpose,
    "DepthwiseConv1D DepthwiseConv2D": linear_layers.depthwise_conv,
    "SeparableConv1D SeparableConv2D": linear_layers.separable_conv,
    "Dense": linear_layers.dense,
    "EinsumDense": linear_layers.einsum_dense,
    "Embedding": linear_layers.embedding,
    "LayerNormalization GroupNormalization": linear_layers.normalization,
    "TimeDistributed": time_distributed,
    " ".join(linear_layers.RECURRENT): linear_layers.recurrent,
    "MultiHeadAttention": linear_layers.attention,
    "RNN": linear_layers.rnn,
    "ConvLSTM1D ConvLSTM2D ConvLSTM3D": linear_layers.conv_lstm,
    "Bidirectional": linear_layers.bidirectional,
    "AveragePooling1D AveragePooling2D AveragePooling3D": _spatial(Affine),
    "Cropping1D Cropping2D Cropping3D": _spatial(Affine),
    "MaxPooling1D MaxPooling2D MaxPooling3D": _spatial(Monotone),
    "ZeroPadding1D ZeroPadding2D ZeroPadding3D": _zero_padding,
    "GlobalAveragePooling1D GlobalAveragePooling2D GlobalAveragePooling3D": _global_pool(Affine),
    "GlobalMaxPooling1D GlobalMaxPooling2D GlobalMaxPooling3D": _global_pool(Monotone),
    "UpSampling1D UpSampling2D UpSampling3D": _upsampling,
    "Resizing": _resizing,
    "Rescaling": _rescaling,
    "Normalization": _normalization,
    "RepeatVector": _always(Affine(1, 2)),
    "Dropout SpatialDropout1D SpatialDropout2D SpatialDropout3D": _dropout,
    "GaussianDropout GaussianNoise AlphaDropout": _dropout,
    "Identity ActivityRegularization": _always(Affine()),
    "Activation": _activation,
    "ReLU": relu,
    "LeakyReLU PReLU": _always(PositivelyHomogeneous()),
    "Flatten": _flatten,
    "Reshape": _always(Reshape()),
    "Permute": _permute,
    **{
        name: _always(Merge(MergeKind(name.lower())))
        for name in ("Add", "Subtract", "Average", "Maximum", "Minimum", "Multiply")
    },
    "Concatenate": _concatenate,
}


def layer_table(layers: Any) -> dict[type, Describer]:
    """Describers of the known layer classes in a Keras's module of layers, by class."""
    return {
        getattr(layers, name): describer
        for names, describer in _TABLE.items()
        for name in names.split()
    }

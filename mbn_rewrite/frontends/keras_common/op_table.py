"""Describes the layers that both Kerases have as operations of the neutral graph.

`layer_table` lists every layer class that is known, by exact type: a subclass may compute
anything, so it is opaque. Each describer takes a `Call` and says what that call does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mbn_rewrite.frontends.keras_common import weights
from mbn_rewrite.frontends.keras_common.adapter import KerasAdapter
from mbn_rewrite.ir import layouts
from mbn_rewrite.ir.algebra import ChannelMap, Kernel, Window
from mbn_rewrite.ir.graph import (
    SPREADS,
    Activation,
    Affine,
    BatchNorm,
    Chain,
    Concat,
    Input,
    Linear,
    Merge,
    MergeKind,
    Monotone,
    Op,
    Opaque,
    Permute,
    PositivelyHomogeneous,
    Recurrent,
    Reshape,
    Shape,
    ZeroPadding,
    fused_operation_takes,
)


@dataclass(frozen=True)
class Call:
    """One call of a layer.

    Attributes:
        keras: the layer's Keras.
        layer: the layer.
        inputs: the shapes of all tensors that it was given.
        output: the shape of its first output.
        training: False at inference, True where its caller asked for training, None where
            that is decided at run time.
        arguments: what it was called with beside its data.
        sizes_hold: whether inputs of other sizes are refused.
    """

    keras: KerasAdapter
    layer: Any
    inputs: tuple[Shape, ...]
    output: Shape
    training: bool | None = False
    arguments: tuple[Any, ...] = ()
    sizes_hold: bool = True

    @property
    def sure_output(self) -> Shape:
        """The shape of the output; the last size, which matters for biases, only if it is sure."""
        return self.output if self.sizes_hold else (*self.output[:-1], None)


Describer = Callable[[Call], Op]


def describe(call: Call) -> Op:
    """What a call does; `Opaque` for all that is not known."""
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


def is_batch_norm(layer: Any, keras: KerasAdapter) -> bool:
    """Whether a layer is a BatchNormalization or derived from one."""
    return isinstance(layer, keras.batch_norm_base)


# ------------------------------------------------------------------ BatchNormalization


def batch_norm(
    layer: Any, training: bool | None, keras: KerasAdapter, shape: Shape | None = None
) -> BatchNorm:
    """A BatchNormalization, or why it must stay as it is.

    Args:
        layer: the layer.
        training: how it is called; see `Call`.
        keras: its Keras.
        shape: that of its output; None where its calls cannot be seen.
    """
    special = _special(layer, keras)
    if special:
        return BatchNorm(None, special, not_trainable=special)
    axis = keras.axis_of(layer)
    if training and layer.trainable:
        return BatchNorm(None, _BY_THE_BATCH, not_trainable=_BY_THE_BATCH_NOT_A_SAMPLE, axis=axis)
    if training is None and layer.trainable:
        return BatchNorm(None, "whether it trains is decided when the model is called", axis=axis)
    channels = layer.moving_mean.shape
    gamma, beta = affine_weights(layer, keras)
    parameters = (
        weights.read(layer, gamma).reshape(-1) if gamma else np.ones(channels),
        weights.read(layer, beta) if beta else np.zeros(channels),
        weights.read(layer, "moving_mean"),
        weights.read(layer, "moving_variance"),
    )
    if not all(np.all(np.isfinite(array.astype(np.float64))) for array in parameters):
        why = "its weights or moving statistics hold NaN or infinity"
        return BatchNorm(None, why, axis=axis)
    channel_map = ChannelMap.of_batch_norm(*parameters, keras.epsilon_of(layer), axis)
    if not channel_map.is_finite:
        why = "its moving variance and epsilon give no finite scale"
        return BatchNorm(None, why, axis=axis)
    return BatchNorm(
        channel_map,
        axis=axis,
        fusible=_fusible(layer, axis, keras),
        convolvable=_convolvable(axis, shape or (None,) * layer.input_spec.ndim, keras),
    )


def _convolvable(axis: int, shape: Shape, keras: KerasAdapter) -> bool:
    """Whether there is a depthwise convolution for inputs of a rank and layout."""
    if (len(shape), axis) not in ((4, 1), (4, 3), (3, 2)):
        return False
    return not keras.may_misplace_bias(axis, shape)


def _fusible(layer: Any, axis: int, keras: KerasAdapter) -> bool:
    """Whether the fused operation could do what arithmetic does now."""
    return (
        keras.has_fused_operation()
        and not keras.fuses(layer)
        and type(layer) not in keras.training_layers  # which run it themselves
        and fused_operation_takes(layer.compute_dtype, axis, layer.input_spec.ndim)
    )


def affine_weights(layer: Any, keras: KerasAdapter) -> tuple[str, str]:
    """The names of the weights that scale and shift; "" for those that there are not."""
    _, modified = keras.training_layers
    names = ("depthwise_kernel", "bias") if type(layer) is modified else ("gamma", "beta")
    return names[0] if layer.scale else "", names[1] if layer.center else ""


def _special(layer: Any, keras: KerasAdapter) -> str:
    """Why no other layer can do the work of a BatchNormalization, even in training, or ""."""
    if type(layer) not in (*keras.batch_norms, *keras.training_layers):
        return f"{type(layer).__name__} is a class of its own, which may compute something else"
    if not layer.built:
        return "it was never called, so it has no weights"
    return keras.ineligible(layer)


# Of layers that are not frozen: a frozen one uses its moving statistics all the same.
_BY_THE_BATCH = "it is called with training=True, so it normalises by the batch it is given"
_BY_THE_BATCH_NOT_A_SAMPLE = (
    f"{_BY_THE_BATCH}, at inference too, where statistics of a sample would give other outputs"
)


# ------------------------------------------------------------------------ linear layers


_MAY_MISPLACE = (
    "may add a bias along its last axis, as Keras does on TensorFlow where that is as long as its "
    "channels are many"
)


def _activation_kind(activation: Any, keras: KerasAdapter) -> Activation:
    """A layer's activation, as far as it matters."""
    if activation is None or activation is keras.linear:
        return Activation.LINEAR
    return Activation.HOMOGENEOUS if activation in keras.homogeneous else Activation.OTHER


def _channel_axis(layer: Any, rank: int) -> int:
    if getattr(layer, "data_format", None) != "channels_first":
        return rank - 1
    # Convolutions take further axes like the batch before the channels.
    return rank - 1 - getattr(layer, "rank", rank - 2)


def _linear(
    call: Call,
    kernels: tuple[Kernel, ...],
    in_axis: int | None,
    out_axis: int,
    pads: bool = False,
    windows: tuple[Window, ...] = (),
) -> Op:
    layer = call.layer
    if len(call.inputs) != 1:
        return Opaque("is called with several tensors")
    kind = _activation_kind(layer.activation, call.keras)
    if layer.bias is not None:
        if call.keras.misplaces_bias(out_axis, call.output):
            return Opaque(f"{_MAY_MISPLACE}, and it has one")
        return Linear(kernels, "bias", in_axis, out_axis, pads, kind, windows)
    doubt = _MAY_MISPLACE if call.keras.may_misplace_bias(out_axis, call.sure_output) else ""
    if doubt and isinstance(layer.activation, call.keras.layers.Layer):
        return Opaque(f"{doubt}, and its activation is a layer")
    return Linear(kernels, None, in_axis, out_axis, pads, kind, windows, doubt)


def _convolution(call: Call, kernels: tuple[Kernel, ...]) -> Op:
    """A convolution of these kernels, the first of which reads more than one position."""
    layer, axis = call.layer, _channel_axis(call.layer, len(call.inputs[0]))
    windows = _windows(layer)
    sizes = [size for i, size in enumerate(call.inputs[0]) if i != axis][-len(windows) :]
    pads = any(window.pads(size) for window, size in zip(windows, sizes, strict=True))
    # A layer as activation is part of the convolution, and a border map has to come before it.
    bordered = not isinstance(layer.activation, call.keras.layers.Layer)
    return _linear(call, kernels, axis, axis, pads, windows if bordered else ())


def _windows(layer: Any) -> tuple[Window, ...]:
    """How a convolution reads each axis of positions."""
    return tuple(
        Window(int(size), int(stride), int(dilation), _padding(layer.padding, size, dilation))
        for size, stride, dilation in zip(
            layer.kernel_size, layer.strides, layer.dilation_rate, strict=True
        )
    )


def _padding(padding: str, size: int, dilation: int) -> tuple[int, int] | str:
    return "same" if padding == "same" else ((size - 1) * dilation * (padding == "causal"), 0)


def _conv(call: Call) -> Op:
    return _convolution(call, (layouts.conv("kernel", call.layer.kernel.shape, call.layer.groups),))


def _conv_transpose(call: Call) -> Op:
    layer, axis = call.layer, _channel_axis(call.layer, len(call.inputs[0]))
    kernel = layouts.conv_transpose("kernel", layer.kernel.shape)
    # A constant input gives a constant output only if each output reads one input by the
    # same weights.
    uneven = any(size != 1 for size in (*layer.kernel_size, *layer.strides))
    op = _linear(call, (kernel,), axis, axis, uneven)
    return replace(op, uneven=SPREADS) if isinstance(op, Linear) else op


def _depthwise_conv(call: Call) -> Op:
    name = call.keras.depthwise_kernel
    return _convolution(call, (layouts.depthwise(name, getattr(call.layer, name).shape),))


def _separable_conv(call: Call) -> Op:
    layer = call.layer
    kernels = (
        layouts.depthwise("depthwise_kernel", layer.depthwise_kernel.shape),
        layouts.conv("pointwise_kernel", layer.pointwise_kernel.shape),
    )
    return _convolution(call, kernels)


def _dense(call: Call) -> Op:
    kernel = layouts.matrix("kernel", call.layer.kernel.shape)
    return _linear(call, (kernel,), len(call.inputs[0]) - 1, len(call.output) - 1)


def _einsum_dense(call: Call) -> Op:
    """Products with one output channel axis that comes from the kernel alone."""
    layer = call.layer
    read = layouts.einsum(layer.equation, len(call.inputs[0]), len(call.output))
    if isinstance(read, str):
        return Opaque(read)
    if layer.bias is not None and layer.bias_axes != read.channels:
        return Opaque("has a bias along other axes than its output channels")
    if read.out_axis != len(call.output) - 1:
        return Opaque("does not have its output channels last")
    kernel = read.layout("kernel", layer.kernel.shape)
    return _linear(call, (kernel,), read.in_axis, read.out_axis)


def _time_distributed(call: Call) -> Op:
    layer = call.layer
    if type(layer.layer) is not call.keras.layers.Dense or len(call.inputs) != 1:
        return Opaque()
    inner = _dense(Call(call.keras, layer.layer, call.inputs, call.output))
    return _prefixed(inner, "layer.") if isinstance(inner, Linear) else inner


def _prefixed(op: Linear, prefix: str) -> Linear:
    (kernel,) = op.kernels
    return Linear(
        (Kernel(prefix + kernel.name, kernel.view, kernel.in_dims, kernel.out_dims),),
        op.bias and prefix + op.bias,
        op.in_axis,
        op.out_axis,
        op.pads,
        op.activation,
    )


# --------------------------------------------------------------------- recurrent layers

_RECURRENT = ("GRU", "LSTM", "SimpleRNN")


def _recurrent(call: Call) -> Op:
    return _sequence(call, (("", call.layer),))


def _bidirectional(call: Call) -> Op:
    pair = (
        ("forward_layer.", call.layer.forward_layer),
        ("backward_layer.", call.layer.backward_layer),
    )
    known = [getattr(call.keras.layers, name) for name in _RECURRENT]
    if any(type(layer) not in known for _, layer in pair):
        return Opaque()
    return _sequence(call, pair)


def _sequence(call: Call, layers: tuple[tuple[str, Any], ...]) -> Op:
    branches: list[Chain] = []
    for prefix, layer in layers:
        if call.training is not False and layer.dropout:
            return Opaque("drops out inputs, since it is called with training=True")
        kernel = layouts.matrix(prefix + "cell.kernel", layer.cell.kernel.shape)
        branches.append(((kernel,), prefix + "cell.bias" if layer.use_bias else None))
    return Recurrent(tuple(branches), in_axis=2)


# --------------------------------------------------------------- layers that let it pass


def _spatial(kind: type[Affine] | type[Monotone] | type[ZeroPadding]) -> Callable[[Call], Op]:
    def describer(call: Call) -> Op:
        axis = _channel_axis(call.layer, len(call.inputs[0]))
        return kind(axis, axis)

    return describer


def _global_pool(kind: type[Affine] | type[Monotone]) -> Callable[[Call], Op]:
    def describer(call: Call) -> Op:
        axis = _channel_axis(call.layer, len(call.inputs[0]))
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
    kind = _activation_kind(call.layer.activation, call.keras)
    if kind is Activation.LINEAR:
        return Affine()
    if kind is Activation.HOMOGENEOUS:
        return PositivelyHomogeneous()
    name = getattr(call.layer.activation, "__name__", "")
    return Opaque(f"is a {name} activation" if name else "is an activation")


def _relu(call: Call) -> Op:
    layer = call.layer
    if layer.max_value is None and not np.any(layer.threshold):
        return PositivelyHomogeneous()
    return Opaque("is an activation with a limit")


def _concatenate(call: Call) -> Op:
    return Concat(call.layer.axis % len(call.output))


# ----------------------------------------------------------------------------- the table


def _always(op: Op) -> Callable[[Call], Op]:
    return lambda call: op


_TABLE: dict[str, Describer] = {
    "InputLayer": _always(Input()),
    "Conv1D Conv2D Conv3D": _conv,
    "Conv1DTranspose Conv2DTranspose Conv3DTranspose": _conv_transpose,
    "DepthwiseConv1D DepthwiseConv2D": _depthwise_conv,
    "SeparableConv1D SeparableConv2D": _separable_conv,
    "Dense": _dense,
    "EinsumDense": _einsum_dense,
    "TimeDistributed": _time_distributed,
    " ".join(_RECURRENT): _recurrent,
    "Bidirectional": _bidirectional,
    "AveragePooling1D AveragePooling2D AveragePooling3D": _spatial(Affine),
    "Cropping1D Cropping2D Cropping3D": _spatial(Affine),
    "MaxPooling1D MaxPooling2D MaxPooling3D": _spatial(Monotone),
    "ZeroPadding1D ZeroPadding2D ZeroPadding3D": _spatial(ZeroPadding),
    "GlobalAveragePooling1D GlobalAveragePooling2D GlobalAveragePooling3D": _global_pool(Affine),
    "GlobalMaxPooling1D GlobalMaxPooling2D GlobalMaxPooling3D": _global_pool(Monotone),
    "UpSampling1D UpSampling2D UpSampling3D": _upsampling,
    "RepeatVector": _always(Affine(1, 2)),
    "Dropout SpatialDropout1D SpatialDropout2D SpatialDropout3D": _dropout,
    "GaussianDropout GaussianNoise AlphaDropout": _dropout,
    "Identity ActivityRegularization": _always(Affine()),
    "Activation": _activation,
    "ReLU": _relu,
    "LeakyReLU PReLU": _always(PositivelyHomogeneous()),
    "Flatten": _flatten,
    "Reshape": _always(Reshape()),
    "Permute": _permute,
    **{
        name: _always(Merge(MergeKind(name.lower())))
        for name in ("Add", "Subtract", "Average", "Maximum", "Minimum")
    },
    "Concatenate": _concatenate,
}


def layer_table(layers: Any) -> dict[type, Describer]:
    """The table of known layer classes, for a Keras's module of layers."""
    return {
        getattr(layers, name): describer
        for names, describer in _TABLE.items()
        for name in names.split()
    }

"""Linear and recurrent layers as operations of the neutral graph, with where their kernels lie."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mbn_rewrite.frontends.keras_common.adapter import KerasAdapter
from mbn_rewrite.frontends.keras_common.calls import Call
from mbn_rewrite.ir import layouts
from mbn_rewrite.ir.graph import (
    SPREADS,
    Activation,
    Attention,
    Chain,
    Linear,
    Op,
    Opaque,
    Recurrent,
)
from mbn_rewrite.ir.kernels import Kernel, Window

RECURRENT = ("GRU", "LSTM", "SimpleRNN")

_DROPS = "drops out inputs, since it is called with training=True"

_MAY_MISPLACE = (
    "may add a bias along its last axis, as Keras does on TensorFlow where that is as long as its "
    "channels are many"
)


def activation_kind(activation: Any, keras: KerasAdapter) -> Activation:
    """Kind of a layer's activation, as far as it matters to what can be folded."""
    if activation is None or activation is keras.linear:
        return Activation.LINEAR
    return Activation.HOMOGENEOUS if activation in keras.homogeneous else Activation.OTHER


def channel_axis(layer: Any, rank: int) -> int:
    """Axis of the channels in a layer's input of this rank."""
    if getattr(layer, "data_format", None) != "channels_first":
        return rank - 1
    # Convolutions accept more than one batch axis before the channels.
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
    kind = activation_kind(layer.activation, call.keras)
    if layer.bias is not None:
        if call.keras.misplaces_bias(out_axis, call.output):
            return Opaque(f"{_MAY_MISPLACE}, and it has one")
        return Linear(kernels, "bias", in_axis, out_axis, pads, kind, windows)
    doubt = _MAY_MISPLACE if call.keras.may_misplace_bias(out_axis, call.sure_output) else ""
    if doubt and isinstance(layer.activation, call.keras.layers.Layer):
        return Opaque(f"{doubt}, and its activation is a layer")
    return Linear(kernels, None, in_axis, out_axis, pads, kind, windows, doubt)


# -------------------------------------------------------------------------- convolutions


def conv(call: Call) -> Op:
    """Convolution, grouped or not."""
    return _convolution(call, (layouts.conv("kernel", call.layer.kernel.shape, call.layer.groups),))


def conv_transpose(call: Call) -> Op:
    """Transposed convolution."""
    layer, axis = call.layer, channel_axis(call.layer, len(call.inputs[0]))
    kernel = layouts.conv_transpose("kernel", layer.kernel.shape)
    # A constant input gives a constant output only if every output reads exactly one input,
    # through the same weights.
    uneven = any(size != 1 for size in (*layer.kernel_size, *layer.strides))
    op = _linear(call, (kernel,), axis, axis, uneven)
    return replace(op, uneven=SPREADS) if isinstance(op, Linear) else op


def depthwise_conv(call: Call) -> Op:
    """Depthwise convolution."""
    name = call.keras.depthwise_kernel
    return _convolution(call, (layouts.depthwise(name, getattr(call.layer, name).shape),))


def separable_conv(call: Call) -> Op:
    """Depthwise convolution followed by a pointwise one."""
    layer = call.layer
    kernels = (
        layouts.depthwise("depthwise_kernel", layer.depthwise_kernel.shape),
        layouts.conv("pointwise_kernel", layer.pointwise_kernel.shape),
    )
    return _convolution(call, kernels)


def _convolution(call: Call, kernels: tuple[Kernel, ...]) -> Op:
    """A convolution with these kernels, the first of which may span several positions."""
    layer, axis = call.layer, channel_axis(call.layer, len(call.inputs[0]))
    windows = _windows(layer)
    sizes = [size for i, size in enumerate(call.inputs[0]) if i != axis][-len(windows) :]
    pads = any(window.pads(size) for window, size in zip(windows, sizes, strict=True))
    # An activation layer is part of the convolution, and a border map has to be added before it.
    bordered = not isinstance(layer.activation, call.keras.layers.Layer)
    return _linear(call, kernels, axis, axis, pads, windows if bordered else ())


def _windows(layer: Any) -> tuple[Window, ...]:
    """Window of a convolution along each spatial axis."""
    return tuple(
        Window(int(size), int(stride), int(dilation), _padding(layer.padding, size, dilation))
        for size, stride, dilation in zip(
            layer.kernel_size, layer.strides, layer.dilation_rate, strict=True
        )
    )


def _padding(padding: str, size: int, dilation: int) -> tuple[int, int] | str:
    return "same" if padding == "same" else ((size - 1) * dilation * (padding == "causal"), 0)


# -------------------------------------------------------------------------- dense layers


def dense(call: Call) -> Op:
    """Product with a matrix along the last axis."""
    kernel = layouts.matrix("kernel", call.layer.kernel.shape)
    op = _linear(call, (kernel,), len(call.inputs[0]) - 1, len(call.output) - 1)
    return replace(op, position_alone=True) if isinstance(op, Linear) else op


def einsum_dense(call: Call) -> Op:
    """Tensor product with one output channel axis, which comes from the kernel alone."""
    layer = call.layer
    read = layouts.einsum(layer.equation, len(call.inputs[0]), len(call.output))
    if isinstance(read, str):
        return Opaque(read)
    if layer.bias is not None and layer.bias_axes != read.channels:
        return Opaque("has a bias along other axes than its output channels")
    if read.out_axis is None:
        return Opaque("gives several axes of channels")
    if read.out_axis != len(call.output) - 1:
        return Opaque("does not have its output channels last")
    kernel = read.layout("kernel", layer.kernel.shape)
    return _linear(call, (kernel,), read.in_axis, read.out_axis)


def embedding(call: Call) -> Op:
    """Look-up of the rows of a table."""
    if getattr(call.layer, "sparse", False):
        return Opaque("may give sparse tensors")
    table = layouts.table("embeddings", call.layer.embeddings.shape)
    return Linear((table,), None, None, len(call.output) - 1)


def normalization(call: Call) -> Op:
    """LayerNormalization or GroupNormalization, whose gamma and beta come last, by channel."""
    layer, rank = call.layer, len(call.inputs[0])
    axes = layer.axis if isinstance(layer.axis, (list, tuple)) else [layer.axis]
    gamma, beta = getattr(layer, "gamma", None), getattr(layer, "beta", None)
    if gamma is None or beta is None or getattr(layer, "rms_scaling", False):
        return Opaque("normalises each example, without a gamma and a beta")
    if len(axes) != 1 or len(call.inputs) != 1 or len(gamma.shape) != 1:
        return Opaque("normalises each example, over several axes")
    kernel = Kernel("gamma", tuple(gamma.shape), (0,), (0,))
    return Linear((kernel,), "beta", None, int(axes[0]) % rank)


# ------------------------------------------------------------------------------ attention


def attention(call: Call) -> Op:
    """MultiHeadAttention, of one value to itself or of several."""
    layer, rank = call.layer, len(call.output)
    names = ("query", "key", "value", "output")
    parts: list[Any] = [getattr(layer, f"_{name}_dense", None) for name in names]
    if getattr(layer, "_use_gate", False) or call.record is None:
        return Opaque()
    if any(part is None or part.bias is None for part in parts):
        return Opaque("has products without a bias")
    if any(len(part.kernel.shape) != 3 for part in parts):
        return Opaque("gives several axes of channels")
    chains: list[Chain] = []
    for name, part in zip(names, parts, strict=True):
        dims = ((0, 1), (2,)) if name == "output" else ((0,), (1, 2))
        kernel = Kernel(f"_{name}_dense.kernel", tuple(part.kernel.shape), *dims)
        chains.append(((kernel,), f"_{name}_dense.bias"))
    given = call.record.inputs
    alone = len(call.keras.all_calls_of(layer)) <= 1
    alike = alone and all(tensor is given[0] for tensor in given)
    return Attention(tuple(chains[:3]) if alike else (), chains[3], rank - 1)


# ---------------------------------------------------------------------- recurrent layers


def recurrent(call: Call) -> Op:
    """Recurrent layer, which is linear in its input before its cell."""
    return _sequence(call, (("", call.layer),))


def bidirectional(call: Call) -> Op:
    """Pair of recurrent layers that read a sequence forwards and backwards."""
    pair = (
        ("forward_layer.", call.layer.forward_layer),
        ("backward_layer.", call.layer.backward_layer),
    )
    known = [getattr(call.keras.layers, name) for name in RECURRENT]
    if any(type(layer) not in known for _, layer in pair):
        return Opaque()
    return _sequence(call, pair)


def rnn(call: Call) -> Op:
    """Layer of recurrent cells, of which the first reads the sequence."""
    cell, prefix = call.layer.cell, "cell"
    if type(cell) is call.keras.layers.StackedRNNCells:
        cell, prefix = cell.cells[0], "cell.cells.0"
    known = [getattr(call.keras.layers, f"{name}Cell") for name in RECURRENT]
    if type(cell) not in known:
        return Opaque()
    if not cell.use_bias:
        return Opaque("has a cell without a bias")
    if call.training is not False and cell.dropout:
        return Opaque(_DROPS)
    kernel = layouts.matrix(f"{prefix}.kernel", cell.kernel.shape)
    return Recurrent((((kernel,), f"{prefix}.bias"),), in_axis=2)


def conv_lstm(call: Call) -> Op:
    """Recurrent layer of convolutions, which reads each step by one of them."""
    layer, cell, rank = call.layer, call.layer.cell, len(call.inputs[0])
    if call.training is not False and cell.dropout:
        return Opaque(_DROPS)
    kernel = layouts.conv("cell.kernel", cell.kernel.shape)
    pads = cell.padding != "valid" and any(size != 1 for size in cell.kernel_size)
    return Recurrent(
        (((kernel,), "cell.bias" if cell.use_bias else None),),
        in_axis=2 if layer.data_format == "channels_first" else rank - 1,
        uneven="pads its input with zeros" if pads else "",
    )


def _sequence(call: Call, layers: tuple[tuple[str, Any], ...]) -> Op:
    branches: list[Chain] = []
    for prefix, layer in layers:
        if call.training is not False and layer.dropout:
            return Opaque(_DROPS)
        kernel = layouts.matrix(prefix + "cell.kernel", layer.cell.kernel.shape)
        branches.append(((kernel,), prefix + "cell.bias" if layer.use_bias else None))
    return Recurrent(tuple(branches), in_axis=2)

"""Convolutions, matrix products and einsums, with the biases that are added to their outputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from mbn_rewrite.frontends.saved_model.op_site import Answer, Described, Site, shape_of
from mbn_rewrite.frontends.saved_model.stored_arrays import Weight
from mbn_rewrite.ir import layouts
from mbn_rewrite.ir.graph import SPREADS, Linear, Opaque, Shape
from mbn_rewrite.ir.kernels import Kernel, Window


def _linear(
    site: Site,
    data: int,
    kernel: int,
    layout: Callable[[tuple[int, ...]], Kernel],
    in_axis: int | None,
    out_axis: int | None,
    pads: bool = False,
    windows: tuple[Window, ...] = (),
) -> Answer:
    """A linear operation with the bias that is added to its output."""
    weight = site.constants.kernel(site.op.inputs[kernel])
    if weight is None:
        written = site.constants.written(site.op.inputs[kernel])
        if written is not None:
            return Opaque(f"has weights that {written[1]}")
        return Opaque("has a kernel that is computed while the model runs")
    laid_out = weight.laid_out(layout(weight.shape))
    if laid_out is None:
        return Opaque("has a transposed kernel")
    axis, channels = out_axis, laid_out.out_channels
    result, bias, absorbed = site.op.outputs[0], None, ()
    found = _bias_after(site, out_axis, channels)
    if found is not None:
        result, bias, absorbed, out_axis = found
    weights = {"kernel": weight} | ({"bias": bias} if bias else {})
    if not weight.keeps_window(len(windows)):
        windows = ()  # they are in another order than the axes of what is stored
    op = Linear((laid_out,), "bias" if bias else None, in_axis, out_axis, pads, windows=windows)
    return Described(op, (site.op.inputs[data],), result, weights, absorbed, axis)


def _bias_after(
    site: Site, axis: int | None, channels: int
) -> tuple[Any, Weight, tuple[Any, ...], int | None] | None:
    """The bias added to an operation's output.

    A 1-D convolution first removes the axis that was added for it, a dilated one first puts its
    blocks together again, and a product for several heads takes its channels apart.

    Returns:
        The sum, the bias, the operations up to the sum, and the channel axis of the sum, or None
        where there are several.
    """
    tensor, between = site.op.outputs[0], []
    first = None if axis in (None, len(site.output) - 1) else axis
    while True:
        reader = site.function.only_reader(tensor)
        if reader is None:
            return None
        op, position = reader
        shape = shape_of(op.outputs[0]) if op.outputs else ()
        axes = _channel_axes(shape, channels, first)
        if not axes:
            return None
        if op.type in ("BiasAdd", "Add", "AddV2"):
            break
        # A reshape that keeps the last axis only moves positions.
        moving = {"Squeeze", "BatchToSpaceND"} | ({"Reshape"} if first is None else set())
        if op.type not in moving or position != 0:
            return None
        between.append(op)
        tensor = op.outputs[0]
    weight = site.constants.kernel(op.inputs[1 - position])
    if weight is None or math.prod(weight.shape) != channels or len(weight.shape) > len(shape):
        return None
    if op.type == "BiasAdd":
        if position != 0 or axes != (Site(op, site.constants).channel_axis,):
            return None
    else:
        sizes = (1,) * (len(shape) - len(weight.shape)) + weight.shape
        if any(sizes[axis] != shape[axis] for axis in axes):
            return None
        if len(axes) > 1 and not weight.is_plain:
            return None
    return op.outputs[0], weight, (*between, op), axes[0] if len(axes) == 1 else None


def _channel_axes(shape: Shape, channels: int, axis: int | None) -> tuple[int, ...]:
    """The axes of a tensor that channels lie on: one that is known, or else the last ones."""
    if axis is not None:
        return (axis,) if 0 < axis < len(shape) and shape[axis] == channels else ()
    for start in range(len(shape) - 1, 0, -1):
        sizes = [size or 0 for size in shape[start:]]
        if math.prod(sizes) == channels:
            return tuple(range(start, len(shape)))
    return ()


def _pads(site: Site, windows: tuple[Window, ...]) -> bool:
    """Whether a convolution reads padding around its input."""
    first = 2 if site.channels_first else 1
    sizes = (site.shape(0) or [None] * (len(windows) + 2))[first : first + len(windows)]
    return any(window.pads(size) for window, size in zip(windows, sizes, strict=True))


def _along_positions(site: Site, name: str, axes: int) -> list[int]:
    """The values of an attribute for the spatial axes."""
    steps = site.attribute(name) if name in site.op.node_def.attr else []
    first = 2 if site.channels_first else 1
    return list((steps or [1] * (axes + 2))[first : first + axes])


def _windows(site: Site, window: tuple[int, ...]) -> tuple[Window, ...]:
    """The window of a convolution along each spatial axis."""
    axes = len(window)
    strides, dilations = (_along_positions(site, name, axes) for name in ("strides", "dilations"))
    padding, paddings = site.attribute("padding"), [(0, 0)] * axes
    if padding == b"EXPLICIT":
        amounts = site.attribute("explicit_paddings")
        first = 2 if site.channels_first else 1
        pairs = list(zip(amounts[::2], amounts[1::2], strict=True))
        paddings = pairs[first : first + axes]
    return tuple(
        Window(size, stride, dilation, "same" if padding == b"SAME" else pair)
        for size, stride, dilation, pair in zip(window, strides, dilations, paddings, strict=True)
    )


def conv(site: Site) -> Answer:
    """Conv2D and Conv3D, also in groups."""
    shape, axis = site.kernel_shape, site.channel_axis
    inputs = site.shape(0)[axis] if site.shape(0) else None
    if not shape or inputs is None:
        return Opaque("has a kernel of unknown shape")
    groups = inputs // shape[-2]
    windows = _windows(site, shape[:-2])
    pads = _pads(site, windows)
    return _linear(
        site, 0, 1, lambda s: layouts.conv("kernel", s, groups), axis, axis, pads, windows
    )  # fmt: skip


def depthwise_conv(site: Site) -> Answer:
    """DepthwiseConv2dNative."""
    shape, axis = site.kernel_shape, site.channel_axis
    if not shape:
        return Opaque("has a kernel of unknown shape")
    windows = _windows(site, shape[:-2])
    pads = _pads(site, windows)
    return _linear(
        site, 0, 1, lambda s: layouts.depthwise("kernel", s), axis, axis, pads, windows
    )  # fmt: skip


def conv_transpose(site: Site) -> Answer:
    """Transposed convolutions: the gradients of Conv2D and Conv3D with respect to their input."""
    shape, axis = site.kernel_shape, site.channel_axis
    if not shape:
        return Opaque("has a kernel of unknown shape")
    if (site.shape(2) or site.output)[axis] != shape[-1] or site.output[axis] != shape[-2]:
        return Opaque("works on groups of channels")
    # A constant input gives a constant output only if each output reads one input by the
    # same weights.
    uneven = any(size != 1 for size in (*shape[:-2], *site.attribute("strides")))
    answer = _linear(
        site, 2, 1, lambda s: layouts.conv_transpose("kernel", s), axis, axis, uneven
    )  # fmt: skip
    if isinstance(answer, Described) and isinstance(answer.op, Linear):
        return replace(answer, op=replace(answer.op, uneven=SPREADS))
    return answer


def matmul(site: Site) -> Answer:
    """MatMul and BatchMatMul with one matrix."""
    batched = site.op.type != "MatMul"
    names = ("adj_x", "adj_y") if batched else ("transpose_a", "transpose_b")
    turned, kernel_turned = (site.attribute(name) for name in names)
    if len(site.shape(1)) != 2:
        return Opaque("multiplies by several matrices")
    if turned:
        return Opaque("transposes its input")
    axis = len(site.output) - 1
    answer = _linear(
        site, 0, 1, lambda s: layouts.matrix("kernel", s, kernel_turned), axis, axis
    )  # fmt: skip
    if isinstance(answer, Described) and isinstance(answer.op, Linear):
        return replace(answer, op=replace(answer.op, position_alone=True))
    return answer


def einsum(site: Site) -> Answer:
    """An Einsum of data and a kernel."""
    if len(site.op.inputs) != 2 or not site.shape(0):
        return Opaque()
    equation = site.attribute("equation").decode()
    read = layouts.einsum(equation, len(site.shape(0)), len(site.output))
    if isinstance(read, str):
        return Opaque(read)
    if read.out_axis not in (None, len(site.output) - 1):
        return Opaque("does not have its output channels last")
    return _linear(
        site, 0, 1, lambda s: read.layout("kernel", s), read.in_axis, read.out_axis
    )  # fmt: skip


def gather(site: Site) -> Answer:
    """ResourceGather and GatherV2 of rows of a table, as of an embedding."""
    op = site.op
    if op.type == "ResourceGather":
        weight = site.constants.gathered(op)
    else:
        axis = site.number(2)
        weight = site.constants.weight(op.inputs[0]) if axis is not None and axis == 0 else None
    if weight is None or site.attribute("batch_dims") or len(weight.shape) != 2:
        return Opaque()
    if site.constants.weight(op.inputs[1]) is not None:
        return Opaque("picks the same rows at every call")
    if weight.order != (0, 1):
        return Opaque("has a transposed table")
    table = layouts.table("kernel", weight.shape)
    linear = Linear((table,), None, None, len(site.output) - 1)
    return Described(linear, (op.inputs[1],), op.outputs[0], {"kernel": weight})

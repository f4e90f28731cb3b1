"""Describes graph operations as operations of the neutral graph.

`_DESCRIBERS` lists every operation that is known. Each describer takes a `Site` and says what
that operation does; `Opaque` for all that is not known.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import tensorflow as tf

from mbn_rewrite.frontends.saved_model.function_graph import View, source_of
from mbn_rewrite.frontends.saved_model.weights import Constants, Weight
from mbn_rewrite.frontends.saved_model.writes import ALIASES
from mbn_rewrite.ir import layouts
from mbn_rewrite.ir.algebra import Kernel, Window
from mbn_rewrite.ir.graph import (
    SPREADS,
    Affine,
    ChannelPreserving,
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
    Reshape,
    Shape,
    ZeroPadding,
)


@dataclass(frozen=True)
class Site:
    """An operation in its graph.

    Attributes:
        op: the tf.Operation.
        constants: of its view.
    """

    op: Any
    constants: Constants

    @property
    def view(self) -> View:
        return self.constants.view

    def shape(self, index: int) -> Shape:
        return shape_of(self.op.inputs[index])

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        """The shape of operand 1; () where it is not fully known."""
        shape = self.op.inputs[1].shape
        return tuple(shape) if shape.is_fully_defined() else ()

    @property
    def output(self) -> Shape:
        return shape_of(self.op.outputs[0])

    def number(self, index: int) -> np.ndarray | None:
        """A constant operand such as an axis, or None."""
        value = tf.get_static_value(self.op.inputs[index])
        return None if value is None else np.asarray(value)

    def attribute(self, name: str) -> Any:
        return self.op.get_attr(name)

    @property
    def channels_first(self) -> bool:
        return "data_format" in self.op.node_def.attr and self.attribute("data_format") in (
            b"NCHW",
            b"NCDHW",
        )

    @property
    def channel_axis(self) -> int:
        return 1 if self.channels_first else len(self.output) - 1


@dataclass(frozen=True)
class Described:
    """What an operation is to the planner.

    Attributes:
        op: the neutral operation.
        data: the tensors that it works on; weights are left out.
        result: the tensor that it gives.
        weights: by the names that `op` uses.
        absorbed: operations that it takes in: what adds its bias, and what lies between.
        axis: of a linear operation: the channel axis of its own output, before any bias.
    """

    op: Op
    data: tuple[Any, ...]
    result: Any
    weights: dict[str, Weight] = field(default_factory=dict)
    absorbed: tuple[Any, ...] = ()
    axis: int = -1


def shape_of(tensor: Any) -> Shape:
    """A tensor's shape; () also where its rank is not known."""
    return () if tensor.shape.rank is None else tuple(tensor.shape.as_list())


def describe(site: Site) -> Described:
    """What an operation does."""
    op = site.op
    describer = _DESCRIBERS.get(op.type)
    described = describer(site) if describer and op.outputs and site.output else Opaque()
    if isinstance(described, Described):
        return described
    # Operands such as axes and paddings are no data.
    count = len(op.inputs) if isinstance(described, (Merge, Opaque, Concat)) else 1
    data = op.inputs[: count - 1] if isinstance(described, Concat) else op.inputs[:count]
    return Described(described, tuple(data), op.outputs[0] if op.outputs else None)


Answer = Op | Described

# ------------------------------------------------------------------------ linear operations


def _linear(
    site: Site,
    data: int,
    kernel: int,
    layout: Callable[[tuple[int, ...]], Kernel],
    in_axis: int | None,
    out_axis: int,
    pads: bool = False,
    windows: tuple[Window, ...] = (),
) -> Answer:
    """A linear operation with the bias that is added to what it gives."""
    weight = site.constants.weight(site.op.inputs[kernel])
    if weight is None:
        written = site.constants.written(site.op.inputs[kernel])
        if written is not None:
            return Opaque(f"has weights that {written[1]}")
        return Opaque("has a kernel that is computed while the model runs")
    laid_out = weight.laid_out(layout(weight.shape))
    if laid_out is None:
        return Opaque("has a transposed kernel")
    channels, axis = site.output[out_axis], out_axis
    result, bias, absorbed = site.op.outputs[0], None, ()
    found = _bias_after(site, out_axis, channels)
    if found is not None:
        result, bias, absorbed, out_axis = found
    weights = {"kernel": weight} | ({"bias": bias} if bias else {})
    op = Linear((laid_out,), "bias" if bias else None, in_axis, out_axis, pads, windows=windows)
    return Described(op, (site.op.inputs[data],), result, weights, absorbed, axis)


def _bias_after(
    site: Site, axis: int, channels: int | None
) -> tuple[Any, Weight, tuple[Any, ...], int] | None:
    """The bias added to an operation's output: the sum, the bias, what lies between, and the
    channel axis of the sum.

    A 1-D convolution takes the axis off again that it was given, and a dilated one puts its
    blocks together again, before the bias is added.
    """
    tensor, between = site.op.outputs[0], []
    last = axis == len(site.output) - 1
    while True:
        reader = site.view.only_reader(tensor)
        if reader is None:
            return None
        op, position = reader
        shape = shape_of(op.outputs[0]) if op.outputs else ()
        place = len(shape) - 1 if last else axis
        if not 0 < place < len(shape) or shape[place] != channels:
            return None
        if op.type in ("BiasAdd", "Add", "AddV2"):
            break
        # A reshape that keeps the last axis only moves positions.
        moving = {"Squeeze", "BatchToSpaceND"} | ({"Reshape"} if last else set())
        if op.type not in moving or position != 0:
            return None
        between.append(op)
        tensor = op.outputs[0]
    weight = site.constants.weight(op.inputs[1 - position])
    if weight is None or math.prod(weight.shape) != channels or len(weight.shape) > len(shape):
        return None
    if op.type == "BiasAdd":
        if position != 0 or Site(op, site.constants).channel_axis != place:
            return None
    elif ((1,) * (len(shape) - len(weight.shape)) + weight.shape)[place] != channels:
        return None
    return op.outputs[0], weight, (*between, op), place


def _pads(site: Site, windows: tuple[Window, ...]) -> bool:
    """Whether a convolution reads padding of what it is given."""
    first = 2 if site.channels_first else 1
    sizes = (site.shape(0) or [None] * (len(windows) + 2))[first : first + len(windows)]
    return any(window.pads(size) for window, size in zip(windows, sizes, strict=True))


def _along_positions(site: Site, name: str, axes: int) -> list[int]:
    """What an attribute says of the axes of positions."""
    steps = site.attribute(name) if name in site.op.node_def.attr else []
    first = 2 if site.channels_first else 1
    return list((steps or [1] * (axes + 2))[first : first + axes])


def _windows(site: Site, window: tuple[int, ...]) -> tuple[Window, ...]:
    """How a convolution reads each axis of positions."""
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


def _conv(site: Site) -> Answer:
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


def _depthwise_conv(site: Site) -> Answer:
    shape, axis = site.kernel_shape, site.channel_axis
    if not shape:
        return Opaque("has a kernel of unknown shape")
    windows = _windows(site, shape[:-2])
    pads = _pads(site, windows)
    return _linear(
        site, 0, 1, lambda s: layouts.depthwise("kernel", s), axis, axis, pads, windows
    )  # fmt: skip


def _conv_transpose(site: Site) -> Answer:
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


def _matmul(site: Site) -> Answer:
    batched = site.op.type != "MatMul"
    names = ("adj_x", "adj_y") if batched else ("transpose_a", "transpose_b")
    turned, kernel_turned = (site.attribute(name) for name in names)
    if len(site.shape(1)) != 2:
        return Opaque("multiplies by several matrices")
    if turned:
        return Opaque("transposes its input")
    axis = len(site.output) - 1
    return _linear(
        site, 0, 1, lambda s: layouts.matrix("kernel", s, kernel_turned), axis, axis
    )  # fmt: skip


def _einsum(site: Site) -> Answer:
    if len(site.op.inputs) != 2 or not site.shape(0):
        return Opaque()
    equation = site.attribute("equation").decode()
    read = layouts.einsum(equation, len(site.shape(0)), len(site.output))
    if isinstance(read, str):
        return Opaque(read)
    if read.out_axis != len(site.output) - 1:
        return Opaque("does not have its output channels last")
    return _linear(
        site, 0, 1, lambda s: read.layout("kernel", s), read.in_axis, read.out_axis
    )  # fmt: skip


# ---------------------------------------------------------------- what lets a map pass


def _pool(kind: type[Affine] | type[Monotone]) -> Callable[[Site], Answer]:
    def describer(site: Site) -> Answer:
        axis = site.channel_axis
        if site.op.type.endswith("PoolV2"):
            window = site.number(1)
        else:
            window = np.asarray(site.attribute("ksize"))
        if window is None or window[axis] != 1 or window[0] != 1:
            return Opaque("pools over channels")
        return kind(axis, axis)

    return describer


def _reduction(kind: type[Affine] | type[Monotone]) -> Callable[[Site], Answer]:
    def describer(site: Site) -> Answer:
        axes, rank = site.number(1), len(site.shape(0))
        if axes is None or not rank:
            return Opaque()
        reduced = {int(axis) % rank for axis in axes.reshape(-1)}
        kept = [axis for axis in range(1, rank) if axis not in reduced]
        if 0 in reduced or not kept:
            return Opaque("reduces over the batch or over all channels")
        axis = kept[-1]
        lost = 0 if site.attribute("keep_dims") else sum(r < axis for r in reduced)
        return kind(axis, axis - lost)

    return describer


def _untouched(site: Site, untouched: list[int], kind: type[ChannelPreserving]) -> Answer:
    """An operation that works along some axes; channels lie on one that it leaves alone."""
    axes = [axis for axis in untouched if axis > 0]
    return kind(axes[-1], axes[-1]) if axes else Opaque("works along every axis")


def _pad(site: Site) -> Answer:
    paddings = site.number(1)
    if paddings is None:
        return Opaque("pads by amounts that are computed while the model runs")
    untouched = [axis for axis, pair in enumerate(paddings) if not pair.any()]
    if 0 not in untouched:
        return Opaque("pads the batch")
    if site.op.type == "PadV2":
        value = site.number(2)
        if value is None or np.any(value != 0):
            return Opaque("pads with a constant")
    return _untouched(site, untouched, Affine if site.op.type == "MirrorPad" else ZeroPadding)


def _tile(site: Site) -> Answer:
    multiples = site.number(1)
    if multiples is None:
        return Opaque()
    return _untouched(site, [i for i, count in enumerate(multiples) if count == 1], Affine)


def _slice(site: Site) -> Answer:
    begin, size, shape = site.number(1), site.number(2), site.shape(0)
    if begin is None or size is None or not shape:
        return Opaque("takes a part that is computed while the model runs")
    untouched = [
        axis for axis, (b, s) in enumerate(zip(begin, size, strict=True))
        if b == 0 and s in (-1, shape[axis])
    ]  # fmt: skip
    return _untouched(site, untouched, Affine)


def _strided_slice(site: Site) -> Answer:
    shape, step = site.shape(0), site.number(3)
    masks = [site.attribute(f"{name}_mask") for name in ("ellipsis", "new_axis", "shrink_axis")]
    if step is None or any(masks) or len(step) > len(shape):
        return Opaque("takes a part of it")
    begin, end = site.number(1), site.number(2)
    begins, ends = site.attribute("begin_mask"), site.attribute("end_mask")
    untouched = list(range(len(step), len(shape)))
    for axis, stride in enumerate(step):
        from_start = begins >> axis & 1 or (begin is not None and begin[axis] == 0)
        size = shape[axis]
        to_end = ends >> axis & 1 or (end is not None and size is not None and end[axis] >= size)
        if stride == 1 and from_start and to_end:
            untouched.append(axis)
    return _untouched(site, sorted(untouched), Affine)


def _resize(site: Site) -> Answer:
    return Affine(3, 3)


def _blocks(site: Site) -> Answer:
    """SpaceToBatchND pads with zeros and BatchToSpaceND crops; both move blocks of positions."""
    rank, block = len(site.shape(0)), site.shape(1)
    if not block or block[0] is None or block[0] + 1 >= rank:
        return Opaque("works along every axis")
    paddings = site.number(2)
    crops = site.op.type == "BatchToSpaceND"
    kind = Affine if crops or (paddings is not None and not paddings.any()) else ZeroPadding
    return kind(rank - 1, rank - 1)


def _reshape(site: Site) -> Answer:
    before, after = site.shape(0), site.output
    if not before or not after:
        return Opaque("gives a tensor of unknown shape")
    inner, new_inner = before[1:], after[1:]
    known = None not in inner and None not in new_inner
    if known and math.prod(inner) == math.prod(new_inner):  # type: ignore[arg-type]
        return Reshape()
    # The batch may not stay; what has channels last on both sides only moves positions.
    last = after[-1] or _size_needed(site)
    if len(before) > 1 and len(after) > 1 and before[-1] == last is not None:
        return Affine(len(before) - 1, len(after) - 1)
    return Opaque("mixes channels with positions")


def _size_needed(site: Site) -> int | None:
    """The last size of a result, as the matrix says that it is multiplied by."""
    reader = site.view.only_reader(site.op.outputs[0])
    if reader is None or reader[0].type != "MatMul" or reader[1] != 0:
        return None
    product = Site(reader[0], site.constants)
    if product.attribute("transpose_a") or len(product.shape(1)) != 2:
        return None
    return product.shape(1)[1 if product.attribute("transpose_b") else 0]


def _one_axis(site: Site) -> Answer:
    """ExpandDims and Squeeze: an axis of size 1 comes or goes, anywhere but at the batch."""
    before, after = site.shape(0), site.output
    if not before:
        return Opaque("gives a tensor of unknown shape")
    if site.op.type == "ExpandDims":
        axis = site.number(1)
        if axis is None:
            return Opaque("gives a tensor of unknown shape")
        axes = {int(axis) % len(after)}
    else:
        axes = {int(axis) % len(before) for axis in site.attribute("squeeze_dims")}
    return Opaque("adds or removes the batch") if 0 in axes or not axes else Reshape()


def _transpose(site: Site) -> Answer:
    order = site.number(1)
    if order is None:
        return Opaque("transposes in an order that is computed while the model runs")
    if order[0] != 0:
        return Opaque("moves the batch to another axis")
    return Permute(tuple(int(axis) for axis in order))


def _concat(site: Site) -> Answer:
    axis = site.number(len(site.op.inputs) - 1)
    if axis is None or int(axis) % len(site.output) == 0:
        return Opaque("joins along an axis that is not known, or along the batch")
    return Concat(int(axis) % len(site.output))


def _cast(site: Site) -> Answer:
    floats = site.op.inputs[0].dtype.is_floating and site.op.outputs[0].dtype.is_floating
    return Affine() if floats else Opaque("turns it into numbers of another kind")


def _homogeneous(site: Site) -> Answer:
    return PositivelyHomogeneous()


def _merge(kind: MergeKind) -> Callable[[Site], Answer]:
    def describer(site: Site) -> Answer:
        if not site.op.outputs[0].dtype.is_floating:
            return Opaque()
        if all(site.shape(i) == site.output for i in range(len(site.op.inputs))):
            prelu = _prelu(site) if site.op.type in ("Add", "AddV2", "Sub") else None
            return prelu or Merge(kind)
        if any(site.constants.value(tensor) is not None for tensor in site.op.inputs):
            return Opaque("adds a constant")
        return Merge(kind)

    return describer


def _prelu(site: Site) -> Described | None:
    """relu(x) +- alpha * relu(-x), which Keras writes for PReLU, is positively homogeneous."""
    left, right = (source_of(tensor) for tensor in site.op.inputs)
    if left.op.type != "Relu" or right.op.type != "Mul":
        return None
    data = source_of(left.op.inputs[0])
    factors = [source_of(tensor) for tensor in right.op.inputs]
    turned = next((t for t in factors if t.op.type == "Relu"), None)
    alpha = next((t for t in right.op.inputs if source_of(t) is not turned), None)
    if turned is None or alpha is None or site.constants.value(alpha) is None:
        return None
    negated = source_of(turned.op.inputs[0])
    if negated.op.type != "Neg" or source_of(negated.op.inputs[0]) is not data:
        return None
    inside = (left.op, right.op, turned.op, negated.op)
    if any(site.view.only_reader(op.outputs[0]) is None for op in inside):
        return None
    return Described(
        PositivelyHomogeneous(), (data,), site.op.outputs[0], absorbed=(*inside, site.op)
    )


def _multiplication(site: Site) -> Answer:
    if any(site.constants.value(tensor) is not None for tensor in site.op.inputs):
        return Opaque("multiplies by a constant")
    return Opaque("multiplies it by values that are computed while the model runs")


# ----------------------------------------------------------------------------- the table

_DESCRIBERS: dict[str, Callable[[Site], Answer]] = {
    "Placeholder": lambda site: Input(),
    **dict.fromkeys(("Conv2D", "Conv3D"), _conv),
    "DepthwiseConv2dNative": _depthwise_conv,
    **dict.fromkeys(
        ("Conv2DBackpropInput", "Conv3DBackpropInput", "Conv3DBackpropInputV2"), _conv_transpose
    ),
    **dict.fromkeys(("MatMul", "BatchMatMul", "BatchMatMulV2", "BatchMatMulV3"), _matmul),
    "Einsum": _einsum,
    **dict.fromkeys(("AvgPool", "AvgPool3D"), _pool(Affine)),
    **dict.fromkeys(("MaxPool", "MaxPoolV2", "MaxPool3D"), _pool(Monotone)),
    "Mean": _reduction(Affine),
    "Max": _reduction(Monotone),
    **dict.fromkeys(("Pad", "PadV2", "MirrorPad"), _pad),
    "Tile": _tile,
    "Slice": _slice,
    "StridedSlice": _strided_slice,
    **dict.fromkeys(("ResizeBilinear", "ResizeNearestNeighbor"), _resize),
    **dict.fromkeys(("SpaceToBatchND", "BatchToSpaceND"), _blocks),
    "Reshape": _reshape,
    **dict.fromkeys(("ExpandDims", "Squeeze"), _one_axis),
    "Transpose": _transpose,
    "ConcatV2": _concat,
    "Cast": _cast,
    **dict.fromkeys(("Relu", "LeakyRelu", "Abs"), _homogeneous),
    **dict.fromkeys(("Add", "AddV2", "AddN"), _merge(MergeKind.ADD)),
    "Sub": _merge(MergeKind.SUBTRACT),
    "Maximum": _merge(MergeKind.MAXIMUM),
    "Minimum": _merge(MergeKind.MINIMUM),
    "Mul": _multiplication,
}
assert not ALIASES & set(_DESCRIBERS)

"""Graph operations as operations of the neutral graph.

`_DESCRIBERS` lists every operation that is known. Each describer takes a `Site` and returns the
neutral operation; what is not known is `Opaque`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from mbn_rewrite.frontends.saved_model import linear_ops, position_ops
from mbn_rewrite.frontends.saved_model.branches import BRANCHES
from mbn_rewrite.frontends.saved_model.flags import advice
from mbn_rewrite.frontends.saved_model.function_graph import source_of
from mbn_rewrite.frontends.saved_model.op_site import Answer, Described, Site
from mbn_rewrite.frontends.saved_model.variable_writes import ALIASES
from mbn_rewrite.ir.graph import (
    Affine,
    Clip,
    Concat,
    Input,
    Merge,
    MergeKind,
    Monotone,
    Opaque,
    PositivelyHomogeneous,
    clip,
)


def describe(site: Site) -> Described:
    """The description of an operation for passes."""
    op = site.op
    describer = _DESCRIBERS.get(op.type)
    described = describer(site) if describer and op.outputs and site.output else Opaque()
    if isinstance(described, Described):
        return described
    # Operands such as axes and paddings are no data.
    count = len(op.inputs) if isinstance(described, (Merge, Opaque, Concat)) else 1
    data = op.inputs[: count - 1] if isinstance(described, Concat) else op.inputs[:count]
    return Described(described, tuple(data), op.outputs[0] if op.outputs else None)


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
            known = _plus_zero(site) if kind is MergeKind.ADD else _clip_by_a_number(site, kind)
            return known or Opaque("adds a constant")
        return Merge(kind)

    return describer


def _plus_zero(site: Site) -> Described | None:
    """A sum with 0, with which Python's `sum` begins."""
    for data, other in ((0, 1), (1, 0)):
        if _bound(site, other) == 0.0 and site.shape(data) == site.output:
            return Described(Affine(), (site.op.inputs[data],), site.op.outputs[0])
    return None


def _clip_by_value(site: Site) -> Answer:
    lower, upper = (_bound(site, index) for index in (1, 2))
    return Opaque() if lower is None or upper is None else clip(lower, upper)


def _clip_by_a_number(site: Site, kind: MergeKind) -> Described | None:
    """max(x, number) and min(x, number), with the two in either order."""
    if kind not in (MergeKind.MAXIMUM, MergeKind.MINIMUM):
        return None
    for data, other in ((0, 1), (1, 0)):
        bound = _bound(site, other)
        if bound is not None and site.shape(data) == site.output:
            bounds = (bound, math.inf) if kind is MergeKind.MAXIMUM else (-math.inf, bound)
            op = clip(*bounds, "adds a constant")
            return Described(op, (site.op.inputs[data],), site.op.outputs[0])
    return None


def _bound(site: Site, index: int) -> float | None:
    """The number that an operand is, or None."""
    value = site.constants.value(site.op.inputs[index])
    return float(value.item()) if value is not None and value.size == 1 else None


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
    if any(site.function.only_reader(op.outputs[0]) is None for op in inside):
        return None
    return Described(
        PositivelyHomogeneous(), (data,), site.op.outputs[0], absorbed=(*inside, site.op)
    )


def _multiplication(site: Site) -> Answer:
    if any(site.constants.value(tensor) is not None for tensor in site.op.inputs):
        return Opaque("multiplies by a constant")
    return Merge(MergeKind.MULTIPLY)


def _branch(site: Site) -> Answer:
    advised = advice(site.function, site.op)
    return Opaque(f"does what {advised}") if advised else Opaque()


# ----------------------------------------------------------------------------- the table

_DESCRIBERS: dict[str, Callable[[Site], Answer]] = {
    "Placeholder": lambda site: Input(),
    **dict.fromkeys(("Conv2D", "Conv3D"), linear_ops.conv),
    "DepthwiseConv2dNative": linear_ops.depthwise_conv,
    **dict.fromkeys(
        ("Conv2DBackpropInput", "Conv3DBackpropInput", "Conv3DBackpropInputV2"),
        linear_ops.conv_transpose,
    ),
    **dict.fromkeys(("MatMul", "BatchMatMul", "BatchMatMulV2", "BatchMatMulV3"), linear_ops.matmul),
    "Einsum": linear_ops.einsum,
    **dict.fromkeys(("ResourceGather", "GatherV2"), linear_ops.gather),
    **dict.fromkeys(("AvgPool", "AvgPool3D"), position_ops.pool(Affine)),
    **dict.fromkeys(("MaxPool", "MaxPoolV2", "MaxPool3D"), position_ops.pool(Monotone)),
    "Mean": position_ops.reduction(Affine),
    "Max": position_ops.reduction(Monotone),
    **dict.fromkeys(("Pad", "PadV2", "MirrorPad"), position_ops.pad),
    "Tile": position_ops.tile,
    "Slice": position_ops.crop,
    "StridedSlice": position_ops.strided_slice,
    **dict.fromkeys(("ResizeBilinear", "ResizeNearestNeighbor"), position_ops.resize),
    **dict.fromkeys(("SpaceToBatchND", "BatchToSpaceND"), position_ops.move_blocks),
    "Reshape": position_ops.reshape,
    **dict.fromkeys(("ExpandDims", "Squeeze"), position_ops.one_axis),
    "Transpose": position_ops.transpose,
    "ConcatV2": _concat,
    "Cast": _cast,
    **dict.fromkeys(("LeakyRelu", "Abs"), _homogeneous),
    "Relu": lambda site: Clip(),
    "Relu6": lambda site: Clip(0.0, 6.0),
    "ClipByValue": _clip_by_value,
    **dict.fromkeys(("Add", "AddV2", "AddN"), _merge(MergeKind.ADD)),
    "Sub": _merge(MergeKind.SUBTRACT),
    "Maximum": _merge(MergeKind.MAXIMUM),
    "Minimum": _merge(MergeKind.MINIMUM),
    "Mul": _multiplication,
    **dict.fromkeys(BRANCHES, _branch),
}
assert not ALIASES & set(_DESCRIBERS)

"""Graph operations as operations of the neutral graph.

`_DESCRIBERS` lists every operation that is known. Each describer takes a `Site` and returns the
neutral operation; what is not known is `Opaque`.
"""

from __future__ import annotations

from collections.abc import Callable

from mbn_rewrite.frontends.saved_model import constant_ops, linear_ops, position_ops
from mbn_rewrite.frontends.saved_model.branches import BRANCHES
from mbn_rewrite.frontends.saved_model.flags import advice
from mbn_rewrite.frontends.saved_model.function_graph import source_of
from mbn_rewrite.frontends.saved_model.normalizations import normalization
from mbn_rewrite.frontends.saved_model.op_site import Answer, Described, Site
from mbn_rewrite.frontends.saved_model.recurrences import CALLS, LOOPS, recurrence
from mbn_rewrite.frontends.saved_model.variable_writes import ALIASES
from mbn_rewrite.ir import positions
from mbn_rewrite.ir.constants import Arithmetic
from mbn_rewrite.ir.graph import (
    Affine,
    Clip,
    Concat,
    Input,
    Merge,
    MergeKind,
    Opaque,
    PositivelyHomogeneous,
    Stack,
)


def describe(site: Site) -> Described:
    """The description of an operation for passes."""
    op = site.op
    found = recurrence(site) if op.type in LOOPS | CALLS else None
    if found is not None:
        return found
    describer = _DESCRIBERS.get(op.type)
    described = describer(site) if describer and op.outputs and site.output else Opaque()
    if isinstance(described, Described):
        return described
    # Operands such as axes and paddings are no data.
    count = len(op.inputs) if isinstance(described, (Merge, Opaque, Concat, Stack)) else 1
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


def _added(kind: Arithmetic) -> Callable[[Site], Answer]:
    """A sum or difference, or all of a PReLU or of a normalisation of examples."""
    describer = constant_ops.arithmetic(kind)
    return lambda site: _prelu(site) or normalization(site) or describer(site)


def _reshaped(site: Site) -> Answer:
    return normalization(site) or position_ops.reshape(site)


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


def _gather(site: Site) -> Answer:
    """Rows of a table, or places of a tensor."""
    is_table = site.op.type == "ResourceGather" or site.constants.is_fixed(site.op.inputs[0])
    return linear_ops.gather(site) if is_table else position_ops.gather(site)


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
    **dict.fromkeys(("ResourceGather", "GatherV2"), _gather),
    **dict.fromkeys(("AvgPool", "AvgPool3D"), position_ops.pool(positions.mean)),
    **dict.fromkeys(("MaxPool", "MaxPoolV2", "MaxPool3D"), position_ops.pool(positions.maximum)),
    "Mean": position_ops.reduction(positions.mean),
    "Max": position_ops.reduction(positions.maximum),
    "Min": position_ops.reduction(positions.minimum),
    "Sum": position_ops.reduction(None),
    **dict.fromkeys(("Pad", "PadV2", "MirrorPad"), position_ops.pad),
    "Tile": position_ops.tile,
    "Slice": position_ops.slice_of,
    "StridedSlice": position_ops.strided_slice,
    **dict.fromkeys(("Split", "SplitV"), position_ops.split),
    "Unpack": position_ops.unpack,
    "Pack": position_ops.pack,
    "Roll": position_ops.roll,
    "ReverseV2": position_ops.reverse,
    "SpaceToDepth": position_ops.to_depth(inverse=False),
    "DepthToSpace": position_ops.to_depth(inverse=True),
    **dict.fromkeys(("ResizeBilinear", "ResizeNearestNeighbor"), position_ops.resize),
    **dict.fromkeys(("SpaceToBatchND", "BatchToSpaceND"), position_ops.move_blocks),
    "Reshape": _reshaped,
    **dict.fromkeys(("ExpandDims", "Squeeze"), position_ops.one_axis),
    "Transpose": position_ops.transpose,
    "ConcatV2": _concat,
    "Cast": _cast,
    **dict.fromkeys(("LeakyRelu", "Abs"), _homogeneous),
    "Relu": lambda site: Clip(),
    "Relu6": lambda site: Clip(0.0, 6.0),
    "ClipByValue": constant_ops.clip_by_value,
    **dict.fromkeys(("Add", "AddV2"), _added(Arithmetic.ADD)),
    "Sub": _added(Arithmetic.SUBTRACT),
    "BiasAdd": constant_ops.arithmetic(Arithmetic.ADD),
    "AddN": lambda site: Merge(MergeKind.ADD),
    "Mul": constant_ops.arithmetic(Arithmetic.MULTIPLY),
    **dict.fromkeys(("RealDiv", "Div"), constant_ops.arithmetic(Arithmetic.DIVIDE)),
    "Neg": constant_ops.negative,
    "Maximum": constant_ops.extremum(MergeKind.MAXIMUM),
    "Minimum": constant_ops.extremum(MergeKind.MINIMUM),
    **dict.fromkeys(BRANCHES, _branch),
}
assert not ALIASES & set(_DESCRIBERS)

"""TensorFlow functions on Keras tensors, as operations of the neutral graph."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import tensorflow as tf
from tf_keras.src.layers.core.tf_op_layer import SlicingOpLambda, TFOpLambda

from mbn_rewrite.frontends.keras_common.calls import Call
from mbn_rewrite.frontends.keras_common.op_table import clip_between, clip_by_a_number
from mbn_rewrite.ir import positions
from mbn_rewrite.ir.constants import Arithmetic, constant_map, with_constant
from mbn_rewrite.ir.graph import (
    Affine,
    Concat,
    Merge,
    MergeKind,
    Op,
    Opaque,
    PositivelyHomogeneous,
    Several,
    Stack,
)
from mbn_rewrite.ir.positions import whole

_MERGES = {
    "__operators__.add": MergeKind.ADD,
    "math.add": MergeKind.ADD,
    "add": MergeKind.ADD,
    "math.subtract": MergeKind.SUBTRACT,
    "math.maximum": MergeKind.MAXIMUM,
    "math.minimum": MergeKind.MINIMUM,
    "__operators__.mul": MergeKind.MULTIPLY,
    "math.multiply": MergeKind.MULTIPLY,
    "multiply": MergeKind.MULTIPLY,
}

_JOINS: dict[str, type[Concat] | type[Stack]] = {"concat": Concat, "stack": Stack}

Given = dict[str, Any]  # arguments of a call, by name
Row = Callable[[Call, Given], Op | Several]


def describe(call: Call) -> Op | Several | None:
    """Operation of a function; None for what is a layer."""
    is_function = type(call.layer) in (TFOpLambda, SlicingOpLambda)
    return _function(call) if is_function and call.record else None


def _function(call: Call) -> Op | Several:
    symbol = call.layer.symbol
    kind = _MERGES.get(symbol)
    if kind and len(call.inputs) == 2:
        return Opaque() if call.arguments else Merge(kind)
    given = _given(call)
    joins = _JOINS.get(symbol)
    if joins and given and whole(given.get("axis")) is not None:
        return joins(given["axis"] % len(call.output))
    describer = _TABLE.get(symbol)
    if describer is None or given is None or len(call.inputs) != 1:
        return Opaque()
    return describer(call, given)


def _given(call: Call) -> Given | None:
    """Arguments of a call, by name, constant tensors as arrays; None if they are not known."""
    assert call.record is not None
    try:
        signature = inspect.signature(call.layer.function)
        bound = signature.bind(*call.record.args, **call.record.kwargs)
    except (TypeError, ValueError):
        return None
    bound.apply_defaults()
    return {name: _known(value) for name, value in bound.arguments.items()}


def _known(argument: Any) -> Any:
    """An argument of a function; a constant tensor as array."""
    return tf.get_static_value(argument) if isinstance(argument, tf.Tensor) else argument


# ----------------------------------------------------------------------------- arithmetic


def _arithmetic(kind: Arithmetic) -> Row:
    def row(call: Call, given: Given) -> Op:
        if call.inputs[0] != call.output:
            return Opaque("adds axes to it")
        left, right = list(given.values())[:2]
        comes_first = _is_data(call, right)
        return with_constant(kind, left if comes_first else right, comes_first, call.output)

    return row


def _is_data(call: Call, value: Any) -> bool:
    assert call.record is not None
    return any(value is tensor for tensor in call.record.inputs)


def _extremum(kind: MergeKind) -> Row:
    def row(call: Call, given: Given) -> Op:
        return clip_by_a_number(kind, tuple(map(_known, call.arguments))) or Opaque()

    return row


def _clip_by_value(call: Call, given: Given) -> Op:
    return clip_between(given["clip_value_min"], given["clip_value_max"])


# ------------------------------------------------------------------------------ positions


def _reduction(kind: Callable[..., Op] | None) -> Row:
    def row(call: Call, given: Given) -> Op:
        return positions.reduction(kind, call.inputs[0], given["axis"], given["keepdims"])

    return row


def _pool(kind: Callable[..., Op]) -> Row:
    def row(call: Call, given: Given) -> Op:
        if not isinstance(given["padding"], str):
            return Opaque("pads by amounts of its own")
        layout = given.get("data_format")
        return positions.pool(kind, len(call.inputs[0]), given["ksize"], layout)

    return row


def _reshaped(call: Call, given: Given) -> Op:
    return positions.reshaped(call.inputs[0], call.output)


def _transposed(call: Call, given: Given) -> Op:
    rank, order = len(call.inputs[0]), given["perm"]
    return positions.transposed(range(rank)[::-1] if order is None else order, rank)


def _item(call: Call, given: Given) -> Op | Several:
    key = list(given.values())[1]
    parts = key if isinstance(key, (list, tuple)) else [key]
    return positions.item(call.inputs[0], [_slice(part) for part in parts])


def _slice(part: Any) -> Any:
    """Part of an index, of which tf_keras keeps slices as dictionaries."""
    return slice(part["start"], part["stop"], part["step"]) if isinstance(part, dict) else part


def _padded(call: Call, given: Given) -> Op:
    rank = len(call.inputs[0])
    return positions.padded(rank, given["paddings"], given["mode"], given["constant_values"])


def _split(call: Call, given: Given) -> Op | Several:
    return positions.split(call.inputs[0], given["num_or_size_splits"], given["axis"], sizes=True)


def _gathered(call: Call, given: Given) -> Op:
    if given.get("batch_dims"):
        return Opaque(positions.OPEN)
    axis = 0 if given["axis"] is None else given["axis"]
    return positions.gathered(call.inputs[0], given["indices"], axis)


def _repeated(call: Call, given: Given) -> Op:
    return positions.repeated(call.inputs[0], given["repeats"], given["axis"])


def _resized(call: Call, given: Given) -> Op:
    return positions.resized(len(call.inputs[0]), given["method"])


def _to_depth(inverse: bool) -> Row:
    def row(call: Call, given: Given) -> Op:
        if given["data_format"] != "NHWC":
            return Opaque(positions.OPEN)
        return positions.to_depth(call.inputs[0], given["block_size"], inverse)

    return row


def _cast(call: Call, given: Given) -> Op:
    assert call.record is not None
    tensors = (*call.record.inputs, *call.record.outputs)
    if not all(tensor.dtype.is_floating for tensor in tensors):
        return Opaque("turns it into numbers of another kind")
    return Affine(axes=tuple((axis, axis) for axis in range(1, len(call.output))))


def _of_shape(function: Callable[..., Op | Several], *names: str) -> Row:
    """Row by the shape of the input and arguments of the function."""
    return lambda call, given: function(call.inputs[0], *(given[name] for name in names))


def _table(rows: dict[str, Row]) -> dict[str, Row]:
    return {name: row for names, row in rows.items() for name in names.split()}


_TABLE: dict[str, Row] = _table(
    {
        "identity stop_gradient": lambda call, given: Affine(),
        "nn.relu": lambda call, given: clip_between(0.0, None),
        "nn.relu6": lambda call, given: clip_between(0.0, 6.0),
        "nn.leaky_relu math.abs abs": lambda call, given: PositivelyHomogeneous(),
        "clip_by_value": _clip_by_value,
        "math.maximum": _extremum(MergeKind.MAXIMUM),
        "math.minimum": _extremum(MergeKind.MINIMUM),
        "__operators__.add math.add add": _arithmetic(Arithmetic.ADD),
        "math.subtract subtract": _arithmetic(Arithmetic.SUBTRACT),
        "__operators__.mul math.multiply multiply": _arithmetic(Arithmetic.MULTIPLY),
        "math.truediv math.divide": _arithmetic(Arithmetic.DIVIDE),
        "math.negative negative": lambda call, given: constant_map(-1.0, 0.0, call.output),
        "math.reduce_mean reduce_mean": _reduction(positions.mean),
        "math.reduce_sum reduce_sum": _reduction(None),
        "math.reduce_max reduce_max": _reduction(positions.maximum),
        "math.reduce_min reduce_min": _reduction(positions.minimum),
        "nn.avg_pool nn.avg_pool1d nn.avg_pool2d nn.avg_pool3d": _pool(positions.mean),
        "nn.max_pool nn.max_pool1d nn.max_pool2d nn.max_pool3d": _pool(positions.maximum),
        "reshape": _reshaped,
        "transpose compat.v1.transpose": _transposed,
        "expand_dims": _of_shape(positions.expanded, "axis"),
        "squeeze compat.v1.squeeze": _of_shape(positions.squeezed, "axis"),
        "__operators__.getitem": _item,
        "pad compat.v1.pad": _padded,
        "roll": _of_shape(positions.rolled, "shift", "axis"),
        "reverse": _of_shape(positions.flipped, "axis"),
        "split": _split,
        "unstack": _of_shape(positions.unstacked, "axis"),
        "gather compat.v1.gather": _gathered,
        "tile": _of_shape(positions.tiled, "multiples"),
        "repeat": _repeated,
        "image.resize": _resized,
        "nn.space_to_depth": _to_depth(inverse=False),
        "nn.depth_to_space": _to_depth(inverse=True),
        "cast": _cast,
    }
)

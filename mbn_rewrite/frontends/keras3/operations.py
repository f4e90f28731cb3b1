"""Operations of `keras.ops` that models call like layers, as operations of the neutral graph."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras.src.activations.activations import ReLU
from keras.src.ops import core, image, nn, numpy

from mbn_rewrite.frontends.keras_common.calls import Call, Describer
from mbn_rewrite.frontends.keras_common.op_table import clip_between, clip_by_a_number, relu
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

# Activations that clip, with their bounds.
CLIPS = {"relu": (0.0, None), "relu6": (0.0, 6.0), "hard_tanh": (-1.0, 1.0)}


def describe(call: Call) -> Op | Several | None:
    """Operation of a call with constants beside its tensor; None where there is nothing to say."""
    describer = _WITH_CONSTANTS.get(type(call.layer))
    return describer(call) if describer and len(call.inputs) == 1 and call.record else None


def _given(call: Call) -> dict[str, Any]:
    """Arguments of a call, by name."""
    assert call.record is not None
    signature = inspect.signature(call.layer.call)
    return dict(signature.bind(*call.record.args, **call.record.kwargs).arguments)


# ----------------------------------------------------------------------------- arithmetic


def _arithmetic(kind: Arithmetic, merges: MergeKind | None = None) -> Describer:
    def describer(call: Call) -> Op:
        left, right = list(_given(call).values())[:2]
        if call.inputs[0] != call.output:
            return Opaque("adds axes to it")
        comes_first = isinstance(right, keras.KerasTensor)
        return with_constant(kind, left if comes_first else right, comes_first, call.output)

    return describer


def _extremum(kind: MergeKind) -> Describer:
    return lambda call: clip_by_a_number(kind, call.arguments) or Opaque()


def _negative(call: Call) -> Op:
    return constant_map(-1.0, 0.0, call.output)


# ------------------------------------------------------------------------------ positions


def _reduction(kind: Callable[..., Op] | None) -> Describer:
    def describer(call: Call) -> Op:
        layer = call.layer
        if getattr(layer, "initial", None) is not None:
            return Opaque("has another number among those it compares")
        return positions.reduction(kind, call.inputs[0], layer.axis, layer.keepdims)

    return describer


def _pool(kind: Callable[..., Op]) -> Describer:
    def describer(call: Call) -> Op:
        layer = call.layer
        return positions.pool(kind, len(call.inputs[0]), layer.pool_size, layer.data_format)

    return describer


def _split(call: Call) -> Op | Several:
    parts = call.layer.indices_or_sections
    return positions.split(call.inputs[0], parts, call.layer.axis, sizes=False)


def _padded(call: Call) -> Op:
    value = _given(call).get("constant_values")
    amounts = call.layer.pad_width
    rank = len(call.inputs[0])
    return positions.padded(rank, _every_axis(amounts, rank), call.layer.mode, value)


def _every_axis(amounts: Any, rank: int) -> Any:
    """Amounts of padding for each axis, of which one may stand for all."""
    if np.ndim(amounts) == 2:
        return amounts if len(amounts) == rank else list(amounts) * rank
    return [amounts if np.ndim(amounts) else (amounts, amounts)] * rank


def _resized(call: Call) -> Op:
    layer = call.layer
    if getattr(layer, "pad_to_aspect_ratio", False):
        return Opaque("pads with a constant")
    layout = getattr(layer, "data_format", None)
    return positions.resized(len(call.inputs[0]), layer.interpolation, layout)


def _transposed(call: Call) -> Op:
    rank = len(call.inputs[0])
    axes = call.layer.axes
    return positions.transposed(range(rank)[::-1] if axes is None else list(axes), rank)


def _swapped(call: Call) -> Op:
    rank = len(call.inputs[0])
    order = list(range(rank))
    a, b = call.layer.axis1, call.layer.axis2
    order[a], order[b] = order[b], order[a]
    return positions.transposed(order, rank)


def _moved(call: Call) -> Op:
    order = np.moveaxis(
        np.empty(range(len(call.inputs[0]))), call.layer.source, call.layer.destination
    ).shape
    return positions.transposed(list(order), len(order))


def _cast(call: Call) -> Op:
    assert call.record is not None
    dtypes = (
        keras.backend.standardize_dtype(t.dtype)
        for t in (*call.record.inputs, *call.record.outputs)
    )
    if not all("float" in dtype for dtype in dtypes):
        return Opaque("turns it into numbers of another kind")
    return Affine(axes=tuple((axis, axis) for axis in range(1, len(call.output))))


def _of_shape(function: Callable[..., Op | Several], *attributes: str) -> Describer:
    """Describer by the shape of the input and attributes of the operation."""
    return lambda call: function(call.inputs[0], *(getattr(call.layer, a) for a in attributes))


# ----------------------------------------------------------------------------- the tables


def _merge(kind: MergeKind) -> Describer:
    return lambda call: Merge(kind) if len(call.inputs) == 2 else Opaque()


def _concatenate(call: Call) -> Op:
    axis = call.layer.axis
    return Opaque() if axis is None else Concat(axis % len(call.output))


def _stack(call: Call) -> Op:
    return Stack(call.layer.axis % len(call.output))


def _known(module: Any, table: dict[str, Describer]) -> dict[type, Describer]:
    """Those operations that the installed Keras has, by class."""
    return {
        getattr(module, name): describer
        for names, describer in table.items()
        for name in names.split()
        if hasattr(module, name)
    }


OPERATIONS: dict[type, Describer] = {
    numpy.Add: _merge(MergeKind.ADD),
    numpy.Subtract: _merge(MergeKind.SUBTRACT),
    numpy.Maximum: _merge(MergeKind.MAXIMUM),
    numpy.Minimum: _merge(MergeKind.MINIMUM),
    numpy.Multiply: _merge(MergeKind.MULTIPLY),
    numpy.Concatenate: _concatenate,
    numpy.Stack: _stack,
    numpy.Clip: lambda call: clip_between(call.layer.x_min, call.layer.x_max),
    nn.Relu: lambda call: clip_between(*CLIPS["relu"]),
    nn.Relu6: lambda call: clip_between(*CLIPS["relu6"]),
    nn.HardTanh: lambda call: clip_between(*CLIPS["hard_tanh"]),
    nn.LeakyRelu: lambda call: PositivelyHomogeneous(),
    ReLU: relu,
    core.StopGradient: lambda call: Affine(),
}

# Of one tensor, with constants beside it or in attributes.
_WITH_CONSTANTS: dict[type, Describer] = {
    **_known(
        numpy,
        {
            "Add": _arithmetic(Arithmetic.ADD),
            "Subtract": _arithmetic(Arithmetic.SUBTRACT),
            "Multiply": _arithmetic(Arithmetic.MULTIPLY),
            "Divide TrueDivide": _arithmetic(Arithmetic.DIVIDE),
            "Maximum": _extremum(MergeKind.MAXIMUM),
            "Minimum": _extremum(MergeKind.MINIMUM),
            "Negative": _negative,
            "Absolute Abs": lambda call: PositivelyHomogeneous(),
            "Mean": _reduction(positions.mean),
            "Sum": _reduction(None),
            "Max Amax": _reduction(positions.maximum),
            "Min Amin": _reduction(positions.minimum),
            "Reshape": lambda call: positions.reshaped(call.inputs[0], call.output),
            "Transpose": _transposed,
            "Swapaxes": _swapped,
            "Moveaxis": _moved,
            "ExpandDims": _of_shape(positions.expanded, "axis"),
            "Squeeze": _of_shape(positions.squeezed, "axis"),
            "GetItem": lambda call: positions.item(call.inputs[0], _given(call)["key"]),
            "Pad": _padded,
            "Roll": _of_shape(positions.rolled, "shift", "axis"),
            "Flip": _of_shape(positions.flipped, "axis"),
            "Repeat": _of_shape(positions.repeated, "repeats", "axis"),
            "Tile": _of_shape(positions.tiled, "repeats"),
            "Take": lambda call: positions.gathered(
                call.inputs[0], _given(call)["indices"], call.layer.axis
            ),
            "Split": _split,
        },
    ),
    **_known(core, {"Unstack": _of_shape(positions.unstacked, "axis"), "Cast": _cast}),
    **_known(nn, {"AveragePool": _pool(positions.mean), "MaxPool": _pool(positions.maximum)}),
    **_known(image, {"Resize": _resized}),
}

"""Recognises BatchNormalization written out as arithmetic.

A run of elementwise operations, each with one operand that is constant per channel,

    y = (x - mean) * rsqrt(variance + epsilon) * gamma + beta

in whatever order and grouping, with casts and reshapes of the constants, or with the constants
already computed (a multiplication and an addition by vectors). Each step of a run is an
affine map per channel, so the run is one: nothing needs to be known of its form but where it
begins and ends.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from mbn_rewrite.frontends.saved_model.function_graph import FunctionGraph, source_of
from mbn_rewrite.frontends.saved_model.match_batchnorm import (
    FUSED,
    Norm,
    channel_axis,
    ends_of,
    keys_of,
)
from mbn_rewrite.frontends.saved_model.weights import Constants
from mbn_rewrite.ir.channel_map import Array, ChannelMap
from mbn_rewrite.ir.reasons import Obstacle, Reason

# Operations in the expression of the variance of a BatchNormalization.
_ROOTS = {"Rsqrt", "Sqrt", "Pow"}
_ADDITIONS = {"Add", "AddV2", "Sub", "BiasAdd"}
_DIVISIONS = ("RealDiv", "Div", "DivNoNan")
_ELEMENTWISE = {"Mul", "Add", "AddV2", "Sub", "BiasAdd", *_DIVISIONS}
_MOST_STEPS = 8  # of a BatchNormalization whose constants are broadcast to the shape of its input


@dataclass(frozen=True)
class Step:
    """One elementwise operation with one constant operand: scale * x + shift.

    Attributes:
        op: the operation.
        data: the operand that is not constant.
        constant: the operand that is, or None (negation).
        scale, shift: float64, of the shape that `constant` has when it is broadcast.
        axis: the axis along which `constant` varies, or None where it is one number.
        roots: the keys of the variances, as stored, that `constant` takes the root of.
        fits: whether `constant` is known to fit `data`, whose shape may not be known.
    """

    op: Any
    data: Any
    constant: Any
    scale: Array
    shift: Array
    axis: int | None
    roots: frozenset[Any]
    fits: bool = True


def step_of(constants: Constants, op: Any) -> Step | None:
    """The step of an elementwise operation that has one operand that is not constant, or None."""
    if op.type not in _ELEMENTWISE or not op.inputs[0].dtype.is_floating:
        return None  # among others, for arithmetic of shapes
    left, right = op.inputs[0], op.inputs[1]
    value = _value_beside(constants, left, right)
    data, constant, flipped = left, right, False
    if value is None:
        value = _value_beside(constants, right, left)
        data, constant, flipped = right, left, True
    if value is None or constants.value(data) is not None:
        return None
    if flipped and op.type in _DIVISIONS:
        return None
    if op.type == "BiasAdd":
        axis: int | None = channel_axis(op)
        fits = True
    else:
        axis, fits = _varying_axis(value, data.shape)
    if not fits and not _may_fit(value, data.shape):
        return None
    vector = value.reshape(-1)
    one, zero = np.ones_like(vector), np.zeros_like(vector)
    with np.errstate(all="ignore"):  # the caller reports a map that is not finite
        scale, shift = {
            "Mul": (vector, zero),
            **dict.fromkeys(_DIVISIONS, (one / vector, zero)),
            "DivNoNan": (np.where(vector == 0, zero, one / vector), zero),
            "Sub": (-one, vector) if flipped else (one, -vector),
        }.get(op.type, (one, vector))
    roots = frozenset(
        stored.key
        for name in constants.depends_on(constant, _ROOTS)
        if _is_root_of_variance(
            constants, root := constants.function.graph.get_operation_by_name(name)
        )
        for stored in constants.stored_in(root.outputs[0])
        if math.prod(stored.shape) > 1 or stored.is_variable
    )
    return Step(op, data, constant, scale, shift, axis, roots, fits)


def _value_beside(constants: Constants, data: Any, tensor: Any) -> Array | None:
    """The value of an operand, before it was broadcast to the shape of the data beside it."""
    before = source_of(tensor)
    if before.op.type != "BroadcastTo" or data.shape.rank is None:
        return constants.value(tensor)
    value = constants.value(before.op.inputs[0])
    shape = source_of(before.op.inputs[1]).op
    alike = shape.type == "Shape" and _is_of_shape(constants, data, shape.inputs[0])
    if not alike and data.shape.is_fully_defined():
        alike = before.shape.is_fully_defined() and data.shape == before.shape
    return value if alike else constants.value(tensor)


def _is_of_shape(constants: Constants, data: Any, other: Any) -> bool:
    """Whether data has the shape of another tensor because it is computed of that by steps."""
    other, data = source_of(other), source_of(data)
    for _ in range(_MOST_STEPS):
        if data is other:
            return True
        if data.op.type not in _ELEMENTWISE or data.shape.rank != data.op.inputs[0].shape.rank:
            return False
        unknown = [t for t in data.op.inputs if not constants.is_fixed(t)]
        # Operands that are broadcast to the shape of the same tensor do not count.
        unknown = [t for t in unknown if source_of(t).op.type != "BroadcastTo"]
        if len(unknown) != 1:
            return False
        data = source_of(unknown[0])
    return False


def _varying_axis(value: Array, shape: Any) -> tuple[int | None, bool]:
    """The axis of a tensor along which a broadcast array varies, and whether it fits it."""
    if value.size == 1:
        return None, shape.rank is not None and value.ndim <= shape.rank
    if shape.rank is None or value.ndim > shape.rank:
        return None, False
    axes = [axis - value.ndim for axis, size in enumerate(value.shape) if size > 1]
    if len(axes) != 1 or shape[shape.rank + axes[0]] != value.size:
        return None, False
    axis = shape.rank + axes[0]
    return axis, axis > 0


def _may_fit(value: Array, shape: Any) -> bool:
    """Whether an array may vary along one axis of a tensor whose shape is not known."""
    axes = [axis - value.ndim for axis, size in enumerate(value.shape) if size > 1]
    if len(axes) != 1:
        return False
    return shape.rank is None or (-axes[0] < shape.rank and shape[shape.rank + axes[0]] is None)


def _is_root_of_variance(constants: Constants, op: Any) -> bool:
    """Whether an operation is 1/sqrt(variance + epsilon), or the square root alone.

    Inputs are prepared by the roots of constants, too, but not of variables.
    """
    if source_of(op.inputs[0]).op.type in ("Add", "AddV2"):
        return True
    if op.outputs[0].shape.num_elements() == 1:
        return False
    of_variables = any(stored.is_variable for stored in constants.stored_in(op.inputs[0]))
    return op.type == "Rsqrt" or of_variables


def arithmetic_norms(constants: Constants, taken: set[str]) -> Iterator[Norm]:
    """The BatchNormalizations that are written out as arithmetic.

    Args:
        constants: of the function.
        taken: names of operations that belong to something else (the biases of linear
            operations).
    """
    function = constants.function
    steps = {}
    for op in function.valued:
        if op.name not in taken:
            step = step_of(constants, op)
            if step is not None:
                steps[op.name] = step
    for run in _runs(function, steps):
        norm = _norm_of(constants, run)
        if norm is not None:
            yield norm


def _runs(function: FunctionGraph, steps: dict[str, Step]) -> Iterator[list[Step]]:
    """Steps that follow each other and that nothing else reads between."""
    begun: set[str] = set()
    for step in steps.values():
        before = steps.get(source_of(step.data).op.name)
        if before is not None and _continues(function, before, steps) is step:
            continue  # it is in the run of the step before it
        run: list[Step] = [step]
        following = _continues(function, step, steps)
        while following is not None and following.op.name not in begun:
            run.append(following)
            following = _continues(function, run[-1], steps)
        begun.update(s.op.name for s in run)
        yield from _separated(run)


def _continues(function: FunctionGraph, step: Step, steps: dict[str, Step]) -> Step | None:
    reader = function.only_reader(step.op.outputs[0])
    return steps.get(reader[0].name) if reader else None


def _separated(run: list[Step]) -> Iterator[list[Step]]:
    """A run with the roots of several variances is several BatchNormalizations."""
    part: list[Step] = []
    roots: frozenset[Any] = frozenset()
    for step in run:
        if part and roots and step.roots and not step.roots & roots:
            # (y - mean) begins the next one.
            begun = [part.pop()] if part[-1].op.type == "Sub" and not part[-1].roots else []
            yield part
            part, roots = begun, frozenset()
        part.append(step)
        roots |= step.roots
    yield part


def _norm_of(constants: Constants, run: list[Step]) -> Norm | None:
    """The run as one map, if it is a BatchNormalization."""
    run = _without_preparation(run)
    if not any(step.roots for step in run) and not _is_precomputed(constants, run):
        return None
    axes = {step.axis for step in run if step.axis is not None}
    source, sink, casts = ends_of(constants.function, run[0].data, run[-1].op.outputs[0])
    keys = tuple(
        key
        for step in run
        if step.constant is not None
        for key in keys_of(constants, step.constant)
    )
    rank = source.shape.rank or 0
    ops = (*(step.op for step in run), *casts)

    def staying(obstacle: Obstacle, detail: str = "") -> Norm:
        return Norm(ops, source, sink, rank, None, None, keys, Reason(obstacle, detail))

    if not all(step.fits for step in run):
        return staying(Obstacle.AXIS_UNKNOWN)
    if len(axes) > 1:
        return staying(Obstacle.AXES_DIFFER)
    shape = run[0].data.shape
    axis = axes.pop() if axes else _axis_of_one_channel(shape)
    if axis is None or shape[axis] is None:
        return staying(Obstacle.AXIS_UNKNOWN)
    scale, shift = np.ones(shape[axis]), np.zeros(shape[axis])
    with np.errstate(all="ignore"):  # reported just below
        for step in run:
            scale, shift = scale * step.scale, shift * step.scale + step.shift
    channel_map = ChannelMap(scale, shift, axis)
    if not channel_map.is_finite:
        return staying(Obstacle.NO_FINITE_SCALE, "its statistics")
    return Norm(ops, source, sink, rank, axis, channel_map, keys)


def _without_preparation(run: list[Step]) -> list[Step]:
    """A run without the scaling around a BatchNormalization.

    That is done by single numbers, or before it by what ends another normalisation.
    """
    if all(step.axis is None for step in run):
        return run
    while len(run) > 2 and _scales_and_shifts(run[:2]) and any(step.roots for step in run[2:]):
        run = run[2:]
    while len(run) > 1 and run[0].axis is None and not run[0].roots:
        run = run[1:]
    while len(run) > 1 and run[-1].axis is None and not run[-1].roots:
        run = run[:-1]
    return run


def _scales_and_shifts(steps: list[Step]) -> bool:
    """Whether steps multiply and then add, which no BatchNormalization begins with."""
    first, second = steps
    is_sum = first.op.type == "Mul" and second.op.type in _ADDITIONS - {"Sub"}
    return is_sum and not (first.roots | second.roots)


def _is_precomputed(constants: Constants, run: list[Step]) -> bool:
    """Whether a run is (x - mean) * scale + shift, by vectors of the graph.

    The mean may be part of the shift, and the scale may be several vectors. A BatchNormalization
    whose constants were computed beforehand is left as that. A normalisation by the data itself (of
    layers, instances or groups) ends in the same way, so it is looked for before the run.
    """
    kinds = [step.op.type for step in run]
    factors = kinds[1:-1] if kinds[0] == "Sub" else kinds[:-1]
    if not factors or set(factors) != {"Mul"} or kinds[-1] not in _ADDITIONS:
        return False
    if any(
        not step.fits or step.axis is None or not _is_constant_of_graph(constants, step)
        for step in run
    ):
        return False
    pending, depth = [source_of(run[0].data)], 0
    while pending and depth < 8:
        tensor, depth = pending.pop(), depth + 1
        if tensor.op.type in ("Rsqrt", "Sqrt", "Mean") or tensor.op.type in FUSED:
            return False
        if tensor.op.type in ("Mul", "Add", "AddV2", "Sub", "RealDiv", "Reshape", "Transpose"):
            pending += [source_of(t) for t in tensor.op.inputs if constants.value(t) is None]
    return True


def _is_constant_of_graph(constants: Constants, step: Step) -> bool:
    return all(not stored.is_variable for stored in constants.stored_in(step.constant))


def _axis_of_one_channel(shape: Any) -> int | None:
    """The channel axis of a tensor with one channel."""
    if not shape.rank or shape.rank < 2:
        return None
    return next((axis for axis in (shape.rank - 1, 1) if shape[axis] == 1), None)

"""Arithmetic of a tensor and constants in code, as operations of the neutral graph."""

from __future__ import annotations

from typing import Any

import numpy as np

from mbn_rewrite.enums import Name
from mbn_rewrite.ir.channel_map import Array
from mbn_rewrite.ir.graph import Affine, ConstantMap, Op, Opaque, Shape


class Arithmetic(Name):
    """Arithmetic operation of two operands."""

    ADD = "add"
    SUBTRACT = "subtract"
    MULTIPLY = "multiply"
    DIVIDE = "divide"


def with_constant(kind: Arithmetic, constant: Any, comes_first: bool, shape: Shape) -> Op:
    """Operation of a tensor and a constant.

    Args:
        kind: of operation.
        constant: a number or array.
        comes_first: whether it is the left operand.
        shape: of the tensor, and of the result.
    """
    array = as_array(constant)
    if array is None:
        return Opaque()
    match kind:
        case Arithmetic.ADD:
            return constant_map(1.0, array, shape)
        case Arithmetic.SUBTRACT:
            signs = (-1.0, 1.0) if comes_first else (1.0, -1.0)
            return constant_map(signs[0], signs[1] * array, shape)
        case Arithmetic.MULTIPLY:
            return constant_map(array, 0.0, shape)
        case Arithmetic.DIVIDE:
            if comes_first:
                return Opaque("divides by it")
            with np.errstate(all="ignore"):  # what is not finite is found below
                return constant_map(1.0 / array, 0.0, shape)


def as_array(constant: Any) -> Array | None:
    """A constant in float64, or None if it is no number or array of numbers."""
    if hasattr(constant, "assign"):  # a variable, which may change
        return None
    try:
        array = np.asarray(constant)
    except Exception:  # whatever a tensor raises that has no value
        return None
    return array.astype(np.float64) if array.dtype.kind in "fiu" else None


def constant_map(scale: Any, shift: Any, shape: Shape) -> Op:
    """scale * x + shift, for numbers or arrays that differ by channel at most.

    Args:
        scale: float64, of a shape that broadcasts against that of x.
        shift: likewise.
        shape: of x, and of the result.
    """
    scale, shift = np.broadcast_arrays(np.float64(scale), np.float64(shift))
    if not (np.all(np.isfinite(scale)) and np.all(np.isfinite(shift)) and np.all(scale)):
        return Opaque("multiplies by 0, or by what is not finite")
    if scale.ndim > len(shape):
        return Opaque("adds axes to it")
    lead = (1,) * (len(shape) - scale.ndim)
    along = [axis for axis, size in enumerate(lead + scale.shape) if size != 1]
    if len(along) > 1 or 0 in along or any(shape[axis] != scale.size for axis in along):
        return Opaque("has constants that differ by position")
    axis = along[0] if along else None
    if np.all(scale == 1) and not np.any(shift):
        return Affine()
    size = scale.size if along else ()
    return ConstantMap(axis, axis, scale=scale.reshape(size), shift=shift.reshape(size))

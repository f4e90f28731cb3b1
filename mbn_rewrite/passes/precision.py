"""Whether maps, and weights that absorbed them, stay within the range of their dtype."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mbn_rewrite.errors import RewriteError
from mbn_rewrite.ir.algebra import fold
from mbn_rewrite.ir.channel_map import Array, ChannelMap
from mbn_rewrite.plans import Fold, Reclip

_LARGEST = {"float16": 65504.0, "bfloat16": 3.38e38, "float32": 3.4e38, "float64": 1.79e308}
_SMALLEST_NORMAL_FLOAT16 = 2.0**-14


def map_out_of_range(m: ChannelMap, dtype: str) -> str:
    """Why a map cannot be held in a dtype, or ""."""
    if not m.is_finite:
        return "its scale or shift is not finite"
    largest = max(np.abs(m.scale).max(initial=0), np.abs(m.shift).max(initial=0))
    if largest > _LARGEST[dtype]:
        return f"its scale or shift reaches {largest:.3g}, more than {dtype} can hold"
    if dtype == "float16" and np.any((m.scale != 0) & (abs(m.scale) < _SMALLEST_NORMAL_FLOAT16)):
        return "its scale is too small for float16 to hold precisely"
    return ""


def check_bounds(action: Reclip, dtype: str, label: str) -> None:
    """Raises RewriteError where a dtype cannot hold the bounds of a clip."""
    why = bounds_out_of_range(action, dtype)
    if why:
        raise RewriteError(
            f'{label} cannot clip per channel: {why}. Use mode "depthwise" for this model'
        )


def bounds_out_of_range(action: Reclip, dtype: str) -> str:
    """Why a dtype cannot hold the bounds of a clip, or "".

    Infinity stands for no bound. A bound that only became it in a dtype would be none there.
    """
    for side, array in action.bounds.items():
        none = -np.inf if side == "lower" else np.inf
        bounds = array[array != none]
        if not np.all(np.isfinite(bounds)):
            return "its bounds are not finite"
        largest = np.abs(bounds).max(initial=0)
        if largest > _LARGEST[dtype]:
            return f"its bounds reach {largest:.3g}, more than {dtype} can hold"
    return ""


def weights_out_of_range(action: Fold, dtype: str, read: Callable[[str], Array]) -> str:
    """Why a dtype cannot hold the weights that have absorbed maps, or ""."""
    for m in (action.before, action.after):
        if m is not None and not m.is_finite:
            return "the scale or shift would not be finite"
    if _surely_fit(action, dtype, read):
        return ""
    return _lose_range(action, dtype, read)


def _surely_fit(action: Fold, dtype: str, read: Callable[[str], Array]) -> bool:
    """Whether bounds alone show that the folded weights are within a dtype's range."""
    if dtype == "float16":
        return False  # where small numbers matter too
    scale_before, shift_before = _bounds(action.before)
    scale_after, shift_after = _bounds(action.after)
    for kernels, bias in action.op.chains:
        largest, added = 0.0, shift_before
        for kernel in kernels:
            array = read(kernel.name)
            size = _magnitude(array)
            largest, added = max(largest, size), added * size * array.size
        added = (added + (_magnitude(read(bias)) if bias else 0.0)) * scale_after + shift_after
        largest = largest * scale_before * scale_after
        if kernels[-1].is_table:
            largest += shift_after
        if not max(largest, added) < _LARGEST[dtype]:
            return False
    return True


def _bounds(m: ChannelMap | None) -> tuple[float, float]:
    """The largest scale, or 1 if that is less, and the largest shift of a map."""
    return (max(1.0, _magnitude(m.scale)), _magnitude(m.shift)) if m else (1.0, 0.0)


def _magnitude(array: Array) -> float:
    # Without a copy of the array, which may be large.
    return max(float(array.max(initial=0)), -float(array.min(initial=0)))


def _lose_range(action: Fold, dtype: str, read: Callable[[str], Array]) -> str:
    """Why the folded weights would not be finite, or not precise, in a dtype, or ""."""
    for place, (kernels, bias) in enumerate(action.op.chains):
        before, after = action.maps(place)
        arrays = [(kernel, read(kernel.name).astype(np.float64)) for kernel in kernels]
        folded, new_bias = fold(
            arrays,
            read(bias).astype(np.float64) if bias else None,
            before=before,
            after=after,
            border=action.border,
        )
        largest = np.abs(new_bias).max(initial=0)
        for (kernel, array), new in zip(arrays, folded, strict=True):
            old_size, size = kernel.largest(array), kernel.largest(new)
            largest = max(largest, size.max(initial=0))
            lost = (size > 0) & (size < _SMALLEST_NORMAL_FLOAT16)
            if dtype == "float16" and np.any(lost & (old_size >= _SMALLEST_NORMAL_FLOAT16)):
                return "its weights would become too small for float16 to hold precisely"
        if not largest <= _LARGEST[dtype]:
            return f"its weights would reach {largest:.3g}, more than {dtype} can hold"
    return ""

"""One output of the original beside the same of a rewritten model, entry by entry.

The error is measured against the largest magnitude of the output that it is in,

    max |a - b| / max |b|,

since rounding in a network grows with what it adds up, not with what is left in the end. Values
that only mark an entry, such as -1e9 where a mask is, are no such magnitude.

Integers, truth values and texts have no small error: what counts is how many differ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

# Values at least so large, all alike, and so many times as large as all others, are marks.
_MARK = 1e3


@dataclass(frozen=True)
class Pair:
    """One output of two models.

    Attributes:
        name: what it is called.
        size: how many entries it has.
        alike: how many are NaN, or infinite with the same sign, in both.
        discrete: whether it holds integers, truth values or texts.
        differing: how many entries differ; of real numbers, by more than the tolerance.
        abs_error, rel_error: as in `Comparison`, for this output.
        finite_error: the relative error of the entries that are finite in both.
        agreement: the part of its positions with the largest value in the same channel.
        note: what is not equal, in numbers, or what could not be compared; or "".
    """

    name: str
    size: int
    alike: int
    discrete: bool
    differing: int
    abs_error: float
    rel_error: float
    finite_error: float
    agreement: float
    note: str


def is_discrete(array: np.ndarray) -> bool:
    """Whether an array holds integers, truth values or texts."""
    return array.dtype.kind in "OSUbiu"


def compare_pair(name: str, a: np.ndarray, b: np.ndarray, tolerance: float) -> Pair:
    """Compares one output of the original with the same of the rewritten model, of one shape."""
    kinds = {a.dtype.kind, b.dtype.kind}
    discrete = is_discrete(a) and is_discrete(b)
    unequal = int(np.count_nonzero(a != b)) if discrete else 0
    note = _count(unequal, a.size, name) if unequal else ""
    if kinds & set("OSU") or (discrete and not unequal):
        return Pair(name, a.size, 0, True, unequal, 0.0, 0.0, 0.0, 1.0, note)
    wide = np.complex128 if "c" in kinds else np.float64
    a, b = a.astype(wide), b.astype(wide)
    fine_a, fine_b = np.isfinite(a), np.isfinite(b)
    both = fine_a & fine_b
    whole = bool(both.all())
    x, y = (a, b) if whole else (a[both], b[both])
    worst, relative, apart = _errors(x, y, tolerance)
    odd, alike = 0, 0
    if apart and not discrete:
        note = _count(apart, a.size, name)
    if not whole:
        alike = int(np.count_nonzero(~fine_a & ((a == b) | (np.isnan(a) & np.isnan(b)))))
        odd = a.size - x.size - alike
        who = _who(fine_a.all(), fine_b.all())
        what = "NaN or infinity from" if odd else "NaN or infinity, alike, from"
        where = f"{what} {who} in {odd or alike:,} of {a.size:,} entries of {name}"
        note = f"{note}; {where}" if note else where
    agreement = 1.0
    if a.ndim > 1 and a.shape[-1] > 1 and a.size and wide is np.float64:
        agreement = float(np.mean(a.argmax(-1) == b.argmax(-1)))
    return Pair(
        name,
        a.size,
        alike,
        discrete,
        unequal if discrete else odd + apart,
        np.inf if odd else worst,
        np.inf if odd else relative,
        relative,
        agreement,
        note,
    )


def _errors(x: np.ndarray, y: np.ndarray, tolerance: float) -> tuple[float, float, int]:
    """The largest absolute and relative error, and how many are larger than the tolerance."""
    errors, sizes = np.abs(x - y), _sizes(np.abs(x))
    worst = float(errors.max(initial=0.0))
    if not worst:
        return 0.0, 0.0, 0
    if np.ndim(sizes):
        with np.errstate(divide="ignore", invalid="ignore"):
            relative = float(np.where(errors > 0, errors / sizes, 0.0).max())
    else:
        relative = worst / float(sizes) if sizes else np.inf
    if relative <= tolerance:
        return worst, relative, 0
    return worst, relative, int(np.count_nonzero(errors > tolerance * sizes))


def _count(differing: int, size: int, name: str) -> str:
    return f"{differing:,} of {size:,} entries of {name} differ"


def _who(original_is_fine: bool, new_is_fine: bool) -> str:
    if original_is_fine:
        return "the rewritten model"
    return "the original" if new_is_fine else "the original and the rewritten model"


def _sizes(magnitudes: np.ndarray) -> Any:
    """Magnitude that the error of each entry is measured against: the largest among its like."""
    rest = magnitudes
    top = sizes = rest.max(initial=0.0)
    while top > _MARK:
        like = rest > 0.9 * top
        rest = rest[~like]
        below = rest.max(initial=0.0)
        if not 0 < below < top / _MARK:
            break
        sizes = np.where(magnitudes <= below, below, sizes)
        top = below
    return sizes

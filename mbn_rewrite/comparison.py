"""Outputs of a rewritten model beside those of the original, as arrays.

How the outputs of a pair are compared, see `output_pairs`. Where they differ by more than rounding
does, they may have been computed by something that jumps (argmax, a threshold), or in a dtype whose
own rounding is as large; whoever calls `judged` brings a closer look for that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from mbn_rewrite import display
from mbn_rewrite.output_pairs import Pair, compare_pair, is_discrete
from mbn_rewrite.tables import encodable

# The largest error, relative to the output's largest magnitude, that rounding explains.
# About 2000 units in the last place for the wide types; 10 and 6 for the narrow ones, whose
# sums are wide but whose kernels are rounded once more when a scale is folded in.
TOLERANCES = {"float64": 5e-13, "float32": 2e-4, "float16": 1e-2, "bfloat16": 5e-2}
# Dtypes in which a deep network may be further from itself in float32 than the table allows.
NARROW = ("float16", "bfloat16")
# How many times so far a rewritten model may be from the original: two roundings, and some.
ROUNDINGS = 3
# The part of integers, truth values and texts that may differ where it cannot be seen what they
# are computed from, for a tolerance of 1: 1 in 1000 in float32. An error of e, relative to the
# range of a value, takes it across a threshold within that range with a chance of 2e.
FLIPS = 5.0
# The part of an output that may depend on dividing by almost nothing, or the logarithm of it.
SINGULAR = 1e-2


@dataclass(frozen=True)
class Comparison:
    """Outputs of two models on the same inputs.

    Attributes:
        max_abs_error: the largest absolute difference.
        max_rel_error: the largest difference relative to the largest magnitude of the
            output that it is in. Infinite where one model gives NaN or infinity and the other
            does not. Where outputs jump (see `note`), both errors are those of what the
            outputs are computed from.
        top1_agreement: the part of all positions at which both models have their largest
            value in the same channel, in the output where it is least; 1.0 where outputs
            have a single channel.
        tolerance: what max_rel_error may be.
        examples: how many examples were compared.
        note: what stands in the way of a comparison or was looked at more closely, or "".
        compared: how many entries were compared: all but those that are NaN, or infinite
            alike, in both. With 0 nothing is proved, and the models do not count as equal.
        differing: how many integers, truth values and texts differ.
        may_differ: how many of them rounding explains.
    """

    max_abs_error: float
    max_rel_error: float
    top1_agreement: float
    tolerance: float
    examples: int
    note: str = ""
    compared: int = 0
    differing: int = 0
    may_differ: int = 0

    @property
    def ok(self) -> bool:
        """Whether errors are within the tolerance, and no more differs than rounding explains.

        False for NaN.
        """
        return bool(self.max_rel_error <= self.tolerance) and self.differing <= self.may_differ

    def to_dict(self) -> dict[str, Any]:
        """The comparison in types that JSON knows; what is not finite as text."""
        return {"ok": self.ok} | {
            key: str(value) if isinstance(value, float) and not np.isfinite(value) else value
            for key, value in asdict(self).items()
        }

    @property
    def verdict(self) -> str:
        """Whether they are equal, in words."""
        return "equal within tolerance" if self.ok else "NOT EQUAL"

    def __str__(self) -> str:
        return encodable(
            f"{self.verdict}: "
            f"max abs error {self.max_abs_error:.3g}, "
            f"max rel error {self.max_rel_error:.3g} (tolerance {self.tolerance:.3g}), "
            f"top-1 agreement {self.top1_agreement:.2%} on {self.examples} examples"
            + (f"; {self.note}" if self.note else "")
        )

    def __repr__(self) -> str:
        return display.one_line(self, str(self))

    def _repr_html_(self) -> str:
        return display.comparison_html(self)


# What finds out whether outputs that differ are explained by rounding all the same, and whether
# those that agree do so by chance, from how they compare; None where that cannot be found out.
CloserLook = Callable[[Comparison], Comparison | None]


def tolerance_for(dtypes: set[str]) -> float:
    """The tolerance for a model that computes in these dtypes: that of the narrowest."""
    return max((TOLERANCES[name] for name in dtypes & set(TOLERANCES)), default=0.0)


def rounding_tolerance(
    exact: Sequence[np.ndarray], rounded: Sequence[np.ndarray], tolerance: float
) -> float:
    """The tolerance where the original itself is far from what it is in a wider dtype.

    A rewritten model may be as far to another side.

    Args:
        exact: what the original gives, computed in a wider dtype.
        rounded: what it gives.
        tolerance: what is allowed in any case.
    """
    pairs = _pairs(exact, rounded, tolerance, None)
    return max(tolerance, ROUNDINGS * max((p.finite_error for p in pairs), default=0.0))


def judged(
    expected: Sequence[np.ndarray],
    actual: Sequence[np.ndarray],
    tolerance: float,
    closer_look: CloserLook,
    names: Sequence[str] | None = None,
) -> Comparison:
    """Compares outputs, and looks more closely where they differ.

    Args:
        expected, actual, tolerance, names: as for `compare_outputs`.
        closer_look: asked where the outputs differ, and where integers, truth values and texts
            agree, as those of wrong models often do. Where it cannot say, those that agree are
            taken to be right, and a few may differ.
    """
    plain = compare_outputs(expected, actual, tolerance, names)
    if not plain.compared:
        return plain
    if plain.ok:
        discrete = any(map(is_discrete, expected))
        return (closer_look(plain) if discrete else None) or plain
    return closer_look(plain) or _but_for_a_few(expected, actual, plain, names)


def compare_outputs(
    expected: Sequence[np.ndarray],
    actual: Sequence[np.ndarray],
    tolerance: float,
    names: Sequence[str] | None = None,
) -> Comparison:
    """Compares lists of outputs, pair by pair; see `Comparison`.

    Args:
        expected: what the original gives.
        actual: what the rewritten model gives.
        tolerance: the largest relative error to accept.
        names: what the outputs are called, for notes; by default they are numbered.
    """
    shapes, new_shapes = [a.shape for a in expected], [a.shape for a in actual]
    examples = next((len(array) for array in expected if array.ndim), 0)
    different = Comparison(np.inf, np.inf, 0.0, tolerance, examples)
    size = sum(array.size for array in expected)
    if not size:
        return replace(different, note="there is not one value to compare")
    if shapes != new_shapes:
        note = f"the outputs have the shapes {new_shapes}, not {shapes}"
        return replace(different, note=note, compared=size)
    pairs = _pairs(expected, actual, tolerance, names)
    compared = sum(pair.size - pair.alike for pair in pairs)
    if not compared:
        note = f"all {size:,} entries are NaN or infinite in both, so nothing could be compared"
        return replace(different, note=note)
    return Comparison(
        max(pair.abs_error for pair in pairs),
        max(pair.rel_error for pair in pairs),
        min(pair.agreement for pair in pairs),
        tolerance,
        examples,
        "; ".join(filter(None, (pair.note for pair in pairs))),
        compared,
        sum(pair.differing for pair in pairs if pair.discrete),
    )


def _but_for_a_few(
    expected: Sequence[np.ndarray],
    actual: Sequence[np.ndarray],
    plain: Comparison,
    names: Sequence[str] | None,
) -> Comparison:
    """The same comparison, with as many flips allowed as a right model may show."""
    if [a.shape for a in expected] != [a.shape for a in actual]:
        return plain
    pairs = _pairs(expected, actual, plain.tolerance, names)
    real = [pair for pair in pairs if not pair.discrete]
    discrete = [pair for pair in pairs if pair.discrete]
    part = min(1.0, FLIPS * plain.tolerance)
    errors = [pair.rel_error for pair in real]
    flips = all(pair.differing <= part * pair.size for pair in discrete)
    if not flips or not all(error <= plain.tolerance for error in errors):
        return plain
    return replace(
        plain,
        max_abs_error=max((pair.abs_error for pair in real), default=0.0),
        max_rel_error=max(errors, default=0.0),
        may_differ=plain.differing,
        note=f"{plain.note}, no more than rounding explains (one in {1 / part:,.0f})",
    )


def _pairs(
    expected: Sequence[np.ndarray],
    actual: Sequence[np.ndarray],
    tolerance: float,
    names: Sequence[str] | None,
) -> list[Pair]:
    names = [f"output {i}" for i in range(len(expected))] if names is None else names
    return [
        compare_pair(name, a, b, tolerance)
        for name, a, b in zip(names, expected, actual, strict=True)
    ]

"""`verify`: a rewritten model beside the original.

The error is measured against the largest magnitude of the output that it is in,

    max |a - b| / max |b|,

since rounding in a network grows with what it adds up, not with what is left in the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mbn_rewrite.front_ends import front_end_of

# The largest error, relative to the output's largest magnitude, that rounding explains.
# About 2000 units in the last place for the wide types; 10 and 6 for the narrow ones, whose
# sums are wide but whose kernels are rounded once more when a scale is folded in.
TOLERANCES = {"float64": 5e-13, "float32": 2e-4, "float16": 1e-2, "bfloat16": 5e-2}


@dataclass(frozen=True)
class Comparison:
    """Outputs of two models on the same inputs.

    Attributes:
        max_abs_error: the largest absolute difference.
        max_rel_error: the largest difference relative to the largest magnitude of the
            output that it is in. Infinite where one model gives NaN or infinity.
        top1_agreement: the part of all positions at which both models have their largest
            value in the same channel, in the output where it is least; 1.0 where outputs
            have a single channel.
        tolerance: what max_rel_error may be.
        examples: how many examples were compared.
        note: what stands in the way of a comparison, or "".
    """

    max_abs_error: float
    max_rel_error: float
    top1_agreement: float
    tolerance: float
    examples: int
    note: str = ""

    @property
    def ok(self) -> bool:
        """Whether the models agree within the tolerance. False for NaN."""
        return bool(self.max_rel_error <= self.tolerance)

    def to_dict(self) -> dict[str, Any]:
        """The comparison in types that JSON knows; what is not finite as text."""
        return {"ok": self.ok} | {
            key: str(value) if isinstance(value, float) and not np.isfinite(value) else value
            for key, value in asdict(self).items()
        }

    def __str__(self) -> str:
        return (
            f"{'equal within tolerance' if self.ok else 'NOT EQUAL'}: "
            f"max abs error {self.max_abs_error:.3g}, "
            f"max rel error {self.max_rel_error:.3g} (tolerance {self.tolerance:.3g}), "
            f"top-1 agreement {self.top1_agreement:.2%} on {self.examples} examples"
            + (f"; {self.note}" if self.note else "")
        )


def verify(
    model: Any, new: Any, inputs: Any = None, *, tolerance: float | None = None, seed: int = 0
) -> Comparison:
    """Compares a rewritten model with the original, at inference.

    Args:
        model: the original model, of tf_keras or Keras 3.
        new: the rewritten one, with the same inputs and outputs.
        inputs: what to call both with. By default random values for inputs of the shapes
            and dtypes of the model's: normally distributed floats (pixels from 0 to 255
            where the model rescales them), integers that its embeddings have rows for.
        tolerance: the largest relative error to accept; by default the one of `TOLERANCES`
            for the narrowest dtype that the model computes in.
        seed: of the random inputs.

    Returns:
        A Comparison; `ok` says whether they agree.

    Raises:
        RewriteError: inputs of this dtype cannot be made up, or one of the models cannot be
            called with them.
    """
    front_end = front_end_of(model)
    if inputs is None:
        inputs = front_end.random_inputs(model, seed)
    return compare_outputs(
        front_end.outputs_of(model, inputs, "the original"),
        front_end_of(new).outputs_of(new, inputs, "the rewritten model"),
        tolerance_for(front_end.compute_dtypes(model)) if tolerance is None else tolerance,
    )


def tolerance_for(dtypes: set[str]) -> float:
    """The tolerance for a model that computes in these dtypes: that of the narrowest."""
    return max((TOLERANCES[name] for name in dtypes & set(TOLERANCES)), default=0.0)


def compare_outputs(
    expected: Sequence[np.ndarray], actual: Sequence[np.ndarray], tolerance: float
) -> Comparison:
    """Compares lists of outputs, pair by pair; see `Comparison`."""
    shapes, new_shapes = [a.shape for a in expected], [a.shape for a in actual]
    examples = next((len(array) for array in expected if array.ndim), 0)

    def different(note: str) -> Comparison:
        return Comparison(np.inf, np.inf, 0.0, tolerance, examples, note)

    if shapes != new_shapes:
        return different(f"the outputs have the shapes {new_shapes}, not {shapes}")
    if not any(array.size for array in expected):
        return different("there is not one value to compare")
    worst_abs, worst_rel, agreement = 0.0, 0.0, 1.0
    for number, (a, b) in enumerate(zip(expected, actual, strict=True)):
        if a.dtype.kind in "OSU":
            if not np.array_equal(a, b):
                return different(f"the texts in output {number} differ")
            continue
        wide = np.complex128 if "c" in (a.dtype.kind, b.dtype.kind) else np.float64
        a, b = a.astype(wide), b.astype(wide)
        finite = {"original": np.all(np.isfinite(a)), "rewritten model": np.all(np.isfinite(b))}
        if not all(finite.values()):
            who = " and the ".join(name for name, fine in finite.items() if not fine)
            return different(f"NaN or infinity from the {who} in output {number}")
        error, size = (float(np.abs(x).max(initial=0)) for x in (a - b, a))
        worst_abs = max(worst_abs, error)
        worst_rel = max(worst_rel, error / size if size else (np.inf if error else 0.0))
        if a.ndim > 1 and a.shape[-1] > 1 and a.size and wide is np.float64:
            agreement = min(agreement, float(np.mean(a.argmax(-1) == b.argmax(-1))))
    return Comparison(worst_abs, worst_rel, agreement, tolerance, examples)

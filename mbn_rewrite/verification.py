"""`verify`, and the check that `convert` makes: two models called with the same inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mbn_rewrite.comparison import Comparison, compare_outputs, judged, tolerance_for
from mbn_rewrite.errors import RewriteError, VerificationError, cause_of, is_out_of_memory
from mbn_rewrite.frontends.in_memory import outputs_of_original
from mbn_rewrite.frontends.protocols import FrontEnd
from mbn_rewrite.frontends.registry import front_end_of
from mbn_rewrite.plans import Plan

_HOW = "Give inputs=... that the model takes, or check=False"
_REPORT = "Please report this; check=False gives the model all the same"


def verify(
    model: Any, new: Any, inputs: Any = None, *, tolerance: float | None = None, seed: int = 0
) -> Comparison:
    """Compares a rewritten model with the original, at inference.

    Where outputs differ by more than the tolerance, it is looked at more closely why: whether
    they jump (class maps, masks, rounded pictures) and what they are computed from agrees; and
    whether the original is as far from itself in float32, if it computes in a narrower dtype, or
    in float64.

    Args:
        model: the original model, of tf_keras or Keras 3.
        new: the rewritten one, with the same inputs and outputs.
        inputs: what to call both with. By default random values for inputs of the shapes
            and dtypes of the model's: normally distributed floats (pixels from 0 to 255
            where the model rescales them), integers that its embeddings have rows for, with
            zeros, ends of ranges and, where the model masks steps, sequences of several
            lengths among them. Where the original gives NaN for those, they are milder.
        tolerance: the largest relative error to accept; by default the one of `TOLERANCES`
            for the narrowest dtype that the model computes in, or what rounding explains
            where that is more.
        seed: of the random inputs.

    Returns:
        A Comparison; `ok` says whether they agree.

    Raises:
        RewriteError: inputs of this dtype cannot be made up, or one of the models cannot be
            called with them.
    """
    front_end = front_end_of(model)
    inputs, expected = outputs_of_original(front_end, model, inputs, seed)
    return compared_with(front_end, model, new, inputs, expected, tolerance)


def compared_with(
    front_end: FrontEnd,
    model: Any,
    new: Any,
    inputs: Any,
    expected: Sequence[np.ndarray],
    tolerance: float | None = None,
) -> Comparison:
    """Compares a rewritten model with what the original gives for some inputs; see `verify`."""
    return judged(
        expected,
        front_end_of(new).outputs_of(new, inputs, "the rewritten model"),
        tolerance_for(front_end.compute_dtypes(model)) if tolerance is None else tolerance,
        lambda plain: front_end.closer_look(model, new, inputs, plain, tolerance is None),
    )


def checked(front_end: FrontEnd, model: Any, new: Any, plan: Plan, inputs: Any = None) -> Plan:
    """Compares a rewritten model with the original, at inference.

    One made-up picture, or a few smaller examples, are enough to see what is wrong, and each
    model is called once, as it is: to trace a model takes longer than that.

    Args:
        front_end: of the original.
        model: the original.
        new: the rewritten model.
        plan: what was done.
        inputs: what to call both with; made up if None.

    Returns:
        The plan, with its `verification`, or with the reason why there is none.

    Raises:
        VerificationError: the rewritten model does not give the original's outputs.
    """
    try:
        given, expected = outputs_of_original(front_end, model, inputs, pictures=1)
    except RewriteError as error:
        return _unverified(plan, str(error))
    except Exception as error:
        return _unverified(plan, f"the original cannot be called: {cause_of(error)}")
    if not any(array.size for array in expected):
        return _unverified(plan, f"the original gives not one value to compare. {_HOW}")
    try:
        comparison = compared_with(front_end, model, new, given, expected)
    except Exception as error:
        if is_out_of_memory(error):
            return _unverified(plan, f"there is not the memory for it. {_HOW}")
        said = str(error) if isinstance(error, RewriteError) else cause_of(error)
        raise VerificationError(
            f"the rewritten model cannot be called with what the original takes: {said} {_REPORT}",
            plan,
            None,
        ) from error
    if comparison.ok:
        return replace(plan, verification=comparison)
    if not comparison.compared:
        return _unverified(plan, f"the original gives NaN or infinity for these inputs. {_HOW}")
    if _differs_from_itself(front_end, model, given, expected):
        return _unverified(plan, "the original gives other outputs each time that it is called")
    raise VerificationError(
        f"the rewritten model does not give the original's outputs ({comparison}). {_REPORT}",
        plan,
        comparison,
    )


def _differs_from_itself(
    front_end: FrontEnd, model: Any, inputs: Any, expected: list[np.ndarray]
) -> bool:
    """Whether a model gives other outputs when it is called again, by more than rounding."""
    again = front_end.outputs_of(model, inputs, "the original")
    comparison = compare_outputs(expected, again, tolerance_for(front_end.compute_dtypes(model)))
    return not comparison.ok


def _unverified(plan: Plan, reason: str) -> Plan:
    return replace(plan, unverified=reason)

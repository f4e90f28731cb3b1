"""The check that `convert` makes of what it gives: the two models beside each other, once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from mbn_rewrite.errors import (
    RewriteError,
    VerificationError,
    cause_of,
    is_out_of_memory,
)
from mbn_rewrite.frontends.registry import FrontEnd
from mbn_rewrite.plans import Plan
from mbn_rewrite.verification import (
    compare_outputs,
    compared_with,
    outputs_of_original,
    tolerance_for,
)

_HOW = "Give inputs=... that the model takes, or check=False"
_REPORT = "Please report this; check=False gives the model all the same"


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

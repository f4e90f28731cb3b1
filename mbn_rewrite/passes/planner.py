"""Plans by mode: which passes run. numpy only.

`fold`, `depthwise` and the modes of training run one pass each. `auto` has several plans, of which
measuring tells the best: folded, and something else for what does not fold.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from mbn_rewrite.ir.graph import Graph
from mbn_rewrite.options import TRAINING_MODES
from mbn_rewrite.passes.fold import plan_fold
from mbn_rewrite.passes.sample import plan_training
from mbn_rewrite.passes.substitute import TAKES, in_form, plan_depthwise, replaceable
from mbn_rewrite.plans import Plan

FOLDED = "folded"  # the form in which what does not fold stays as it is
# Forms that let more fold, at a cost: convolutions add border maps, and clips take on bounds.
EXACT_AT_A_COST: dict[str, dict[str, bool]] = {
    "border": {"borders": True},
    "clip": {"clips": True},
    "border_and_clip": {"borders": True, "clips": True},
}

_PLANNERS: dict[str, Callable[[Graph], Plan]] = {
    "fold": plan_fold,
    "depthwise": plan_depthwise,
}


def make_plan(graph: Graph, mode: str, stride: Any = None) -> Plan:
    """Decides what becomes of every BatchNormalization.

    Args:
        graph: the model.
        mode: "fold", "depthwise", "strided" or "mbn"; for "auto" see `candidates`.
        stride: for the latter two, see `strides.for_layer`.

    Raises:
        RewriteError: what was given is no stride.
    """
    if mode in TRAINING_MODES:
        return plan_training(graph, mode, stride)
    return _PLANNERS[mode](graph)


def candidates(graph: Graph) -> dict[str, Plan]:
    """The plans that mode "auto" has to choose between, by what they do with what does not fold.

    All are exact. The first, `FOLDED`, leaves it; those of `EXACT_AT_A_COST` let more fold, and
    leave the rest; the others put a `plans.Form` in the place of each that it can do the work of
    ("depthwise" scales and shifts where there is no such convolution). What custom layers hold
    stays in all of them, since it cannot be seen how it is called, and so does what has something
    else to do in its place (`BatchNorm.reason`). Plans that would come to the same are left out.
    """
    folded = replace(plan_fold(graph), mode="auto")
    plans = {FOLDED: folded}
    left = replaceable(graph, folded)
    for form in TAKES:
        plan = in_form(folded, left, form)
        if plan is not None:
            plans[form] = plan
    least = folded.left
    for name, options in EXACT_AT_A_COST.items():
        if least:
            further = replace(plan_fold(graph, **options), mode="auto")
            if further.left < (least if len(options) > 1 else folded.left):
                plans[name] = further
                least = min(least, further.left)
    return plans

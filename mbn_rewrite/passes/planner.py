"""Plans by mode: which passes run. numpy only.

`fold`, `depthwise` and the modes of training run one pass each. `auto` has several plans, of which
measuring tells the best: folded, and something else for what does not fold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import groupby
from typing import Any, NamedTuple

from mbn_rewrite.ir.graph import BatchNorm, Graph
from mbn_rewrite.options import TRAINING_MODES
from mbn_rewrite.passes.fold import plan_fold
from mbn_rewrite.passes.sample import plan_training
from mbn_rewrite.passes.substitute import TAKES, in_form, plan_depthwise, replaceable
from mbn_rewrite.plans import Fate, Plan


class Costs(NamedTuple):
    """What layers may do at a cost; see `plan_fold`."""

    borders: bool = False
    clips: bool = False


FOLDED = "folded"  # the form in which what does not fold stays as it is
# Forms that let more fold, at a cost: convolutions add border maps, and clips take on bounds.
EXACT_AT_A_COST: dict[str, Costs] = {
    "border": Costs(borders=True),
    "clip": Costs(clips=True),
    "border_and_clip": Costs(borders=True, clips=True),
}

_SIZES = ("large", "medium", "small")  # groups of sites, by what they read


_PLANNERS: dict[str, Callable[[Graph], Plan]] = {
    "fold": plan_fold,
    "depthwise": plan_depthwise,
}


def make_plan(graph: Graph, mode: str, stride: Any = None, equalize: bool = False) -> Plan:
    """Decides what becomes of every BatchNormalization.

    Args:
        graph: the model.
        mode: "fold", "depthwise", "strided" or "mbn"; for "auto" see `candidates`.
        stride: for the latter two, see `strides.for_layer`.
        equalize: for "fold" alone, see `plan_fold`.

    Raises:
        RewriteError: what was given is no stride.
    """
    if mode in TRAINING_MODES:
        return plan_training(graph, mode, stride)
    return plan_fold(graph, equalize=True) if equalize else _PLANNERS[mode](graph)


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
    for name, costs in EXACT_AT_A_COST.items():
        if least:
            further = replace(plan_fold(graph, costs.borders, costs.clips), mode="auto")
            if further.left < (least if all(costs) else folded.left):
                plans[name] = further
                least = min(least, further.left)
    return plans


def mixed(graph: Graph, folded: Plan, forms: Mapping[str, str]) -> Plan:
    """A plan in which every site that does not fold has a form of its own.

    Args:
        graph: the model.
        folded: its plan of the form `FOLDED`.
        forms: names as `candidates` has them, by site. What has none is left.
    """
    plan = folded
    at_a_cost = {
        site: EXACT_AT_A_COST[form] for site, form in forms.items() if form in EXACT_AT_A_COST
    }
    if at_a_cost:
        costs = Costs(*map(any, zip(*at_a_cost.values(), strict=True)))
        left = _left(folded) - at_a_cost.keys()
        stay = {d.name: d.reason for d in folded.decisions if d.name in left}
        plan = plan_fold(graph, costs.borders, costs.clips, stay)
    open_to_forms = replaceable(graph, plan)
    for form in TAKES:
        some = {site: what for site, what in open_to_forms.items() if forms.get(site) == form}
        plan = in_form(plan, some, form) or plan
    return replace(plan, mode="auto")


def groups(graph: Graph, folded: Plan) -> dict[str, frozenset[str]]:
    """The sites that a plan leaves and that can have another form, by the size of what they read.

    What is fast depends on it most. Sizes that are not known count as 1.

    Returns:
        Up to three groups of about as many sites, "large" to "small", of which none is empty.
    """
    left = _left(folded)
    sizes: dict[str, int] = {}
    for node in graph.nodes:
        if node.owner in left and isinstance(node.op, BatchNorm) and not node.op.reason:
            size = math.prod(size or 1 for size in graph.values[node.inputs[0]].shape)
            sizes[node.owner] = max(size, sizes.get(node.owner, 0))
    ordered = sorted(sizes, key=sizes.__getitem__, reverse=True)
    found: dict[str, set[str]] = {}
    done = 0
    for _, alike in groupby(ordered, key=sizes.__getitem__):
        sites = list(alike)  # of one size, which stay together
        name = _SIZES[min(len(_SIZES) * done // len(ordered), len(_SIZES) - 1)]
        found.setdefault(name, set()).update(sites)
        done += len(sites)
    return {name: frozenset(sites) for name, sites in found.items()}


def _left(plan: Plan) -> set[str]:
    return {decision.name for decision in plan.decisions if decision.action == Fate.KEPT}

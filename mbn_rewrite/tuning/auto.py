"""Mode "auto": of the exact forms that a model can have, the one that measures fastest.

The planner says which forms there are (`planner.candidates`). Each is written and run as a whole,
in turn with the others and with the model as it was. Then the two fastest are mixed by groups of
sites. The folded model is taken unless another form is faster beyond noise, and the model as it was
if even the chosen form is slower than that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

from mbn_rewrite.frontends.protocols import OpenModel
from mbn_rewrite.ir.graph import Graph
from mbn_rewrite.measurement import CONFIDENCE, LEAST_ROUNDS, Measurement, Ratio, ratio
from mbn_rewrite.options import Options
from mbn_rewrite.passes.planner import FOLDED, candidates, groups, make_plan, mixed
from mbn_rewrite.plans import Decision, Fate, Plan
from mbn_rewrite.tuning.trial import INPUT, NEEDED, Runner, Trial


def plan_for(model: OpenModel, options: Options) -> Plan:
    """The plan for a model, in any mode."""
    if options.mode == "auto":
        chosen = None
        try:
            with model.set_up(options.run_config):
                chosen = plan = choose(
                    model.graph, lambda form: model.running(form, options), model.device(), options
                )
        finally:
            model.keep_only(chosen)
    else:
        plan = make_plan(model.graph, options.mode, options.stride, options.equalize)
    return replace(plan, notes=(*model.notes, *plan.notes))


def choose(graph: Graph, runner: Runner, device: str, options: Options) -> Plan:
    """The plan of the form that measures fastest.

    Nothing is measured where every BatchNormalization folds, or nothing else could be done. Where
    what is left reads values of several sizes, forms are mixed too: see `_mix`.
    """
    plans = candidates(graph)
    if len(plans) == 1:
        return plans[FOLDED]
    sites = groups(graph, plans[FOLDED])
    mixes = len(sites) > 1
    with ExitStack() as stack:
        trial = Trial(stack, runner, options)
        trial.add(plans, _FIRST.building if mixes else _ALONE.building)
        trial.measure([INPUT, *plans], _FIRST.measuring if mixes else _ALONE.measuring)
        if mixes:
            _mix(graph, sites, trial)
    chosen, why = _fastest(trial.last, trial.notes)
    measurement = Measurement(device, options.run_config, trial.timings(), chosen, why)
    plan = _as_it_was(plans[FOLDED]) if chosen == INPUT else trial.plans[chosen]
    return replace(plan, measurement=measurement)


@dataclass(frozen=True)
class _Share:
    """Parts of the budget after which no further form is built, and none is run."""

    building: float
    measuring: float


_ALONE = _Share(0.6, 1.0)
_FIRST, _SECOND, _THIRD = _Share(0.4, 0.5), _Share(0.75, 0.9), _Share(0.95, 1.0)
_PROMISING = 1.1  # times the time of the fastest form, up to which another is mixed with it


def _mix(graph: Graph, sites: Mapping[str, frozenset[str]], trial: Trial) -> None:
    """Tries the form that comes second for some groups of sites, and the fastest for the others.

    Each group is tried alone; those that are faster for it beyond noise are then put together.
    A mix that is not faster than one form for all is out of the running.
    """
    best, *others = trial.ranked()
    if not others or trial.compared(others[0], best).median > _PROMISING:
        return
    second, built = others[0], {plan.to_json() for plan in trial.plans.values()}

    def mix(names: Sequence[str]) -> dict[str, Plan]:
        forms = {name: second if name in names else best for name in sites}
        by_site = {site: forms[name] for name, group in sites.items() for site in group}
        plan = mixed(graph, trial.plans[FOLDED], by_site)
        is_new = plan.to_json() not in built
        return {f"{best} ({', '.join(names)}: {second})": plan} if is_new else {}

    tried = {name: mix([name]) for name in sites}
    plans = {label: plan for each in tried.values() for label, plan in each.items()}
    trial.add(plans, _SECOND.building)
    better = trial.better([*plans], best, _SECOND.measuring)
    names = [name for name, each in tried.items() if set(each) & set(better)]
    if len(names) > 1:
        plans = mix(names)
        trial.add(plans, _THIRD.building)
        trial.better([*plans], max(better, key=better.__getitem__), _THIRD.measuring)


def _fastest(seconds: Mapping[str, list[float]], notes: Mapping[str, str]) -> tuple[str, str]:
    """The form to take, and why."""
    failed = next((form for form in NEEDED if form in notes), None)
    if failed:
        return FOLDED, f"nothing was compared, since '{failed}' was not run; what folds is folded"
    compared = {form: times for form, times in seconds.items() if len(times) >= LEAST_ROUNDS}
    if not set(NEEDED) <= set(compared):
        return FOLDED, "the budget allowed too few rounds to compare, so what folds is folded"
    forms = {form: times for form, times in compared.items() if form != INPUT}
    best = min(forms, key=lambda form: ratio(forms[form], forms[FOLDED]).median)
    # The best of many is good by chance more often than one (Bonferroni).
    confidence = 1 - (1 - CONFIDENCE) / max(1, len(forms) - 1)
    if best != FOLDED and ratio(forms[best], forms[FOLDED], confidence).high >= 1:
        best = FOLDED
    against_input = ratio(seconds[best], seconds[INPUT])
    if against_input.low > 1:
        return INPUT, "the model as it was is faster than any other form"
    if best == FOLDED:
        return best, "no other form is faster beyond noise"
    return best, f"it takes {_percent(ratio(forms[best], forms[FOLDED]))} of the time of '{FOLDED}'"


def _percent(measured: Ratio) -> str:
    return f"{100 * measured.median:.1f}% ({100 * measured.low:.1f} to {100 * measured.high:.1f}%)"


def _as_it_was(fold: Plan) -> Plan:
    """A plan to do nothing, since that is fastest."""
    why = "With what folds folded, the model is slower than it was."
    decisions = tuple(
        d if d.action == Fate.KEPT else Decision(d.name, Fate.KEPT, reason=why)
        for d in fold.decisions
    )
    return Plan("auto", decisions)

"""Mode "auto": of the exact forms that a model can have, the one that measures fastest.

The planner says which forms there are (`planner.candidates`). Each is written and run as a whole,
in turn with the others and with the model as it was. The folded model is taken unless another
form is faster beyond noise, and the model as it was if even the chosen form is slower than that.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import replace

from mbn_rewrite.errors import RewriteError, cause_of, is_out_of_memory
from mbn_rewrite.frontends.protocols import OpenModel, Run
from mbn_rewrite.ir.graph import Graph
from mbn_rewrite.measurement import CONFIDENCE, LEAST_ROUNDS, Measurement, Ratio, Timing, ratio
from mbn_rewrite.options import Options
from mbn_rewrite.passes.planner import FOLDED, candidates, make_plan
from mbn_rewrite.plans import Decision, Fate, Plan
from mbn_rewrite.tuning.timing import time_interleaved

INPUT = "input"  # the model as it was
MEASURING = "measuring"  # how the step begins that takes the budget

# Runs a form, by its plan; None stands for the model as it was. RewriteError: it cannot be
# run in this way.
Runner = Callable[[Plan | None], AbstractContextManager[Run]]

_NEEDED = (INPUT, FOLDED)  # without these there is nothing to compare others with
_BUILDING = 0.6  # the part of the budget after which no further form is built, or run at all


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
        plan = make_plan(model.graph, options.mode, options.stride)
    return replace(plan, notes=(*model.notes, *plan.notes))


def choose(graph: Graph, runner: Runner, device: str, options: Options) -> Plan:
    """The plan of the form that measures fastest.

    Nothing is measured where every BatchNormalization folds, or nothing else could be done.
    """
    plans = candidates(graph)
    if len(plans) == 1:
        return plans[FOLDED]
    start = time.perf_counter()
    notes: dict[str, str] = {}
    with ExitStack() as stack:
        runs = _built(stack, plans, runner, options, start, notes)
        seconds: dict[str, list[float]] = {}
        while set(_NEEDED) <= set(runs) and not seconds:
            options.progress(f"{MEASURING} {len(runs)} forms: {options.run_config}")
            try:
                seconds = time_interleaved(runs, start + options.budget, stays=_NEEDED)
            except _Failed as failed:  # memory, or a device, may be gone half-way
                runs.pop(failed.form)
    for form, times in seconds.items():
        if not times:
            notes[form] = _not_tried(options)
    chosen, why = _fastest(seconds, notes)
    timings = tuple(
        Timing(
            form,
            tuple(seconds.get(form, ())),
            ratio(seconds[INPUT], seconds[form]) if seconds.get(form) else None,
            notes.get(form, ""),
        )
        for form in (INPUT, *plans)
    )
    measurement = Measurement(device, options.run_config, timings, chosen, why)
    plan = _as_it_was(plans[FOLDED]) if chosen == INPUT else plans[chosen]
    return replace(plan, measurement=measurement)


def _built(
    stack: ExitStack,
    plans: Mapping[str, Plan],
    runner: Runner,
    options: Options,
    start: float,
    notes: dict[str, str],
) -> dict[str, Run]:
    """Functions that run the forms that can be built and run in time."""
    runs: dict[str, Run] = {}

    def begins(form: str) -> bool:
        if not set(_NEEDED).isdisjoint(notes):
            notes[form] = "not tried: there is nothing to compare it with"
        elif form not in _NEEDED and time.perf_counter() - start > _BUILDING * options.budget:
            notes[form] = _not_tried(options)
        return form not in notes

    # All are built before one runs: a call may move statistics, which must not be copied.
    for form, plan in ((INPUT, None), *plans.items()):
        if begins(form):
            options.progress(f"building form '{form}'")
            with suppress(_Failed), _noting(notes, form):
                runs[form] = stack.enter_context(runner(plan))
    for form in list(runs):
        runs[form] = _noted(runs[form], notes, form)
        if begins(form):
            with suppress(_Failed):
                runs[form]()
    return {form: run for form, run in runs.items() if form not in notes}


def _not_tried(options: Options) -> str:
    return f"not tried: the budget of {options.budget:g} seconds was used up"


class _Failed(Exception):  # noqa: N818 - it goes no further than this module
    """A form cannot be built or run; it has been noted why."""

    def __init__(self, form: str) -> None:
        super().__init__(form)
        self.form = form


@contextmanager
def _noting(notes: dict[str, str], form: str) -> Iterator[None]:
    """Context manager that notes what keeps a form from being measured.

    Whatever that is, the other forms are there: it is no reason to give nothing.
    """
    try:
        yield
    except Exception as error:
        said = str(error) if isinstance(error, RewriteError) else cause_of(error)
        notes[form] = f"not measured: {'out of memory' if is_out_of_memory(error) else said}"
        raise _Failed(form) from error


def _noted(run: Run, notes: dict[str, str], form: str) -> Run:
    def noted() -> object:
        with _noting(notes, form):
            return run()

    return noted


def _fastest(seconds: Mapping[str, list[float]], notes: Mapping[str, str]) -> tuple[str, str]:
    """The form to take, and why."""
    failed = next((form for form in _NEEDED if form in notes), None)
    if failed:
        return FOLDED, f"nothing was compared, since '{failed}' was not run; what folds is folded"
    compared = {form: times for form, times in seconds.items() if len(times) >= LEAST_ROUNDS}
    if not set(_NEEDED) <= set(compared):
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

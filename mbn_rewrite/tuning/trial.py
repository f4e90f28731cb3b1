"""Trial of the forms of a model: they are built, and run in turn, within a budget of time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress

from mbn_rewrite.errors import RewriteError, cause_of, is_out_of_memory
from mbn_rewrite.frontends.protocols import Run
from mbn_rewrite.measurement import CONFIDENCE, LEAST_ROUNDS, Ratio, Timing, ratio
from mbn_rewrite.options import Options
from mbn_rewrite.passes.planner import FOLDED
from mbn_rewrite.plans import Plan
from mbn_rewrite.tuning.timing import time_interleaved

INPUT = "input"  # the model as it was
NEEDED = (INPUT, FOLDED)  # without these there is nothing to compare others with
MEASURING = "measuring"  # how the step begins that takes the budget

# Runs a form, by its plan; None stands for the model as it was. RewriteError: it cannot be
# run in this way.
Runner = Callable[[Plan | None], AbstractContextManager[Run]]


class Trial:
    """The forms of a model that are built and measured, one round after the other.

    Args:
        stack: which what is built is left to.
        runner: builds forms.
        options: how to run them.

    Attributes:
        plans: by the name of the form.
        notes: why a form was not measured, by its name.
        rounds: seconds of each call by form, of all measurements that had enough of them to
            compare; the last decides. The first counts whatever it has.
    """

    def __init__(self, stack: ExitStack, runner: Runner, options: Options) -> None:
        self.plans: dict[str, Plan] = {}
        self.notes: dict[str, str] = {}
        self.rounds: list[dict[str, list[float]]] = []
        self._stack, self._runner, self._options = stack, runner, options
        self._start = time.perf_counter()
        self._runs: dict[str, Run] = {}
        self._out: set[str] = set()  # forms that are out of the running

    def add(self, plans: Mapping[str, Plan], part: float) -> None:
        """Builds forms, while no more than a part of the budget is used up."""
        self.plans |= plans
        fresh = {**({} if self.rounds else {INPUT: None}), **plans}
        # All are built before one runs: a call may move statistics, which must not be copied.
        for form, plan in fresh.items():
            if self._begins(form, part):
                self._options.progress(f"building form '{form}'")
                with suppress(_Failed), _noting(self.notes, form):
                    self._runs[form] = self._stack.enter_context(self._runner(plan))
        for form in fresh:
            if form in self._runs:
                run = self._runs[form] = _noted(self._runs[form], self.notes, form)
                if self._begins(form, part):
                    with suppress(_Failed):
                        run()
        self._runs = {form: run for form, run in self._runs.items() if form not in self.notes}

    def _begins(self, form: str, part: float) -> bool:
        if not set(NEEDED).isdisjoint(self.notes):
            self.notes[form] = "not tried: there is nothing to compare it with"
        elif form not in NEEDED and self._used > part:
            self.notes[form] = _not_tried(self._options)
        return form not in self.notes

    @property
    def _used(self) -> float:
        """Part of the budget that is used up."""
        return (time.perf_counter() - self._start) / self._options.budget

    def measure(self, forms: Sequence[str], part: float, stays: Sequence[str] = NEEDED) -> None:
        """Times forms in turn, until a part of the budget is used up."""
        seconds: dict[str, list[float]] = {}
        while set(stays) <= set(self._runs) and not seconds:
            runs = {form: self._runs[form] for form in forms if form in self._runs}
            self._options.progress(f"{MEASURING} {len(runs)} forms: {self._options.run_config}")
            try:
                deadline = self._start + part * self._options.budget
                seconds = time_interleaved(runs, deadline, stays=stays)
            except _Failed as failed:  # memory, or a device, may be gone half-way
                self._runs.pop(failed.form)
        for form, times in seconds.items():
            if not times:
                self.notes[form] = _not_tried(self._options)
        if not self.rounds or all(len(seconds.get(form, ())) >= LEAST_ROUNDS for form in stays):
            self.rounds.append(seconds)

    def ranked(self) -> list[str]:
        """The forms that can be compared, the fastest first; none is the model as it was."""
        seconds = _enough(self.rounds[-1])
        if not set(NEEDED) <= set(seconds):
            return [FOLDED]
        forms = [form for form in seconds if form != INPUT]
        return sorted(forms, key=lambda form: ratio(seconds[form], seconds[FOLDED]).median)

    def compared(self, form: str, base: str) -> Ratio:
        """Ratio of the times of two forms, in the last measurement."""
        return ratio(self.rounds[-1][form], self.rounds[-1][base])

    def better(self, forms: Sequence[str], base: str, part: float) -> dict[str, float]:
        """Those of some forms that are faster than another beyond noise, and how much faster.

        The others are out of the running.
        """
        measured = len(self.rounds)
        stays = tuple(dict.fromkeys((*NEEDED, base)))
        if any(form in self._runs for form in forms):
            self.measure([*stays, *forms], part, stays)
        if len(self.rounds) == measured:
            return {}
        last = self.rounds[-1]
        # The best of many is good by chance more often than one (Bonferroni).
        confidence = 1 - (1 - CONFIDENCE) / len(forms)
        enough = [form for form in forms if form in _enough(last)]
        ratios = {form: ratio(last[base], last[form], confidence) for form in enough}
        faster = {form: r.median for form, r in ratios.items() if r.low > 1}
        self._out |= set(forms) - set(faster)
        return faster

    @property
    def last(self) -> dict[str, list[float]]:
        """Seconds of the last measurement, of the forms that are in the running."""
        out = self._out | (set(self.notes) - set(NEEDED))
        return {form: times for form, times in self.rounds[-1].items() if form not in out}

    def timings(self) -> tuple[Timing, ...]:
        """Times of all forms, each as it was measured last."""
        return tuple(self._timing(form) for form in (INPUT, *self.plans))

    def _timing(self, form: str) -> Timing:
        rounds = [each for each in self.rounds if each.get(form)]
        if not rounds:
            return Timing(form, (), None, self.notes.get(form, ""))
        seconds = rounds[-1][form]
        return Timing(
            form, tuple(seconds), ratio(rounds[-1][INPUT], seconds), self.notes.get(form, "")
        )


def _enough(seconds: Mapping[str, list[float]]) -> dict[str, list[float]]:
    """The forms that were run often enough to be compared."""
    return {form: times for form, times in seconds.items() if len(times) >= LEAST_ROUNDS}


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

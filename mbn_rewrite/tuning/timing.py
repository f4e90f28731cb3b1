"""Times variants of a model in turn, so that what slows the machine down slows all alike.

Variants are compared by the ratios of times that were taken one after the other. The median of
such ratios and its confidence interval need no assumption on how times are distributed: the
interval between the k-th smallest and the k-th largest of n ratios holds the true median unless
fewer than k of n fair coins show heads (Conover, "Practical Nonparametric Statistics", 1999,
section 3.2). numpy only.
"""

from __future__ import annotations

import math
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mbn_rewrite.errors import RewriteError
from mbn_rewrite.tables import table

DEFAULT_BUDGET = 60.0  # seconds
DTYPES = ("float16", "bfloat16")
MEASURING = "measuring"  # how the step begins that takes the budget

# Fewer values have no interval that holds their median with 95%: it is outside all six with a
# chance of 2 / 2^6.
LEAST_ROUNDS = 6

CONFIDENCE = 0.95  # of intervals

_WARMUP = 3  # calls: the first of a function compiles, the next settle allocators
_CERTAIN_ROUNDS, _MOST_ROUNDS = 7, 40
_SHORTEST_SAMPLE = 5e-3  # seconds: calls that are shorter are timed several at a time
_HOPELESS = 1.03  # times the time of the fastest


@dataclass(frozen=True)
class RunConfig:
    """How a model will be run.

    Attributes:
        batch_size: examples in a call.
        jit_compile: whether XLA compiles it.
        dtype: None to compute as the model says; "float16" or "bfloat16" for TensorFlow's
            automatic mixed precision, which takes float16 on GPUs and bfloat16 on CPUs.
    """

    batch_size: int = 1
    jit_compile: bool = False
    dtype: str | None = None

    def __post_init__(self) -> None:
        size = self.batch_size
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise RewriteError(f"the batch size must be a whole number from 1 up, not {size!r}")
        if self.dtype not in (None, *DTYPES):
            raise RewriteError(
                f"a model is measured as it is (dtype=None), or with mixed precision of "
                f"{' or '.join(DTYPES)}, not of {self.dtype!r}"
            )
        if self.dtype and self.jit_compile:
            raise RewriteError(
                "automatic mixed precision has no effect on what XLA compiles. Give dtype or "
                "jit_compile, or build the model with the dtype policy that it will have"
            )

    def __str__(self) -> str:
        compiled = ", compiled by XLA" if self.jit_compile else ""
        mixed = f", mixed precision of {self.dtype}" if self.dtype else ""
        return f"batch {self.batch_size}{compiled}{mixed}"


@dataclass(frozen=True)
class Ratio:
    """How many times as long one variant takes as another: the median, and its interval."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Timing:
    """One form of a model.

    Attributes:
        form: its name.
        seconds: of each call, in the order in which they were taken; () if it was not run.
        speed_up: times as fast as the input, or None.
        note: why it was not run, or "".
    """

    form: str
    seconds: tuple[float, ...] = ()
    speed_up: Ratio | None = None
    note: str = ""


@dataclass(frozen=True)
class Measurement:
    """Which form of a model is fastest.

    Attributes:
        device: what it ran on.
        run_config: how it was run.
        timings: one for each form, that of the input first.
        chosen: the name of the form that was taken.
        why: in a sentence.
    """

    device: str
    run_config: RunConfig
    timings: tuple[Timing, ...]
    chosen: str
    why: str

    def to_dict(self) -> dict[str, Any]:
        """The measurement in types that JSON knows; times in milliseconds."""
        return {
            "device": self.device,
            **asdict(self.run_config),
            "chosen": self.chosen,
            "why": self.why,
            "forms": [
                {
                    "form": timing.form,
                    "milliseconds": [1e3 * second for second in timing.seconds],
                    "times_as_fast": timing.speed_up and asdict(timing.speed_up),
                    "note": timing.note,
                }
                for timing in self.timings
            ],
        }

    def __str__(self) -> str:
        columns = ["form", "median ms", "quartiles", "times as fast", "95% interval", ""]
        rows = table(columns, map(self._cells, self.timings))
        return f"{rows}\n{self.device}, {self.run_config}: {self.why}"

    def _cells(self, timing: Timing) -> list[str]:
        said = timing.note or ("chosen" if timing.form == self.chosen else "")
        if not timing.seconds:
            return [timing.form, "-", "-", "-", "-", said]
        low, median, high = quartiles([1e3 * second for second in timing.seconds])
        ratio = timing.speed_up
        times = [f"{ratio.median:.3f}", f"{ratio.low:.3f}-{ratio.high:.3f}"] if ratio else ["-"] * 2
        if len(timing.seconds) < LEAST_ROUNDS:
            times[1] = "-"
        return [timing.form, f"{median:.2f}", f"{low:.2f}-{high:.2f}", *times, said]


def processor() -> str:
    """The name of the CPU, and how many of its cores there are for this process."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # where processes are not bound to cores
        cores = os.cpu_count() or 1
    return f"{cpu_name()}, {cores} cores"


def cpu_name() -> str:
    """What the maker calls the CPU, as far as the system tells."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The lower quartile, the median and the upper quartile."""
    if len(values) < 2:
        return (values[0],) * 3
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def ratio(seconds: Sequence[float], base: Sequence[float], confidence: float = CONFIDENCE) -> Ratio:
    """How many times as long as `base` a variant takes, by rounds that both took part in."""
    ratios = sorted(a / b for a, b in zip(seconds, base, strict=False))
    outside = _outside(len(ratios), confidence)
    return Ratio(statistics.median(ratios), ratios[outside], ratios[-1 - outside])


def _outside(count: int, confidence: float = CONFIDENCE) -> int:
    """How many ordered values lie below the confidence interval of a median of `count`."""
    outside, chance = 0, 0.0
    while outside < (count - 1) // 2:
        chance += math.comb(count, outside) / 2**count
        if chance > (1 - confidence) / 2:
            return max(0, outside - 1)
        outside += 1
    return max(0, outside - 1)


def time_interleaved(
    variants: Mapping[str, Callable[[], object]],
    deadline: float,
    stays: Collection[str] = (),
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of calls of each variant; they take turns, and each begins a round in its turn.

    Who is slower than the fastest beyond doubt takes part no longer. Where the time is too short
    for all, the slowest do not take part at all.

    Args:
        variants: functions by name. What they return is thrown away.
        deadline: when to stop, on the clock. Some rounds may be missing then.
        stays: who takes part to the end, whatever time there is.
        clock: gives the time in seconds.
    """
    took = {}
    for name, function in variants.items():
        for number in range(_WARMUP):
            if number and clock() > deadline:
                break
            start = clock()
            function()
            took[name] = max(clock() - start, 1e-6)
    calls = {name: math.ceil(_SHORTEST_SAMPLE / seconds) for name, seconds in took.items()}
    running = list(variants)
    others = [name for name in running if name not in stays]
    for name in sorted(others, key=lambda name: took[name], reverse=True):
        if LEAST_ROUNDS * sum(took[one] for one in running) > deadline - clock():
            running.remove(name)
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(_MOST_ROUNDS):
        first = number % len(running)
        for name in running[first:] + running[:first]:
            start = clock()
            for _ in range(calls[name]):
                variants[name]()
            seconds[name].append((clock() - start) / calls[name])
        if clock() > deadline:
            break
        if number + 1 >= _CERTAIN_ROUNDS:
            best = min(running, key=lambda name: statistics.median(seconds[name]))
            running = [
                name
                for name in running
                if name in stays or ratio(seconds[name], seconds[best]).low < _HOPELESS
            ]
    return seconds

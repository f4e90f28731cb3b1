"""Measured times of models and of their forms, as data, and the statistics that compare them.

Variants are compared by the ratios of times that were taken one after the other. The median of
such ratios and its confidence interval need no assumption on how times are distributed: the
interval between the k-th smallest and the k-th largest of n ratios holds the true median unless
fewer than k of n fair coins show heads (Conover, "Practical Nonparametric Statistics", 1999,
section 3.2).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mbn_rewrite.options import RunConfig
from mbn_rewrite.tables import table

# Fewer values have no interval that holds their median with 95%: it is outside all six with a
# chance of 2 / 2^6.
LEAST_ROUNDS = 6

UNCHANGED = "nothing was changed, so that it is as fast as it was"  # why not to measure it

# Two instances of one model may differ by as much, beyond what repeated calls show.
_ALIKE = 1.02

CONFIDENCE = 0.95  # of intervals


@dataclass(frozen=True)
class Ratio:
    """Ratio of the times of two variants: the median, and its interval."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.low:.2f}-{self.high:.2f}"


@dataclass(frozen=True)
class Timing:
    """Times of one form of a model, or of one of several models.

    Attributes:
        form: its name.
        seconds: of each call, in the order in which they were taken; () if it was not run.
        speed_up: times as fast as the input, or as the first model; None for that itself.
        note: why it was not run, or "".
    """

    form: str
    seconds: tuple[float, ...] = ()
    speed_up: Ratio | None = None
    note: str = ""


@dataclass(frozen=True)
class Measurement:
    """Measured times of the forms of a model, and the form that was chosen.

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


@dataclass(frozen=True)
class Latencies:
    """Latencies of models that were called in turn.

    Attributes:
        device: what they ran on.
        run_config: how they were run.
        timings: one for each model; the others are compared with the first. () if they could not be
            measured.
        threads: how many threads of the CPU an operation could use; None for one a core.
        why: why they were not measured, or why the second is no faster than the first beyond noise;
            as a phrase, or "".
    """

    device: str
    run_config: RunConfig
    timings: tuple[Timing, ...]
    threads: int | None = None
    why: str = ""

    @property
    def speed_up(self) -> Ratio | None:
        """Times as fast as the first model that the second is; None if that was not measured."""
        return self.timings[1].speed_up if len(self.timings) > 1 else None

    @property
    def is_faster(self) -> bool:
        """Whether the second model is faster than the first, beyond what `figure` calls noise."""
        ratio = self.speed_up
        if ratio is None or len(self.timings[1].seconds) < LEAST_ROUNDS:
            return False
        return ratio.low > _ALIKE

    @property
    def where(self) -> str:
        """What was run how, and on what."""
        threads = f"{self.threads} thread{'s' * (self.threads != 1)}, " if self.threads else ""
        return f"{self.run_config}, {threads}{self.device}"

    @property
    def figure(self) -> str:
        """The speed of the second model beside the first, in one line."""
        ratio = self.speed_up
        if ratio is None:
            return f"not measured: {self.why}"
        calls = len(self.timings[1].seconds)
        if calls < LEAST_ROUNDS:
            only = f"{calls} call{'s' * (calls != 1)} only"
            return f"{ratio.median:.2f} times as fast here, by {only} ({self.where})"
        measured = f"(95% {ratio}; {self.where})"
        if ratio.low <= _ALIKE and ratio.high >= 1 / _ALIKE:
            return f"no difference beyond noise here {measured}{self.why and f': {self.why}'}"
        return f"{ratio.median:.2f} times as fast here {measured}"

    def to_dict(self) -> dict[str, Any]:
        """The latencies in types that JSON knows; times in milliseconds."""
        return {
            "device": self.device,
            "threads": self.threads,
            **asdict(self.run_config),
            "figure": self.figure,
            "models": [
                {
                    "model": timing.form,
                    "percentiles": percentiles([1e3 * second for second in timing.seconds]),
                    "milliseconds": [1e3 * second for second in timing.seconds],
                    "times_as_fast": timing.speed_up and asdict(timing.speed_up),
                    "note": timing.note,
                }
                for timing in self.timings
            ],
        }

    def __str__(self) -> str:
        columns = ["model", "p50 ms", "p90 ms", "p99 ms", "calls", "times as fast", "95%", ""]
        if not self.timings:
            return f"speed: {self.figure}"
        rows = table(columns, map(self._cells, self.timings))
        last = f"speed: {self.figure}" if len(self.timings) == 2 else self.where
        return f"{rows}\n{last}"

    def _cells(self, timing: Timing) -> list[str]:
        found = percentiles([1e3 * second for second in timing.seconds])
        times = [_digits(found[p]) if p in found else "-" for p in ("p50", "p90", "p99")]
        ratio = timing.speed_up
        enough = len(timing.seconds) >= LEAST_ROUNDS
        compared = [f"{ratio.median:.2f}", str(ratio) if enough else "-"] if ratio else ["-"] * 2
        return [timing.form, *times, str(len(timing.seconds)), *compared, timing.note]


def _digits(milliseconds: float) -> str:
    return f"{milliseconds:.2f}" if milliseconds < 100 else f"{milliseconds:.0f}"


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """The median, and the percentiles that there are values enough for: as "p50", "p90", "p99"."""
    if not values:
        return {}
    cuts = statistics.quantiles(values, n=100, method="inclusive") if len(values) > 1 else []
    least = {90: 10, 99: 100}  # of so many values one lies beyond
    ends = {f"p{p}": cuts[p - 1] for p, count in least.items() if len(values) >= count}
    return {"p50": statistics.median(values), **ends}


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The lower quartile, the median and the upper quartile."""
    if len(values) < 2:
        return (values[0],) * 3
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def ratio(seconds: Sequence[float], base: Sequence[float], confidence: float = CONFIDENCE) -> Ratio:
    """Ratio of a variant's times to those of `base`, by rounds that both took part in."""
    ratios = sorted(a / b for a, b in zip(seconds, base, strict=False))
    outside = _outside(len(ratios), confidence)
    return Ratio(statistics.median(ratios), ratios[outside], ratios[-1 - outside])


def _outside(count: int, confidence: float = CONFIDENCE) -> int:
    """Number of ordered values below the confidence interval of a median of `count`."""
    outside, chance = 0, 0.0
    while outside < (count - 1) // 2:
        chance += math.comb(count, outside) / 2**count
        if chance > (1 - confidence) / 2:
            return max(0, outside - 1)
        outside += 1
    return max(0, outside - 1)

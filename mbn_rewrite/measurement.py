"""Measured times of the forms of a model, as data, and the statistics that compare them.

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

CONFIDENCE = 0.95  # of intervals


@dataclass(frozen=True)
class Ratio:
    """Ratio of the times of two variants: the median, and its interval."""

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

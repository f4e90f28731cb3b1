"""Latencies of the variants of a model: timed in turn, and as a table.

A row of results is of one model and batch size. Its "variants" are what is known of each by name:
"left", "error", "form" as a program fills them in, "note" where it failed, and the times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.common.failures import noted
from mbn_rewrite.measurement import Ratio, quartiles, ratio
from mbn_rewrite.tables import table
from mbn_rewrite.tuning.timing import time_calls

Row = dict[str, Any]
BASES = ("original", "floor")  # what others are compared with, where they are timed
_COLUMNS = (
    *("model", "of", "batch", "variant", "left", "error", "ms", "quartiles"),
    *("x original", "x floor", "form"),
)
_MOST_REPEATS = 200


def measured(
    calls: Mapping[str, Callable[[], object]], known: dict[str, Row], seconds: float, repeats: int
) -> None:
    """Times what can be timed, in turn; adds the times to what is known.

    Args:
        calls: functions by variant.
        known: what is known of each variant.
        seconds: short calls are repeated for so long for each variant, up to 200 times.
        repeats: how often each is timed at least.
    """

    def watched(variant: str, call: Callable[[], object]) -> Callable[[], object]:
        def run() -> None:
            if "note" not in known[variant]:  # what has failed is not called again
                with noted(known, variant):
                    call()

        return run

    watched_calls = {variant: watched(variant, call) for variant, call in calls.items()}
    timed = time_calls(watched_calls, seconds * len(watched_calls), repeats, _MOST_REPEATS)
    timed = {variant: times for variant, times in timed.items() if "note" not in known[variant]}
    for variant, times in timed.items():
        low, median, high = quartiles([1e3 * second for second in times])
        facts = known[variant]
        facts |= {"ms": median, "quartiles": [low, high], "milliseconds": [1e3 * t for t in times]}
        for base in BASES:
            if base in timed:
                facts[f"x {base}"] = asdict(ratio(timed[base], times))


def latency_table(rows: Sequence[Row], title: str) -> str:
    """The rows, a line for each variant."""
    return table(_COLUMNS, [line for row in rows for line in _lines(row)], title, width=200)


def _lines(row: Row) -> Iterator[list[str]]:
    for variant, facts in row["variants"].items():
        error = facts.get("error")
        timed = "ms" in facts
        low, high = facts.get("quartiles", (0, 0))
        yield [
            Path(row["model"]).name,
            row["keras"],
            str(row["batch"]),
            variant,
            str(facts.get("left", "-")),
            "-" if error is None else f"{error:.0e}",
            f"{facts['ms']:.2f}" if timed else "-",
            f"{low:.2f}-{high:.2f}" if timed else "-",
            *(_compared(facts, base) for base in BASES),
            facts.get("note", facts.get("form", "")),
        ]


def _compared(facts: Row, base: str) -> str:
    if f"x {base}" not in facts:
        return "-"
    found = Ratio(**facts[f"x {base}"])
    return f"{found.median:.2f} ({found})"

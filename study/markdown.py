"""Tables and sentences of the page, in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from study.statistics import ALPHA, WANTED_POWER, Comparison, needed, power


def spread_table(unit: str, values: Mapping[str, Sequence[float]], digits: int) -> str:
    rows = []
    for variant, of_variant in values.items():
        numbers = [np.mean(of_variant), np.median(of_variant), min(of_variant), max(of_variant)]
        deviation = np.std(of_variant, ddof=1) if len(of_variant) > 1 else None
        texts = [f"{number:.{digits}f}" for number in numbers]
        spread = "-" if deviation is None else f"{deviation:.{digits}f}"
        rows.append([variant, str(len(of_variant)), texts[0], spread, *texts[1:]])
    columns = ["variant", "runs", f"mean {unit}", "standard deviation", "median", "least", "most"]
    return table(columns, rows)


def comparison_table(compared: Mapping[str, Comparison], unit: str) -> str:
    rows = [
        [
            variant,
            str(c.count),
            signed(c),
            _number(c.deviation),
            _p(c.t_test),
            _p(c.holm),
            _p(c.wilcoxon),
            f"±{c.margin:g}",
            _p(c.equivalence),
            c.verdict,
        ]
        for variant, c in compared.items()
    ]
    columns = [
        *("variant", "pairs", f"mean difference, {unit}", "standard deviation"),
        *(
            "paired t, p",
            "Holm, p",
            "Wilcoxon, p",
            "margin",
            "equivalence (TOST), p",
            f"at {ALPHA:.0%}",
        ),
    ]
    return table(columns, rows)


def power_text(variant: str, c: Comparison, unit: str) -> str:
    if c.power is None or c.deviation is None:
        return f"{variant}: one pair has no spread, so its power is not known."
    enough = c.power >= WANTED_POWER
    more = f"{c.needed} pairs" if c.needed else "more pairs than ten thousand"
    text = (
        f"{variant}: if there is no difference, {c.count} pairs with this spread show that it is "
        f"within ±{c.margin:g} {unit} with a chance of {c.power:.0%}"
    )
    if not enough:
        reach = next(
            (m for m in _margins() if power(c.deviation, c.count, m) >= WANTED_POWER), None
        )
        within = f"; what they can show is ±{reach:g}" if reach else ""
        return f"{text}: too few, {WANTED_POWER:.0%} takes {more}{within}."
    return f"{text}; {WANTED_POWER:.0%} takes {needed(c.deviation, c.margin)}."


def _margins() -> Iterable[float]:
    """Round numbers, upward."""
    for power_of_ten in (0.1, 1, 10, 100):
        for digit in (1, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9):
            yield round(power_of_ten * digit, 2)


def strides_text(layer: Mapping[str, Any], variant: str) -> str:
    if layer["strides"] is None:
        return "-"
    asked = int(variant.lstrip("abcdefghijklmnopqrstuvwxyz"))
    lowered = any(stride != asked for stride in layer["strides"])
    return ",".join(map(str, layer["strides"])) + ("\\*" if lowered else "")


def signed(c: Comparison) -> str:
    if c.interval is None:
        return f"{c.mean:+.2f}"
    return f"{c.mean:+.2f} [{c.interval[0]:+.2f}, {c.interval[1]:+.2f}]"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _p(value: float | None) -> str:
    if value is None:
        return "-"
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def picture_of(name: str) -> str:
    return f"![{name.removesuffix('.png').replace('_', ' ')}]({name})"

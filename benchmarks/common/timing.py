"""Variants timed in turn, each as often as a program says, by the package's own clockwork.

`mbn_rewrite.tuning.timing.time_interleaved` decides by itself how often, within a time that is
given, and when a variant may leave.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

from mbn_rewrite.tuning.timing import in_turn, seconds_of


def time_rounds(
    variants: Mapping[str, Callable[[], object]],
    repeats: int = 30,
    warmup: int = 3,
    *,
    untimed: int = 0,
    prepare: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of as many calls of each variant; they take turns as in `time_interleaved`.

    Args:
        variants: functions by name. What they return is thrown away.
        repeats: how many times each is timed.
        warmup: how many times each is called before.
        untimed: how many times it is called at the beginning of each of its turns, so that it
            finds caches and threads as if it ran alone.
        prepare: called before each turn, to collect garbage or to let threads come to rest.
    """
    for _ in range(warmup):
        for function in variants.values():
            function()
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(repeats):
        for name in in_turn(list(variants), number):
            prepare()
            for _ in range(untimed):
                variants[name]()
            seconds[name].append(seconds_of(variants[name], 1, time.perf_counter))
    return seconds


def median_ratio(seconds: Mapping[str, Sequence[float]], name: str, base: str) -> float:
    """Time of a variant, relative to that of `base`, by their medians."""
    return statistics.median(seconds[name]) / statistics.median(seconds[base])

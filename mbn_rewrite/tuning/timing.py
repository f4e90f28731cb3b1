"""Times variants of a model in turn, so that what slows the machine down slows all alike."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence

from mbn_rewrite.measurement import LEAST_ROUNDS, ratio

_WARMUP = 3  # calls: the first of a function compiles, the next settle allocators
_CERTAIN_ROUNDS, _MOST_ROUNDS = 7, 40
_SHORTEST_SAMPLE = 5e-3  # seconds: calls that are shorter are timed several at a time
_HOPELESS = 1.03  # times the time of the fastest
_MOST_CALLS = 1000


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
            took[name] = max(seconds_of(function, 1, clock), 1e-6)
    calls = {name: math.ceil(_SHORTEST_SAMPLE / seconds) for name, seconds in took.items()}
    running = list(variants)
    others = [name for name in running if name not in stays]
    for name in sorted(others, key=lambda name: took[name], reverse=True):
        if LEAST_ROUNDS * sum(took[one] for one in running) > deadline - clock():
            running.remove(name)
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(_MOST_ROUNDS):
        for name in in_turn(running, number):
            seconds[name].append(seconds_of(variants[name], calls[name], clock))
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


def time_calls(
    variants: Mapping[str, Callable[[], object]],
    seconds: float,
    least: int = 1,
    most: int = _MOST_CALLS,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of single calls of each variant; they take turns, and all are called as often.

    Args:
        variants: functions by name. What they return is thrown away.
        seconds: how long to go on, about; calls before, which are not timed, come beside.
        least: how often each is called however long that takes.
        most: how often at most.
        clock: gives the time in seconds.
    """
    start = clock()
    for number in range(_WARMUP):
        for function in variants.values():
            if number == 0 or clock() < start + seconds:
                function()
    timed: dict[str, list[float]] = {name: [] for name in variants}
    end = clock() + seconds
    for number in range(most):
        if number >= least and clock() > end:
            break
        for name in in_turn(list(variants), number):
            timed[name].append(seconds_of(variants[name], 1, clock))
    return timed


def in_turn(names: Sequence[str], number: int) -> list[str]:
    """The order of a round, by its number."""
    first = number % max(1, len(names))
    return [*names[first:], *names[:first]]


def seconds_of(function: Callable[[], object], calls: int, clock: Callable[[], float]) -> float:
    """Seconds of one of some calls in a row. Results are thrown away, which counts."""
    start = clock()
    for _ in range(calls):
        function()
    return (clock() - start) / calls

"""Times variants in turn, so that what slows the machine down slows all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping


def interleaved(
    variants: Mapping[str, Callable[[], object]],
    repeats: int = 30,
    warmup: int = 3,
    *,
    untimed: int = 0,
    pause: float = 0.0,
) -> dict[str, list[float]]:
    """Seconds of each call of each variant; the variants take turns.

    Args:
        variants: functions by name. What they return is thrown away.
        repeats: how many times each is timed.
        warmup: how many times each is called before.
        untimed: how many times it is called at the beginning of each of its turns, so that it
            finds caches and threads as if it ran alone.
        pause: seconds of rest before each turn, in which the threads of the one before it, of
            another runtime perhaps, stop waiting for work by spinning.
    """
    for _ in range(warmup):
        for function in variants.values():
            function()
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repeats):
        for name, function in variants.items():
            if pause:
                time.sleep(pause)
            for _ in range(untimed):
                function()
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def median_ratio(seconds: Mapping[str, list[float]], name: str, base: str) -> float:
    """How many times as long as `base` a variant takes, by their medians."""
    return statistics.median(seconds[name]) / statistics.median(seconds[base])


def synchronize() -> None:
    """Waits for the GPU, where TensorFlow uses one."""
    import tensorflow as tf

    if tf.config.list_logical_devices("GPU"):
        tf.test.experimental.sync_devices()

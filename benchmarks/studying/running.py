"""All runs of a study, one after the other: what is missing, in an order that keeps runs paired."""

from __future__ import annotations

import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tensorflow as tf

import mbn_rewrite
from benchmarks import training_networks
from benchmarks.studying import training
from benchmarks.studying.data import Data
from benchmarks.studying.errors import StudyError
from benchmarks.studying.results import Results
from benchmarks.studying.training import Setting
from mbn_rewrite.errors import RewriteError

ORIGINAL = "original"


def checked_variants(variants: Sequence[str]) -> tuple[str, ...]:
    """The variants, the original first.

    Raises:
        StudyError: one is unknown, or the original is missing.
    """
    for variant in variants:
        try:
            mode, _ = training_networks.check_variant(variant)
        except RewriteError as error:
            raise StudyError(str(error)) from error
        if mode == "none":
            raise StudyError("none normalises nothing, so there is nothing to compare it by")
    if ORIGINAL not in variants:
        raise StudyError("the variants have to have original: the others are compared with it")
    return tuple(dict.fromkeys([ORIGINAL, *variants]))


def configuration(setting: Setting, data: Data, device: str, images: str) -> dict[str, Any]:
    """What has to be the same for runs to be compared."""
    return {
        "versions": {
            "mbn_rewrite": mbn_rewrite.__version__,
            "tensorflow": tf.__version__,
            setting.keras: _keras_version(setting.keras),
        },
        "device": device,
        "replicas": setting.replicas,
        "keras": setting.keras,
        "dtype": setting.dtype,
        "recipe": asdict(setting.recipe),
        "width": setting.width,
        "epochs": setting.epochs,
        "batch": setting.batch,
        "data": {
            "images": images,
            "train": data.train.size,
            "test": data.test.size,
            "classes": len(data.classes),
            "corrupt": list(data.corrupt),
            "digest": data.digest,
        },
    }


def _keras_version(keras: str) -> str:
    import importlib

    return str(importlib.import_module(training.KERAS[keras]).__version__)


def device(gpus: int) -> str:
    """What all runs on, in words."""
    if gpus:
        gpu = tf.config.list_physical_devices("GPU")[0]
        name = tf.config.experimental.get_device_details(gpu).get("device_name", "GPU")
        return f"{gpus} x {name}"
    return f"CPU, {len(os.sched_getaffinity(0))} cores, {_cpu()}"


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def order(variants: Sequence[str], runs: int) -> Iterator[tuple[str, int]]:
    """All runs, seed by seed, so that a part of the study is paired too.

    The variants take turns in going first: what the machine does over time hits all alike.
    """
    for seed in range(runs):
        turn = seed % len(variants)
        for variant in (*variants[turn:], *variants[:turn]):
            yield variant, seed


def check_operations(
    variant: str, operations: Mapping[str, int], originals: Mapping[str, int] | None
) -> None:
    """Sees that a variant ran something else than the original.

    Raises:
        StudyError: it did not.
    """
    if variant != ORIGINAL and operations == originals:
        ran = ", ".join(f"{op} x{count}" for op, count in operations.items()) or "nothing"
        raise StudyError(
            f"{variant} ran just what the original runs in a step ({ran}): the modification is not "
            "in effect, and this is no result"
        )


def run_missing(
    setting: Setting,
    data: Data,
    results: Results,
    variants: Sequence[str],
    runs: int,
    strategy: Any = None,
) -> int:
    """Runs what is not finished, and keeps it.

    Returns:
        How many runs were made.

    Raises:
        StudyError: a variant ran just what the original runs, or a run cannot be made.
    """
    finished = results.finished()
    all_runs = list(order(variants, runs))
    missing = [one for one in all_runs if one not in finished]
    # A variant is compared with the original as it runs, so that has to be there.
    missing.sort(key=lambda one: one[0] != ORIGINAL or one[1] != 0)
    progress = Progress(len(all_runs), len(missing), setting.epochs)
    for variant, seed in missing:

        def check(operations: Mapping[str, int], variant: str = variant) -> None:
            original = finished.get((ORIGINAL, 0))
            check_operations(variant, operations, original and original["operations"])

        progress.begin(variant, seed)
        with results.room():
            record = training.run(setting, data, variant, seed, check, progress.epoch, strategy)
            results.save(variant, seed, record)
        finished[variant, seed] = record
        progress.end(record)
    return len(missing)


class Progress:
    """Says which run it is and how much time is left, on standard error.

    On a terminal, a line for the run at hand is written over after each epoch.
    """

    def __init__(self, runs: int, missing: int, epochs: int) -> None:
        self._number = runs - missing
        self._runs, self._left, self._epochs = runs, missing, epochs
        self._seconds: list[float] = []
        self._label, self._epoch, self._started = "", 0, 0.0

    def begin(self, variant: str, seed: int) -> None:
        """A run starts."""
        self._number += 1
        self._label = f"run {self._number}/{self._runs}: {variant}, seed {seed}"
        self._epoch, self._started = 0, time.perf_counter()

    def epoch(self, record: Mapping[str, Any]) -> None:
        """An epoch has ended."""
        self._epoch += 1
        if sys.stderr.isatty():
            accuracy = f"{100 * record['test_accuracy']:.2f}%"
            text = f"{self._label}, epoch {self._epoch}/{self._epochs}: {accuracy}, {self._rest()}"
            print(f"\r{text:<90}", end="", file=sys.stderr, flush=True)

    def end(self, record: Mapping[str, Any]) -> None:
        """A run has ended."""
        self._seconds.append(time.perf_counter() - self._started)
        self._left -= 1
        self._epoch, self._started = 0, time.perf_counter()
        accuracy = f"{100 * record['epochs'][-1]['test_accuracy']:.2f}%"
        text = f"{self._label}: {accuracy} in {self._seconds[-1]:.0f} s, {self._rest()}"
        start = "\r" if sys.stderr.isatty() else ""
        print(f"{start}{text:<90}".rstrip(" "), file=sys.stderr, flush=True)

    def _rest(self) -> str:
        """The time left, by the runs and epochs so far."""
        gone = time.perf_counter() - self._started
        if self._seconds:
            left = statistics.mean(self._seconds) * self._left - gone
        else:
            left = gone / self._epoch * (self._epochs * self._left - self._epoch)
        minutes = max(left, 0) / 60
        return f"{minutes:.0f} min left" if minutes < 120 else f"{minutes / 60:.1f} h left"

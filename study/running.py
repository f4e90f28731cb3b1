"""All runs of a study: what is missing, in an order that keeps runs paired.

A process trains one after the other; several share the runs of one directory.
"""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import rich.progress
import tensorflow as tf
from rich.console import Console

import mbn_rewrite
from benchmarks.common import devices
from benchmarks.models import training_networks
from mbn_rewrite.device import processor
from mbn_rewrite.errors import RewriteError
from study import program, proof, training
from study.claims import Run
from study.errors import StudyError
from study.images import Data
from study.pairs import ORIGINAL
from study.recipes import KERAS
from study.results import Results
from study.standing import Standing, order
from study.training import Setting

_SILENCE = 60  # seconds
_PAUSE = 1.0  # seconds between looks at what other processes have finished


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


def configuration(setting: Setting, data: Data, images: str) -> dict[str, Any]:
    """Configuration that runs have to share to be compared."""
    return {
        "versions": {
            "mbn_rewrite": mbn_rewrite.__version__,
            "program": program.digest(),
            "tensorflow": tf.__version__,
            setting.keras: _keras_version(setting.keras),
        },
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
            "available": {"train": data.available[0], "test": data.available[1]},
            "classes": len(data.classes),
            "corrupt": list(data.corrupt),
            "digest": data.digest,
        },
    }


def _keras_version(keras: str) -> str:
    return str(importlib.import_module(KERAS[keras]).__version__)


def device() -> str:
    """Name of the device that this process trains on."""
    gpus = tf.config.get_visible_devices("GPU")
    if gpus:
        return f"{len(gpus)} x {devices.name_of('GPU')}"
    return f"CPU, {processor()}"


def check_operations(
    variant: str, operations: Mapping[str, int], originals: Mapping[str, int] | None
) -> None:
    """Sees that a variant ran operations of another kind than the original.

    How many there are is not enough: the profiler now and then misses one.

    Raises:
        StudyError: it did not.
    """
    if variant == ORIGINAL or originals is None:
        return
    if proof.kinds(operations) == proof.kinds(originals):
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
    """Runs what is not finished and no other process trains, and keeps it.

    Returns:
        How many runs were made.

    Raises:
        StudyError: a variant ran just what the original runs, or a run cannot be made.
    """
    here = device()
    standing = partial(Standing, tuple(order(variants, runs)), here)
    made = 0
    with Progress(setting.epochs) as progress:
        while True:
            with results.claimed(standing) as now:
                run = now.next
                if run:
                    progress.begin(run, now)
                    check = partial(check_operations, run[0], originals=now.originals)
                    record = training.run(setting, data, *run, check, progress.epoch, strategy)
                    results.save(*run, record | {"device": here})
                    progress.end(record)
                    made += 1
            if run:
                continue
            if not now.waits:
                return made
            progress.wait()
            time.sleep(_PAUSE)


class Progress:
    """Says which run it is and how much time is left, on standard error.

    A line for each run that ends; on a terminal a bar that grows with the epochs, and elsewhere a
    line for an epoch where a minute has passed since the last.
    """

    def __init__(self, epochs: int) -> None:
        self._epochs_of_run = epochs
        self._finished_before: int | None = None
        self._label, self._epochs = "", 0
        self._is_waiting = False
        self._started = self._said = 0.0
        console = Console(stderr=True, highlight=False)
        # Speed is taken over all epochs: variants differ, and take turns.
        self._bar = rich.progress.Progress(
            *rich.progress.Progress.get_default_columns(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
            speed_estimate_period=math.inf,
        )
        self._task = self._bar.add_task("", total=None)

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def begin(self, run: Run, now: Standing) -> None:
        """A run starts."""
        variant, seed = run
        finished = len(now.runs) - len(now.left)
        self._label = f"run {finished + 1}/{len(now.runs)}: {variant}, seed {seed}"
        self._started = self._said = time.perf_counter()
        self._epochs, self._is_waiting = 0, False
        if self._finished_before is None:
            self._finished_before = finished
        completed = finished - self._finished_before
        self._bar.update(
            self._task,
            completed=completed * self._epochs_of_run,
            total=(completed + len(now.here)) * self._epochs_of_run,
            description=self._label,
        )

    def wait(self) -> None:
        """There is nothing to begin just now."""
        if not self._is_waiting:
            self._say("waiting for the original, which another process trains")
        self._is_waiting = True

    def epoch(self, record: Mapping[str, Any]) -> None:
        """An epoch has ended."""
        self._bar.advance(self._task)
        self._epochs += 1
        if not self._bar.console.is_terminal and time.perf_counter() - self._said > _SILENCE:
            self._say(f"{self._label}: {self._epochs} epochs{self._rest()}")

    def _say(self, line: str) -> None:
        self._said = time.perf_counter()
        self._bar.console.print(line, soft_wrap=True)

    def end(self, record: Mapping[str, Any]) -> None:
        """A run has ended."""
        accuracy = f"{100 * record['epochs'][-1]['test_accuracy']:.2f}%"
        seconds = time.perf_counter() - self._started
        self._say(f"{self._label}: {accuracy} in {seconds:.0f} s{self._rest()}")

    def _rest(self) -> str:
        left = self._bar.tasks[0].time_remaining
        if not left:
            return ""
        return f", {left / 60:.0f} min left" if left < 7200 else f", {left / 3600:.1f} h left"

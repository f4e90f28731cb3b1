"""All runs of a study: what is missing, in an order that keeps runs paired.

A process trains one after the other; several share the runs of one directory.
"""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
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
from study.errors import StudyError
from study.images import Data
from study.recipes import KERAS
from study.results import Results
from study.training import Setting

ORIGINAL = "original"
_SILENCE = 60  # seconds


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
    """Runs what is not finished and no other process has claimed, and keeps it.

    A pair is trained on one device, so that seeds begun on others are left to them.

    Returns:
        How many runs were made.

    Raises:
        StudyError: a variant ran just what the original runs, a run cannot be made, or all that is
            missing is of seeds begun on other devices.
    """
    all_runs, finished, here = list(order(variants, runs)), results.finished(), device()
    elsewhere = {seed: r["device"] for (_, seed), r in finished.items() if r["device"] != here}
    left = [one for one in all_runs if one not in finished]
    missing = [one for one in left if one[1] not in elsewhere]
    if left and not missing:
        begun_on = sorted({elsewhere[seed] for _, seed in left})
        raise StudyError(
            f"all that is missing is of seeds begun on {' and '.join(begun_on)}, and this is "
            f"{here}: a pair is trained on one device. Go on there, or ask for more --runs"
        )
    # A variant is compared with the original as it runs here, so that has to be there.
    originals = [one for one in missing if one[0] == ORIGINAL]
    first = None if _original_on(here, finished) else next(iter(originals), None)
    missing.sort(key=lambda one: one != first)
    made = 0
    with Progress(len(all_runs), len(missing), setting.epochs) as progress:
        for variant, seed in missing:
            with results.claimed(variant, seed, wait=(variant, seed) == first) as ours:
                if not ours:
                    continue
                finished = results.finished()
                original = _original_on(here, finished)
                check = partial(
                    check_operations, variant, originals=original and original["operations"]
                )
                progress.begin(variant, seed, len(finished.keys() & set(all_runs)))
                record = training.run(setting, data, variant, seed, check, progress.epoch, strategy)
                results.save(variant, seed, record | {"device": here})
            made += 1
            progress.end(record)
    return made


def _original_on(
    device: str, finished: Mapping[tuple[str, int], dict[str, Any]]
) -> dict[str, Any] | None:
    records = (record for (variant, _), record in finished.items() if variant == ORIGINAL)
    return next((record for record in records if record["device"] == device), None)


class Progress:
    """Says which run it is and how much time is left, on standard error.

    A line for each run that ends; on a terminal a bar that grows with the epochs, and elsewhere a
    line for an epoch where a minute has passed since the last.
    """

    def __init__(self, runs: int, missing: int, epochs: int) -> None:
        self._runs, self._before = runs, runs - missing
        self._epochs_of_run = epochs
        self._label, self._epochs = "", 0
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
        self._task = self._bar.add_task("", total=missing * epochs)

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def begin(self, variant: str, seed: int, finished: int) -> None:
        """A run starts, when so many are finished, be it by other processes."""
        self._label = f"run {finished + 1}/{self._runs}: {variant}, seed {seed}"
        self._started = self._said = time.perf_counter()
        self._epochs = 0
        completed = (finished - self._before) * self._epochs_of_run
        self._bar.update(self._task, completed=completed, description=self._label)

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

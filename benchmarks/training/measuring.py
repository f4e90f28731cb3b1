"""Memory and time of training steps of one network with each kind of BatchNormalization.

`measure` fills the rows of a network and a Keras, whose first is the original:

    memory      of each variant, in a process of its own
    losses      at stride 1, the original's within rounding
    operations  other ones than the original's where something else is claimed to run
    time        in turn

What fails one of them is not measured further; the others go on.
"""

from __future__ import annotations

import functools
import json
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.common.console import progress
from benchmarks.common.failures import OUT_OF_MEMORY
from benchmarks.common.memory import forget_peak, resident
from benchmarks.common.timing import time_rounds
from benchmarks.training.backends import Tensor, in_use
from benchmarks.training.candidates import Candidate, build, guarded, prepare
from benchmarks.training.checks import check
from benchmarks.training.operations import ByLayer
from benchmarks.training.rows import Row, Settings
from benchmarks.training.steps import Batch
from mbn_rewrite.device import give_back_memory

PROGRAM = Path(__file__).parents[1] / "train_step.py"
MEMORY_STEPS = 3
WARMUP = 2


def note_memory(row: Row, settings: Settings) -> None:
    """Measures memory in another process. If that is killed, so would this one be."""
    command = [
        *(sys.executable, str(PROGRAM), f"--memory_of={row.variant}"),
        *(f"--models={row.model}", f"--keras={row.keras}", f"--device={settings.device}"),
        *(f"--dtype={settings.dtype}", f"--batch={settings.batch}", f"--width={settings.width}"),
        f"--{'' if settings.xla and not in_use().compiles_always else 'no'}xla",
        *(
            f"--{name}={value}"
            for name, value in (("size", settings.size), ("classes", settings.classes))
            if value is not None
        ),
    ]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode == 0:
        row.peak_bytes = json.loads(run.stdout.splitlines()[-1])
        return
    last = (run.stderr.strip().splitlines() or ["nothing"])[-1].removeprefix("error: ")
    if run.returncode < 0:
        row.failure = f"KILLED by signal {-run.returncode} while its memory was measured"
    elif last == OUT_OF_MEMORY:
        row.failure = OUT_OF_MEMORY
    else:
        row.notes.append(f"memory not measured: {last[:100]}")


def peak_memory(row: Row, settings: Settings) -> int:
    """Bytes at the peak of some steps, above what there was before the model.

    Raises:
        RuntimeError: the system does not count it.
    """
    batch = settings.batch_for(row.model)
    in_use().begin_memory(settings.device)
    on_gpu = settings.device == "GPU"
    give_back_memory()
    before = in_use().gpu_memory("current") if on_gpu else resident("VmRSS")
    step = replace(build(row, settings), start=())  # no copy of the first weights
    give_back_memory()
    if on_gpu:
        in_use().begin_memory(settings.device)
    else:
        forget_peak()
    for _ in range(MEMORY_STEPS):
        float(step(batch))
    in_use().synchronize()
    return (in_use().gpu_memory("peak") if on_gpu else resident("VmHWM")) - before


def time_steps(candidates: Sequence[Candidate], settings: Settings, batch: Batch) -> None:
    """Times what has not failed; every finished round of repeats is in the rows."""
    by_variant = {one.row.variant: one for one in candidates}
    losses: dict[str, Tensor] = {}

    def steps(variant: str, count: int) -> None:
        one = by_variant[variant]
        with guarded(one.row):
            for _ in range(count):
                losses[variant] = one.trainer(batch)
            in_use().synchronize(losses[variant])

    def going(count: int) -> dict[str, Callable[[], None]]:
        left = (variant for variant, one in by_variant.items() if not one.row.failure)
        return {variant: functools.partial(steps, variant, count) for variant in left}

    time_rounds(going(1), repeats=0, warmup=WARMUP)
    before = {variant: by_variant[variant].trainer.updates for variant in going(1)}
    for _ in range(settings.repeats):
        for variant, (seconds,) in time_rounds(going(settings.calls), 1, warmup=0).items():
            by_variant[variant].row.seconds.append(seconds / settings.calls)
    for variant in going(1):
        one, made = by_variant[variant], settings.repeats * settings.calls
        left_out = before[variant] + made - one.trainer.updates
        if left_out:  # it is a shorter step
            one.row.failure = f"THE LOSS SCALE LEFT OUT {left_out} of {made} updates"
        elif not math.isfinite(loss := float(losses[variant])):
            one.row.failure = f"DIVERGED: the loss after the timed steps is {loss}"


def measure(
    rows: Sequence[Row],
    settings: Settings,
    layers: dict[str, ByLayer],
    profile: str | None = None,
    keep: Callable[[], None] = lambda: None,
) -> None:
    """Fills the rows of one network and one Keras; the first is the original.

    Args:
        rows: with nothing but names.
        settings: for all.
        layers: is given what ran by layer, of the variants of which it is known.
        profile: where profiles are kept, if at all.
        keep: called whenever rows have changed.
    """
    first = rows[0]
    name = f"{first.model}, {first.keras}"
    if settings.memory:
        for row in rows:
            progress(f"{name}: memory of {row.variant}")
            note_memory(row, settings)
            keep()
    if all(row.failure for row in rows):
        return
    in_use().kerases[first.keras].backend.clear_session()
    batch = settings.batch_for(first.model)
    candidates: list[Candidate] = []
    for row in rows:
        progress(f"{name}: building {row.variant}")
        if not row.failure:
            with guarded(row):
                candidates.append(prepare(row, settings))
    check(candidates, first, settings, batch, profile)
    layers.update({one.row.variant: one.layers for one in candidates if one.layers})
    keep()
    progress(f"{name}: timing")
    try:
        time_steps(candidates, settings, batch)
    finally:
        keep()

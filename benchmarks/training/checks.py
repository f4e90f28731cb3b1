"""Checks of variants before they are timed: losses at stride 1, and the operations that ran."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.console import progress
from benchmarks.models.training_networks import check_variant
from benchmarks.training import operations
from benchmarks.training.backends import in_use
from benchmarks.training.candidates import Candidate, guarded
from benchmarks.training.rows import Row, Settings
from benchmarks.training.steps import Batch

CHECKED_STEPS = 5
CHANGE = 0.05  # of the loss, by the first of them
# What rounding may change of a loss, as a part of it: in float32 more than in one pass forward,
# since it is passed on from step to step.
TOLERANCES = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2}
OF_ROUNDING = 3  # times what the last place of the images changes
MOST_ROUNDING = 0.1  # of a loss; where rounding may change more, a comparison would say nothing
CALMER = 0.01  # times that learning rate, where steps are timed: no loss runs away meanwhile


def check_losses(
    candidates: Sequence[Candidate], original: Row, settings: Settings, batch: Batch
) -> None:
    """Trains all for some steps; at stride 1, losses must be the original's.

    All are given the learning rate of the original, which comes first, but for what has no
    BatchNormalization, which has its own.
    """
    rate, tolerances = None, None
    for one in candidates:
        with guarded(one.row):
            own = one.trainer.settle(batch, CHANGE)
            shared = rate if one.row.variant != "none" else None
            one.row.learning_rate = shared or own
            one.trainer.set_learning_rate(one.row.learning_rate)
            one.row.losses = one.trainer.losses(batch, CHECKED_STEPS)
            if one.row is original:
                rate, tolerances = own, loss_tolerances(one, settings, batch)
    for one in candidates:
        at_stride_1 = check_variant(one.row.variant)[1] == 1
        if at_stride_1 and tolerances is not None and not one.row.failure:
            compare_losses(one.row, original, tolerances)


def calm(one: Candidate) -> None:
    """Has a variant begin again, with a learning rate at which it may go on for long."""
    one.trainer.restart()
    one.trainer.set_learning_rate(one.row.learning_rate * CALMER)


def loss_tolerances(original: Candidate, settings: Settings, batch: Batch) -> list[float]:
    """Relative tolerance for rounding of each loss, up to the first that would be too large."""
    dtype = settings.compute_dtype
    moved = original.trainer.losses(batch.rounded_otherwise(dtype), CHECKED_STEPS)
    tolerances = []
    for difference in differences(moved, original.row.losses):
        tolerance = max(TOLERANCES[dtype], OF_ROUNDING * difference, *tolerances[-1:])
        if not tolerance <= MOST_ROUNDING:
            break
        tolerances.append(tolerance)
    return tolerances


def compare_losses(row: Row, original: Row, tolerances: Sequence[float]) -> None:
    """Notes how far losses are from the original's, and fails the row if that is too far."""
    count = len(tolerances)
    row.loss_errors = differences(row.losses, original.losses)[:count]
    row.loss_tolerances = list(tolerances)
    for error, tolerance in zip(row.loss_errors, tolerances, strict=True):
        if not error <= tolerance:  # true for NaN
            row.failure = (
                f"WRONG: at stride 1 a loss is {error:.0e} off the original's; rounding explains "
                f"{tolerance:.0e}"
            )
            return
    if count < len(row.losses):
        row.notes.append(
            f"{count} of {len(row.losses)} losses compared: rounding alone moves the others"
        )


def differences(losses: Sequence[float], expected: Sequence[float]) -> list[float]:
    """As parts of what is expected."""
    return [abs(loss / right - 1) for loss, right in zip(losses, expected, strict=True)]


def note_operations(one: Candidate, settings: Settings, batch: Batch, directory: Any) -> None:
    """Notes what runs for each BatchNormalization; profiles are kept in a directory, if any."""
    trainer = one.trainer
    one.layers = in_use().ran_in_step(
        trainer.step, trainer.model, batch, settings.profiled_steps, settings.xla, directory
    )
    layers = one.layers.layers.values()
    one.row.ops = operations.bn_ops_of(one.layers)
    one.row.counts = {
        "forward": operations.counted(op for layer in layers for op in layer.forward),
        "backward": operations.counted(op for layer in layers for op in layer.backward),
    }
    stray = {op.op for op in one.layers.unattributed if "BatchNorm" in op.op}
    if stray:
        one.row.failure = f"{', '.join(sorted(stray))} ran outside all BatchNormalization layers"


def check_operations(row: Row, original: Row) -> str:
    """Fault in the operations that ran for a variant, or ""."""
    mode, stride = check_variant(row.variant)
    if mode == "none":
        return f"RUNS BatchNormalization in {', '.join(row.ops)}" if row.ops else ""
    idle = [name for name, kinds in row.ops.items() if not all(kinds.values())]
    if idle:
        return f"NOTHING RAN forward or backward in {', '.join(idle)}"
    if mode == "original":
        return ""
    if row.ops.keys() != original.ops.keys():
        return f"HAS {len(row.ops)} BatchNormalization layers; the original has {len(original.ops)}"
    if stride != 1 and all(max(used) == 1 for used in row.strides.values()):
        return "EVERY STRIDE IS LOWERED to 1: the images are too small to sample"
    same = [name for name in _to_differ(row, mode) if row.ops[name] == original.ops[name]]
    if same:
        more = f" and {len(same) - 1} more" if len(same) > 1 else ""
        return f"RUNS WHAT THE ORIGINAL RUNS in {same[0]}{more}"
    return ""


def _to_differ(row: Row, mode: str) -> list[str]:
    """The layers in which other operations have to run than in the original."""
    if mode == "strided" and (row.keras == "tf_keras" or in_use().compiles_always):
        # Where all positions are sampled, the fused operation is all there is to run; on JAX, sums.
        return [name for name, used in row.strides.items() if max(used) > 1]
    return list(row.ops)


def check(
    candidates: Sequence[Candidate],
    original: Row,
    settings: Settings,
    batch: Batch,
    profile: str | None = None,
) -> None:
    """Checks losses and operations, and notes in rows what is wrong."""
    progress(f"{original.model}, {original.keras}: checking")
    check_losses(candidates, original, settings, batch)
    for one in candidates:
        names = f"{one.row.model}_{one.row.keras}_{one.row.variant}"
        directory = None if profile is None else str(Path(profile) / names)
        if not one.row.failure:
            with guarded(one.row):
                calm(one)
                note_operations(one, settings, batch, directory)
    for one in candidates:
        if one.row.failure:
            continue
        if original.failure:
            one.row.notes.append("not checked: the original failed")
            continue
        one.row.failure = check_operations(one.row, original)
        if one.row.failure:
            progress(f"  {one.row.variant}: {one.row.failure}")
        elif one.row.ops == original.ops and one.row is not original:
            one.row.notes.append("runs the original's operations, as it should")

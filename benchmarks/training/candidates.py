"""Variants that are measured: models with their optimizers, and what they say of themselves."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.common.console import progress
from benchmarks.common.failures import described
from benchmarks.models.training_networks import NETWORKS, check_variant
from benchmarks.training.backends import in_use
from benchmarks.training.operations import ByLayer, norms_of
from benchmarks.training.rows import Row, Settings
from benchmarks.training.steps import Trainer, trainer


@dataclass
class Candidate:
    """A row with what it is of."""

    row: Row
    trainer: Trainer
    layers: ByLayer | None = None


def build(row: Row, settings: Settings) -> Trainer:
    """The variant of a row, with the same first weights as the others."""
    package = in_use().kerases[row.keras]
    package.utils.set_random_seed(0)
    options: dict[str, Any] = {
        "classes": settings.classes_for(row.model),
        "size": settings.size_for(row.model),
    }
    if row.model == "ResNet9":
        options["width"] = settings.width
    with _policy(package, settings.dtype):
        model = NETWORKS[row.model](package, row.variant, **options)
    return trainer(package, model, xla=settings.xla)


@contextlib.contextmanager
def _policy(package: Any, name: str) -> Iterator[None]:
    """Context manager that sets the dtypes of layers made meanwhile."""
    package.mixed_precision.set_global_policy(name)
    try:
        yield
    finally:
        package.mixed_precision.set_global_policy("float32")


@contextlib.contextmanager
def guarded(row: Row) -> Iterator[None]:
    """Context manager that notes in a row what goes wrong, so that the others go on."""
    try:
        yield
    except Exception as error:
        row.failure = described(error)
        progress(f"  {row.variant}: {row.failure}")


def prepare(row: Row, settings: Settings) -> Candidate:
    """The variant of a row, with what its model says of itself."""
    one = Candidate(row, build(row, settings))
    model = one.trainer.model
    row.parameters = sum(math.prod(variable.shape) for variable in model.trainable_variables)
    stride = check_variant(row.variant)[1] or 1
    asked = [stride, stride]
    for layer in norms_of(model):
        # What should have a stride and has none is taken to do what it should, and shows by what
        # runs for it.
        row.strides[layer.name] = list(getattr(layer, "strides", asked))
    row.lowered = sum(used != asked for used in row.strides.values())
    return one

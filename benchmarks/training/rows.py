"""Results of training steps, a row for each kind of BatchNormalization."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.common.flags import check_known
from benchmarks.models.training_networks import NETWORKS, check_variant
from benchmarks.training.backends import in_use
from benchmarks.training.steps import Batch
from mbn_rewrite.measurement import quartiles

DTYPES = ("float32", "mixed_float16", "mixed_bfloat16")
SIZES = {"ResNet9": 32, "ResNet50": 224}
CLASSES = {"ResNet9": 10, "ResNet50": 1000}


def check_names(
    models: Sequence[str], kerases: Sequence[str], variants: Sequence[str], dtype: str
) -> None:
    """Looks whether there are such.

    Raises:
        ValueError: there are not, or none is given.
        RewriteError: there is no such variant.
    """
    for what, names, known in (
        ("model", models, tuple(NETWORKS)),
        ("Keras", kerases, tuple(in_use().kerases)),
        ("dtype", [dtype], DTYPES),
    ):
        if not names:
            raise ValueError(f"no {what} is given; known are {', '.join(known)}")
        check_known(what, names, known)
    for variant in variants:
        check_variant(variant)


@dataclass(frozen=True)
class Settings:
    """Settings of all rows; see the flags of the same names."""

    dtype: str = "float32"
    xla: bool = False
    batch: int = 32
    size: int | None = None
    width: float = 1.0
    classes: int | None = None
    device: str = "CPU"
    repeats: int = 20
    calls: int = 1
    memory: bool = True
    profiled_steps: int = 10

    def size_for(self, model: str) -> int:
        """Height and width of the images of a network."""
        return self.size or SIZES[model]

    def classes_for(self, model: str) -> int:
        """Classes of the images of a network."""
        return self.classes or CLASSES[model]

    def batch_for(self, model: str) -> Batch:
        """Batch that a network is trained with."""
        return Batch.random(self.batch, self.size_for(model), self.classes_for(model))

    def title_for(self, row: Row) -> str:
        """Title of the rows of a network and a Keras."""
        size = self.size_for(row.model)
        parts = [row.model, row.keras, self.dtype, f"batch {self.batch} of {size}x{size}"]
        return ", ".join(parts + ["XLA"] * self.xla)

    @property
    def compute_dtype(self) -> str:
        """Dtype that the model computes in."""
        return self.dtype.removeprefix("mixed_")


@dataclass
class Row:
    """Results of a variant; what could not be measured is None or empty.

    Attributes:
        model, keras, variant: which.
        failure: what went wrong, or "".
        notes: what a reader should know.
        parameters: how many are trained.
        learning_rate: that of the checked steps.
        losses: theirs.
        loss_errors: their differences from the original's, as parts of it, at stride 1; those of
            later steps are left out where rounding alone may make large ones.
        loss_tolerances: what they may be.
        strides: those in use, by layer.
        lowered: how many layers have less than was asked for.
        ops: kinds of operations by layer, forward and backward, less plain arithmetic.
        counts: how often each ran, in all layers; 0 for what was compiled.
        peak_bytes: of memory.
        seconds: of a step, for each repeat.
    """

    model: str
    keras: str
    variant: str
    failure: str = ""
    notes: list[str] = field(default_factory=list)
    parameters: int | None = None
    learning_rate: float | None = None
    losses: list[float] = field(default_factory=list)
    loss_errors: list[float] = field(default_factory=list)
    loss_tolerances: list[float] = field(default_factory=list)
    strides: dict[str, list[int]] = field(default_factory=dict)
    lowered: int | None = None
    ops: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    peak_bytes: int | None = None
    seconds: list[float] = field(default_factory=list)

    @property
    def measured(self) -> bool:
        """True if it has times that count."""
        return bool(self.seconds) and not self.failure


def as_dict(row: Row, original: Row, settings: Settings) -> dict[str, Any]:
    """A row for JSON, with its images per second, and its time by the original's."""
    speeds = quartiles(images_per_second(row, settings.batch)) if row.measured else None
    return asdict(row) | {
        "size": settings.size_for(row.model),
        "classes": settings.classes_for(row.model),
        "images_per_second": speeds
        and dict(zip(("lower", "median", "upper"), speeds, strict=True)),
        "step_ratio": step_ratio(row, original),
    }


def step_ratio(row: Row, original: Row) -> float | None:
    """Time of a step, relative to that of the original, by medians."""
    if not row.measured or not original.measured:
        return None
    return statistics.median(row.seconds) / statistics.median(original.seconds)


def images_per_second(row: Row, batch: int) -> list[float]:
    """For each repeat."""
    return [batch / seconds for seconds in row.seconds]

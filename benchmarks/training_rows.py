"""Training steps of one network with each kind of BatchNormalization: checked, then timed.

`measure` fills the rows of a network and a Keras, whose first is the original:

    memory      of each variant, in a process of its own
    losses      at stride 1, the original's within rounding
    operations  other ones than the original's where something else is claimed to run
    time        in turn

What fails one of them is not measured further; the others go on.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf
import tf_keras

from benchmarks import profiles
from benchmarks.failures import OUT_OF_MEMORY, described
from benchmarks.memory import forget_peak, resident
from benchmarks.models.training_networks import KERAS, NETWORKS, check_variant
from benchmarks.timing import interleaved, synchronize
from benchmarks.training_steps import Batch, Trainer, trainer
from mbn_rewrite.frontends.execution import give_back_memory
from mbn_rewrite.measurement import quartiles

PACKAGES = {"tf_keras": tf_keras, "keras_3": keras}
DTYPES = ("float32", "mixed_float16", "mixed_bfloat16")
SIZES = {"ResNet9": 32, "ResNet50": 224}
CLASSES = {"ResNet9": 10, "ResNet50": 1000}
PROGRAM = Path(__file__).with_name("train_step.py")

CHECKED_STEPS = 5
CHANGE = 0.05  # of the loss, by the first of them
# What rounding may change of a loss, as a part of it: in float32 more than in one pass forward,
# since it is passed on from step to step.
TOLERANCES = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2}
OF_ROUNDING = 3  # times what the last place of the images changes
MOST_ROUNDING = 0.1  # of a loss; where rounding may change more, a comparison would say nothing
CALMER = 0.01  # times that learning rate, where steps are timed: no loss runs away meanwhile
MEMORY_STEPS = 3
WARMUP = 2


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
        ("Keras", kerases, KERAS),
        ("dtype", [dtype], DTYPES),
    ):
        if not names:
            raise ValueError(f"no {what} is given; known are {', '.join(known)}")
        for name in names:
            if name not in known:
                raise ValueError(f"unknown {what} '{name}'; known are {', '.join(known)}")
    for variant in variants:
        check_variant(variant)


@dataclass(frozen=True)
class Settings:
    """What is the same for all rows; see the flags of the same names."""

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
        """What a network is trained with."""
        return Batch.random(self.batch, self.size_for(model), self.classes_for(model))

    def title_for(self, row: Row) -> str:
        """What all rows of a network and a Keras have in common."""
        size = self.size_for(row.model)
        parts = [row.model, row.keras, self.dtype, f"batch {self.batch} of {size}x{size}"]
        return ", ".join(parts + ["XLA"] * self.xla)

    @property
    def compute_dtype(self) -> str:
        """What the model computes in."""
        return self.dtype.removeprefix("mixed_")


@dataclass
class Row:
    """What is known of a variant; what could not be measured is None or empty.

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
        """Whether it has times that count."""
        return bool(self.seconds) and not self.failure


@dataclass
class Candidate:
    """A row with what it is of."""

    row: Row
    trainer: Trainer
    layers: profiles.ByLayer | None = None


def build(row: Row, settings: Settings) -> Trainer:
    """The variant of a row, with the same first weights as the others."""
    package = PACKAGES[row.keras]
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
    """The dtypes of layers made meanwhile."""
    package.mixed_precision.set_global_policy(name)
    try:
        yield
    finally:
        package.mixed_precision.set_global_policy("float32")


@contextlib.contextmanager
def guarded(row: Row) -> Iterator[None]:
    """Notes in a row what goes wrong, so that the others go on."""
    try:
        yield
    except Exception as error:
        row.failure = described(error)
        progress(f"  {row.variant}: {row.failure}")


# ------------------------------------------------------------------------------- checking


def prepare(row: Row, settings: Settings) -> Candidate:
    """The variant of a row, with what its model says of itself."""
    one = Candidate(row, build(row, settings))
    model = one.trainer.model
    row.parameters = sum(math.prod(variable.shape) for variable in model.trainable_variables)
    stride = check_variant(row.variant)[1] or 1
    asked = [stride, stride]
    for layer in profiles.norms_of(model):
        # What should have a stride and has none is taken to do what it should, and shows by what
        # runs for it.
        row.strides[layer.name] = list(getattr(layer, "strides", asked))
    row.lowered = sum(used != asked for used in row.strides.values())
    return one


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
            one.trainer.optimizer.learning_rate = one.row.learning_rate
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
    one.trainer.optimizer.learning_rate = one.row.learning_rate * CALMER


def loss_tolerances(original: Candidate, settings: Settings, batch: Batch) -> list[float]:
    """What rounding may change of each loss, as a part of it, as long as that is not too much."""
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
    step = one.trainer
    if settings.xla:
        ran = profiles.compiled(step.step, batch.images, batch.labels)
    else:
        ran = profiles.profiled(lambda: step(batch), settings.profiled_steps, directory)
    one.layers = profiles.by_layer(ran, step.model, step.concrete(batch))
    layers = one.layers.layers.values()
    one.row.ops = profiles.bn_ops_of(one.layers)
    one.row.counts = {
        "forward": profiles.counted(op for layer in layers for op in layer.forward),
        "backward": profiles.counted(op for layer in layers for op in layer.backward),
    }
    stray = {op.op for op in one.layers.unattributed if "BatchNorm" in op.op}
    if stray:
        one.row.failure = f"{', '.join(sorted(stray))} ran outside all BatchNormalization layers"


def check_operations(row: Row, original: Row) -> str:
    """What is wrong with the operations that ran for a variant, or ""."""
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
    if mode == "strided" and row.keras == "tf_keras":
        # Where all positions are sampled, the fused operation is all there is to run.
        return [name for name, used in row.strides.items() if max(used) > 1]
    return list(row.ops)


# ------------------------------------------------------------------------ memory and time


def note_memory(row: Row, settings: Settings) -> None:
    """Measures memory in another process. If that is killed, so would this one be."""
    command = [
        *(sys.executable, str(PROGRAM), f"--memory_of={row.variant}"),
        *(f"--models={row.model}", f"--keras={row.keras}", f"--device={settings.device}"),
        *(f"--dtype={settings.dtype}", f"--batch={settings.batch}", f"--width={settings.width}"),
        f"--{'' if settings.xla else 'no'}xla",
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
    tf.function(lambda x: tf.reduce_sum(x * x))(batch.images)  # what TensorFlow sets up once
    on_gpu = settings.device == "GPU"
    give_back_memory()
    before = _gpu_memory("current") if on_gpu else resident("VmRSS")
    step = replace(build(row, settings), start=())  # no copy of the first weights
    give_back_memory()
    if on_gpu:
        tf.config.experimental.reset_memory_stats("GPU:0")
    else:
        forget_peak()
    for _ in range(MEMORY_STEPS):
        float(step(batch))
    synchronize()
    return (_gpu_memory("peak") if on_gpu else resident("VmHWM")) - before


def _gpu_memory(key: str) -> int:
    return int(tf.config.experimental.get_memory_info("GPU:0")[key])


def time_steps(candidates: Sequence[Candidate], settings: Settings, batch: Batch) -> None:
    """Times what has not failed; every finished round of repeats is in the rows."""
    by_variant = {one.row.variant: one for one in candidates}
    losses: dict[str, tf.Tensor] = {}

    def steps(variant: str, count: int) -> None:
        one = by_variant[variant]
        with guarded(one.row):
            for _ in range(count):
                losses[variant] = one.trainer(batch)
            synchronize()

    def going(count: int) -> dict[str, Callable[[], None]]:
        left = (variant for variant, one in by_variant.items() if not one.row.failure)
        return {variant: functools.partial(steps, variant, count) for variant in left}

    interleaved(going(1), repeats=0, warmup=WARMUP)
    before = {variant: by_variant[variant].trainer.updates for variant in going(1)}
    for _ in range(settings.repeats):
        for variant, (seconds,) in interleaved(going(settings.calls), 1, warmup=0).items():
            by_variant[variant].row.seconds.append(seconds / settings.calls)
    for variant in going(1):
        one, made = by_variant[variant], settings.repeats * settings.calls
        left_out = before[variant] + made - one.trainer.updates
        if left_out:  # it is a shorter step
            one.row.failure = f"THE LOSS SCALE LEFT OUT {left_out} of {made} updates"
        elif not math.isfinite(loss := float(losses[variant])):
            one.row.failure = f"DIVERGED: the loss after the timed steps is {loss}"


# ------------------------------------------------------------------------------------- all


def measure(
    rows: Sequence[Row],
    settings: Settings,
    layers: dict[str, profiles.ByLayer],
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
    PACKAGES[first.keras].backend.clear_session()
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
            one.row.notes.append("runs the original's fused operation, as it should")


# ----------------------------------------------------------------------------- what it says


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
    """How many times as long as the original's a step takes, by medians."""
    if not row.measured or not original.measured:
        return None
    return statistics.median(row.seconds) / statistics.median(original.seconds)


def images_per_second(row: Row, batch: int) -> list[float]:
    """For each repeat."""
    return [batch / seconds for seconds in row.seconds]


def progress(what: str) -> None:
    print(what, file=sys.stderr, flush=True)

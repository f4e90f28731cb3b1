#!/usr/bin/env python3
"""Whole training steps of networks, timed in turn, with each kind of BatchNormalization.

    [KERAS_BACKEND=jax] python benchmarks/train_step.py [FLAGS]

A step is forward, loss, backward and update (SGD, Nesterov momentum) of a batch of noise that
lies on the device. KERAS_BACKEND names the backend of Keras: on tensorflow, the default, a step is
one tf.function; on jax one function under jit, which takes and gives all state; on torch it is
what `fit` does, operation by operation. Jax and torch run Keras 3 alone. Variants, for each network
and Keras:

    original    BatchNormalization of that Keras; always there, others are compared with it
    stridedS    StridedBatchNormalization with stride S in its place
    mbnS        ModifiedBatchNormalization with stride S
    none        no BatchNormalization at all: what everything else costs

All variants of a network and a Keras are in one process, with the same first weights, and take
turns. Before they are timed, it is checked what they are:

    losses      with stride 1, those of the first five steps are the original's. What rounding may
                explain is a tolerance of the dtype (1e-3, 1e-2 in float16, 5e-2 in bfloat16), or
                three times what a unit in the last place of the images makes in the original if
                that is more. Where it is more than 10%, steps are not compared, and a note says
                so. The learning rate is one at which a step changes the loss by 5%
    operations  where a layer takes a sample, or a depthwise convolution, or a fused operation
                that the original has not, other operations have run for it than in the original:
                seen by the profiler of TensorFlow or torch; with --xla, and on jax, those that
                were compiled. (With stride 1, tf_keras runs the same fused operation, and jax
                the same kinds of sums: that is expected, and noted)

What fails a check is not timed.

Columns:
    images/s    median of the repeats, and quartiles
    step        median time by that of the original of the same Keras: below 1 is faster
    MiB         peak memory of steps above the state before there was a model, each variant in a
                process of its own: of TensorFlow's allocator on a GPU, else of the process
    parameters  that are trained
    loss        before the first step
    at stride   BatchNormalizations whose stride is not lowered, of all (see strides.py)

"Operations" lists what ran for all BatchNormalizations in a step, less plain arithmetic.

--profile=DIR keeps a profile of each variant for TensorBoard in DIR/MODEL_KERAS_VARIANT, and
writes how long each BatchNormalization takes, forward and backward: as a table, and with all of
their operations as DIR/MODEL_KERAS.json, and as a chart, DIR/MODEL_KERAS.png. The times are those
of operations (kernels on a GPU) alone, and of steps under the profiler; see training/operations.py.
Not with --xla and not on jax, where operations of several layers are fused.

Examples:
    python benchmarks/train_step.py --models=ResNet9 --batch=16 --repeats=10
    python benchmarks/train_step.py --keras=tf_keras --variants=strided4,none --json=steps.json
    python benchmarks/train_step.py --device=GPU --dtype=mixed_float16 --batch=256 --calls=5
    python benchmarks/train_step.py --models=ResNet9 --profile=profiles --chart=steps.png
    KERAS_BACKEND=torch python benchmarks/train_step.py --models=ResNet9 --variants=strided1

Exit codes:
    0  every row was measured, whatever it shows
    1  a row failed a check, ran out of memory or failed otherwise; the program was interrupted
       (what is finished is printed and kept); or a flag is wrong
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# The repository's own package comes first, so that the program runs without installation.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from absl import app, flags

from benchmarks.common import charts, results
from benchmarks.common.console import progress
from benchmarks.common.failures import described
from benchmarks.common.flags import check_no_arguments, check_outputs
from benchmarks.models.training_networks import NETWORKS, check_variant
from benchmarks.training import measuring, profile_tables
from benchmarks.training import rows as training_rows
from benchmarks.training.backends import in_use
from benchmarks.training.operations import ByLayer
from benchmarks.training.rows import CLASSES, DTYPES, SIZES, Row, Settings
from mbn_rewrite.errors import RewriteError
from mbn_rewrite.measurement import quartiles
from mbn_rewrite.tables import table

VARIANTS = ("original", "strided1", "strided2", "strided4", "strided8", "mbn4", "none")
WAYS = ("forward", "backward")

FLAGS = flags.FLAGS
flags.DEFINE_list("models", list(NETWORKS), f"Of {', '.join(NETWORKS)}.")
flags.DEFINE_list("variants", list(VARIANTS), "As above; the original is there anyway.")
flags.DEFINE_list("keras", None, "Of tf_keras, keras_3; by default all that the backend runs.")
flags.DEFINE_string("dtype", "float32", f"Policy of the models: {', '.join(DTYPES)}.")
flags.DEFINE_bool("xla", False, "Compile the whole step with XLA.")
flags.DEFINE_integer("batch", 32, "Images in a batch.", lower_bound=1)
flags.DEFINE_integer("size", None, f"Height and width of images; by default {SIZES}.", 1)
flags.DEFINE_float("width", 1.0, "Times the channels of ResNet9.", lower_bound=0.01)
flags.DEFINE_integer("classes", None, f"Of images; by default {CLASSES}.", lower_bound=2)
flags.DEFINE_string("device", None, "CPU or GPU; by default a GPU if there is one.")
flags.DEFINE_integer("repeats", 20, "How often each is timed.", lower_bound=1)
flags.DEFINE_integer(
    "calls", 1, "Steps in a row that are timed as one; on a GPU, several hide the launch.", 1
)
flags.DEFINE_bool("memory", True, "Measure memory, in processes that take a while to start.")
flags.DEFINE_integer("profiled_steps", 10, "Steps under the profiler.", lower_bound=2)
flags.DEFINE_string("profile", None, "Write profiles to this directory.")
flags.DEFINE_string("json", None, "Write the results to this file, as JSON, as they come.")
flags.DEFINE_string("chart", None, "Draw images per second in this file, as PNG.")
flags.DEFINE_string("memory_of", None, "Used by the program itself.")


# --------------------------------------------------------------------------------- tables


def steps_table(rows: Sequence[Row], settings: Settings) -> str:
    """All that was measured of a network and a Keras."""
    columns = [
        *("variant", "images/s", "quartiles", "step", "MiB", "parameters", "loss", "at stride"),
        "",
    ]
    first = rows[0]
    cells = [_cells(row, first, settings) for row in rows]
    return table(columns, cells, settings.title_for(first), width=140)


def _cells(row: Row, original: Row, settings: Settings) -> list[str]:
    lower = median = upper = None
    if row.measured:
        speeds = training_rows.images_per_second(row, settings.batch)
        lower, median, upper = quartiles(speeds)
    strided = check_variant(row.variant)[1] is not None and row.lowered is not None
    return [
        row.variant,
        _text(median),
        "-" if median is None else f"{_text(lower)} to {_text(upper)}",
        _text(training_rows.step_ratio(row, original)),
        "-" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.0f}",
        "-" if row.parameters is None else f"{row.parameters:,}",
        f"{row.losses[0]:.5g}" if row.losses else "-",
        f"{len(row.strides) - (row.lowered or 0)}/{len(row.strides)}" if strided else "-",
        "; ".join([row.failure, *row.notes] if row.failure else row.notes),
    ]


def _text(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def operations_table(rows: Sequence[Row], settings: Settings) -> str:
    """Table of the operations for all BatchNormalizations of each variant."""
    cells = [
        [row.variant, *(_counts(row.counts.get(way), settings.xla) for way in WAYS)] for row in rows
    ]
    what = "compiled for" if settings.xla else "of a step in"
    title = f"Operations {what} all BatchNormalizations: {rows[0].model}, {rows[0].keras}"
    return table(["variant", *WAYS], cells, title, width=140)


def _counts(counts: Mapping[str, int] | None, xla: bool) -> str:
    if counts is None:
        return "-"
    return ", ".join(op if xla else f"{op} x{n}" for op, n in counts.items()) or "none"


def draw(groups: Sequence[Sequence[Row]], settings: Settings, device: str, path: str) -> None:
    """Images per second by the original's, of all that was measured."""
    panels = {}
    for rows in groups:
        original = rows[0]
        if not original.measured:
            continue
        base = quartiles(training_rows.images_per_second(original, settings.batch))[1]
        panels[f"{original.model}, {original.keras}"] = [
            _bar(row, base, settings) for row in rows if row.measured
        ]
    if not panels:
        progress(f"no chart in {path}: nothing to compare was measured")
        return
    compiled = ", XLA" if settings.xla else ""
    title = f"Training steps, {settings.dtype}, batch {settings.batch}{compiled}\n{device}"
    axis = "images per second by those of the original (median and quartiles of repeats)"
    charts.speeds(panels, axis, title, path)


def _bar(row: Row, base: float, settings: Settings) -> charts.Bar:
    speeds = training_rows.images_per_second(row, settings.batch)
    lower, median, upper = (value / base for value in quartiles(speeds))
    return charts.Bar(row.variant, median, lower, upper)


def write_profiles(
    original: Row, layers: Mapping[str, ByLayer], settings: Settings, device: str
) -> None:
    """Prints, writes and draws how long each BatchNormalization takes."""
    title = f"Milliseconds in a step, forward + backward: {settings.title_for(original)}"
    print(f"\n{profile_tables.layer_table(layers, title)}", flush=True)
    path = Path(FLAGS.profile) / f"{original.model}_{original.keras}"
    variants = {variant: profile_tables.as_dict(one) for variant, one in layers.items()}
    results.save(f"{path}.json", {"device": device, "variants": variants})
    names, times = profile_tables.chart_data(layers)
    if times:
        charts.layers(names, times, f"{settings.title_for(original)}\n{device}", f"{path}.png")


# ----------------------------------------------------------------------------------- flags


def check_flags(arguments: Sequence[str]) -> Settings:
    """Looks at all flags before anything long starts.

    Raises:
        ValueError: one is wrong.
        RewriteError: there is no such variant.
    """
    check_no_arguments(arguments)
    if FLAGS.keras is None:
        FLAGS.keras = list(in_use().kerases)
    training_rows.check_names(FLAGS.models, FLAGS.keras, FLAGS.variants, FLAGS.dtype)
    check_outputs(FLAGS.json, FLAGS.chart)
    in_use().check_settings(FLAGS.xla, FLAGS.profile)
    if FLAGS.profile and Path(FLAGS.profile).exists():
        if not Path(FLAGS.profile).is_dir():
            raise ValueError(f"{FLAGS.profile} is no directory")
        results.check_writable(Path(FLAGS.profile) / "profile")
    elif FLAGS.profile:
        results.check_writable(FLAGS.profile)
    if FLAGS.profile:
        charts.check_available("--profile")
    device = in_use().chosen(FLAGS.device)
    if FLAGS.device is None and device == "CPU":
        progress(f"no GPU: running on CPU {in_use().name_of(device)}")
    names = (
        *("dtype", "batch", "size", "width", "classes"),
        *("repeats", "calls", "memory", "profiled_steps"),
    )
    xla = FLAGS.xla or in_use().compiles_always
    return Settings(device=device, xla=xla, **{name: FLAGS[name].value for name in names})


def main(argv: list[str]) -> int:
    try:
        settings = check_flags(argv[1:])
    except (ValueError, RewriteError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if FLAGS.memory_of:
        return measure_memory(settings)
    return Run(settings, in_use().name_of(settings.device)).run()


def measure_memory(settings: Settings) -> int:
    """Prints the peak memory of one variant."""
    row = Row(FLAGS.models[0], FLAGS.keras[0], FLAGS.memory_of)
    try:
        with in_use().on(settings.device):
            print(measuring.peak_memory(row, settings))
    except Exception as error:
        print(f"error: {described(error)}", file=sys.stderr)
        return 1
    return 0


class Run:
    """All rows, as far as they are."""

    def __init__(self, settings: Settings, device: str) -> None:
        self.settings = settings
        self.device = device
        variants = dict.fromkeys(["original", *FLAGS.variants])
        self.groups = [
            [Row(model, name, variant) for variant in variants]
            for model in dict.fromkeys(FLAGS.models)
            for name in dict.fromkeys(FLAGS.keras)
        ]

    def run(self) -> int:
        """Measures all; the exit code."""
        print(", ".join(f"{key}: {value}" for key, value in self.about().items()))
        interrupted = False
        try:
            for rows in self.groups:
                self.run_group(rows)
        except KeyboardInterrupt:
            interrupted = True
            self.note_interruption()
        self.keep()
        if FLAGS.chart:
            draw(self.groups, self.settings, self.device, FLAGS.chart)
        return int(interrupted or any(row.failure for rows in self.groups for row in rows))

    def run_group(self, rows: Sequence[Row]) -> None:
        """Measures one network and one Keras, and says what it found, however far it came."""
        layers: dict[str, ByLayer] = {}
        try:
            with in_use().on(self.settings.device):
                measuring.measure(rows, self.settings, layers, FLAGS.profile, self.keep)
        except Exception as error:  # a device that is gone, or images that do not fit
            for row in (row for row in rows if not row.failure and not row.measured):
                row.failure = described(error)
        finally:
            print(f"\n{steps_table(rows, self.settings)}")
            print(f"\n{operations_table(rows, self.settings)}", flush=True)
            if FLAGS.profile and layers:
                write_profiles(rows[0], layers, self.settings, self.device)

    def note_interruption(self) -> None:
        """Notes in the rows how far they are."""
        for row in (row for rows in self.groups for row in rows):
            if row.seconds and len(row.seconds) < self.settings.repeats:
                row.notes.append(f"interrupted after {len(row.seconds)} repeats")
            elif not row.seconds and not row.failure:
                row.failure = "INTERRUPTED"
        progress("error: interrupted; what is finished is kept")

    def about(self) -> dict[str, Any]:
        """Settings and versions that all rows have in common."""
        settings = {key: value for key, value in vars(self.settings).items() if value is not None}
        return settings | {
            "device": self.device,
            "backend": in_use().name,
            **in_use().versions(),
        }

    def keep(self) -> None:
        """Writes all rows to the file for them, if there is one."""
        rows = [
            training_rows.as_dict(row, group[0], self.settings)
            for group in self.groups
            for row in group
        ]
        results.keep(FLAGS.json, self.about() | {"rows": rows})


if __name__ == "__main__":
    app.run(main)

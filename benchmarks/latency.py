#!/usr/bin/env python3
"""Latency of models as they were and rewritten, in turn, with a floor.

    python benchmarks/latency.py [FLAGS]

Each network, of each Keras, with typical statistics (see models/networks.py), or any model on disk,
runs as one tf.function (a model on disk: as its served signature). Variants:

    original    the model as it is; always there
    fold, depthwise, auto    rewritten in that mode; auto measures for the batch at hand
    floor       the same network without any BatchNormalization, and nothing in its place: what it
                would cost if BatchNormalization were free. It computes something else. It has no
                biases that folding needs, and those it has not, it need not add. There is none
                for a SavedModel

Before they are timed, the outputs of all variants but the floor are compared with the original's,
called as they are and as they are timed; what is wrong is not timed. In narrow dtypes the tolerance
is that of the dtype, or three times the original's own distance from itself in float32 if that is
more. All variants of a row take turns in one process.

Columns:
    left        BatchNormalizations that are left, as such or as fused operations
    error       the largest difference to the original, relative to the largest output
    ms          median of the repeats, and quartiles; only to compare within a row
    x original  times as fast as the original: the ratio of the medians
    x floor     the floor's median by this one's: 1 is as fast as without BatchNormalization
    paired      behind each of them: the median of the ratios of calls that were made in the same
                turn, with its 95% interval. It scatters less where the machine is not quiet
    form        for auto, what was chosen for what does not fold

Examples:
    python benchmarks/latency.py
    python benchmarks/latency.py --models=MobileNetV2 --batch_sizes=1,8,64 --chart=latency.png
    python benchmarks/latency.py --device=GPU --dtype=mixed_float16 --xla --json=latency.json
    python benchmarks/latency.py --models=path/to/saved_model --variants=original,fold,auto

Exit codes:
    0  every row was measured, whatever it shows
    1  a row gave wrong outputs, ran out of memory or failed otherwise; the program was interrupted
       (what is finished is printed and kept); or a flag is wrong
"""

from __future__ import annotations

import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

# The repository's own package comes first, so that the program runs without installation.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["KERAS_BACKEND"] = "tensorflow"

from absl import app, flags

from mbn_rewrite.cli.quiet import import_tensorflow

import_tensorflow()

import keras
import numpy as np
import tensorflow as tf
import tf_keras

import mbn_rewrite as mbn
from benchmarks import charts, devices, results
from benchmarks.failures import described
from benchmarks.models import networks
from benchmarks.models.floor import without_batch_norm
from benchmarks.peer_tools import made_up, signature_of
from benchmarks.timing import interleaved, median_ratio
from mbn_rewrite.api import convert_with_plan
from mbn_rewrite.comparison import compare_outputs, rounding_tolerance, tolerance_for
from mbn_rewrite.errors import RewriteError
from mbn_rewrite.frontends.execution import runner
from mbn_rewrite.measurement import quartiles, ratio
from mbn_rewrite.options import DEFAULT_BUDGET, RunConfig
from mbn_rewrite.tables import table

MODELS = (
    *("ResNet50", "MobileNetV2", "EfficientNetB0", "InceptionV3", "DenseNet121", "ResNet50V2"),
)
KERAS = {"tf_keras": tf_keras, "keras_3": keras}
MODES = ("fold", "depthwise", "auto")
VARIANTS = ("original", *MODES, "floor")
DTYPES = ("float32", "float16", "bfloat16", "mixed_float16", "mixed_bfloat16")
_MOST_REPEATS = 200

FLAGS = flags.FLAGS
flags.DEFINE_list("models", list(MODELS), "Networks of `applications`, or paths of models on disk.")
flags.DEFINE_list("keras", list(KERAS), "Which Keras the networks are of.")
flags.DEFINE_list("variants", list(VARIANTS), f"Of {', '.join(VARIANTS)}.")
flags.DEFINE_list("batch_sizes", ["1", "8"], "Examples in a call.")
flags.DEFINE_enum("dtype", "float32", list(DTYPES), "The dtype policy that networks are built in.")
flags.DEFINE_bool("xla", False, "Compile by XLA.")
flags.DEFINE_bool("tf32", True, "Let GPUs round float32 factors to 19 bits, as is the default.")
flags.DEFINE_string("device", None, "CPU or GPU. By default a GPU if there is one.")
flags.DEFINE_integer("size", None, "Pixels of images, if not those of the network.", lower_bound=32)
flags.DEFINE_integer("repeats", 30, "Timed calls of each variant, at least.", lower_bound=1)
flags.DEFINE_float(
    "seconds", 4.0, "Short calls are repeated for so long, up to 200 times.", lower_bound=0.0
)
flags.DEFINE_float("budget", DEFAULT_BUDGET, "Seconds for auto to measure, about.", lower_bound=1.0)
flags.DEFINE_string("json", None, "Write the results to this file, row by row.")
flags.DEFINE_string("chart", None, "Draw times as fast as the original to this PNG file.")

Variant = dict[str, Any]  # what a row says of a variant
Calls = dict[str, Callable[[], object]]


# ------------------------------------------------------------------------------- networks


@cache
def wide_network(name: str) -> Any:
    """A network of tf_keras with typical statistics, in float32."""
    model = networks.build(name, 0, FLAGS.size)
    networks.set_statistics(model, networks.typical_statistics, np.random.default_rng(0))
    return model


@cache
def network(name: str, keras_name: str) -> Any:
    """The same, of any Keras, in the dtype policy that was asked for."""
    model = wide_network(name)
    package = KERAS[keras_name]
    if package is tf_keras and FLAGS.dtype == "float32":
        return model
    package.mixed_precision.set_global_policy(FLAGS.dtype)
    try:
        other = networks.build(name, 0, FLAGS.size, package)
    finally:
        package.mixed_precision.set_global_policy("float32")
    other.set_weights(model.get_weights())
    return other


def of_network(model: Any, wide: Any, batch: int) -> tuple[Calls, dict[str, Variant]]:
    """What runs each variant of a network, and what is known of it before it is timed.

    Args:
        model: the network.
        wide: the same in float32.
        batch: how many examples.
    """
    images = networks.random_images(wide, np.random.default_rng(1), batch)
    images = tf.cast(images, tf.as_dtype(model.inputs[0].dtype))
    run_config = RunConfig(batch, FLAGS.xla)
    calls: Calls = {}
    known: dict[str, Variant] = {}
    expected: Any = None
    tolerance = 0.0
    for variant in FLAGS.variants:
        with _failures(known, variant):
            new, facts = _varied(model, variant, run_config)
            known[variant] = facts
            call = runner(lambda data, new=new: new(data, training=False), images, run_config)
            outputs = call()
            if variant in MODES:
                comparison = mbn.verify(model, new, inputs=images, tolerance=tolerance)
                facts["error"] = comparison.max_rel_error
                timed = compare_outputs(expected, outputs, _as_timed(tolerance))
                if not (comparison.ok and timed.ok):
                    facts["note"] = f"WRONG (tolerance {tolerance:.0e})"
            if variant == "original":
                expected, tolerance = outputs, _tolerance(wide, images, outputs)
            if "note" not in facts:
                calls[variant] = call
    return calls, known


def _tolerance(wide: Any, images: Any, outputs: Any) -> float:
    """What rounding may explain.

    In narrow dtypes the original itself is far from what it is in float32, and a rewritten model
    may be as far to another side.
    """
    dtype = FLAGS.dtype.removeprefix("mixed_")
    tolerance = tolerance_for({dtype})
    if dtype == "float32":
        return tolerance
    exact = [wide(tf.cast(images, tf.float32), training=False).numpy()]
    return rounding_tolerance(exact, outputs, tolerance)


def _as_timed(tolerance: float) -> float:
    """The tolerance for what is timed: GPUs may round float32 factors to as few bits as float16."""
    rounded = FLAGS.tf32 and bool(tf.config.get_visible_devices("GPU"))
    return max(tolerance, tolerance_for({"float16"})) if rounded else tolerance


def _varied(model: Any, variant: str, run_config: RunConfig) -> tuple[Any, Variant]:
    if variant == "original":
        return model, {"left": len(mbn.plan(model, "fold").decisions)}
    if variant == "floor":
        return without_batch_norm(model), {"left": 0}
    new, plan = convert_with_plan(model, variant, **_measuring(variant, run_config))
    return new, _planned(plan)


def _measuring(variant: str, run_config: RunConfig) -> dict[str, Any]:
    """What a mode is told of how the model is run."""
    if variant != "auto":
        return {}
    return {
        "batch_size": run_config.batch_size,
        "jit_compile": run_config.jit_compile,
        "budget": FLAGS.budget,
    }


def _planned(plan: Any) -> Variant:
    facts: Variant = {"left": plan.left}
    if plan.mode == "auto":
        facts["form"] = plan.measurement.chosen if plan.measurement else "all folded"
    return facts


# --------------------------------------------------------------------------- models on disk


def on_disk(path: str, batch: int, work: str) -> tuple[Calls, dict[str, Variant]]:
    """As `of_network`, for the served signature of a model on disk."""
    run_config = RunConfig(batch, FLAGS.xla)
    calls: Calls = {}
    known: dict[str, Variant] = {}
    inputs: dict[str, Any] = {}
    for variant in FLAGS.variants:
        if variant == "floor":
            known[variant] = {"note": "no floor of a model on disk"}
            continue
        with _failures(known, variant):
            place, known[variant] = _written(path, variant, f"{work}/{variant}-{batch}", run_config)
            owner = tf.saved_model.load(place)
            serve = signature_of(owner)
            inputs = inputs or _made_up(serve, batch)

            def call(data: Any, owner: Any = owner, serve: Any = serve) -> Any:
                return serve(**data)  # the owner is kept with it: it holds the variables

            run = runner(call, inputs, run_config)
            run()
            calls[variant] = run
    return calls, known


def _written(path: str, variant: str, place: str, run_config: RunConfig) -> tuple[str, Variant]:
    """Where the SavedModel of a variant is, and what is known of it."""
    if variant == "original":
        if Path(path).is_dir():
            return path, {}
        _as_saved_model(path, place)  # a file of Keras, so that all run alike
        return place, {}
    report = mbn.rewrite_saved_model(path, place, variant, **_measuring(variant, run_config))
    errors = (comparison.max_rel_error for comparison in report.comparisons.values())
    return place, _planned(report.plan) | {"error": max(errors, default=None)}


def _as_saved_model(path: str, place: str) -> None:
    from mbn_rewrite.frontends.keras_common.files import package_of

    if package_of(Path(path)) == "keras":
        keras.models.load_model(path, compile=False).export(place, verbose=False)
    else:
        tf_keras.models.load_model(path, compile=False).save(place, save_format="tf")


def _made_up(serve: Any, batch: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    specs = serve.structured_input_signature[1]
    return {name: tf.constant(made_up(spec, batch, rng)) for name, spec in specs.items()}


# ------------------------------------------------------------------------------- the program


@contextmanager
def _failures(known: dict[str, Variant], variant: str) -> Iterator[None]:
    """In which it is noted how a variant fails; the others still run."""
    try:
        yield
    except Exception as error:
        known.setdefault(variant, {})["note"] = described(error)


def measured(calls: Calls, known: dict[str, Variant]) -> None:
    """Times what can be timed; adds the times to what is known."""

    def watched(variant: str, call: Callable[[], object]) -> Callable[[], object]:
        def run() -> None:
            if "note" not in known[variant]:  # what has failed is not called again
                with _failures(known, variant):
                    call()

        return run

    watched_calls = {variant: watched(variant, call) for variant, call in calls.items()}
    seconds = interleaved(watched_calls, _repeats(watched_calls), warmup=5)
    seconds = {v: times for v, times in seconds.items() if "note" not in known[v]}
    for variant, times in seconds.items():
        low, median, high = quartiles([1e3 * second for second in times])
        facts = known[variant]
        facts |= {"ms": median, "quartiles": [low, high], "milliseconds": [1e3 * t for t in times]}
        for base in ("original", "floor"):
            if base in seconds:
                facts[f"x {base}"] = 1 / median_ratio(seconds, variant, base)
                facts[f"paired {base}"] = asdict(ratio(seconds[base], times))


def _repeats(calls: Calls) -> int:
    """How often to time calls of a row: short ones scatter more."""
    start = time.perf_counter()
    for call in calls.values():
        call()
    each = (time.perf_counter() - start) / max(1, len(calls))
    return max(FLAGS.repeats, min(_MOST_REPEATS, math.ceil(FLAGS.seconds / max(each, 1e-6))))


def rows() -> Iterator[dict[str, Any]]:
    """A row for each model, Keras and batch size, as it is measured."""
    sizes = [int(size) for size in FLAGS.batch_sizes]
    for name in FLAGS.models:
        if name not in MODELS and Path(name).exists():
            with tempfile.TemporaryDirectory() as work:
                for batch in sizes:
                    yield _row(name, "", batch, lambda b=batch, n=name: on_disk(n, b, work))
            continue
        for keras_name in FLAGS.keras:
            for batch in sizes:
                yield _row(
                    name,
                    keras_name,
                    batch,
                    lambda b=batch, n=name, k=keras_name: of_network(
                        network(n, k), wide_network(n), b
                    ),
                )
            network.cache_clear()
            wide_network.cache_clear()
            tf_keras.backend.clear_session()
            keras.backend.clear_session()


def _row(
    name: str, keras_name: str, batch: int, made: Callable[[], tuple[Calls, dict[str, Variant]]]
) -> dict[str, Any]:
    print(f"{name} {keras_name}, batch {batch} ...", file=sys.stderr, flush=True)
    dtype = FLAGS.dtype if keras_name else "as saved"
    row = {"model": name, "keras": keras_name, "batch": batch, "dtype": dtype}
    variants: dict[str, Variant] = {}
    with _failures(variants, "original"):
        calls, variants = made()
        measured(calls, variants)
    return row | {"xla": FLAGS.xla, "variants": variants}


def cells(row: dict[str, Any]) -> Iterator[list[str]]:
    """The rows of the table for one row of results."""
    for variant, facts in row["variants"].items():
        error = facts.get("error")
        timed = "ms" in facts
        low, high = facts.get("quartiles", (0, 0))
        yield [
            Path(row["model"]).name,
            row["keras"],
            str(row["batch"]),
            variant,
            str(facts.get("left", "-")),
            "-" if error is None else f"{error:.0e}",
            f"{facts['ms']:.2f}" if timed else "-",
            f"{low:.2f}-{high:.2f}" if timed else "-",
            *_compared(facts, "original"),
            *_compared(facts, "floor"),
            facts.get("note", facts.get("form", "")),
        ]


def _compared(facts: Variant, base: str) -> tuple[str, str]:
    """By the medians, and paired."""
    if f"x {base}" not in facts:
        return "-", "-"
    pairs = facts[f"paired {base}"]
    return (
        f"{facts[f'x {base}']:.2f}",
        f"{pairs['median']:.2f} ({pairs['low']:.2f}-{pairs['high']:.2f})",
    )


def draw(done: list[dict[str, Any]], title: str) -> None:
    """A chart of how many times as fast as the original each variant is."""
    panels = {}
    for row in done:
        original = row["variants"].get("original", {}).get("ms")
        timed = {v: f for v, f in row["variants"].items() if "ms" in f and v != "original"}
        bars = [
            charts.Bar(
                variant,
                original / facts["ms"],
                original / facts["quartiles"][1],
                original / facts["quartiles"][0],
            )
            for variant, facts in timed.items()
            if original
        ]
        if bars:
            name = f"{Path(row['model']).name} {row['keras']}, batch {row['batch']}"
            panels[name] = bars
    if panels:
        charts.speeds(panels, "times as fast as the original", title, FLAGS.chart)


def main(argv: list[str]) -> int:
    try:
        _check(argv[1:])
        device = devices.chosen(FLAGS.device)
    except (ValueError, RewriteError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    tf.config.experimental.enable_tensor_float_32_execution(FLAGS.tf32)
    name = devices.name_of(device)
    if device == "CPU" and FLAGS.device is None:
        print(f"no GPU: running on the CPU, {name}", file=sys.stderr)
    about = {"device": name, "tensorflow": tf.__version__, "keras": keras.__version__}
    done: list[dict[str, Any]] = []
    interrupted = False
    try:
        for row in rows():
            done.append(row)
            if FLAGS.json:
                results.keep(FLAGS.json, about | {"rows": done})
    except KeyboardInterrupt:
        interrupted = True
        print("interrupted: what is finished follows", file=sys.stderr)
    how = f"{FLAGS.dtype}{', XLA' if FLAGS.xla else ''}"
    title = f"Latency on {name}, {how}, TensorFlow {tf.__version__}"
    columns = [
        *("model", "of", "batch", "variant", "left", "error", "ms", "quartiles"),
        *("x original", "paired", "x floor", "paired", "form"),
    ]
    print(table(columns, [line for row in done for line in cells(row)], title, width=200))
    if FLAGS.chart:
        draw(done, title)
    failed = any("note" in f and v != "floor" for r in done for v, f in r["variants"].items())
    return int(interrupted or failed)


def _check(arguments: list[str]) -> None:
    """Raises ValueError for what is not known, before anything long starts."""
    if arguments:
        raise ValueError(f"unknown arguments {arguments}; --help lists the flags")
    for flag, known in (("keras", tuple(KERAS)), ("variants", VARIANTS)):
        unknown = sorted(set(getattr(FLAGS, flag)) - set(known))
        if unknown:
            raise ValueError(f"--{flag}: unknown {unknown}; known are {', '.join(known)}")
    FLAGS.variants = list(dict.fromkeys(["original", *FLAGS.variants]))  # others are compared to it
    for name in FLAGS.models:
        if not Path(name).exists() and not hasattr(tf_keras.applications, name):
            raise ValueError(
                f"--models: '{name}' is no path, and no network; some are {', '.join(MODELS)}"
            )
    for size in FLAGS.batch_sizes:
        if not size.isdigit() or int(size) < 1:
            raise ValueError(f"--batch_sizes: '{size}' is no whole number from 1 up")
    if FLAGS.json:
        results.check_writable(FLAGS.json)
    if FLAGS.chart:
        results.check_writable(FLAGS.chart)
        charts.check_available("--chart")


if __name__ == "__main__":
    app.run(main)

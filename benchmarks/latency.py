#!/usr/bin/env python3
"""Latency of models as they were and rewritten, in turn, with a floor.

    python benchmarks/latency.py [FLAGS]

Each network, of each Keras, with typical statistics (see models/networks.py), or any model on disk,
runs as one tf.function (a model on disk: as its served signature). Variants:

    original    the model as it is; always there
    fold, depthwise, auto    rewritten in that mode; auto measures for the batch at hand
    frozen      folded, with constants in place of variables; not by default
    floor       the same network without any BatchNormalization, and nothing in its place: what it
                would cost if BatchNormalization were free. It computes something else. It
                lacks the biases that folding adds, and so does not spend time adding them. There
                is none for a SavedModel

Before they are timed, the outputs of all variants but the floor are compared with the original's,
called as they are and as they are timed; what is wrong is not timed. In narrow dtypes the tolerance
is that of the dtype, or three times the original's own distance from itself in float32 if that is
more. All variants of a row take turns in one process.

Columns:
    left        BatchNormalizations that are left, as such or as fused operations
    error       the largest difference to the original, relative to the largest output
    ms          median of the calls, and quartiles; only to compare within a row
    x original  times as fast as the original: the median of the ratios of calls that were made in
                the same turn, with its 95% interval, as `mbn-rewrite measure` has it
    x floor     likewise as the floor: 1 is as fast as without BatchNormalization
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

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
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
import tensorflow as tf
import tf_keras

from benchmarks.common import charts, devices, results
from benchmarks.common.console import progress
from benchmarks.common.failures import noted
from benchmarks.common.flags import check_batch_sizes, check_outputs
from benchmarks.common.latencies import latency_table, measured
from benchmarks.models.own_networks import OWN_NETWORKS
from benchmarks.models.variants import (
    FROZEN,
    KERAS,
    MODES,
    Calls,
    Variant,
    network,
    of_network,
    on_disk,
    wide_network,
)
from mbn_rewrite.errors import RewriteError
from mbn_rewrite.options import DEFAULT_BUDGET

MODELS = (
    *("ResNet50", "MobileNetV2", "EfficientNetB0", "InceptionV3", "DenseNet121", "ResNet50V2"),
    *OWN_NETWORKS,
)
_BY_DEFAULT = ("original", *MODES, "floor")
VARIANTS = (*_BY_DEFAULT, FROZEN)
DTYPES = ("float32", "float16", "bfloat16", "mixed_float16", "mixed_bfloat16")

FLAGS = flags.FLAGS
flags.DEFINE_list("models", list(MODELS), "Networks of `applications`, or paths of models on disk.")
flags.DEFINE_list("keras", list(KERAS), "Which Keras the networks are of.")
flags.DEFINE_list("variants", list(_BY_DEFAULT), f"Of {', '.join(VARIANTS)}.")
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


# ------------------------------------------------------------------------------- the program


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
                        network(n, k, FLAGS.dtype, FLAGS.size), wide_network(n, FLAGS.size), b
                    ),
                )
            network.cache_clear()
            wide_network.cache_clear()
            tf_keras.backend.clear_session()
            keras.backend.clear_session()


def _row(
    name: str, keras_name: str, batch: int, made: Callable[[], tuple[Calls, dict[str, Variant]]]
) -> dict[str, Any]:
    progress(f"{name} {keras_name}, batch {batch} ...")
    dtype = FLAGS.dtype if keras_name else "as saved"
    row = {"model": name, "keras": keras_name, "batch": batch, "dtype": dtype}
    variants: dict[str, Variant] = {}
    with noted(variants, "original"):
        calls, variants = made()
        measured(calls, variants, FLAGS.seconds, FLAGS.repeats)
    return row | {"xla": FLAGS.xla, "variants": variants}


def draw(done: list[dict[str, Any]], title: str) -> None:
    """A chart of how many times as fast as the original each variant is."""
    panels = {}
    for row in done:
        bars = [
            charts.Bar(variant, *(facts["x original"][end] for end in ("median", "low", "high")))
            for variant, facts in row["variants"].items()
            if "x original" in facts and variant != "original"
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
        progress(f"error: {error}")
        return 1
    tf.config.experimental.enable_tensor_float_32_execution(FLAGS.tf32)
    name = devices.name_of(device)
    if device == "CPU" and FLAGS.device is None:
        progress(f"no GPU: running on the CPU, {name}")
    about = {"device": name, "tensorflow": tf.__version__, "keras": keras.__version__}
    done: list[dict[str, Any]] = []
    interrupted = False
    try:
        for row in rows():
            done.append(row)
            results.keep(FLAGS.json, about | {"rows": done})
    except KeyboardInterrupt:
        interrupted = True
        progress("interrupted: what is finished follows")
    how = f"{FLAGS.dtype}{', XLA' if FLAGS.xla else ''}"
    title = f"Latency on {name}, {how}, TensorFlow {tf.__version__}"
    print(latency_table(done, title))
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
        known_network = name in OWN_NETWORKS or hasattr(tf_keras.applications, name)
        if not Path(name).exists() and not known_network:
            raise ValueError(
                f"--models: '{name}' is no path, and no network; some are {', '.join(MODELS)}"
            )
    check_batch_sizes(FLAGS.batch_sizes)
    check_outputs(FLAGS.json, FLAGS.chart)


if __name__ == "__main__":
    app.run(main)

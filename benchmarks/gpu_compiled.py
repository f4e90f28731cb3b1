#!/usr/bin/env python3
"""What XLA makes of networks for a GPU that need not be there: compiler output, not a measurement.

    pip install '.[gpu-compiler]'
    python benchmarks/gpu_compiled.py [FLAGS]

TensorFlow lowers each network as for jit_compile=True, and XLA, as JAX's plugin for CUDA brings it,
compiles that for the GPU of --target. Nothing runs: these are counts and sizes in what the compiler
wrote, and its own estimates. The weights are variables, as in TensorFlow, where nothing else is
said. Variants at inference, of each of --models, with typical statistics (see models/networks.py):

    original    the network as it is; always there
    fold, depthwise    rewritten in that mode
    fused, scale_and_shift, border, clip, border_and_clip    forms that mode auto measures where
                something does not fold; there are none where everything does. With
                --statistics=hard half of all gammas are negative, so that less folds
    frozen      folded, with constants in place of variables
    floor       the network without any BatchNormalization; it computes something else

Variants in training, of each of --training: original, stridedS, mbnS and none, as in train_step.py.
A step of a network is forward, loss, backward and update; "blocks" are three convolutions of
56x56x256, each with BatchNormalization and ReLU behind it, forward and backward.

Columns:
    left        BatchNormalizations that are left, as layers
    kernels     that a call starts; one for each call of cuDNN, which may start more
    conv        how many of these are convolutions
    loop        how many are elementwise fusions
    weights     how many compute the same at every call, from weights alone
    MB read, MB written    what kernels must move, if caches keep nothing between them
    MB other    likewise, by all kernels but convolutions and products of matrices
    MB temp     memory for intermediate results
    us other    XLA's estimate for all kernels but convolutions and products, of which it makes
                none. It charges a kernel of two sums twice for what both read, which the kernel
                reads once; so bytes say more of BatchNormalization in training
    x MB, x other, x us    bytes, those of the other kernels, and the estimate, by those of the
                original: below 1 is less

Examples:
    python benchmarks/gpu_compiled.py --json=compiled.json --chart=compiled.png
    python benchmarks/gpu_compiled.py --models=DenseNet121 --statistics=hard --training= \\
        --variants=fold,depthwise,fused,scale_and_shift,border,clip,border_and_clip
    python benchmarks/gpu_compiled.py --models= --training=blocks --dtypes=float32,mixed_bfloat16

Exit codes:
    0  every row was compiled, whatever it shows
    1  a row failed; the program was interrupted (what is finished is printed and kept); or a flag
       is wrong
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
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

from benchmarks.common import charts, results
from benchmarks.common.console import progress
from benchmarks.common.failures import noted
from benchmarks.common.flags import check_known, check_no_arguments, check_outputs
from benchmarks.gpu_compiler import lowered
from benchmarks.gpu_compiler.compiler import Compiler, versions
from benchmarks.gpu_compiler.targets import TARGETS
from benchmarks.models import networks
from benchmarks.models.own_networks import OWN_NETWORKS
from benchmarks.models.training_networks import check_variant
from benchmarks.models.variants import KERAS, network, wide_network
from mbn_rewrite.errors import RewriteError
from mbn_rewrite.tables import table

MODELS = ("ResNet50", "ResNet50V2", "MobileNetV2", "DenseNet121", "EfficientNetB0")
DTYPES = ("float32", "mixed_float16", "mixed_bfloat16")
_TRAINING_VARIANTS = ("original", "strided1", "strided2", "strided4", "strided8", "mbn4", "none")
_BY_DEFAULT = ("original", "fold", "depthwise", lowered.FROZEN)
Row = dict[str, Any]

FLAGS = flags.FLAGS
flags.DEFINE_list("models", list(MODELS), "Networks of `applications`, at inference; may be none.")
flags.DEFINE_list("variants", list(_BY_DEFAULT), f"Of {', '.join(lowered.INFERENCE)}.")
flags.DEFINE_list("batch_sizes", ["8"], "Examples in a call at inference.")
flags.DEFINE_list("training", ["blocks"], f"Of {', '.join(lowered.TRAINING)}; may be none.")
flags.DEFINE_list("training_variants", list(_TRAINING_VARIANTS), "As above.")
flags.DEFINE_integer("training_batch", 64, "Images in a training step.", lower_bound=1)
flags.DEFINE_list("keras", list(KERAS), "Which Keras the networks are of.")
flags.DEFINE_list("dtypes", ["float32"], f"Dtype policies, of {', '.join(DTYPES)}.")
flags.DEFINE_enum("statistics", "typical", list(networks.STATISTICS), "Of BatchNormalizations.")
flags.DEFINE_integer("size", None, "Pixels of images, if not those of the network.", lower_bound=32)
flags.DEFINE_string("target", "h100", f"The GPU: {', '.join(TARGETS)}.")
flags.DEFINE_string("json", None, "Write the results to this file, row by row.")
flags.DEFINE_string("chart", None, "Draw bytes and estimates to this PNG file.")

_LABEL = "compiler output, not a measurement"


# ------------------------------------------------------------------------------- the program


class Rows:
    """Rows, one for each network, Keras, dtype and batch size, as they are compiled."""

    def __init__(self, compiler: Compiler, work: Path) -> None:
        self._compiler = compiler
        self._work = work

    def __iter__(self) -> Iterator[Row]:
        yield from self._inference()
        yield from self._training()

    def _inference(self) -> Iterator[Row]:
        for name in FLAGS.models:
            for keras_name in FLAGS.keras:
                for dtype in FLAGS.dtypes:
                    for batch in map(int, FLAGS.batch_sizes):
                        row = _row("inference", name, keras_name, dtype, batch)

                        def lower(variant: str, row: Row = row) -> lowered.Lowered:
                            how = (row["keras"], row["dtype"], FLAGS.size, FLAGS.statistics)
                            model = network(row["model"], *how)
                            return lowered.inference(model, variant, row["batch"])

                        yield self._filled(row, FLAGS.variants, lower)
                    _forget()
            wide_network.cache_clear()

    def _training(self) -> Iterator[Row]:
        for name in FLAGS.training:
            for keras_name in FLAGS.keras:
                for dtype in FLAGS.dtypes:
                    row = _row("training", name, keras_name, dtype, FLAGS.training_batch)

                    def lower(variant: str, row: Row = row) -> lowered.Lowered:
                        how = (row["keras"], variant, row["dtype"], row["batch"])
                        return lowered.training(row["model"], *how)

                    yield self._filled(row, FLAGS.training_variants, lower)
                    _forget()

    def _filled(
        self, row: Row, variants: list[str], lower: Callable[[str], lowered.Lowered]
    ) -> Row:
        """A row with what is known of each variant."""
        said = f"{row['model']} {row['keras']} {row['dtype']}, {row['task']}, batch {row['batch']}"
        for variant in variants:
            progress(f"{said}: {variant}")
            with noted(row["variants"], variant):
                try:
                    one = lower(variant)
                except lowered.NothingLeft as why:
                    row["variants"][variant] = {"none": str(why)}
                    continue
                made = self._compiler.compile(one.program, one.inputs, self._work / "program")
                row["variants"][variant] = {"left": one.left} | asdict(made)
        return row


def _row(task: str, name: str, keras_name: str, dtype: str, batch: int) -> Row:
    row = {"task": task, "model": name, "keras": keras_name, "dtype": dtype, "batch": batch}
    return row | {"variants": {}}


def _forget() -> None:
    network.cache_clear()
    tf_keras.backend.clear_session()
    keras.backend.clear_session()


# ----------------------------------------------------------------------- tables and charts


def cells(row: Row) -> Iterator[list[str]]:
    """The lines of the table for one row of results."""
    original = row["variants"].get("original", {})
    for variant, facts in row["variants"].items():
        yield [
            row["model"],
            row["keras"],
            row["dtype"],
            str(row["batch"]),
            variant,
            "-" if facts.get("left") is None else str(facts["left"]),
            *(str(facts.get(name, "-")) for name in ("kernels", "convolutions", "loop_fusions")),
            str(facts.get("of_weights", "-")),
            *(_megabytes(facts.get(name)) for name in ("read", "written")),
            *(_megabytes(facts.get(name)) for name in ("elsewhere", "temporary")),
            _microseconds(facts),
            *(_text(compared(facts, original, of)) for of in (moved, elsewhere, estimated)),
            facts.get("note", facts.get("none", "")),
        ]


def moved(facts: Row) -> float:
    """Bytes read and written."""
    return float(facts["read"] + facts["written"])


def elsewhere(facts: Row) -> float:
    """Bytes that all but convolutions and products of matrices read and write."""
    return float(facts["elsewhere"])


def estimated(facts: Row) -> float:
    """XLA's estimate in microseconds."""
    return float(facts["microseconds"])


def compared(facts: Row, original: Row, of: Callable[[Row], float]) -> float | None:
    """A figure by that of the original; None where there is none, or the original has nothing."""
    if "kernels" not in facts or "kernels" not in original or not of(original):
        return None
    return of(facts) / of(original)


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _megabytes(count: float | None) -> str:
    return "-" if count is None else f"{count / 1e6:.0f}"


def _microseconds(facts: Row) -> str:
    if "microseconds" not in facts:
        return "-"
    more = f" + {facts['unestimated']} kernels" if facts["unestimated"] else ""
    return f"{facts['microseconds']:.0f}{more}"


def draw(done: list[Row], title: str) -> None:
    """A chart of bytes and estimates by those of the original."""
    panels = {}
    for row in done:
        original = row["variants"].get("original", {})
        bars = [
            charts.Bar(f"{variant}: {what}", value, value, value)
            for variant, facts in row["variants"].items()
            for what, of in (("all bytes", moved), ("other bytes", elsewhere), ("us", estimated))
            if variant != "original" and (value := compared(facts, original, of)) is not None
        ]
        if bars:
            panels[f"{row['model']} {row['keras']}, {row['dtype']}, batch {row['batch']}"] = bars
    if panels:
        charts.speeds(panels, "by those of the original: below 1 is less", title, FLAGS.chart)


# ------------------------------------------------------------------------------------ flags


def _check(arguments: list[str]) -> None:
    """Raises ValueError or RewriteError for what is not known, before anything long starts."""
    check_no_arguments(arguments)
    check_known("target", [FLAGS.target], tuple(TARGETS))
    check_known("Keras", FLAGS.keras, tuple(KERAS))
    check_known("dtype", FLAGS.dtypes, DTYPES)
    check_known("variant", FLAGS.variants, lowered.INFERENCE)
    check_known("network to train", FLAGS.training, lowered.TRAINING)
    for name in FLAGS.models:
        if name not in OWN_NETWORKS and not hasattr(tf_keras.applications, name):
            raise ValueError(f"unknown network '{name}'; some are {', '.join(MODELS)}")
    for variant in FLAGS.training_variants:
        check_variant(variant)
    for size in FLAGS.batch_sizes:
        if not size.isdigit() or int(size) < 1:
            raise ValueError(f"--batch_sizes: '{size}' is no whole number from 1 up")
    # Others are compared with these.
    FLAGS.variants = list(dict.fromkeys(["original", *FLAGS.variants]))
    FLAGS.training_variants = list(dict.fromkeys(["original", *FLAGS.training_variants]))
    check_outputs(FLAGS.json, FLAGS.chart)


def main(argv: list[str]) -> int:
    try:
        _check(argv[1:])
        version = versions()
    except (ValueError, RewriteError) as error:
        progress(f"error: {error}")
        return 1
    target = TARGETS[FLAGS.target].name
    about = {
        "what": _LABEL,
        "target": target,
        "xla": f"jax-cuda13-plugin {version}",
        "tensorflow": tf.__version__,
        "keras": keras.__version__,
        "statistics": FLAGS.statistics,
    }
    done: list[Row] = []
    interrupted = False
    with tempfile.TemporaryDirectory() as work, Compiler(FLAGS.target) as compiler:
        try:
            for row in Rows(compiler, Path(work)):
                done.append(row)
                results.keep(FLAGS.json, about | {"rows": done})
        except KeyboardInterrupt:
            interrupted = True
            progress("interrupted: what is finished follows")
    title = f"XLA {version} for {target}: {_LABEL}"
    columns = [
        *("model", "of", "dtype", "batch", "variant", "left", "kernels", "conv", "loop"),
        *("weights", "MB read", "MB written", "MB other", "MB temp", "us other"),
        *("x MB", "x other", "x us", ""),
    ]
    print(table(columns, [line for row in done for line in cells(row)], title, width=200))
    if FLAGS.chart:
        draw(done, title)
    failed = any("note" in f for r in done for f in r["variants"].values())
    return int(interrupted or failed)


if __name__ == "__main__":
    app.run(main)

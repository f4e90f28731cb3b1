#!/usr/bin/env python3
"""BatchNormalization layers in training, timed in turn: forward, and forward and backward.

    [KERAS_BACKEND=jax] python benchmarks/layer.py [FLAGS]

Every layer runs with training=True, on the backend of Keras that KERAS_BACKEND names: on
tensorflow, the default, as a concrete tf.function of x and dy; on jax as a function of its state,
x and dy under jit; on torch operation by operation, with autograd. Forward gives y; forward and
backward gives y and the gradients of x and of the trainable weights. Both update the moving
statistics, as a training step does. For each shape of activations there are:

    tf_keras, keras_3 BatchNormalization    those of the two Kerases; not compiled by XLA, that of
                                            tf_keras runs the fused operation. Jax and torch run
                                            Keras 3 alone
    Strided, Modified                       this library's layers, for each of the two
    no BN                                   an identity in their place: what the harness costs

With --xla, which is for tensorflow, all are compiled by XLA, and tf_keras's fused operation is also
timed uncompiled.

Before it is timed, every y, dx, dgamma and dbeta is compared with the formulas in float64, by
the layer's own sample.

Columns:
    strides     (rows, columns) in use: a stride is lowered where a shape is too small for it
    ms          median time of a call
    GB/s        bytes that ideal kernels would move, by that time: 3 passes over x forward and 5
                backward, 2 + q and 4 + q by a sample of the fraction q. Above each table is that
                of a copy in the same run, 2 passes. A tensor that fits the caches beats memory
    x fused     times as fast as tf_keras' fused operation, not compiled; on jax and torch, which
                have none, as Keras's own BatchNormalization, so that it is x own
    x own       times as fast as the BatchNormalization of the same Keras, compiled if this is
    bound       what x fused would be if all kernels were ideal: 8 / (6 + 2q)
    error       the largest error of an output element, by that element's size plus the root mean
                square of its tensor, or what went wrong

"Operations" lists what really ran forward and backward: on tensorflow without XLA, the kernels seen
by its profiler, on torch the operations (on a GPU the kernels) seen by torch.profiler, both less
plain arithmetic and what moves no data (the JSON file has the times of all); with XLA, and on jax,
the instructions of the compiled module. The JSON file also says what the layers themselves say that
they run.

"Summary" is over shapes: geometric means are of those whose strides were not lowered, the worst
of all. None of its figures is enforced.

Examples:
    python benchmarks/layer.py
    python benchmarks/layer.py --shapes=56x56x64,56x56x256 --strides=4,16x1 --keras=tf_keras
    python benchmarks/layer.py --xla --repeats=10 --json=layer.json
    python benchmarks/layer.py --device=GPU --dtype=float16 --batch=256 --calls=10
    KERAS_BACKEND=torch python benchmarks/layer.py --shapes=56x56x64 --strides=1,4

Exit codes:
    0  all outputs are right, whatever the times are
    1  an output is wrong; a layer with a stride runs just what BatchNormalization does; a row ran
       out of memory or failed; or a flag is wrong
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# The repository's own package comes first, so that the tool runs without installation.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from absl import app, flags

from benchmarks.common import results
from benchmarks.common.console import progress
from benchmarks.common.devices import DEVICES
from benchmarks.common.flags import check_known, check_no_arguments, check_outputs
from benchmarks.common.timing import time_rounds
from benchmarks.training.backends import in_use
from benchmarks.training.layer_checks import check, guarded, note_operations
from benchmarks.training.layer_tables import (
    COPY,
    as_row,
    operations_table,
    shape_table,
    summary,
    summary_table,
)
from benchmarks.training.layer_variants import Data, candidate, shape_of, stride_of, variants
from mbn_rewrite.device import processor
from mbn_rewrite.errors import is_out_of_memory

# The activations of ResNet-50 at 224 pixels that are normalised, but for the first.
SHAPES = (
    *("56x56x64", "56x56x256", "28x28x128", "28x28x512"),
    *("14x14x256", "14x14x1024", "7x7x512", "7x7x2048"),
)
STRIDES = ("1", "2", "4", "8", "8x1", "16x1")
DTYPES = ("float32", "float16", "bfloat16")

FLAGS = flags.FLAGS
flags.DEFINE_list("shapes", list(SHAPES), "Of activations, as HEIGHTxWIDTHxCHANNELS.")
flags.DEFINE_integer("batch", 32, "Examples in a batch.", lower_bound=1)
flags.DEFINE_string("dtype", "float32", f"Of x, y and dy: {', '.join(DTYPES)}.")
flags.DEFINE_list("strides", list(STRIDES), "Of the strided layers, such as 4, or 16x1 for rows.")
flags.DEFINE_list("keras", None, "Whose layers: tf_keras, keras_3; all that the backend runs.")
flags.DEFINE_bool("xla", False, "Compile with XLA.")
flags.DEFINE_string("device", None, "CPU or GPU; by default a GPU if there is one.")
flags.DEFINE_integer("repeats", 30, "How often each is timed.", lower_bound=1)
flags.DEFINE_integer(
    "calls", 1, "Calls in a row that are timed as one; on a GPU, several hide the launch.", 1
)
flags.DEFINE_string("json", None, "Write the results to this file, as JSON, after each shape.")


# ------------------------------------------------------------------------------------ time


def measure(shape_text: str) -> list[dict[str, Any]]:
    """The rows of one shape."""
    shape = shape_of(shape_text)
    progress(f"{shape_text}: checking")
    data = Data.of(shape)
    candidates = [candidate(variant, data) for variant in variants()]
    check(candidates, data)
    note_operations(candidates, data)
    progress(f"{shape_text}: timing")
    copy = in_use().copying(FLAGS.xla)
    calls = {COPY: _repeated(lambda: copy(data.x))}
    for one in candidates:
        for name, function in one.functions.items():
            call = _repeated(lambda function=function: function(data.x, data.dy))
            calls[f"{one.variant.label} {name}"] = lambda one=one, call=call: guarded(one, call)
    seconds = time_rounds(calls, FLAGS.repeats)
    return [as_row(one, candidates, shape_text, seconds) for one in candidates]


def _repeated(call: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        for _ in range(FLAGS.calls):
            result = call()
        in_use().synchronize(result)

    return run


# ----------------------------------------------------------------------------------- flags


def check_flags(arguments: Sequence[str]) -> None:
    """Looks at all flags before anything long starts.

    Raises:
        ValueError: one is wrong.
    """
    check_no_arguments(arguments)
    for name, parse in (("shapes", shape_of), ("strides", stride_of)):
        for text in FLAGS[name].value:
            parse(text)
    if not FLAGS.shapes:
        raise ValueError("no shapes; --help has examples")
    check_known("dtype", [FLAGS.dtype], DTYPES)
    check_known("device", [FLAGS.device or "CPU"], DEVICES)
    check_outputs(FLAGS.json)
    kerases = list(in_use().kerases)
    if FLAGS.keras is None:
        FLAGS.keras = kerases
    check_known(f"Keras on {in_use().name}", FLAGS.keras, kerases)
    if FLAGS.xla and in_use().name != "tensorflow":
        raise ValueError(
            f"--xla is for tensorflow, not {in_use().name}: jax compiles anyway, and torch does not"
        )


def chosen_device() -> str:
    """CPU or GPU; without a flag, a GPU if there is one.

    Raises:
        ValueError: a GPU is asked for, and there is none.
    """
    device = in_use().chosen(FLAGS.device)
    if FLAGS.device is None and device == "CPU":
        progress("no GPU: all runs on the CPU")
    return device


def machine(device: str) -> str:
    """Name of the machine that all ran on."""
    return processor() if device == "CPU" else in_use().name_of(device)


def main(argv: list[str]) -> int:
    try:
        check_flags(argv[1:])
        device = chosen_device()
    except ValueError as error:
        progress(f"error: {error}")
        return 1
    options = {name: FLAGS[name].value for name in ("batch", "dtype", "xla", "repeats", "calls")}
    about = {"device": machine(device), "backend": in_use().name} | in_use().versions()
    report = about | options
    print(", ".join(f"{name}: {value}" for name, value in report.items()))
    rows: list[dict[str, Any]] = []
    failed = False
    for shape in FLAGS.shapes:
        try:
            with in_use().on(device):
                measured = measure(shape)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            progress(f"error: {shape}: out of memory; --batch makes it smaller")
            failed = True
            continue
        rows += measured
        print(f"\n{shape_table(measured)}", flush=True)
        results.keep(FLAGS.json, report | {"rows": rows, "summary": summary(rows)})
    if rows:
        print(f"\n{operations_table(rows)}\n\n{summary_table(summary(rows))}")
    return int(failed or any(row["failure"] for row in rows))


if __name__ == "__main__":
    app.run(main)

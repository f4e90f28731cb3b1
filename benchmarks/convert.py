#!/usr/bin/env python3
"""Cost of planning and converting, beside a plain copy of the model.

    python benchmarks/convert.py [FLAGS]

Prints these tables, or those of --tables:

    time      planning and converting ResNet50 and a chain of 400 layers, measured in turn
              with tf_keras.models.clone_model and a copy of the weights; by default converting
              compares the two models, which is a call of its own here. Of DenseNet201, in which
              most values are read more than once, planning alone
    growth    the same for chains of 100 to 800 layers; the exponent is that of the number
              of layers, 1 for time that is linear in it
    memory    the most memory that one call holds beyond what was held before it, its
              result included: the highest of 3 runs, each in a process of its own
              (Linux with glibc only)

Times are medians over --repeats. Machines are noisy: what is over its limit is shown as
NOT OK, and the exit code is 0 all the same.

Examples:
    python benchmarks/convert.py
    python benchmarks/convert.py --repeats=11 --json=convert.json
    python benchmarks/convert.py --tables=time
"""

from __future__ import annotations

import functools
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

# The repository's own package comes first, so that the tool runs without installation.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import tf_keras
from absl import app, flags

import mbn_rewrite as mbn
from benchmarks.common import results
from benchmarks.common.console import progress
from benchmarks.common.flags import check_known, check_usage
from benchmarks.common.memory import forget_peak, resident
from benchmarks.common.timing import time_rounds
from mbn_rewrite.device import give_back_memory
from mbn_rewrite.tables import table

PLAN_SECONDS = {"ResNet50": 0.3, "DenseNet201": 1.0}
CONVERT_PER_CLONE = 2.0  # times clone and copy
COMPARED_PER_CONVERT = 1.5  # times convert fold
GROWTH_BEYOND_CLONE = 0.2  # of the exponent; cloning slows down with the machine, too
PEAK_PER_WEIGHTS = 2.0  # times the bytes of the weights
SIZES = (100, 200, 400, 800)
_CHAIN = 400  # layers of the one that is timed
MEMORY_RUNS = 3

FLAGS = flags.FLAGS
flags.DEFINE_integer("repeats", 5, "How often each call is timed.", lower_bound=1)
flags.DEFINE_string("json", None, "Write the results to this file, as JSON.")


def clone(model: Any) -> Any:
    copy = tf_keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    return copy


CALLS: dict[str, Callable[[Any], Any]] = {
    "plan": mbn.plan,
    "convert fold": lambda model: mbn.convert(model, mode="fold", check=False),
    "convert depthwise": lambda model: mbn.convert(model, mode="depthwise", check=False),
    "convert fold, compared": lambda model: mbn.convert(model, mode="fold"),
    "clone and copy": clone,
}
flags.DEFINE_enum(
    "memory_of", None, list(CALLS), "Measure the memory of this call alone; print it as JSON."
)


# ------------------------------------------------------------------------------- the models


def make_model(layers: int, channels: int = 8) -> Any:
    """A chain of Conv2D, BatchNormalization and ReLU with an Add every ten layers.

    Args:
        layers: how many, without the input; a multiple of 10.
        channels: of every convolution.
    """
    inputs = x = tf_keras.Input((32, 32, channels))
    for _ in range(layers // 10):
        shortcut = x
        for _ in range(3):
            x = tf_keras.layers.Conv2D(channels, 3, padding="same", use_bias=False)(x)
            x = tf_keras.layers.BatchNormalization()(x)
            x = tf_keras.layers.ReLU()(x)
        x = tf_keras.layers.Add()([x, shortcut])
    return with_random_norms(tf_keras.Model(inputs, x))


def application(name: str) -> Any:
    return with_random_norms(getattr(tf_keras.applications, name)(weights=None))


def with_random_norms(model: Any) -> Any:
    """Of vectors, so that no scale is 1 and no shift 0, and 800 layers keep values finite."""
    rng = np.random.default_rng(0)
    for variable in model.weights:
        if len(variable.shape) == 1:
            variable.assign(rng.uniform(0.1, 0.5, variable.shape))
    return model


def weight_bytes(model: Any) -> int:
    return sum(int(np.prod(v.shape)) * v.dtype.size for v in model.weights)


# -------------------------------------------------------------------------------------- time


def median_times(model: Any, names: Iterable[str], repeats: int) -> dict[str, float]:
    """Median seconds of calls, measured in turn."""
    calls = {name: functools.partial(CALLS[name], model) for name in names}
    # What others left behind is not a call's to clear.
    times = time_rounds(calls, repeats, warmup=1, prepare=gc.collect)
    return {name: float(np.median(seconds)) for name, seconds in times.items()}


def time_row(model: str, call: str, times: Mapping[str, float]) -> dict[str, Any]:
    seconds, per_clone = times[call], times[call] / times["clone and copy"]
    row = {"model": model, "call": call, "seconds": seconds, "per_clone": per_clone}
    if call == "plan" and model in PLAN_SECONDS:
        limit = PLAN_SECONDS[model]
        return row | {"limit": f"{limit} s", "ok": seconds < limit}
    if call == "convert fold, compared":
        ok = seconds <= COMPARED_PER_CONVERT * times["convert fold"]
        return row | {"limit": f"{COMPARED_PER_CONVERT:g} x convert fold", "ok": ok}
    if call.startswith("convert"):
        limit = f"{CONVERT_PER_CLONE:g} x clone and copy"
        return row | {"limit": limit, "ok": per_clone <= CONVERT_PER_CLONE}
    return row


def growth_row(
    call: str, seconds: Sequence[float], clone_seconds: Sequence[float]
) -> dict[str, Any]:
    """Growth of the time of a call over SIZES."""
    exponent = float(np.polyfit(np.log(SIZES), np.log(seconds), 1)[0])
    row = {"call": call, "seconds": dict(zip(SIZES, seconds, strict=True)), "exponent": exponent}
    if call == "clone and copy":
        return row
    limit = growth_row("clone and copy", clone_seconds, clone_seconds)["exponent"]
    limit += GROWTH_BEYOND_CLONE
    return row | {"limit": f"exponent {limit:.2f}", "ok": exponent <= limit}


# ------------------------------------------------------------------------------------ memory


def memory_row(call: str) -> dict[str, Any]:
    """The peak memory of one call on ResNet50: the highest of several processes'.

    How much of what is freed the allocator keeps, and so counts, differs from run to run.
    """
    command = [sys.executable, __file__, f"--memory_of={call}"]
    runs = [
        json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
        for _ in range(MEMORY_RUNS)
    ]
    row = {"model": "ResNet50", "call": call} | max(runs, key=lambda run: run["peak"])
    row["per_weights"] = row["peak"] / row["weights"]
    if not call.startswith("convert"):
        return row
    limit = f"{PEAK_PER_WEIGHTS:g} x weights"
    return row | {"limit": limit, "ok": row["per_weights"] <= PEAK_PER_WEIGHTS}


def measure_memory(call: str) -> dict[str, int]:
    """Bytes of the weights, of the call's peak and of what its result holds.

    The peak is the kernel's own record of resident memory, so nothing falls between two
    samples. What earlier work has freed is given back first, or it would hide a part.
    """
    CALLS[call](make_model(20))  # the libraries' own memory
    model = application("ResNet50")
    give_back_memory()
    forget_peak()
    before = resident("VmRSS")
    result = CALLS[call](model)
    peak = resident("VmHWM")
    give_back_memory()
    held = resident("VmRSS")
    del result
    return {"weights": weight_bytes(model), "peak": peak - before, "result": held - before}


# ------------------------------------------------------------------------------- the program


def verdict(row: Mapping[str, Any]) -> list[str]:
    return [row["limit"], "ok" if row["ok"] else "NOT OK"] if "ok" in row else ["", ""]


def print_times(rows: Sequence[Mapping[str, Any]]) -> None:
    cells = [
        [r["model"], r["call"], f"{r['seconds']:.3f}", f"{r['per_clone']:.2f}", *verdict(r)]
        for r in rows
    ]
    print(table(["model", "call", "seconds", "per clone and copy", "limit", "ok"], cells, "Time"))


def print_growth(rows: Sequence[Mapping[str, Any]]) -> None:
    cells = [
        [
            r["call"],
            *(f"{s:.3f} / {1000 * s / n:.2f}" for n, s in r["seconds"].items()),
            *(f"{r['exponent']:.2f}", *verdict(r)),
        ]
        for r in rows
    ]
    columns = ["call", *(f"{n} layers" for n in SIZES), "exponent", "limit", "ok"]
    print(table(columns, cells, "Growth (seconds / milliseconds per layer)", width=125))


def print_memory(rows: Sequence[Mapping[str, Any]]) -> None:
    cells = [
        [
            *(r["model"], r["call"]),
            *(f"{r[key] / 2**20:.0f}" for key in ("weights", "peak", "result")),
            *(f"{r['per_weights']:.2f}", *verdict(r)),
        ]
        for r in rows
    ]
    columns = ["model", "call", "weights", "peak", "result", "peak / weights", "limit", "ok"]
    print(table(columns, cells, "Memory (MiB)"))


TABLES = {"time": print_times, "growth": print_growth, "memory": print_memory}
flags.DEFINE_list("tables", list(TABLES), f"Of {', '.join(TABLES)}.")


def timed(name: str, model: Any, calls: Iterable[str] = tuple(CALLS)) -> dict[str, float]:
    progress(f"timing {name} ...")
    times = median_times(model, calls, FLAGS.repeats)
    tf_keras.backend.clear_session()
    return times


def main(argv: list[str]) -> None:
    check_usage(argv[1:], FLAGS.json)
    try:
        check_known("table", FLAGS.tables, list(TABLES))
    except ValueError as error:
        raise app.UsageError(str(error)) from error
    if FLAGS.memory_of:
        print(json.dumps(measure_memory(FLAGS.memory_of)))
        return
    made: dict[str, list[dict[str, Any]]] = {}
    sizes = SIZES if "growth" in FLAGS.tables else (_CHAIN,) if "time" in FLAGS.tables else ()
    chains = {size: timed(f"{size} layers", make_model(size)) for size in sizes}
    if "time" in FLAGS.tables:
        resnet = timed("ResNet50", application("ResNet50"))
        planned = ("plan", "clone and copy")
        densenet = timed("DenseNet201", application("DenseNet201"), planned)
        made["time"] = [time_row("ResNet50", call, resnet) for call in CALLS]
        made["time"] += [time_row("DenseNet201", call, densenet) for call in planned]
        made["time"] += [time_row(f"{_CHAIN} layers", call, chains[_CHAIN]) for call in CALLS]
    if "growth" in FLAGS.tables:
        seconds = {call: [chains[size][call] for size in SIZES] for call in CALLS}
        copying = seconds["clone and copy"]
        made["growth"] = [growth_row(call, seconds[call], copying) for call in CALLS]
    if "memory" in FLAGS.tables:
        made["memory"] = []
        for call in CALLS:
            progress(f"measuring the memory of {call} ...")
            made["memory"].append(memory_row(call))
    for name, rows in made.items():
        TABLES[name](rows)
    results.keep(FLAGS.json, made)


if __name__ == "__main__":
    app.run(main)

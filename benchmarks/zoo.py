#!/usr/bin/env python3
"""BatchNormalization left in the networks of other packages, most of them of composite layers.

    python benchmarks/zoo.py [FLAGS]

Networks of keras-hub, kimm, keras_cv_attention_models and segmentation_models are built small, with
random weights and BatchNormalization statistics, and converted in mode fold. Packages that are not
installed are skipped (pip install '.[zoo]'). The columns:

    BN          BatchNormalizations of the network
    left        after convert(model, mode="fold")
    saved       likewise of its SavedModel, after rewrite_saved_model (with --saved_model); "-" if
                none can be written
    error       largest difference from the original's outputs, relative to the largest of them
    copies      time of convert without its check, in times of keras.models.clone_model with a copy
                of the weights; "-" where Keras cannot clone the network
    tracing     time of tracing alone, which is part of convert, likewise
    note        the commonest reason of what stays, or what failed

Examples:
    python benchmarks/zoo.py
    python benchmarks/zoo.py --packages=keras_hub --saved_model --json=zoo.json
    python benchmarks/zoo.py --models=HGNetV2,RepVGGA0

Exit codes:
    0  every network that could be built was converted, and gave the original's outputs
    1  one was not, or did not
"""

from __future__ import annotations

import contextlib
import gc
import io
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

# The repository's own package comes first, so that the tool runs without installation.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")
if "tensorflow" not in sys.modules:  # which looks at it once
    os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")  # what keras_cv_attention_models needs

import keras
import numpy as np
import tf_keras
from absl import app, flags

import mbn_rewrite as mbn
from benchmarks.common import results
from benchmarks.common.console import progress
from benchmarks.common.flags import check_known, check_usage
from benchmarks.common.timing import median_ratio, time_rounds
from benchmarks.models.zoos import ZOOS
from mbn_rewrite.errors import RewriteError, cause_of
from mbn_rewrite.frontends.keras_common.tracing import Tracer
from mbn_rewrite.tables import table

TOLERANCE = 1e-3  # of random networks, some of which amplify what rounding leaves
_NORMS = (keras.layers.BatchNormalization, tf_keras.layers.BatchNormalization)

FLAGS = flags.FLAGS
flags.DEFINE_list("packages", list(ZOOS), "Packages whose networks are tried.")
flags.DEFINE_list("models", [], "Networks to try, by name; all by default.")
flags.DEFINE_bool("saved_model", False, "Rewrite each network's SavedModel, too.")
flags.DEFINE_string("json", None, "Write the results to this file, as JSON.")


def set_statistics(model: Any) -> int:
    """Gives BatchNormalizations random statistics, with gamma > 0; returns how many there are."""
    rng = np.random.default_rng(0)
    norms = [layer for layer in model._flatten_layers() if isinstance(layer, _NORMS)]
    for layer in norms:
        if layer.built:
            layer.set_weights([rng.uniform(0.5, 1.5, w.shape) for w in layer.get_weights()])
    return len(norms)


def inputs_of(model: Any) -> Any:
    """Random inputs in the structure in which a model takes them."""
    rng = np.random.default_rng(1)
    given = [
        rng.standard_normal([2, *(size or 64 for size in tuple(t.shape)[1:])]).astype(np.float32)
        for t in model.inputs
    ]
    return given[0] if len(given) == 1 else given


def outputs_of(model: Any, data: Any) -> list[np.ndarray]:
    return [np.asarray(t) for t in keras.tree.flatten(model(data, training=False))]


def in_copies(model: Any) -> dict[str, float]:
    """Times of converting and of the tracing in it, in times of cloning and copying the weights.

    Empty if Keras cannot clone the network.
    """
    package = tf_keras if isinstance(model, tf_keras.Model) else keras

    def clone() -> None:
        package.models.clone_model(model).set_weights(model.get_weights())

    try:
        clone()
    except Exception:  # Keras's and the package's own code may raise anything
        return {}
    traces: list[float] = []  # seconds, one item for each conversion

    def convert() -> None:
        traces.append(0.0)
        mbn.convert(model, mode="fold", check=False)

    trace = Tracer.trace

    def timed(*args: Any) -> Any:
        start = time.perf_counter()
        try:
            return trace(*args)
        finally:
            traces[-1] += time.perf_counter() - start

    with mock.patch.object(Tracer, "trace", timed):
        seconds = time_rounds({"convert": convert, "copy": clone}, 3, 1, prepare=gc.collect)
    seconds["tracing"] = traces[1:]
    return {
        "copies": median_ratio(seconds, "convert", "copy"),
        "tracing": median_ratio(seconds, "tracing", "copy"),
    }


def of_saved_model(model: Any) -> dict[str, Any]:
    """What is left in a network's SavedModel, and how many sums of branches became one layer."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "in", Path(folder) / "out"
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                model.export(str(source))
        except Exception as error:  # Keras's and the package's own code may raise anything
            return {"not exported": cause_of(error)}
        plan = mbn.rewrite_saved_model(source, target, "fold").plan
        return {"saved": plan.left, "merged": len(plan.merged)}


def measured(build: Callable[[], Any]) -> dict[str, Any]:
    """One network's row; "failed" says what went wrong."""
    try:
        model = build()
    except ImportError as error:
        return {"skipped": cause_of(error)}
    except Exception as error:  # the package's own code may raise anything
        return {"skipped": f"cannot be built here: {cause_of(error)}"}
    row: dict[str, Any] = {"norms": set_statistics(model)}
    try:
        plan = mbn.plan(model, mode="fold")
        new = mbn.convert(model, mode="fold", check=False)
        row["left"] = plan.left
        reasons = Counter(d.reason for d in plan.decisions if d.action == "kept")
        row["reasons"] = dict(reasons.most_common(5))
        data = inputs_of(model)
        pairs = zip(outputs_of(model, data), outputs_of(new, data), strict=True)
        row["error"] = max(
            float(np.abs(a - b).max() / max(np.abs(a).max(), 1e-12)) for a, b in pairs
        )
        row |= in_copies(model)
        del new
        if FLAGS.saved_model:
            row |= of_saved_model(model)
    except RewriteError as error:
        row["failed"] = str(error)
    except Exception as error:  # a network that this package did not foresee
        row["failed"] = cause_of(error)
    return row


def is_right(row: dict[str, Any]) -> bool:
    return "skipped" in row or ("failed" not in row and row["error"] <= TOLERANCE)


def cells(package: str, name: str, row: dict[str, Any]) -> list[str]:
    def shown(key: str, form: str) -> str:
        return format(row[key], form) if row.get(key) is not None else "-"

    note = row.get("skipped") or row.get("failed") or next(iter(row.get("reasons", ())), "")
    if not note and "not exported" in row:
        note = f"its SavedModel cannot be written: {row['not exported']}"
    if not is_right(row):
        note = f"WRONG: {note}"
    return [
        package,
        name,
        shown("norms", "d"),
        shown("left", "d"),
        shown("saved", "d"),
        shown("error", ".1e"),
        shown("copies", ".1f"),
        shown("tracing", ".2f"),
        note if len(note) < 120 else f"{note[:117]}...",
    ]


def main(arguments: list[str]) -> int:
    check_usage(arguments[1:], FLAGS.json)
    try:
        check_known("package", FLAGS.packages, list(ZOOS))
        check_known("network", FLAGS.models, [name for zoo in ZOOS.values() for name in zoo])
    except ValueError as error:
        raise app.UsageError(str(error)) from error
    found: dict[str, dict[str, Any]] = {}
    for package in FLAGS.packages:
        for name, build in ZOOS[package].items():
            if not FLAGS.models or name in FLAGS.models:
                progress(f"{package}, {name} ...")
                found.setdefault(package, {})[name] = measured(build)
                results.keep(FLAGS.json, found)
                keras.backend.clear_session()
                tf_keras.backend.clear_session()
    rows = [
        cells(package, name, row) for package, zoo in found.items() for name, row in zoo.items()
    ]
    titles = ["package", "network", "BN", "left", "saved", "error", "copies", "tracing", "note"]
    print(table(titles, rows))
    return int(not all(is_right(row) for zoo in found.values() for row in zoo.values()))


if __name__ == "__main__":
    app.run(main)

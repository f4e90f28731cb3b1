"""What benchmarks/zoo.py says of one network."""

from __future__ import annotations

import contextlib
import gc
import io
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import keras
import numpy as np
import tf_keras

import mbn_rewrite as mbn
from benchmarks.common.timing import median_ratio, time_rounds
from mbn_rewrite.errors import RewriteError, cause_of
from mbn_rewrite.frontends.keras_common.tracing import Tracer

TOLERANCE = 1e-3  # of random networks, some of which amplify what rounding leaves
_NORMS = (keras.layers.BatchNormalization, tf_keras.layers.BatchNormalization)


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


def measured(build: Callable[[], Any], saved_model: bool = False) -> dict[str, Any]:
    """One network's row; "failed" says what went wrong.

    Args:
        build: makes the network.
        saved_model: whether to rewrite its SavedModel, too.
    """
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
        if saved_model:
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

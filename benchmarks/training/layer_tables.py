"""Times of single layers: rows for JSON, tables and a summary for people."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
from absl import flags

from benchmarks.common.timing import median_ratio
from benchmarks.training.layer_variants import Candidate, shape_of
from mbn_rewrite.tables import table
from mbn_rewrite.training import strides

FLAGS = flags.FLAGS  # those of the program, layer.py

COPY = "copy"


def as_row(
    one: Candidate,
    candidates: Sequence[Candidate],
    shape: str,
    seconds: Mapping[str, list[float]],
) -> dict[str, Any]:
    """A row for JSON; what could not be measured is None."""
    fraction = sampled_fraction(one, shape_of(shape))
    row = {
        "shape": shape,
        "label": one.variant.label,
        "keras": one.variant.keras,
        "layer": one.variant.layer,
        "stride": one.variant.stride,
        "compiled": one.variant.compiled,
        "strides": one.strides,
        "lowered": one.lowered,
        "sampled": fraction,
        "bound": None if fraction is None else 8 / (6 + 2 * fraction),
        "error": one.error,
        "failure": one.failure,
        "ops": one.ops,
        "op_milliseconds": one.op_milliseconds,
        "copy_gb_per_second": 2 * _bytes(shape) / _median(seconds[COPY]) / 1e9,
    }
    own = [
        other
        for other in candidates
        if other.variant.layer == "BatchNormalization"
        and (other.variant.keras, other.variant.compiled)
        == (one.variant.keras, one.variant.compiled)
    ]
    for kind, passes in (("forward", (2, 1)), ("both", (6, 2))):
        measured = not one.failure  # what failed was not called
        time = _median(seconds[f"{one.variant.label} {kind}"]) if measured else None
        row[f"{kind}_milliseconds"] = 1e3 * time if time else None
        moved = None if fraction is None else (passes[0] + passes[1] * fraction) * _bytes(shape)
        row[f"{kind}_gb_per_second"] = moved / time / 1e9 if moved and time else None
        for name, bases in (("fused", candidates[:1]), ("own", own)):
            row[f"{kind}_times_{name}"] = _times_as_fast(one, bases, kind, seconds)
    return row


def sampled_fraction(one: Candidate, shape: tuple[int, int, int]) -> float | None:
    """Fraction of the input positions that statistics are taken of."""
    if not one.strides:
        return None
    return strides.positions(one.strides, shape[:2]) / (shape[0] * shape[1])


def _times_as_fast(
    one: Candidate, bases: Sequence[Candidate], kind: str, seconds: Mapping[str, list[float]]
) -> float | None:
    # What is wrong is not fast.
    if not bases or one.failure or bases[0].failure:
        return None
    names = (f"{which.variant.label} {kind}" for which in (one, bases[0]))
    return 1 / median_ratio(seconds, *names)


def _median(seconds: list[float]) -> float:
    return statistics.median(seconds) / FLAGS.calls


def _bytes(shape: str) -> int:
    return FLAGS.batch * math.prod(shape_of(shape)) * (ml_dtypes.finfo(FLAGS.dtype).bits // 8)


def shape_table(rows: Sequence[Mapping[str, Any]]) -> str:
    first = rows[0]
    kinds = ("milliseconds", "gb_per_second", "times_fused", "times_own")
    cells = [
        [
            row["label"],
            ",".join(map(str, row["strides"])) + (" lowered" if row["lowered"] else ""),
            *(_text(row[f"forward_{kind}"]) for kind in kinds),
            *(_text(row[f"both_{kind}"]) for kind in kinds),
            _text(row["bound"]),
            row["failure"] or f"{row['error']:.0e}",
        ]
        for row in rows
    ]
    names = ("ms", "GB/s", "x fused", "x own")
    columns = ["layer", "strides", *names, *names, "bound", "error"]
    title = (
        f"{FLAGS.batch}x{first['shape']} {FLAGS.dtype}: forward, then forward and backward; "
        f"copy {_text(first['copy_gb_per_second'])} GB/s"
    )
    return table(columns, cells, title, width=140)


def operations_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Table of operations, with one row for all shapes where they are the same."""
    shapes: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        ops = ", ".join(f"{op} x{count}" for op, count in row["ops"].items())
        shapes.setdefault((row["label"], ops), []).append(row["shape"])
    all_shapes = len({row["shape"] for row in rows})
    cells = [
        [label, "all" if len(where) == all_shapes else ", ".join(where), ops or "none"]
        for (label, ops), where in sorted(shapes.items(), key=lambda item: _rank(rows, item[0][0]))
    ]
    return table(["layer", "shapes", "ran"], cells, "Operations, forward and backward", width=140)


def _rank(rows: Sequence[Mapping[str, Any]], label: str) -> int:
    return [row["label"] for row in rows].index(label)


def summary(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Means and the worst over shapes, of every layer."""
    labels = dict.fromkeys(row["label"] for row in rows if row["keras"])
    return [_summary_row(label, [r for r in rows if r["label"] == label]) for label in labels]


def _summary_row(label: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    large = [row for row in rows if not row["lowered"]]
    result: dict[str, Any] = {"label": label, "not_lowered": len(large), "shapes": len(rows)}
    for key in (f"{k}_times_{base}" for base in ("fused", "own") for k in ("forward", "both")):
        known = [row[key] for row in rows if row[key]]
        result[f"{key}_mean"] = _geometric_mean([row[key] for row in large if row[key]])
        result[f"{key}_worst"] = min(known, default=None)
    result["bound_mean"] = _geometric_mean([row["bound"] for row in large])
    return result


def summary_table(rows: Sequence[Mapping[str, Any]]) -> str:
    keys = [f"both_times_{base}_{what}" for base in ("fused", "own") for what in ("mean", "worst")]
    keys += ["bound_mean", "forward_times_fused_mean", "forward_times_fused_worst"]
    cells = [
        [row["label"], f"{row['not_lowered']}/{row['shapes']}", *(_text(row[key]) for key in keys)]
        for row in rows
    ]
    columns = [
        *("layer", "not lowered", "x fused", "worst", "x own", "worst", "bound"),
        *("x fused, forward alone", "worst"),
    ]
    return table(columns, cells, "Summary, forward and backward", width=140)


def _geometric_mean(values: Sequence[float]) -> float | None:
    return statistics.geometric_mean(values) if values else None


def _text(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}" if value < 0.1 else f"{value:.2f}"

"""Tables and the chart of `deploy.py`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import charts
from benchmarks.deployment.forms import INT8, tool
from mbn_rewrite.measurement import Ratio
from mbn_rewrite.tables import table


def model_table(model: dict[str, Any]) -> str:
    """The table of one model."""
    columns = [
        *("form", "variant", "BN left", "MUL", "ADD", "nodes", "kB"),
        *("error", "x original", "top-1", "ms", "faster", "note"),
    ]
    rows = [
        [tool(form, "original").name, variant, *_cells(row)]
        for form, variants in model["forms"].items()
        for variant, row in variants.items()
    ]
    title = Path(model["model"]).name
    return table(columns, rows, f"{title}: {model['note']}" if "note" in model else title, 160)


def _cells(row: dict[str, Any]) -> Iterator[str]:
    for key in ("left", "mul", "add", "nodes"):
        yield str(row.get(key, "-"))
    yield f"{row['bytes'] / 1024:.0f}" if "bytes" in row else "-"
    yield f"{row['error']:.1e}" if "error" in row else "-"
    yield f"{row['x original']:.2f}" if "x original" in row else "-"
    agreement = row.get("agreement")
    yield "-" if agreement is None else f"{100 * agreement:.1f}%"
    yield f"{row['ms']:.2f}" if "ms" in row else "-"
    faster = Ratio(**row["faster"]) if "faster" in row else None
    yield f"{faster.median:.2f} ({faster})" if faster else "-"
    yield row.get("note", "WRONG" if row.get("WRONG") else "")


def summary(models: Sequence[dict[str, Any]]) -> str:
    """Errors in int8 of all models: of each variant, and relative to the original's."""
    rows = []
    for model in models:
        for form in (form for form in INT8 if form in model["forms"]):
            variants = model["forms"][form]
            errors = {v: row["error"] for v, row in variants.items() if "error" in row}
            agreements = [row.get("agreement") for row in variants.values()]
            rows.append(
                [
                    Path(model["model"]).name,
                    tool(form, "original").name.removeprefix("LiteRT "),
                    " -> ".join(f"{error:.3f}" for error in errors.values()),
                    " -> ".join(f"{100 * a:.1f}%" for a in agreements if a is not None),
                ]
            )
    variants = " -> ".join(dict.fromkeys(v for m in models for f in m["forms"].values() for v in f))
    columns = ["model", "LiteRT", "error", "top-1"]
    return table(columns, rows, f"in int8: {variants}", width=120)


def draw(models: Sequence[dict[str, Any]], path: str) -> None:
    """A chart of errors in int8, relative to the original's in the same form."""
    panels = {}
    for model in models:
        bars = [
            charts.Bar(
                f"{variant}, per {'tensor' if 'tensor' in form else 'channel'}", *[error] * 3
            )
            for form in INT8
            for variant, row in model["forms"].get(form, {}).items()
            if variant != "original" and (error := row.get("x original")) is not None
        ]
        if bars:
            panels[Path(model["model"]).name] = bars
    if panels:
        axis = "error in int8, of the original's: below 1 is better"
        charts.speeds(panels, axis, "Error of int8 in LiteRT", path)

"""Tables and the chart of `peers.py`."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import charts
from benchmarks.peer_tools.bn_count import Left
from mbn_rewrite.tables import table

# Ours, given to runtimes other than TensorFlow.
OURS_ELSEWHERE = ("ours_onnx", "ours_openvino", "ours_litert")


def notes(row: dict[str, Any], rows: Sequence[dict[str, Any]], one_channel: int = 0) -> list[str]:
    """Notes that a reader of a row should not miss.

    Args:
        row: of one tool.
        rows: all of the same model.
        one_channel: how many BatchNormalizations of it are not counted in every form.
    """
    found = [row["reason"]] if row.get("reason") else []
    if "at_run" not in row:
        return found
    left = Left(**row["at_run"])
    found += [f"{left.depthwise} as 1x1 depthwise"] if left.depthwise else []
    found += [f"{left.within} within other operations"] if left.within else []
    found += [f"{left.unseen} calls not looked into"] if left.unseen else []
    found += ["MORE NODES than the original"] if row["ours"] and _has_more_nodes(row, rows) else []
    if row["ours"] or row["tool"] == "original" or row["status"] != "ok":
        return found
    ours = [other for other in rows if other["ours"] and other["status"] == "ok"]
    found += _faster(row, [other for other in ours if other.get("milliseconds")])
    fewest = min((Left(**other["at_run"]).operations for other in ours), default=0)
    if left.operations + one_channel < fewest:
        found.append("FEWER LEFT than ours")
    return found


def beside(key: str, keys: Collection[str]) -> str:
    """The tool that gives the original to the runtime that a tool of ours runs in."""
    other = key.removeprefix("ours_")
    return other if other in keys else "original"


def _has_more_nodes(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> bool:
    """Whether what a row of ours runs has more nodes than what the same runtime has without us."""
    nodes = {other["tool"]: other["nodes"] for other in rows if "nodes" in other}
    there = nodes.get(beside(row["tool"], [other["tool"] for other in rows]))
    return there is not None and nodes.get(row["tool"], 0) > there


def _faster(row: dict[str, Any], ours: Sequence[dict[str, Any]]) -> list[str]:
    """Note that a row is faster than ours, if it is, and than which of them."""
    if "milliseconds" not in row or not ours:
        return []
    groups = {
        "ours": ours,
        "ours in TensorFlow": [o for o in ours if o["tool"] not in OURS_ELSEWHERE],
    }
    for name, group in groups.items():
        if not group:
            continue
        best = min((o["milliseconds"] for o in group), key=lambda ms: ms["median"])
        if row["milliseconds"]["median"] < best["median"]:
            apart = row["milliseconds"]["upper"] < best["lower"]
            return [f"FASTER than {name}" + ("" if apart else ", within scatter")]
    return []


def as_cells(row: dict[str, Any], model: dict[str, Any], name: str) -> list[str]:
    """A row of a model's table as text."""
    ms, error = row.get("milliseconds"), row.get("error")
    counts = [str(Left(**row[key]).total) if key in row else "-" for key in ("in_file", "at_run")]
    timed = f"{ms['median']:.2f} ({ms['lower']:.2f}-{ms['upper']:.2f})" if ms else "-"
    return [
        name,
        *counts,
        str(row.get("nodes", "-")),
        "-" if error is None else f"{float(error):.0e}" if float(error) else "0",
        timed if row["status"] == "ok" else row["status"],
        f"{row['times_as_fast']:.2f}" if row.get("times_as_fast") else "-",
        "; ".join(notes(row, model["rows"], model.get("one_channel", 0))),
    ]


def title_of(model: dict[str, Any]) -> str:
    """A model's name, and who wrote it."""
    return f"{Path(model['model']).name}, {model['keras']}"


def model_table(model: dict[str, Any], names: Mapping[str, str]) -> str:
    """The table of one model."""
    title = f"{title_of(model)}: {model['norms']} BatchNormalization, fewest possible "
    title += str(model["fewest"])
    if model.get("others"):
        title += f" ({model['others']} other per-channel scalings are not counted)"
    if model.get("one_channel"):
        title += f" ({model['one_channel']} of one channel, counted only as fused operation)"
    columns = ["tool", "in file", "BN left", "nodes", "error", "ms", "times as fast", "note"]
    cells = (as_cells(row, model, names[row["tool"]]) for row in model["rows"])
    return table(columns, cells, title, width=140)


def summary_table(models: Sequence[dict[str, Any]], names: Mapping[str, str]) -> str:
    """All models: times as fast, with what is left in brackets."""

    def cell(model: dict[str, Any], key: str) -> str:
        row = next((r for r in model["rows"] if r["tool"] == key), None)
        if row is None or row["status"] != "ok":
            return row["status"] if row else "-"
        left = Left(**row["at_run"])
        forms = [str(left.total)]
        forms += [f"{left.depthwise}d"] if left.depthwise else []
        forms += [f"{left.within}w"] if left.within else []
        speed = f"{row['times_as_fast']:.2f}" if row.get("times_as_fast") else "-"
        return f"{speed} ({' + '.join(forms)})"

    rows = [
        [title_of(model), str(model["fewest"]), *(cell(model, key) for key in names)]
        for model in models
    ]
    title = (
        "times as fast as the original (BN left; d: as 1x1 depthwise, w: within other operations)"
    )
    return table(["model", "fewest", *names], rows, title, width=180)


def nodes_table(models: Sequence[dict[str, Any]], names: Mapping[str, str]) -> str:
    """Nodes in what runs, of all models: for each tool of ours the original's, then ours."""

    def cell(model: dict[str, Any], key: str) -> str:
        nodes = {row["tool"]: str(row.get("nodes", "-")) for row in model["rows"]}
        return f"{nodes.get(beside(key, names), '-')} -> {nodes.get(key, '-')}"

    ours = [key for key in names if key.startswith("ours_")]
    rows = [[title_of(model), *(cell(model, key) for key in ours)] for model in models]
    title = "nodes in what runs: the original in the same runtime -> ours"
    return table(["model", *(names[key] for key in ours)], rows, title, width=140)


def draw(models: Sequence[dict[str, Any]], names: Mapping[str, str], path: str) -> None:
    """A chart: for each model a group of bars, one for each tool."""
    keys = [key for key in names if key != "original"]
    height = 0.8 / len(keys)
    figure = charts.figure_of(9, 1.2 + len(models) * (0.3 + 0.18 * len(keys)))
    axes = figure.subplots()
    for i, key in enumerate(keys):
        places = [m - 0.4 + height * (i + 0.5) for m in range(len(models))]
        found = [next((r for r in m["rows"] if r["tool"] == key), {}) for m in models]
        widths = [row.get("times_as_fast") or 0 for row in found]
        axes.barh(places, widths, 0.9 * height, label=names[key], color=f"C{i}")
        for place, width, row in zip(places, widths, found, strict=True):
            text = f" {width:.2f}" if width else f" {row.get('status', '')}"
            axes.text(width, place, text, va="center", fontsize=7)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(models)), [title_of(model) for model in models])
    axes.invert_yaxis()
    axes.margins(x=0.08, y=0.01)
    axes.set_xlabel("times as fast as the original in TensorFlow (line at 1)")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.legend(loc="outside upper center", ncols=3, fontsize=8, frameon=False)
    charts.save(figure, path)


def heading(data: Mapping[str, Any]) -> str:
    """Machine, settings and packages of the measurement."""
    machine, settings = data["device"], data["settings"]
    features = ", ".join(machine["features"]) or "no AVX-512"
    packages = ", ".join(f"{name} {version}" for name, version in data["versions"].items())
    return (
        f"{machine['processor']} ({features}), {settings['threads']} threads of "
        f"{machine['cores']} cores, batch {settings['batch']}, {settings['repeats']} calls each\n"
        f"{packages}"
    )

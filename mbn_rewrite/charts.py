"""Charts as PNG files. They need matplotlib, which nothing else needs."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mbn_rewrite.errors import RewriteError, cause_of

_SHOWN = ("p50", "p90", "p99")


def check_matplotlib(what: str, brought_by: str = "pip install matplotlib") -> None:
    """Looks for matplotlib, without loading it.

    Args:
        what: needs it.
        brought_by: how to get it.

    Raises:
        RewriteError: it is not there.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise RewriteError(f"{what} needs matplotlib: {brought_by}")


def check(path: str | None) -> None:
    """Finds what is wrong with the path of a chart, without loading matplotlib.

    Raises:
        RewriteError: it cannot be written, or matplotlib is not there.
    """
    if path is None:
        return
    place = Path(path)
    if place.suffix != ".png" or place.is_dir():
        raise RewriteError(f"a chart is a .png file, not {path!r}")
    if not place.absolute().parent.is_dir():
        raise RewriteError(f"there is no directory for the chart {path}")
    check_matplotlib("a chart")


def draw_latencies(report: Mapping[str, Any], path: str) -> None:
    """Draws percentiles of latencies as bars.

    Args:
        report: what `Latencies.to_dict` gives.
        path: of the PNG file.

    Raises:
        RewriteError: it cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    models = report["models"]
    figure = Figure(figsize=(8, 1.5 + 0.8 * len(models)), layout="constrained")
    axes = figure.subplots()
    known = [p for p in _SHOWN if any(p in model["percentiles"] for model in models)]
    for i, percentile in enumerate(known):
        values = [model["percentiles"].get(percentile, 0.0) for model in models]
        places = [number + 0.27 * (i - 1) for number in range(len(models))]
        bars = axes.barh(places, values, height=0.25, label=percentile)
        axes.bar_label(bars, [f"{value:.2f}" if value else "" for value in values], padding=3)
    axes.set_yticks(range(len(models)), [model["model"] for model in models])
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("milliseconds")
    figure.legend(loc="outside right upper")
    figure.suptitle(f"Latency on {report['device']}, batch {report['batch_size']}", fontsize=11)
    FigureCanvasAgg(figure)
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise RewriteError(f"the chart cannot be written: {cause_of(error)}") from error

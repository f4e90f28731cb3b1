"""Charts of benchmarks, as PNG files. Needs matplotlib, which only charts need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mbn_rewrite.charts import check_matplotlib
from mbn_rewrite.errors import RewriteError

_DOWN, _ACROSS = 6, 4  # panels: one column of so many, then another, up to so many


@dataclass(frozen=True)
class Bar:
    """One bar: a value, and the ends of its interval."""

    label: str
    value: float
    lower: float
    upper: float


def check_available(what: str) -> None:
    """Looks for matplotlib, without loading it.

    Raises:
        ValueError: it is not there.
    """
    try:
        check_matplotlib(what, "pip install '.[benchmarks]'")
    except RewriteError as error:
        raise ValueError(str(error)) from None


def speeds(panels: Mapping[str, Sequence[Bar]], axis: str, title: str, path: str | Path) -> None:
    """Horizontal bars with their intervals, one panel for each group; a line at 1.

    Many panels stand beside each other.
    """
    across = min(_ACROSS, -(-len(panels) // _DOWN))
    down = -(-len(panels) // across)
    most = max(map(len, panels.values()))
    figure = figure_of(3 + 5 * across, 1.2 + down * (0.5 + 0.28 * most))
    axes = figure.subplots(down, across, sharex=True, squeeze=False)
    for one in axes.flat[len(panels) :]:
        one.set_visible(False)
    for one, (name, bars) in zip(axes.flat, panels.items(), strict=False):
        values = [bar.value for bar in bars]
        spread = [
            [bar.value - bar.lower for bar in bars],
            [bar.upper - bar.value for bar in bars],
        ]
        one.barh([bar.label for bar in bars], values, xerr=spread, capsize=3, color="tab:blue")
        # Beyond the spread, which would run through it.
        for i, bar in enumerate(bars):
            one.annotate(
                f"{bar.value:.2f}",
                (max(bar.value, bar.upper), i),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
        one.axvline(1, color="black", linewidth=0.8)
        one.invert_yaxis()
        one.margins(x=0.12)
        one.set_title(name, fontsize=10, loc="left")
    figure.supxlabel(axis, fontsize=10)
    figure.suptitle(title, fontsize=11)
    save(figure, path)


def layers(
    names: Sequence[str],
    variants: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    title: str,
    path: str | Path,
) -> None:
    """Bars of milliseconds for each layer and variant: forward above, backward below.

    Args:
        names: of the layers, in the order of the network.
        variants: for each, milliseconds of every layer forward, and backward.
        title: above the chart.
        path: of the PNG file.
    """
    width = max(9.0, 1.5 + 0.05 * len(names) * (len(variants) + 2))
    figure = figure_of(width, 7)
    axes = figure.subplots(2, 1, sharex=True)
    bar = 0.85 / max(1, len(variants))
    for one, direction, label in zip(axes, (0, 1), ("forward", "backward"), strict=True):
        for i, (variant, times) in enumerate(variants.items()):
            places = [k + (i - (len(variants) - 1) / 2) * bar for k in range(len(names))]
            one.bar(places, times[direction], bar, label=variant, color=f"C{i}")
        one.set_ylabel(f"{label} (ms in a step)")
        one.grid(axis="y", linewidth=0.4)
        one.set_axisbelow(True)
        one.margins(x=0.01)
    # Above the bars, which may be high anywhere.
    axes[0].legend(
        ncols=len(variants), fontsize=8, loc="lower right", bbox_to_anchor=(1, 1), frameon=False
    )
    axes[1].set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=8)
    axes[1].set_xlabel("BatchNormalization layers, in the order of the network")
    figure.suptitle(title, fontsize=11)
    save(figure, path)


def figure_of(width: float, height: float) -> Any:
    """An empty figure of so many inches, which needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure((width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Any, path: str | Path) -> None:
    """Writes a PNG file. The same picture is the same file: no version is in it."""
    figure.savefig(path, dpi=110, metadata={"Software": None})

"""Pictures of a study, as PNG files. matplotlib is loaded by the first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import charts
from study.errors import StudyError
from study.statistics import Comparison

# Records of one variant, by seed.
Runs = Mapping[int, Mapping[str, Any]]
STATISTICS = ("mu", "sigma", "beta", "gamma")


def _figure(rows: int, columns: int, size: tuple[float, float]) -> Any:
    try:
        figure = charts.figure_of(*size)
    except ImportError as error:
        raise StudyError("charts need matplotlib: pip install '.[study]' brings it") from error
    return figure, figure.subplots(rows, columns, squeeze=False)


def _save(figure: Any, path: Path) -> str:
    charts.save(figure, path)
    return path.name


def accuracy(runs: Mapping[str, Runs], path: Path) -> str:
    """Test accuracy by epoch: the mean of each variant, and its worst and best run."""
    figure, ((axes,),) = _figure(1, 1, (8, 4.5))
    for variant, of_variant in runs.items():
        values = 100 * np.array(
            [[e["test_accuracy"] for e in record["epochs"]] for record in of_variant.values()]
        )
        epochs = np.arange(1, values.shape[1] + 1)
        (line,) = axes.plot(epochs, values.mean(0), marker=".", label=variant)
        axes.fill_between(
            epochs, values.min(0), values.max(0), color=line.get_color(), alpha=0.12, linewidth=0
        )
    axes.set(xlabel="epoch", ylabel="test accuracy, %", title="Accuracy: mean, worst and best run")
    axes.legend()
    axes.grid(alpha=0.3)
    return _save(figure, path)


def differences(
    values: Mapping[str, Sequence[float]],
    compared: Mapping[str, Comparison],
    what: str,
    path: Path,
) -> str:
    """Paired differences: each pair, the mean with its interval, and the margin."""
    figure, ((axes,),) = _figure(1, 1, (8, 1.4 + 0.6 * len(values)))
    for i, (variant, of_variant) in enumerate(values.items()):
        comparison = compared[variant]
        axes.plot(of_variant, [i] * len(of_variant), "|", color="0.6", markersize=12)
        if comparison.interval:
            axes.plot(comparison.interval, [i, i], color="C0", linewidth=1)
            axes.plot(comparison.inner, [i, i], color="C0", linewidth=4, solid_capstyle="butt")
        axes.plot(comparison.mean, i, "o", color="C0")
    margin = next(iter(compared.values())).margin
    axes.axvspan(-margin, margin, color="C2", alpha=0.12, linewidth=0)
    axes.axvline(0, color="0.3", linewidth=0.8)
    axes.set_yticks(range(len(values)), list(values))
    axes.set_ylim(len(values) - 0.5, -0.5)
    axes.set(
        xlabel=what,
        title="Pairs (grey); mean, 90% (thick) and 95% interval (blue); margin (green)",
    )
    return _save(figure, path)


def norms(runs: Mapping[str, Runs], place: str, layer: str, path: Path) -> str:
    """mu, sigma, beta and gamma of one layer by epoch: mean over runs and channels, and spread."""
    figure, axes = _figure(2, 2, (9, 6))
    for name, one in zip(STATISTICS, axes.flat, strict=True):
        for variant, of_variant in runs.items():
            # Of each run and epoch: the mean over channels, and two quantiles.
            values = np.array(
                [[e["norms"][place][name] for e in r["epochs"]] for r in of_variant.values()]
            ).mean(0)
            epochs = np.arange(1, len(values) + 1)
            (line,) = one.plot(epochs, values[:, 0], marker=".", label=variant)
            for quantile in (1, 2):
                one.plot(epochs, values[:, quantile], ":", color=line.get_color(), linewidth=0.9)
        one.set(title=rf"$\{name}$", xlabel="epoch")
        one.grid(alpha=0.3)
    axes[0, 0].legend(fontsize="small")
    figure.suptitle(f"{layer}, the {place}: mean over channels; dotted, 10% and 90% of channels")
    return _save(figure, path)


def layer_times(
    times: Mapping[str, Mapping[str, Mapping[str, float]]],
    labels: Mapping[str, Sequence[str]],
    path: Path,
) -> str:
    """Time of each layer in a step, forward and backward, by variant.

    Args:
        times: milliseconds by variant, layer and direction.
        labels: what stands over each bar of a variant: the strides in use.
        path: the file to write.
    """
    figure, axes = _figure(2, 1, (11, 7))
    layers = list(next(iter(times.values())))
    width = 0.8 / len(times)
    for direction, one in zip(("forward", "backward"), axes[:, 0], strict=True):
        for i, (variant, of_variant) in enumerate(times.items()):
            places = np.arange(len(layers)) + (i - (len(times) - 1) / 2) * width
            heights = [of_variant.get(layer, {}).get(direction, 0.0) for layer in layers]
            bars = one.bar(places, heights, width, label=variant)
            if len(layers) <= 12:
                one.bar_label(bars, labels[variant], fontsize=6, rotation=90, padding=2)
        one.set_xticks(range(len(layers)), layers, rotation=90 if len(layers) > 12 else 0)
        one.set(ylabel="ms", title=f"BatchNormalization, {direction}; above bars, strides in use")
        one.margins(y=0.2)
    axes[0, 0].legend()
    return _save(figure, path)

"""The page: what was run, what ran, what came out, and what was not run."""

from __future__ import annotations

import statistics as plain
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common.results import write_whole
from study import charts
from study.errors import StudyError
from study.left_out import left_out
from study.markdown import (
    comparison_table,
    picture_of,
    power_text,
    signed,
    spread_table,
    strides_text,
    table,
)
from study.pairs import (
    ORIGINAL,
    Runs,
    accuracy,
    check,
    devices_of,
    on_device,
    paired,
    seconds_per_epoch,
)
from study.results import Results
from study.statistics import Comparison, compare_all

PAGE = "report.md"
_LAUNCHING = " On a GPU these are times of launching, not of computing."
_CHANCE = 1.2  # times the accuracy of guessing: below it, nothing was learnt


def write(results: Results, margin: float, time_margin: float) -> Path:
    """Writes the page and its charts into the directory of the results.

    Args:
        results: finished runs.
        margin: of accuracy, in percentage points.
        time_margin: of the time of an epoch, in percent.

    Raises:
        StudyError: nothing can be compared, or what is there is no result.
    """
    if not margin or not time_margin:
        raise StudyError(
            "a margin of 0 can never be shown; give --margin and --time_margin above 0"
        )
    finished = results.finished()
    runs = paired(finished)
    check(runs)
    page = Page(results.configuration, runs, margin, time_margin, results.directory)
    page.alone = [f"{v}, seed {seed}" for v, seed in finished if seed not in runs.get(v, {})]
    path = results.directory / PAGE
    write_whole(path, page.text())
    return path


class Page:
    """The text, part by part."""

    def __init__(
        self,
        configuration: Mapping[str, Any],
        runs: Runs,
        margin: float,
        time_margin: float,
        directory: Path,
    ) -> None:
        self.configuration, self.runs, self.directory = configuration, runs, directory
        self.devices = devices_of(runs)
        self.device = next(iter(self.devices))  # whose times are reported
        self.timed = on_device(runs, self.device)
        originals = runs[ORIGINAL]
        self.variants = [variant for variant in runs if variant != ORIGINAL]
        self.accuracies = {
            v: [accuracy(r) - accuracy(originals[seed]) for seed, r in runs[v].items()]
            for v in self.variants
        }
        self.times = {
            v: [
                100 * (seconds_per_epoch(r) / seconds_per_epoch(originals[seed]) - 1)
                for seed, r in of_variant.items()
            ]
            for v, of_variant in self.timed.items()
            if v != ORIGINAL
        }
        self.compared = compare_all(self.accuracies, margin)
        self.compared_times = compare_all(self.times, time_margin)
        self.margin, self.time_margin = margin, time_margin
        self.alone: list[str] = []  # runs that are in no pair

    def text(self) -> str:
        """All of it; the charts are written."""
        parts = [
            self._head(),
            self._accuracy(),
            self._time(),
            self._proof(),
            self._layers(),
            self._norms(),
            self._run(),
            self._not_run(),
        ]
        return "\n\n".join(parts) + "\n"

    # ---------------------------------------------------------------------------- results

    def _head(self) -> str:
        c = self.configuration
        lines = [
            f"# {c['recipe']['network']} on {c['data']['images']}: "
            f"{', '.join(self.variants)} against the original",
            "",
            *(
                f"- **{v}**: accuracy {signed(a)} points, {a.verdict} (±{self.margin:g}); time "
                f"{self._time_verdict(t)}; {a.count} pairs."
                for v in self.variants
                for a, t in [(self.compared[v], self.compared_times.get(v))]
            ),
            *(f"- **Warning**: {line}" for line in self._warnings()),
            "",
            "Brackets have 95% confidence intervals. A difference is called one by the paired t "
            "test, corrected for the number of variants (Holm), and equivalence by two one-sided t "
            "tests: the interval of 90% is within the margin. What was reduced, and what was not "
            "run, is at the end.",
        ]
        return "\n".join(lines)

    def _time_verdict(self, compared: Comparison | None) -> str:
        if compared is None:
            return f"not compared, since times are those of {self.device}"
        if self.configuration["epochs"] == 1:
            return "not compared, since the one epoch has tracing and profiling in it"
        return f"{signed(compared)}%, {compared.verdict} (±{self.time_margin:g}%)"

    def _warnings(self) -> Iterable[str]:
        """Warnings of what takes from the worth of the results."""
        diverged = [
            f"{variant}, seed {seed}"
            for variant, of_variant in self.runs.items()
            for seed, record in of_variant.items()
            if not all(np.isfinite(epoch["loss"]) for epoch in record["epochs"])
        ]
        if diverged:
            yield f"diverged, the loss is not finite: {'; '.join(diverged)}. Accuracies are chance."
        originals = [accuracy(record) for record in self.runs[ORIGINAL].values()]
        chance = 100 / self.configuration["data"]["classes"]
        if np.mean(originals) < _CHANCE * chance:
            yield (
                f"the original has learnt little: {np.mean(originals):.1f}%, where guessing gives "
                f"{chance:.1f}%. What nobody has learnt cannot be lost."
            )
        if self.configuration["keras"] == "keras_3":
            yield (
                "the original is the BatchNormalization of Keras 3, which runs as arithmetic, and "
                "the variants run fused operations: that alone changes times. strided1 has the "
                "fused operations without strides."
            )

    def _accuracy(self) -> str:
        pictures = [
            charts.accuracy(self.runs, self.directory / "accuracy.png"),
            charts.differences(
                self.accuracies,
                self.compared,
                "accuracy, variant less original, points",
                self.directory / "accuracy_differences.png",
            ),
        ]
        values = {v: [accuracy(r) for r in of.values()] for v, of in self.runs.items()}
        return "\n\n".join(
            [
                "## Accuracy",
                "On the test images after the last epoch, in percent; differences of pairs, in "
                "percentage points.",
                spread_table("accuracy, %", values, 2),
                comparison_table(self.compared, "points"),
                *(power_text(v, c, "points") for v, c in self.compared.items()),
                *map(picture_of, pictures),
            ]
        )

    def _time(self) -> str:
        values = {v: [seconds_per_epoch(r) for r in of.values()] for v, of in self.timed.items()}
        picture = charts.differences(
            self.times,
            self.compared_times,
            "time per epoch, variant against original, %",
            self.directory / "time_differences.png",
        )
        return "\n\n".join(
            [
                "## Time per epoch",
                "Training alone; the median of a run's epochs without the first, in which the step "
                "is traced and profiled (with one epoch, there is only that: it says nothing). "
                f"Differences of pairs, in percent of the original.{self._on_which_device()}",
                spread_table("seconds", values, 3),
                comparison_table(self.compared_times, "%"),
                *(power_text(v, c, "%") for v, c in self.compared_times.items()),
                picture_of(picture),
            ]
        )

    def _on_which_device(self) -> str:
        if len(self.devices) == 1:
            return ""
        return f" All of the runs on {self.device}."

    # ------------------------------------------------------------------------------ proof

    def _proof(self) -> str:
        rows = []
        for variant, of_variant in self.runs.items():
            record = next(iter(of_variant.values()))
            ran = ", ".join(f"{op} x{n}" for op, n in record["operations"].items())
            parameters = record["parameters"]
            alike = all(r["operations"] == record["operations"] for r in of_variant.values())
            rows.append(
                [
                    variant,
                    ran + ("" if alike else " (first run; others differ)"),
                    *(f"{parameters[kind]:,}" for kind in ("trained", "all")),
                ]
            )
        strides = [
            [f"{layer['name']}, {'x'.join(map(str, layer['shape']))}"]
            + [strides_text(first["layers"][i], v) for v, first in self._firsts().items()]
            for i, layer in enumerate(self._firsts()[ORIGINAL]["layers"])
        ]
        pairs = sum(len(self.runs[v]) for v in self.variants)
        return "\n\n".join(
            [
                "## What ran",
                "Operations of BatchNormalization layers in a step of training, forward and "
                "backward, seen by TensorFlow's profiler in steps of the runs themselves; "
                "arithmetic on one element per channel is left out. FusedBatchNormEx is "
                "FusedBatchNormV3 and the ReLU behind it in one.",
                table(["variant", "operations", "trained weights", "all weights"], rows),
                f"All {pairs} pairs started from the same weights and the same first batch, by "
                "checksums.",
                "Strides (rows, columns) of the statistics in each layer. The layers lower a "
                "stride where fewer than 16 positions of an image would be sampled, and to 1 where "
                "the sample would then be more than a fifth of all; such are marked \\*.",
                table(["layer, input", *self.runs], strides),
            ]
        )

    def _firsts(self) -> dict[str, dict[str, Any]]:
        return {v: next(iter(of_variant.values())) for v, of_variant in self.runs.items()}

    def _layers(self) -> str:
        times = self._layer_times()
        names = list(times[ORIGINAL])
        labels = {
            v: [strides_text(layer, v).replace("\\", "") for layer in first["layers"]]
            for v, first in self._firsts().items()
        }
        picture = charts.layer_times(times, labels, self.directory / "layer_times.png")
        rows = [
            [name]
            + [f"{of[name]['forward']:.2f} + {of[name]['backward']:.2f}" for of in times.values()]
            for name in names
        ]
        sums = [
            " + ".join(
                f"{sum(of[name][direction] for name in names):.2f}"
                for direction in ("forward", "backward")
            )
            for of in times.values()
        ]
        return "\n\n".join(
            [
                "## Time of BatchNormalization by layer",
                "Forward + backward, milliseconds of a step, by the profiler; medians over runs of "
                "the median of a few steps. Times of operations that ran side by side overlap, and "
                "those of FusedBatchNormEx have the ReLU in them."
                + ("" if self.device.startswith("CPU") else _LAUNCHING)
                + self._on_which_device(),
                table(["layer", *times], [*rows, ["sum", *sums]]),
                picture_of(picture),
            ]
        )

    def _layer_times(self) -> dict[str, dict[str, dict[str, float]]]:
        """Milliseconds of a step by variant, layer and direction: medians over runs."""
        names = [layer["name"] for layer in self._firsts()[ORIGINAL]["layers"]]
        return {
            variant: {
                name: {
                    direction: plain.median(
                        r["milliseconds"].get(name, {}).get(direction, 0.0)
                        for r in of_variant.values()
                    )
                    for direction in ("forward", "backward")
                }
                for name in names
            }
            for variant, of_variant in self.timed.items()
        }

    def _norms(self) -> str:
        layers = self._firsts()[ORIGINAL]["layers"]
        places = {"first": layers[0], "middle": layers[len(layers) // 2], "last": layers[-1]}
        pictures = [
            charts.norms(self.runs, place, layer["name"], self.directory / f"norms_{place}.png")
            for place, layer in places.items()
        ]
        return "\n\n".join(
            [
                "## mu, sigma, beta and gamma over training",
                "Moving statistics and weights after each epoch, means over runs. Gamma and "
                "beta of mbn are its depthwise kernel and its bias.",
                *map(picture_of, pictures),
            ]
        )

    # ------------------------------------------------------------- what was run, and was not

    def _run(self) -> str:
        c = self.configuration
        recipe, data = c["recipe"], c["data"]
        versions = ", ".join(f"{name} {version}" for name, version in c["versions"].items())
        seeds = sorted(self.runs[ORIGINAL])
        facts = {
            "recipe": recipe["name"],
            "images": data["images"],
            "training images": f"{data['train']:,}",
            "test images": f"{data['test']:,}",
            "corrupt images left out": ", ".join(data["corrupt"]) or "none",
            "width": c["width"],
            "epochs": c["epochs"],
            "batch on a device": c["batch"],
            "devices": c["replicas"],
            "runs by device": ", ".join(f"{name}: {count}" for name, count in self.devices.items()),
            "precision": c["dtype"],
            "Keras": c["keras"],
            "versions": versions,
            "seeds": ", ".join(map(str, seeds)),
            "runs": ", ".join(f"{v} {len(of)}" for v, of in self.runs.items()),
        }
        hyper = [
            [k, v] for k, v in recipe.items() if k not in ("name", "images", "batch", "epochs")
        ]
        return "\n\n".join(
            [
                "## What was run",
                table(["", ""], [[k, str(v)] for k, v in facts.items()]),
                "Hyper-parameters, described in `study/recipes.py`; the learning "
                "rate is for the recipe's batch and goes with the batch:",
                table(["hyper-parameter", "value"], hyper),
            ]
        )

    def _not_run(self) -> str:
        lines = left_out(self.configuration, self.runs, self.alone)
        return "\n".join(["## What was not run", "", *(f"- {line}" for line in lines)])

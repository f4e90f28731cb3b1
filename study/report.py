"""The page: what was run, what ran, what came out, and what was not run."""

from __future__ import annotations

import statistics as plain
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from study import charts
from study.errors import StudyError
from study.proof import kinds
from study.recipes import RECIPES, RUNS, VARIANTS
from study.results import Results
from study.statistics import (
    ALPHA,
    WANTED_POWER,
    Comparison,
    compare_all,
    needed,
    power,
)

ORIGINAL = "original"
PAGE = "report.md"
_CHANCE = 1.2  # times the accuracy of guessing: below it, nothing was learnt
# All records, by variant and seed.
Runs = dict[str, dict[int, dict[str, Any]]]


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
    path.write_text(page.text())
    return path


def paired(finished: Mapping[tuple[str, int], dict[str, Any]]) -> Runs:
    """The runs by variant, the original first; of the others, those that have an original.

    Raises:
        StudyError: there is no pair.
    """
    originals = {seed for variant, seed in finished if variant == ORIGINAL}
    variants = sorted({variant for variant, _ in finished}, key=_rank)
    runs = {
        variant: {
            seed: finished[variant, seed]
            for seed in sorted(originals)
            if (variant, seed) in finished
        }
        for variant in variants
    }
    runs = {variant: of_variant for variant, of_variant in runs.items() if of_variant}
    if len(runs) < 2:
        raise StudyError("no run of a variant has one of the original with the same seed beside it")
    return runs


def _rank(variant: str) -> tuple[bool, str, int]:
    kind = variant.rstrip("0123456789")
    return variant != ORIGINAL, "" if kind == "strided" else kind, int(variant[len(kind) :] or 0)


def check(runs: Runs) -> None:
    """Sees that pairs are pairs, and that variants ran something else than the original.

    Raises:
        StudyError: one is not, or did not.
    """
    for variant, of_variant in runs.items():
        for seed, record in of_variant.items():
            original = runs[ORIGINAL][seed]
            for key in ("initial_weights", "first_batch"):
                if record[key] != original[key]:
                    raise StudyError(
                        f"{variant}, seed {seed}, is not paired with the original: its "
                        f"{key.replace('_', ' ')} differ"
                    )
            same = kinds(record["operations"]) == kinds(original["operations"])
            if variant != ORIGINAL and same:
                raise StudyError(f"{variant}, seed {seed}, ran just what the original ran")


def seconds_per_epoch(record: Mapping[str, Any]) -> float:
    """The median without the first epoch, in which the step is traced and profiled."""
    seconds = [epoch["seconds"] for epoch in record["epochs"]]
    return plain.median(seconds[1:] or seconds)


def accuracy(record: Mapping[str, Any]) -> float:
    """After the last epoch, in percent."""
    return 100 * float(record["epochs"][-1]["test_accuracy"])


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
        originals = runs[ORIGINAL]
        self.variants = [variant for variant in runs if variant != ORIGINAL]
        self.accuracies = {
            v: [accuracy(r) - accuracy(originals[seed]) for seed, r in runs[v].items()]
            for v in self.variants
        }
        self.times = {
            v: [
                100 * (seconds_per_epoch(r) / seconds_per_epoch(originals[seed]) - 1)
                for seed, r in runs[v].items()
            ]
            for v in self.variants
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
                f"- **{v}**: accuracy {_signed(a)} points, {a.verdict} (±{self.margin:g}); time "
                f"{self._time_verdict(t)}; {a.count} pairs."
                for v in self.variants
                for a, t in [(self.compared[v], self.compared_times[v])]
            ),
            *(f"- **Warning**: {line}" for line in self._warnings()),
            "",
            "Brackets have 95% confidence intervals. A difference is called one by the paired t "
            "test, corrected for the number of variants (Holm), and equivalence by two one-sided t "
            "tests: the interval of 90% is within the margin. What was reduced, and what was not "
            "run, is at the end.",
        ]
        return "\n".join(lines)

    def _time_verdict(self, compared: Comparison) -> str:
        if self.configuration["epochs"] == 1:
            return "not compared, since the one epoch has tracing and profiling in it"
        return f"{_signed(compared)}%, {compared.verdict} (±{self.time_margin:g}%)"

    def _warnings(self) -> Iterable[str]:
        """What takes from the worth of the results."""
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
                _spread_table("accuracy, %", values, 2),
                _comparison_table(self.compared, "points"),
                *(_power_text(v, c, "points") for v, c in self.compared.items()),
                *map(_picture, pictures),
            ]
        )

    def _time(self) -> str:
        values = {v: [seconds_per_epoch(r) for r in of.values()] for v, of in self.runs.items()}
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
                "Differences of pairs, in percent of the original.",
                _spread_table("seconds", values, 3),
                _comparison_table(self.compared_times, "%"),
                *(_power_text(v, c, "%") for v, c in self.compared_times.items()),
                _picture(picture),
            ]
        )

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
            + [_strides_text(first["layers"][i], v) for v, first in self._firsts().items()]
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
                _table(["variant", "operations", "trained weights", "all weights"], rows),
                f"All {pairs} pairs started from the same weights and the same first batch, by "
                "checksums.",
                "Strides (rows, columns) of the statistics in each layer. The layers lower a "
                "stride where fewer than 16 positions of an image would be sampled, and to 1 where "
                "the sample would then be more than a fifth of all; such are marked \\*.",
                _table(["layer, input", *self.runs], strides),
            ]
        )

    def _firsts(self) -> dict[str, dict[str, Any]]:
        return {v: next(iter(of_variant.values())) for v, of_variant in self.runs.items()}

    def _layers(self) -> str:
        names = [layer["name"] for layer in self._firsts()[ORIGINAL]["layers"]]
        times = {
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
            for variant, of_variant in self.runs.items()
        }
        labels = {
            v: [_strides_text(layer, v).replace("\\", "") for layer in first["layers"]]
            for v, first in self._firsts().items()
        }
        on_cpu = self.configuration["device"].startswith("CPU")
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
                + ("" if on_cpu else " On a GPU these are times of launching, not of computing."),
                _table(["layer", *times], [*rows, ["sum", *sums]]),
                _picture(picture),
            ]
        )

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
                *map(_picture, pictures),
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
            "devices": f"{c['replicas']} ({c['device']})",
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
                _table(["", ""], [[k, str(v)] for k, v in facts.items()]),
                "Hyper-parameters, described in `study/recipes.py`; the learning "
                "rate is for the recipe's batch and goes with the batch:",
                _table(["hyper-parameter", "value"], hyper),
            ]
        )

    def _not_run(self) -> str:
        return "\n".join(["## What was not run", "", *(f"- {line}" for line in self.left_out())])

    def left_out(self) -> Iterable[str]:
        """All in which this is less than the study."""
        c = self.configuration
        recipe = RECIPES.get(c["recipe"]["name"])
        if recipe:
            if c["width"] != 1:
                yield f"{recipe.network} in full width: this has {c['width']:g} of its channels."
            if c["epochs"] < recipe.epochs:
                yield f"All {recipe.epochs} epochs: these are {c['epochs']}."
            if c["batch"] != recipe.batch:
                yield f"The recipe's batch of {recipe.batch}: this one is {c['batch']}."
        yield from self._images_left_out()
        if self.alone:
            yield f"The other half of a pair; not reported: {'; '.join(self.alone)}."
        few = {v: len(of) for v, of in self.runs.items() if len(of) < RUNS}
        if few:
            counts = ", ".join(f"{count} of {v}" for v, count in few.items())
            yield f"{RUNS} runs of each variant: these are {counts}."
        missing = [v for v in VARIANTS if v not in self.runs]
        if missing:
            yield f"These variants: {', '.join(missing)}."
        others = [name for name in RECIPES if name != c["recipe"]["name"]]
        yield f"These recipes: {', '.join(others)}."
        other = "Keras 3" if c["keras"] == "tf_keras" else "tf_keras"
        yield f"The same in {other}."
        if c["dtype"] == "float32":
            yield "Mixed precision."
        if c["device"].startswith("CPU"):
            yield "A GPU: the times are those of a CPU."
        if c["replicas"] == 1:
            yield "More than one device."

    def _images_left_out(self) -> Iterable[str]:
        data = self.configuration["data"]
        for part, there in data["available"].items():
            if data[part] < there:
                yield f"All {there:,} {part} images: these are {data[part]:,}."


# --------------------------------------------------------------------------------- tables


def _spread_table(unit: str, values: Mapping[str, Sequence[float]], digits: int) -> str:
    rows = []
    for variant, of_variant in values.items():
        numbers = [np.mean(of_variant), np.median(of_variant), min(of_variant), max(of_variant)]
        deviation = np.std(of_variant, ddof=1) if len(of_variant) > 1 else None
        texts = [f"{number:.{digits}f}" for number in numbers]
        spread = "-" if deviation is None else f"{deviation:.{digits}f}"
        rows.append([variant, str(len(of_variant)), texts[0], spread, *texts[1:]])
    columns = ["variant", "runs", f"mean {unit}", "standard deviation", "median", "least", "most"]
    return _table(columns, rows)


def _comparison_table(compared: Mapping[str, Comparison], unit: str) -> str:
    rows = [
        [
            variant,
            str(c.count),
            _signed(c),
            _number(c.deviation),
            _p(c.t_test),
            _p(c.holm),
            _p(c.wilcoxon),
            f"±{c.margin:g}",
            _p(c.equivalence),
            c.verdict,
        ]
        for variant, c in compared.items()
    ]
    columns = [
        *("variant", "pairs", f"mean difference, {unit}", "standard deviation"),
        *(
            "paired t, p",
            "Holm, p",
            "Wilcoxon, p",
            "margin",
            "equivalence (TOST), p",
            f"at {ALPHA:.0%}",
        ),
    ]
    return _table(columns, rows)


def _power_text(variant: str, c: Comparison, unit: str) -> str:
    if c.power is None or c.deviation is None:
        return f"{variant}: one pair has no spread, so its power is not known."
    enough = c.power >= WANTED_POWER
    more = f"{c.needed} pairs" if c.needed else "more pairs than ten thousand"
    text = (
        f"{variant}: if there is no difference, {c.count} pairs with this spread show that it is "
        f"within ±{c.margin:g} {unit} with a chance of {c.power:.0%}"
    )
    if not enough:
        reach = next(
            (m for m in _margins() if power(c.deviation, c.count, m) >= WANTED_POWER), None
        )
        within = f"; what they can show is ±{reach:g}" if reach else ""
        return f"{text}: too few, {WANTED_POWER:.0%} takes {more}{within}."
    return f"{text}; {WANTED_POWER:.0%} takes {needed(c.deviation, c.margin)}."


def _margins() -> Iterable[float]:
    """Round numbers, upward."""
    for power_of_ten in (0.1, 1, 10, 100):
        for digit in (1, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9):
            yield round(power_of_ten * digit, 2)


def _strides_text(layer: Mapping[str, Any], variant: str) -> str:
    if layer["strides"] is None:
        return "-"
    asked = int(variant.lstrip("abcdefghijklmnopqrstuvwxyz"))
    lowered = any(stride != asked for stride in layer["strides"])
    return ",".join(map(str, layer["strides"])) + ("\\*" if lowered else "")


def _signed(c: Comparison) -> str:
    if c.interval is None:
        return f"{c.mean:+.2f}"
    return f"{c.mean:+.2f} [{c.interval[0]:+.2f}, {c.interval[1]:+.2f}]"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _p(value: float | None) -> str:
    if value is None:
        return "-"
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def _table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _picture(name: str) -> str:
    return f"![{name.removesuffix('.png').replace('_', ' ')}]({name})"

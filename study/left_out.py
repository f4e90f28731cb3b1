"""List of what a study has not run: all in which its results are less than the whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from study.pairs import Runs, devices_of
from study.recipes import RECIPES, RUNS, VARIANTS


def left_out(configuration: Mapping[str, Any], runs: Runs, alone: Sequence[str]) -> Iterator[str]:
    """Sentences, one for each lack.

    Args:
        configuration: of the results.
        runs: those in pairs.
        alone: names of the others.
    """
    yield from _reduced(configuration)
    yield from _images_left_out(configuration["data"])
    if alone:
        yield f"The other half of a pair, on the same device; not reported: {'; '.join(alone)}."
    few = {v: len(of) for v, of in runs.items() if len(of) < RUNS}
    if few:
        counts = ", ".join(f"{count} of {v}" for v, count in few.items())
        yield f"{RUNS} runs of each variant: these are {counts}."
    missing = [v for v in VARIANTS if v not in runs]
    if missing:
        yield f"These variants: {', '.join(missing)}."
    yield from _elsewhere(configuration, next(iter(devices_of(runs))))


def _reduced(c: Mapping[str, Any]) -> Iterator[str]:
    """Reductions of the recipe by flags."""
    recipe = RECIPES.get(c["recipe"]["name"])
    if recipe is None:
        return
    if c["width"] != 1:
        yield f"{recipe.network} in full width: this has {c['width']:g} of its channels."
    if c["epochs"] < recipe.epochs:
        yield f"All {recipe.epochs} epochs: these are {c['epochs']}."
    if c["batch"] != recipe.batch:
        yield f"The recipe's batch of {recipe.batch}: this one is {c['batch']}."


def _images_left_out(data: Mapping[str, Any]) -> Iterator[str]:
    for part, there in data["available"].items():
        if data[part] < there:
            yield f"All {there:,} {part} images: these are {data[part]:,}."


def _elsewhere(c: Mapping[str, Any], timed_on: str) -> Iterator[str]:
    """Other recipes, and the same on other ground."""
    others = [name for name in RECIPES if name != c["recipe"]["name"]]
    yield f"These recipes: {', '.join(others)}."
    other = "Keras 3" if c["keras"] == "tf_keras" else "tf_keras"
    yield f"The same in {other}."
    if c["dtype"] == "float32":
        yield "Mixed precision."
    if timed_on.startswith("CPU"):
        yield "A GPU: the times are those of a CPU."
    if c["replicas"] == 1:
        yield "Several devices at a time."

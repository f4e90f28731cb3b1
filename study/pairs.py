"""Runs in pairs: each with the one of the original that has the same seed, on the same device."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping
from typing import Any

from study.errors import StudyError
from study.proof import kinds

ORIGINAL = "original"
# All records, by variant and seed.
Runs = dict[str, dict[int, dict[str, Any]]]


def paired(finished: Mapping[tuple[str, int], dict[str, Any]]) -> Runs:
    """The runs by variant, the original first; of the others, those that have an original.

    Raises:
        StudyError: there is no pair.
    """
    originals = {
        seed: record["device"]
        for (variant, seed), record in finished.items()
        if variant == ORIGINAL
    }
    variants = sorted({variant for variant, _ in finished}, key=_rank)
    runs = {
        variant: {
            seed: finished[variant, seed]
            for seed in sorted(originals)
            if (variant, seed) in finished and finished[variant, seed]["device"] == originals[seed]
        }
        for variant in variants
    }
    runs = {variant: of_variant for variant, of_variant in runs.items() if of_variant}
    if len(runs) < 2:
        raise StudyError(
            "no run of a variant has one of the original with the same seed, on the same device, "
            "beside it"
        )
    return runs


def devices_of(runs: Runs) -> dict[str, int]:
    """How many runs each device trained, the one with the most pairs first."""
    pairs, all_runs = Counter[str](), Counter[str]()
    for variant, of_variant in runs.items():
        for record in of_variant.values():
            all_runs[record["device"]] += 1
            pairs[record["device"]] += variant != ORIGINAL
    return {device: all_runs[device] for device, _ in pairs.most_common()}


def on_device(runs: Runs, device: str) -> Runs:
    """The runs of one device, of the variants that have some."""
    kept = {
        variant: {seed: record for seed, record in of.items() if record["device"] == device}
        for variant, of in runs.items()
    }
    return {variant: of for variant, of in kept.items() if of}


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
    return statistics.median(seconds[1:] or seconds)


def accuracy(record: Mapping[str, Any]) -> float:
    """After the last epoch, in percent."""
    return 100 * float(record["epochs"][-1]["test_accuracy"])

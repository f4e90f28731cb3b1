#!/usr/bin/env python3
"""BatchNormalization left in well-known networks, and how exact the rewritten ones are.

    python benchmarks/coverage.py [FLAGS]

Every model is converted in both modes; what is left is counted in the new model, and its
outputs are compared with the original's. Trained models of others (tools/real_models.py)
are compared on two kinds of inputs:

    normal      normally distributed
    real        in the range, or of the form, that the model is trained to read

The networks of tf_keras.applications have random weights, and two sets of random
BatchNormalization statistics:

    typical     gamma in [0.5, 1.5], mean and variance near those of the activations
    hard        gamma of both signs or 0, some variances 0 or 1e-36

A softmax at the end is taken off before anything is compared: it would bring the outputs
together whatever went wrong before it.

The column "spread" is the largest difference between outputs for different examples,
relative to the largest output: an error far below it was not hidden by outputs that are
the same whatever the input.

Examples:
    python benchmarks/coverage.py
    python benchmarks/coverage.py --models=fer,ResNet50 --json=coverage.json
    python benchmarks/coverage.py --models=NASNetMobile --image_size=96 --seed=7

Exit codes:
    0  every rewritten model gave the original's outputs
    1  one did not, or something failed
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# The repository's own package comes first, so that the tool runs without installation.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import tensorflow as tf
import tf_keras
from absl import app, flags

import mbn_rewrite as mbn
from benchmarks.common import results
from benchmarks.common.console import progress
from benchmarks.common.flags import check_usage
from benchmarks.models.networks import (
    APPLICATIONS,
    STATISTICS,
    batch_norms,
    build,
    random_images,
    real_inputs,
    real_model,
    set_statistics,
)
from mbn_rewrite.comparison import Comparison
from mbn_rewrite.tables import table
from tools import real_models

NAMES = (*real_models.MODELS, *APPLICATIONS)
MODES = ("fold", "depthwise")

FLAGS = flags.FLAGS
flags.DEFINE_list("models", list(NAMES), f"Which models, of {', '.join(NAMES)}.")
flags.DEFINE_integer("seed", 0, "Of all random weights, statistics and inputs.", lower_bound=0)
flags.DEFINE_string("json", None, "Write the results to this file, as JSON.")
flags.DEFINE_integer(
    "image_size",
    None,
    "Height and width of the images for the networks of tf_keras.applications. By default "
    "each network's own; 75 is the least that all of them take.",
    lower_bound=32,
)


@dataclass(frozen=True)
class Outcome:
    """A rewritten model beside the original.

    Attributes:
        left: how many BatchNormalizations the new model has.
        comparison: of its outputs with the original's.
        not_finite: how many outputs are NaN or infinite though the original's are not.
    """

    left: int
    comparison: Comparison
    not_finite: int

    @property
    def ok(self) -> bool:
        return self.comparison.ok and self.not_finite == 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"comparison": self.comparison.to_dict(), "ok": self.ok}


@dataclass(frozen=True)
class Row:
    """One model with one set of statistics or inputs, in both modes."""

    model: str
    values: str
    batch_norms: int
    outcomes: dict[str, Outcome]
    spread: float

    @property
    def ok(self) -> bool:
        return all(outcome.ok for outcome in self.outcomes.values())

    def cells(self) -> list[object]:
        results: list[object] = []
        for outcome in self.outcomes.values():
            results += [outcome.left, f"{outcome.comparison.max_rel_error:.1e}"]
        tolerance = max(o.comparison.tolerance for o in self.outcomes.values())
        verdict = "ok" if self.ok else "NOT OK"
        return [
            *(self.model, self.values, self.batch_norms, *results),
            *(f"{self.spread:.1e}", f"{tolerance:.0e}", verdict),
        ]

    def to_dict(self) -> dict[str, Any]:
        outcomes = {mode: outcome.to_dict() for mode, outcome in self.outcomes.items()}
        spread = self.spread if np.isfinite(self.spread) else str(self.spread)  # as JSON knows
        return asdict(self) | {"outcomes": outcomes, "spread": spread, "ok": self.ok}


# ------------------------------------------------------------------------- what is measured


def rows_for(name: str, seed: int, image_size: int | None) -> Iterator[Row]:
    """The rows of one model, which is loaded or built here and dropped at the end."""
    if name in real_models.MODELS:
        model = real_model(name)
        converted = {mode: mbn.convert(model, mode) for mode in MODES}
        for kind, inputs in real_inputs(name, model, seed).items():
            yield compared(name, kind, model, converted, inputs)
        return
    model = build(name, seed, image_size)
    for kind, statistics in STATISTICS.items():
        rng = np.random.default_rng(seed)
        set_statistics(model, statistics, rng)
        converted = {mode: mbn.convert(model, mode) for mode in MODES}
        yield compared(name, kind, model, converted, random_images(model, rng))


def compared(name: str, values: str, model: Any, converted: dict[str, Any], inputs: Any) -> Row:
    expected = outputs_of(model, inputs)
    outcomes = {
        mode: Outcome(
            left=len(batch_norms(new)),
            comparison=mbn.verify(model, new, inputs),
            not_finite=count_not_finite(expected, outputs_of(new, inputs)),
        )
        for mode, new in converted.items()
    }
    return Row(name, values, len(batch_norms(model)), outcomes, spread_of(expected))


def outputs_of(model: Any, inputs: Any) -> list[np.ndarray]:
    return [np.asarray(output) for output in tf.nest.flatten(model(inputs, training=False))]


def count_not_finite(expected: list[np.ndarray], actual: list[np.ndarray]) -> int:
    pairs = zip(expected, actual, strict=True)
    return sum(int(np.sum(np.isfinite(a) & ~np.isfinite(b))) for a, b in pairs)


def spread_of(outputs: list[np.ndarray]) -> float:
    """See the module; of several outputs the least."""
    return min(float(np.ptp(array, axis=0).max() / np.abs(array).max()) for array in outputs)


# ----------------------------------------------------------------------------- the program


def main(argv: list[str]) -> int:
    check_usage(argv[1:], FLAGS.json)
    unknown = sorted(set(FLAGS.models) - set(NAMES))
    if unknown:
        raise app.UsageError(f"--models: unknown {unknown}; there are {', '.join(NAMES)}")
    rows = []
    for number, name in enumerate(FLAGS.models, 1):
        progress(f"{number}/{len(FLAGS.models)} {name} ...")
        rows += list(rows_for(name, FLAGS.seed, FLAGS.image_size))
        tf_keras.backend.clear_session()
        gc.collect()
    columns = ["model", "values", "BN", "fold: left", "error", "depthwise: left", "error"]
    print(table([*columns, "spread", "tolerance", "ok"], [row.cells() for row in rows], width=125))
    results.keep(FLAGS.json, {"seed": FLAGS.seed, "rows": [row.to_dict() for row in rows]})
    return 0 if all(row.ok for row in rows) else 1


if __name__ == "__main__":
    app.run(main)

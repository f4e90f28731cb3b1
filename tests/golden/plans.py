"""Plans of 20 networks of either Keras and of 8 SavedModels, as kept in `plans/`.

A plan is kept with its decisions and a checksum of every edit. Where a change of what is decided
is meant, write them anew and read the difference:

    python -m tests.golden.plans
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import mbn_rewrite as mbn
from benchmarks.models.networks import build
from tests.support import kerases
from tests.support.random_models import random_model
from tests.support.saved_models import KINDS

KEPT = Path(__file__).parent / "plans"

KERASES = ("tf_keras", "keras")
MODES = ("fold", "depthwise", "strided")
SAVED_MODEL_MODES = ("fold", "depthwise")  # those for training need layers

# What stands in NASNet and InceptionResNetV2 is in these too, and they have hundreds of layers.
APPLICATIONS = (
    "DenseNet121",
    "EfficientNetB0",
    "MobileNet",
    "MobileNetV2",
    "MobileNetV3Small",
    "ResNet50",
    "ResNet50V2",
    "Xception",
)
SEEDS = (17, 27, 35, 37, 42, 44, 59, 66, 68, 70, 93, 98)  # of all ranks, with 4 to 7 each
NETWORKS = (*APPLICATIONS, *(f"random_{seed}" for seed in SEEDS))
SAVED_MODELS = (
    "tf_keras",
    "tf_keras_subclassed",
    "keras_3_exported",
    "module",
    "two_signatures",
    "two_networks",
    "frozen_arithmetic",
    "tf1_resource_variables",
)
_CHECKSUM_DIGITS = 16


def network_plans(name: str, keras: str) -> dict[str, Any]:
    """The plans of a network of `NETWORKS`, by mode. What was made before must be cleared."""
    kerases.use(keras)
    try:
        if name in APPLICATIONS:
            model = build(name, seed=0, image_size=96, keras=kerases.package())
            _set_statistics(model)
        else:
            model = random_model(int(name.removeprefix("random_"))).model
        return {mode: _kept(mbn.plan(model, mode)) for mode in MODES}
    finally:
        kerases.use("tf_keras")


def saved_model_plans(name: str, directory: Path) -> dict[str, Any]:
    """The plans of a SavedModel of `SAVED_MODELS`, which is written to a directory, by mode."""
    KINDS[name].build(directory)
    return {
        mode: _kept(
            mbn.rewrite_saved_model(directory, directory.with_name("out"), mode, dry_run=True).plan
        )
        for mode in SAVED_MODEL_MODES
    }


def _set_statistics(model: Any) -> None:
    """Gives every BatchNormalization statistics drawn by numpy, with gammas of both signs."""
    rng = np.random.default_rng(0)
    for layer in kerases.norms(model):
        size = layer.moving_mean.shape[0]
        if layer.scale:
            kerases.assign(layer.gamma, rng.uniform(0.5, 1.5, size) * rng.choice([-1, 1], size))
        if layer.center:
            kerases.assign(layer.beta, rng.normal(0, 0.1, size))
        kerases.assign(layer.moving_mean, rng.normal(0, 0.5, size))
        kerases.assign(layer.moving_variance, rng.uniform(0.5, 2, size))


def _kept(plan: mbn.Plan) -> dict[str, Any]:
    """What is kept of a plan: all of its JSON but for what was measured and compared."""
    made = plan.to_dict()
    assert made.pop("measurement") is made.pop("verification") is made.pop("speed") is None
    if not made["unshared"]:  # as of almost all
        del made["unshared"]
    for edit in made["edits"]:
        edit["sha256"] = edit["sha256"][:_CHECKSUM_DIGITS]
    return json.loads(json.dumps(made))  # tuples are lists there


def path_of(name: str) -> Path:
    return KEPT / f"{name}.json"


def kept_plans(name: str) -> dict[str, Any]:
    return json.loads(path_of(name).read_text())


def _all_plans() -> Iterator[tuple[str, dict[str, Any]]]:
    for name in NETWORKS:
        for keras in KERASES:
            kerases.clear()
            yield f"{name}-{keras}", network_plans(name, keras)
    for name in SAVED_MODELS:
        kerases.clear()
        with tempfile.TemporaryDirectory() as directory:
            yield f"saved_model-{name}", saved_model_plans(name, Path(directory) / "model")


def _as_text(plans: dict[str, Any]) -> str:
    """JSON with a line for each decision and edit."""
    parts = []
    for mode, plan in plans.items():
        fields = []
        for key, value in plan.items():
            if isinstance(value, list) and value:
                rows = ",\n".join(f"   {json.dumps(row)}" for row in value)
                fields.append(f"  {json.dumps(key)}: [\n{rows}\n  ]")
            else:
                fields.append(f"  {json.dumps(key)}: {json.dumps(value)}")
        parts.append(f" {json.dumps(mode)}: {{\n" + ",\n".join(fields) + "\n }")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def main() -> None:
    KEPT.mkdir(exist_ok=True)
    for name, plans in _all_plans():
        print(name, "; ".join(plan["summary"] for plan in plans.values()), flush=True)
        path_of(name).write_text(_as_text(plans))


if __name__ == "__main__":
    main()

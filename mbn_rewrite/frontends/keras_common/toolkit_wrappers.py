"""Wrappers of TensorFlow Model Optimization, by the names of their classes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from mbn_rewrite.errors import RewriteError
from mbn_rewrite.frontends.keras_common.trust import parts_of

# Those that have what they wrap, or what they are given, be quantised in training.
QUANTISING = {"QuantizeAnnotate", "QuantizeLayer", "QuantizeWrapper", "QuantizeWrapperV2"}
# Others, and what takes them away.
STRIPPED = {
    "PruneLowMagnitude": "tfmot.sparsity.keras.strip_pruning",
    "ClusterWeights": "tfmot.clustering.keras.strip_clustering",
}


def stripped_by(names: Iterable[str]) -> str:
    """What takes a wrapper away, by the names of its class and its bases, or ""."""
    return next((STRIPPED[name] for name in names if name in STRIPPED), "")


def check(source: object, config: Any) -> None:
    """Raises RewriteError where the configuration in a file has such wrappers."""
    for part, where in parts_of(source, config):
        name = str(part.get("class_name", "")).rpartition(">")[2]
        if name in QUANTISING:
            raise RewriteError(
                f"{source} was trained for quantisation ({where}): weights that absorb something "
                "would not be on the grid that they were trained for. Fold the model as it was "
                "before, then quantise what that gives (quantize_model)"
            )
        if name in STRIPPED:
            raise RewriteError(
                f"{source} is as it was for training ({where}). Save what {STRIPPED[name]} gives"
            )

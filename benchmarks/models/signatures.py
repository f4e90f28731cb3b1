"""The served signature of a SavedModel, and inputs for it."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.common.failures import Declined

# What stands for a size that a signature leaves open: pixels of an image, and positions.
_OPEN_PIXELS, _OPEN_LENGTH = 224, 11_000


def signature_of(model: Any) -> Any:
    """The signature that a loaded SavedModel serves by default."""
    if "serving_default" not in model.signatures:
        raise Declined(f"it has no signature serving_default, but {sorted(model.signatures)}")
    return model.signatures["serving_default"]


def made_up(
    spec: Any, batch: int, rng: np.random.Generator, low: float = 0.0, high: float = 1.0
) -> np.ndarray:
    """Uniform values for an input of a signature.

    Args:
        spec: its shape and dtype.
        batch: how many examples, where that is left open.
        rng: what to draw from.
        low, high: the range.

    Raises:
        Declined: it takes no floating-point numbers.
    """
    if not spec.dtype.is_floating:
        raise Declined(f"inputs of dtype {spec.dtype.name} are not made up here")
    open_size = _OPEN_PIXELS if spec.shape.rank == 4 else _OPEN_LENGTH
    shape = [spec.shape[0] or batch, *(size or open_size for size in spec.shape[1:])]
    return rng.uniform(low, high, shape).astype(spec.dtype.as_numpy_dtype)

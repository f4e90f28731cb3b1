"""Inputs that a caller gives for models on disk, by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mbn_rewrite.errors import RewriteError, cause_of


def as_arrays(inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Inputs as arrays, by input name or "signature/input".

    Texts and bytes stay what they are: numpy's own arrays of bytes lose zeros at the end.

    Raises:
        RewriteError: something is no array.
    """
    arrays: dict[str, np.ndarray] = {}
    for name, value in inputs.items():
        if isinstance(value, Mapping):
            arrays |= {f"{name}/{key}": array for key, array in as_arrays(value).items()}
            continue
        try:
            arrays[name] = np.asarray(value, object if _holds_text(value) else None)
        except ValueError as error:
            raise RewriteError(f"input '{name}' is no array: {cause_of(error)}") from error
    return arrays


def _holds_text(value: Any) -> bool:
    while isinstance(value, (list, tuple)) and value:
        value = value[0]
    return isinstance(value, (str, bytes))

"""Reads and writes weights of Keras layers by the names that the neutral graph uses.

A name is the path of an attribute, such as "kernel" or "forward_layer.cell.bias".
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import numpy as np


def read(layer: Any, name: str) -> np.ndarray:
    """A weight as numpy array; of a bias in two rows (GRU) the row added to the input."""
    array = np.asarray(attrgetter(name)(layer).numpy())
    return array[0] if _in_two_rows(name, array) else array


def write(layer: Any, name: str, array: np.ndarray) -> None:
    """Sets a weight as `read` gives it; broadcasts, and casts to the variable's dtype."""
    variable = attrgetter(name)(layer)
    before = np.asarray(variable.numpy())
    if _in_two_rows(name, before):
        rows = before.copy()
        rows[0] = array
        variable.assign(rows)
        return
    variable.assign(np.broadcast_to(array.astype(before.dtype, copy=False), before.shape))


def _in_two_rows(name: str, array: np.ndarray) -> bool:
    """Whether this is the bias of a GRU that has one for its input and one for its state."""
    return name.endswith("cell.bias") and array.ndim == 2

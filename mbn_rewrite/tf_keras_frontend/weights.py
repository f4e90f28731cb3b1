"""Reads and writes weights of tf_keras layers by the names that the neutral graph uses.

A name is the path of an attribute, such as "kernel" or "forward_layer.cell.bias".
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import numpy as np


def read(layer: Any, name: str) -> np.ndarray:
    """A weight as numpy array; of a bias in two rows (GRU) the row added to the input."""
    array = attrgetter(name)(layer).numpy()
    return array[0] if _is_bias(name) and array.ndim == 2 else array


def write(layer: Any, name: str, array: np.ndarray) -> None:
    """Sets a weight as `read` gives it; broadcasts, and casts to the variable's dtype."""
    variable = attrgetter(name)(layer)
    dtype = variable.dtype.as_numpy_dtype
    if _is_bias(name) and len(variable.shape) == 2:
        rows = variable.numpy()
        rows[0] = array
        variable.assign(rows)
        return
    variable.assign(np.broadcast_to(array.astype(dtype, copy=False), tuple(variable.shape)))


def write_whole(layer: Any, name: str, source: Any) -> None:
    """Sets a weight to that of another layer, all rows of it."""
    attrgetter(name)(layer).assign(attrgetter(name)(source))


def clear(layer: Any, name: str) -> None:
    """Sets a weight to zero, all rows of it."""
    variable = attrgetter(name)(layer)
    variable.assign(np.zeros(variable.shape, variable.dtype.as_numpy_dtype))


def copy(source: Any, target: Any) -> None:
    """Sets all weights of a layer to those of another of the same structure.

    Raises:
        ValueError: the layers' weights differ in number or shape.
    """
    shapes = [tuple(v.shape) for v in source.weights]
    new_shapes = [tuple(v.shape) for v in target.weights]
    if shapes != new_shapes:
        raise ValueError(f"its weights have the shapes {shapes}, those of its copy {new_shapes}")
    for old, new in zip(source.weights, target.weights, strict=True):
        new.assign(old)


def _is_bias(name: str) -> bool:
    return name.split(".")[-1] == "bias"

"""Weights of layers, read and written by the names that the neutral graph uses.

A name is the path of an attribute, such as "kernel", "forward_layer.cell.bias" or, with a place in
a list, "cell.cells.0.kernel".
"""

from __future__ import annotations

from typing import Any

import numpy as np


def read(layer: Any, name: str) -> np.ndarray:
    """A weight as a numpy array; of a bias in two rows (GRU), the row added to the input."""
    array = _found(layer, name).numpy()
    if name.endswith("_dense.bias"):  # of an attention layer, by head
        return array.reshape(-1)
    return array[0] if _in_two_rows(name, array) else array


def write(layer: Any, name: str, array: np.ndarray) -> None:
    """Sets a weight, in the form in which `read` returns it; broadcasts, and casts to its dtype."""
    variable = _found(layer, name)
    dtype = numpy_dtype(variable)
    if _in_two_rows(name, variable):
        rows = variable.numpy()
        rows[0] = array
        variable.assign(rows)
        return
    shape = tuple(variable.shape)
    if name.endswith("_dense.bias") and array.size == np.prod(shape):
        array = array.reshape(shape)
    variable.assign(np.broadcast_to(array.astype(dtype, copy=False), shape))


def _found(layer: Any, name: str) -> Any:
    for part in name.split("."):
        layer = layer[int(part)] if part.isdigit() else getattr(layer, part)
    return layer


def numpy_dtype(variable: Any) -> Any:
    """Dtype of a variable, which is a TensorFlow dtype in tf_keras and a name in Keras 3."""
    # Numpy knows the name "bfloat16" once ml_dtypes is imported, which both Kerases do.
    return np.dtype(getattr(variable.dtype, "as_numpy_dtype", variable.dtype))


def _in_two_rows(name: str, array: Any) -> bool:
    """Whether this is the bias of a GRU with one row for its input and one for its state."""
    return "cell" in name and name.endswith(".bias") and len(array.shape) == 2

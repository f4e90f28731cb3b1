"""Inputs that are made up, for models of any kind. numpy only."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from mbn_rewrite.errors import RewriteError, cause_of, is_out_of_memory
from mbn_rewrite.graph import Shape

# How many examples are made up: fewer where one is as large as a picture.
_BATCH, _LARGE_BATCH, _LARGE = 4, 2, 50_000
GIVE_REAL_ONES = "Give real ones (inputs=... in Python, --verify_inputs on the command line)"


@dataclass(frozen=True)
class Made:
    """How inputs are made up.

    Attributes:
        open_size: what stands for a size that the model leaves open.
        top: floats are uniform from 0 to this (pixels), or normally distributed if None.
        words: integers are less than this.
        text: makes strings, or None where they cannot be made up.
        batch: how many examples; None for a few.
    """

    open_size: int = 64
    top: float | None = None
    words: int = 2
    text: Callable[[np.random.Generator], bytes] | None = None
    batch: int | None = None


def random_array(shape: Shape, dtype: str, rng: np.random.Generator, made: Made) -> np.ndarray:
    """An array for an input of this shape and dtype, to be cast to that dtype.

    Args:
        shape: None where a size is left open.
        dtype: the name of a dtype.

    Raises:
        RewriteError: it cannot be made up.
    """
    sizes = [made.open_size if size is None else size for size in shape]
    if sizes and shape[0] is None:
        few = _BATCH if math.prod(sizes[1:]) < _LARGE else _LARGE_BATCH
        sizes[0] = made.batch or few
    if dtype == "string" and made.text is not None:
        strings = [made.text(rng) for _ in range(math.prod(sizes))]
        return np.array(strings, object).reshape(sizes)
    if dtype.startswith(("int", "uint", "bool")):
        return rng.integers(0, 2 if dtype == "bool" else made.words, sizes)
    if not dtype.startswith(("float", "bfloat")):
        raise RewriteError(f"cannot make up inputs of dtype {dtype}. {GIVE_REAL_ONES}")
    return rng.standard_normal(sizes) if made.top is None else rng.uniform(0, made.top, sizes)


def is_open(shape: Any) -> bool:
    """Whether an input of this shape takes any number of examples."""
    rank = shape.rank if hasattr(shape, "rank") else len(shape)
    return rank != 0 and shape[0] is None


def of_batch(array: np.ndarray, batch: int | None) -> np.ndarray:
    """The first examples of an array, from its beginning again if there are fewer; None for all."""
    array = np.asarray(array)
    if batch is None or not array.ndim or not len(array):
        return array
    return np.take(array, range(batch), axis=0, mode="wrap")


def uncallable(who: str, error: Exception) -> RewriteError:
    """What to raise where a model cannot be called."""
    if is_out_of_memory(error):
        return RewriteError(f"{who} cannot be called: out of memory. Give fewer examples")
    return RewriteError(
        f"{who} cannot be called with these inputs: {cause_of(error)} Give inputs that it "
        "takes (inputs=... in Python, --verify_inputs on the command line)"
    )

"""Sample inputs for models of any kind, in numpy alone.

They contain values that are common in real inputs and rare among random numbers: zeros, values at
the ends of their range, sequences that end before others, padding ids, empty strings. A model that
cannot be called with those, or gives NaN, is tried with milder ones; see `MANNERS` and `tried`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from mbn_rewrite.errors import RewriteError, cause_of, is_out_of_memory
from mbn_rewrite.ir.graph import Shape

_BATCH = 4  # examples, where one is smaller than a picture
_PICTURE = 50_000  # numbers
GIVE_REAL_ONES = "Give real ones (inputs=... in Python, --inputs on the command line)"

# Manners of making inputs up, the one that reveals most first.
WITH_EMPTY = "with edges and an empty sequence"  # the last example is padding and nothing else
WITH_EDGES = "with edges"  # zeros, ends of ranges, sequences that end early, empty strings
PLAIN = "plain"  # nothing but random values
POSITIVE = "positive"  # floats between 0 and 1, and no zeros: for logarithms, roots, probabilities
MANNERS = (WITH_EMPTY, WITH_EDGES, PLAIN, POSITIVE)

_EXTREME = 5.0  # standard deviations: further out, it would hide what is wrong elsewhere
_EVERY = 32  # one value in so many is 0, and one at the end of the range
_MOST = 1000  # of these values, and of rows of zeros

# A tensor of made-up inputs, or one that a model computes from them, may take this share of the
# machine's memory, and have as many elements as kernels of TensorFlow count, in 32 bits.
MEMORY_SHARE = 1 / 8
_MOST_NUMBERS = 2**31 - 1

_INTEGERS = frozenset(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))
_FLOATS = ("float16", "bfloat16", "float32", "float64")

T = TypeVar("T")


@dataclass(frozen=True)
class InputRecipe:
    """Recipe for sample inputs.

    Attributes:
        open_size: the size of axes that the model leaves open.
        top: floats are uniform from 0 to this (pixels), or normally distributed if None.
        words: integers are less than this.
        text: function that makes strings, or None where they cannot be made up.
        batch: how many examples; None for a few, as `with_batch` says.
        pictures: how many are a few, where one is as large as a picture.
        manner: one of `MANNERS`.
        padding: value of padded steps in sequences of vectors; None if they are not known to be
            padded.
        pad_id: value of padded steps in sequences of integers; None likewise.
        largest: number of elements of the largest tensor that the model computes from one
            example, as far as it is known.
    """

    open_size: int = 64
    top: float | None = None
    words: int = 2
    text: Callable[[np.random.Generator], bytes] | None = None
    batch: int | None = None
    pictures: int = 2
    manner: str = PLAIN
    padding: float | None = None
    pad_id: int | None = None
    largest: int = 0

    @property
    def has_edges(self) -> bool:
        return self.manner in (WITH_EMPTY, WITH_EDGES)


def tried(
    recipes: Sequence[InputRecipe],
    call: Callable[[InputRecipe], T],
    arrays: Callable[[T], Iterable[np.ndarray]],
    manners: Sequence[str] = MANNERS,
) -> T:
    """The result of a call with the first inputs for which all outputs are finite.

    Args:
        recipes: alternatives for what a model may take; the first is kept to that it takes, and for
            which it gives any value.
        call: makes up inputs by a recipe and calls a model. RewriteError: the model cannot be
            called with them.
        arrays: the outputs among what the call gives.
        manners: the manners to try.

    Returns:
        What the call gave; where not all is finite in any manner, what it gave
        with the fewest NaN.

    Raises:
        RewriteError: the model cannot be called with inputs of any of these recipes.
    """
    fits: list[tuple[int, T]] = []
    empty: list[T] = []
    first: RewriteError | None = None
    pads = any(r.padding is not None or r.pad_id is not None for r in recipes)
    for manner in manners if pads else [each for each in manners if each != WITH_EMPTY]:
        for recipe in recipes:
            try:
                found = call(replace(recipe, manner=manner))
            except RewriteError as error:
                first = first or error
                continue
            outputs = list(arrays(found))
            if outputs and not any(array.size for array in outputs):
                empty.append(found)
                continue
            if all(np.all(np.isfinite(array)) for array in map(_numbers, outputs)):
                return found
            fits.append((nans(outputs), found))
            recipes = [recipe]
            break
        if empty and not fits:
            return empty[0]
    if fits:
        return min(fits, key=lambda each: each[0])[1]
    assert first is not None
    raise first


# Sizes to try where a model leaves them open: networks have a minimum, which may be long where one
# size is open, as of sequences.
_OPEN_SIZES, _LONG_SIZES = (64, 224, 16, 1), (1_024, 16_384)


def at_open_sizes(recipe: InputRecipe, shapes: Iterable[Shape]) -> list[InputRecipe]:
    """A recipe with each of the sizes to try for what shapes leave open, the likeliest first."""
    most_open = max((sum(size is None for size in shape[1:]) for shape in shapes), default=0)
    sizes = (*_OPEN_SIZES, *_LONG_SIZES) if most_open == 1 else _OPEN_SIZES
    return [replace(recipe, open_size=size) for size in sizes] if most_open else [recipe]


def nans(arrays: Iterable[np.ndarray]) -> int:
    """Number of NaN in some arrays."""
    return sum(int(np.isnan(array).sum()) for array in map(_numbers, arrays))


def _numbers(array: np.ndarray) -> np.ndarray:
    """An array to search for NaN: bfloat16 as float32, empty for strings and integers."""
    if array.dtype.kind in "fc":
        return array
    return array.astype(np.float32) if array.dtype.name in _FLOATS else np.zeros(0)


def random_array(
    shape: Shape, dtype: str, rng: np.random.Generator, recipe: InputRecipe
) -> np.ndarray:
    """An array for an input of this shape and dtype.

    Args:
        shape: None where a size is left open.
        dtype: the name of a dtype. float16 and bfloat16 are made as float32, to be cast.

    Raises:
        RewriteError: it cannot be made up, or would be too large for this machine.
    """
    sizes = _sizes(shape, dtype, recipe)
    if dtype == "string" and recipe.text is not None:
        strings = [recipe.text(rng) for _ in range(math.prod(sizes))]
        if recipe.has_edges and len(strings) > 1:
            strings[-1] = b""
        return np.array(strings, object).reshape(sizes)
    if dtype == "bool":
        return _with_some(rng.integers(0, 2, sizes, dtype=bool), (False, True), rng, recipe)
    if dtype in _INTEGERS:
        return _integers(sizes, dtype, rng, recipe)
    if dtype in _FLOATS:
        return _floats(sizes, np.dtype("float64" if dtype == "float64" else "float32"), rng, recipe)
    raise RewriteError(f"cannot make up inputs of dtype {dtype}. {GIVE_REAL_ONES}")


def _integers(
    sizes: list[int], dtype: str, rng: np.random.Generator, recipe: InputRecipe
) -> np.ndarray:
    end = recipe.words
    if dtype == "uint8" and recipe.top is not None:
        end = int(recipe.top) + 1  # pixels
    end = min(end, int(np.iinfo(dtype).max) + 1)
    least = 1 if recipe.manner == POSITIVE and end > 1 else 0
    array = rng.integers(least, end, sizes, dtype=dtype)
    pads = recipe.pad_id is not None and array.ndim > 1 and 0 <= recipe.pad_id < end
    if pads and array.size and recipe.has_edges:
        lengths = _lengths(sizes, recipe)
        _with_some(array[0, : lengths[0]], (0, end - 1), rng, recipe)
        return _padded(array, lengths, recipe.pad_id)
    return _with_some(array, (0, end - 1), rng, recipe)


def _floats(
    sizes: list[int], dtype: np.dtype[Any], rng: np.random.Generator, recipe: InputRecipe
) -> np.ndarray:
    if recipe.manner == POSITIVE:  # above 0, up to 1 or to the top
        return np.multiply(1 - rng.random(sizes, dtype), recipe.top or 1, dtype=dtype)
    if recipe.top is None:
        array, ends = rng.standard_normal(sizes, dtype), (-_EXTREME, _EXTREME)
    else:
        array, ends = rng.random(sizes, dtype) * dtype.type(recipe.top), (0.0, recipe.top)
    if not recipe.has_edges or not array.size:
        return array
    rows = array.reshape(-1, sizes[-1] if sizes else 1)
    if len(rows) >= _BATCH:  # where there are fewer, none is given away
        rows[rng.integers(0, len(rows), min(max(1, len(rows) // _EVERY), _MOST))] = 0
    if recipe.padding is None or array.ndim < 3 or not array.size:
        return _with_some(array, (0.0, *ends), rng, recipe)
    lengths = _lengths(sizes, recipe)
    _with_some(array[0, : lengths[0]], (0.0, *ends), rng, recipe)
    return _padded(array, lengths, recipe.padding)


def _with_some(
    array: np.ndarray, values: Sequence[Any], rng: np.random.Generator, recipe: InputRecipe
) -> np.ndarray:
    """Puts each of these values at a few places of an array; returns it."""
    if recipe.has_edges and array.size >= len(values):
        times = min(max(1, array.size // _EVERY), _MOST)
        places = rng.integers(0, array.size, times * len(values))
        # Each is there at least once: the last to be put there.
        places[-len(values) :] = rng.permutation(min(array.size, _MOST))[: len(values)]
        array.flat[places] = np.tile(np.array(values, array.dtype), times)
    return array


def _lengths(sizes: Sequence[int], recipe: InputRecipe) -> list[int]:
    """The lengths of the sequences of a batch, which differ."""
    examples, steps = sizes[:2]
    lengths = [max(1, round(steps * (examples - i) / (examples + 1))) for i in range(examples)]
    if examples > 2:
        lengths[0] = steps
    if examples > 1 and recipe.manner == WITH_EMPTY:
        lengths[-1] = 0
    return lengths


def _padded(array: np.ndarray, lengths: Sequence[int], padding: float | None) -> np.ndarray:
    for example, length in zip(array, lengths, strict=True):
        example[length:] = padding
    return array


# ------------------------------------------------------------------------------------ sizes


def _sizes(shape: Shape, dtype: str, recipe: InputRecipe) -> list[int]:
    """A shape with its open sizes filled in.

    Raises:
        RewriteError: inputs of that shape, or tensors computed from them, would be too large.
    """
    sizes = [recipe.open_size if size is None else size for size in shape]
    width = {"float64": 8, "int64": 8, "uint64": 8}.get(dtype, 4)
    if not is_open(shape):
        check_size(f"an input of the shape {sizes}", math.prod(sizes), width)
        check_size("what the model computes", recipe.largest, width)
        return sizes
    sizes[0] = recipe.batch or _BATCH
    check_size(f"an input of the shape {sizes}", math.prod(sizes), width)
    check_size("what the model computes", sizes[0] * recipe.largest, width)
    return sizes


def with_batch(recipe: InputRecipe, shapes: Iterable[Shape]) -> InputRecipe:
    """The same, with as many examples as all inputs of these shapes will have."""
    if recipe.batch is not None:
        return recipe
    sizes = [[recipe.open_size if size is None else size for size in shape[1:]] for shape in shapes]
    one = max(map(math.prod, sizes), default=1)
    few = _BATCH if one < _PICTURE else recipe.pictures
    fits = few * max(one, recipe.largest) <= _most_numbers(4)
    return replace(recipe, batch=few if fits else 1)


def check_size(what: str, numbers: int, width: int) -> None:
    """Raises RewriteError where a tensor of so many elements of a width is too large to make up."""
    if numbers > _most_numbers(width):
        raise RewriteError(
            f"{what} would take {numbers * width / 2**30:,.1f} GiB, and made-up inputs take no "
            f"more than {_most_numbers(width) * width / 2**30:,.1f} GiB on this machine. "
            f"{GIVE_REAL_ONES}"
        )


def _most_numbers(width: int) -> int:
    return min(_MOST_NUMBERS, int(MEMORY_SHARE * memory() / width))


@cache
def memory() -> int:
    """Memory of the machine, or of the container that this process runs in, in bytes."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            total = min(total, int(Path(limit).read_text()))
        except (OSError, ValueError):  # there is none, or it is "max"
            continue
    return total


# ---------------------------------------------------------------------- inputs of the caller


def is_open(shape: Any) -> bool:
    """Whether an input of this shape takes any number of examples."""
    rank = shape.rank if hasattr(shape, "rank") else len(shape)
    return rank != 0 and shape[0] is None


def of_batch(array: np.ndarray, batch: int | None) -> np.ndarray:
    """The first examples of an array, repeated if there are fewer; all if `batch` is None."""
    array = np.asarray(array)
    if batch is None or not array.ndim or not len(array):
        return array
    return np.take(array, range(batch), axis=0, mode="wrap")


def uncallable(who: str, error: Exception) -> RewriteError:
    """The error to raise where a model cannot be called."""
    if is_out_of_memory(error):
        return RewriteError(f"{who} cannot be called: out of memory. Give fewer examples")
    return RewriteError(
        f"{who} cannot be called with these inputs: {cause_of(error)} Give inputs that it "
        "takes (inputs=... in Python, --inputs on the command line)"
    )

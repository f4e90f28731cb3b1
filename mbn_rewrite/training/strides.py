"""Strides of sampled statistics: valid values, and those that a layer can use.

The statistics of a layer with strides (s1, s2, ...) along its spatial axes are those of
x[:, ::s1, ::s2, ..., :]. Neither numpy nor TensorFlow is needed here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from typing import Any

from mbn_rewrite.errors import RewriteError

# An int serves every spatial axis; a pair is (rows, columns).
Stride = int | tuple[int, int]

DEFAULT_STRIDE = 4  # the least at which large activations gain (see benchmarks/layer.py)

# The fewest positions of one example that statistics are taken from, where it has as many: with
# a batch of 32, the relative standard error of a variance is then sqrt(2 / 512), about 6%.
MIN_SAMPLES = 16
# Where a stride has to be lowered, a sample of more than this saves nothing: taking it and
# correcting the gradient there costs more than the statistics of everything (see
# benchmarks/layer.py, 7x7 and stride 2).
_WORTHWHILE = 1 / 5


def checked(stride: Any, who: str = "stride") -> Stride:
    """A stride as int or pair of ints.

    Raises:
        RewriteError: it is something else, or not positive.
    """
    if _is_positive(stride):
        return int(stride)
    is_pair = isinstance(stride, Sequence) and not isinstance(stride, str) and len(stride) == 2
    if is_pair and all(_is_positive(part) for part in stride):
        return int(stride[0]), int(stride[1])
    raise RewriteError(
        f"{who} is {stride!r}. A positive whole number is needed, or two of them for (rows, "
        "columns), such as 4 or (8, 1)"
    )


def checked_min_samples(min_samples: Any) -> int:
    """The least number of positions, as int.

    Raises:
        RewriteError: it is not a positive whole number.
    """
    if not _is_positive(min_samples):
        raise RewriteError(f"min_samples is {min_samples!r}. A positive whole number is needed")
    return int(min_samples)


def _is_positive(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) > 0


def for_layer(stride: Any, name: str) -> Stride:
    """The stride of one layer.

    Args:
        stride: for all layers alike, a mapping from layer names (1 for those it does not name),
            or a function of a layer's name.
        name: the layer's name.

    Raises:
        RewriteError: it is no stride.
    """
    if isinstance(stride, Mapping):
        stride = stride.get(name, 1)
    elif isinstance(stride, Callable):  # type: ignore[arg-type]
        stride = stride(name)
    return checked(stride, f"the stride of '{name}'")


def along_axes(stride: Stride, spatial_rank: int) -> tuple[int, ...]:
    """The stride along each spatial axis.

    Of a pair, a layer with one spatial axis takes the first, and one with three leaves its
    first axis alone: rows and columns are the last two.
    """
    if isinstance(stride, int):
        return (stride,) * spatial_rank
    if spatial_rank <= 1:
        return stride[:spatial_rank]
    return (1,) * (spatial_rank - 2) + stride


def lowered(
    strides: tuple[int, ...], sizes: Sequence[int | None], min_samples: int = MIN_SAMPLES
) -> tuple[int, ...]:
    """Strides that leave at least `min_samples` positions of each example, where there are.

    The largest strides are lowered first, together where they are equal; and all to 1 where
    that leaves more than a fifth of all positions. Where a size is not known, its axis is taken
    to be long enough.
    """
    strides = tuple(
        stride if size is None else min(stride, max(size, 1))
        for stride, size in zip(strides, sizes, strict=True)
    )
    if positions(strides, sizes) >= min_samples:
        return strides
    everything = (1,) * len(strides)
    while max(strides, default=1) > 1 and positions(strides, sizes) < min_samples:
        largest = max(strides)
        strides = tuple(stride - (stride == largest) for stride in strides)
    worthwhile = positions(strides, sizes) <= _WORTHWHILE * positions(everything, sizes)
    return strides if worthwhile else everything


def positions(strides: Sequence[int], sizes: Sequence[int | None]) -> float:
    """Number of positions sampled from one example; infinity where a size is not known."""
    if None in sizes:
        return math.inf
    return math.prod(
        -(-size // stride) for stride, size in zip(strides, sizes, strict=True) if size is not None
    )

"""Functions that take, move, reduce and pad positions, as operations of the neutral graph.

Kerases have them as functions of a tensor, with constants beside it, and TensorFlow as operations.
Here they are described by these constants, and by the shapes of what they read and give.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mbn_rewrite.ir.graph import (
    Affine,
    ChannelPreserving,
    Monotone,
    Op,
    Opaque,
    Permute,
    Reshape,
    Selection,
    Several,
    Shape,
    Total,
    ZeroPadding,
)

_BATCH = "works along the batch"
OPEN = "has arguments that are not known beforehand"
ANY = object()  # in the place of a slice: one that is not known beforehand

MINIMUM = "takes a minimum"


def whole(value: Any) -> int | None:
    """A whole number, or None."""
    is_whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    return int(value) if is_whole else None


def wholes(value: Any) -> tuple[int, ...] | None:
    """Whole numbers, of which there may be but one without brackets, or None."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    values = value if isinstance(value, (list, tuple)) else (value,)
    numbers = tuple(number for each in values if (number := whole(each)) is not None)
    return numbers if len(numbers) == len(values) else None


def axes_of(value: Any, rank: int) -> tuple[int, ...] | None:
    """Axes, counted from 0, or None."""
    numbers = wholes(value)
    if numbers is None or not all(-rank <= number < rank for number in numbers):
        return None
    return tuple(number % rank for number in numbers)


def _at_others(rank: int, axes: Sequence[int], stay: bool = True) -> tuple[tuple[int, int], ...]:
    """The axes other than these, and where they are then, whether these stay or are removed."""
    others = [axis for axis in range(1, rank) if axis not in axes]
    lost = 0 if stay else 1
    return tuple((axis, axis - lost * sum(a < axis for a in axes)) for axis in others)


# --------------------------------------------------------------------------- reductions


def mean(**where: Any) -> Op:
    """A mean over positions."""
    return Affine(**where)


def maximum(**where: Any) -> Op:
    """A maximum over positions."""
    return Monotone(**where)


def minimum(**where: Any) -> Op:
    """A minimum over positions."""
    return Monotone(**where, doing=MINIMUM)


def reduction(kind: Callable[..., Op] | None, shape: Shape, axes: Any, stay: Any) -> Op:
    """A mean, maximum or minimum over some axes, or a sum, for which there is no `kind`."""
    reduced = axes_of(axes, len(shape))
    if reduced is None or 0 in reduced:
        return Opaque("reduces over the batch")
    left = _at_others(len(shape), reduced, bool(stay))
    if not left:
        return Opaque("reduces over all channels")
    if kind is not None:
        return kind(axes=left)
    sizes = [shape[axis] for axis in set(reduced)]
    known = [size for size in sizes if size is not None]
    return Total(axes=left, count=math.prod(known) if len(known) == len(sizes) else None)


def pool(kind: Callable[..., Op], rank: int, window: Any, layout: str | None) -> Op:
    """Pooling over windows of positions.

    Args:
        kind: of operation.
        rank: of the input.
        window: its sizes, perhaps with those along the batch and the channels.
        layout: such as "NHWC" or "channels_last".
    """
    sizes = wholes(window)
    first = layout == "channels_first" or (layout or "").startswith("NC")
    axis = 1 if first and layout != "NWC" else rank - 1
    if sizes is None or (len(sizes) == rank and sizes[0] * sizes[axis] != 1):
        return Opaque("pools over channels")
    return kind(in_axis=axis, out_axis=axis)


# --------------------------------------------------------------- parts, and their order


Taken = tuple[int, int, tuple[int, ...] | None]  # as in `Selection.axes`


def _selection(axes: Sequence[Taken], why: str = _BATCH) -> Op:
    """A selection along axes, of which those of the batch do not matter."""
    left = tuple(each for each in axes if each[0] and each[1])
    return Selection(left) if left else Opaque(why)


def taken(shape: Shape, places: dict[int, Any], removed: Sequence[int] = ()) -> Op:
    """What takes some places along some axes.

    Args:
        shape: of the input.
        places: by axis, as any index of an array.
        removed: axes that the output does not have, of those.
    """
    axes: list[Taken] = []
    for axis, size in enumerate(shape):
        after = axis - sum(other < axis for other in removed)
        if axis in removed:
            continue
        if axis not in places:
            axes.append((axis, after, None))
        elif size is not None:
            axes.append((axis, after, tuple(np.arange(size)[places[axis]].tolist())))
    return _selection(axes)


def item(shape: Shape, key: Any) -> Op:
    """x[key], for slices, whole numbers, `...`, new axes and `ANY`."""
    keys = list(key) if isinstance(key, (list, tuple)) else [key]
    used = sum(part is not None and part is not Ellipsis for part in keys)
    if keys.count(Ellipsis) > 1 or used > len(shape):
        return Opaque(OPEN)
    place = keys.index(Ellipsis) if Ellipsis in keys else len(keys)
    keys[place : place + 1] = [slice(None)] * (len(shape) - used)
    axes: list[Taken] = []
    before = after = 0
    for part in keys:
        if part is None:
            after += 1
            continue
        size = shape[before]
        if part is ANY:
            after += 1
        elif isinstance(part, slice):
            if part == slice(None):
                axes.append((before, after, None))
            elif not all(each is None or whole(each) is not None for each in _ends(part)):
                return Opaque(OPEN)
            elif size is not None:
                axes.append((before, after, tuple(range(size)[part])))
            after += 1
        elif whole(part) is None:
            return Opaque(OPEN)
        before += 1
    return _selection(axes)


def _ends(part: slice) -> tuple[Any, Any, Any]:
    return part.start, part.stop, part.step


def split(shape: Shape, parts: Any, axis: Any, sizes: bool) -> Op | Several:
    """Parts along an axis.

    Args:
        shape: of the input.
        parts: their number, or else their sizes, or where they begin but the first.
        axis: along which.
        sizes: whether it is sizes that are given.
    """
    along, numbers = axes_of(axis, len(shape)), wholes(parts)
    size = shape[along[0]] if along else None
    if along is None or numbers is None or size is None:
        return Opaque(OPEN)
    if whole(parts) is not None:
        step = size // numbers[0]
        stops = [step * (i + 1) for i in range(numbers[0])]
    elif sizes:
        stops = np.cumsum(numbers).tolist()
    else:
        stops = [*numbers, size]
    starts = [0, *stops[:-1]]
    ordered = all(a <= b for a, b in zip(starts, stops, strict=True)) and min(numbers) >= 0
    if not ordered or stops[-1] != size:
        return Opaque(OPEN)
    pairs = zip(starts, stops, strict=True)
    return _all_known([taken(shape, {along[0]: slice(*pair)}) for pair in pairs])


def unstacked(shape: Shape, axis: Any) -> Op | Several:
    """The places along an axis, each as a tensor without it."""
    along = axes_of(axis, len(shape))
    if along is None or (size := shape[along[0]]) is None:
        return Opaque(OPEN)
    part = taken(shape, {along[0]: slice(0, 1)}, removed=along)
    return _all_known([part] * size)


def _all_known(ops: Sequence[Op]) -> Op | Several:
    opaque = next((op for op in ops if isinstance(op, Opaque)), None)
    return opaque or Several(tuple(ops))


def reordered(shape: Shape, axes: Any, order: Callable[[int, int], Any]) -> Op:
    """Another order of the places along some axes, or copies of them.

    Args:
        shape: of the input.
        axes: the axes.
        order: gives the places along an axis, by its number among `axes` and its size.
    """
    along = axes_of(axes, len(shape))
    if along is None or len(set(along)) != len(along):
        return Opaque(OPEN)
    sizes = {axis: shape[axis] for axis in along}
    known = {a: order(i, s) for i, (a, s) in enumerate(sizes.items()) if s is not None}
    return taken(shape, {axis: known.get(axis) for axis in along})


def rolled(shape: Shape, shift: Any, axes: Any) -> Op:
    """Places moved along some axes, and round their ends."""
    by, along = wholes(shift), axes_of(axes, len(shape))
    if by is None or along is None or len(by) != len(along):
        return Opaque(OPEN)
    return reordered(shape, axes, lambda i, size: np.roll(np.arange(size), by[i]))


def flipped(shape: Shape, axes: Any) -> Op:
    """Places in reverse along some axes."""
    return reordered(shape, axes, lambda i, size: np.arange(size)[::-1])


def repeated(shape: Shape, repeats: Any, axis: Any) -> Op:
    """Each place several times."""
    count = whole(repeats)
    if count is None:
        return Opaque(OPEN)
    return reordered(shape, axis, lambda i, size: np.repeat(np.arange(size), count))


def tiled(shape: Shape, multiples: Any) -> Op:
    """All places several times, along each axis."""
    counts = wholes(multiples)
    if counts is None or len(counts) != len(shape):
        return Opaque(OPEN)
    along = [axis for axis, count in enumerate(counts) if count != 1]
    return reordered(shape, along, lambda i, size: np.tile(np.arange(size), counts[along[i]]))


def gathered(shape: Shape, places: Any, axis: Any) -> Op:
    """The places that a list names along an axis."""
    along, numbers = axes_of(axis, len(shape)), wholes(places)
    size = shape[along[0]] if along else None
    if along is None or numbers is None or size is None or np.ndim(places) != 1:
        return Opaque(OPEN)
    if not all(0 <= number < size for number in numbers):
        return Opaque("takes places that are not there")
    return taken(shape, {along[0]: list(numbers)})


def to_depth(shape: Shape, block: Any, inverse: bool) -> Op:
    """Blocks of positions that become channels, each block with all channels, or the inverse."""
    size, channels = whole(block), shape[-1]
    if size is None or channels is None:
        return Opaque(OPEN)
    axis, blocks = len(shape) - 1, size * size
    channels = channels // blocks if inverse else channels
    chosen = tuple(np.tile(np.arange(channels), blocks).tolist())
    return Selection(((axis, axis, chosen),), inverse)


# ------------------------------------------------------------- axes, padding and sizes


def reshaped(shape: Shape, new: Shape) -> Op:
    """The same elements in another shape."""
    inner, new_inner = shape[1:], new[1:]
    known = None not in inner and None not in new_inner
    if known and math.prod(inner) == math.prod(new_inner):  # type: ignore[arg-type]
        return Reshape()
    # The batch may not stay; what has channels last on both sides only moves positions.
    if len(shape) > 1 and len(new) > 1 and shape[-1] == new[-1] is not None:
        return Affine(len(shape) - 1, len(new) - 1)
    return Opaque("mixes channels with positions")


def transposed(order: Any, rank: int) -> Op:
    """Axes in another order."""
    axes = axes_of(order, rank)
    if axes is None or sorted(axes) != list(range(rank)):
        return Opaque(OPEN)
    if axes[0] == 0:
        return Permute(axes)
    left = tuple((before, after) for after, before in enumerate(axes) if before and after)
    return Affine(axes=left) if left else Opaque("moves the batch to another axis")


def expanded(shape: Shape, axes: Any) -> Op:
    """New axes of size 1."""
    numbers = wholes(axes)
    new = axes_of(axes, len(shape) + len(numbers or ()))
    if new is None or 0 in new:
        return Opaque("moves the batch to another axis")
    old = [axis for axis in range(len(shape) + len(new)) if axis not in new]
    return Affine(axes=tuple(enumerate(old))[1:])


def squeezed(shape: Shape, axes: Any) -> Op:
    """Axes of size 1 that go."""
    gone = axes_of(axes, len(shape))
    if not gone or 0 in gone:
        return Opaque("may remove the batch")
    return Affine(axes=_at_others(len(shape), gone, stay=False))


def padded(rank: int, amounts: Any, mode: Any, value: Any) -> Op:
    """Padding by zeros, or by copies of what is there."""
    pairs = None if amounts is None else [wholes(pair) for pair in amounts]
    if pairs is None or len(pairs) != rank or None in pairs:
        return Opaque(OPEN)
    along = [axis for axis, pair in enumerate(pairs) if any(pair or ())]
    if 0 in along:
        return Opaque(_BATCH)
    kind: type[ChannelPreserving] = Affine
    if str(mode).lower() == "constant":
        kind = ZeroPadding
        if value is not None and not (np.ndim(value) == 0 and value == 0):
            return Opaque("pads with a constant")
    elif str(mode).lower() not in ("reflect", "symmetric", "edge"):
        return Opaque(OPEN)
    left = _at_others(rank, along)
    if not left:
        return Opaque("works along every axis")
    if kind is ZeroPadding:
        amounts = tuple((before, after) for before, after in filter(None, pairs))
        return ZeroPadding(axes=left, amounts=amounts)
    return kind(axes=left)


def resized(rank: int, method: Any, layout: str | None = None) -> Op:
    """A resize of images by interpolation between the nearest positions, or by the nearest one."""
    if method not in ("nearest", "bilinear"):
        return Opaque(f"interpolates by {method}")
    axis = rank - 3 if layout == "channels_first" else rank - 1
    return Affine(axis, axis)

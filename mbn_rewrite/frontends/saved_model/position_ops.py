"""Operations that pool, pad, crop, resize and move positions or axes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from mbn_rewrite.frontends.saved_model.blocks import added_zeros_are_read
from mbn_rewrite.frontends.saved_model.op_site import Answer, Site
from mbn_rewrite.ir.graph import (
    Affine,
    ChannelPreserving,
    Monotone,
    Opaque,
    Permute,
    Reshape,
    ZeroPadding,
)


def pool(kind: type[Affine] | type[Monotone]) -> Callable[[Site], Answer]:
    """A pooling operation over windows of positions, as an operation of this kind."""

    def describer(site: Site) -> Answer:
        axis = site.channel_axis
        if site.op.type.endswith("PoolV2"):
            window = site.number(1)
        else:
            window = np.asarray(site.attribute("ksize"))
        if window is None or window[axis] != 1 or window[0] != 1:
            return Opaque("pools over channels")
        return kind(axis, axis)

    return describer


def reduction(kind: type[Affine] | type[Monotone]) -> Callable[[Site], Answer]:
    """A mean or maximum over axes, as an operation of this kind."""

    def describer(site: Site) -> Answer:
        axes, rank = site.number(1), len(site.shape(0))
        if axes is None or not rank:
            return Opaque()
        reduced = {int(axis) % rank for axis in axes.reshape(-1)}
        kept = [axis for axis in range(1, rank) if axis not in reduced]
        if 0 in reduced or not kept:
            return Opaque("reduces over the batch or over all channels")
        axis = kept[-1]
        lost = 0 if site.attribute("keep_dims") else sum(r < axis for r in reduced)
        return kind(axis, axis - lost)

    return describer


def _untouched(site: Site, untouched: list[int], kind: type[ChannelPreserving]) -> Answer:
    """An operation along some axes, with the channels on one that it leaves alone."""
    axes = [axis for axis in untouched if axis > 0]
    return kind(axes[-1], axes[-1]) if axes else Opaque("works along every axis")


def pad(site: Site) -> Answer:
    """Pad, PadV2 and MirrorPad."""
    paddings = site.number(1)
    if paddings is None:
        return Opaque("pads by amounts that are computed while the model runs")
    untouched = [axis for axis, pair in enumerate(paddings) if not pair.any()]
    if 0 not in untouched:
        return Opaque("pads the batch")
    if site.op.type == "PadV2":
        value = site.number(2)
        if value is None or np.any(value != 0):
            return Opaque("pads with a constant")
    if site.op.type == "MirrorPad":
        return _untouched(site, untouched, Affine)
    answer = _untouched(site, untouched, ZeroPadding)
    if isinstance(answer, ZeroPadding):
        amounts = tuple((int(before), int(after)) for before, after in paddings)
        return replace(answer, amounts=amounts)
    return answer


def tile(site: Site) -> Answer:
    """Tile: repeats along some axes."""
    multiples = site.number(1)
    if multiples is None:
        return Opaque()
    return _untouched(site, [i for i, count in enumerate(multiples) if count == 1], Affine)


def crop(site: Site) -> Answer:
    """Slice: takes a range along some axes."""
    begin, size, shape = site.number(1), site.number(2), site.shape(0)
    if begin is None or size is None or not shape:
        return Opaque("takes a part that is computed while the model runs")
    untouched = [
        axis for axis, (b, s) in enumerate(zip(begin, size, strict=True))
        if b == 0 and s in (-1, shape[axis])
    ]  # fmt: skip
    return _untouched(site, untouched, Affine)


def strided_slice(site: Site) -> Answer:
    """StridedSlice; opaque where it adds or removes axes."""
    shape, step = site.shape(0), site.number(3)
    masks = [site.attribute(f"{name}_mask") for name in ("ellipsis", "new_axis", "shrink_axis")]
    if step is None or any(masks) or len(step) > len(shape):
        return Opaque("takes a part of it")
    begin, end = site.number(1), site.number(2)
    begins, ends = site.attribute("begin_mask"), site.attribute("end_mask")
    untouched = list(range(len(step), len(shape)))
    for axis, stride in enumerate(step):
        from_start = begins >> axis & 1 or (begin is not None and begin[axis] == 0)
        size = shape[axis]
        to_end = ends >> axis & 1 or (end is not None and size is not None and end[axis] >= size)
        if stride == 1 and from_start and to_end:
            untouched.append(axis)
    return _untouched(site, sorted(untouched), Affine)


def resize(site: Site) -> Answer:
    """A resize of images by interpolation, channels last."""
    return Affine(3, 3)


def move_blocks(site: Site) -> Answer:
    """SpaceToBatchND pads with zeros and BatchToSpaceND crops; both move blocks of positions.

    Zeros that nothing is computed from do not count.
    """
    rank, block = len(site.shape(0)), site.shape(1)
    if not block or block[0] is None or block[0] + 1 >= rank:
        return Opaque("works along every axis")
    if site.op.type == "BatchToSpaceND" or _pads_nothing(site) or not added_zeros_are_read(site):
        return Affine(rank - 1, rank - 1)
    return ZeroPadding(rank - 1, rank - 1)


def _pads_nothing(site: Site) -> bool:
    paddings = site.number(2)
    return paddings is not None and not paddings.any()


def reshape(site: Site) -> Answer:
    """Reshape; opaque where channels mix with positions."""
    before, after = site.shape(0), site.output
    if not before or not after:
        return Opaque("gives a tensor of unknown shape")
    inner, new_inner = before[1:], after[1:]
    known = None not in inner and None not in new_inner
    if known and math.prod(inner) == math.prod(new_inner):  # type: ignore[arg-type]
        return Reshape()
    # The batch may not stay; what has channels last on both sides only moves positions.
    last = after[-1] or _size_needed(site)
    if len(before) > 1 and len(after) > 1 and before[-1] == last is not None:
        return Affine(len(before) - 1, len(after) - 1)
    return Opaque("mixes channels with positions")


def _size_needed(site: Site) -> int | None:
    """The last size of a result, as the matrix that it is multiplied by requires it."""
    reader = site.function.only_reader(site.op.outputs[0])
    if reader is None or reader[0].type != "MatMul" or reader[1] != 0:
        return None
    product = Site(reader[0], site.constants)
    if product.attribute("transpose_a") or len(product.shape(1)) != 2:
        return None
    return product.shape(1)[1 if product.attribute("transpose_b") else 0]


def one_axis(site: Site) -> Answer:
    """ExpandDims and Squeeze: an axis of size 1 comes or goes, anywhere but at the batch."""
    before, after = site.shape(0), site.output
    if not before:
        return Opaque("gives a tensor of unknown shape")
    if site.op.type == "ExpandDims":
        axis = site.number(1)
        if axis is None:
            return Opaque("gives a tensor of unknown shape")
        axes = {int(axis) % len(after)}
    else:
        axes = {int(axis) % len(before) for axis in site.attribute("squeeze_dims")}
    return Opaque("adds or removes the batch") if 0 in axes or not axes else Reshape()


def transpose(site: Site) -> Answer:
    """Transpose; opaque where it moves the batch."""
    order = site.number(1)
    if order is None:
        return Opaque("transposes in an order that is computed while the model runs")
    if order[0] != 0:
        return Opaque("moves the batch to another axis")
    return Permute(tuple(int(axis) for axis in order))

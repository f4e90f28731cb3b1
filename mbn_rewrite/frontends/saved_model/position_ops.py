"""Operations that pool, pad, crop, resize and move positions or axes.

What they do to the shapes that they read is described in `ir.positions`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from mbn_rewrite.frontends.saved_model.blocks import added_zeros_are_read
from mbn_rewrite.frontends.saved_model.function_graph import source_of
from mbn_rewrite.frontends.saved_model.op_site import Answer, Described, Site
from mbn_rewrite.ir import positions
from mbn_rewrite.ir.graph import Affine, Op, Opaque, Reshape, Several, Stack, ZeroPadding

_COMPUTED = "takes a part that is computed while the model runs"


def _of(site: Site, data: int, op: Op | Several) -> Answer:
    """An operation of one of the operands."""
    return Described(op, (site.op.inputs[data],), site.op.outputs[0])


# ----------------------------------------------------------------- windows and reductions


def pool(kind: Callable[..., Op]) -> Callable[[Site], Answer]:
    """A pooling operation over windows of positions, as an operation of this kind."""

    def describer(site: Site) -> Answer:
        window = site.number(1) if site.op.type.endswith("PoolV2") else site.attribute("ksize")
        return positions.pool(kind, len(site.output), window, site.layout)

    return describer


def reduction(kind: Callable[..., Op] | None) -> Callable[[Site], Answer]:
    """A mean, maximum or minimum over axes, as an operation of this kind, or a sum."""

    def describer(site: Site) -> Answer:
        axes = site.number(1)
        if axes is None or not site.shape(0):
            return Opaque()
        return positions.reduction(kind, site.shape(0), axes, site.attribute("keep_dims"))

    return describer


def pad(site: Site) -> Answer:
    """Pad, PadV2 and MirrorPad."""
    amounts, value, mode = site.number(1), 0.0, "constant"
    if amounts is None:
        return Opaque("pads by amounts that are computed while the model runs")
    if site.op.type == "PadV2":
        number = site.number(2)
        value = math.nan if number is None else float(number.item())
    elif site.op.type == "MirrorPad":
        mode = site.attribute("mode").decode()
    return positions.padded(len(site.output), amounts, mode, value)


def resize(site: Site) -> Answer:
    """A resize of images by interpolation, channels last."""
    method = "bilinear" if site.op.type == "ResizeBilinear" else "nearest"
    return positions.resized(len(site.output), method)


# ------------------------------------------------------------------------ parts of a tensor


def slice_of(site: Site) -> Answer:
    """Slice: takes a range along some axes."""
    begins, sizes = site.numbers(1), site.numbers(2)
    if begins is None or sizes is None:
        return Opaque(_COMPUTED)
    return positions.item(site.shape(0), list(map(_range, begins, sizes, site.shape(0))))


def _range(begin: int | None, size: int | None, whole: int | None) -> Any:
    if begin is None or size is None:
        return positions.ANY
    if begin == 0 and size in (-1, whole):
        return slice(None)
    return slice(begin, None if size == -1 else begin + size)


def strided_slice(site: Site) -> Answer:
    """StridedSlice: x[begin:end:step, ..., number, None]"""
    begins, ends, steps = (site.numbers(index) for index in (1, 2, 3))
    shape = site.shape(0)
    if begins is None or ends is None or steps is None or not shape:
        return Opaque(_COMPUTED)
    kinds = ("ellipsis", "new_axis", "shrink_axis", "begin", "end")
    masks = [site.attribute(f"{kind}_mask") for kind in kinds]
    key: list[Any] = []
    for i, (begin, end, step) in enumerate(zip(begins, ends, steps, strict=True)):
        is_ellipsis, is_new, is_number, from_start, to_end = (mask >> i & 1 for mask in masks)
        if is_ellipsis or is_new:
            key.append(Ellipsis if is_ellipsis else None)
        elif is_number:
            key.append(0 if begin is None else begin)  # whichever: the axis goes
        elif step is None or (begin is None and not from_start) or (end is None and not to_end):
            key.append(positions.ANY)
        else:
            key.append(slice(None if from_start else begin, None if to_end else end, step))
    return positions.item(shape, _without_idle(key, shape))


def _without_idle(key: list[Any], shape: tuple[int | None, ...]) -> list[Any]:
    """An index in which slices of all that there is say no more than that."""
    after = key[key.index(Ellipsis) + 1 :] if Ellipsis in key else []
    axis = 0
    for i, part in enumerate(key):
        if part is Ellipsis:
            axis = len(shape) - sum(each is not None for each in after)
        elif isinstance(part, slice) and axis < len(shape) and _takes_all(part, shape[axis]):
            key[i] = slice(None)
        axis += part is not None and part is not Ellipsis
    return key


def _takes_all(part: slice, size: int | None) -> bool:
    to_end = part.stop is None or (size is not None and part.stop >= size)
    return part.start in (None, 0) and to_end and part.step == 1


def split(site: Site) -> Answer:
    """Split and SplitV, in parts of one size or of several."""
    data, axis = (1, 0) if site.op.type == "Split" else (0, 2)
    parts = site.attribute("num_split") if site.op.type == "Split" else site.number(1)
    along, shape = site.number(axis), site.shape(data)
    if along is None or parts is None or not shape:
        return Opaque(_COMPUTED)
    size = shape[along.item()]
    if not isinstance(parts, int) and size is not None and -1 in parts:
        parts = np.where(parts == -1, size - parts[parts != -1].sum(), parts)
    return _of(site, data, positions.split(shape, parts, along.item(), sizes=True))


def unpack(site: Site) -> Answer:
    """Unpack: the places along an axis, each as a tensor without it."""
    return _of(site, 0, positions.unstacked(site.shape(0), site.attribute("axis")))


def pack(site: Site) -> Answer:
    """Pack: tensors along a new axis."""
    return Stack(site.attribute("axis") % len(site.output))


def gather(site: Site) -> Answer:
    """GatherV2 of places along an axis that are always the same."""
    places, axis = _places(site), site.number(2)
    if places is None or axis is None or site.attribute("batch_dims") or not site.shape(0):
        return Opaque()
    return positions.gathered(site.shape(0), places, axis.item())


def _places(site: Site) -> Any:
    """The places that are gathered, of which Keras 3 counts negative ones from the end."""
    counted = source_of(site.op.inputs[1]).op
    if counted.type != "SelectV2":
        return site.number(1)
    is_negative = site.constants.value(counted.inputs[0])
    known = is_negative is not None and not is_negative.any()
    return site.constants.value(counted.inputs[2]) if known else None


def _in_order(function: Callable[..., Op]) -> Callable[[Site], Answer]:
    def describer(site: Site) -> Answer:
        arguments = [site.number(index) for index in range(1, len(site.op.inputs))]
        if not site.shape(0) or any(argument is None for argument in arguments):
            return Opaque("moves positions by what is computed while the model runs")
        return function(site.shape(0), *arguments)

    return describer


roll = _in_order(positions.rolled)
reverse = _in_order(positions.flipped)


def tile(site: Site) -> Answer:
    """Tile: repeats along some axes."""
    counts = site.numbers(1)
    if counts is None:
        return Opaque("repeats it as often as is computed while the model runs")
    return positions.tiled(site.shape(0), counts)


def to_depth(inverse: bool) -> Callable[[Site], Answer]:
    """SpaceToDepth, or DepthToSpace."""

    def describer(site: Site) -> Answer:
        if site.layout != "NHWC" or not site.shape(0):
            return Opaque("has its channels on another axis than the last")
        return positions.to_depth(site.shape(0), site.attribute("block_size"), inverse)

    return describer


# ---------------------------------------------------------------------- blocks and axes


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
    return positions.reshaped(before, (*after[:-1], after[-1] or _size_needed(site)))


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
    if not site.shape(0):
        return Opaque("gives a tensor of unknown shape")
    if site.op.type == "Squeeze":
        op = positions.squeezed(site.shape(0), site.attribute("squeeze_dims"))
    else:
        op = positions.expanded(site.shape(0), site.number(1))
    return op if isinstance(op, Opaque) else Reshape()


def transpose(site: Site) -> Answer:
    """Transpose; opaque where it moves channels to the axis of the batch."""
    order = site.number(1)
    if order is None:
        return Opaque("transposes in an order that is computed while the model runs")
    return positions.transposed(order, len(site.output))

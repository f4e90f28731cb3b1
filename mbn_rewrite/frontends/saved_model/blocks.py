"""Dilated convolutions that run on blocks of every other position.

    SpaceToBatchND -> convolution -> BatchToSpaceND

Zeros are added behind the positions until blocks of one size can be made of them, and as many
results are cut off. A convolution that pads nothing itself, and moves by one position, computes
result i of the positions i, i + d, i + 2d and so on: none that is kept reads an added zero where at
least as many results are cut off behind as zeros were added there, and none were added in front.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from mbn_rewrite.frontends.saved_model.function_graph import source_of
from mbn_rewrite.frontends.saved_model.op_site import Site
from mbn_rewrite.ir.channel_map import Array

_CONVOLUTIONS = {"Conv2D", "Conv3D", "DepthwiseConv2dNative"}
_LARGEST_BLOCK = 256


def added_zeros_are_read(site: Site) -> bool:
    """Whether what becomes of blocks may depend on zeros that SpaceToBatchND adds."""
    end = _put_together(site)
    block = site.number(1)
    if end is None or block is None or block.max() > _LARGEST_BLOCK:
        return True
    if block.tolist() != np.asarray(Site(end, site.constants).number(1)).tolist():
        return True
    tensors = [site.op.inputs[2], end.inputs[2]]
    shapes = _shapes_read(tensors)
    data = source_of(site.op.inputs[0])
    if any(source_of(op.inputs[0]) is not data for op in shapes):
        return True
    evaluation = site.constants.evaluation_given_shapes
    if not all(evaluation.is_fixed(tensor) for tensor in tensors):
        return True
    return not all(
        np.all(paddings[:, 0] == 0) and np.all(crops >= 0) and np.all(crops[:, 1] >= paddings[:, 1])
        for shape in _sizes(site.shape(0), int(block.max()))
        for paddings, crops in [evaluation.run(tensors, {op.name: shape for op in shapes})]
    )


def _put_together(site: Site) -> Any:
    """The BatchToSpaceND behind the convolution of the blocks, or None."""
    tensor, convolved = site.op.outputs[0], False
    while True:
        reader = site.function.only_reader(tensor)
        if reader is None or reader[1] != 0:
            return None
        op = reader[0]
        if op.type == "BatchToSpaceND":
            return op if convolved else None
        if op.type in _CONVOLUTIONS:
            if op.get_attr("padding") != b"VALID" or set(op.get_attr("strides")) != {1}:
                return None
            convolved = True
        elif op.type not in ("ExpandDims", "Squeeze"):
            return None
        tensor = op.outputs[0]


def _shapes_read(tensors: list[Any]) -> list[Any]:
    """The operations that give the shapes that tensors are computed from."""
    pending, found = [tensor.op for tensor in tensors], {}
    seen: set[str] = set()
    while pending:
        op = pending.pop()
        if op.name in seen:
            continue
        seen.add(op.name)
        if op.type == "Shape":
            found[op.name] = op
        else:
            pending += [tensor.op for tensor in op.inputs]
    return list(found.values())


def _sizes(shape: tuple[int | None, ...], block: int) -> Iterator[Array]:
    """Shapes of data, of every number of positions that blocks may leave over."""
    for size in range(2 * block, 4 * block):
        yield np.array([1, *(size if n is None else n for n in shape[1:])], np.int32)

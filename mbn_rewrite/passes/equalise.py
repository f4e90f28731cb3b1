"""Scales that are left open, chosen so that few bits hold the weights well.

Between two layers whose units nothing fixes, any positive scale of a channel is exact: the first
gives it multiplied, the second reads it divided. Where weights are rounded with one step for a
whole tensor (int8, per tensor), small channels lose most. So every scale is chosen such that the
largest weight by which a channel is given equals the largest by which it is read (cross-layer
equalisation: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias
Correction", 2019), for all layers at once, where channels are uneven enough. Factors are powers of
2, which round nothing but what leaves the range of the dtype.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from mbn_rewrite.ir.channel_map import Array
from mbn_rewrite.ir.graph import BatchNorm
from mbn_rewrite.ir.kernels import Kernel
from mbn_rewrite.passes.indexed_graph import Side
from mbn_rewrite.passes.strands import End, Strands

_ROUNDS = 40
# A step of 1/2 would make both sides of one scale equal at once; neighbours move at the same time.
_STEP = 0.25
# Standard deviation of the exponents of a value's channels. Where there is less to even out, ranges
# of activations, which become as uneven as weights become even, lose more than weights gain.
_UNEVEN = 1.0
# Exponents, from the median of the value's channels: one that little but a bias gives must not
# come to rule the range of activations.
_LARGEST = 3.0


@dataclass(frozen=True)
class _Weights:
    """Largest weights of one kernel, by channels.

    Attributes:
        kernel: its layout, with one place where the array has others than channels.
        sizes: the largest magnitudes.
        before: numbers of the scales of its input channels, or None if they are not open.
        after: likewise of its output channels.
    """

    kernel: Kernel
    sizes: Array
    before: Array | None
    after: Array | None


def factors(
    strands: Strands,
    strand: Array,
    root: Array,
    free: Array,
    scales: tuple[Array, Array],
    read: Callable[[str, str], Array],
) -> Array:
    """Factors of all scales, powers of 2; 1 where a scale is not free.

    Args:
        strands: the units of the model.
        strand: the number of each scale among those that are equal.
        root: of each number, that of its set: those are tied to one another.
        free: mask of the numbers whose set nothing fixes.
        scales: by number, p of layers that give a value and r of layers that read it.
        read: a weight, by owner and name.
    """
    p, r = (np.abs(scale) for scale in scales)
    free = free.copy()
    for total in strands.sums:
        if total.added is not None:  # a constant that is added would have to change with the scale
            free[root[strand[total.terms[0].scales]]] = False
    weights = list(_weights(strands, strand, read))
    exponent = np.zeros(len(root))
    for _ in range(_ROUNDS):
        factor = np.exp2(exponent)[root]
        given, taken = np.zeros((2, len(root)))
        for one in weights:
            outputs = None if one.after is None else (p * factor)[one.after]
            inputs = None if one.before is None else (r / factor)[one.before]
            sizes = one.kernel.scaled(one.sizes, inputs=inputs, outputs=outputs)
            if one.after is not None:
                np.maximum.at(given, root[one.after], one.kernel.largest(sizes))
            if one.before is not None:
                np.maximum.at(taken, root[one.before], one.kernel.largest_read(sizes))
        with np.errstate(all="ignore"):
            step = _STEP * np.log2(taken / given)
        exponent += np.where(np.isfinite(step) & free, step, 0.0)
    uneven = np.zeros(len(root), bool)
    for end in strands.ends:
        channels = root[strand[end.units.scales]]
        fresh = channels[~uneven[channels]]
        if len(fresh) and exponent[channels].std() >= _UNEVEN:
            middle = np.median(exponent[channels])
            exponent[fresh] = np.clip(exponent[fresh] - middle, -_LARGEST, _LARGEST)
            uneven[fresh] = True
    return np.exp2(np.where(uneven & free, np.round(exponent), 0.0))[root]


def _weights(
    strands: Strands, strand: Array, read: Callable[[str, str], Array]
) -> Iterator[_Weights]:
    """Kernels next to values whose units can be chosen."""
    ends: dict[str, dict[Side, End]] = defaultdict(dict)
    for end in strands.ends:
        if not isinstance(end.node.op, BatchNorm):
            ends[end.node.owner].setdefault(end.side, end)  # all calls have the same units
    for owner, sides in ends.items():
        op = next(iter(sides.values())).node.op
        numbers = {side: strand[end.units.scales] for side, end in sides.items()}
        for place, (kernels, _) in enumerate(op.chains):
            for i, kernel in enumerate(kernels):
                before = numbers.get(Side.BEFORE) if i == 0 and op.reads(place) else None
                is_last = i == len(kernels) - 1
                after = numbers.get(Side.AFTER) if is_last and op.gives(place) else None
                array = op.weight(owner, kernel.name, read)
                sizes = kernel.largest_by(array, {*kernel.in_dims, *kernel.out_dims})
                yield _Weights(replace(kernel, view=sizes.shape), sizes, before, after)

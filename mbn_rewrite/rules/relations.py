"""Rules for units: how operations tie the scales and origins of what they read and give.

A value x may be kept as p * (x - o), per channel, with a scale p and an origin o: the value that is
kept as 0. The identity is p = 1, o = 0. Linear layers and recurrent ones read and give values in
any units, since their weights are edited; all other operations tie them. `RELATIONS` is the whole
table. Its rows are exact: with units that satisfy them, every operation computes what it did.

A row answers with

    Ends     of weights: what they demand of the units on either side
    Tied     to the same scale on all sides, and origins that are the same, zero, or add up
    Gated    to scales that multiply
    a phrase that completes "<layer> ...": it takes nothing but the identity

To add an operation: describe it in ir/graph.py, give it a row here, say in the front ends'
op_table.py which layers it is, and add its cases to tests/keras/test_exact_motion.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from mbn_rewrite.enums import Name
from mbn_rewrite.ir.channel_map import Array, ChannelMap, reshaped
from mbn_rewrite.ir.graph import (
    Activation,
    Affine,
    Attention,
    BatchNorm,
    ChannelPreserving,
    Clip,
    Concat,
    ConstantMap,
    Input,
    Linear,
    Merge,
    MergeKind,
    Monotone,
    Op,
    Opaque,
    Permute,
    PositivelyHomogeneous,
    Recurrent,
    Reshape,
    Selection,
    Shape,
    Stack,
    Total,
    ZeroPadding,
)

OUT = -1  # slot of a node's output; its inputs are slots 0, 1, ...


@dataclass(frozen=True)
class Shapes:
    """The shapes of a node's inputs and of its first output."""

    inputs: tuple[Shape, ...]
    output: Shape

    def of(self, slot: int) -> Shape:
        return self.output if slot == OUT else self.inputs[slot]

    def with_channels(self, slot: int, axis: int, channels: int) -> Shapes:
        """These shapes, where one has so many channels on an axis."""
        known = list(self.of(slot))
        known[axis] = channels
        if slot == OUT:
            return Shapes(self.inputs, tuple(known))
        before, after = self.inputs[:slot], self.inputs[slot + 1 :]
        return Shapes((*before, tuple(known), *after), self.output)


class Origins(Name):
    """Relation between the origins of what an operation reads and gives."""

    SAME = "same"
    ZERO = "zero"
    SUM = "sum"  # that of the output is a weighted sum of the others


@dataclass(frozen=True)
class Spread:
    """Channels of another slot that are those of this one.

    Attributes:
        axis: of the other slot's channels.
        channels: how many it has.
        mine: the channels of this slot, in the order of `theirs`.
        theirs: the channels of the other slot; None for all, in order.
    """

    axis: int
    channels: int
    mine: Array
    theirs: Array | None = None


@dataclass(frozen=True)
class Tied:
    """One scale on all sides of an operation.

    Attributes:
        spread: for every slot but the one asked of, its channels.
        origins: how their origins are related.
        weights: for `Origins.SUM`, that of each input: a number, or one for each channel.
        positive: whether the scale must be positive.
        added: for `Origins.SUM`, what is added to what is kept, for each channel.
        doing: phrase on what the operation does, where it demands something.
        part: whether there are other slots, which the slots of `spread` are asked for.
    """

    spread: Mapping[int, Spread]
    origins: Origins = Origins.SAME
    weights: tuple[float | Array, ...] = ()
    positive: bool = False
    added: Array | None = None
    doing: str = ""
    part: bool = False


@dataclass(frozen=True)
class Ends:
    """Weights that are edited for the units of what they read or give.

    Attributes:
        zero: why their origin must be zero, as a phrase, or "".
        border: whether a border map serves another origin.
        positive: whether the scale must be positive, and the origin zero: by a fused activation.
    """

    zero: str = ""
    border: bool = False
    positive: bool = False


@dataclass(frozen=True)
class Gated:
    """The product of scales on the inputs is that of the output, and all origins are zero.

    Attributes:
        spread: for the output and every input but the one asked of, its channels.
        doing: phrase on what the operation does.
    """

    spread: Mapping[int, Spread]
    doing: str = "multiplies it by other values"


Relation = Ends | Tied | Gated | str
Row = Callable[..., Relation]  # of (op, shapes, slot, axis of the slot's channels)


def _channels(shapes: Shapes, slot: int, axis: int) -> int | None:
    shape = shapes.of(slot)
    return shape[axis] if axis < len(shape) else None


# ---------------------------------------------------------------------------- weights


def _linear(op: Linear, shapes: Shapes, slot: int, axis: int) -> Relation:
    """p_y (W x + b - o_y) = (p_y W / p_x) (p_x (x - o_x)) + p_y (W o_x + b - o_y)

    W o_x depends on the position where zeros are read: a border map. A fused activation works on
    the output, as it does alone. The rows of a table are y itself: p_y (row - o_y).
    """
    if slot == OUT:
        if op.out_axis is None:
            return "gives several axes of channels"
        if axis != op.out_axis:
            return f"has its output channels on axis {op.out_axis}, not on axis {axis}"
        if op.activation is Activation.OTHER:
            return "applies a fused activation"
        fused = op.activation is Activation.HOMOGENEOUS
        return Ends("applies a fused activation" if fused else "", positive=fused)
    if slot != 0:
        return "reads it beside its data"
    if axis != op.in_axis:
        return f"does not have its input channels on axis {axis} alone"
    return Ends(op.uneven if op.pads else "", border=op.pads and bool(op.windows))


def _recurrent(op: Recurrent, shapes: Shapes, slot: int, axis: int) -> Relation:
    """As a linear layer reads it; only the sequence itself is multiplied by the input kernel."""
    if slot == OUT:
        return Opaque().why
    if slot != 0:
        return "reads it as a state"
    if axis != op.in_axis:
        return f"has its features on axis {op.in_axis}, not on axis {axis}"
    return Ends(op.uneven)


def _attention(op: Attention, shapes: Shapes, slot: int, axis: int) -> Relation:
    """As linear layers, with what lies between the two left alone."""
    if axis != op.axis:
        return f"has its channels on axis {op.axis}, not on axis {axis}"
    if slot != OUT and not op.projections:
        return "attends to several values, or is called several times"
    return Ends()


def _batch_norm(op: BatchNorm, shapes: Shapes, slot: int, axis: int) -> Relation:
    """One that stays is a linear layer of one weight per channel."""
    if op.map is None:
        return f"has to stay ({op.reason})"
    if op.map.axis != axis:
        return f"normalises axis {op.map.axis}, not axis {axis}"
    return Ends()


# ------------------------------------------------------------- one value in, one value out


def _unary(
    op: ChannelPreserving,
    shapes: Shapes,
    slot: int,
    axis: int,
    origins: Origins = Origins.SAME,
    positive: bool = False,
    doing: str = "",
) -> Relation:
    """f(p (x - o)) = p (f(x) - o), where the demands are met"""
    if slot > 0:
        return "reads it beside its data"
    other = 0 if slot == OUT else OUT
    own, moved = (op.out_axis, op.in_axis) if slot == OUT else (op.in_axis, op.out_axis)
    if own is not None and axis != own:
        return f"has its channels on axis {own}, not on axis {axis}"
    if op.axes:
        across = {(b if slot == OUT else a): (a if slot == OUT else b) for a, b in op.axes}
        if axis not in across:
            return f"works along axis {axis}"
        moved = across[axis]
    moved = axis if moved is None else moved
    channels = _channels(shapes, slot, axis)
    if channels is None or _channels(shapes, other, moved) not in (None, channels):
        return "gives another number of channels than it reads"
    return Tied(
        {other: Spread(moved, channels, np.arange(channels))},
        origins=origins,
        positive=positive,
        doing=doing,
    )


def _affine(op: Affine, shapes: Shapes, slot: int, axis: int) -> Relation:
    """Weighted means, selections and copies of positions keep both."""
    return _unary(op, shapes, slot, axis)


def _monotone(op: Monotone, shapes: Shapes, slot: int, axis: int) -> Relation:
    """max (p (x - o)) = p (max x - o), where p > 0"""
    return _unary(op, shapes, slot, axis, positive=True, doing=op.doing)


def _total(op: Total, shapes: Shapes, slot: int, axis: int) -> Relation:
    """sum of p (x - o) = p (sum of x - n o), for n terms"""
    if op.count is None:
        doing = "adds up an unknown number of positions"
        return _unary(op, shapes, slot, axis, Origins.ZERO, doing=doing)
    relation = _unary(op, shapes, slot, axis, Origins.SUM, doing="adds up positions")
    return replace(relation, weights=(float(op.count),)) if isinstance(relation, Tied) else relation


def _constant_map(op: ConstantMap, shapes: Shapes, slot: int, axis: int) -> Relation:
    """a p (x - o) + b = p (a x + b - (a o + b - b / p))"""
    relation = _unary(op, shapes, slot, axis, Origins.SUM, doing="adds constants to it")
    if not isinstance(relation, Tied):
        return relation
    added = np.broadcast_to(op.shift, relation.spread[0 if slot == OUT else OUT].channels)
    return replace(relation, weights=(op.scale,), added=added if added.any() else None)


def _zero_padding(op: ZeroPadding, shapes: Shapes, slot: int, axis: int) -> Relation:
    """A zero stays a zero where o = 0."""
    return _unary(op, shapes, slot, axis, Origins.ZERO, doing="pads with zeros")


def _homogeneous(op: PositivelyHomogeneous, shapes: Shapes, slot: int, axis: int) -> Relation:
    """f(p x) = p f(x), where p > 0"""
    return _unary(op, shapes, slot, axis, Origins.ZERO, positive=True, doing="is an activation")


def _clip(op: Clip, shapes: Shapes, slot: int, axis: int) -> Relation:
    """max(p x, 0) = p max(x, 0), where p > 0; see `clipped` for other bounds"""
    if not op.is_homogeneous:
        return op.why
    return _unary(op, shapes, slot, axis, Origins.ZERO, positive=True, doing="is an activation")


def clipped(op: Clip, shapes: Shapes, slot: int, axis: int, positive: bool) -> Relation:
    """Relation of a clip whose bounds move with its units, so that origins need not be zero.

    min(max(p (x - o), p (lower - o)), p (upper - o)) = p (min(max(x, lower), upper) - o), where
    p > 0. Where p < 0 the bounds change places.

    Args:
        positive: whether scales must be positive nevertheless, so that one bound stays one.
    """
    return _unary(op, shapes, slot, axis, positive=positive, doing="is an activation")


def _reshape(op: Reshape, shapes: Shapes, slot: int, axis: int) -> Relation:
    """The same elements; channels must be kept apart."""
    shape, new = (
        (shapes.output, shapes.inputs[0]) if slot == OUT else (shapes.inputs[0], shapes.output)
    )
    channels = shape[axis]
    if channels is None:
        return "mixes channels with positions"
    numbers = ChannelMap(np.arange(channels, dtype=np.float64), np.zeros(channels), axis)
    moved = reshaped(numbers, shape, new)
    if moved is None:
        return "mixes channels with positions"
    spread = Spread(moved.axis, moved.channels, moved.scale.astype(np.intp))
    return Tied({0 if slot == OUT else OUT: spread})


def _selection(op: Selection, shapes: Shapes, slot: int, axis: int) -> Relation:
    """The same elements; channels that are not taken have no part in it."""
    if slot > 0:
        return "reads it beside its data"
    whole = OUT if op.inverse else 0
    for before, after, chosen in op.axes:
        own, moved = (after, before) if slot == OUT else (before, after)
        if axis != own:
            continue
        other, channels = 0 if slot == OUT else OUT, _channels(shapes, slot, axis)
        places = np.arange(channels or 0) if chosen is None else np.asarray(chosen, np.intp)
        if channels is None or (chosen is not None and shapes.of(whole)[moved] is None):
            return "has an unknown number of channels"
        if slot == whole or chosen is None:
            return Tied({other: Spread(moved, len(places), places)})
        count = shapes.of(whole)[moved] or 0
        return Tied({other: Spread(moved, count, np.arange(channels), places)})
    return f"takes or moves parts along axis {axis}"


def _permute(op: Permute, shapes: Shapes, slot: int, axis: int) -> Relation:
    """Channels are the same channels on another axis."""
    moved = op.order[axis] if slot == OUT else op.order.index(axis)
    channels = _channels(shapes, slot, axis)
    if channels is None:
        return "has an unknown number of channels"
    return Tied({0 if slot == OUT else OUT: Spread(moved, channels, np.arange(channels))})


# -------------------------------------------------------------------------------- merges


def _merge(op: Merge, shapes: Shapes, slot: int, axis: int) -> Relation:
    """p (a - o_a) + p (b - o_b) = p (a + b - (o_a + o_b)), and likewise for the other kinds"""
    rank, channels = len(shapes.output), shapes.of(slot)[axis]
    if op.kind is MergeKind.MULTIPLY:
        return _gate(shapes, slot, axis)
    if any(len(shape) != rank or shape[axis] != channels for shape in shapes.inputs):
        return "repeats one of its inputs over the channels"
    if channels is None:
        return "has an unknown number of channels"
    others = [i for i in range(OUT, len(shapes.inputs)) if i != slot]
    spread = {other: Spread(axis, channels, np.arange(channels)) for other in others}
    count = len(shapes.inputs)
    match op.kind:
        case MergeKind.ADD:
            return Tied(spread, Origins.SUM, (1.0,) * count)
        case MergeKind.SUBTRACT:
            return Tied(spread, Origins.SUM, (1.0,) + (-1.0,) * (count - 1))
        case MergeKind.AVERAGE:
            return Tied(spread, Origins.SUM, (1.0 / count,) * count)
        case MergeKind.MAXIMUM | MergeKind.MINIMUM:
            return Tied(spread, positive=True, doing=f"takes a {op.kind}")


def _gate(shapes: Shapes, slot: int, axis: int) -> Relation:
    """p_a a * p_b b = (p_a p_b) (a * b)"""
    rank, channels = len(shapes.output), _channels(shapes, OUT, axis)
    if channels is None or any(len(shape) != rank for shape in shapes.inputs):
        return "multiplies values of different ranks, or of unknown numbers of channels"
    if shapes.of(slot)[axis] != channels:
        return "multiplies all channels by it"
    # An input that is the same for all channels keeps the identity, since nothing asks more of it.
    others = [i for i in range(OUT, len(shapes.inputs)) if i != slot]
    alike = [i for i in others if shapes.of(i)[axis] == channels]
    return Gated({i: Spread(axis, channels, np.arange(channels)) for i in alike})


def _concat(op: Concat, shapes: Shapes, slot: int, axis: int) -> Relation:
    """Each input has its own channels of the output, or all of them."""
    others = [i for i in range(OUT, len(shapes.inputs)) if i != slot]
    if axis != op.axis:
        sizes = {shapes.of(i)[axis] for i in (slot, *others)}
        channels = sizes.pop()
        if sizes or channels is None:
            return "joins inputs of unknown numbers of channels"
        return Tied({i: Spread(axis, channels, np.arange(channels)) for i in others})
    sizes_in = [shape[axis] for shape in shapes.inputs]
    if None in sizes_in:
        return "joins inputs of unknown numbers of channels"
    starts = np.cumsum([0, *(size or 0 for size in sizes_in)])
    total = int(starts[-1])
    if slot == OUT:
        spans = enumerate(pairwise(starts.tolist()))
        return Tied({i: Spread(axis, b - a, np.arange(a, b)) for i, (a, b) in spans})
    start, stop = int(starts[slot]), int(starts[slot + 1])
    own = np.arange(stop - start)
    return Tied({OUT: Spread(axis, total, own, np.arange(start, stop))}, part=True)


def _stack(op: Stack, shapes: Shapes, slot: int, axis: int) -> Relation:
    """All inputs have the channels of the output, which lie behind the new axis or before it."""
    if slot == OUT and axis == op.axis:
        return "joins its inputs along the axis of the channels"
    inner = axis - 1 if slot == OUT and axis > op.axis else axis
    outer = inner + 1 if inner >= op.axis else inner
    others = [i for i in range(OUT, len(shapes.inputs)) if i != slot]
    channels = _channels(shapes, slot, axis)
    if channels is None:
        return "joins inputs of unknown numbers of channels"
    own = np.arange(channels)
    return Tied({i: Spread(outer if i == OUT else inner, channels, own) for i in others})


# --------------------------------------------------------------------------- what blocks


def _opaque(op: Opaque, shapes: Shapes, slot: int, axis: int) -> Relation:
    """Nothing is known of it, so nothing is claimed."""
    return op.why


def _input(op: Input, shapes: Shapes, slot: int, axis: int) -> Relation:
    return "is an input of the model"


RELATIONS: dict[type[Op], Row] = {
    Linear: _linear,
    Recurrent: _recurrent,
    Attention: _attention,
    BatchNorm: _batch_norm,
    Affine: _affine,
    Monotone: _monotone,
    Total: _total,
    ConstantMap: _constant_map,
    ZeroPadding: _zero_padding,
    PositivelyHomogeneous: _homogeneous,
    Clip: _clip,
    Reshape: _reshape,
    Selection: _selection,
    Permute: _permute,
    Merge: _merge,
    Concat: _concat,
    Stack: _stack,
    Input: _input,
    Opaque: _opaque,
}

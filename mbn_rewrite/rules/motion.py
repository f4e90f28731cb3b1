"""Rules for per-channel affine maps: operations that they pass, and operations that absorb them.

`RULES` is the whole table. For each kind of operation it has two rules:

    backward(op, m, shapes): the operation is followed by the map m. What maps of its
        inputs do the same?
    forward(op, m, shapes, position): the input at `position` is preceded by m. What map of
        the output does the same?

A rule answers `Absorb` (the operation's weights take it), `Through` (it moves on) or
`Blocked` with a phrase that completes "<layer> ...". Rules are exact or they decline. Their
docstrings say why they are exact, with s and t for the scale and shift of m.

To add an operation: describe it in graph.py, give it two rules here, say in the front ends'
op_table.py which layers it is, and add its cases to tests/keras/test_exact_motion.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from mbn_rewrite.ir.channel_map import ChannelMap, reshaped
from mbn_rewrite.ir.graph import (
    Activation,
    Affine,
    BatchNorm,
    ChannelPreserving,
    Clip,
    Concat,
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
    Shape,
    ZeroPadding,
)


@dataclass(frozen=True)
class Absorb:
    """The operation's weights take the map: nothing is left of it."""


@dataclass(frozen=True)
class Through:
    """The map moves on.

    Attributes:
        maps: backward, a map for every input; forward, one map for the output.
        shift_once: every input must take its scale, but only one of them its shift.
    """

    maps: tuple[ChannelMap, ...]
    shift_once: bool = False


@dataclass(frozen=True)
class Blocked:
    """The map cannot pass, and why.

    Attributes:
        reason: a phrase that completes "<layer> ...".
        border: whether the operation could absorb it by adding a border map.
    """

    reason: str
    border: bool = False


Outcome = Absorb | Through | Blocked


@dataclass(frozen=True)
class Shapes:
    """The shapes of a node's inputs and of its first output."""

    inputs: tuple[Shape, ...]
    output: Shape


@dataclass(frozen=True)
class Rule:
    """Rule for moving a map past one kind of operation; see the module's first paragraph."""

    backward: Callable[..., Outcome]
    forward: Callable[..., Outcome]


# ------------------------------------------------------------------ weights that absorb


def _into_outputs(op: Linear, m: ChannelMap, shapes: Shapes) -> Outcome:
    """s (W x + b) + t = (s W) x + (s b + t)"""
    if m.axis != op.out_axis:
        return Blocked(f"has its output channels on axis {op.out_axis}, not on axis {m.axis}")
    if op.activation is Activation.LINEAR:
        return Absorb()
    if op.activation is Activation.HOMOGENEOUS:
        return _unless(m, "applies a fused activation", no_shift=True, no_negative=True) or Absorb()
    return Blocked("applies a fused activation")


def _into_inputs(op: Linear, m: ChannelMap, shapes: Shapes, position: int) -> Outcome:
    """W (s x + t) + b = (W s) x + (W t + b), if every output reads only real inputs

    Otherwise W t depends on the position: a border map.
    """
    if m.axis != op.in_axis:
        return Blocked(f"does not have its input channels on axis {m.axis} alone")
    blocked = _unless(m, op.uneven, no_shift=True) if op.pads else None
    return replace(blocked, border=bool(op.windows)) if blocked else Absorb()


def _into_recurrent_inputs(op: Recurrent, m: ChannelMap, shapes: Shapes, position: int) -> Outcome:
    """As for a linear layer; only the sequence itself is multiplied by the input kernel."""
    if position != 0:
        return Blocked("reads it as a state")
    if m.axis != op.in_axis:
        return Blocked(f"has its features on axis {op.in_axis}, not on axis {m.axis}")
    return Absorb()


def _into_batch_norm(
    op: BatchNorm, m: ChannelMap, shapes: Shapes, position: int | None = None
) -> Outcome:
    """Two maps in a row are one."""
    if op.map is None:
        return Blocked(f"has to stay ({op.reason})")
    if op.map.axis != m.axis:
        return Blocked(f"normalises axis {op.map.axis}, not axis {m.axis}")
    return Absorb()


# --------------------------------------------------------------------- what lets it pass


def _unless(
    m: ChannelMap, doing: str, *, no_shift: bool = False, no_negative: bool = False
) -> Blocked | None:
    """Blocked where the map has what it must not have."""
    if no_shift and m.has_shift:
        return Blocked(f"{doing}, which a shift cannot pass")
    if no_negative and m.has_negative_scale:
        count = int(np.sum(m.scale < 0))
        return Blocked(
            f"{doing}, which a negative scale cannot pass ({count} of {m.channels} channels)"
        )
    return None


def _channel_preserving(doing: str = "", no_shift: bool = False, no_negative: bool = False) -> Rule:
    """f(s x + t) = s f(x) + t, for the maps that the operation allows"""

    def condition(m: ChannelMap, axis: int | None) -> Blocked | None:
        if axis is not None and m.axis != axis:
            return Blocked(f"has its channels on axis {axis}, not on axis {m.axis}")
        return _unless(m, doing, no_shift=no_shift, no_negative=no_negative)

    def moved(m: ChannelMap, axis: int | None) -> Through:
        return Through((m if axis is None else m.on_axis(axis),))

    def backward(op: ChannelPreserving, m: ChannelMap, shapes: Shapes) -> Outcome:
        return condition(m, op.out_axis) or moved(m, op.in_axis)

    def forward(op: ChannelPreserving, m: ChannelMap, shapes: Shapes, position: int) -> Outcome:
        if position != 0:
            return Blocked("reads it beside its data")
        return condition(m, op.in_axis) or moved(m, op.out_axis)

    return Rule(backward, forward)


def _clip_backward(op: Clip, m: ChannelMap, shapes: Shapes) -> Outcome:
    """max(s x, 0) = s max(x, 0) where s >= 0; any other bound would have to move along."""
    if not op.is_homogeneous:
        return Blocked(op.why)
    return RULES[PositivelyHomogeneous].backward(op, m, shapes)


def _clip_forward(op: Clip, m: ChannelMap, shapes: Shapes, position: int) -> Outcome:
    """See `_clip_backward`."""
    if not op.is_homogeneous:
        return Blocked(op.why)
    return RULES[PositivelyHomogeneous].forward(op, m, shapes, position)


def _reshape(m: ChannelMap, shape: Shape, new_shape: Shape) -> Outcome:
    """A map per channel stays one where the reshape keeps channels apart."""
    result = reshaped(m, shape, new_shape)
    return Through((result,)) if result else Blocked("mixes channels with positions")


def _reshape_backward(op: Reshape, m: ChannelMap, shapes: Shapes) -> Outcome:
    """Undoing a reshape is a reshape."""
    return _reshape(m, shapes.output, shapes.inputs[0])


def _reshape_forward(op: Reshape, m: ChannelMap, shapes: Shapes, position: int) -> Outcome:
    """See `_reshape`."""
    return _reshape(m, shapes.inputs[0], shapes.output)


def _permute_backward(op: Permute, m: ChannelMap, shapes: Shapes) -> Outcome:
    """Channels are the same channels on another axis."""
    return Through((m.on_axis(op.order[m.axis]),))


def _permute_forward(op: Permute, m: ChannelMap, shapes: Shapes, position: int) -> Outcome:
    """See `_permute_backward`."""
    return Through((m.on_axis(op.order.index(m.axis)),))


# -------------------------------------------------------------------------------- merges


def _merge_backward(op: Merge, m: ChannelMap, shapes: Shapes) -> Outcome:
    """s (a + b) + t = (s a + t) + s b, and likewise for the other kinds"""
    rank = len(shapes.output)
    if any(len(shape) != rank or shape[m.axis] != m.channels for shape in shapes.inputs):
        return Blocked("repeats one of its inputs over the channels")
    count = len(shapes.inputs)
    match op.kind:
        case MergeKind.ADD:
            return Through((m,) * count, shift_once=True)
        case MergeKind.SUBTRACT:
            return Through((m,) + (m.without_shift(),) * (count - 1))
        case MergeKind.MAXIMUM | MergeKind.MINIMUM:
            blocked = _unless(m, f"takes a {op.kind}", no_negative=True)
            return blocked or Through((m,) * count)
        case MergeKind.AVERAGE:
            return Through((m,) * count)


def _merge_forward(op: Merge, m: ChannelMap, shapes: Shapes, position: int) -> Outcome:
    """(s a + t) + b is no scaled a + b."""
    return Blocked("joins it with values that do not have its scale")


def _channel_starts(op: Concat, shapes: Shapes) -> list[int] | None:
    """First channel of each input, or None where sizes are not known."""
    starts = [0]
    for shape in shapes.inputs:
        size = shape[op.axis]
        if size is None:
            return None
        starts.append(starts[-1] + size)
    return starts


def _concat_backward(op: Concat, m: ChannelMap, shapes: Shapes) -> Outcome:
    """Each input takes its own channels of the map, or all of it."""
    if m.axis != op.axis:
        return Through((m,) * len(shapes.inputs))
    starts = _channel_starts(op, shapes)
    if starts is None:
        return Blocked("joins inputs of unknown numbers of channels")
    return Through(tuple(m.part(*span) for span in pairwise(starts)))


def _concat_forward(op: Concat, m: ChannelMap, shapes: Shapes, position: int) -> Outcome:
    """The other channels take the identity."""
    if m.axis != op.axis:
        return Blocked("joins it, along another axis, with values that do not have its scale")
    starts = _channel_starts(op, shapes)
    if starts is None:
        return Blocked("joins inputs of unknown numbers of channels")
    return Through((m.widened(starts[position], starts[-1]),))


# --------------------------------------------------------------------------- what blocks


def _opaque(
    op: Opaque | Input | Recurrent, m: ChannelMap, shapes: Shapes, position: int | None = None
) -> Outcome:
    """Nothing is known of it, so nothing is claimed."""
    if isinstance(op, Input):
        return Blocked("is an input of the model")
    return Blocked(op.why if isinstance(op, Opaque) else Opaque().why)


RULES: dict[type[Op], Rule] = {
    # operation              followed by a map      preceded by a map
    Linear: Rule(_into_outputs, _into_inputs),
    Recurrent: Rule(_opaque, _into_recurrent_inputs),
    BatchNorm: Rule(_into_batch_norm, _into_batch_norm),
    Affine: _channel_preserving(),
    Monotone: _channel_preserving("takes a maximum", no_negative=True),
    ZeroPadding: _channel_preserving("pads with zeros", no_shift=True),
    PositivelyHomogeneous: _channel_preserving("is an activation", no_shift=True, no_negative=True),
    Clip: Rule(_clip_backward, _clip_forward),
    Reshape: Rule(_reshape_backward, _reshape_forward),
    Permute: Rule(_permute_backward, _permute_forward),
    Merge: Rule(_merge_backward, _merge_forward),
    Concat: Rule(_concat_backward, _concat_forward),
    Input: Rule(_opaque, _opaque),
    Opaque: Rule(_opaque, _opaque),
}

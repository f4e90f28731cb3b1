"""TimeDistributed layers as operations of the neutral graph: what they wrap, an axis later."""

from __future__ import annotations

from dataclasses import replace

from mbn_rewrite.frontends.keras_common.calls import Call
from mbn_rewrite.ir.graph import (
    Affine,
    Chain,
    ChannelPreserving,
    Clip,
    Linear,
    Op,
    Opaque,
    Permute,
    PositivelyHomogeneous,
    Recurrent,
    Reshape,
    Several,
)


def time_distributed(call: Call) -> Op:
    """A layer that is applied at every time step."""
    inner = call.layer.layer
    describer = call.keras.describers.get(type(inner))
    if describer is None or len(call.inputs) != 1:
        return Opaque()
    step = tuple(shape[:1] + shape[2:] for shape in (*call.inputs, call.output))
    within = Call(call.keras, inner, step[:-1], step[-1], call.training, sizes_hold=call.sizes_hold)
    special = call.keras.describe(within)
    op = describer(within) if special is None else special
    return Opaque() if isinstance(op, Several) else _an_axis_later(op)


def steps_as_examples(rank: int) -> Affine:
    """Values of so many axes, with time steps as further examples."""
    return Affine(axes=tuple((axis, axis - 1) for axis in range(2, rank)))


def examples_as_steps(rank: int) -> Affine:
    """The inverse, for values that have so many axes then."""
    return Affine(axes=tuple((axis - 1, axis) for axis in range(2, rank)))


def _an_axis_later(op: Op) -> Op:
    """An operation on each step, as one on all of them; its weights are those of `layer`."""
    match op:
        case Opaque() | Reshape():
            return op
        case Linear():
            if op.bias_doubt:  # no layer that stands for it can add the bias
                return Opaque(op.bias_doubt)
            ((kernels, bias),) = map(_within, op.chains)
            before, after = _later(op.in_axis), _later(op.out_axis)
            return replace(
                op, kernels=kernels, bias=bias, windows=(), in_axis=before, out_axis=after
            )
        case Recurrent():
            return replace(op, branches=tuple(map(_within, op.branches)), in_axis=op.in_axis + 1)
        case Permute():
            return Permute((0, 1, *(axis + 1 for axis in op.order[1:])))
        case Clip():
            return PositivelyHomogeneous() if op.is_homogeneous else Opaque(op.why)
        case ChannelPreserving():
            pairs = tuple((before + 1, after + 1) for before, after in op.axes)
            return replace(op, in_axis=_later(op.in_axis), out_axis=_later(op.out_axis), axes=pairs)
    return Opaque()


def _later(axis: int | None) -> int | None:
    return None if axis is None else axis + 1


def _within(chain: Chain) -> Chain:
    kernels, bias = chain
    named = tuple(replace(kernel, name=f"layer.{kernel.name}") for kernel in kernels)
    return named, bias and f"layer.{bias}"

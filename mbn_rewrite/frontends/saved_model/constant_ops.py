"""Arithmetic of a tensor and something that is the same in every run, and clips by numbers."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from mbn_rewrite.frontends.saved_model.op_site import Answer, Described, Site
from mbn_rewrite.ir.channel_map import Array
from mbn_rewrite.ir.constants import Arithmetic, constant_map, with_constant
from mbn_rewrite.ir.graph import Merge, MergeKind, Op, Opaque, clip

_MERGES = {
    Arithmetic.ADD: MergeKind.ADD,
    Arithmetic.SUBTRACT: MergeKind.SUBTRACT,
    Arithmetic.MULTIPLY: MergeKind.MULTIPLY,
}


def arithmetic(kind: Arithmetic) -> Callable[[Site], Answer]:
    """Arithmetic of two tensors, of which one may be the same in every run."""

    def describer(site: Site) -> Answer:
        if not site.op.outputs[0].dtype.is_floating:
            return Opaque()
        found = _beside_constant(site)
        if found is None:
            return Merge(_MERGES[kind]) if kind in _MERGES else Opaque("divides by it")
        data, value, comes_first = found
        if site.op.type == "BiasAdd":
            value = value.reshape((-1,) + (1,) * (len(site.output) - 1 - site.channel_axis))
        if site.shape(data) != site.output:
            return Opaque("adds axes to it, or repeats it along some")
        return _of(site, data, with_constant(kind, value, comes_first, site.output))

    return describer


def negative(site: Site) -> Answer:
    """Neg."""
    return (
        constant_map(-1.0, 0.0, site.output) if site.op.outputs[0].dtype.is_floating else Opaque()
    )


def extremum(kind: MergeKind) -> Callable[[Site], Answer]:
    """Maximum or Minimum of two tensors, of which one may be a number."""

    def describer(site: Site) -> Answer:
        if not site.op.outputs[0].dtype.is_floating:
            return Opaque()
        found = _beside_constant(site)
        if found is None:
            return Merge(kind)
        data, value, _ = found
        if value.size != 1 or site.shape(data) != site.output:
            return Opaque("compares it with several numbers")
        bound, dtype = float(value.item()), site.op.outputs[0].dtype
        if kind is MergeKind.MAXIMUM:
            return _of(site, data, clip(bound if bound > dtype.min else -math.inf, math.inf))
        return _of(site, data, clip(-math.inf, bound if bound < dtype.max else math.inf))

    return describer


def clip_by_value(site: Site) -> Answer:
    """ClipByValue, where the bounds are numbers."""
    bounds = [site.constants.value(tensor) for tensor in site.op.inputs[1:]]
    if any(bound is None or bound.size != 1 for bound in bounds):
        return Opaque()
    lower, upper = (float(np.asarray(bound).item()) for bound in bounds)
    return clip(lower, upper)


def _beside_constant(site: Site) -> tuple[int, Array, bool] | None:
    """The operand that is data, the value of the other, and whether that comes first."""
    for data, other in ((0, 1), (1, 0)):
        value = site.constants.value(site.op.inputs[other])
        if value is not None:
            return data, value, other == 0
    return None


def _of(site: Site, data: int, op: Op) -> Described:
    return Described(op, (site.op.inputs[data],), site.op.outputs[0])

"""Pass that puts training layers with statistics of a sample in place of BatchNormalizations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mbn_rewrite.errors import RewriteError
from mbn_rewrite.ir.graph import BatchNorm, Graph, Shape
from mbn_rewrite.ir.reasons import Change
from mbn_rewrite.passes.wording import listed, sentence, stride_in_words
from mbn_rewrite.plans import Decision, Fate, Plan, Sample
from mbn_rewrite.training import strides


def plan_training(graph: Graph, mode: str, stride: Any) -> Plan:
    """Puts a training layer in the place of each BatchNormalization that it can serve.

    Raises:
        RewriteError: what was given is no stride, or names layers that there are not.
    """
    decisions: dict[str, Decision] = {}
    samples: dict[str, Sample] = {}
    sites: list[tuple[str, BatchNorm, Shape | None]] = [
        (node.owner, node.op, graph.values[node.inputs[0]].shape)
        for node in graph.nodes
        if isinstance(node.op, BatchNorm)
    ] + [(hidden.owner, hidden.op, None) for hidden in graph.hidden]
    _check_names(stride, [owner for owner, _, _ in sites])
    holders = {node.owner: node.caller for node in graph.nodes if node.caller}
    holders |= {hidden.owner: hidden.holder for hidden in graph.hidden}
    kept: dict[str, str] = {}  # for what is said of any call
    for owner, op, shape in sites:
        reason = op.why_not(Change.SAMPLE)
        why = reason.in_training if reason else _unsampled_axis(op.axis, shape)
        if why:
            kept.setdefault(owner, why)
    for owner, op, shape in sites:
        if owner in decisions:
            continue
        wanted = strides.for_layer(stride, owner)
        if owner in kept:
            decisions[owner] = Decision(owner, Fate.KEPT, reason=sentence(kept[owner]))
            continue
        samples[owner] = Sample(wanted, depthwise=mode == Fate.MBN)
        note = f"Stride {stride_in_words(wanted)}{_lowering(wanted, op.axis, shape)}."
        if owner in holders:
            note += (
                f" {holders[owner]} makes a BatchNormalization again when it is loaded from a file:"
                " save weights, and convert what is loaded."
            )
        decisions[owner] = Decision(owner, Fate(mode), (owner,), note)
    return Plan(mode, tuple(decisions.values()), samples)


def _check_names(stride: Any, owners: list[str]) -> None:
    """Raises RewriteError where strides are given for layers that there are not."""
    unknown = sorted(set(stride) - set(owners)) if isinstance(stride, Mapping) else []
    if unknown:
        there_is = listed(sorted(set(owners)), most=20) if owners else "none"
        raise RewriteError(
            f"strides are given for {listed(unknown)}, which is no BatchNormalization of the "
            f"model. There is {there_is}"
        )


def _unsampled_axis(axis: int | None, shape: Shape | None) -> str:
    """Why a training layer cannot serve an axis, or ""."""
    if axis is None or shape is None or axis in (1, len(shape) - 1):
        return ""
    return f"it normalises along axis {axis}, which is neither 1 nor the last"


def _lowering(stride: strides.Stride, axis: int | None, shape: Shape | None) -> str:
    """Note on how a training layer lowers a stride for small inputs, or ""."""
    if axis is None or shape is None:
        return ""
    sizes = [size for i, size in enumerate(shape) if i not in (0, axis)]
    along = strides.along_axes(stride, len(sizes))
    lowered = strides.lowered(along, sizes)
    if not sizes:
        return ", but there are no positions to sample: its input has rank 2"
    if None in sizes:
        return ", not lowered where the model leaves sizes open"
    if strides.positions(along, sizes) == strides.positions(lowered, sizes):
        return ""
    size = " x ".join(map(str, sizes))
    return f", lowered to {stride_in_words(lowered)}: its input of {size} positions is small"

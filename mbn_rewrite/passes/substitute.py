"""Pass that puts another layer in the place of a BatchNormalization, to do its map."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from mbn_rewrite.ir.channel_map import ChannelMap
from mbn_rewrite.ir.graph import BatchNorm, Graph
from mbn_rewrite.passes.precision import map_out_of_range
from mbn_rewrite.passes.wording import sentence
from mbn_rewrite.plans import Decision, Fate, Form, Plan, Remap, Replace

# Which BatchNormalizations a form can take the place of.
TAKES: dict[Form, Callable[[BatchNorm], bool]] = {
    Form.FUSED: lambda op: op.fusible,
    Form.DEPTHWISE: lambda op: op.convolvable,
    Form.SCALE_AND_SHIFT: lambda op: True,
}


def plan_depthwise(graph: Graph) -> Plan:
    """Puts a depthwise convolution, or a multiplication and an addition, in the place of each."""
    decisions: dict[str, Decision] = {}
    replaced: dict[str, Replace] = {}
    sites: list[tuple[str, BatchNorm, str]] = [
        (node.owner, node.op, node.dtype) for node in graph.nodes if isinstance(node.op, BatchNorm)
    ] + [(hidden.owner, hidden.op, hidden.dtype) for hidden in graph.hidden]
    unknown_rank = {hidden.owner for hidden in graph.hidden if hidden.rank is None}
    unconvolvable = {owner for owner, op, _ in sites if not op.convolvable}
    for owner, op, dtype in sites:
        why = _why_kept(op, dtype)
        if owner in unknown_rank:
            why = why or "the rank of its input is not known"
        if why:
            replaced.pop(owner, None)
            decisions[owner] = Decision(owner, Fate.KEPT, reason=sentence(why))
        elif op.map is not None and owner not in decisions:
            form = Form.SCALE_AND_SHIFT if owner in unconvolvable else Form.DEPTHWISE
            replaced[owner] = Replace(form, op.map)
            decisions[owner] = Decision(owner, Fate.DEPTHWISE, (owner,))
    return Plan("depthwise", tuple(decisions.values()), replaced)


def _why_kept(op: BatchNorm, dtype: str) -> str:
    """Why no other layer can do its map in a dtype, or ""."""
    if op.map is None:
        return str(op.reason)
    return map_out_of_range(op.map, dtype)


Left = Mapping[str, tuple[ChannelMap, BatchNorm]]


def replaceable(graph: Graph, folded: Plan) -> Left:
    """The sites that a plan leaves, but that something else could take the place of."""
    kept = {decision.name for decision in folded.decisions if decision.action == Fate.KEPT}
    remapped = folded.of(Remap)
    found: dict[str, tuple[ChannelMap, BatchNorm]] = {}
    for node in graph.nodes:
        op = node.op
        if node.owner not in kept or not isinstance(op, BatchNorm) or op.map is None:
            continue
        m = remapped[node.owner].map if node.owner in remapped else op.map
        if op.reason or map_out_of_range(m, node.dtype):
            kept.discard(node.owner)
            found.pop(node.owner, None)
        else:  # of several calls, all have to be convolvable
            before = node.owner not in found or found[node.owner][1].convolvable
            found[node.owner] = (m, replace(op, convolvable=op.convolvable and before))
    return found


def in_form(folded: Plan, left: Left, form: Form) -> Plan | None:
    """A plan with something in the place of what it leaves; None where it can serve none."""
    takes = TAKES[form]
    if not any(takes(op) for _, op in left.values()):
        return None
    replaced = {
        owner: Replace(form if takes(op) else Form.SCALE_AND_SHIFT, m)
        for owner, (m, op) in left.items()
        if takes(op) or form is not Form.FUSED  # what is fused already stays so
    }
    decisions = tuple(
        replace(d, action=Fate(replaced[d.name].form), into=(d.name,)) if d.name in replaced else d
        for d in folded.decisions
    )
    return replace(folded, decisions=decisions, actions={**folded.actions, **replaced})

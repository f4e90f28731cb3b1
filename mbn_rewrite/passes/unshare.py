"""Pass that gives calls of a shared layer weights of their own, so that more can fold.

Heads of detectors call one convolution on several levels, and on each a BatchNormalization of that
level. One set of weights can absorb one of these; weights for each call absorb them all. That is
exact, and costs memory once for each call more, so it is done

- for layers without which a BatchNormalization would stay, and no others;
- for calls that are asked for different maps: those that are asked for the same stay shared;
- while all that is added to the weights that change is `LEAST` or less, or `PART` of the model's
  weights or less. Where not all can be had, the smallest come first.

What the pass cannot know, whether a call can have a layer of its own in its model, a graph tells
(`Node.why_shared`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count, islice
from types import MappingProxyType

from mbn_rewrite.ir.graph import Chain, Graph, Node
from mbn_rewrite.passes.fold import are_equal, plan_fold
from mbn_rewrite.passes.wording import sentence
from mbn_rewrite.plans import Decision, Fate, Fold, Plan, Unshared

LEAST = 2**18  # weights, 1 MB in float32: no model is too small for that
PART = 0.1  # of the model's weights

Owners = Mapping[str, Sequence[str]]  # owner -> the owner that each of its calls has then


def plan_unsharing(
    graph: Graph,
    borders: bool = False,
    clips: bool = False,
    stay: Mapping[str, str] = MappingProxyType({}),
    equalize: bool = False,
) -> Plan:
    """Folds what can be folded, with weights of their own for calls where that lets more fold.

    Arguments are those of `plan_fold`.
    """

    def solved(owners: Owners) -> Plan:
        return plan_fold(_apart(graph, owners), borders, clips, stay)

    def final(owners: Owners, plan: Plan) -> Plan:
        if not equalize:
            return plan
        return plan_fold(_apart(graph, owners), borders, clips, stay, equalize=True)

    shared = plan_fold(graph, borders, clips, stay)
    calls = _calls_of_shared(graph)
    if not calls or not _kept(shared):
        return final({}, shared)
    each = {owner: [f"{owner}#{i}" for i in range(len(of))] for owner, of in calls.items()}
    free = solved(each)
    gone = _kept(shared) - _kept(free)
    if not gone:
        return final({}, shared)
    near = {owner: names for owner, names in each.items() if _absorb_any(names, gone, free)}
    layers = _apart_in(free, near, calls)
    blocked = _blocked(layers, graph)
    owners = _named([layer for layer in layers if layer.owner not in blocked], graph)
    best = solved(owners) if owners else shared
    for layer in sorted(layers, key=lambda layer: layer.added, reverse=True):
        fewer = {owner: names for owner, names in owners.items() if owner != layer.owner}
        if len(fewer) < len(owners):
            without = solved(fewer) if fewer else shared
            if without.left <= best.left:
                owners, best = fewer, without
    # Without layers that stay shared after all, calls may be asked for the same that were not.
    while owners != (alike := _named(_apart_in(best, owners, calls), graph)):
        owners, best = alike, solved(alike) if alike else shared
    total = _weights(graph)
    grown = {
        layer.owner: Unshared(tuple(owners[layer.owner]), layer.added, layer.added / total)
        for layer in _apart_in(best, owners, calls)
    }
    return _with_reasons(replace(final(owners, best), unshared=grown), gone, blocked, free, each)


def keep_shared(graph: Graph) -> Graph:
    """A graph in which no call can have weights of its own, since that was asked for."""
    why = "it is to stay shared, as it was asked for"
    return replace(graph, nodes=tuple(replace(node, why_shared=why) for node in graph.nodes))


@dataclass(frozen=True)
class _Layer:
    """A layer that is called several times, and what its calls are asked for.

    Attributes:
        owner: the layer.
        calls: its calls, in the order of the graph.
        numbers: of the group of each call, from 0 up. Calls in a group are asked for the same; the
            first group has the layer itself.
        actions: of each group.
    """

    owner: str
    calls: Sequence[Node]
    numbers: Sequence[int]
    actions: Sequence[Fold | None]

    @property
    def added(self) -> int:
        """How many weights are added where each group has its own."""
        chains = self.calls[0].op.chains
        return sum(_size(chains, a is not None and a.has_shift) for a in self.actions[1:])

    @property
    def changed(self) -> int:
        """How many of these absorb something; the others are copies.

        A front end may know the parts of a layer as layers, of which one need not change.
        """
        edited: dict[tuple[int, int], int] = {}
        for action in filter(None, self.actions):
            for place, (kernels, bias) in enumerate(action.op.chains):
                before, after = action.maps(place)
                ends = {0} if before is not None else set()
                ends |= {len(kernels) - 1} if after is not None else set()
                edited |= {(place, end): kernels[end].size for end in ends}
                if ends and (bias or action.has_shift):
                    edited[place, len(kernels)] = kernels[-1].out_channels
        return (len(self.actions) - 1) * sum(edited.values())

    @property
    def label(self) -> str:
        return self.calls[0].label

    @property
    def why_shared(self) -> str:
        return next((call.why_shared for call in self.calls if call.why_shared), "")


# ------------------------------------------------------------------------------- the graph


def _calls_of_shared(graph: Graph) -> dict[str, list[Node]]:
    """The calls of each layer that a function calls several times, if all can absorb something."""
    calls: dict[str, list[Node]] = {}
    for node in graph.nodes:
        calls.setdefault(node.owner, []).append(node)
    return {
        owner: nodes
        for owner, nodes in calls.items()
        if len(nodes) > len({node.function for node in nodes})
        and all(node.op.chains for node in nodes)
    }


def _apart(graph: Graph, owners: Owners) -> Graph:
    """A graph in which calls have other owners, with the weights of those that they had."""
    stored = {new: owner for owner, names in owners.items() for new in names}
    number: Counter[str] = Counter()
    nodes = []
    for node in graph.nodes:
        if node.owner in owners:
            number[node.owner] += 1
            node = replace(node, owner=owners[node.owner][number[node.owner] - 1])
        nodes.append(node)
    return replace(
        graph,
        nodes=tuple(nodes),
        read_weight=lambda owner, name: graph.read_weight(stored.get(owner, owner), name),
    )


def _named(layers: Iterable[_Layer], graph: Graph) -> Owners:
    """Names for the layers of groups of calls.

    They may come to stand in another model within the model than the first call, so that no layer
    in any may have their last part.
    """
    named = [node.owner for node in graph.nodes] + [hidden.owner for hidden in graph.hidden]
    taken = {part for owner in named for part in owner.split("/")}
    owners: dict[str, Sequence[str]] = {}
    for layer in layers:
        path, slash, last = layer.owner.rpartition("/")
        free = (f"{last}_{number}" for number in count(1) if f"{last}_{number}" not in taken)
        names = list(islice(free, len(layer.actions) - 1))
        taken.update(names)
        each = [layer.owner, *(f"{path}{slash}{name}" for name in names)]
        owners[layer.owner] = [each[group] for group in layer.numbers]
    return owners


def _weights(graph: Graph) -> int:
    """How many weights the layers of a graph have."""
    return sum(_size(node.op.chains) for node in {n.owner: n for n in graph.nodes}.values())


def _size(chains: Iterable[Chain], needs_bias: bool = False) -> int:
    """How many weights a layer has, or will have."""
    return sum(
        sum(kernel.size for kernel in kernels)
        + (kernels[-1].out_channels if bias or needs_bias else 0)
        for kernels, bias in chains
    )


# -------------------------------------------------------------------------------- solutions


def _kept(plan: Plan) -> set[str]:
    return {decision.name for decision in plan.decisions if decision.action == Fate.KEPT}


def _absorb_any(names: Sequence[str], sites: set[str], plan: Plan) -> bool:
    """Whether any of some layers absorbs one of some sites."""
    return any(d.name in sites and not set(names).isdisjoint(d.into) for d in plan.decisions)


def _apart_in(plan: Plan, owners: Owners, calls: Mapping[str, Sequence[Node]]) -> list[_Layer]:
    """The layers of which calls are asked for different maps in a plan."""
    layers = [_layer(owner, calls[owner], names, plan) for owner, names in owners.items()]
    return [layer for layer in layers if len(layer.actions) > 1]


def _layer(owner: str, calls: Sequence[Node], names: Sequence[str], plan: Plan) -> _Layer:
    """A layer with the groups of its calls in a plan, in which they have names of their own.

    Calls that are asked for nothing keep the layer.
    """
    groups: list[Fold | None] = [None] if not all(name in plan.actions for name in names) else []
    numbers = [0] * len(calls)
    for i in sorted(range(len(calls)), key=lambda i: calls[i].place):
        action = plan.actions.get(names[i])
        if not (action is None or (isinstance(action, Fold) and not action.sums)):
            # Parallel branches were merged, which is for all calls as one.
            return _Layer(owner, calls, [0] * len(calls), [None])
        alike = (number for number, other in enumerate(groups) if _is_the_same(action, other))
        numbers[i] = next(alike, len(groups))
        if numbers[i] == len(groups):
            groups.append(action)
    return _Layer(owner, calls, numbers, groups)


def _is_the_same(first: Fold | None, second: Fold | None) -> bool:
    """Whether two edits of the same weights give the same."""
    if first is None or second is None:
        return first is second
    return (
        are_equal(first.before, second.before)
        and are_equal(first.after, second.after)
        and first.border == second.border
        and first.outer_bias == second.outer_bias
    )


# --------------------------------------------------------------------------------- the rule


def _blocked(layers: Iterable[_Layer], graph: Graph) -> dict[str, str]:
    """The layers that stay shared, each with a sentence on why."""
    total = _weights(graph)
    most, used = max(LEAST, int(PART * total)), 0
    blocked = {}
    for layer in sorted(layers, key=lambda layer: layer.changed):
        why = layer.why_shared
        if not why and used + layer.changed > most:
            why = (
                f"that would add {layer.added:,} weights to a model that has {total:,}, where "
                f"{most:,} are the most that all may add"
            )
        if why:
            needs = "is called several times, and each call would need weights of its own"
            blocked[layer.owner] = f"{layer.label} {needs}: {why}"
        else:
            used += layer.changed
    return blocked


def _with_reasons(
    plan: Plan, gone: set[str], blocked: Mapping[str, str], free: Plan, each: Owners
) -> Plan:
    """A plan that says of sites which layer would have to have several sets of weights.

    Args:
        plan: the plan.
        gone: the sites that would go if every call had weights of its own.
        blocked: layers that stay shared, and why.
        free: the plan for such a model.
        each: the owners of calls in that.
    """
    into = {d.name: set(d.into) for d in free.decisions}

    def decision(d: Decision) -> Decision:
        if d.action != Fate.KEPT or d.name not in gone:
            return d
        near = [why for owner, why in blocked.items() if not into[d.name].isdisjoint(each[owner])]
        return replace(d, reason=sentence(near[0])) if near else d

    return replace(plan, decisions=tuple(map(decision, plan.decisions)))

"""Pass that folds: each BatchNormalization moves to layers whose weights absorb it.

Sites are taken in the order of the model. Each is moved backward, or else forward; it goes only
if every branch that it meets takes it and every layer that it would edit is edited alike by all
calls of that layer.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from mbn_rewrite.ir.algebra import Border
from mbn_rewrite.ir.channel_map import ChannelMap
from mbn_rewrite.ir.graph import BatchNorm, Graph, Linear, Node
from mbn_rewrite.passes.merge import merge_branches
from mbn_rewrite.passes.wording import listed, sentence
from mbn_rewrite.passes.workgraph import Request, Side, WorkingGraph
from mbn_rewrite.plans import Decision, Fate, Plan
from mbn_rewrite.rules.motion import RULES, Absorb, Blocked, Outcome, Shapes, Through

# Merges within merges that one map is followed through: a bound on recursion, far above
# what networks hold, since every branch on the way must have no other reader.
_MAX_DEPTH = 100

_Requests = list[Request] | Blocked


def plan_fold(graph: Graph, borders: bool = False) -> Plan:
    """Folds what can be folded.

    Args:
        graph: the model.
        borders: whether convolutions that pad with zeros may absorb a shift by adding a
            border map. That is exact too, but costs an addition that may not be fused.
    """
    merged = merge_branches(graph)
    work = WorkingGraph(merged.graph)
    folding = _Folding(work, borders)
    decisions = [folding.decide(owner) for owner in work.sites]
    for hidden in graph.hidden:
        why = hidden.op.reason or f"{hidden.holder} holds it, and its calls cannot be seen"
        decisions.append(Decision(hidden.owner, Fate.KEPT, reason=sentence(str(why))))
    return Plan("fold", merged.in_order(decisions), merged.actions | work.actions)


class _Folding:
    def __init__(self, work: WorkingGraph, borders: bool) -> None:
        self.work = work
        self.borders = borders

    def decide(self, owner: str) -> Decision:
        """Folds a site, if that is exact."""
        calls = self.work.sites[owner]
        ops = [call.op for call in calls if isinstance(call.op, BatchNorm)]
        why = next((op.reason for op in ops if op.reason), None)
        if why:
            return Decision(owner, Fate.KEPT, reason=sentence(str(why)))
        reasons = []
        for where, move in (("before", self._backward), ("after", self._forward)):
            requests = self._agreed(_joined(move(call) for call in calls))
            if not isinstance(requests, Blocked):
                for request in requests:
                    self.work.absorb(request)
                self.work.remove(owner)
                into = tuple(dict.fromkeys(request.owner for request in requests))
                return Decision(owner, Fate.FOLDED, into, self._stand_ins(requests))
            reasons.append(f"{where} it, {requests.reason}")
        return Decision(owner, Fate.KEPT, reason=sentence("; ".join(reasons)))

    # -- moving ------------------------------------------------------------------------

    def _outcome(self, node: Node, m: ChannelMap, position: int | None) -> Outcome:
        op, work = node.op, self.work
        if isinstance(op, BatchNorm) and op.map is not None:
            op = BatchNorm(work.maps[node.owner])  # with what it has taken on from others
        shapes = Shapes(tuple(map(work.shape, node.inputs)), work.shape(node.outputs[0]))
        rule = RULES[type(op)]
        outcome: Outcome = (
            rule.backward(op, m, shapes)
            if position is None
            else rule.forward(op, m, shapes, position)
        )
        if isinstance(outcome, Through):
            before, after = work.dtype(node.inputs[0]), work.dtype(node.outputs[0])
            if before != after and "16" in before + after:
                # Moved past it, the map would work in another range and precision.
                outcome = Blocked(f"turns {before} into {after}")
        return _named(outcome, node)

    def _backward(self, site: Node) -> _Requests:
        return self._before(site, site, 0, self.work.maps[site.owner])[0]

    def _before(
        self, site: Node, reader: Node, position: int, m: ChannelMap, depth: int = 0
    ) -> tuple[_Requests, _Requests]:
        """Requests to the layers before a reader's input that have them do m on it, and requests
        that have them do m without its shift.

        Both are found in one walk: a merge needs one of its branches with the shift, and
        all others without.
        """
        while True:
            node, blocked = self._giver(site, reader, position, depth)
            if blocked is not None:
                return blocked, blocked
            full = self._outcome(node, m, None)
            bare = self._outcome(node, m.without_shift(), None) if m.has_shift else full
            if isinstance(bare, Blocked):
                return full if isinstance(full, Blocked) else bare, bare
            if isinstance(bare, Absorb):
                asked: _Requests = [Request(node.owner, Side.AFTER, m)]
                without: _Requests = [Request(node.owner, Side.AFTER, m.without_shift())]
                return full if isinstance(full, Blocked) else asked, without
            through = bare if isinstance(full, Blocked) else full
            assert isinstance(through, Through)
            if len(through.maps) == 1 and not isinstance(full, Blocked):
                reader, position, m = node, 0, through.maps[0]
                continue
            branches = [
                self._before(site, node, branch, branch_map, depth + 1)
                for branch, branch_map in enumerate(through.maps)
            ]
            without = _joined(bare_requests for _, bare_requests in branches)
            if isinstance(full, Blocked):
                return full, without
            if through.shift_once:
                return _one_shifted(branches), without
            return _joined(requests for requests, _ in branches), without

    def _giver(
        self, site: Node, reader: Node, position: int, depth: int
    ) -> tuple[Node, Blocked | None]:
        """The node that gives a reader's input, and what keeps a map from moving to it."""
        value = self.work.value(reader.inputs[position])
        node = self.work.producer(value)
        blocked = self._seen_by_others(value, node, reader)
        if blocked is None and node.owner == site.owner:
            blocked = Blocked("it reads its own output")
        if blocked is None and depth > _MAX_DEPTH:
            blocked = Blocked(f"{node.label} is a merge within too many merges")
        return node, blocked

    def _seen_by_others(self, value: int, node: Node, reader: Node) -> Blocked | None:
        """Blocked where anything but one input of `reader` sees this value."""
        if self.work.is_output(value):
            return Blocked(f"{node.label} is also an output of the model")
        readers = self.work.readers(value)
        others = [other for other, _ in readers if other is not reader]
        if others:
            labels = sorted({other.label for other in others})
            return Blocked(f"{node.label} is also read by {listed(labels)}")
        if len(readers) > 1:
            return Blocked(f"{node.label} is read more than once by {reader.label}")
        if len(node.outputs) > 1:
            return Blocked(f"{node.label} has several outputs")
        return None

    def _forward(self, site: Node) -> _Requests:
        """Requests to all the layers after a site that have them do its map."""
        requests: list[Request] = []
        pending = [(site.outputs[0], self.work.maps[site.owner])]
        reached: set[int] = set()
        while pending:
            value, m = pending.pop()
            blocked = self._not_moved_on(site, value, reached)
            if blocked is not None:
                return blocked
            reached.add(value)
            for node, position in self.work.readers(value):
                if node.owner == site.owner:
                    return Blocked("it reads its own output")
                outcome = self._outcome(node, m, position)
                border = self._border(node, outcome)
                if isinstance(border, Blocked):
                    return border
                if border is not None or isinstance(outcome, Absorb):
                    requests.append(Request(node.owner, Side.BEFORE, m, border))
                elif isinstance(outcome, Blocked):
                    return outcome
                else:
                    pending.append((node.outputs[0], outcome.maps[0]))
        return requests

    def _not_moved_on(self, site: Node, value: int, reached: set[int]) -> Blocked | None:
        """Obstacle to moving a map of this value to its readers, or None."""
        if value in reached:
            return Blocked(f"{self.work.producer(value).label} is reached on several ways")
        if self.work.is_output(value):
            who = "it" if value == site.outputs[0] else self.work.producer(value).label
            return Blocked(f"{who} is an output of the model")
        readers = self.work.readers(value)
        if len({id(node) for node, _ in readers}) < len(readers):
            return Blocked(f"{readers[0][0].label} reads it more than once")
        if not readers:
            return Blocked("nothing reads it")
        return None

    def _border(self, node: Node, outcome: Outcome) -> Border | Blocked | None:
        """Border that a convolution reads, if a border map is all that is missing."""
        if not (self.borders and isinstance(outcome, Blocked) and outcome.border):
            return None
        op = node.op
        assert isinstance(op, Linear)
        shape = self.work.shape(node.inputs[0])
        sizes = [size for axis, size in enumerate(shape) if axis not in (0, op.in_axis)]
        if None in sizes:
            return Blocked(
                f"{node.label} pads its input with zeros and its sizes are open, so that no one "
                "border map serves them all"
            )
        if len(sizes) != len(op.windows):
            return outcome
        return Border(op.windows, tuple(size for size in sizes if size is not None))

    # -- agreeing ----------------------------------------------------------------------

    def _agreed(self, requests: _Requests) -> _Requests:
        """One request for each layer and side, or why its calls or its dtype forbid it."""
        if isinstance(requests, Blocked):
            return requests
        grouped: dict[tuple[str, Side], list[Request]] = {}
        for request in requests:
            grouped.setdefault((request.owner, request.side), []).append(request)
        agreed = []
        for group in grouped.values():
            blocked = self._disagreement(group)
            if blocked is not None:
                return blocked
            agreed.append(group[0])
        return agreed

    def _disagreement(self, group: list[Request]) -> Blocked | None:
        """Obstacle to a layer's doing what its calls ask of it on one side, or None."""
        request, others = group[0], group[1:]
        node, calls = self.work.nodes[request.owner], self.work.calls[request.owner]
        if len(group) != calls or not all(other.map.equals(request.map) for other in others):
            where = "followed" if request.side is Side.AFTER else "preceded"
            return Blocked(
                f"{node.label} is called {calls} times and not all its calls are {where} "
                "by the same scale and shift"
            )
        if any(other.border != request.border for other in others):
            return Blocked(
                f"{node.label} pads its input with zeros and is called {calls} times on inputs "
                "of different sizes, so that no one border map serves them all"
            )
        why = self.work.why_not(request)
        return Blocked(f"{node.label} cannot absorb it: {why}") if why else None

    def _stand_ins(self, requests: list[Request]) -> str:
        """Sentences on layers that are replaced to add border maps or biases, or ""."""
        sentences = []
        for request in requests:
            node, fold = self.work.nodes[request.owner], self.work.fold_of(request.owner)
            if fold is not None and fold.outer_bias:
                sentences.append(
                    f"{node.label} {self.work.bias_doubt(request.owner)}: a layer that stands for "
                    "it adds the bias."
                )
            if request.border is not None and isinstance(node.op, Linear):
                sizes = (*request.border.outputs, node.op.kernels[-1].out_channels)
                sentences.append(
                    f"{node.label} pads its input with zeros: it adds a border map of "
                    f"{' x '.join(map(str, sizes))}."
                )
        return " ".join(sentences)


# -------------------------------------------------------------------------------- helpers


def _named(outcome: Outcome, node: Node) -> Outcome:
    """A rule's phrase as a sentence about its node."""
    if isinstance(outcome, Blocked):
        return replace(outcome, reason=f"{node.label} {outcome.reason}")
    return outcome


def _joined(parts: Iterable[_Requests]) -> _Requests:
    """All requests, or what blocks the first branch that is blocked."""
    joined: list[Request] = []
    for part in parts:
        if isinstance(part, Blocked):
            return part
        joined += part
    return joined


def _one_shifted(branches: list[tuple[_Requests, _Requests]]) -> _Requests:
    """All branches without shift, but the first that can take it."""
    bare = _joined(without for _, without in branches)
    if isinstance(bare, Blocked):
        return bare
    for i, (shifted, _) in enumerate(branches):
        if not isinstance(shifted, Blocked):
            return _joined(
                shifted if j == i else without for j, (_, without) in enumerate(branches)
            )
    return branches[0][0]

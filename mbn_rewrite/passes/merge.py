"""Pass that merges parallel branches: a sum of linear maps of one value becomes one layer.

The layer with the widest window stays in its place and takes the weights of the sum, as
`ir.branches` has it; the others go, and so do BatchNormalizations on the branches and the sum.
Weights are edited once for all calls, so all calls of whatever goes must be in sums that are alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import chain

from mbn_rewrite.ir.branches import Branch, Branches
from mbn_rewrite.ir.channel_map import Array
from mbn_rewrite.ir.graph import BatchNorm, Graph, Linear, Node, Reshape
from mbn_rewrite.passes.parallel import Block, blocks
from mbn_rewrite.passes.precision import weights_out_of_range
from mbn_rewrite.passes.wording import bias_beside
from mbn_rewrite.plans import Action, Decision, Fate, Fold, Remove


class Merged:
    """A graph whose parallel branches are merged.

    Args:
        graph: the model, which is not changed.

    Attributes:
        graph: the graph as it is then. It gives the weights of sums, in float64.
        actions: what is done to layers, by owner.
        decisions: on the BatchNormalizations that went, by owner.
    """

    def __init__(self, graph: Graph) -> None:
        self.actions: dict[str, Action] = {}
        self.decisions: dict[str, Decision] = {}
        self.graph = graph
        self._stored = graph.read_weight
        self._order: dict[str, int] = {}
        for number, node in enumerate(graph.nodes):
            self._order.setdefault(node.owner, number)

    def in_order(self, others: Iterable[Decision]) -> tuple[Decision, ...]:
        """These decisions and others, in the order of the model."""
        last = len(self.graph.nodes) + len(self._order)  # for those that are no nodes
        every = [*self.decisions.values(), *others]
        return tuple(sorted(every, key=lambda decision: self._order.get(decision.name, last)))

    def _weight(self, owner: str, name: str) -> Array:
        """A weight of the graph as it is."""
        fold = self.actions.get(owner)
        if isinstance(fold, Fold):
            return fold.op.weight(owner, name, self._stored)
        return self._stored(owner, name)

    # -- agreeing ----------------------------------------------------------------------

    def merge(self) -> bool:
        """Merges what can be merged as it is; returns whether that was anything."""
        groups: dict[object, list[Block]] = {}
        for block in reversed(list(blocks(self.graph))):  # a sum before the sums within it
            groups.setdefault(block.likeness, []).append(block)
        calls = self.graph.uses()
        taken: set[str] = set()
        for alike in groups.values():
            owners = {node.owner for node in _nodes(alike)}
            if taken.isdisjoint(owners) and _serves_all_calls(alike, calls):
                op = self._sum(alike)
                if self._is_within_range(alike[0], op):
                    taken |= owners
                    self._carry_out(alike, op)
        return bool(taken)

    def _sum(self, alike: list[Block]) -> Linear:
        """The operation of the layer that stands for some blocks."""
        block = alike[0]
        _, op = block.layer
        parts: list[Branch] = []
        going = [node for node, _ in chain.from_iterable(map(_going, alike))]
        gone = {node.owner for node in going if not isinstance(node.op, BatchNorm)}
        for branch, path in zip(block.branches, block.paths, strict=True):
            sums = path.linear[1].sums if path.linear is not None else None
            if sums is None:
                parts.append(branch)
            else:
                parts += sums.within(branch.places, branch.before, branch.after)
                gone.update(sums.stands_for)
        bias = op.bias
        if bias is None and any(part.adds_constant for part in parts):
            prefix, dot, _ = op.kernels[0].name.rpartition(".")
            bias = f"{prefix}{dot}bias"
        stands_for = tuple(sorted(gone, key=lambda owner: self._order[owner]))
        return replace(op, bias=bias, sums=Branches(tuple(parts), stands_for))

    def _is_within_range(self, block: Block, op: Linear) -> bool:
        """Whether the weights of each branch, and of their sum, stay in the range of a dtype."""
        layer, _ = block.layer
        folds = [(layer.owner, Fold(op))]
        for branch, path in zip(block.branches, block.paths, strict=True):
            if path.linear is not None:
                _, own = path.linear
                folds.append((branch.owner, Fold(own, branch.before, branch.after)))
        return not any(self._why_not(owner, fold, layer.dtype) for owner, fold in folds)

    def _why_not(self, owner: str, fold: Fold, dtype: str) -> str:
        return weights_out_of_range(
            fold, dtype, lambda name: fold.op.weight(owner, name, self._stored)
        )

    # -- carrying out ------------------------------------------------------------------

    def _carry_out(self, alike: list[Block], op: Linear) -> None:
        layer, _ = alike[0].layer
        doubts = [layer_op.bias_doubt for _, layer_op in (block.layer for block in alike)]
        doubt = next(filter(None, doubts), "") if op.bias else ""
        self.actions[layer.owner] = Fold(op, outer_bias=bool(doubt))
        note = bias_beside(layer.label, doubt) if doubt else ""
        gone: set[str] = set()
        for block in alike:
            for node, action in _going(block):
                self.actions[node.owner] = action
                gone.add(node.owner)
                if isinstance(node.op, BatchNorm):
                    folded = Decision(node.owner, Fate.FOLDED, (layer.owner,), note)
                    self.decisions[node.owner] = folded
        for name, decision in self.decisions.items():
            if not gone.isdisjoint(decision.into):  # into a layer that now goes itself
                self.decisions[name] = replace(decision, into=(layer.owner,), reason=note)
        self.graph = replace(
            self.graph, nodes=tuple(_joined(self.graph, alike, op)), read_weight=self._weight
        )


def merge_branches(graph: Graph) -> Merged:
    """Merges parallel branches, again and again, since a sum may be a branch of another."""
    merged = Merged(graph)
    while merged.merge():
        pass
    return merged


# -------------------------------------------------------------------------------- helpers


def _nodes(alike: Iterable[Block]) -> list[Node]:
    """All nodes of some blocks, each once."""
    return list(dict(chain.from_iterable(block.nodes.items() for block in alike)).values())


def _staying(block: Block) -> list[Node]:
    """The nodes of a block that stay, in order: the layer that stands for it, among reshapes."""
    steps = block.paths[block.kept].steps
    return [node for node, _ in steps if isinstance(node.op, (Linear, Reshape))]


def _going(block: Block) -> Iterator[tuple[Node, Remove]]:
    """The nodes of a block that go, and which of their inputs is read in their place."""
    staying = {id(node) for node in _staying(block)}
    keeps = {id(node): position for node, position in block.paths[block.kept].steps}
    for key, node in block.nodes.items():
        if key not in staying:
            yield node, Remove(keeps.get(key, 0))


def _serves_all_calls(alike: list[Block], calls: Mapping[str, int]) -> bool:
    """Whether blocks that are alike have all calls of all their layers, each in one place."""
    nodes = _nodes(alike)
    if len(nodes) < sum(len(block.nodes) for block in alike):
        return False
    owners = [node.owner for node in nodes]
    if any(owners.count(owner) != calls[owner] for owner in owners):
        return False
    asked: dict[str, set[Remove | None]] = {}
    for block in alike:
        for node in _staying(block):
            asked.setdefault(node.owner, set()).add(None)
        for node, action in _going(block):
            asked.setdefault(node.owner, set()).add(action)
    return all(len(actions) == 1 for actions in asked.values())


def _joined(graph: Graph, alike: list[Block], op: Linear) -> Iterator[Node]:
    """The nodes of a graph once blocks are merged."""
    gone = {id(node) for node in _nodes(alike)}
    stay: dict[int, Node] = {}
    for block in alike:
        value = block.paths[block.kept].source
        *_, last = staying = _staying(block)
        for node in staying:
            new = replace(
                node, inputs=(value,), outputs=block.sum.outputs if node is last else node.outputs
            )
            if isinstance(node.op, Linear):
                new = replace(new, op=replace(node.op, bias=op.bias, sums=op.sums))
            stay[id(node)] = new
            (value,) = new.outputs
    for node in graph.nodes:
        if id(node) in stay:
            yield stay[id(node)]
        elif id(node) not in gone:
            yield node

"""The working graph: a graph as it stands after the actions decided so far.

Passes work on it one after the other. A pass reads values, readers and maps, and decides on
actions; what it decides is carried out here at once, so that each step is exact for the graph as
it then stands, and the next pass finds what the ones before it left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mbn_rewrite.enums import Name
from mbn_rewrite.ir.algebra import Border
from mbn_rewrite.ir.channel_map import Array, ChannelMap
from mbn_rewrite.ir.graph import BatchNorm, Graph, Linear, Node, Shape
from mbn_rewrite.passes.precision import map_out_of_range, weights_out_of_range
from mbn_rewrite.plans import Action, Fold, Remap, Remove


class Side(Name):
    """Side of a layer on which it is asked to do a map."""

    BEFORE = "before"  # on its input
    AFTER = "after"  # on its output


@dataclass(frozen=True)
class Request:
    """Request of one call to its layer: to absorb a map.

    Attributes:
        owner: the layer.
        side: where.
        map: the map.
        border: where the layer reads padding, if it can only by adding a border map.
    """

    owner: str
    side: Side
    map: ChannelMap
    border: Border | None = None


class WorkingGraph:
    """A graph, and what has been decided on it.

    Args:
        graph: the model, which is not changed.

    Attributes:
        graph: the model.
        nodes: a call of each owner.
        calls: how many calls each owner has.
        sites: the calls of each BatchNormalization, in the order of the model.
        maps: the map that each BatchNormalization has by now.
        actions: what has been decided, by owner.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.calls = graph.uses()
        self.nodes = {node.owner: node for node in graph.nodes}
        self.sites: dict[str, list[Node]] = {}
        self.maps: dict[str, ChannelMap] = {}
        self.actions: dict[str, Action] = {}
        self._bias_doubts = {  # at any call
            node.owner: node.op.bias_doubt
            for node in graph.nodes
            if isinstance(node.op, Linear) and node.op.bias_doubt
        }
        self._alias: dict[int, int] = {}  # output of a removed site -> its input
        self._outputs = set(graph.outputs)
        self._producer: dict[int, Node] = {}
        self._readers: dict[int, list[tuple[Node, int]]] = {}
        for node in graph.nodes:
            for position, value in enumerate(node.inputs):
                self._readers.setdefault(value, []).append((node, position))
            for value in node.outputs:
                self._producer[value] = node
            if isinstance(node.op, BatchNorm):
                self.sites.setdefault(node.owner, []).append(node)
                if node.op.map is not None:
                    self.maps[node.owner] = node.op.map

    # -- what stands where ---------------------------------------------------------------

    def value(self, value: int) -> int:
        """The value that stands for this one now that sites were removed."""
        root = value
        while root in self._alias:
            root = self._alias[root]
        while value != root:  # shorten the way for the next look-up
            self._alias[value], value = root, self._alias[value]
        return root

    def producer(self, value: int) -> Node:
        """The node that gives a value."""
        return self._producer[value]

    def readers(self, value: int) -> Sequence[tuple[Node, int]]:
        """The nodes that read a value, each with the position of the input."""
        return self._readers.get(value, ())

    def is_output(self, value: int) -> bool:
        """Whether a value is an output of the model."""
        return value in self._outputs

    def shape(self, value: int) -> Shape:
        return self.graph.values[value].shape

    def dtype(self, value: int) -> str:
        return self.graph.values[value].dtype

    def fold_of(self, owner: str) -> Fold | None:
        """The maps that a layer has absorbed so far, or None."""
        action = self.actions.get(owner)
        return action if isinstance(action, Fold) else None

    def bias_doubt(self, owner: str) -> str:
        """Why a bias that a layer is given might not be added per channel, or ""."""
        return self._bias_doubts.get(owner, "")

    # -- absorbing -----------------------------------------------------------------------

    def why_not(self, request: Request) -> str:
        """Why a layer's dtype cannot hold what it would absorb, or ""."""
        node = self.nodes[request.owner]
        if isinstance(node.op, BatchNorm):
            return map_out_of_range(self._composed(request), node.dtype)

        def read(name: str) -> Array:
            return self.graph.read_weight(node.owner, name)

        return weights_out_of_range(self._folded(request), node.dtype, read)

    def absorb(self, request: Request) -> None:
        """Has a layer, or another BatchNormalization, do a map."""
        if request.owner not in self.sites:
            self.actions[request.owner] = self._folded(request)
            return
        composed = self._composed(request)
        self.maps[request.owner] = composed
        self.actions[request.owner] = Remap(composed)

    def remove(self, owner: str) -> None:
        """Joins the readers of a BatchNormalization's outputs to those of its inputs."""
        self.actions[owner] = Remove()
        for call in self.sites[owner]:
            source, gone = self.value(call.inputs[0]), call.outputs[0]
            readers = [(n, p) for n, p in self._readers[source] if n is not call]
            self._readers[source] = readers + self._readers.pop(gone, [])
            self._alias[gone] = source
            if gone in self._outputs:
                self._outputs.add(source)

    def _folded(self, request: Request) -> Fold:
        owner = request.owner
        fold = self.fold_of(owner) or Fold(self.nodes[owner].op)
        if request.side is Side.BEFORE:
            before = request.map.then(fold.before) if fold.before else request.map
            fold = replace(fold, before=before, border=fold.border or request.border)
        else:
            after = fold.after.then(request.map) if fold.after else request.map
            fold = replace(fold, after=after)
        outer = fold.has_shift and fold.border is None and bool(self.bias_doubt(owner))
        return replace(fold, outer_bias=outer)

    def _composed(self, request: Request) -> ChannelMap:
        own = self.maps[request.owner]
        if request.side is Side.AFTER:
            return own.then(request.map)
        return request.map.then(own)

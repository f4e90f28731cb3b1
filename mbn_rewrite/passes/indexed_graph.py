"""A graph with what passes look up in it: who gives and reads values, calls, and sites."""

from __future__ import annotations

from collections.abc import Sequence

from mbn_rewrite.enums import Name
from mbn_rewrite.ir.channel_map import ChannelMap
from mbn_rewrite.ir.graph import BatchNorm, Graph, Linear, Node, Shape


class Side(Name):
    """Side of a layer on which it is asked to do a map."""

    BEFORE = "before"  # on its input
    AFTER = "after"  # on its output


class IndexedGraph:
    """A graph, by owner, value and reader.

    Args:
        graph: the model, which is not changed.

    Attributes:
        graph: the model.
        nodes: a call of each owner.
        calls: how many calls each owner has.
        sites: the calls of each BatchNormalization, in the order of the model.
        maps: the map of each BatchNormalization that has one.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.calls = graph.uses()
        self.nodes = {node.owner: node for node in graph.nodes}
        self.sites: dict[str, list[Node]] = {}
        self.maps: dict[str, ChannelMap] = {}
        self._bias_doubts = {  # at any call
            node.owner: node.op.bias_doubt
            for node in graph.nodes
            if isinstance(node.op, Linear) and node.op.bias_doubt
        }
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

    def bias_doubt(self, owner: str) -> str:
        """Why a bias that a layer is given might not be added per channel, or ""."""
        return self._bias_doubts.get(owner, "")

"""Counts the BatchNormalization that is left in a graph, alike for all formats of graphs.

A reader for each format (TensorFlow, ONNX, OpenVINO, LiteRT) gives `Node`s, which say no more of an
operation than counting needs. What does not depend on the graph's inputs is constant, whether it
is stored as constant, is a variable, or is computed from either as the model runs. Then

    fused        operations that are a BatchNormalization at inference
    arithmetic   runs of elementwise operations on the data, each with one constant operand, of
                 which at least one multiplies or divides by a constant per channel (more than
                 one element, all along one axis). This is what BatchNormalization written as
                 arithmetic is, with its square root or after it was computed beforehand.
                 Scalings directly after one another are one. Additions alone are biases.
    depthwise    1x1 depthwise convolutions with one filter per channel: the same work in the
                 form of a convolution
    within       those that a convolution, or another operation that is not elementwise, does
                 on its way out: no operation of their own, but not gone either

`fused` and `arithmetic` are what is left. A per-channel scaling need not come from a
BatchNormalization (EfficientNet scales its input by channel): who counts subtracts those that the
original has. A BatchNormalization of one channel, once it is arithmetic, looks like any scaling by
a number, and is not counted; `one_channel` says how many there are. Bodies of loops and calls are
not looked into; `unseen` says how many there are.

`count_nodes` counts everything that runs, whatever it does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

SCALES, STEPS = ("multiply", "divide"), ("multiply", "divide", "add")


@dataclass(frozen=True)
class Node:
    """An operation, or what a graph starts from.

    Attributes:
        name: of the operation; others read it by this name.
        kind: "input", "constant", "multiply", "divide", "add" (or subtract), "fused" (a
            BatchNormalization), "depthwise" (a depthwise convolution), "within" (a convolution that
            does a BatchNormalization), "handed on" (its values are those of its first input),
            "call" (of what is not looked into), "output" (of the graph) or "other".
        inputs: names of what it reads, in order.
        shape: of constants of floating-point numbers; () for others.
        activated: whether the operation ends in an activation.
    """

    name: str
    kind: str
    inputs: tuple[str, ...] = ()
    shape: tuple[int, ...] = ()
    activated: bool = False


@dataclass(frozen=True)
class Left:
    """BatchNormalization that is left, by its form; see the module."""

    fused: int = 0
    arithmetic: int = 0
    depthwise: int = 0
    within: int = 0
    unseen: int = 0

    @property
    def total(self) -> int:
        """Number that is left as BatchNormalization."""
        return self.fused + self.arithmetic

    @property
    def operations(self) -> int:
        """The operations of their own that do the work of a BatchNormalization."""
        return self.total + self.depthwise

    def without(self, others: int) -> Left:
        """Less the per-channel scalings that come from no BatchNormalization."""
        return replace(self, arithmetic=max(0, self.arithmetic - others))

    def __add__(self, other: Left) -> Left:
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Left(*(a + b for a, b in pairs))


def count(nodes: Iterable[Node]) -> Left:
    """BatchNormalization that is left in a graph."""
    graph = Graph(nodes)
    kinds = Counter(node.kind for node in graph.nodes.values() if node.name in graph.data)
    return Left(
        fused=kinds["fused"],
        arithmetic=len(graph.scalings()),
        depthwise=len(graph.depthwise()),
        within=kinds["within"],
        unseen=kinds["call"],
    )


def count_nodes(nodes: Iterable[Node]) -> int:
    """Number of operations that depend on the graph's inputs, so that they run in every call."""
    graph = Graph(nodes)
    return sum(graph.nodes[name].kind not in ("input", "output") for name in graph.data)


def per_channel(nodes: Iterable[Node]) -> Counter[str]:
    """How many operations multiply (or divide) by a constant per channel, and how many add one.

    Those are the operations of BatchNormalization written as arithmetic, each for itself, by their
    kinds. Biases that are operations of their own count, too.
    """
    graph = Graph(nodes)
    return Counter(node.kind for node in graph.nodes.values() if graph.is_per_channel(node))


def one_channel(nodes: Iterable[Node]) -> int:
    """Number of fused operations that normalise a single channel."""
    graph = Graph(nodes)
    fused = [node for node in graph.nodes.values() if node.kind == "fused"]
    return sum(graph.size(node.inputs[1]) == 1 for node in fused)


class Graph:
    """Nodes by name, and which of them depend on the inputs."""

    def __init__(self, nodes: Iterable[Node]) -> None:
        self.nodes = {node.name: node for node in nodes}
        self.readers: dict[str, list[Node]] = {}
        for node in self.nodes.values():
            for name in node.inputs:
                self.readers.setdefault(name, []).append(node)
        self.data: set[str] = set()
        pending = [node for node in self.nodes.values() if node.kind == "input"]
        while pending:
            node = pending.pop()
            if node.name not in self.data:
                self.data.add(node.name)
                pending += self.readers.get(node.name, [])

    def scalings(self) -> list[str]:
        """The names of the first per-channel scaling of each run."""
        return [node.name for node in self.nodes.values() if self._begins(node)]

    def depthwise(self) -> list[str]:
        """The names of the depthwise convolutions with one number per channel."""
        return [
            node.name
            for node in self.nodes.values()
            if node.kind == "depthwise" and self.size(node.inputs[1]) > 1
        ]

    def _begins(self, node: Node) -> bool:
        if not self._is_scaling(node):
            return False
        before = self._step_before(node)
        while before is not None and not self._is_scaling(before):
            before = self._step_before(before)
        return before is None

    def is_per_channel(self, node: Node) -> bool:
        """Whether a step has a constant operand of one number per channel."""
        if node.kind not in STEPS or self._operand(node) is None:
            return False
        return self.size(self._constant(node)) > 1

    def _is_scaling(self, node: Node) -> bool:
        return node.kind in SCALES and self.is_per_channel(node)

    def _step_before(self, node: Node) -> Node | None:
        """The step before in the same run: nothing else reads it."""
        name = node.inputs[0] if node.kind == "handed on" else self._operand(node)
        if name is None or len(self.readers[name]) > 1:
            return None
        before = self.nodes.get(name)
        if before is None or before.activated or before.kind not in (*STEPS, "handed on"):
            return None
        return before

    def _operand(self, node: Node) -> str | None:
        """Operand of a step that depends on the data, if its other one is constant."""
        data = [name for name in node.inputs if name in self.data]
        if len(node.inputs) != 2 or len(data) != 1:
            return None
        return data[0] if node.kind != "divide" or data[0] == node.inputs[0] else None

    def _constant(self, node: Node) -> str:
        return next(name for name in node.inputs if name not in self.data)

    def size(self, name: str) -> int:
        """Size of a constant whose numbers lie along one axis; else 0."""
        if name in self.data or name not in self.nodes:
            return 0
        node = self.nodes[name]
        if node.kind == "constant":
            return int(np.prod(node.shape)) if sum(n > 1 for n in node.shape) <= 1 else 0
        sizes = {self.size(name) for name in node.inputs} - {1}
        return sizes.pop() if len(sizes) == 1 else int(not sizes)

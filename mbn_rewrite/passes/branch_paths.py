"""Paths of a value to a sum: chains of operations of which only the next sees the result.

They hold BatchNormalizations, at most one convolution or matrix product, reshapes, and what does
nothing at inference. Sums within sums are taken apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

from mbn_rewrite.ir.graph import (
    Activation,
    Affine,
    BatchNorm,
    Graph,
    Linear,
    Merge,
    MergeKind,
    Node,
    Reshape,
    Shape,
)
from mbn_rewrite.ir.reasons import Change
from mbn_rewrite.passes.precision import map_out_of_range

# Sums within sums that are taken apart: a bound on recursion, far above what networks hold.
_MAX_DEPTH = 30

Step = tuple[Node, int]  # a node, and the position of the input by which a path enters it


@dataclass(frozen=True)
class Path:
    """Path of a value to a sum.

    Attributes:
        source: the value.
        steps: from the value to the sum, which is the last.
    """

    source: int
    steps: tuple[Step, ...]

    @cached_property
    def _weighted(self) -> int:
        """The number of the step that has weights, or -1."""
        numbers = (i for i, (node, _) in enumerate(self.steps) if isinstance(node.op, Linear))
        return next(numbers, -1)

    @property
    def linear(self) -> tuple[Node, Linear] | None:
        """The convolution or matrix product on it, and its operation."""
        if self._weighted < 0:
            return None
        node, _ = self.steps[self._weighted]
        assert isinstance(node.op, Linear)
        return node, node.op

    @property
    def before(self) -> tuple[Step, ...]:
        """The steps before those weights; none where there are none."""
        return self.steps[: max(self._weighted, 0)]

    @property
    def after(self) -> tuple[Step, ...]:
        """The steps after those weights; all where there are none."""
        return self.steps[self._weighted + 1 :]


def coefficients(op: Merge, count: int) -> tuple[float, ...]:
    """The factor of each input in a weighted sum; none where it is no such sum."""
    match op.kind:
        case MergeKind.ADD:
            return (1.0,) * count
        case MergeKind.SUBTRACT:
            return (1.0,) + (-1.0,) * (count - 1)
        case MergeKind.AVERAGE:
            return (1.0 / count,) * count
    return ()


class PathFinder:
    """Finder of the paths in a graph."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self.producer = {value: node for node in graph.nodes for value in node.outputs}
        self._reads: dict[int, int] = {}
        for value in chain.from_iterable(node.inputs for node in graph.nodes):
            self._reads[value] = self._reads.get(value, 0) + 1

    def _shape(self, value: int) -> Shape:
        return self._graph.values[value].shape

    def passes(self, node: Node) -> bool:
        """Whether an operation may be part of a branch."""
        op = node.op
        if node.held or len(node.outputs) != 1:
            return False
        if isinstance(op, Merge):
            given = self._shape(node.outputs[0])
            equal = all(self._shape(value) == given for value in node.inputs)
            return bool(coefficients(op, len(node.inputs))) and len(given) > 1 and equal
        if len(node.inputs) != 1:
            return False
        match op:
            case BatchNorm(map=m):
                stays = op.why_not(Change.MOVE) is not None
                return not stays and m is not None and not map_out_of_range(m, node.dtype)
            case Linear():
                is_known = bool(op.windows) or op.position_alone
                return len(op.kernels) == 1 and op.activation is Activation.LINEAR and is_known
            case Affine():
                # It does nothing at inference.
                return op.in_axis is None and op.out_axis is None and not op.axes
            case Reshape():
                # With two sizes open, two reshapes may differ and give equal shapes.
                shapes = (self._shape(node.inputs[0]), self._shape(node.outputs[0]))
                return all(shape[1:].count(None) <= 1 for shape in shapes)
        return False

    def to(self, node: Node, depth: int = 0) -> Iterator[Path]:
        """The paths to a sum; sums that only it reads are part of it."""
        for position, value in enumerate(node.inputs):
            for path in self._paths_of(value, depth):
                yield Path(path.source, (*path.steps, (node, position)))

    def _paths_of(self, value: int, depth: int) -> Iterator[Path]:
        """The paths to a value, as far back as nothing else sees what is on them."""
        steps: list[Step] = []
        seen_linear = False
        while value not in self._graph.outputs and self._reads[value] == 1:
            node = self.producer[value]
            ends = isinstance(node.op, (Linear, Merge)) and seen_linear
            if ends or depth >= _MAX_DEPTH or not self.passes(node):
                break
            if isinstance(node.op, Merge):
                for path in self.to(node, depth + 1):
                    yield Path(path.source, (*path.steps, *steps))
                return
            seen_linear = seen_linear or isinstance(node.op, Linear)
            steps.insert(0, (node, 0))
            value = node.inputs[0]
        yield Path(value, tuple(steps))

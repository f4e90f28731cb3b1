"""Parallel branches: which sums of a graph are sums of linear maps of one value.

The widest convolution of all branches can stand for the sum if its window has a place for each
position that another branch reads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mbn_rewrite.ir.branches import Branch, Places, alike, has_diagonal
from mbn_rewrite.ir.channel_map import ChannelMap, reshaped
from mbn_rewrite.ir.graph import (
    BatchNorm,
    Graph,
    Linear,
    Merge,
    Node,
    Reshape,
    Shape,
    ZeroPadding,
)
from mbn_rewrite.ir.kernels import Window
from mbn_rewrite.passes.branch_paths import Path, PathFinder, Step, coefficients

_ONE_PLACE = Window(1, 1, 1, (0, 0))


@dataclass(frozen=True)
class Block:
    """Sum of parallel branches that one layer can stand for.

    Attributes:
        paths: the branches.
        kept: which of them has the layer that stands for the sum.
        branches: what they do, for the weights of that layer.
    """

    paths: tuple[Path, ...]
    kept: int
    branches: tuple[Branch, ...]

    @property
    def nodes(self) -> dict[int, Node]:
        """All the nodes of its branches, and the sums, by id."""
        return {id(node): node for path in self.paths for node, _ in path.steps}

    @property
    def sum(self) -> Node:
        return self.paths[0].steps[-1][0]

    @property
    def layer(self) -> tuple[Node, Linear]:
        """The call of the layer that stands for the sum, and its operation."""
        linear = self.paths[self.kept].linear
        assert linear is not None
        return linear

    @property
    def likeness(self) -> tuple[object, ...]:
        """What is equal for blocks that one edit of their weights serves."""
        paths = [
            tuple(
                (_kind(node), position, node.owner if node.op.chains or _is_norm(node) else "")
                for node, position in path.steps
            )
            for path in self.paths
        ]
        places = tuple(branch.places for branch in self.branches)
        return self.kept, self.layer[0].dtype, tuple(paths), places


def _kind(node: Node) -> object:
    return node.op.kind if isinstance(node.op, Merge) else type(node.op)


def _is_norm(node: Node) -> bool:
    return isinstance(node.op, BatchNorm)


def blocks(graph: Graph) -> Iterator[Block]:
    """The sums that a layer can stand for; where they lie within one another, all of them."""
    finder = _Finder(graph)
    for node in graph.nodes:
        if isinstance(node.op, Merge) and finder.paths.passes(node):
            block = finder.block(node)
            if block is not None:
                yield block


class _Finder:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.paths = PathFinder(graph)

    def _shape(self, value: int) -> Shape:
        return self.graph.values[value].shape

    # -- blocks ------------------------------------------------------------------------

    def block(self, node: Node) -> Block | None:
        """The block that ends in a sum, if it is one."""
        paths = tuple(self.paths.to(node))
        wide = [i for i, path in enumerate(paths) if path.linear is not None]
        value = self._read_by(paths)
        if len(paths) < 2 or not wide or value is None or not self._keep_values(paths):
            return None
        kept = max(wide, key=lambda i: (paths[i].source != value, _places_of(paths[i])))
        if paths[kept].source == value and any(path.source != value for path in paths):
            return None
        branches = []
        for path in paths:
            branch = self._branch(path, paths[kept], value)
            if branch is None:
                return None
            branches.append(branch)
        return Block(paths, kept, tuple(branches))

    def _read_by(self, paths: Sequence[Path]) -> int | None:
        """The value that all paths read, some of them perhaps once zeros are put around it."""
        sources = {path.source for path in paths}
        if len(sources) == 1:
            return paths[0].source
        padded = [source for source in sources if self._zeros_around(source)]
        if len(sources) != 2 or len(padded) != 1:
            return None
        (value,) = self.paths.producer[padded[0]].inputs
        return value if value in sources else None

    def _zeros_around(self, value: int) -> tuple[tuple[int, int], ...]:
        """How many zeros are put around a value, for each axis; none where that is not known."""
        node = self.paths.producer.get(value)
        if node is None or not isinstance(node.op, ZeroPadding) or len(node.inputs) != 1:
            return ()
        return node.op.amounts

    def _keep_values(self, paths: Sequence[Path]) -> bool:
        """Whether nothing on the paths turns a dtype into another, or passes a mask on.

        Only what has weights may, since the one that stays does it too.
        """
        values = self.graph.values
        given = values[paths[0].steps[-1][0].outputs[0]]
        for path in paths:
            source = values[path.source]
            if source.masked or (path.linear is None and source.dtype != given.dtype):
                return False
            weighted = [] if path.linear is None else [(path.linear[0], 0)]
            for steps, like in ((path.before, source), ((*weighted, *path.after), given)):
                outputs = [values[node.outputs[0]] for node, _ in steps]
                if any(value.masked or value.dtype != like.dtype for value in outputs):
                    return False
        return True

    def _branch(self, path: Path, kept: Path, value: int) -> Branch | None:
        """What a path does, as a branch of what another has the layer for; None if it cannot be."""
        assert kept.linear is not None
        _, op = kept.linear
        places = self._places(path, kept, value)
        if op.in_axis is None or places is None:
            return None
        if path.linear is not None:
            return self._weighted(path, kept, places)
        (kernel,) = op.kernels
        axis = self._axis_before(kept.before, op.in_axis, kernel.in_channels)
        given = self._shape(path.steps[-1][0].outputs[0])
        if axis is None or not has_diagonal(kernel) or self._shape(path.source) != given:
            return None
        after = self._along(path.after, axis, kernel.in_channels)
        return None if after is None else Branch("", None, None, None, after, places)

    def _weighted(self, path: Path, kept: Path, places: Places) -> Branch | None:
        """As `_branch`, of a path with weights."""
        assert path.linear is not None
        assert kept.linear is not None
        own, own_op = path.linear
        layer, op = kept.linear
        (kernel,), (wide,) = own_op.kernels, op.kernels
        axes_differ = (own_op.in_axis, own_op.out_axis) != (op.in_axis, op.out_axis)
        if axes_differ or own.dtype != layer.dtype or not alike(kernel, wide):
            return None
        if self._shape(own.outputs[0]) != self._shape(layer.outputs[0]):
            return None
        one_source = path.source == kept.source
        if one_source and self._shape(own.inputs[0]) != self._shape(layer.inputs[0]):
            return None
        if own_op.out_axis is None:
            return None
        before = self._map_before(path.before, own_op.in_axis, kernel.in_channels)
        after = self._along(path.after, own_op.out_axis, kernel.out_channels)
        if before is None or after is None or (own_op.pads and before.has_shift):
            return None
        has_map = any(isinstance(node.op, BatchNorm) for node, _ in path.before)
        first = before if has_map else None
        return Branch(own.owner, kernel, own_op.bias, first, after, places)

    def _places(self, path: Path, kept: Path, value: int) -> Places | None:
        """The places in a layer's window at which a path reads."""
        assert kept.linear is not None
        layer, op = kept.linear
        windows: tuple[Window, ...] = (_ONE_PLACE,) * len(op.windows)
        if path.linear is not None:
            _, own = path.linear
            windows = own.windows
            if own.position_alone != op.position_alone or len(windows) != len(op.windows):
                return None
        own_windows = self._over(value, path, windows, op.in_axis)
        its_windows = self._over(value, kept, op.windows, op.in_axis)
        if own_windows is None or its_windows is None:
            return None
        shape = self._shape(layer.inputs[0] if kept.source == value else value)
        sizes = [size for axis, size in enumerate(shape) if axis != op.in_axis]
        positions = sizes[len(sizes) - len(windows) :]
        places = [
            window.places_in(wider, size)
            for window, wider, size in zip(own_windows, its_windows, positions, strict=True)
        ]
        found = tuple(place for place in places if place is not None)
        return found if len(found) == len(places) else None

    def _over(
        self, value: int, path: Path, windows: Sequence[Window], axis: int | None
    ) -> list[Window] | None:
        """Windows on a path as windows over a value; None where that is not known.

        Args:
            value: the value that all paths read, some once zeros are put around it.
            path: the path.
            windows: its windows.
            axis: the axis of the channels.
        """
        if path.source == value:
            return list(windows)
        around = self._zeros_around(path.source)
        moves = any(isinstance(node.op, Reshape) for node, _ in path.before)
        if moves or axis is None or any(around[axis]) or any(around[0]):
            return None
        amounts = [pair for number, pair in enumerate(around) if number != axis]
        found = []
        for window, zeros in zip(windows, amounts[len(amounts) - len(windows) :], strict=True):
            if isinstance(window.padding, str):
                return None
            before, after = (a + b for a, b in zip(window.padding, zeros, strict=True))
            found.append(replace(window, padding=(before, after)))
        return found

    # -- maps --------------------------------------------------------------------------

    def _along(self, steps: Sequence[Step], axis: int, channels: int) -> ChannelMap | None:
        """What steps do to a value with its channels on an axis; None where that is no map.

        Of a shift after a sum, the first of what is summed has all.
        """
        start = axis
        total = ChannelMap(np.ones(channels), np.zeros(channels), start)
        is_first = True
        for node, position in steps:
            op = node.op
            if isinstance(op, Merge):
                factor = np.full(channels, coefficients(op, len(node.inputs))[position])
                total = total.then(ChannelMap(factor, np.zeros(channels), start))
                is_first = is_first and position == 0
            elif isinstance(op, BatchNorm):
                assert op.map is not None
                if (op.map.axis, op.map.channels) != (axis, channels):
                    return None
                total = total.then(op.map if is_first else op.map.without_shift())
            elif isinstance(op, Reshape):
                moved = self._moved(node.inputs[0], node.outputs[0], axis, channels)
                if moved is None:
                    return None
                axis = moved
        return total.on_axis(start)

    def _map_before(
        self, steps: Sequence[Step], axis: int | None, channels: int
    ) -> ChannelMap | None:
        """What steps do to a value that has its channels on an axis after them."""
        start = None if axis is None else self._axis_before(steps, axis, channels)
        done = None if start is None else self._along(steps, start, channels)
        return None if done is None or axis is None else done.on_axis(axis)

    def _axis_before(self, steps: Sequence[Step], axis: int, channels: int) -> int | None:
        """The axis on which a value has its channels, by where it has them after some steps."""
        for node, _ in reversed(steps):
            if isinstance(node.op, Reshape):
                before = self._moved(node.outputs[0], node.inputs[0], axis, channels)
                if before is None:
                    return None
                axis = before
        return axis

    def _moved(self, value: int, to: int, axis: int, channels: int) -> int | None:
        """Where an axis of channels is in the same value in another shape, if it stays one."""
        numbered = ChannelMap(np.arange(channels) + 1.0, np.zeros(channels), axis)
        result = reshaped(numbered, self._shape(value), self._shape(to))
        same = result is not None and np.array_equal(result.scale, numbered.scale)
        return result.axis if result is not None and same else None


def _places_of(path: Path) -> int:
    """How many places the window on a path has."""
    windows = path.linear[1].windows if path.linear is not None else ()
    return math.prod(window.size for window in windows)

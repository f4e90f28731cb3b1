"""Units of a graph's values, as numbers to be solved for, and the ties that always hold.

Every value that a BatchNormalization can reach has an axis of channels, and for each channel a
scale and an origin; see `rules.relations`. What operations tie is tied here; what each
BatchNormalization would tie, if it went, is decided in `units`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, replace

import numpy as np

from mbn_rewrite.ir.algebra import Border
from mbn_rewrite.ir.channel_map import Array
from mbn_rewrite.ir.graph import BatchNorm, Clip, Linear, Node
from mbn_rewrite.passes.indexed_graph import IndexedGraph, Side
from mbn_rewrite.passes.ties import Ties
from mbn_rewrite.rules.relations import (
    OUT,
    RELATIONS,
    Ends,
    Gated,
    Origins,
    Relation,
    Shapes,
    Spread,
    Tied,
    clipped,
)

IS_OUTPUT = "is an output of the model"  # of what gives a value


@dataclass(frozen=True)
class Units:
    """Units of one value.

    Attributes:
        axis: of its channels.
        scales: numbers of its scales, one for each channel.
        origins: likewise of its origins.
    """

    axis: int
    scales: Array
    origins: Array


@dataclass(frozen=True)
class End:
    """Side of a layer whose weights are edited for the units of a value there.

    Attributes:
        node: a call of the layer.
        side: of it.
        units: of the value.
        border: what it reads, where it takes an origin by a border map alone.
    """

    node: Node
    side: Side
    units: Units
    border: Border | None = None


@dataclass(frozen=True)
class Sum:
    """Origins that add up: sum of weight * origin over the terms + added * (1 - 1 / scale) = 0.

    Attributes:
        node: the merge.
        weights: of the terms, numbers or one for each channel; the output is the first, with
            weight -1.
        terms: units of the terms.
        cause: number of the cause that it is of what follows from it.
        added: for each channel; the scale is that of all terms. None for nothing.
    """

    node: Node
    weights: tuple[float | Array, ...]
    terms: tuple[Units, ...]
    cause: int
    added: Array | None = None


@dataclass(frozen=True)
class _Gate:
    """Units of a product, and of those factors that have channels."""

    given: Units
    inputs: list[Units]
    cause: int


class Causes:
    """What demands something of units, by number, for reasons."""

    def __init__(self) -> None:
        self._causes: list[tuple[Node, str, bool]] = []

    def add(self, node: Node, phrase: str, limited: bool = False) -> int:
        """Number of a cause: a phrase that completes "<node> ...".

        Args:
            limited: whether what it does excludes some units only; else it takes none but the
                identity.
        """
        self._causes.append((node, phrase, limited))
        return len(self._causes) - 1

    def __getitem__(self, cause: int) -> tuple[Node, str, bool]:
        return self._causes[cause]


class Strands:
    """The units of a graph, and what operations tie.

    Args:
        graph: the graph as it stands.
        borders: whether convolutions that pad with zeros may add border maps.
        clips: owners of the clips that may take on bounds by channel.
        signs: whether scales of these may be negative.

    Attributes:
        units: by value.
        scales: ties between scales.
        origins: ties between origins.
        ends: sides of layers whose weights can be edited.
        sums: origins that add up.
        causes: what demands the identity, an origin of zero or a positive scale.
        clips: the nodes of `clips` that were reached.
        places: of the last call of each layer in the order of the model.
        fixed: units that are the identity, each with its cause.
        zero: units whose origin is zero, likewise.
        same_origin: pairs of origins that are equal.
        block: the start of each run of origins that were given out together.
    """

    def __init__(
        self,
        graph: IndexedGraph,
        borders: bool = False,
        clips: Collection[str] = (),
        signs: bool = False,
    ) -> None:
        self.graph = graph
        self.units: dict[int, Units] = {}
        self.ends: list[End] = []
        self.sums: list[Sum] = []
        self.causes = Causes()
        self.clips: list[Node] = []
        self._borders = borders
        self._may_clip = clips
        self._signs = signs
        self._numbers = [0, 0]  # of scales, and of origins, given out
        self.block: list[int] = []  # start of each run of origins that was given out together
        self._pending: deque[int] = deque()
        self._tied: dict[int, set[int]] = {}  # id of a node -> its slots that are tied
        # Demands and ties are collected until the numbers are counted.
        self._same_scale: list[tuple[Array, Array]] = []
        self.same_origin: list[tuple[Array, Array]] = []
        self.fixed: list[tuple[Units, int]] = []
        self.zero: list[tuple[Units, int]] = []
        self._positive: list[tuple[Units, int]] = []
        self._gates: list[_Gate] = []
        self._calls: dict[str, list[Node]] = {}
        self.places = {node.owner: place for place, node in enumerate(graph.graph.nodes)}
        for node in graph.graph.nodes:
            self._calls.setdefault(node.owner, []).append(node)
        self._spread()
        self.scales = Ties(self._numbers[0])
        self.origins = Ties(self._numbers[1], may_be_zero=True)
        self._tie()

    def fits(self, call: Node) -> bool:
        """Whether what a BatchNormalization reads and gives has the channels of its map."""
        op = call.op
        assert isinstance(op, BatchNorm)
        if op.map is None:
            return False
        sides = (self.units[call.inputs[0]], self.units[call.outputs[0]])
        return all((u.axis, len(u.scales)) == (op.map.axis, op.map.channels) for u in sides)

    # -- reaching ------------------------------------------------------------------------

    def _spread(self) -> None:
        for calls in self.graph.sites.values():
            for call in calls:
                op = call.op
                assert isinstance(op, BatchNorm)
                if op.map is not None:
                    for value in (call.inputs[0], call.outputs[0]):
                        self._reach(value, op.map.axis, op.map.channels)
        while self._pending:
            value = self._pending.popleft()
            producer = self.graph.producer(value)
            if self.graph.is_output(value):
                self._fix(value, producer, IS_OUTPUT)
            if len(producer.outputs) > 1:
                self._fix(value, producer, "has several outputs")
            else:
                self._visit(producer, OUT)
            for node, position in self.graph.readers(value):
                self._visit(node, position)

    def _reach(self, value: int, axis: int, channels: int) -> Units:
        """The units of a value, which is given some if it has none."""
        if value not in self.units:
            units = Units(axis, self._fresh(0, channels), self._fresh(1, channels))
            self._assign(value, units)
        return self.units[value]

    def _assign(self, value: int, units: Units) -> None:
        self.units[value] = units
        self._pending.append(value)

    def _fresh(self, kind: int, count: int) -> Array:
        start = self._numbers[kind]
        if kind:
            self.block.append(start)
        self._numbers[kind] += count
        return np.arange(start, start + count)

    def _fix(self, value: int, node: Node, phrase: str) -> None:
        self.fixed.append((self.units[value], self.causes.add(node, phrase)))

    def _visit(self, node: Node, slot: int) -> None:
        if slot in self._tied.get(id(node), ()):
            return
        relation = self._relation(node, slot)
        value = self._value(node, slot)
        if isinstance(relation, str):
            self._fix(value, node, relation)
        elif isinstance(relation, Ends):
            self._end(node, slot, relation)
        elif isinstance(relation, Gated):
            self._gate(node, slot, relation)
        else:
            self._tie_slots(node, slot, relation)

    def _value(self, node: Node, slot: int) -> int:
        return node.outputs[0] if slot == OUT else node.inputs[slot]

    def _relation(self, node: Node, slot: int) -> Relation:
        graph = self.graph
        if not node.outputs:
            return "gives nothing"
        shapes = Shapes(tuple(map(graph.shape, node.inputs)), graph.shape(node.outputs[0]))
        units = self.units[self._value(node, slot)]
        axis, shape = units.axis, shapes.of(slot)
        if not len(units.scales):
            return "has no channels"
        if axis >= len(shape) or shape[axis] not in (None, len(units.scales)):
            return "has another number of channels"
        shapes = shapes.with_channels(slot, axis, len(units.scales))
        if isinstance(node.op, Clip) and node.owner in self._may_clip:
            relation = clipped(node.op, shapes, slot, axis, positive=not self._signs)
        else:
            relation = RELATIONS[type(node.op)](node.op, shapes, slot, axis)
        if isinstance(relation, Tied):  # parts without channels are tied to nothing
            parts = {i: spread for i, spread in relation.spread.items() if spread.channels}
            relation = replace(relation, spread=parts)
        if isinstance(relation, (Tied, Gated)):
            before, after = graph.dtype(node.inputs[0]), graph.dtype(node.outputs[0])
            if before != after and "16" in before + after:
                # Units would be those of another range and precision.
                return f"turns {before} into {after}"
        return relation

    # -- ties ----------------------------------------------------------------------------

    def _end(self, node: Node, slot: int, ends: Ends) -> None:
        units = self.units[self._value(node, slot)]
        side = Side.AFTER if slot == OUT else Side.BEFORE
        border = self._border(node) if ends.border and self._borders else None
        if ends.zero and not isinstance(border, Border):
            self.zero.append((units, self.causes.add(node, border or ends.zero, not border)))
        if ends.positive:
            self._positive.append((units, self.causes.add(node, ends.zero, True)))
        self.ends.append(End(node, side, units, border if isinstance(border, Border) else None))
        if isinstance(node.op, BatchNorm):
            return
        for call in self._calls[node.owner]:  # all calls of a layer have the same weights
            self._tie_value(self._value(call, slot), units, node)

    def _border(self, node: Node) -> Border | str:
        op = node.op
        assert isinstance(op, Linear)
        shape = self.graph.shape(node.inputs[0])
        sizes = [size for axis, size in enumerate(shape) if axis not in (0, op.in_axis)]
        if None in sizes:
            return (
                "pads its input with zeros and its sizes are open, so that no one border map "
                "serves them all"
            )
        if len(sizes) != len(op.windows):
            return op.uneven
        return Border(op.windows, tuple(size for size in sizes if size is not None))

    def _tie_value(self, value: int, units: Units, node: Node) -> None:
        """Gives a value the same units as another."""
        own = self.units.get(value)
        if own is None:
            self._assign(value, units)
        elif own.axis != units.axis or len(own.scales) != len(units.scales):
            cause = self.causes.add(node, "is called on different axes of channels")
            self.fixed += [(own, cause), (units, cause)]
        elif own is not units:
            self._same_scale.append((own.scales, units.scales))
            self.same_origin.append((own.origins, units.origins))

    def _tie_slots(self, node: Node, slot: int, tied: Tied) -> None:
        units = self.units[self._value(node, slot)]
        same = tied.origins is not Origins.SUM
        for other, spread in tied.spread.items():
            self._tie_slot(node, other, spread, units, same)
        sides = [(self.units[self._value(node, i)], spread) for i, spread in tied.spread.items()]
        fits = all((u.axis, len(u.scales)) == (s.axis, s.channels) for u, s in sides)
        if tied.origins is Origins.SUM and not fits:
            self._tied[id(node)] = {slot, *tied.spread}
            return  # what joins channels on different axes is the identity by now
        if tied.part:
            return  # the rest is tied from another slot
        self._tied[id(node)] = {slot, *tied.spread}
        if node.owner in self._may_clip:
            self.clips.append(node)
        elif tied.origins is Origins.ZERO:
            self.zero.append((units, self.causes.add(node, tied.doing, True)))
        elif tied.origins is Origins.SUM:
            terms = tuple(self.units[self._value(node, i)] for i in range(OUT, len(node.inputs)))
            phrase = tied.doing or "joins it with values that do not have its shift"
            cause = self.causes.add(node, phrase)
            self.sums.append(Sum(node, (-1.0, *tied.weights), terms, cause, tied.added))
        if tied.positive:
            self._positive.append((units, self.causes.add(node, tied.doing, True)))

    def _tie_slot(self, node: Node, slot: int, spread: Spread, units: Units, same: bool) -> None:
        value = self._value(node, slot)
        scales, origins = units.scales[spread.mine], units.origins[spread.mine]
        own = self.units.get(value)
        if own is None and spread.theirs is None:
            own_origins = origins if same else self._fresh(1, spread.channels)
            self._assign(value, Units(spread.axis, scales, own_origins))
            return
        own = own or self._reach(value, spread.axis, spread.channels)
        if own.axis != spread.axis or len(own.scales) != spread.channels:
            cause = self.causes.add(node, "joins channels on different axes")
            self.fixed += [(own, cause), (units, cause)]
            return
        theirs = slice(None) if spread.theirs is None else spread.theirs
        self._same_scale.append((own.scales[theirs], scales))
        if same:
            self.same_origin.append((own.origins[theirs], origins))

    def _gate(self, node: Node, slot: int, gated: Gated) -> None:
        for other, spread in gated.spread.items():
            self._reach(self._value(node, other), spread.axis, spread.channels)
        self._tied[id(node)] = {slot, *gated.spread}
        units = {i: self.units[self._value(node, i)] for i in (slot, *gated.spread)}
        if len({sides.axis for sides in units.values()}) > 1:
            cause = self.causes.add(node, "multiplies on different axes of channels")
            self.fixed += [(sides, cause) for sides in units.values()]
            return
        cause = self.causes.add(node, gated.doing, True)
        self.zero += [(sides, cause) for sides in units.values()]
        inputs = [units[i] for i in sorted(units) if i != OUT]
        cause = self.causes.add(node, "multiplies it by values that have a scale")
        self._gates.append(_Gate(units[OUT], inputs, cause))

    def _tie_gates(self) -> None:
        """Ties the output of each gate to the one input that is free to have a scale.

        An input that must be the identity leaves the other one to have that of the output. Where
        several are free, all but the first are made to be the identity: a choice, since scales
        that multiply are no equations between two of them.
        """
        pending = list(self._gates)
        while pending:
            undecided = [gate for gate in pending if not self._tie_gate(gate, most=1)]
            if len(undecided) == len(pending):
                self._tie_gate(undecided.pop(0))
            pending = undecided

    def _tie_gate(self, gate: _Gate, most: int | None = None) -> bool:
        """Ties a gate if no more than so many inputs are free; returns whether it did."""
        free = [units for units in gate.inputs if self._is_free(units)]
        if most is not None and len(free) > most:
            return False
        for units in free[1:] if free else [gate.given]:
            self._fix_units(units, gate.cause)
        if free:
            _must(self.scales.tie(gate.given.scales, free[0].scales, np.ones(1), np.zeros(1)))
        return True

    def _is_free(self, units: Units) -> bool:
        return not self.scales.known(units.scales)[0].all()

    def _fix_units(self, units: Units, cause: int) -> None:
        self.fixed.append((units, cause))
        _must(self.scales.set(units.scales, np.ones(1), cause))
        _must(self.origins.set(units.origins, np.zeros(1), cause))

    def _tie(self) -> None:
        """Makes the ties and demands that were collected. The identity satisfies them all."""
        one, zero = np.ones(1), np.zeros(1)
        for left, right in self._same_scale:
            _must(self.scales.tie(left, right, one, zero))
        for left, right in self.same_origin:
            _must(self.origins.tie(left, right, one, zero))
        fixed, self.fixed = self.fixed, []
        for units, cause in fixed:
            self._fix_units(units, cause)
        for units, cause in self._positive:
            _must(self.scales.require_positive(units.scales, cause))
        for units, cause in self.zero:
            _must(self.origins.set(units.origins, zero, cause))
        self._tie_gates()
        self.scales.keep()
        self.origins.keep()


def _must(conflict: object) -> None:
    assert conflict is None, conflict

"""Decides what becomes of every BatchNormalization of a graph. numpy only.

In `fold`, sites are taken in the order of the model. Each is moved backward to layers
whose weights absorb it, or else forward; it goes only if every branch that it meets takes
it and every layer that it would edit is edited alike by all calls of that layer. What
was decided is carried out on a working copy of the graph before the next site is taken,
so each step is exact for the graph as it then stands.

In modes for training and in `depthwise`, each site is decided alone. `auto` has several plans,
of which measuring tells the best: folded, and something else for what does not fold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mbn_rewrite.errors import RewriteError
from mbn_rewrite.ir.algebra import Array, Border, ChannelMap, fold
from mbn_rewrite.ir.graph import BatchNorm, Graph, Linear, Node, Shape
from mbn_rewrite.options import TRAINING_MODES
from mbn_rewrite.plans import Decision, Edit, Plan, Replacement, Sampled
from mbn_rewrite.rules.motion import RULES, Absorb, Blocked, Outcome, Shapes, Through
from mbn_rewrite.training import strides

# Merges within merges that one map is followed through: a bound on recursion, far above
# what networks hold, since every branch on the way must have no other reader.
_MAX_DEPTH = 100

_LARGEST = {"float16": 65504.0, "bfloat16": 3.38e38, "float32": 3.4e38, "float64": 1.79e308}
_SMALLEST_NORMAL_FLOAT16 = 2.0**-14


@dataclass(frozen=True)
class _Ask:
    """One call asks its layer to absorb a map, `before` its input or `after` its output.

    With a `border`, it can only by adding a border map.
    """

    owner: str
    side: str
    map: ChannelMap
    border: Border | None = None


_Asks = list[_Ask] | Blocked


def make_plan(graph: Graph, mode: str, stride: Any = None) -> Plan:
    """Decides what becomes of every BatchNormalization.

    Args:
        graph: the model.
        mode: "fold", "depthwise", "strided" or "mbn"; for "auto" see `candidates`.
        stride: for the latter two, see `strides.for_layer`.

    Raises:
        RewriteError: what was given is no stride.
    """
    if mode in TRAINING_MODES:
        return _plan_training(graph, mode, stride)
    return _PLANNERS[mode](graph)


# ------------------------------------------------------------------------------ depthwise


def _plan_depthwise(graph: Graph) -> Plan:
    decisions: dict[str, Decision] = {}
    replaced: dict[str, Replacement] = {}
    sites: list[tuple[str, BatchNorm, str]] = [
        (node.owner, node.op, node.dtype) for node in graph.nodes if isinstance(node.op, BatchNorm)
    ] + [(hidden.owner, hidden.op, hidden.dtype) for hidden in graph.hidden]
    unknown_rank = {hidden.owner for hidden in graph.hidden if hidden.rank is None}
    unconvolvable = {owner for owner, op, _ in sites if not op.convolvable}
    for owner, op, dtype in sites:
        why = op.ineligible or (op.map is not None and _out_of_range(op.map, dtype))
        if owner in unknown_rank:
            why = why or "the rank of its input is not known"
        if why:
            replaced.pop(owner, None)
            decisions[owner] = Decision(owner, "kept", reason=f"{_capitalised(str(why))}.")
        elif op.map is not None and owner not in decisions:
            form = "scale_and_shift" if owner in unconvolvable else "depthwise"
            replaced[owner] = Replacement(form, op.map)
            decisions[owner] = Decision(owner, "depthwise", (owner,))
    return Plan("depthwise", tuple(decisions.values()), replaced=replaced)


# ------------------------------------------------------------------- training with samples


def _plan_training(graph: Graph, mode: str, stride: Any) -> Plan:
    decisions: dict[str, Decision] = {}
    sampled: dict[str, Sampled] = {}
    sites: list[tuple[str, BatchNorm, Shape | None]] = [
        (node.owner, node.op, graph.values[node.inputs[0]].shape)
        for node in graph.nodes
        if isinstance(node.op, BatchNorm)
    ] + [(hidden.owner, hidden.op, None) for hidden in graph.hidden]
    _check_names(stride, [owner for owner, _, _ in sites])
    holders = {hidden.owner: hidden.holder for hidden in graph.hidden}
    unsampled: dict[str, str] = {}  # at any call
    for owner, op, shape in sites:
        why = op.not_trainable or _unsampled_axis(op.axis, shape)
        if why:
            unsampled.setdefault(owner, why)
    for owner, op, shape in sites:
        if owner in decisions:
            continue
        wanted = strides.for_layer(stride, owner)
        if owner in unsampled:
            why = unsampled[owner]
            decisions[owner] = Decision(owner, "kept", reason=f"{_capitalised(why)}.")
            continue
        sampled[owner] = Sampled(wanted, depthwise=mode == "mbn")
        note = f"Stride {_written(wanted)}{_lowering(wanted, op.axis, shape)}."
        if owner in holders:
            note += (
                f" {holders[owner]} makes a BatchNormalization again when it is loaded from a file:"
                " save weights, and convert what is loaded."
            )
        decisions[owner] = Decision(owner, mode, (owner,), note)
    return Plan(mode, tuple(decisions.values()), sampled=sampled)


def _check_names(stride: Any, owners: list[str]) -> None:
    """Raises RewriteError where strides are given for layers that there are not."""
    unknown = sorted(set(stride) - set(owners)) if isinstance(stride, Mapping) else []
    if unknown:
        there_is = _listed(sorted(set(owners)), most=20) if owners else "none"
        raise RewriteError(
            f"strides are given for {_listed(unknown)}, which is no BatchNormalization of the "
            f"model. There is {there_is}"
        )


def _unsampled_axis(axis: int | None, shape: Shape | None) -> str:
    """Why a training layer cannot serve an axis, or ""."""
    if axis is None or shape is None or axis in (1, len(shape) - 1):
        return ""
    return f"it normalises along axis {axis}, which is neither 1 nor the last"


def _lowering(stride: strides.Stride, axis: int | None, shape: Shape | None) -> str:
    """What a training layer makes of a stride for small inputs, or ""."""
    if axis is None or shape is None:
        return ""
    sizes = [size for i, size in enumerate(shape) if i not in (0, axis)]
    along = strides.along_axes(stride, len(sizes))
    lowered = strides.lowered(along, sizes)
    if not sizes:
        return ", but there are no positions to sample: its input has rank 2"
    if None in sizes:
        return ", not lowered where the model leaves sizes open"
    if strides.positions(along, sizes) == strides.positions(lowered, sizes):
        return ""
    size = " x ".join(map(str, sizes))
    return f", lowered to {_written(lowered)}: its input of {size} positions is small"


def _written(stride: strides.Stride | tuple[int, ...]) -> str:
    parts = (stride,) if isinstance(stride, int) else stride
    return str(parts[0]) if len(set(parts)) == 1 else " x ".join(map(str, parts))


# ----------------------------------------------------------------------------------- fold


def _plan_fold(graph: Graph, borders: bool = False) -> Plan:
    """Folds what can be folded.

    Args:
        graph: the model.
        borders: whether convolutions that pad with zeros may absorb a shift by adding a
            border map. That is exact too, but costs an addition that may not be fused.
    """
    folding = _Folding(graph, borders)
    decisions = [folding.decide(owner) for owner in folding.sites]
    for hidden in graph.hidden:
        why = hidden.op.ineligible or f"{hidden.holder} holds it, and its calls cannot be seen"
        decisions.append(Decision(hidden.owner, "kept", reason=f"{_capitalised(why)}."))
    return Plan(
        "fold",
        tuple(decisions),
        removed=frozenset(folding.removed),
        edits=folding.edits,
        remapped={owner: folding.maps[owner] for owner in folding.sites if folding.remapped(owner)},
    )


# ----------------------------------------------------------------------------------- auto

FOLDED = "folded"  # the form in which what does not fold stays as it is


def candidates(graph: Graph) -> dict[str, Plan]:
    """The plans that mode "auto" has to choose between, by what they do with what does not fold.

    All are exact. The first, `FOLDED`, leaves it; "border" lets convolutions that pad with zeros
    absorb more, and leaves the rest; the others put one of `FORMS` in the place of each that it
    can do the work of ("depthwise" scales and shifts where there is no such convolution). What
    custom layers hold stays in all of them, since it cannot be seen how it is called, and so does
    what has something else to do in its place (`BatchNorm.pinned`). Plans that would come to the
    same are left out.
    """
    fold = replace(_plan_fold(graph), mode="auto")
    left = _replaceable(graph, fold)
    plans = {FOLDED: fold}
    for form, takes in _TAKES.items():
        if not any(takes(op) for _, op in left.values()):
            continue
        plans[form] = _replacing(
            fold,
            {
                owner: Replacement(form if takes(op) else "scale_and_shift", m)
                for owner, (m, op) in left.items()
                if takes(op) or form != "fused"  # what is fused already stays so
            },
        )
    if fold.left:
        bordered = replace(_plan_fold(graph, borders=True), mode="auto")
        if bordered.left < fold.left:
            plans["border"] = bordered
    return plans


# Which BatchNormalizations a form can take the place of.
_TAKES: dict[str, Callable[[BatchNorm], bool]] = {
    "fused": lambda op: op.fusible,
    "depthwise": lambda op: op.convolvable,
    "scale_and_shift": lambda op: True,
}


def _replaceable(graph: Graph, fold: Plan) -> dict[str, tuple[ChannelMap, BatchNorm]]:
    """The sites that stay, but that something else could take the place of."""
    kept = {decision.name for decision in fold.decisions if decision.action == "kept"}
    found: dict[str, tuple[ChannelMap, BatchNorm]] = {}
    for node in graph.nodes:
        op = node.op
        if node.owner not in kept or not isinstance(op, BatchNorm) or op.map is None:
            continue
        m = fold.remapped.get(node.owner, op.map)
        if op.ineligible or op.pinned or _out_of_range(m, node.dtype):
            kept.discard(node.owner)
            found.pop(node.owner, None)
        else:
            convolvable = op.convolvable and _convolvable_so_far(found, node.owner)
            found[node.owner] = (m, replace(op, convolvable=convolvable))
    return found


def _convolvable_so_far(found: Mapping[str, tuple[ChannelMap, BatchNorm]], owner: str) -> bool:
    return owner not in found or found[owner][1].convolvable


def _replacing(fold: Plan, replaced: Mapping[str, Replacement]) -> Plan:
    decisions = tuple(
        replace(d, action=replaced[d.name].form, into=(d.name,)) if d.name in replaced else d
        for d in fold.decisions
    )
    return replace(
        fold,
        decisions=decisions,
        remapped={owner: m for owner, m in fold.remapped.items() if owner not in replaced},
        replaced=dict(replaced),
    )


_PLANNERS: dict[str, Callable[[Graph], Plan]] = {
    "fold": _plan_fold,
    "depthwise": _plan_depthwise,
}


class _Folding:
    """The graph as it stands after the sites decided so far."""

    def __init__(self, graph: Graph, borders: bool) -> None:
        self.graph = graph
        self.borders = borders
        self.uses = graph.uses()
        self.nodes = {node.owner: node for node in graph.nodes}
        self.removed: set[str] = set()
        self.edits: dict[str, Edit] = {}
        self.maps: dict[str, ChannelMap] = {}
        self.sites: dict[str, list[Node]] = {}
        self._composed: set[str] = set()
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

    def remapped(self, owner: str) -> bool:
        return owner in self._composed and owner not in self.removed

    def decide(self, owner: str) -> Decision:
        calls = self.sites[owner]
        ops = [call.op for call in calls if isinstance(call.op, BatchNorm)]
        why = next((op.ineligible or op.pinned for op in ops if op.ineligible or op.pinned), "")
        if why:
            return Decision(owner, "kept", reason=f"{_capitalised(why)}.")
        reasons = []
        for where, move in (("Before", self._backward), ("after", self._forward)):
            asks = self._agreed(owner, _joined(move(call) for call in calls))
            if not isinstance(asks, Blocked):
                self._carry_out(owner, asks)
                into = tuple(dict.fromkeys(ask.owner for ask in asks))
                return Decision(owner, "folded", into, self._stand_ins(asks))
            reasons.append(f"{where} it, {asks.reason}")
        return Decision(owner, "kept", reason=f"{'; '.join(reasons)}.")

    # -- moving ------------------------------------------------------------------------

    def _value(self, value: int) -> int:
        """The value that stands for this one now that sites were removed."""
        root = value
        while root in self._alias:
            root = self._alias[root]
        while value != root:  # shorten the way for the next look-up
            self._alias[value], value = root, self._alias[value]
        return root

    def _outcome(self, node: Node, m: ChannelMap, position: int | None) -> Outcome:
        op = node.op
        if isinstance(op, BatchNorm) and op.map is not None:
            op = BatchNorm(self.maps[node.owner])  # with what it has taken on from others
        shapes = Shapes(
            tuple(self.graph.values[value].shape for value in node.inputs),
            self.graph.values[node.outputs[0]].shape,
        )
        rule = RULES[type(op)]
        outcome: Outcome = (
            rule.backward(op, m, shapes)
            if position is None
            else rule.forward(op, m, shapes, position)
        )
        if isinstance(outcome, Through):
            before, after = (self.graph.values[v[0]].dtype for v in (node.inputs, node.outputs))
            if before != after and "16" in before + after:
                # Moved past it, the map would work in another range and precision.
                outcome = Blocked(f"turns {before} into {after}")
        return _named(outcome, node)

    def _backward(self, site: Node) -> _Asks:
        return self._before(site, site, 0, self.maps[site.owner])[0]

    def _before(
        self, site: Node, reader: Node, position: int, m: ChannelMap, depth: int = 0
    ) -> tuple[_Asks, _Asks]:
        """What to ask of the layers before a reader's input so that they do m on it, and
        what to ask so that they do m without its shift.

        Both are found in one walk: a merge needs one of its branches with the shift, and
        all others without.
        """
        while True:
            value = self._value(reader.inputs[position])
            node = self._producer[value]
            blocked = self._seen_by_others(value, node, reader)
            if blocked is None and node.owner == site.owner:
                blocked = Blocked("it reads its own output")
            if blocked is None and depth > _MAX_DEPTH:
                blocked = Blocked(f"{node.label} is a merge within too many merges")
            if blocked is not None:
                return blocked, blocked
            full = self._outcome(node, m, None)
            bare = self._outcome(node, m.without_shift(), None) if m.has_shift else full
            if isinstance(bare, Blocked):
                return full if isinstance(full, Blocked) else bare, bare
            if isinstance(bare, Absorb):
                ask: _Asks = [_Ask(node.owner, "after", m)]
                without: _Asks = [_Ask(node.owner, "after", m.without_shift())]
                return full if isinstance(full, Blocked) else ask, without
            through = bare if isinstance(full, Blocked) else full
            assert isinstance(through, Through)
            if len(through.maps) == 1 and not isinstance(full, Blocked):
                reader, position, m = node, 0, through.maps[0]
                continue
            branches = [
                self._before(site, node, branch, branch_map, depth + 1)
                for branch, branch_map in enumerate(through.maps)
            ]
            without = _joined(bare_asks for _, bare_asks in branches)
            if isinstance(full, Blocked):
                return full, without
            if through.shift_once:
                return _one_shifted(branches), without
            return _joined(asks for asks, _ in branches), without

    def _forward(self, site: Node) -> _Asks:
        """What to ask of all the layers after a site so that they do its map."""
        asks: list[_Ask] = []
        pending = [(site.outputs[0], self.maps[site.owner])]
        reached: set[int] = set()
        while pending:
            value, m = pending.pop()
            if value in reached:
                return Blocked(f"{self._producer[value].label} is reached on several ways")
            reached.add(value)
            if value in self._outputs:
                who = "it" if value == site.outputs[0] else self._producer[value].label
                return Blocked(f"{who} is an output of the model")
            readers = self._readers.get(value, [])
            if len({id(node) for node, _ in readers}) < len(readers):
                return Blocked(f"{readers[0][0].label} reads it more than once")
            if not readers:
                return Blocked("nothing reads it")
            for node, position in readers:
                if node.owner == site.owner:
                    return Blocked("it reads its own output")
                outcome = self._outcome(node, m, position)
                border = self._border(node, outcome)
                if isinstance(border, Blocked):
                    return border
                if border is not None or isinstance(outcome, Absorb):
                    asks.append(_Ask(node.owner, "before", m, border))
                elif isinstance(outcome, Blocked):
                    return outcome
                else:
                    pending.append((node.outputs[0], outcome.maps[0]))
        return asks

    def _border(self, node: Node, outcome: Outcome) -> Border | Blocked | None:
        """Where a convolution reads padding, if a border map is all that is missing."""
        if not (self.borders and isinstance(outcome, Blocked) and outcome.border):
            return None
        op = node.op
        assert isinstance(op, Linear)
        shape = self.graph.values[node.inputs[0]].shape
        sizes = [size for axis, size in enumerate(shape) if axis not in (0, op.in_axis)]
        if None in sizes:
            return Blocked(
                f"{node.label} pads its input with zeros and its sizes are open, so that no one "
                "border map serves them all"
            )
        if len(sizes) != len(op.windows):
            return outcome
        return Border(op.windows, tuple(size for size in sizes if size is not None))

    def _stand_ins(self, asks: list[_Ask]) -> str:
        """Which layers others stand for that add border maps or biases, or ""."""
        sentences = []
        for ask in asks:
            op = self.nodes[ask.owner].op
            if ask.owner in self.edits and self.edits[ask.owner].outer_bias:
                sentences.append(
                    f"{self.nodes[ask.owner].label} {self._bias_doubts[ask.owner]}: a layer "
                    "that stands for it adds the bias."
                )
            if ask.border is not None and isinstance(op, Linear):
                sizes = (*ask.border.outputs, op.kernels[-1].out_channels)
                sentences.append(
                    f"{self.nodes[ask.owner].label} pads its input with zeros: it adds a border "
                    f"map of {' x '.join(map(str, sizes))}."
                )
        return " ".join(sentences)

    def _seen_by_others(self, value: int, node: Node, reader: Node) -> Blocked | None:
        """Blocked where anything but one input of `reader` sees this value."""
        if value in self._outputs:
            return Blocked(f"{node.label} is also an output of the model")
        others = [other for other, _ in self._readers[value] if other is not reader]
        if others:
            labels = sorted({other.label for other in others})
            return Blocked(f"{node.label} is also read by {_listed(labels)}")
        if len(self._readers[value]) > 1:
            return Blocked(f"{node.label} is read more than once by {reader.label}")
        if len(node.outputs) > 1:
            return Blocked(f"{node.label} has several outputs")
        return None

    # -- agreeing and carrying out -----------------------------------------------------

    def _agreed(self, site: str, asks: _Asks) -> _Asks:
        """One ask for each layer and side, or why its calls or its dtype forbid it."""
        if isinstance(asks, Blocked):
            return asks
        grouped: dict[tuple[str, str], list[_Ask]] = {}
        for ask in asks:
            grouped.setdefault((ask.owner, ask.side), []).append(ask)
        agreed = []
        for (owner, side), group in grouped.items():
            node, uses, ask = self.nodes[owner], self.uses[owner], group[0]
            if len(group) != uses or not all(other.map.equals(ask.map) for other in group[1:]):
                where = "followed" if side == "after" else "preceded"
                return Blocked(
                    f"{node.label} is called {uses} times and not all its calls are {where} "
                    "by the same scale and shift"
                )
            if any(other.border != ask.border for other in group[1:]):
                return Blocked(
                    f"{node.label} pads its input with zeros and is called {uses} times on inputs "
                    "of different sizes, so that no one border map serves them all"
                )
            why = self._unfit(node, ask)
            if why:
                return Blocked(f"{node.label} cannot absorb it: {why}")
            agreed.append(ask)
        return agreed

    def _edited(self, node: Node, ask: _Ask) -> Edit:
        edit = self.edits.get(node.owner, Edit(node.op))
        if ask.side == "before":
            before = ask.map.then(edit.before) if edit.before else ask.map
            edit = replace(edit, before=before, border=edit.border or ask.border)
        else:
            edit = replace(edit, after=edit.after.then(ask.map) if edit.after else ask.map)
        outer = edit.has_shift and edit.border is None and node.owner in self._bias_doubts
        return replace(edit, outer_bias=outer)

    def _composed_with(self, ask: _Ask) -> ChannelMap:
        own = self.maps[ask.owner]
        return own.then(ask.map) if ask.side == "after" else ask.map.then(own)

    def _unfit(self, node: Node, ask: _Ask) -> str:
        """Why the layer's dtype cannot hold what it would absorb, or ""."""
        if isinstance(node.op, BatchNorm):
            return _out_of_range(self._composed_with(ask), node.dtype)
        edit = self._edited(node, ask)
        for m in (edit.before, edit.after):
            if m is not None and not m.is_finite:
                return "the scale or shift would not be finite"

        def read(name: str) -> Array:
            return self.graph.read_weight(node.owner, name)

        if _surely_fits(edit, node.dtype, read):
            return ""
        return _loses_range(edit, node.dtype, read)

    def _carry_out(self, site: str, asks: list[_Ask]) -> None:
        for ask in asks:
            if ask.owner in self.sites:
                self.maps[ask.owner] = self._composed_with(ask)
                self._composed.add(ask.owner)
            else:
                self.edits[ask.owner] = self._edited(self.nodes[ask.owner], ask)
        self.removed.add(site)
        for call in self.sites[site]:
            self._remove(call)

    def _remove(self, call: Node) -> None:
        """Joins the readers of a site's output to those of its input."""
        source, gone = self._value(call.inputs[0]), call.outputs[0]
        readers = [(n, p) for n, p in self._readers[source] if n is not call]
        self._readers[source] = readers + self._readers.pop(gone, [])
        self._alias[gone] = source
        if gone in self._outputs:
            self._outputs.add(source)


# -------------------------------------------------------------------------------- helpers


def _named(outcome: Outcome, node: Node) -> Outcome:
    """A rule's phrase as a sentence about its node."""
    if isinstance(outcome, Blocked):
        return replace(outcome, reason=f"{node.label} {outcome.reason}")
    return outcome


def _joined(parts: Iterable[_Asks]) -> _Asks:
    """All asks, or what blocks the first branch that is blocked."""
    joined: list[_Ask] = []
    for part in parts:
        if isinstance(part, Blocked):
            return part
        joined += part
    return joined


def _one_shifted(branches: list[tuple[_Asks, _Asks]]) -> _Asks:
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


def _listed(labels: list[str], most: int = 3) -> str:
    if len(labels) > most:
        labels = [*labels[:most], f"{len(labels) - most} more"]
    return " and ".join([", ".join(labels[:-1]), labels[-1]]) if len(labels) > 1 else labels[0]


def _capitalised(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]


def _out_of_range(m: ChannelMap, dtype: str) -> str:
    """Why a map cannot be held in a dtype, or ""."""
    if not m.is_finite:
        return "its scale or shift is not finite"
    largest = max(np.abs(m.scale).max(initial=0), np.abs(m.shift).max(initial=0))
    if largest > _LARGEST[dtype]:
        return f"its scale or shift reaches {largest:.3g}, more than {dtype} can hold"
    if dtype == "float16" and np.any((m.scale != 0) & (abs(m.scale) < _SMALLEST_NORMAL_FLOAT16)):
        return "its scale is too small for float16 to hold precisely"
    return ""


def _surely_fits(edit: Edit, dtype: str, read: Callable[[str], Array]) -> bool:
    """Whether bounds alone show that the folded weights are within a dtype's range."""
    if dtype == "float16":
        return False  # where small numbers matter too
    scale_before, shift_before = _bounds(edit.before)
    scale_after, shift_after = _bounds(edit.after)
    for kernels, bias in edit.op.chains:
        largest, added = 0.0, shift_before
        for kernel in kernels:
            array = read(kernel.name)
            size = _magnitude(array)
            largest, added = max(largest, size), added * size * array.size
        added = (added + (_magnitude(read(bias)) if bias else 0.0)) * scale_after + shift_after
        if not max(largest * scale_before * scale_after, added) < _LARGEST[dtype]:
            return False
    return True


def _bounds(m: ChannelMap | None) -> tuple[float, float]:
    """The largest scale, or 1 if that is less, and the largest shift of a map."""
    return (max(1.0, _magnitude(m.scale)), _magnitude(m.shift)) if m else (1.0, 0.0)


def _magnitude(array: Array) -> float:
    # Without a copy of the array, which may be large.
    return max(float(array.max(initial=0)), -float(array.min(initial=0)))


def _loses_range(edit: Edit, dtype: str, read: Callable[[str], Array]) -> str:
    """Why the folded weights would not be finite, or not precise, in a dtype, or ""."""
    for kernels, bias in edit.op.chains:
        arrays = [(kernel, read(kernel.name).astype(np.float64)) for kernel in kernels]
        folded, new_bias = fold(
            arrays,
            read(bias).astype(np.float64) if bias else None,
            before=edit.before,
            after=edit.after,
            border=edit.border,
        )
        largest = np.abs(new_bias).max(initial=0)
        for (kernel, array), new in zip(arrays, folded, strict=True):
            old_size, size = kernel.largest(array), kernel.largest(new)
            largest = max(largest, size.max(initial=0))
            lost = (size > 0) & (size < _SMALLEST_NORMAL_FLOAT16)
            if dtype == "float16" and np.any(lost & (old_size >= _SMALLEST_NORMAL_FLOAT16)):
                return "its weights would become too small for float16 to hold precisely"
        if not largest <= _LARGEST[dtype]:
            return f"its weights would reach {largest:.3g}, more than {dtype} can hold"
    return ""

"""Pass that folds: what the layers around BatchNormalizations absorb, so that these can go.

Which can go is decided in `units`, and in what units all values are kept then in `settle`. Here
that becomes actions, and decisions with reasons. A site whose layers cannot hold what they would
absorb stays, and the rest is solved again.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from functools import cached_property
from types import MappingProxyType

import numpy as np

from mbn_rewrite.ir.channel_map import ChannelMap
from mbn_rewrite.ir.graph import BatchNorm, Clip, Graph, Linear, Node
from mbn_rewrite.passes.indexed_graph import IndexedGraph, Side
from mbn_rewrite.passes.merge import merge_branches
from mbn_rewrite.passes.precision import bounds_out_of_range, map_out_of_range, weights_out_of_range
from mbn_rewrite.passes.settle import Settled
from mbn_rewrite.passes.strands import End, Strands, Units
from mbn_rewrite.passes.ties import TOLERANCE
from mbn_rewrite.passes.units import Assumptions, Bundles, Edge
from mbn_rewrite.passes.wording import bias_beside, sentence
from mbn_rewrite.plans import Action, Decision, Fate, Fold, Plan, Reclip, Remap, Remove

# How far off a value of some dtype may be kept. Farther off, digits of values near 1 are lost.
_FARTHEST = {"float16": 8.0, "bfloat16": 8.0, "float32": 2.0**11, "float64": 2.0**40}

# Of a site that does nothing, or whose neighbours do what makes up for it.
NOTHING_LEFT = "It leaves nothing that a layer would have to absorb."


def plan_fold(
    graph: Graph,
    borders: bool = False,
    clips: bool = False,
    stay: Mapping[str, str] = MappingProxyType({}),
    equalize: bool = False,
) -> Plan:
    """Folds what can be folded.

    A ReLU that reads nothing but a BatchNormalization may take on bounds by channel, where nothing
    else lets that go: one operation in place of two.

    Args:
        graph: the model.
        borders: whether convolutions that pad with zeros may absorb a shift by adding a
            border map. That is exact too, but costs an addition that may not be fused.
        clips: whether all clips may take on bounds by channel, on both sides where scales are
            negative. That is exact too, but a ReLU may be fused that two bounds are not.
        stay: sites that do not go at these costs, each with the reason that it has without them.
        equalize: whether scales that are left open are chosen as `equalise` says. Then clips with
            two bounds (ReLU6) take on bounds by channel where that is what it takes, and sites that
            stay leave their scales to the layers around them wherever these can take them on: the
            shift is left, one rounding to int8 in place of two.
    """
    merged = merge_branches(graph)
    work = IndexedGraph(merged.graph)
    kept = {owner: why for owner in work.sites if (why := _why_fixed(work, owner))}
    for owner in work.sites:
        if owner in stay:
            kept.setdefault(owner, stay[owner].removesuffix("."))
    bounded = _bounded(work) if equalize else frozenset()
    in_full: set[str] = set()  # sites that stay with their scales
    while True:
        solved = _Solved(work, kept, borders)
        able = _clips_after(work, solved.kept.keys() - kept.keys(), clips)
        if able:
            first = solved.assumptions.gone
            clipping = _Solved(work, kept, borders, able, signs=clips, first=first)
            if len(clipping.assumptions.gone) > len(first):
                solved = clipping
        if equalize:
            solved.leave_only_shifts(in_full)
        folding = _Folding(work, solved, equalize)
        only_shift = solved.assumptions.only_shift
        if folding.refused and only_shift:
            # The sites refused, if any of them only adds; else all that only add.
            in_full.update(folding.refused.keys() & only_shift.keys() or only_shift)
            continue
        if bounded and not folding.refused:
            # The same goes, and nothing else; only scales may pass more.
            gone, clip = solved.assumptions.gone, able | bounded
            free = _Solved(work, solved.kept, borders, clip, signs=clips, first=gone)
            free.leave_only_shifts(in_full)
            through = _Folding(work, free, equalize)
            is_as_good = free.assumptions.gone.keys() == gone.keys() and not through.refused
            if is_as_good and through.settled.equalised:
                folding = through
        if not folding.refused:
            break
        kept.update(folding.refused)
    decisions = [folding.decision(owner) for owner in work.sites]
    for hidden in graph.hidden:
        unseen = f"{hidden.holder} holds it, and its calls cannot be seen"
        unseen += f": {hidden.why}" if hidden.why else ""
        why = str(hidden.op.reason or unseen)
        decisions.append(Decision(hidden.owner, Fate.KEPT, reason=sentence(why)))
    notes = folding.equalised_notes() if equalize else ()
    return Plan("fold", merged.in_order(decisions), merged.actions | folding.actions, notes=notes)


def _bounded(work: IndexedGraph) -> frozenset[str]:
    """Owners of the clips that are no ReLU, and that are called once."""
    return frozenset(
        node.owner
        for node in work.graph.nodes
        if isinstance(node.op, Clip) and not node.op.is_homogeneous and work.calls[node.owner] == 1
    )


def _why_fixed(work: IndexedGraph, owner: str) -> str:
    """Why a site stays whatever is around it, or ""."""
    for call in work.sites[owner]:
        op = call.op
        assert isinstance(op, BatchNorm)
        if op.reason:
            return str(op.reason)
        if op.map is not None and not op.map.is_finite:
            return "its scale or shift is not finite"
    return ""


def _clips_after(work: IndexedGraph, sites: Collection[str], every: bool) -> frozenset[str]:
    """Owners of the clips that may take on bounds, so that one of some sites can go.

    Args:
        sites: what stays otherwise.
        every: whether that may be any clip; else a ReLU that reads one of the sites.
    """
    if not sites:
        return frozenset()
    able = set()
    for node in work.graph.nodes:
        if not isinstance(node.op, Clip) or work.calls[node.owner] > 1:
            continue
        is_after = work.producer(node.inputs[0]).owner in sites
        if every or (is_after and node.op.is_homogeneous):
            able.add(node.owner)
    return frozenset(able)


class _Solved:
    """What goes, at some costs.

    Args:
        work: the model.
        kept: sites that are not to go, and why.
        borders: see `plan_fold`.
        clips: owners of the clips that may take on bounds.
        signs: whether these may be bounds on both sides.
        first: sites that are to go if any can.

    Attributes:
        kept: sites that stay, and why.
        strands: the units of the model.
        assumptions: what goes.
    """

    def __init__(
        self,
        work: IndexedGraph,
        kept: Mapping[str, str],
        borders: bool = False,
        clips: Collection[str] = (),
        signs: bool = False,
        first: Collection[str] = (),
    ) -> None:
        self.kept = dict(kept)
        self.strands = Strands(work, borders, clips, signs)
        self.assumptions = Assumptions(self.strands)
        for owner in (*first, *(owner for owner in work.sites if owner not in first)):
            if owner not in self.kept and not all(map(self.strands.fits, work.sites[owner])):
                self.kept[owner] = "what it reads and gives has its channels on another axis, too"
            if owner not in self.kept:
                why = self.assumptions.assume(owner)
                if why:
                    self.kept[owner] = why

    def leave_only_shifts(self, in_full: Collection[str]) -> None:
        """Has layers do the scales of sites that stay, wherever that can be, but for some sites."""
        for owner in self.kept:
            if owner not in in_full and not _why_fixed(self.strands.graph, owner):
                self.assumptions.assume_only_shift(owner)


class _Folding:
    """What layers absorb in one solution.

    Args:
        work: the model.
        solved: what goes.
        equalize: whether scales that are left open are chosen as `equalise` says.

    Attributes:
        actions: by owner.
        refused: sites whose layers cannot hold what they would absorb, and why.
    """

    def __init__(self, work: IndexedGraph, solved: _Solved, equalize: bool = False) -> None:
        self.work = work
        self.kept, self.strands, self.assumptions = solved.kept, solved.strands, solved.assumptions
        self.actions: dict[str, Action] = {}
        self.refused: dict[str, str] = {}
        read = work.graph.read_weight if equalize else None
        self.settled = Settled(self.assumptions, read)
        broken = self.settled.broken()
        if broken:
            self.refused[broken] = "sums around it need shifts that contradict one another"
        strand = self.assumptions.strand
        values = (strand[units.scales] for units in self.strands.units.values())
        self._bundles = Bundles(values, len(strand))
        self._edited: dict[int, list[str]] = {}  # bundle of scales -> layers edited for it
        # Bundle of scales -> sites beside it: those that go, and those that only add.
        self._sites = self._by_bundle(self.assumptions.gone)
        self._shifts = self._by_bundle(self.assumptions.only_shift)
        for owner, ends in self._ends().items():
            self._absorb(owner, ends)
        for node in self.strands.clips:
            self._reclip(node)
        self._check_constants()
        self.actions.update(dict.fromkeys(self.assumptions.gone, Remove()))

    def _ends(self) -> dict[str, list[End]]:
        """Sides of the layers that stay and that are asked for something, by owner."""
        found: dict[str, list[End]] = {}
        for end in self.strands.ends:
            if end.node.owner not in self.assumptions.gone and self._asked(end) is not None:
                found.setdefault(end.node.owner, []).append(end)
        return found

    def _asked(self, end: End) -> ChannelMap | None:
        side = self.settled.given if end.side is Side.AFTER else self.settled.read
        return side(end.units)

    def _absorb(self, owner: str, ends: list[End]) -> None:
        """Has a layer, or a BatchNormalization that stays, do what its ends ask for."""
        node = ends[0].node
        before = next((self._asked(end) for end in ends if end.side is Side.BEFORE), None)
        after = next((self._asked(end) for end in ends if end.side is Side.AFTER), None)
        why = self._lost(ends) or self._disagreement(owner)
        if why:
            self._refuse((end.units for end in ends), f"{node.label} {why}")
            return
        if isinstance(node.op, BatchNorm):
            m = self.work.maps[owner]
            m = before.then(m) if before else m
            m = m.then(after) if after else m
            # A scale that is off 1 by its last digit would take a multiplication.
            m = replace(m, scale=np.where(np.abs(m.scale - 1) <= TOLERANCE, 1.0, m.scale))
            why = map_out_of_range(m, node.dtype)
            self.actions[owner] = Remap(m)
        else:
            borders = {end.border for end in ends if end.side is Side.BEFORE}
            shifted = before is not None and before.has_shift
            fold = Fold(node.op, before, after, borders.pop() if shifted else None)
            outer = fold.has_shift and fold.border is None and bool(self.work.bias_doubt(owner))
            fold = replace(fold, outer_bias=outer)
            why = ""
            if shifted and borders:
                why = (
                    "pads its input with zeros and is called on inputs of different sizes, so that "
                    "no one border map serves them all"
                )
            why = why or weights_out_of_range(
                fold, node.dtype, lambda name: self.work.graph.read_weight(owner, name)
            )
            self.actions[owner] = fold
        if why:
            self._refuse((end.units for end in ends), f"{node.label} cannot absorb it: {why}")
        for bundle in self._of(end.units for end in ends):
            self._edited.setdefault(bundle, []).append(owner)

    def _lost(self, ends: Iterable[End]) -> str:
        """Phrase on a layer that would read a value kept so far off that digits are lost, or ""."""
        for end in ends:
            if end.side is Side.BEFORE:
                dtype = self.work.dtype(end.node.inputs[0])
                lost = self.settled.lost(end.units)
                if lost > _FARTHEST[dtype]:
                    return (
                        f"would read a value that is kept {lost:.3g} off what it is, "
                        f"more than {dtype} has digits for"
                    )
        return ""

    def _check_constants(self) -> None:
        """Refuses what has constants added to values that are kept so far off as to lose digits."""
        for total in self.strands.sums:
            if total.added is None:
                continue
            dtype = self.work.dtype(total.node.inputs[0])
            lost = max(map(self.settled.lost, total.terms))
            if lost > _FARTHEST[dtype]:
                why = f"would add constants to a value that is kept {lost:.3g} off what it is"
                self._refuse(total.terms, f"{total.node.label} {why}")

    def _disagreement(self, owner: str) -> str:
        """Phrase on a BatchNormalization that stays whose calls ask for different maps, or ""."""
        if owner not in self.work.sites or self.work.calls[owner] == 1:
            return ""
        for side in Side:
            ends = [e for e in self.strands.ends if e.node.owner == owner and e.side is side]
            first, *others = [self._asked(end) for end in ends]
            alike = all(are_equal(first, other) for other in others)
            if not alike or len(ends) != self.work.calls[owner]:
                where = "followed" if side is Side.AFTER else "preceded"
                return (
                    f"is called {self.work.calls[owner]} times and not all its calls are {where} "
                    "by the same scale and shift"
                )
        return ""

    def _reclip(self, node: Node) -> None:
        """Has the bounds of a clip move with its units."""
        op, units = node.op, self.strands.units[node.outputs[0]]
        assert isinstance(op, Clip)
        lower, upper = self.settled.moved(op.lower, units), self.settled.moved(op.upper, units)
        lower, upper = np.minimum(lower, upper), np.maximum(lower, upper)
        if np.all(lower == op.lower) and np.all(upper == op.upper):
            return
        action = Reclip(
            lower if np.any(lower != -np.inf) else None,
            upper if np.any(upper != np.inf) else None,
            units.axis,
        )
        self.actions[node.owner] = action
        why = bounds_out_of_range(action, self.work.dtype(node.outputs[0]))
        if why:
            self._refuse([units], f"{node.label} cannot clip by channel: {why}")
        for bundle in self._of([units]):
            self._edited.setdefault(bundle, []).append(node.owner)

    def _refuse(self, units: Iterable[Units], why: str) -> None:
        """Keeps the site that asks most of a layer: of those that only add, if any is near."""
        bundles = self._of(units)
        near = {o for b in bundles for o in self._shifts.get(b, ())}
        near = near or {o for b in bundles for o in self._sites.get(b, ())}
        edges = {**self.assumptions.only_shift, **self.assumptions.gone}
        near = near or set(self.assumptions.gone) or set(edges)
        asked = {owner: max(map(_size, edges[owner])) for owner in sorted(near)}
        self.refused[max(asked, key=asked.__getitem__)] = why

    def _of(self, units: Iterable[Units]) -> list[int]:
        return self._bundles.of(*(self.assumptions.strand[u.scales] for u in units))

    def _by_bundle(self, sites: Mapping[str, list[Edge]]) -> dict[int, list[str]]:
        found: dict[int, list[str]] = {}
        for owner, edges in sites.items():
            for bundle in self._around(edges):
                found.setdefault(bundle, []).append(owner)
        return found

    def _around(self, edges: Iterable[Edge]) -> list[int]:
        """Bundles of scales on both sides of a site."""
        return self._of(units for edge in edges for units in (edge.before, edge.after))

    def equalised_notes(self) -> tuple[str, ...]:
        """What to say of the layers whose weights change."""
        notes = []
        only_shift = self.assumptions.only_shift.values()
        shifts = sum(any(np.any(edge.scale != 1) for edge in edges) for edges in only_shift)
        if shifts:
            which = "1 that stays only adds" if shifts == 1 else f"{shifts} that stay only add"
            notes.append(f"For int8, {which}: layers around have taken on the scale.")
        if not self.settled.equalised:
            even = "Scales between layers are even enough for int8: none was changed."
            return (*notes, even)
        count = sum(isinstance(action, Fold) for action in self.actions.values())
        clips = sum(isinstance(action, Reclip) for action in self.actions.values())
        said = f"Scales between layers were equalised for int8: {count} layers have other weights"
        return (*notes, f"{said}{f', and {clips} clip by channel' if clips else ''}.")

    def decision(self, owner: str) -> Decision:
        """Decision on a site."""
        if owner in self.kept:
            return Decision(owner, Fate.KEPT, reason=sentence(self.kept[owner]))
        into = tuple(sorted(self._edited_around[owner], key=self._places.__getitem__))
        return Decision(owner, Fate.FOLDED, into, self._stand_ins(into) if into else NOTHING_LEFT)

    @cached_property
    def _places(self) -> dict[str, int]:
        """Place of the first call of each layer in the model."""
        places: dict[str, int] = {}
        for place, node in enumerate(self.work.graph.nodes):
            places.setdefault(node.owner, place)
        return places

    @cached_property
    def _edited_around(self) -> dict[str, set[str]]:
        """Layers that are edited for the values on either side of each site.

        Where a site is next to others that go, and to nothing else, they are those around these. So
        what is edited is passed on from bundle to bundle, each at its distance from an edit.
        """
        around = {owner: self._around(edges) for owner, edges in self.assumptions.gone.items()}
        edited = {bundle: set(owners) for bundle, owners in self._edited.items()}
        distance = dict.fromkeys(edited, 0)
        farthest, level = set(edited), 0
        while farthest:
            level += 1
            reached: dict[int, set[str]] = {}
            for bundle in farthest:
                for owner in self._sites.get(bundle, ()):
                    for other in around[owner]:
                        if other not in edited:
                            reached.setdefault(other, set()).update(edited[bundle])
            distance |= dict.fromkeys(reached, level)
            edited |= reached
            farthest = set(reached)
        found = {}
        for owner, bundles in around.items():
            known = [bundle for bundle in bundles if bundle in edited]
            nearest = min((distance[bundle] for bundle in known), default=0)
            at_nearest = (edited[bundle] for bundle in known if distance[bundle] == nearest)
            found[owner] = set[str]().union(*at_nearest)
        return found

    def _stand_ins(self, owners: Collection[str]) -> str:
        """Sentences on layers that are replaced, to clip, or to add biases or border maps."""
        sentences = []
        for owner in owners:
            node, fold = self.work.nodes[owner], self.actions[owner]
            if isinstance(fold, Reclip):
                sentences.append(f"{node.label} clips with bounds by channel.")
            if not isinstance(fold, Fold) or not isinstance(node.op, Linear):
                continue
            if fold.outer_bias:
                sentences.append(bias_beside(node.label, self.work.bias_doubt(owner)))
            if fold.border is not None:
                sizes = (*fold.border.outputs, node.op.kernels[-1].out_channels)
                sentences.append(
                    f"{node.label} pads its input with zeros: it adds a border map of "
                    f"{' x '.join(map(str, sizes))}."
                )
        return " ".join(sentences)


def are_equal(first: ChannelMap | None, second: ChannelMap | None) -> bool:
    """Whether two maps are one, but for rounding."""
    if first is None or second is None:
        return first is second
    scales, shifts = (first.scale, second.scale), (first.shift, second.shift)
    return all(np.allclose(*both, rtol=TOLERANCE, atol=0) for both in (scales, shifts))


def _size(edge: Edge) -> float:
    """How far a site's map is from the identity, in powers of two."""
    scale = np.abs(edge.scale[edge.scale != 0])
    return float(
        max(np.abs(np.log2(scale)).max(initial=0), np.log2(1 + np.abs(edge.shift)).max(initial=0))
    )

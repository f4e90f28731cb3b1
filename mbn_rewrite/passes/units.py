"""Which BatchNormalizations can go, by the units of all values at once.

A BatchNormalization y = s x + t goes if what it reads and what it gives can be one stored tensor:
with the units of `rules.relations`, p_x = s p_y and o_y = s o_x + t. Sites are taken one after
the other: each is assumed to go, and stays if that contradicts what operations demand and what was
assumed before. What contradicts is the reason.

A scale of 0 has no inverse. Such a channel holds the same value everywhere, so that either what
nothing else reads before it may be anything, and is made constant by the layers that give it
(`dead`), or what nothing else gives after it may be anything, and the layers that read it leave it
out (`blind`).
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass

import numpy as np

from mbn_rewrite.ir.channel_map import Array, ChannelMap
from mbn_rewrite.ir.graph import BatchNorm, Clip, Concat, Merge, Node, Stack
from mbn_rewrite.passes.indexed_graph import Side
from mbn_rewrite.passes.strands import IS_OUTPUT, Strands, Sum, Units
from mbn_rewrite.passes.ties import NO_CAUSE, TOLERANCE, Conflict


@dataclass(frozen=True)
class Edge:
    """One call of a BatchNormalization, as a tie between the units around it.

    Attributes:
        node: the call.
        before: units of what it reads.
        after: units of what it gives.
        scale: s of the tie; 1 where s is 0.
        shift: t of the tie.
        dead: channels that are made constant before it.
        blind: channels that are left out after it, whose scales it does not tie. There s may be 0.
    """

    node: Node
    before: Units
    after: Units
    scale: Array
    shift: Array
    dead: Array
    blind: Array


class Assumptions:
    """Assumptions on what goes, and what contradicts them.

    Args:
        strands: the units of the graph.

    Attributes:
        gone: the calls of what goes.
        only_shift: the calls of what stays without its scale.
    """

    def __init__(self, strands: Strands) -> None:
        self.strands = strands
        self.gone: dict[str, list[Edge]] = {}
        self.only_shift: dict[str, list[Edge]] = {}
        # What is equal before anything is assumed has one number.
        self.strand = strands.scales.find(np.arange(strands.scales.count))[0]
        self.origin = strands.origins.find(np.arange(strands.origins.count))[0]
        self._merges: dict[int, list[Node]] = defaultdict(list)  # by scale of their first channel
        for node in strands.graph.graph.nodes:
            if isinstance(node.op, (Merge, Concat, Stack)) and node.outputs[0] in strands.units:
                for number in strands.units[node.outputs[0]].scales[:1]:
                    self._merges[int(self.strand[number])].append(node)
        self._blocks = _Blocks(strands)
        self._solved: list[int] = []  # sums that have nothing more to tell
        # Sums that tell something once scales are known.
        self._scaled = {i for i, total in enumerate(strands.sums) if total.added is not None}
        assert not self._sums(set(range(len(strands.sums))))  # the identity satisfies them
        self._zeros = _ZeroScales(strands, self.strand)

    def assume(self, owner: str) -> str:
        """Lets a BatchNormalization go; returns why it cannot, or ""."""
        scales, origins = self.strands.scales, self.strands.origins
        marks, zeros = (scales.mark(), origins.mark()), self._zeros.mark()
        edges, stuck = [], ""
        for call in self.strands.graph.sites[owner]:
            edge, why = self._zeros.edge(call)
            self._zeros.settle(edge)  # what the next call reads may be what this one gives
            edges.append(edge)
            stuck = stuck or why
        self._solved.clear()
        reason = self._contradiction(edges) or stuck
        if reason:
            scales.roll_back(marks[0])
            origins.roll_back(marks[1])
            self._zeros.roll_back(zeros)
        else:
            self.gone[owner] = edges
            self._blocks.drop(self._solved)
        scales.keep()
        origins.keep()
        return reason

    def assume_only_shift(self, owner: str) -> None:
        """Lets the scale of a BatchNormalization that stays go, if that contradicts nothing."""
        calls = self.strands.graph.sites[owner]
        if not all(self.strands.fits(call) and np.all(_map(call).scale != 0) for call in calls):
            return
        scales, origins = self.strands.scales, self.strands.origins
        marks = scales.mark(), origins.mark()
        edges = [self._plain_edge(call) for call in calls]
        self._solved.clear()
        conflicts = (
            scales.tie(edge.before.scales, edge.after.scales, edge.scale, np.zeros(1))
            for edge in edges
        )
        if any(conflicts) or self._sums(self._scaled):
            scales.roll_back(marks[0])
            origins.roll_back(marks[1])
        else:
            self.only_shift[owner] = edges
            self._blocks.drop(self._solved)
        scales.keep()
        origins.keep()

    def _plain_edge(self, call: Node) -> Edge:
        """The tie of a call none of whose scales is 0."""
        m, units = _map(call), self.strands.units
        none = np.zeros(m.channels, bool)
        sides = units[call.inputs[0]], units[call.outputs[0]]
        return Edge(call, *sides, m.scale, m.shift, dead=none, blind=none)

    def choose(self, numbers: Array) -> None:
        """Sets origins that nothing has told so far to zero.

        Sums of three unknowns and more are not solved together. Where they contradict only all at
        once, the values that are settled do not satisfy them; see `Settled.broken`.
        """
        conflict = self.strands.origins.set(numbers, np.zeros(1), NO_CAUSE)
        assert conflict is None
        self._solved.clear()
        self._sums(self._blocks.joined(numbers))
        self._blocks.drop(self._solved)
        self.strands.origins.keep()

    def choose_scales(self, numbers: Array, values: Array) -> None:
        """Sets scales that nothing has told so far, each of another set.

        What then contradicts is found as `choose` says.
        """
        conflict = self.strands.scales.set(numbers, values, NO_CAUSE)
        assert conflict is None
        self._solved.clear()
        self._sums(self._scaled)
        self._blocks.drop(self._solved)
        self.strands.scales.keep()
        self.strands.origins.keep()

    def _contradiction(self, edges: Iterable[Edge]) -> str:
        """What contradicts the ties of the calls of one BatchNormalization, or ""."""
        scales, origins = self.strands.scales, self.strands.origins
        woken: set[int] = set()
        for edge in edges:
            before, after, s, t = edge.before, edge.after, edge.scale, edge.shift
            tied = ~edge.blind
            conflict = scales.tie(before.scales[tied], after.scales[tied], s[tied], np.zeros(1))
            if conflict is not None:
                return self._scale_reason(edge, conflict)
            tied = s != 0
            conflict = origins.tie(after.origins[tied], before.origins[tied], s[tied], t[tied])
            if conflict is not None:
                return self._reason(edge, conflict.right, conflict.left, "a shift cannot pass")
            conflict = origins.set(after.origins[~tied], t[~tied], NO_CAUSE)
            if conflict is not None:
                return self._reason(edge, NO_CAUSE, conflict.right, "a shift cannot pass")
            woken |= self._blocks.joined(before.origins, after.origins)
        return self._sums(woken | self._scaled)

    def _sums(self, woken: Collection[int]) -> str:
        """Follows up on the sums of origins; returns what contradicts, or ""."""
        woken = set(woken)
        pending = deque(sorted(woken))
        while pending:
            number = pending.popleft()
            woken.discard(number)
            total = self.strands.sums[number]
            outcome = self._added_up(total)
            if outcome is None:
                self._solved.append(number)
            if isinstance(outcome, Conflict):
                node, phrase, _ = self.strands.causes[total.cause]
                return f"{node.label} {phrase}"
            if outcome:
                fresh = self._blocks.joined(*(term.origins for term in total.terms)) - woken
                fresh.discard(number)
                pending.extend(sorted(fresh))
                woken |= fresh
        return ""

    def _added_up(self, total: Sum) -> Conflict | bool | None:
        """Whether a sum of origins told something new: one unknown is known, two are tied.

        None if all its terms are known.
        """
        origins = self.strands.origins
        roots, slopes, constant, size = [], [], np.zeros(1), np.zeros(1)
        all_known = True
        for weight, term in zip(total.weights, total.terms, strict=True):
            root, a, b = origins.find(term.origins)
            known, value = origins.known(term.origins)
            all_known = all_known and bool(known.all())
            part = weight * np.where(known, value, b)
            roots.append(root)
            slopes.append(np.where(known, 0.0, weight * a))
            constant, size = constant + part, size + np.abs(part)
        open_scale = np.zeros(1, bool)
        if total.added is not None:
            known, scale = self.strands.scales.known(total.terms[0].scales)
            part = np.divide(total.added, scale, where=known, out=np.zeros(len(scale)))
            constant, size = constant + total.added - part, size + np.abs(total.added) + abs(part)
            open_scale = ~known & (total.added != 0)
            all_known = all_known and not open_scale.any()
        slope = np.stack(slopes)
        for i in range(len(roots)):
            for j in range(i):
                same = (roots[i] == roots[j]) & (slope[i] != 0) & (slope[j] != 0)
                both = slope[i] + slope[j]
                both[np.abs(both) <= TOLERANCE * np.abs(slope[i])] = 0
                slope[j] = np.where(same, both, slope[j])
                slope[i] = np.where(same, 0.0, slope[i])
        unknown = np.count_nonzero(slope, axis=0)
        unknown = np.where(open_scale, len(roots) + 1, unknown)
        wrong = (unknown == 0) & ~(np.abs(constant) <= TOLERANCE * size)
        if wrong.any():
            return Conflict(int(wrong.sum()))
        root = np.stack(roots)
        one = np.flatnonzero(unknown == 1)
        if len(one):
            at = np.argmax(slope[:, one] != 0, axis=0)
            conflict = origins.set(root[at, one], -constant[one] / slope[at, one], total.cause)
            if conflict is not None:
                return conflict
        two = np.flatnonzero(unknown == 2)
        if len(two):
            here = slope[:, two] != 0
            i, j = np.argmax(here, axis=0), len(roots) - 1 - np.argmax(here[::-1], axis=0)
            a, b = slope[i, two], slope[j, two]
            conflict = origins.tie(root[i, two], root[j, two], -b / a, -constant[two] / a)
            if conflict is not None:
                return conflict
        if not all_known:
            return bool(len(one) or len(two))
        return None

    # -- reasons -------------------------------------------------------------------------

    def _scale_reason(self, edge: Edge, conflict: Conflict) -> str:
        if conflict.signs:
            total = len(edge.scale)
            what = f"a negative scale cannot pass ({conflict.channels} of {total} channels)"
            return self._reason(edge, conflict.left, conflict.right, what)
        return self._reason(edge, conflict.left, conflict.right, "a scale cannot pass")

    def _reason(self, edge: Edge, before: int, after: int, what: str) -> str:
        causes = (("before", before), ("after", after))
        told = [self._told(edge, side, cause, what) for side, cause in causes if cause != NO_CAUSE]
        return "; ".join(told) or self._meeting(edge)

    def _meeting(self, edge: Edge) -> str:
        """Reason where what a site reads and what it gives are tied to one scale."""
        joined = self._merges.get(int(self.strand[edge.after.scales[0]]), ())
        places = self.strands.places
        later = [node for node in joined if places[node.owner] > places[edge.node.owner]]
        if not later:
            return "what it reads and what it gives meet again with other scales"
        return f"after it, {later[0].label} joins it with values that do not have its scale"

    def _told(self, edge: Edge, side: str, cause: int, what: str) -> str:
        node, phrase, limited = self.strands.causes[cause]
        later = self.strands.places[node.owner] > self.strands.places[edge.node.owner]
        where = side if later == (side == "after") or node.owner == edge.node.owner else "beside"
        told = f"{where} it, {node.label} {phrase}"
        if node.owner == edge.node.owner:
            told = f"what it gives {phrase}" if phrase == IS_OUTPUT else f"{where} it, it {phrase}"
        elif phrase == IS_OUTPUT:
            told = f"{where} it, {node.label} {phrase.replace('is', 'is also', 1)}"
        return f"{told}, which {what}" if limited else told


class Bundles:
    """Channels that come together wherever they come, so that they can be named as one.

    Args:
        vectors: the numbers of each value.
        count: how many numbers there are.
    """

    def __init__(self, vectors: Iterable[Array], count: int) -> None:
        # The values that a number is part of, as a sum of random numbers, one for each.
        rng, sums = np.random.default_rng(0), np.zeros(count, np.uint64)
        for vector in vectors:
            np.add.at(sums, vector, rng.integers(1, 2**64 - 1, dtype=np.uint64))
        self._bundle = np.unique(sums, return_inverse=True)[1]

    def of(self, *vectors: Array) -> list[int]:
        """Bundles that the numbers of values are in, in ascending order."""
        return sorted({b for v in vectors for b in np.unique(self._bundle[v]).tolist()})


class _Blocks:
    """Sums of origins, found by the numbers that they add up.

    Numbers that were given out together, or have been tied, are in one block: more than need be
    tied, so that looking them up takes no time.
    """

    def __init__(self, strands: Strands) -> None:
        self._all_sums = strands.sums
        self._starts = np.asarray(strands.block)
        self._root = list(range(len(strands.block)))
        self._sums: dict[int, set[int]] = defaultdict(set)
        for left, right in strands.same_origin:
            self.joined(left, right)
        for number, total in enumerate(strands.sums):
            for term in total.terms:
                for block in self._blocks(term.origins):
                    self._sums[block].add(number)

    def joined(self, *numbers: Array) -> set[int]:
        """Joins the blocks of numbers; returns the sums that any number in them is part of."""
        first, *others = {block for array in numbers for block in self._blocks(array)}
        for other in others:
            if len(self._sums[first]) < len(self._sums[other]):
                first, other = other, first
            self._root[other] = first
            self._sums[first] |= self._sums.pop(other)
        return self._sums[first]

    def drop(self, solved: Iterable[int]) -> None:
        """Lets go of sums that have nothing more to tell."""
        for number in solved:
            for term in self._all_sums[number].terms:
                for block in self._blocks(term.origins):
                    self._sums[block].discard(number)

    def _blocks(self, numbers: Array) -> list[int]:
        if not len(numbers):
            return []
        first, last = self._starts.searchsorted((numbers.min(), numbers.max()), side="right") - 1
        if first == last:
            return [self._find(int(first))]
        blocks = np.unique(self._starts.searchsorted(numbers, side="right") - 1)
        return [self._find(int(block)) for block in blocks]

    def _find(self, block: int) -> int:
        root = self._root
        while root[block] != block:
            root[block] = root[root[block]]
            block = root[block]
        return block


class _ZeroScales:
    """Channels whose scale is 0, and where they can go; see the module's last paragraph."""

    def __init__(self, strands: Strands, strand: Array) -> None:
        self._units = strands.units
        self._strand = strand
        calls = [call for calls in strands.graph.sites.values() for call in calls]
        self._calls = [call for call in calls if strands.fits(call)]
        self._lone_sources = np.zeros(strands.scales.count, bool)
        self._dead = np.zeros(strands.scales.count, bool)
        self._blind = np.zeros(strands.scales.count, bool)
        self._passed_on = np.zeros(strands.scales.count, bool)  # to what follows one that goes
        self._any = any((_map(call).scale == 0).any() for call in self._calls)
        if self._any:
            self._look(strands)

    def _look(self, strands: Strands) -> None:
        size = strands.scales.count
        fixed = strands.scales.known(np.arange(size))[0]
        for total in strands.sums:  # a constant that is added is none of an unread channel
            if total.added is not None:
                fixed[self._strand[total.terms[0].scales[total.added != 0]]] = True
        layers, norms, sources = (np.zeros(size, np.int64) for _ in range(3))
        sides: dict[tuple[str, Side, bool], list[Array]] = defaultdict(list)
        for end in strands.ends:
            key = end.node.owner, end.side, isinstance(end.node.op, BatchNorm)
            sides[key].append(self._strand[end.units.scales])
        for (_, side, is_norm), numbers in sides.items():  # all calls of a layer count as one
            counts = sources if side is Side.AFTER else norms if is_norm else layers
            counts[np.unique(np.concatenate(numbers))] += 1
        # A constant that a clip reads may be another one after it; only zero is not.
        clips, beside_zero = np.zeros((2, size), bool)
        for node in strands.clips:
            assert isinstance(node.op, Clip)
            numbers = self._strand[strands.units[node.outputs[0]].scales]
            clips[numbers] = True
            beside_zero[numbers] |= not node.op.lower <= 0 <= node.op.upper
        self._lone_sources = (sources == 1) & ~fixed & ~clips
        ends = (norms == 1) & (layers == 0) & ~fixed & ~beside_zero
        # What cannot be made constant cannot be made so through a BatchNormalization either.
        while True:
            before = ends.copy()
            for call in self._calls:
                x, y = self._sides(call)
                np.logical_and.at(ends, y, ends[x])
            if np.array_equal(before, ends):
                break
        while True:
            before = self._dead.copy()
            for call in self._calls:
                x, y = self._sides(call)
                unread = (_map(call).scale == 0) | self._dead[y]
                all_unread = np.ones(size, bool)  # where several channels have one number
                np.logical_and.at(all_unread, x, unread & ends[x])
                self._dead[x] |= all_unread[x]
            if np.array_equal(before, self._dead):
                break

    def _sides(self, call: Node) -> tuple[Array, Array]:
        x, y = self._units[call.inputs[0]], self._units[call.outputs[0]]
        return self._strand[x.scales], self._strand[y.scales]

    def edge(self, call: Node) -> tuple[Edge, str]:
        """The tie of a call, and why a scale of 0 keeps it, or ""."""
        m, (x, y) = _map(call), self._sides(call)
        unread = self._dead[y]
        zero = (m.scale == 0) & ~unread
        dead = zero & self._dead[x]
        blind = (zero & ~dead) | self._blind[x]
        stuck = blind & (~self._lone_sources[y] | self._passed_on[y])
        why = ""
        if stuck.any():
            why = (
                f"a scale of 0 ({int(stuck.sum())} of {m.channels} channels) makes what it gives "
                "constant there, and others need what it reads as it is and give what it is joined "
                "with"
            )
        scale, shift = m.scale.copy(), m.shift.copy()
        scale[dead | unread] = 1.0
        shift[unread] = 0.0
        units = self._units
        sides = units[call.inputs[0]], units[call.outputs[0]]
        edge = Edge(call, *sides, scale, shift, dead | (unread & self._dead[x]), blind)
        return edge, why

    def mark(self) -> tuple[Array, Array]:
        """What to roll back to."""
        if not self._any:
            return self._blind, self._passed_on
        return self._blind.copy(), self._passed_on.copy()

    def roll_back(self, marked: tuple[Array, Array]) -> None:
        """Forgets the edges since a mark."""
        self._blind, self._passed_on = marked

    def settle(self, edge: Edge) -> None:
        """Takes note of an edge that goes."""
        if self._any:
            self._blind[self._strand[edge.after.scales[edge.blind]]] = True
            self._passed_on[self._strand[edge.before.scales[~edge.blind]]] = True


def _map(call: Node) -> ChannelMap:
    op = call.op
    assert isinstance(op, BatchNorm)
    assert op.map is not None
    return op.map

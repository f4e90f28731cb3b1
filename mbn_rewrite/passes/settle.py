"""Values of all units, once it is decided which BatchNormalizations go.

What demands and ties leave open is chosen here: the identity wherever that can be, so that weights
that need not change stay equal bit for bit.

Scales and origins are multiplied out along the BatchNormalizations that go, away from where the
identity is, and in both directions at once: p and q for layers that give a value, which is kept as
p x + q, and r and o for layers that read it, which find x as r times what is kept, plus o. What is
on one side of a single BatchNormalization is then its scale and its shift bit for bit, whatever the
rounding of 1 / s.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np

from mbn_rewrite.ir.channel_map import Array, ChannelMap
from mbn_rewrite.passes.equalise import factors
from mbn_rewrite.passes.strands import Sum, Units
from mbn_rewrite.passes.ties import TOLERANCE
from mbn_rewrite.passes.units import Assumptions, Bundles, Edge


class Settled:
    """Units of all values.

    Args:
        assumptions: what goes.
        equalised: reads weights, by owner and name, if scales are to be chosen so that few bits
            hold them well; None to choose the identity.

    Attributes:
        equalised: whether any scale was chosen so.
    """

    def __init__(
        self, assumptions: Assumptions, equalised: Callable[[str, str], Array] | None = None
    ) -> None:
        strands = assumptions.strands
        self._assumptions = assumptions
        self._strands = strands
        self._edges = [edge for edges in assumptions.gone.values() for edge in edges]
        only_shift = assumptions.only_shift.values()
        self._scale_edges = [*self._edges, *(edge for edges in only_shift for edge in edges)]
        self._strand = assumptions.strand  # of each scale: equal numbers are equal scales
        count = strands.scales.count
        self._p, self._r, self._p_known = np.ones(count), np.ones(count), np.zeros(count, bool)
        # Values with one origin are found by the root of the ties that always hold.
        self._origin = assumptions.origin
        count = strands.origins.count
        self._q, self._o, self._o_known = np.zeros(count), np.zeros(count), np.zeros(count, bool)
        self._zeros: list[Array] = []  # origins that were chosen to be zero
        self._dead, self._blind = np.zeros((2, strands.scales.count), bool)
        for edge in self._edges:
            self._dead[self._strand[edge.before.scales[edge.dead]]] = True
            self._blind[self._strand[edge.after.scales[edge.blind]]] = True
        self._sums = [self._without_repeats(total) for total in strands.sums]
        values = (self._origin[units.origins] for units in strands.units.values())
        self._bundles = Bundles(values, count)
        self._steps: dict[int, list[Edge | Sum]] = defaultdict(list)
        self._every: list[Edge | Sum] = [*self._edges, *self._sums]
        for step in self._every:
            for bundle in self._bundles.of(*(self._origin[u.origins] for u in _sides(step))):
                self._steps[bundle].append(step)
        self._taken = np.zeros(count)  # how far a BatchNormalization takes what it gives
        for edge in self._edges:
            np.maximum.at(self._taken, self._origin[edge.after.origins], np.abs(edge.shift))
        self.equalised = False
        self._settle_scales(equalised)
        self._settle_origins()

    def _without_repeats(self, total: Sum) -> Sum:
        """A sum in which no origin comes twice, as in x + x."""
        weights: list[float | Array] = []
        terms: list[Units] = []
        for weight, term in zip(total.weights, total.terms, strict=True):
            numbers = self._origin[term.origins]
            for i, other in enumerate(terms):
                if np.array_equal(numbers, self._origin[other.origins]):
                    weights[i] = weights[i] + weight
                    break
            else:
                weights.append(weight)
                terms.append(term)
        return replace(total, weights=tuple(weights), terms=tuple(terms))

    def broken(self) -> str:
        """The last site that goes though the values of units do not let it, or ""."""
        for step in self._every:
            if not self._holds(step):
                numbers = np.concatenate([self._origin[units.origins] for units in _sides(step)])
                around = [edge for edge in self._around(numbers) if isinstance(edge, Edge)]
                return (around or self._edges)[-1].node.owner
        return ""

    def _holds(self, step: Edge | Sum) -> bool:
        if isinstance(step, Edge):
            o_x, o_y = (self._o[self._origin[units.origins]] for units in _sides(step))
            parts = np.stack([o_y, -step.scale * o_x, -step.shift])
        else:
            terms = zip(step.weights, step.terms, strict=True)
            parts = np.stack([w * self._o[self._origin[u.origins]] for w, u in terms])
            if step.added is not None:
                r = self._r[self._strand[step.terms[0].scales]]
                parts = np.concatenate([parts, [step.added, -step.added * r]])
        size = np.abs(parts).sum(axis=0)
        return bool(np.all(np.abs(parts.sum(axis=0)) <= 1e-9 * size))

    # -- reading -------------------------------------------------------------------------

    def given(self, units: Units) -> ChannelMap | None:
        """Map that a layer does on a value that it gives; None for the identity."""
        number, origin = self._strand[units.scales], self._origin[units.origins]
        p = np.where(self._dead[number], 0.0, self._p[number])
        return _map(p, self._q[origin], units.axis)

    def read(self, units: Units) -> ChannelMap | None:
        """Map that a layer does on a value that it reads; None for the identity."""
        number, origin = self._strand[units.scales], self._origin[units.origins]
        r = np.where(self._blind[number], 0.0, self._r[number])
        return _map(r, self._o[origin], units.axis)

    def moved(self, bound: float, units: Units) -> Array:
        """A bound of a value, for each channel of how it is kept."""
        number, origin = self._strand[units.scales], self._origin[units.origins]
        return self._p[number] * bound + self._q[origin] + 0.0  # no -0

    def lost(self, units: Units) -> float:
        """How far off a value is kept, beyond what its computation takes it anyway: largest |o|.

        What is kept is as large as p |o| then, and rounded as such: of a value that is not far
        from 1, log2 |o| bits are lost.
        """
        origin = self._origin[units.origins]
        return float((np.abs(self._o[origin]) - 4 * self._taken[origin]).max(initial=0))

    # -- scales --------------------------------------------------------------------------

    def _settle_scales(self, equalised: Callable[[str, str], Array] | None) -> None:
        numbers = np.arange(self._strands.scales.count)
        root, _, _ = self._strands.scales.find(numbers)
        fixed = self._strands.scales.known(numbers)[0]
        # Where a set is fixed, it is so by the identity of some of its strands.
        seeds = np.zeros(len(numbers), bool)
        for units, _ in self._strands.fixed:
            seeds[self._strand[units.scales]] = True
        free = ~fixed & (self._strand == numbers)
        chosen = self._chosen(np.flatnonzero(free), root)
        seeds[chosen] = True
        sign = self._strands.scales.signs(numbers).astype(np.float64)
        self._p[seeds] = self._r[seeds] = np.where(fixed | (sign == 0), 1.0, sign)[seeds]
        self._p_known = seeds
        self._identity = np.zeros(len(numbers), bool)
        self._identity[chosen] = True
        self._multiply_out()
        if equalised:
            scales = self._p, self._r
            factor = factors(self._strands, self._strand, root, ~fixed, scales, equalised)
            self.equalised = bool(np.any(factor != 1))
            self._p *= factor
            self._r /= factor
        self._assumptions.choose_scales(chosen, self._p[chosen])

    def _chosen(self, strands: Array, root: Array) -> Array:
        """The strand of each free set that keeps the identity: the one that saves most edits.

        It saves edits of kernels at all its ends, and of biases at those whose origin is zero.
        """
        count = len(root)
        ends, plain, norms = (np.zeros(count, np.int64) for _ in range(3))
        order = np.zeros(count, np.int64)
        for end in self._strands.ends:
            known, value = self._strands.origins.known(end.units.origins)
            numbers = np.unique(self._strand[end.units.scales])
            ends[numbers] += 1
            plain[numbers] += not bool((known & (value != 0)).any())
        for place, edge in enumerate(self._edges):
            for numbers in (self._strand[edge.before.scales], self._strand[edge.after.scales]):
                norms[numbers] += 1
            order[self._strand[edge.after.scales]] = place + 1
        keys = (order, norms, plain, ends + 2 * plain, root)
        ranked = strands[np.lexsort([key[strands] for key in keys])]
        last = np.append(np.diff(root[ranked]) != 0, True)[: len(ranked)]
        return ranked[last]

    def _multiply_out(self) -> None:
        """Sweeps over the edges, forward and backward, until every scale is known."""
        edges = self._scale_edges
        while True:
            moved = [self._multiplied(edge) for edge in edges]
            moved += [self._multiplied(edge) for edge in reversed(edges)]
            if not any(moved):
                return

    def _multiplied(self, edge: Edge) -> bool:
        tied = ~edge.blind
        x, y = self._strand[edge.before.scales][tied], self._strand[edge.after.scales][tied]
        s, known = edge.scale[tied], self._p_known
        p, r = self._p, self._r
        up, down = known[y] & ~known[x], known[x] & ~known[y]
        with np.errstate(all="ignore"):  # what is not finite is found by those who fold it
            p[x[up]], r[x[up]] = s[up] * p[y[up]], r[y[up]] / s[up]
            p[y[down]], r[y[down]] = p[x[down]] / s[down], s[down] * r[x[down]]
        told = np.concatenate([x[up], y[down]])
        known[told] = True
        # s / s may be off 1 by its last digit, and would have weights edited that need not be.
        identity = told[np.abs(p[told] - 1) <= TOLERANCE]
        p[identity] = r[identity] = 1.0
        return bool(len(told))

    # -- origins -------------------------------------------------------------------------

    def _settle_origins(self) -> None:
        strands = self._strands
        self._open_up()
        for units in strands.units.values():  # where the scale is the identity
            self._choose(units, self._identity[self._strand[units.scales]])
        self._open_up()
        for edge in reversed(self._edges):
            self._choose(edge.after)
        self._open_up()
        for units, _ in (*strands.fixed, *strands.zero):
            self._o_known[self._origin[units.origins]] = True
        for chosen in self._zeros:
            self._o_known[self._origin[chosen]] = True
        for edge in self._edges:
            constant = edge.scale == 0
            numbers = self._origin[edge.after.origins[constant]]
            self._o[numbers], self._o_known[numbers] = edge.shift[constant], True
        self._follow(np.flatnonzero(self._o_known))
        for units in strands.units.values():  # sums that only all together tell
            self._adopt(units)

    def _choose(self, units: Units, where: Array | None = None) -> None:
        """Has origins be zero that nothing tells."""
        known, _ = self._strands.origins.known(units.origins)
        chosen = units.origins[~known if where is None else ~known & where]
        if len(chosen):
            # Of those that are tied to one another, one; it tells the others.
            root = self._strands.origins.find(chosen)[0]
            chosen = chosen[np.unique(root, return_index=True)[1]]
            self._assumptions.choose(chosen)
            self._zeros.append(chosen)

    def _open_up(self) -> None:
        """Chooses terms of sums that are told in part, the output first, the first input last."""
        origins = self._strands.origins
        for total in self._sums:
            first, *rest = total.terms
            for term in (first, *reversed(rest)):
                known = np.sum([origins.known(t.origins)[0] for t in total.terms], axis=0)
                self._choose(term, (known > 0) & (known < len(total.terms) - 1))

    def _adopt(self, units: Units) -> None:
        numbers = self._origin[units.origins]
        fresh = ~self._o_known[numbers]
        if fresh.any():
            _, value = self._strands.origins.known(units.origins)
            self._o[numbers[fresh]] = value[fresh]
            self._q[numbers[fresh]] = -(self._p[self._strand[units.scales]] * value)[fresh]
            self._o_known[numbers[fresh]] = True
            self._follow(numbers[fresh])

    def _follow(self, numbers: Array) -> None:
        """Has known origins tell others, along edges and sums."""
        pending = deque(self._around(numbers))
        waiting = {id(step) for step in pending}
        while pending:
            step = pending.popleft()
            waiting.discard(id(step))
            told = self._told(step) if isinstance(step, Edge) else self._added_up(step)
            for other in self._around(told):
                if id(other) not in waiting:
                    waiting.add(id(other))
                    pending.append(other)

    def _around(self, numbers: Array) -> list[Edge | Sum]:
        found = {id(step): step for b in self._bundles.of(numbers) for step in self._steps[b]}
        return list(found.values())

    def _told(self, edge: Edge) -> Array:
        tied = edge.scale != 0
        x, y = self._origin[edge.before.origins][tied], self._origin[edge.after.origins][tied]
        s, t = edge.scale[tied], edge.shift[tied]
        p_y = self._p[self._strand[edge.after.scales]][tied]
        r_x = self._r[self._strand[edge.before.scales]][tied]
        known, q, o = self._o_known, self._q, self._o
        up, down = known[y] & ~known[x], known[x] & ~known[y]
        with np.errstate(all="ignore"):
            q[x[up]] = _added(p_y[up] * t[up], q[y[up]])
            o[x[up]] = -q[x[up]] * r_x[up]
            o[y[down]] = _added(s[down] * o[x[down]], t[down])
            q[y[down]] = -p_y[down] * o[y[down]]
        known[x[up]] = known[y[down]] = True
        return np.concatenate([x[up], y[down]])

    def _added_up(self, total: Sum) -> Array:
        """Solves a sum for the origin that alone is unknown, in q and in o."""
        numbers = [self._origin[term.origins] for term in total.terms]
        known = np.stack([self._o_known[number] for number in numbers])
        lone = np.count_nonzero(~known, axis=0) == 1
        weights = [np.broadcast_to(weight, lone.shape) for weight in total.weights]
        told = []
        for i, number in enumerate(numbers):
            here = np.flatnonzero(lone & ~known[i] & (weights[i] != 0))
            if not len(here):
                continue
            others = [other for other in range(len(numbers)) if other != i]
            scales = self._strand[total.terms[0].scales][here]
            for array, factor in ((self._q, self._p), (self._o, self._r)):
                parts = [weights[j][here] * array[numbers[j][here]] for j in others]
                if total.added is not None:  # -p (b - b / p) = b - p b
                    added = total.added[here]
                    parts += [added, -added * factor[scales]]
                array[number[here]] = -_added(*parts) / weights[i][here]
            self._o_known[number[here]] = True
            told.append(number[here])
        return np.concatenate(told or [_NOTHING])


_NOTHING = np.zeros(0, np.intp)


def _added(*parts: Array) -> Array:
    """Sum of some parts; 0 where it is but their rounding."""
    total, size = np.sum(parts, axis=0), np.sum(np.abs(parts), axis=0)
    return np.where(np.abs(total) <= TOLERANCE * size, 0.0, total)


def _sides(step: Edge | Sum) -> Iterable[Units]:
    return (step.before, step.after) if isinstance(step, Edge) else step.terms


def _map(scale: Array, shift: Array, axis: int) -> ChannelMap | None:
    if np.all(scale == 1) and np.all(shift == 0):
        return None
    return ChannelMap(scale, shift + 0.0, axis)  # no -0

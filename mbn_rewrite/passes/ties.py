"""Numbers tied to one another by affine equations, as a union-find over arrays of them.

Every number is known relative to the root of its set, x = a * root + b, and a set whose root is
known is known whole. Ties are made for whole vectors at a time. A tie that contradicts those made
before is refused; `roll_back` undoes what was made since a mark.

Tarjan, "Efficiency of a good but not linear set union algorithm" (1975) has the structure; numbers
on the edges are folklore. Roots are the smallest numbers of their sets; what looks one up shortens
its path.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mbn_rewrite.ir.channel_map import Array

# Sums of products of float64 numbers that are equal in exact arithmetic differ by some units of
# 2^-53 of their terms. What differs by more is not equal.
TOLERANCE = 1e-12

NO_CAUSE = -1


@dataclass(frozen=True)
class Conflict:
    """Contradiction between a tie, or a value, and those made before.

    Attributes:
        channels: how many of the numbers contradict.
        left: the cause of what is known of the left side, or `NO_CAUSE`.
        right: likewise of the right side.
        signs: whether it is the sign alone that contradicts.
    """

    channels: int
    left: int = NO_CAUSE
    right: int = NO_CAUSE
    signs: bool = False


class Ties:
    """Numbers, and the ties between them.

    Args:
        count: how many numbers there are. Each is alone at first, and unknown.
        may_be_zero: whether numbers are solved for that are tied to themselves, x = 2 x - 1, even
            where that makes them 0; else such a tie is a conflict.
    """

    def __init__(self, count: int, may_be_zero: bool = False) -> None:
        self.count = count
        self._may_be_zero = may_be_zero
        self._root = np.arange(count)
        self._a = np.ones(count)
        self._b = np.zeros(count)
        self._known = np.zeros(count, bool)  # of roots, as the next four
        self._value = np.zeros(count)
        self._cause = np.full(count, NO_CAUSE)
        self._sign = np.zeros(count, np.int8)  # that the root must have; 0 for any
        self._sign_cause = np.full(count, NO_CAUSE)
        self._log: list[tuple[Array, Array, Array]] = []

    # -- taking back ---------------------------------------------------------------------

    def mark(self) -> int:
        """Place to roll back to."""
        return len(self._log)

    def roll_back(self, mark: int) -> None:
        """Undoes all that was done since a mark."""
        while len(self._log) > mark:
            array, where, old = self._log.pop()
            array[where] = old

    def keep(self) -> None:
        """Lets go of what would be needed to roll back."""
        self._log.clear()

    def _write(self, array: Array, where: Array, values: Array | bool) -> None:
        self._log.append((array, where, array[where]))
        array[where] = values

    # -- asking --------------------------------------------------------------------------

    def find(self, numbers: Array) -> tuple[Array, Array, Array]:
        """Roots of numbers, and a and b of x = a * root + b."""
        root, a, b = self._root[numbers], self._a[numbers], self._b[numbers]
        moved = False
        while True:
            further = self._root[root]
            if (further == root).all():
                break
            moved = True
            b = a * self._b[root] + b
            a = a * self._a[root]
            root = further
        if moved:
            self._write(self._root, numbers, root)
            self._write(self._a, numbers, a)
            self._write(self._b, numbers, b)
        return root, a, b

    def known(self, numbers: Array) -> tuple[Array, Array]:
        """Mask of the numbers that are known, and their values (0 where they are not).

        A value that is but the rounding of its parts is 0.
        """
        root, a, b = self.find(numbers)
        known, told = self._known[root], a * self._value[root]
        value = told + b
        value[_close(told, -b, np.abs(told) + np.abs(b))] = 0.0
        return known, np.where(known, value, 0.0)

    def signs(self, numbers: Array) -> Array:
        """Sign that each number must have; 0 for any."""
        root, a, _ = self.find(numbers)
        own = self._sign[root] * np.sign(a)
        return np.where(self._known[root], np.sign(a * self._value[root]), own).astype(np.int8)

    # -- tying ---------------------------------------------------------------------------

    @np.errstate(all="ignore")  # what is not finite is close to nothing, and so conflicts
    def set(self, numbers: Array, values: Array, cause: int) -> Conflict | None:
        """Makes numbers known; a conflict has the cause of what was known on the right."""
        values = np.broadcast_to(values, numbers.shape)
        root, a, b = self.find(numbers)
        wanted = (values - b) / a
        fresh = ~self._known[root]
        self._write(self._value, root[fresh], wanted[fresh])
        self._write(self._known, root[fresh], True)
        self._write(self._cause, root[fresh], np.full(int(fresh.sum()), cause))
        # Numbers that come twice were perhaps given two values.
        told = a * self._value[root]
        wrong = ~_close(values, told + b, np.abs(values) + np.abs(told) + np.abs(b))
        if wrong.any():
            return Conflict(int(wrong.sum()), cause, int(self._cause[root[wrong][0]]))
        wrong = self._sign[root] * np.sign(self._value[root]) < 0
        if wrong.any():
            right = int(self._sign_cause[root[wrong][0]])
            return Conflict(int(wrong.sum()), cause, right, signs=True)
        return None

    def require_positive(self, numbers: Array, cause: int) -> Conflict | None:
        """Has numbers be positive; for ties without shifts."""
        root, a, _ = self.find(numbers)
        sign = np.sign(a).astype(np.int8)
        fresh = self._sign[root] == 0
        self._write(self._sign, root[fresh], sign[fresh])
        self._write(self._sign_cause, root[fresh], np.full(int(fresh.sum()), cause))
        wrong = (self._sign[root] != sign) | (
            self._known[root] & (np.sign(self._value[root]) != sign)
        )
        if not wrong.any():
            return None
        return Conflict(int(wrong.sum()), cause, self._why_sign(root[wrong][0]), signs=True)

    @np.errstate(all="ignore")
    def tie(self, left: Array, right: Array, s: Array, t: Array) -> Conflict | None:
        """Ties numbers by left = s * right + t; no s is 0.

        What was tied before a conflict was found stays until it is rolled back.
        """
        s, t = np.broadcast_to(s, left.shape), np.broadcast_to(t, left.shape)
        while True:
            root_l, a_l, b_l = self.find(left)
            root_r, a_r, b_r = self.find(right)
            apart = np.flatnonzero(root_l != root_r)
            if not len(apart):
                break
            once = _are_plainly_distinct(root_l[apart], root_r[apart])
            # a_l L + b_l = s (a_r R + b_r) + t
            a, b = (s * a_r / a_l)[apart], ((s * b_r + t - b_l) / a_l)[apart]
            conflict = self._linked(root_l[apart], root_r[apart], a, b, once)
            if conflict is not None:
                return conflict
            # Where all were apart and have been linked, nothing is left to contradict: exactly so
            # without shifts, which may lose digits to one another.
            all_linked = once and len(apart) == len(left) and not (b_l.any() or b_r.any())
            if all_linked and np.isfinite([a, b, 1 / a, b / a]).all():
                return None
        loop = ~self._known[root_l] & ~_close(a_l, s * a_r, np.abs(a_l))
        if self._may_be_zero and loop.any():
            value = ((s * b_r + t - b_l) / (a_l - s * a_r))[loop]
            conflict = self.set(root_l[loop], value, NO_CAUSE)
            if conflict is not None:
                return conflict
        # Of two numbers in one set all is said, but where the set is known.
        part_l = np.where(self._known[root_l], a_l * self._value[root_l], 0.0)
        part_r = np.where(self._known[root_r], s * a_r * self._value[root_r], 0.0)
        left_x, right_x = part_l + b_l, part_r + s * b_r + t
        size = np.abs([part_l, b_l, part_r, s * b_r, t]).sum(axis=0)
        slope = self._known[root_l] | _close(a_l, s * a_r, np.abs(a_l))
        wrong = ~(slope & _close(left_x, right_x, size))
        return Conflict(int(wrong.sum())) if wrong.any() else None

    def _linked(self, left: Array, right: Array, a: Array, b: Array, once: bool) -> Conflict | None:
        """Links roots by left = a * right + b, each left or right root once.

        Args:
            left, right, a, b: the roots and numbers.
            once: whether no root comes twice; else those that do are left for the next round.
        """
        high, low = np.maximum(left, right), np.minimum(left, right)
        if not once:
            first = np.unique(high, return_index=True)[1]
            # One of them may be a root here and linked there, or the root of several: what each of
            # several says must agree, so that they come one after the other.
            first = first[~np.isin(low[first], high)]
            first = first[np.unique(low[first], return_index=True)[1]]
            left, right, high, low, a, b = (x[first] for x in (left, right, high, low, a, b))
        known_l, known_r = self._known[left], self._known[right]
        implied = a * self._value[right] + b
        both = known_l & known_r
        size = np.abs(self._value[left]) + np.abs(a * self._value[right]) + np.abs(b)
        wrong = both & ~_close(self._value[left], implied, size)
        if wrong.any():
            i = np.flatnonzero(wrong)[0]
            causes = int(self._cause[left[i]]), int(self._cause[right[i]])
            return Conflict(int(wrong.sum()), *causes)
        sign_l = np.where(known_l, np.sign(self._value[left]), self._sign[left])
        sign_r = np.where(known_r, np.sign(self._value[right]), self._sign[right]) * np.sign(a)
        wrong = (self._sign[left] != 0) | (self._sign[right] != 0)
        wrong &= sign_l * sign_r < 0
        if wrong.any():
            i = np.flatnonzero(wrong)[0]
            causes = self._why_sign(left[i]), self._why_sign(right[i])
            return Conflict(int(wrong.sum()), *causes, signs=True)
        self._hand_over(left, right, high, low, a, b)
        return None

    def _hand_over(
        self, left: Array, right: Array, high: Array, low: Array, a: Array, b: Array
    ) -> None:
        """Has the low of two roots stand for both, with what is known of the high one."""
        is_left = high == left  # then high = a * low + b, else low = a * high + b
        slope, offset = np.where(is_left, a, 1 / a), np.where(is_left, b, -b / a)
        news = self._known[high] & ~self._known[low]
        value = (self._value[high] - offset) / slope
        self._write(self._value, low[news], value[news])
        self._write(self._cause, low[news], self._cause[high[news]])
        self._write(self._known, low[news], True)
        sign = (self._sign[high] * np.sign(slope)).astype(np.int8)
        news = (self._sign[high] != 0) & (self._sign[low] == 0)
        self._write(self._sign, low[news], sign[news])
        self._write(self._sign_cause, low[news], self._sign_cause[high[news]])
        self._write(self._root, high, low)
        self._write(self._a, high, slope)
        self._write(self._b, high, offset)

    def _why_sign(self, root: int) -> int:
        cause = self._cause if self._known[root] else self._sign_cause
        return int(cause[root])


def _are_plainly_distinct(left: Array, right: Array) -> bool:
    """Whether numbers ascend on both sides, one above the other, so that none comes twice."""
    if left[0] > right[0]:
        left, right = right, left
    rise = (left[1:] > left[:-1]).all() and (right[1:] > right[:-1]).all()
    return bool(rise and left[-1] < right[0])


def _close(x: Array, y: Array, size: Array) -> Array:
    return np.abs(x - y) <= TOLERANCE * size

"""Numbers tied by affine equations: what follows, what contradicts, and what is taken back."""

import numpy as np
import pytest

from mbn_rewrite.passes.ties import NO_CAUSE, Conflict, Ties

ONE, ZERO = np.ones(1), np.zeros(1)


def at(*numbers):
    return np.array(numbers)


def values(*given):
    return np.array(given, np.float64)


def same(ties, left, right):
    return ties.tie(left, right, ONE, ZERO)


# --------------------------------------------------------------------------- what follows


def test_a_number_that_is_tied_to_itself_is_solved_for_where_it_may_be_0():
    ties = Ties(2, may_be_zero=True)  # x0 = 2 x1, x0 = x1 + 3
    assert ties.tie(at(0), at(1), values(2), ZERO) is None
    assert ties.tie(at(0), at(1), ONE, values(3)) is None
    np.testing.assert_array_equal(ties.known(at(0, 1))[1], [6, 3])


def test_a_number_that_only_0_satisfies_contradicts_elsewhere():
    ties = Ties(2)
    assert ties.tie(at(0), at(1), values(2), ZERO) is None
    assert isinstance(same(ties, at(0), at(1)), Conflict)


def test_numbers_are_alone_and_unknown_at_first():
    known, value = Ties(3).known(np.arange(3))
    assert not known.any()
    assert not value.any()


def test_a_value_is_told_along_ties_in_both_directions():
    ties = Ties(4)  # x0 = 2 x1 + 3, x1 = -x2 + 1, x3 = 4 x2
    assert ties.tie(at(0, 1, 3), at(1, 2, 2), values(2, -1, 4), values(3, 1, 0)) is None
    assert ties.set(at(1), values(5), 0) is None
    known, value = ties.known(np.arange(4))
    assert known.all()
    np.testing.assert_array_equal(value, [13, 5, -4, -16])


def test_what_was_known_before_a_tie_is_told_by_it():
    ties = Ties(2)
    assert ties.set(at(1), values(5), 0) is None
    assert ties.tie(at(0), at(1), values(2), values(3)) is None
    np.testing.assert_array_equal(ties.known(np.arange(2))[1], [13, 5])


def test_equations_that_say_the_same_twice_agree():
    ties = Ties(3)
    assert ties.tie(at(0, 1), at(1, 2), values(2, 3), values(1, 0)) is None
    assert ties.tie(at(0, 2), at(2, 0), values(6, 1 / 6), values(1, -1 / 6)) is None


def test_rounding_is_no_contradiction():
    ties = Ties(3)
    assert ties.tie(at(0, 1), at(1, 2), values(0.1, 0.2), values(0.3, 0.1)) is None
    assert ties.tie(at(0), at(2), values(0.02), values(0.31)) is None
    assert ties.tie(at(0), at(2), values(0.02), values(0.31 + 1e-9)) is not None


def test_a_value_that_is_but_rounding_is_zero():
    ties = Ties(2)
    assert ties.tie(at(1), at(0), values(3), values(-0.3)) is None
    assert ties.set(at(0), values(0.1), 0) is None  # 3 * 0.1 - 0.3 = 5.6e-17
    np.testing.assert_array_equal(ties.known(at(1))[1], [0])


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [3, 0, 5, 2, 4, 1]])
def test_ties_that_share_numbers_are_made_in_one_call(order):
    """A flatten ties each channel several times."""
    ties = Ties(8)
    flat, channels = np.arange(6)[order], np.array([6, 7, 6, 7, 6, 7])[order]
    assert same(ties, flat, channels) is None
    assert ties.set(at(0, 1), values(2, 3), 0) is None
    np.testing.assert_array_equal(ties.known(np.arange(8))[1], [2, 3, 2, 3, 2, 3, 2, 3])


def test_a_whole_chain_is_made_in_one_call():
    ties = Ties(50)
    assert ties.tie(np.arange(49), np.arange(1, 50), 2 * ONE, ZERO) is None
    assert ties.set(at(49), values(1), 0) is None
    np.testing.assert_array_equal(ties.known(np.arange(50))[1], 2.0 ** np.arange(49, -1, -1))


def test_a_number_is_tied_to_itself_by_the_identity_alone():
    assert same(Ties(1), at(0), at(0)) is None
    assert Ties(1).tie(at(0), at(0), ONE, ONE) is not None
    assert Ties(1).tie(at(0), at(0), 2 * ONE, ZERO) is not None


def test_nothing_is_tied_by_no_numbers():
    ties = Ties(2)
    assert same(ties, np.zeros(0, int), np.zeros(0, int)) is None
    assert ties.set(np.zeros(0, int), ZERO, 0) is None
    assert not ties.known(np.arange(2))[0].any()


# ---------------------------------------------------------------------- what contradicts


def test_a_value_that_contradicts_names_the_cause_of_what_is_known():
    ties = Ties(3)
    assert same(ties, at(0, 1), at(1, 2)) is None
    assert ties.set(at(2), values(5), 7) is None
    assert ties.set(at(0), values(5), 8) is None
    assert ties.set(at(0), values(6), 8) == Conflict(1, left=8, right=7)


@pytest.mark.parametrize(("left", "right"), [(0, 1), (1, 0)])
def test_a_tie_that_contradicts_names_the_causes_of_both_sides(left, right):
    ties = Ties(2)
    assert ties.set(at(left), values(1), 3) is None
    assert ties.set(at(right), values(1), 4) is None
    conflict = ties.tie(at(left), at(right), values(2), ZERO)
    assert conflict == Conflict(1, left=3, right=4)


def test_causes_are_told_along_ties():
    ties = Ties(4)
    assert same(ties, at(0, 2), at(1, 3)) is None
    assert ties.set(at(1), values(1), 3) is None
    assert ties.set(at(2), values(2), 4) is None
    assert same(ties, at(0), at(3)) == Conflict(1, left=3, right=4)


def test_a_loop_that_does_not_close_has_no_cause():
    ties = Ties(2)
    assert ties.tie(at(0), at(1), values(2), ZERO) is None
    assert ties.tie(at(1), at(0), values(2), ZERO) == Conflict(1, NO_CAUSE, NO_CAUSE)


def test_a_known_loop_need_but_hold_for_its_values():
    ties = Ties(2)
    assert ties.tie(at(0), at(1), values(2), ZERO) is None
    assert ties.set(at(1), values(3), 0) is None  # x0 = 6
    assert ties.tie(at(0), at(1), values(1), values(3)) is None
    assert ties.tie(at(0), at(1), values(1), values(4)) is not None


def test_contradictions_are_counted():
    ties = Ties(6)
    assert ties.set(np.arange(6), values(1, 2, 3, 1, 4, 5), 0) is None
    assert same(ties, at(0, 1, 2), at(3, 4, 5)).channels == 2
    assert ties.set(np.arange(6), ONE, 1).channels == 4


def test_a_number_cannot_be_given_two_values():
    assert Ties(2).set(at(1, 1), values(3, 3), 0) is None
    assert Ties(2).set(at(1, 1), values(3, 4), 0) is not None
    assert Ties(2).tie(at(0, 0), at(1, 1), ONE, values(0, 1)) is not None


# ---------------------------------------------------------------------------------- signs


def test_signs_are_told_along_ties():
    ties = Ties(3)
    assert ties.tie(at(0, 1), at(1, 2), values(-2, 3), ZERO) is None
    assert ties.require_positive(at(0), 0) is None
    np.testing.assert_array_equal(ties.signs(np.arange(3)), [1, -1, -1])
    assert not ties.known(np.arange(3))[0].any()


def test_known_numbers_have_the_signs_of_their_values():
    ties = Ties(3)
    assert ties.set(at(0, 1), values(-2, 0.5), 0) is None
    np.testing.assert_array_equal(ties.signs(np.arange(3)), [-1, 1, 0])


@pytest.mark.parametrize(("left", "right"), [(0, 1), (1, 0)])
def test_signs_that_contradict_are_told_apart_with_their_causes(left, right):
    ties = Ties(2)
    assert ties.require_positive(at(left), 3) is None
    assert ties.require_positive(at(right), 4) is None
    conflict = ties.tie(at(left), at(right), values(-1), ZERO)
    assert conflict == Conflict(1, left=3, right=4, signs=True)


def test_a_sign_contradicts_one_that_was_told():
    ties = Ties(4)
    assert ties.tie(at(0, 1), at(2, 3), values(-1, -2), ZERO) is None
    assert ties.require_positive(at(0, 1), 3) is None
    assert ties.require_positive(at(2, 3), 4) == Conflict(2, left=4, right=3, signs=True)


def test_a_value_contradicts_a_sign():
    ties = Ties(1)
    assert ties.require_positive(at(0), 3) is None
    assert ties.set(at(0), values(-1), 4) == Conflict(1, left=4, right=3, signs=True)


def test_a_sign_contradicts_a_value():
    ties = Ties(1)
    assert ties.set(at(0), values(-1), 4) is None
    assert ties.require_positive(at(0), 3) == Conflict(1, left=3, right=4, signs=True)


def test_a_sign_and_a_value_that_are_tied_contradict():
    ties = Ties(2)
    assert ties.require_positive(at(0), 3) is None
    assert ties.set(at(1), values(2), 4) is None
    conflict = ties.tie(at(0), at(1), values(-1), ZERO)
    assert conflict == Conflict(1, left=3, right=4, signs=True)


# ------------------------------------------------------------------------- what is not finite


@pytest.fixture
def quiet():
    """Arithmetic that does not warn of what is refused."""
    with np.errstate(all="ignore"):
        yield


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("place", ["s", "t"])
def test_ties_that_are_not_finite_are_refused(place, known, bad):
    ties = Ties(2)
    if known:
        assert ties.set(at(1), values(1), 0) is None
    s, t = (values(bad), ZERO) if place == "s" else (ONE, values(bad))
    assert ties.tie(at(0), at(1), s, t) is not None


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(bad):
    assert Ties(1).set(at(0), values(bad), 0) is not None


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("s", [1e150, 1e-150])
def test_ties_that_leave_the_range_together_are_refused(s):
    assert Ties(3).tie(at(0, 1), at(1, 2), s * ONE, ZERO) is None
    assert Ties(4).tie(at(0, 1, 2), at(1, 2, 3), s * ONE, ZERO) is not None


# ------------------------------------------------------------------------- taking back


def told(ties):
    """All that ties tell, of every number."""
    numbers = np.arange(ties.count)
    return [*ties.known(numbers), ties.signs(numbers), *ties.find(numbers)]


def some_ties(ties, rng, count=6):
    """Ties, values and signs at random, some of which contradict."""
    for _ in range(count):
        size = int(rng.integers(1, 5))
        left, right = rng.integers(0, ties.count, (2, size))
        ties.tie(left, right, rng.choice([-2.0, -1, 1, 2], size), rng.integers(-2, 3, size) * 1.0)
        ties.set(rng.integers(0, ties.count, 1), rng.integers(-3, 4, 1) * 1.0, 0)


@pytest.mark.parametrize("seed", range(10))
def test_what_is_rolled_back_leaves_no_trace(seed):
    rng = np.random.default_rng(seed)
    ties = Ties(12)
    some_ties(ties, rng, count=3)
    before, mark = told(ties), ties.mark()
    some_ties(ties, rng)
    ties.require_positive(rng.integers(0, 12, 3), 1)
    ties.roll_back(mark)
    for old, now in zip(before, told(ties), strict=True):
        np.testing.assert_array_equal(old, now)


def test_marks_are_rolled_back_to_one_within_another():
    ties = Ties(3)
    outer = ties.mark()
    assert ties.set(at(0), values(1), 0) is None
    inner = ties.mark()
    assert same(ties, at(0), at(1)) is None
    ties.roll_back(inner)
    np.testing.assert_array_equal(ties.known(np.arange(3))[0], [True, False, False])
    ties.roll_back(outer)
    assert not ties.known(np.arange(3))[0].any()


def test_what_contradicted_what_was_rolled_back_does_so_no_longer():
    ties = Ties(2)
    mark = ties.mark()
    assert ties.tie(at(0), at(1), values(2), ZERO) is None
    assert ties.tie(at(0), at(1), values(3), ZERO) is not None
    ties.roll_back(mark)
    assert ties.tie(at(0), at(1), values(3), ZERO) is None


def test_what_is_kept_is_not_rolled_back():
    ties = Ties(1)
    mark = ties.mark()
    assert ties.set(at(0), values(1), 0) is None
    ties.keep()
    ties.roll_back(mark)
    assert ties.known(at(0))[0].all()


# ------------------------------------------------------------- beside a solver of equations


class Equations:
    """Linear equations, by the rank of their matrix."""

    def __init__(self, count):
        self.rows = np.zeros((0, count + 1))

    def added(self, rows):
        """Whether equations agree with those before; they are kept if so."""
        new = np.concatenate([self.rows, rows])
        agree = _rank(new) == _rank(new[:, :-1])
        if agree:
            self.rows = new
        return agree

    def known(self, number):
        """The value of a number, or None where it is open."""
        unit = np.eye(self.rows.shape[1] - 1)[number]
        if _rank(np.vstack([self.rows[:, :-1], unit])) > _rank(self.rows[:, :-1]):
            return None
        solution = np.linalg.lstsq(self.rows[:, :-1], self.rows[:, -1], rcond=None)[0]
        return solution[number]


def _rank(rows):
    return np.linalg.matrix_rank(rows, tol=1e-9) if rows.size else 0


def _equations(left, right, s, t, count):
    rows = np.zeros((len(left), count + 1))
    for row, i, j, a, b in zip(rows, left, right, s, t, strict=True):
        row[i] += 1
        row[j] -= a
        row[-1] = b
    return rows


@pytest.mark.parametrize("wrong", [0.0, 0.2])
@pytest.mark.parametrize("seed", range(12))
def test_random_ties_are_what_linear_equations_say(seed, wrong):
    """Slopes agree around every loop, as those of origins do; shifts and values may not."""
    rng = np.random.default_rng(seed)
    count, steps = 14, 12
    slope = rng.choice([-2.0, -1, -0.5, 0.5, 1, 2], count)
    truth = rng.integers(-5, 6, count).astype(np.float64)
    ties, equations = Ties(count), Equations(count)
    refused = 0
    for _ in range(steps):
        size = int(rng.integers(1, 5))
        left, right = rng.integers(0, count, (2, size))
        off, mark = rng.random(size) < wrong, ties.mark()
        if rng.random() < 0.25:
            s, t = np.zeros(size), truth[left] + off
            conflict = ties.set(left, t, 0)
        else:
            s = slope[left] / slope[right]
            t = truth[left] - s * truth[right] + off
            conflict = ties.tie(left, right, s, t)
        assert (conflict is None) == equations.added(_equations(left, right, s, t, count))
        if conflict is not None:
            ties.roll_back(mark)
            refused += 1
    assert (refused > 0) == (wrong > 0)
    known, value = ties.known(np.arange(count))
    expected = [equations.known(number) for number in range(count)]
    np.testing.assert_array_equal(known, [e is not None for e in expected])
    np.testing.assert_allclose(value, [e or 0.0 for e in expected], atol=1e-9)

"""The table of units itself, without a framework: complete, documented, and right in detail.

Each row is asked from either side. What it says of units is then proved on arrays: with units that
satisfy it the operation computes what it did, bit for bit, and each demand is needed. That whole
layers do so too is shown in test_exact_motion.py.
"""

from dataclasses import replace

import numpy as np
import pytest

from mbn_rewrite.ir import graph
from mbn_rewrite.ir.channel_map import ChannelMap
from mbn_rewrite.ir.graph import SPREADS, Activation, MergeKind
from mbn_rewrite.ir.kernels import Kernel, Window
from mbn_rewrite.ir.reasons import Obstacle, Reason
from mbn_rewrite.passes.fold import plan_fold
from mbn_rewrite.plans import Fate
from mbn_rewrite.rules.relations import (
    OUT,
    RELATIONS,
    Ends,
    Gated,
    Origins,
    Shapes,
    Tied,
    clipped,
)
from tests.support.neutral import AXIS, Builder

CONCRETE = [
    op
    for op in vars(graph).values()
    if isinstance(op, type) and issubclass(op, graph.Op)
    and op not in (graph.Op, graph.ChannelPreserving)
]  # fmt: skip


@pytest.mark.parametrize("op", CONCRETE, ids=lambda op: op.__name__)
def test_every_operation_has_a_row_and_a_description(op):
    assert op in RELATIONS
    assert op.__doc__


def test_the_table_has_no_other_rows():
    assert set(RELATIONS) == set(CONCRETE)


def asked(op, slot, axis, shapes):
    return RELATIONS[type(op)](op, shapes, slot, axis)


IMAGE = (None, 8, 8, 4)
UNARY = Shapes((IMAGE,), IMAGE)
BESIDE = Shapes((IMAGE, (None, 8)), IMAGE)
PAIR = Shapes((IMAGE, IMAGE), IMAGE)

# ------------------------------------------------------------------------------- weights

CONV = graph.Linear((Kernel("kernel", (3, 3, 4, 4), (2,), (3,)),), None, 3, 3)
PADDED = replace(CONV, pads=True)
RELU_FUSED = replace(CONV, activation=Activation.HOMOGENEOUS)
TANH_FUSED = replace(CONV, activation=Activation.OTHER)
NORM = graph.BatchNorm(ChannelMap(np.full(4, 2.0), np.ones(4), 3))

WEIGHTS = {
    "linear_reads": (CONV, 0, Ends()),
    "linear_gives": (CONV, OUT, Ends()),
    "padded_reads": (PADDED, 0, Ends("pads its input with zeros")),
    "padded_gives": (PADDED, OUT, Ends()),
    "padded_reads_by_windows": (
        replace(PADDED, windows=(Window(3, 1, 1, "same"),) * 2),
        0,
        Ends("pads its input with zeros", border=True),
    ),
    "uneven_reads": (replace(PADDED, uneven=SPREADS), 0, Ends(SPREADS)),
    "fused_relu_reads": (RELU_FUSED, 0, Ends()),
    "fused_relu_gives": (RELU_FUSED, OUT, Ends("applies a fused activation", positive=True)),
    "fused_tanh_reads": (TANH_FUSED, 0, Ends()),
    "recurrent_reads": (graph.Recurrent((), 3), 0, Ends()),
    "norm_reads": (NORM, 0, Ends()),
    "norm_gives": (NORM, OUT, Ends()),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_weights_are_edited_on_the_side_that_is_asked(case):
    op, slot, expected = WEIGHTS[case]
    assert asked(op, slot, 3, BESIDE) == expected


# ------------------------------------------------------------------------------ phrases

BLIND = graph.Opaque().why
SHORT = Shapes((IMAGE,), (None, 8, 8, 3))
OPEN = Shapes(((None, 8, 8, None),), (None, 8, 8, None))

PHRASES = {
    "linear_gives_other_axis": (CONV, OUT, 1, UNARY, "output channels on axis 3, not on axis 1"),
    "linear_reads_other_axis": (CONV, 0, 2, UNARY, "does not have its input channels on axis 2"),
    "linear_reads_all_axes": (replace(CONV, in_axis=None), 0, 3, UNARY, "channels on axis 3 alone"),
    "fused_tanh_gives": (TANH_FUSED, OUT, 3, UNARY, "applies a fused activation"),
    "recurrent_gives": (graph.Recurrent((), 3), OUT, 3, UNARY, BLIND),
    "recurrent_reads_state": (graph.Recurrent((), 3), 1, 3, BESIDE, "reads it as a state"),
    "recurrent_reads_steps": (graph.Recurrent((), 2), 0, 3, UNARY, "on axis 2, not on axis 3"),
    "norm_reads_other_axis": (NORM, 0, 1, UNARY, "normalises axis 3, not axis 1"),
    "norm_gives_other_axis": (NORM, OUT, 1, UNARY, "normalises axis 3, not axis 1"),
    "norm_in_training": (
        graph.BatchNorm(None, Reason(Obstacle.TRAINING_CALL)),
        OUT,
        3,
        UNARY,
        f"has to stay ({Reason(Obstacle.TRAINING_CALL)})",
    ),
    "affine_gives_other_axis": (graph.Affine(1, 1), OUT, 3, UNARY, "on axis 1, not on axis 3"),
    "affine_reads_other_axis": (graph.Affine(1, 1), 0, 3, UNARY, "on axis 1, not on axis 3"),
    "affine_reads_beside": (graph.Affine(), 1, 1, BESIDE, "reads it beside its data"),
    "affine_crops_channels": (graph.Affine(), OUT, 3, SHORT, "gives another number of channels"),
    "affine_adds_channels": (graph.Affine(), 0, 3, SHORT, "gives another number of channels"),
    "affine_of_open_size": (graph.Affine(), 0, 3, OPEN, "gives another number of channels"),
    "affine_along_the_axis": (graph.Affine(axes=((1, 1),)), 0, 3, UNARY, "works along axis 3"),
    "total_along_the_axis": (graph.Total(axes=((1, 1),)), OUT, 3, UNARY, "works along axis 3"),
    "constants_by_position": (graph.ConstantMap(1, 1), 0, 3, UNARY, "channels on axis 1"),
    "selection_along_the_axis": (graph.Selection(((1, 1, None),)), 0, 3, UNARY, "parts along"),
    "selection_reads_beside": (graph.Selection(((1, 1, None),)), 1, 1, BESIDE, "beside its data"),
    "selection_of_open_size": (graph.Selection(((3, 3, (0,)),)), 0, 3, OPEN, "unknown number"),
    "stack_of_channels": (graph.Stack(3), OUT, 3, UNARY, "along the axis of the channels"),
    "stack_of_open_size": (graph.Stack(1), 0, 3, OPEN, "unknown numbers of channels"),
    "linear_gives_several": (replace(CONV, out_axis=None), OUT, 3, UNARY, "several axes"),
    "affine_of_lost_axis": (graph.Affine(3, 1), OUT, 1, Shapes((IMAGE,), (None, 3)), "another"),
    "reshape_mixes": (graph.Reshape(), 0, 3, Shapes((IMAGE,), (None, 128, 2)), "mixes channels"),
    "reshape_gives_mixed": (graph.Reshape(), OUT, 1, Shapes((IMAGE,), (None, 256)), "mixes"),
    "reshape_of_open_size": (graph.Reshape(), 0, 3, OPEN, "mixes channels with positions"),
    "permute_of_open_size": (graph.Permute((0, 3, 1, 2)), 0, 3, OPEN, "unknown number of channels"),
    "clip_reads": (graph.Clip(0.0, 6.0, "is limited"), 0, 3, UNARY, "is limited"),
    "clip_gives": (graph.Clip(-1.0, why="is limited"), OUT, 3, UNARY, "is limited"),
    "gate_of_all_channels": (
        graph.Merge(MergeKind.MULTIPLY),
        1,
        3,
        Shapes((IMAGE, (None, 8, 8, 1)), IMAGE),
        "multiplies all channels by it",
    ),
    "gate_of_another_rank": (
        graph.Merge(MergeKind.MULTIPLY),
        0,
        3,
        Shapes((IMAGE, (4,)), IMAGE),
        "multiplies values of different ranks",
    ),
    "gate_of_open_size": (
        graph.Merge(MergeKind.MULTIPLY),
        0,
        3,
        Shapes((IMAGE, (None, 8, 8, None)), (None, 8, 8, None)),
        "of unknown numbers of channels",
    ),
    "opaque_reads": (graph.Opaque(), 0, 3, UNARY, BLIND),
    "opaque_gives": (graph.Opaque("sorts it"), OUT, 3, UNARY, "sorts it"),
    "input": (graph.Input(), OUT, 3, UNARY, "is an input of the model"),
}


@pytest.mark.parametrize("case", PHRASES)
def test_what_takes_the_identity_alone_says_why(case):
    op, slot, axis, shapes, said = PHRASES[case]
    phrase = asked(op, slot, axis, shapes)
    assert isinstance(phrase, str)
    assert said in phrase


KINDS = [kind for kind in MergeKind if kind is not MergeKind.MULTIPLY]


@pytest.mark.parametrize("slot", [OUT, 0])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("other", [(None, 8, 8, 1), (4,), (None, 8, 8, None)], ids=str)
def test_a_merge_with_a_broadcast_input_takes_the_identity_alone(kind, slot, other):
    phrase = asked(graph.Merge(kind), slot, 3, Shapes((IMAGE, other), IMAGE))
    assert phrase == "repeats one of its inputs over the channels"


def test_positions_may_be_broadcast():
    assert isinstance(
        asked(graph.Merge(MergeKind.ADD), 0, 3, Shapes((IMAGE, (None, 1, 1, 4)), IMAGE)), Tied
    )


@pytest.mark.parametrize("slot", [OUT, 0, 1])
@pytest.mark.parametrize("axis", [2, 3])
def test_a_concatenation_of_unknown_sizes_takes_the_identity_alone(slot, axis):
    shapes = Shapes(((None, 8, None, 4), (None, 8, None, 4)), (None, 8, None, 8))
    phrase = asked(graph.Concat(2 if axis == 2 else 3), slot, 2, shapes)
    assert phrase == "joins inputs of unknown numbers of channels"


# --------------------------------------------------------------------------------- ties


def spread_of(relation, slot):
    """A tie's spread to another slot, as lists; None for all channels in order."""
    spread = relation.spread[slot]
    theirs = None if spread.theirs is None else spread.theirs.tolist()
    return spread.axis, spread.channels, spread.mine.tolist(), theirs


TIED = {
    "affine": (graph.Affine(3, 3), UNARY, Tied({}), {}),
    "affine_on_any_axis": (graph.Affine(), UNARY, Tied({}), {}),
    "monotone": (graph.Monotone(3, 3), UNARY, Tied({}, positive=True, doing="takes a maximum"), {}),
    "zero_padding": (
        graph.ZeroPadding(3, 3),
        UNARY,
        Tied({}, Origins.ZERO, doing="pads with zeros"),
        {},
    ),
    "homogeneous": (
        graph.PositivelyHomogeneous(),
        UNARY,
        Tied({}, Origins.ZERO, positive=True, doing="is an activation"),
        {},
    ),
    "relu": (
        graph.Clip(),
        UNARY,
        Tied({}, Origins.ZERO, positive=True, doing="is an activation"),
        {},
    ),
    "clip_from_above": (
        graph.Clip(-np.inf, 0.0),
        UNARY,
        Tied({}, Origins.ZERO, positive=True, doing="is an activation"),
        {},
    ),
    "reshape": (graph.Reshape(), Shapes((IMAGE,), (None, 64, 4)), Tied({}), {OUT: 2}),
    "permute": (graph.Permute((0, 2, 1, 3)), UNARY, Tied({}), {}),
    "add": (graph.Merge(MergeKind.ADD), PAIR, Tied({}, Origins.SUM, (1.0, 1.0)), {}),
    "subtract": (graph.Merge(MergeKind.SUBTRACT), PAIR, Tied({}, Origins.SUM, (1.0, -1.0)), {}),
    "average": (graph.Merge(MergeKind.AVERAGE), PAIR, Tied({}, Origins.SUM, (0.5, 0.5)), {}),
    "maximum": (
        graph.Merge(MergeKind.MAXIMUM),
        PAIR,
        Tied({}, positive=True, doing="takes a maximum"),
        {},
    ),
    "minimum": (
        graph.Merge(MergeKind.MINIMUM),
        PAIR,
        Tied({}, positive=True, doing="takes a minimum"),
        {},
    ),
    "concat_of_positions": (graph.Concat(1), PAIR, Tied({}), {}),
    "stack": (graph.Stack(1), Shapes((IMAGE, IMAGE), (None, 2, *IMAGE[1:])), Tied({}), {OUT: 4}),
    "stack_behind": (graph.Stack(4), Shapes((IMAGE, IMAGE), (*IMAGE, 2)), Tied({}), {}),
}


@pytest.mark.parametrize("case", TIED)
def test_every_side_is_tied_to_every_other(case):
    op, shapes, expected, axes = TIED[case]
    slots = [OUT, *range(len(shapes.inputs))]
    for slot in slots:
        relation = asked(op, slot, axes.get(slot, 3), shapes)
        assert replace(relation, spread={}) == expected
        others = {other: spread_of(relation, other) for other in slots if other != slot}
        assert others == {other: (axes.get(other, 3), 4, [0, 1, 2, 3], None) for other in others}
        assert set(relation.spread) == set(others)


@pytest.mark.parametrize(
    ("op", "output", "axis"),
    [
        (graph.Affine(3, 1), (None, 4), 1),
        (graph.Monotone(3, 1), (None, 4), 1),
        (graph.Permute((0, 3, 1, 2)), (None, 4, 8, 8), 1),
        (graph.Reshape(), (None, 2, 32, 4), 3),
        (graph.Reshape(), (None, 2, 4, 8, 4), 4),
    ],
    ids=str,
)
def test_channels_are_followed_to_another_axis_and_back(op, output, axis):
    shapes = Shapes((IMAGE,), output)
    assert spread_of(asked(op, 0, 3, shapes), OUT) == (axis, 4, [0, 1, 2, 3], None)
    assert spread_of(asked(op, OUT, axis, shapes), 0) == (3, 4, [0, 1, 2, 3], None)


def test_a_permutation_may_take_channels_to_any_place():
    shapes = Shapes(((None, 2, 3, 4),), (None, 4, 2, 3))
    op = graph.Permute((0, 3, 1, 2))
    assert spread_of(asked(op, 0, 2, shapes), OUT) == (3, 3, [0, 1, 2], None)
    assert spread_of(asked(op, OUT, 2, shapes), 0) == (1, 2, [0, 1], None)


def test_flattening_repeats_channels():
    shapes = Shapes(((None, 3, 2),), (None, 6))
    flat = asked(graph.Reshape(), 0, 2, shapes)
    assert spread_of(flat, OUT) == (1, 6, [0, 1, 0, 1, 0, 1], None)


def test_a_selection_has_some_of_the_channels():
    shapes = Shapes(((None, 8, 4),), (None, 2))
    op = graph.Selection(((2, 1, (3, 1)),))
    assert spread_of(asked(op, 0, 2, shapes), OUT) == (1, 2, [3, 1], None)
    assert spread_of(asked(op, OUT, 1, shapes), 0) == (2, 4, [0, 1], [3, 1])


def test_channels_may_be_such_a_selection_of_what_is_given():
    shapes = Shapes(((None, 8, 4),), (None, 16, 2))
    op = graph.Selection(((2, 2, (0, 1, 0, 1)),), inverse=True)
    assert spread_of(asked(op, OUT, 2, shapes), 0) == (2, 4, [0, 1, 0, 1], None)
    assert spread_of(asked(op, 0, 2, shapes), OUT) == (2, 2, [0, 1, 2, 3], [0, 1, 0, 1])


def test_flattening_channels_first_repeats_each():
    shapes = Shapes(((None, 2, 3),), (None, 6))
    flat = asked(graph.Reshape(), 0, 1, shapes)
    assert spread_of(flat, OUT) == (1, 6, [0, 0, 0, 1, 1, 1], None)


def test_an_open_size_outside_the_channels_is_left_alone():
    shapes = Shapes(((None, None, 3, 2),), (None, None, 3, 2))
    assert spread_of(asked(graph.Reshape(), 0, 3, shapes), OUT) == (3, 2, [0, 1], None)


JOINED = Shapes(((None, 8, 1), (None, 8, 3)), (None, 8, 4))


def test_a_concatenation_gives_each_input_its_slice():
    relation = asked(graph.Concat(2), OUT, 2, JOINED)
    assert relation.origins is Origins.SAME
    assert spread_of(relation, 0) == (2, 1, [0], None)
    assert spread_of(relation, 1) == (2, 3, [1, 2, 3], None)


@pytest.mark.parametrize(("slot", "own", "theirs"), [(0, [0], [0]), (1, [0, 1, 2], [1, 2, 3])])
def test_an_input_of_a_concatenation_is_a_slice_of_its_output(slot, own, theirs):
    relation = asked(graph.Concat(2), slot, 2, JOINED)
    assert set(relation.spread) == {OUT}  # the other input has channels of its own
    assert spread_of(relation, OUT) == (2, 4, own, theirs)


def test_the_average_of_many_has_the_average_of_their_origins():
    shapes = Shapes((IMAGE,) * 4, IMAGE)
    assert asked(graph.Merge(MergeKind.AVERAGE), 0, 3, shapes).weights == (0.25,) * 4


@pytest.mark.parametrize("slot", [OUT, 0, 1])
def test_the_scales_of_a_gate_multiply(slot):
    shapes = Shapes((IMAGE, (None, 1, 1, 4)), IMAGE)
    relation = asked(graph.Merge(MergeKind.MULTIPLY), slot, 3, shapes)
    assert isinstance(relation, Gated)
    assert set(relation.spread) == {OUT, 0, 1} - {slot}
    assert all(spread_of(relation, i) == (3, 4, [0, 1, 2, 3], None) for i in relation.spread)


@pytest.mark.parametrize("slot", [OUT, 0])
def test_what_gates_all_channels_alike_has_no_part_in_their_scales(slot):
    shapes = Shapes((IMAGE, (None, 8, 8, 1)), IMAGE)
    relation = asked(graph.Merge(MergeKind.MULTIPLY), slot, 3, shapes)
    assert set(relation.spread) == {OUT, 0} - {slot}


@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("slot", [OUT, 0])
def test_a_clip_whose_bounds_move_takes_any_origin(slot, positive):
    relation = clipped(graph.Clip(0.0, 6.0), UNARY, slot, 3, positive)
    assert replace(relation, spread={}) == Tied({}, positive=positive, doing="is an activation")
    assert set(relation.spread) == {OUT, 0} - {slot}


@pytest.mark.parametrize(
    ("bounds", "expected"),
    [
        ((0.0, np.inf), graph.Clip()),
        ((-1.0, 1.0), graph.Clip(-1.0, 1.0)),
        ((2.0, 2.0), graph.Clip(2.0, 2.0)),
        ((-np.inf, np.inf), graph.Affine()),
        ((1.0, 0.0), graph.Opaque("says why")),
        ((np.nan, 0.0), graph.Opaque("says why")),
    ],
    ids=str,
)
def test_bounds_make_a_clip_where_their_order_does_not_matter(bounds, expected):
    assert graph.clip(*bounds, "says why") == expected


# ------------------------------------------------------------------- exact, and no stricter

# Values of two examples, three positions and four channels, and what operations make of them.
OPERATIONS = {
    "affine": (graph.Affine(2, 2), lambda x: x[:, [2, 0, 0]]),
    "affine_mean": (graph.Affine(2, 2), lambda x: (x[:, [0]] + x[:, [1]]) / 2),
    "affine_on_some_axes": (graph.Affine(axes=((2, 1),)), lambda x: x[:, 1]),
    "monotone": (graph.Monotone(2, 2), lambda x: x.max(axis=1, keepdims=True)),
    "total": (graph.Total(axes=((2, 1),), count=3), lambda x: x.sum(axis=1)),
    "total_of_unknown_count": (graph.Total(axes=((2, 1),)), lambda x: x.sum(axis=1)),
    "factors": (
        graph.ConstantMap(2, 2, scale=np.array([2.0, -1, 4, 0.5])),
        lambda x: x * np.array([2.0, -1, 4, 0.5]),
    ),
    "constants": (
        graph.ConstantMap(scale=np.array(-2.0), shift=np.array(3.0)),
        lambda x: 3 - 2 * x,
    ),
    "selection": (graph.Selection(((2, 1, (3, 1)),)), lambda x: x[:, 0, [3, 1]]),
    "stack": (graph.Stack(1), lambda a, b: np.stack([a, b], axis=1)),
    "stack_behind": (graph.Stack(3), lambda a, b: np.stack([a, b], axis=3)),
    "zero_padding": (graph.ZeroPadding(2, 2), lambda x: np.pad(x, ((0, 0), (1, 1), (0, 0)))),
    "homogeneous": (graph.PositivelyHomogeneous(), lambda x: np.where(x < 0, x / 4, x)),
    "relu": (graph.Clip(), lambda x: np.maximum(x, 0)),
    "clip_from_above": (graph.Clip(-np.inf, 0.0), lambda x: np.minimum(x, 0)),
    "reshape": (graph.Reshape(), lambda x: x.reshape(2, -1)),
    "permute": (graph.Permute((0, 2, 1)), lambda x: x.transpose(0, 2, 1)),
    "add": (graph.Merge(MergeKind.ADD), lambda a, b: a + b),
    "subtract": (graph.Merge(MergeKind.SUBTRACT), lambda a, b: a - b),
    "average": (graph.Merge(MergeKind.AVERAGE), lambda a, b: (a + b) / 2),
    "maximum": (graph.Merge(MergeKind.MAXIMUM), np.maximum),
    "minimum": (graph.Merge(MergeKind.MINIMUM), np.minimum),
    "concat": (graph.Concat(2), lambda a, b: np.concatenate([a, b], axis=2)),
    "concat_of_positions": (graph.Concat(1), lambda a, b: np.concatenate([a, b], axis=1)),
}


class Tried:
    """An operation on values that are kept in units, and on the values themselves.

    Args:
        name: of the operation.
        spoilt: what the units are given that the operation does not allow, if it can be: scales of
            both signs, or origins that do not match.
    """

    def __init__(self, name, spoilt=""):
        self.rng = np.random.default_rng(3)
        self.op, self.f = OPERATIONS[name]
        count = 2 if isinstance(self.op, graph.Merge | graph.Concat | graph.Stack) else 1
        self.inputs = [self.rng.integers(-9, 9, (2, 3, 4)).astype(np.float64) for _ in range(count)]
        self.output = self.f(*self.inputs)
        self.shapes = Shapes(
            tuple((None, *x.shape[1:]) for x in self.inputs), (None, *self.output.shape[1:])
        )
        self.relation = asked(self.op, 0, 2, self.shapes)
        signs = [1.0, 1, 1, 1] if self.relation.positive else [1.0, -1, 1, -1]
        self.p = np.array([0.5, 2, 4, 1]) * ([1, -1, 1, -1] if spoilt == "signs" else signs)
        self.o = [self.origins() for _ in self.inputs]
        if self.relation.origins is Origins.SAME:
            self.o = self.o[:1] * count
        elif self.relation.origins is Origins.ZERO and spoilt != "origins":
            self.o = [np.zeros(4)]
        self.due = self.o[0]
        if self.relation.origins is Origins.SUM:
            self.due = sum(w * o for w, o in zip(self.relation.weights, self.o, strict=True))
            self.due = self.due + (spoilt == "origins")
            if self.relation.added is not None:
                self.due = self.due + self.relation.added * (1 - 1 / self.p)

    def origins(self):
        return self.rng.integers(1, 5, 4).astype(np.float64)

    def holds(self):
        """Whether the kept output is that of the kept inputs, bit for bit."""
        kept = self.f(*(self.p * (x - o) for x, o in zip(self.inputs, self.o, strict=True)))
        spread, axis = self.relation.spread[OUT], self.relation.spread[OUT].axis
        along = [-1 if i == axis else 1 for i in range(self.output.ndim)]
        p, o = self.units_of_output(spread)
        return np.array_equal(kept, p.reshape(along) * (self.output - o.reshape(along)))

    def units_of_output(self, spread):
        if spread.theirs is None:
            return self.p[spread.mine], self.due[spread.mine]
        return np.tile(self.p, 2), np.tile(self.due, 2)  # the slices of a concatenation


@pytest.mark.parametrize("name", OPERATIONS)
def test_units_that_satisfy_a_row_keep_the_operation_exact(name):
    assert Tried(name).holds()


@pytest.mark.parametrize("name", ["monotone", "homogeneous", "relu", "maximum", "minimum"])
def test_a_scale_that_is_not_positive_would_not_do(name):
    assert not Tried(name, spoilt="signs").holds()


@pytest.mark.parametrize(
    "name",
    [
        *("zero_padding", "homogeneous", "relu", "clip_from_above", "add", "subtract", "average"),
        *("total", "total_of_unknown_count", "factors", "constants"),
    ],
)
def test_another_origin_would_not_do(name):
    assert not Tried(name, spoilt="origins").holds()


VALUES = np.arange(-9.0, 9).reshape(6, 3)
SCALES = np.array([0.5, 2, 4])


@pytest.mark.parametrize("signs", [[1, 1, 1], [1, -1, 1]], ids=["positive", "mixed"])
@pytest.mark.parametrize("bounds", [(0.0, np.inf), (0.0, 6.0), (-2.0, 3.0), (-np.inf, 1.0)])
def test_a_clip_is_exact_with_bounds_that_moved(bounds, signs):
    p, o = SCALES * signs, np.array([1.0, -2, 3])
    lower, upper = (p * (bound - o) for bound in bounds)
    kept = np.clip(p * (VALUES - o), np.minimum(lower, upper), np.maximum(lower, upper))
    np.testing.assert_array_equal(kept, p * (np.clip(VALUES, *bounds) - o))


@pytest.mark.parametrize(("o", "exact"), [(0.0, True), (1.0, False)])
def test_a_gate_is_exact_with_scales_that_multiply(o, exact):
    gate, q = np.array([[1.0, 3, -2]]), np.array([4, -0.5, 2])
    kept = (SCALES * (VALUES - o)) * (q * gate)
    assert np.array_equal(kept, SCALES * q * (VALUES * gate)) == exact


# ----------------------------------------------------------------------- what a reader sees


def test_reasons_say_how_many_channels_are_negative():
    b = Builder(np.random.default_rng(0))
    x = b.pooled(b.linear(b.source(2), 3))
    norm = ChannelMap(np.array([1.0, -1.0, -2.0]), np.zeros(3), AXIS)
    y = b.add(graph.BatchNorm(norm, axis=AXIS), x, channels=3, owner="norm")
    (decision,) = plan_fold(b.graph(b.linear(b.pooled(y), 2))).decisions
    assert decision.action is Fate.KEPT
    said = "takes a maximum, which a negative scale cannot pass (2 of 3 channels)"
    assert said in decision.reason

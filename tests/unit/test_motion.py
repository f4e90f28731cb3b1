"""The motion table itself, without a framework: complete, documented, and right in detail.

That its rules are exact is shown in test_exact_motion.py.
"""

import dataclasses

import numpy as np
import pytest

from mbn_rewrite.ir import graph
from mbn_rewrite.ir.channel_map import ChannelMap
from mbn_rewrite.ir.graph import Activation, MergeKind
from mbn_rewrite.ir.kernels import Kernel
from mbn_rewrite.ir.reasons import Obstacle, Reason
from mbn_rewrite.rules import motion
from mbn_rewrite.rules.motion import RULES, Absorb, Blocked, Shapes, Through

CONCRETE = [
    op
    for op in vars(graph).values()
    if isinstance(op, type) and issubclass(op, graph.Op)
    and op not in (graph.Op, graph.ChannelPreserving)
]  # fmt: skip


def a_map(channels=4, axis=3, scale=2.0, shift=1.0):
    return ChannelMap(np.full(channels, scale), np.full(channels, shift), axis)


IMAGE = Shapes(((None, 8, 8, 4),), (None, 8, 8, 4))


@pytest.mark.parametrize("op", CONCRETE, ids=lambda op: op.__name__)
def test_every_operation_has_a_rule_and_a_description(op):
    assert op in RULES
    assert op.__doc__


def test_the_table_has_no_other_rows():
    assert set(RULES) == set(CONCRETE)


CONV = graph.Linear((Kernel("kernel", (3, 3, 4, 4), (2,), (3,)),), None, 3, 3)


@pytest.mark.parametrize(
    ("op", "m", "expected"),
    [
        (CONV, a_map(), Absorb),
        (CONV, a_map(axis=1), Blocked),
        (dataclasses.replace(CONV, activation=Activation.OTHER), a_map(shift=0.0), Blocked),
        (dataclasses.replace(CONV, activation=Activation.HOMOGENEOUS), a_map(), Blocked),
        (dataclasses.replace(CONV, activation=Activation.HOMOGENEOUS), a_map(shift=0.0), Absorb),
        (
            dataclasses.replace(CONV, activation=Activation.HOMOGENEOUS),
            a_map(scale=-1, shift=0),
            Blocked,
        ),
        (dataclasses.replace(CONV, pads=True), a_map(), Absorb),
        (graph.Affine(3, 3), a_map(scale=-1.0), Through),
        (graph.Affine(1, 1), a_map(), Blocked),
        (graph.Affine(), a_map(axis=2, channels=8), Through),
        (graph.Monotone(3, 3), a_map(), Through),
        (graph.Monotone(3, 3), a_map(scale=0.0), Through),
        (graph.Monotone(3, 3), a_map(scale=-1.0), Blocked),
        (graph.ZeroPadding(3, 3), a_map(), Blocked),
        (graph.ZeroPadding(3, 3), a_map(scale=-1.0, shift=0.0), Through),
        (graph.PositivelyHomogeneous(), a_map(), Blocked),
        (graph.PositivelyHomogeneous(), a_map(shift=0.0), Through),
        (graph.PositivelyHomogeneous(), a_map(scale=-1.0, shift=0.0), Blocked),
        (graph.Clip(), a_map(), Blocked),
        (graph.Clip(), a_map(shift=0.0), Through),
        (graph.Clip(), a_map(scale=-1.0, shift=0.0), Blocked),
        (graph.Clip(-np.inf, 0.0), a_map(shift=0.0), Through),
        (graph.Clip(0.0, 6.0), a_map(scale=1.0, shift=0.0), Blocked),
        (graph.Clip(-1.0), a_map(scale=1.0, shift=0.0), Blocked),
        (graph.Opaque(), a_map(scale=1.0, shift=0.0), Blocked),
        (graph.Input(), a_map(), Blocked),
        (graph.BatchNorm(a_map()), a_map(), Absorb),
        (graph.BatchNorm(a_map(axis=1)), a_map(), Blocked),
        (graph.BatchNorm(None, Reason(Obstacle.TRAINING_CALL)), a_map(), Blocked),
        (graph.Recurrent((), 2), a_map(), Blocked),
    ],
    ids=str,
)
def test_backward(op, m, expected):
    assert type(RULES[type(op)].backward(op, m, IMAGE)) is expected


@pytest.mark.parametrize(
    ("op", "m", "position", "expected"),
    [
        (CONV, a_map(), 0, Absorb),
        (CONV, a_map(axis=2), 0, Blocked),
        (dataclasses.replace(CONV, in_axis=None), a_map(), 0, Blocked),
        (dataclasses.replace(CONV, activation=Activation.OTHER), a_map(), 0, Absorb),
        (dataclasses.replace(CONV, pads=True), a_map(), 0, Blocked),
        (dataclasses.replace(CONV, pads=True), a_map(shift=0.0), 0, Absorb),
        (graph.Affine(3, 1), a_map(), 0, Through),
        (graph.Affine(), a_map(), 1, Blocked),
        (graph.Clip(), a_map(), 0, Blocked),
        (graph.Clip(), a_map(shift=0.0), 0, Through),
        (graph.Clip(-1.0, 1.0), a_map(shift=0.0), 0, Blocked),
        (graph.Recurrent((), 3), a_map(), 0, Absorb),
        (graph.Recurrent((), 3), a_map(), 1, Blocked),
        (graph.Recurrent((), 2), a_map(), 0, Blocked),
        (graph.Merge(MergeKind.ADD), a_map(), 0, Blocked),
        (graph.BatchNorm(a_map()), a_map(), 0, Absorb),
    ],
    ids=str,
)
def test_forward(op, m, position, expected):
    assert type(RULES[type(op)].forward(op, m, IMAGE, position)) is expected


def test_a_clip_says_why_it_blocks():
    limited = graph.Clip(0.0, 6.0, "is an activation with a limit")
    rule = RULES[graph.Clip]
    assert rule.backward(limited, a_map(), IMAGE).reason == "is an activation with a limit"
    assert rule.forward(limited, a_map(), IMAGE, 0).reason == "is an activation with a limit"
    assert "is an activation, which a shift" in rule.backward(graph.Clip(), a_map(), IMAGE).reason


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


def test_axis_follows_a_global_pool():
    (moved,) = RULES[graph.Affine].forward(graph.Affine(3, 1), a_map(), IMAGE, 0).maps
    assert moved.axis == 1
    (back,) = RULES[graph.Affine].backward(graph.Affine(3, 1), moved, IMAGE).maps
    assert back.axis == 3


def test_axis_follows_a_permutation_and_back():
    op = graph.Permute((0, 3, 1, 2))
    (moved,) = RULES[graph.Permute].forward(op, a_map(), IMAGE, 0).maps
    assert moved.axis == 1
    (back,) = RULES[graph.Permute].backward(op, moved, IMAGE).maps
    assert back.axis == 3


def test_concat_splits_by_channel():
    shapes = Shapes(((None, 8, 8, 1), (None, 8, 8, 3)), (None, 8, 8, 4))
    m = ChannelMap(np.arange(4.0), np.arange(4.0) + 10, 3)
    first, second = RULES[graph.Concat].backward(graph.Concat(3), m, shapes).maps
    np.testing.assert_array_equal(first.scale, [0])
    np.testing.assert_array_equal(second.shift, [11, 12, 13])


def test_concat_of_unknown_sizes_blocks():
    shapes = Shapes(((None, 8, 8, None), (None, 8, 8, 3)), (None, 8, 8, None))
    assert isinstance(RULES[graph.Concat].backward(graph.Concat(3), a_map(), shapes), Blocked)


@pytest.mark.parametrize("kind", ["add", "subtract", "average", "maximum", "minimum"])
def test_merge_with_a_broadcast_input_blocks(kind):
    shapes = Shapes(((None, 8, 8, 4), (None, 8, 8, 1)), (None, 8, 8, 4))
    outcome = RULES[graph.Merge].backward(graph.Merge(kind), a_map(), shapes)
    assert isinstance(outcome, Blocked)


def test_only_one_addend_takes_the_shift():
    shapes = Shapes(((None, 8, 8, 4),) * 2, (None, 8, 8, 4))
    assert RULES[graph.Merge].backward(graph.Merge(MergeKind.ADD), a_map(), shapes).shift_once
    first, second = (
        RULES[graph.Merge].backward(graph.Merge(MergeKind.SUBTRACT), a_map(), shapes).maps
    )
    assert first.has_shift
    assert not second.has_shift


def test_reasons_say_how_many_channels_are_negative():
    m = ChannelMap(np.array([1.0, -1.0, -2.0]), np.zeros(3), 3)
    outcome = motion.RULES[graph.Monotone].backward(graph.Monotone(3, 3), m, IMAGE)
    assert "(2 of 3 channels)" in outcome.reason

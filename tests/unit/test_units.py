"""Units of all values at once: what goes, what stays and why, and that outputs are the same.

Graphs are run in numpy, in whole numbers and powers of two.
"""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from mbn_rewrite.ir.graph import (
    Activation,
    Clip,
    Merge,
    MergeKind,
    PositivelyHomogeneous,
    ZeroPadding,
)
from mbn_rewrite.passes.fold import plan_fold
from mbn_rewrite.passes.indexed_graph import IndexedGraph
from mbn_rewrite.passes.strands import Strands
from mbn_rewrite.passes.units import Assumptions
from mbn_rewrite.plans import Fold, Reclip, Remap
from mbn_rewrite.rules import relations
from mbn_rewrite.rules.relations import RELATIONS, Origins
from tests.support.neutral import AXIS, POSITIONS, Builder, random_graph, run

OPTIONS = [{}, {"borders": True}, {"clips": True}, {"borders": True, "clips": True}]


@pytest.fixture
def b():
    return Builder(np.random.default_rng(3))


def inputs(seed=0):
    return np.random.default_rng(seed).integers(-3, 4, (3, POSITIONS, 2)).astype(np.float64)


def check(graph, left, exact=True, planned=plan_fold, **options):
    """Plans, and compares outputs: bit for bit, or within roundings of float64."""
    plan = planned(graph, **options)
    assert plan.left == left, plan.table(full=True)
    for before, after in zip(run(graph, inputs()), run(graph, inputs(), plan), strict=True):
        if exact:
            np.testing.assert_array_equal(after, before)
        else:
            np.testing.assert_allclose(after, before, rtol=1e-9, atol=1e-9 * np.abs(before).max())
    return plan


def fixed_norm(b, x, scale, shift):
    """A BatchNormalization with one scale and one shift for all channels."""
    y = b.norm(x)
    m = b.nodes[-1].op.map
    m = replace(m, scale=np.full(m.channels, float(scale)), shift=np.full(m.channels, float(shift)))
    b.nodes[-1] = replace(b.nodes[-1], op=replace(b.nodes[-1].op, map=m))
    return y


def reason(plan, name):
    (decision,) = [d for d in plan.decisions if d.name == name]
    return decision.reason


# --------------------------------------------------------------------------- what goes


def pre_activation(b, blocks, window=3):
    """A residual trunk whose every block begins with BatchNormalization and ReLU."""
    x = b.linear(b.source(2), 3)
    for _ in range(blocks):
        y = b.linear(b.relu(b.norm(x)), 3)
        y = b.linear(b.relu(b.norm(y)), 3, window)
        x = b.merged(MergeKind.ADD, x, y)
    return b.linear(b.relu(b.norm(x)), 2)


def test_a_trunk_with_many_readers(b):
    plan = check(b.graph(pre_activation(b, 5)), left=0)
    assert not plan.of(Reclip)
    # The trunk keeps its scale, so that what gives it keeps its kernel.
    assert np.all(plan.of(Fold)["conv_1"].after.scale == 1)


def test_dense_blocks_take_clips_by_channel(b):
    x = b.relu(b.linear(b.source(2), 3))
    for _ in range(3):
        y = b.linear(b.relu(b.norm(x)), 2)
        y = b.linear(b.relu(b.norm(y)), 2, window=3)
        x = b.joined(x, y)
    graph = b.graph(b.linear(b.relu(b.norm(x)), 2))
    plan = check(graph, left=0)
    clips = plan.of(Reclip)
    assert len(clips) == 4
    assert all(clip.upper is None for clip in clips.values())
    assert "conv_1" not in plan.actions  # the identity is kept where it can be


def test_a_trunk_read_without_a_norm(b):
    x = b.linear(b.source(2), 3)
    y = b.linear(b.relu(b.norm(x)), 2)
    plan = check(b.graph(b.merged(MergeKind.ADD, y, b.linear(x, 2))), left=0)
    assert {"conv_1"} <= set(plan.of(Fold))


def test_identity_branches(b):
    x = b.relu(b.linear(b.source(2), 3))
    for _ in range(3):
        branches = b.norm(b.linear(x, 3, window=3)), b.norm(b.linear(x, 3)), b.norm(x)
        x = b.relu(b.merged(MergeKind.ADD, *branches))
    check(b.graph(b.linear(x, 2)), left=0)


@pytest.mark.parametrize("kind", [MergeKind.ADD, MergeKind.SUBTRACT, MergeKind.AVERAGE])
def test_sums_of_origins(b, kind):
    x = b.source(2)
    y = b.merged(kind, b.linear(x, 2), b.linear(x, 2))
    graph = b.graph(b.tanh(b.norm(y)), b.linear(b.norm(y), 2))
    check(graph, left=0)


def test_a_value_added_to_itself_twice_over(b):
    x = b.linear(b.source(2), 2)
    y = b.merged(MergeKind.ADD, x, x)
    z = b.merged(MergeKind.SUBTRACT, b.merged(MergeKind.ADD, y, y), y)
    check(b.graph(b.tanh(b.norm(b.merged(MergeKind.ADD, y, z)))), left=0)


@pytest.mark.parametrize("kind", [MergeKind.MAXIMUM, MergeKind.MINIMUM])
def test_extrema_keep_units(b, kind):
    x = b.source(2)
    y = b.norm(b.merged(kind, b.linear(x, 2), b.linear(x, 2)))
    check(b.graph(b.tanh(y)), left=0)
    x = b.source(2)
    y = b.norm(b.merged(kind, b.linear(x, 4), b.linear(x, 4)), signs=True)
    plan = plan_fold(b.graph(b.tanh(y)))
    assert f"takes a {kind}, which a negative scale cannot pass (" in reason(plan, f"bn_{y}")


def test_a_gate_passes_scales(b):
    x = b.relu(b.norm(b.linear(b.source(2), 3)))
    gated = b.merged(MergeKind.MULTIPLY, x, b.tanh(b.linear(b.pooled(x), 3)))
    y = b.norm(b.merged(MergeKind.ADD, gated, b.linear(x, 3)))
    check(b.graph(b.tanh(y)), left=0)  # its shift goes to the other addend, its scale to all


def test_a_gate_of_itself(b):
    x = b.norm(b.linear(b.source(2), 2))
    check(b.graph(b.linear(b.merged(MergeKind.MULTIPLY, x, x), 2)), left=0)


def test_a_gate_of_two_norms(b):
    x = b.source(2)
    y = b.merged(MergeKind.MULTIPLY, b.norm(b.linear(x, 2)), b.norm(b.linear(x, 2)))
    check(b.graph(b.tanh(b.norm(y))), left=1)


def test_calls_of_a_shared_layer_have_the_same_units(b):
    x = b.source(2)
    first, second = (b.linear(y, 2, owner="shared") for y in (x, b.tanh(x)))
    check(b.graph(b.tanh(b.norm(first, owner="bn")), b.tanh(b.norm(second, owner="bn_2"))), left=1)


def test_a_call_of_a_shared_layer_that_must_be_as_it_is(b):
    first = b.linear(b.source(2), 2, owner="shared")
    second = b.linear(b.tanh(first), 2, owner="shared")
    plan = check(b.graph(b.tanh(b.norm(second))), left=1)
    assert "Beside" not in plan.decisions[0].reason


def test_a_mask_of_one_channel_keeps_its_units(b):
    x = b.source(2)
    x, mask = b.norm(b.linear(x, 3)), b.norm(b.tanh(b.linear(x, 1)))
    op = Merge(MergeKind.MULTIPLY)
    y = b.linear(b.add(op, x, mask, channels=3, kind="Multiply"), 2)
    plan = check(b.graph(y), left=1)
    assert "multiplies all channels by it" in reason(plan, f"bn_{mask}")


def test_sums_of_the_same_contradict_only_together(b):
    x = b.source(2)
    p, q = b.linear(x, 3), b.linear(x, 3)
    y, z = b.merged(MergeKind.ADD, p, q), b.merged(MergeKind.ADD, p, q)
    plan = check(
        b.graph(b.linear(b.merged(MergeKind.MAXIMUM, y, fixed_norm(b, z, 1, 3)), 2)), left=1
    )
    assert "contradict one another" in plan.decisions[-1].reason


def test_sums_in_another_order_contradict_only_together(b):
    x = b.source(2)
    p, q, r = (b.linear(x, 3) for _ in range(3))
    y = b.merged(MergeKind.ADD, b.merged(MergeKind.ADD, p, q), r)
    z = b.merged(MergeKind.ADD, p, b.merged(MergeKind.ADD, q, r))
    both = b.merged(MergeKind.MAXIMUM, fixed_norm(b, y, 2, 1), fixed_norm(b, z, 2, 3))
    check(b.graph(b.linear(both, 2)), left=1)


def test_operations_that_read_something_beside_their_data(b):
    x = b.source(2)
    y = b.add(ZeroPadding(AXIS, AXIS), b.linear(x, 3), b.linear(x, 3), channels=3)
    check(b.graph(b.linear(fixed_norm(b, y, 2, 5), 2)), left=0)
    x = b.source(2)
    data = b.linear(x, 2)
    beside = b.norm(b.tanh(data))
    y = b.linear(data, 2, owner="conv")
    b.nodes[-1] = replace(b.nodes[-1], inputs=(data, beside))
    assert plan_fold(b.graph(y)).left == 1


# ----------------------------------------------------------------------------- clips


def test_a_relu_becomes_a_maximum_where_all_scales_are_positive(b):
    x = b.tanh(b.source(2))
    y = b.linear(b.relu(b.norm(x)), 2)
    plan = check(b.graph(y), left=0)
    (clip,) = plan.of(Reclip).values()
    assert (clip.axis, clip.upper) == (AXIS, None)


def test_a_relu_stays_one_where_it_can(b):
    x = b.norm(b.linear(b.source(2), 2))
    assert not check(b.graph(b.linear(b.relu(x), 2)), left=0).of(Reclip)


def test_negative_scales_take_bounds_on_both_sides(b):
    x = b.tanh(b.linear(b.source(2), 6))
    graph = b.graph(b.linear(b.relu(b.norm(x, signs=True)), 2))
    plan = check(graph, left=1)
    assert "which a negative scale cannot pass (" in plan.decisions[0].reason
    (clip,) = check(graph, left=0, clips=True).of(Reclip).values()
    assert set(np.isfinite(clip.lower) ^ np.isfinite(clip.upper)) == {True}


def test_a_clip_of_two_bounds_moves_only_where_clips_are_asked_for(b):
    x = b.tanh(b.source(2))
    graph = b.graph(b.linear(b.relu(b.norm(x), upper=6.0), 2))
    check(graph, left=1)
    (clip,) = check(graph, left=0, clips=True).of(Reclip).values()
    assert np.all(np.isfinite(clip.lower))
    assert np.all(np.isfinite(clip.upper))


def test_clips_let_a_norm_go_between_a_relu_and_a_padded_convolution(b):
    x = b.relu(b.linear(b.source(2), 2))
    graph = b.graph(b.linear(b.norm(x), 2, window=3))
    plan = check(graph, left=1)
    said = reason(plan, plan.decisions[0].name)
    assert "is an activation, which a shift cannot pass; after it, Conv1D" in said
    check(graph, left=0, clips=True)
    check(graph, left=0, borders=True)


def test_a_relu_called_twice_does_not_become_a_clip(b):
    x = b.tanh(b.source(2))
    y = b.add(Clip(), b.norm(x), channels=2, owner="relu", kind="ReLU")
    z = b.add(Clip(), b.norm(x), channels=2, owner="relu", kind="ReLU")
    check(b.graph(b.linear(y, 2), b.linear(z, 2)), left=2)


def test_leaky_relus_do_not_become_clips(b):
    x = b.tanh(b.source(2))
    check(b.graph(b.linear(b.leaky_relu(b.norm(x)), 2)), left=1, clips=True)


# ------------------------------------------------------------------- scales of zero


def zeroed(b, x, owner=""):
    """A BatchNormalization of which some scales are 0, and one is not."""
    y = b.norm(x, owner=owner)
    node = b.nodes[-1]
    m = node.op.map
    scale = m.scale.copy()
    scale[:-1] = 0
    b.nodes[-1] = replace(node, op=replace(node.op, map=replace(m, scale=scale)))
    return y


def test_a_scale_of_zero_goes_into_what_nothing_else_reads(b):
    x = b.linear(b.source(2), 3)
    check(b.graph(b.tanh(zeroed(b, x))), left=0)


def test_a_scale_of_zero_goes_into_what_follows(b):
    x = b.tanh(b.linear(b.source(2), 3))
    check(b.graph(b.linear(b.shifted(zeroed(b, x)), 2), b.linear(x, 2)), left=0)


def test_a_scale_of_zero_goes_through_another_norm(b):
    x = b.norm(b.linear(b.source(2), 3))
    check(b.graph(b.tanh(zeroed(b, x))), left=0)
    x = b.tanh(b.linear(b.source(2), 3))
    check(b.graph(b.linear(b.norm(zeroed(b, x)), 2), b.linear(x, 2)), left=0)


def test_a_scale_of_zero_stays_where_both_sides_are_needed(b):
    x = b.linear(b.source(2), 3)
    y = b.merged(MergeKind.ADD, zeroed(b, x), b.tanh(b.linear(x, 3)))
    plan = check(b.graph(b.linear(y, 2), b.linear(x, 2)), left=1)
    assert "a scale of 0 (2 of 3 channels)" in plan.decisions[0].reason.lower()


def test_a_constant_does_not_pass_a_clip_that_moves(b):
    x = b.tanh(b.linear(b.source(2), 3))
    graph = b.graph(b.linear(b.relu(zeroed(b, x)), 2), b.linear(x, 2))
    check(graph, left=plan_fold(graph, clips=True).left, clips=True)


@pytest.mark.parametrize("forward", [True, False])
def test_a_scale_of_zero_at_several_calls(b, forward):
    x = b.source(2)
    calls = []
    for y in (x, b.tanh(x)):
        y = b.linear(y, 3, owner="conv")
        y = b.norm(b.tanh(y) if forward else y, owner="bn")
        if calls:  # one layer has one map
            b.nodes[-1] = replace(b.nodes[-1], op=calls[0])
        else:
            zeroed_op = b.nodes[-1].op
            m = replace(zeroed_op.map, scale=zeroed_op.map.scale * [0, 1, 0])
            b.nodes[-1] = replace(b.nodes[-1], op=replace(zeroed_op, map=m))
            calls.append(b.nodes[-1].op)
        calls.append(b.linear(y, 2, owner="last") if forward else b.tanh(y))
    check(b.graph(*calls[1:]), left=0)


def test_a_constant_is_not_made_before_a_clip_that_excludes_zero(b):
    x = b.add(Clip(1.0, 3.0), b.linear(b.source(2), 3), channels=3, kind="Clip")
    check(b.graph(b.linear(zeroed(b, x), 2, window=3)), left=1, clips=True)


# -------------------------------------------------------------------- what stays, and why


def test_a_trunk_that_is_an_output(b):
    x = b.linear(b.source(2), 2)
    y = b.linear(b.leaky_relu(b.norm(x)), 2)
    plan = check(b.graph(x, y), left=1)
    said = plan.decisions[0].reason
    assert said.startswith(
        "Before it, Conv1D 'conv_1' is also an output of the model; after it, Leaky"
    )


def test_contradictions_everywhere_change_nothing(b):
    x = b.source(2)
    for _ in range(30):
        x = b.tanh(b.norm(x))
    plan = check(b.graph(x), left=30)
    assert not plan.actions
    assert len({d.reason for d in plan.decisions}) == 30


def test_what_meets_again_with_another_scale(b):
    x = b.tanh(b.source(2))
    x = b.linear(x, 2)
    y = b.merged(MergeKind.ADD, x, b.norm(x))
    plan = check(b.graph(b.linear(y, 2)), left=1)
    assert "Merge 'merge_4' joins it with values that do not have its scale" in reason(plan, "bn_3")


def test_what_is_not_finite_stays(b):
    x = b.linear(b.source(2), 2)
    y = b.tanh(b.norm(x))
    node = b.nodes[-2]
    m = node.op.map
    b.nodes[-2] = replace(node, op=replace(node.op, map=replace(m, shift=m.shift + np.inf)))
    plan = plan_fold(b.graph(b.tanh(b.norm(b.linear(y, 2)))))
    assert [str(d.action) for d in plan.decisions] == ["kept", "folded"]
    assert plan.decisions[0].reason == "Its scale or shift is not finite."


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_what_a_dtype_cannot_hold_stays_and_the_rest_goes(b, dtype):
    x = b.norm(b.linear(b.source(2), 2))
    x = b.linear(b.relu(x), 2)
    x = b.norm(x)
    huge = b.nodes[-1]
    m = huge.op.map
    b.nodes[-1] = replace(huge, op=replace(huge.op, map=replace(m, shift=m.shift + 1e39)))
    graph = b.graph(b.tanh(x))
    graph = replace(graph, nodes=tuple(replace(node, dtype=dtype) for node in graph.nodes))
    plan = plan_fold(graph)
    assert [str(d.action) for d in plan.decisions] == ["folded", "kept"]
    assert "cannot absorb it: its weights would reach" in plan.decisions[1].reason


def test_what_stays_takes_on_the_units_around_it(b):
    x = b.source(2)
    first, second = (b.linear(y, 2, owner="shared") for y in (x, b.tanh(x)))
    graph = b.graph(b.tanh(b.norm(first, owner="a")), b.tanh(b.norm(second, owner="b")))
    plan = check(graph, left=1)
    assert set(plan.of(Remap)) == {"b"}


def test_layers_that_nothing_asks_of_keep_their_weights(b):
    x = b.linear(b.source(2), 2)
    y = b.tanh(b.norm(b.linear(b.tanh(x), 2, owner="asked")))
    plan = check(b.graph(b.linear(y, 2)), left=0)
    assert set(plan.of(Fold)) == {"asked"}


def test_channels_that_a_flatten_spreads_are_not_all_unread(b):
    x = b.norm(b.linear(b.source(2), 1))
    check(b.graph(b.linear(zeroed(b, b.flat(x)), 2)), left=0)


def test_axes_that_differ_keep_a_site(b):
    x = b.norm(b.linear(b.source(2), 3), axis=1)
    plan = check(b.graph(b.linear(b.norm(x), 2)), left=2)
    assert "has its channels on another axis" in "".join(d.reason for d in plan.decisions)


def test_a_norm_called_twice_that_stays_has_one_map(b):
    x = b.norm(b.source(2))
    y = b.norm(x, owner="shared")
    op = b.nodes[-1].op
    z = b.add(op, y, channels=2, owner="shared", kind="BatchNormalization")
    plan = plan_fold(b.graph(z))
    check(b.graph(z), left=plan.left)
    assert "shared" not in plan.of(Remap)


def test_what_is_constant_at_one_call_is_so_at_the_next(b):
    x = b.linear(b.source(2), 2)
    joined = b.joined(x, zeroed(b, x))
    y = b.norm(joined, owner="shared")
    z = b.add(b.nodes[-1].op, y, channels=4, owner="shared", kind="BatchNormalization")
    graph = b.graph(b.linear(z, 2))
    check(graph, left=plan_fold(graph).left)


@pytest.mark.parametrize(("scale", "left"), [(1e-2, 0), (1e-5, 1)])
def test_what_is_not_kept_so_far_off_that_digits_are_lost(b, scale, left):
    x = b.linear(b.source(2), 2)
    y = b.linear(b.leaky_relu(fixed_norm(b, x, scale, 1)), 2)
    graph = b.graph(y, b.linear(x, 2))
    values = tuple(replace(value, dtype="float32") for value in graph.values)
    plan = check(replace(graph, values=values), left=left, exact=False)
    assert not left or "more than float32 has digits for" in plan.decisions[0].reason


# ------------------------------------------------------------------------- random graphs


@pytest.mark.parametrize("seed", range(80))
def test_random_graphs_give_what_they_gave(seed):
    graph = random_graph(seed)
    left = {}
    for options in OPTIONS:
        plan = plan_fold(graph, **options)
        left[tuple(options)] = plan.left
        check(graph, plan.left, exact=False, **options)
    assert left[("borders", "clips")] <= min(left[("borders",)], left[("clips",)])
    assert max(left[("borders",)], left[("clips",)]) <= left[()]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("seed", range(1000, 1020))
def test_random_graphs_with_constants_in_code_give_what_they_gave(seed, options):
    graph = random_graph(seed, constants=4)
    check(graph, plan_fold(graph, **options).left, exact=False, **options)


@pytest.mark.parametrize("seed", range(500, 560))
def test_no_set_that_can_go_is_larger(seed):
    """Of all sets of sites, as few stay as can."""
    graph = random_graph(seed, steps=10)
    work = IndexedGraph(graph)
    sites = list(work.sites)
    if len(sites) > 6:
        sites = sites[:6]
    solved = Assumptions(Strands(work))
    left = sum(bool(solved.assume(owner)) for owner in sites)
    for fewer in range(left):
        for kept in combinations(sites, fewer):
            tried = Assumptions(Strands(work))
            assert any(tried.assume(owner) for owner in sites if owner not in kept), kept


def test_a_plan_is_the_same_each_time():
    first, second = (plan_fold(random_graph(11)).to_json() for _ in range(2))
    assert first == second


MISTAKES = {
    "a shift passes an activation": (Clip, lambda tied: replace(tied, origins=Origins.SAME)),
    "a sign passes an activation": (Clip, lambda tied: replace(tied, positive=False)),
    "a shift passes a leaky one": (
        PositivelyHomogeneous,
        lambda tied: replace(tied, origins=Origins.SAME),
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_wrong_row_is_noticed(name, monkeypatch):
    kind, spoil = MISTAKES[name]
    row = RELATIONS[kind]

    def wrong(*args):
        tied = row(*args)
        return spoil(tied) if isinstance(tied, relations.Tied) else tied

    monkeypatch.setitem(RELATIONS, kind, wrong)

    def check_all():
        for seed in range(80):
            graph = random_graph(seed)
            check(graph, plan_fold(graph).left, exact=False)

    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        check_all()


def test_a_fused_activation_takes_scales_alone(b):
    x = b.linear(b.source(2), 2, activation=Activation.HOMOGENEOUS)
    plan = check(b.graph(b.tanh(b.norm(x))), left=1)
    assert "applies a fused activation, which a shift cannot pass" in plan.decisions[0].reason

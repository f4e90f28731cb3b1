"""Scales between layers chosen for int8: outputs bit for bit, and how even weights become."""

from dataclasses import replace

import numpy as np
import pytest

from mbn_rewrite.errors import RewriteError
from mbn_rewrite.ir import graph as ir
from mbn_rewrite.ir.algebra import fold
from mbn_rewrite.options import checked_options
from mbn_rewrite.passes.fold import plan_fold
from mbn_rewrite.passes.planner import make_plan
from mbn_rewrite.plans import Fold, Reclip, Remap
from tests.support.neutral import POSITIONS, Builder, random_graph, run


def inputs_of(seed):
    return np.random.default_rng(seed).integers(-4, 5, (2, POSITIONS, 2)).astype(np.float64)


def uneven(b, x, channels, window=1):
    """A convolution whose output channels have weights of very different sizes."""
    y = b.linear(x, channels, window)
    owner = b.nodes[-1].owner
    b.weights[owner, "kernel"] = np.ones_like(b.weights[owner, "kernel"])
    b.weights[owner, "kernel"] *= 4.0 ** (np.arange(channels) - channels // 2)
    return y


def written(graph, plan, owner):
    """The kernel of a layer as a plan has it."""
    kernel = graph.read_weight(owner, "kernel")
    action = plan.actions.get(owner)
    if not isinstance(action, Fold):
        return kernel
    ((kernel,), _) = fold(
        [(action.op.kernels[0], kernel)],
        graph.read_weight(owner, "bias"),
        before=action.before,
        after=action.after,
    )
    return kernel


def spread(sizes):
    return sizes.max() / sizes.min()


@pytest.mark.parametrize("seed", range(150))
def test_outputs_stay_what_they_are_bit_for_bit(seed):
    graph, x = random_graph(seed, constants=seed % 3), inputs_of(seed)
    plan = plan_fold(graph, equalize=True)
    assert plan.left <= plan_fold(graph).left
    for expected, result in zip(run(graph, x), run(graph, x, plan), strict=True):
        np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("upper", [np.inf, 6.0])
def test_channels_become_as_large_on_either_side_of_a_value(upper):
    b = Builder(np.random.default_rng(0))
    first = uneven(b, b.source(2), 6)
    last = b.linear(b.relu(b.norm(first), upper), 3)
    graph, names = b.graph(last), [node.owner for node in b.nodes if node.kind == "Conv1D"]
    b.weights[names[1], "kernel"][:] = 1.0
    plan = plan_fold(graph, equalize=True)
    assert plan.left == 0
    given, taken = (np.abs(written(graph, plan, name)) for name in names)
    given, taken = given.max(axis=(0, 1)), taken.max(axis=(0, 2))
    assert np.ptp(np.log2(given / taken)) <= 2
    assert spread(given) < spread(np.abs(written(graph, plan_fold(graph), names[0])).max((0, 1)))
    assert bool(plan.of(Reclip)) == (upper == 6.0)
    x = inputs_of(1)
    np.testing.assert_array_equal(run(graph, x, plan)[0], run(graph, x)[0])


def test_what_something_fixes_is_left_alone():
    b = Builder(np.random.default_rng(0))
    value = b.norm(uneven(b, b.source(2), 6))
    last = b.linear(b.relu(value), 3)
    graph = b.graph(value, last)  # whose channels are seen as they are
    plain, equalised = plan_fold(graph), plan_fold(graph, equalize=True)
    assert plain.actions.keys() == equalised.actions.keys()
    for owner in plain.actions:
        if isinstance(plain.actions[owner], Fold):
            np.testing.assert_array_equal(
                written(graph, plain, owner), written(graph, equalised, owner)
            )


def test_a_residual_network_is_equalised_within_its_blocks():
    b = Builder(np.random.default_rng(0))
    trunk = b.norm(b.linear(b.source(2), 4))
    inner = [uneven(b, trunk, 6)]
    y = b.linear(b.relu(b.norm(inner[0])), 4)
    out = b.linear(b.merged(ir.MergeKind.ADD, trunk, b.norm(y)), 2)
    graph, x = b.graph(out), inputs_of(3)
    plan = plan_fold(graph, equalize=True)
    owner = graph.nodes[inner[0]].owner
    before, after = graph.read_weight(owner, "kernel"), written(graph, plan, owner)
    assert spread(np.abs(after).max((0, 1))) < spread(np.abs(before).max((0, 1)))
    np.testing.assert_array_equal(run(graph, x, plan)[0], run(graph, x)[0])


def test_channels_that_nothing_gives_or_reads_keep_their_scale():
    b = Builder(np.random.default_rng(0))
    first = b.linear(b.source(2), 4)
    last = b.linear(b.relu(b.norm(first)), 3)
    graph, names = b.graph(last), [node.owner for node in b.nodes if node.kind == "Conv1D"]
    b.weights[names[0], "kernel"][..., 1] = 0.0
    b.weights[names[1], "kernel"][:, 2] = 0.0
    plan, x = plan_fold(graph, equalize=True), inputs_of(4)
    assert np.all(np.isfinite(written(graph, plan, names[0])))
    np.testing.assert_array_equal(run(graph, x, plan)[0], run(graph, x)[0])


def test_where_channels_are_about_as_large_nothing_is_gained_and_nothing_changes():
    b = Builder(np.random.default_rng(0))
    first = b.linear(b.source(2), 6)
    graph = b.graph(b.linear(b.relu(b.norm(first)), 3))
    for name in (node.owner for node in graph.nodes if node.kind == "Conv1D"):
        b.weights[name, "kernel"][:] = 1.0
    plan = plan_fold(graph, equalize=True)
    assert plan.notes == ("Scales between layers are even enough for int8: none was changed.",)
    assert plan.actions.keys() == plan_fold(graph).actions.keys()


def test_a_channel_that_a_bias_alone_gives_does_not_come_to_rule_the_others():
    b = Builder(np.random.default_rng(0))
    first = b.linear(b.source(2), 8)
    last = b.linear(b.relu(b.norm(first)), 3)
    graph, names = b.graph(last), [node.owner for node in b.nodes if node.kind == "Conv1D"]
    b.weights[names[0], "kernel"][:] = 1.0
    b.weights[names[0], "kernel"][..., 3] = 2.0**-27
    b.weights[names[1], "kernel"][:] = 1.0
    plan = plan_fold(graph, equalize=True)
    for action in plan.of(Fold).values():
        for m in (action.before, action.after):
            assert m is None or np.all(np.abs(np.log2(np.abs(m.scale))) <= 5)


def padded(b, image, last_window=3):
    """A convolution, ReLU and BatchNormalization whose shift cannot pass what pads with zeros."""
    x = b.norm(b.relu(b.linear(image, 6)))
    return b.graph(b.linear(x, 3, window=last_window))


def test_what_stays_only_shifts():
    b = Builder(np.random.default_rng(0))
    graph, x = padded(b, b.source(2)), inputs_of(5)
    plain, plan = plan_fold(graph), plan_fold(graph, equalize=True)
    assert plain.left == plan.left == 1
    assert not plain.of(Remap)
    (remap,) = plan.of(Remap).values()
    np.testing.assert_array_equal(remap.map.scale, 1.0)
    assert remap.map.has_shift
    assert "1 that stays only adds" in plan.notes[0]
    np.testing.assert_array_equal(run(graph, x, plan)[0], run(graph, x)[0])


def too_large(b):
    """A convolution, ReLU and BatchNormalization whose scale float16 cannot hold."""
    x = b.norm(b.relu(b.linear(b.source(2), 6)))
    i, norm = len(b.nodes) - 1, b.nodes[-1]
    m = norm.op.map
    b.nodes[i] = replace(norm, op=replace(norm.op, map=replace(m, scale=m.scale * 1e39)))
    return x


def in_float16(graph):
    return replace(graph, nodes=tuple(replace(node, dtype="float16") for node in graph.nodes))


def test_a_scale_that_a_dtype_cannot_hold_stays():
    b = Builder(np.random.default_rng(0))
    x = too_large(b)
    graph = in_float16(b.graph(b.linear(x, 3, window=3)))
    plan = plan_fold(graph, equalize=True)
    assert plan.left == 1
    assert not plan.of(Remap)
    assert "only add" not in "".join(plan.notes)


def test_a_scale_that_a_dtype_cannot_hold_leaves_the_others_to_layers():
    b = Builder(np.random.default_rng(0))
    x = too_large(b)
    first = b.nodes[-1].owner
    x = b.norm(b.relu(b.linear(x, 6, window=3)))
    graph = in_float16(b.graph(b.linear(x, 3, window=3)))
    plan = plan_fold(graph, equalize=True)
    assert plan.left == 2
    (second,) = plan.of(Remap)
    assert second != first
    assert "1 that stays only adds" in plan.notes[0]


def test_a_scale_that_something_fixes_stays():
    b = Builder(np.random.default_rng(0))
    value = b.norm(b.relu(b.tanh(b.linear(b.source(2), 6))))
    graph = b.graph(b.linear(value, 3, window=3), value)
    plan = plan_fold(graph, equalize=True)
    assert plan.left == 1
    assert not plan.of(Remap)
    assert "only add" not in "".join(plan.notes)


def test_where_nothing_is_equalised_the_fold_is_the_plain_one():
    b = Builder(np.random.default_rng(0))
    x = b.tanh(b.linear(b.source(2), 4))
    graph = b.graph(b.linear(b.relu(b.norm(x), 6.0), 3))
    plain, equalised = plan_fold(graph), plan_fold(graph, equalize=True)
    assert plain.left == equalised.left
    assert plain.to_dict()["edits"] == equalised.to_dict()["edits"]


def test_it_is_off_by_default_and_a_matter_of_mode_fold():
    graph = random_graph(3)
    assert make_plan(graph, "fold").to_json() == plan_fold(graph).to_json()
    assert checked_options("fold", equalize=True).equalize
    for mode in ("auto", "depthwise", "strided"):
        with pytest.raises(RewriteError, match='only mode "fold" takes equalize'):
            checked_options(mode, equalize=True)

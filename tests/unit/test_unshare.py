"""Weights of their own for calls of shared layers: when, for which calls, and how many."""

from dataclasses import replace

import numpy as np
import pytest

from mbn_rewrite.ir.graph import MergeKind
from mbn_rewrite.passes import unshare
from mbn_rewrite.passes.fold import plan_fold
from mbn_rewrite.passes.planner import candidates, make_plan
from mbn_rewrite.passes.unshare import keep_shared, plan_unsharing
from mbn_rewrite.plans import Fold
from tests.support.neutral import Builder, random_graph
from tests.unit.test_units import OPTIONS, check

CHANNELS = 2
WEIGHTS = CHANNELS * CHANNELS + CHANNELS  # of a layer


@pytest.fixture
def b():
    return Builder(np.random.default_rng(3))


def unshared(graph, left=0, **options):
    return check(graph, left, planned=plan_unsharing, **options)


def head(b, norms, depth=1, owner="head"):
    """Levels on which shared layers are called, each with the norm that is named, or none."""
    ends, ops = [], {}
    for name in norms:
        x = b.tanh(b.linear(b.source(2), CHANNELS))
        for layer in range(depth):
            x = b.linear(x, CHANNELS, owner=f"{owner}_{layer}" if depth > 1 else owner)
            if name:
                x = b.norm(x, owner=f"{name}_{layer}")
                op = ops.setdefault(b.nodes[-1].owner, b.nodes[-1].op)
                b.nodes[-1] = replace(b.nodes[-1], op=op)
            x = b.tanh(x)
        ends.append(x)
    return ends


def test_each_level_has_weights_of_its_own(b):
    plan = unshared(b.graph(*head(b, ["a", "b", "c"], depth=2)))
    assert plan.unshared["head_0"].calls == ("head_0", "head_0_1", "head_0_2")
    assert plan.unshared["head_0"].weights == 2 * WEIGHTS
    # Three layers stand before them, and two are shared.
    assert plan.unshared["head_0"].part == pytest.approx(2 / 5)
    assert set(plan.of(Fold)) == {f"head_{i}{call}" for i in "01" for call in ("", "_1", "_2")}
    assert [d.into for d in plan.decisions][:2] == [("head_0",), ("head_1",)]


def test_the_plan_says_how_many_weights_that_adds(b):
    plan = unshared(b.graph(*head(b, ["a", "b", "c"])))
    assert plan.summary.endswith(
        "calls of a shared layer get weights of their own: 12 more (50.0%)"
    )
    table = plan.table()
    assert "head, head_1, head_2" in table
    (row,) = plan.to_dict()["unshared"]
    calls = ["head", "head_1", "head_2"]
    assert row == {"layer": "head", "calls": calls, "weights": 12, "part": 0.5}
    assert "head, head_1, head_2" in plan._repr_html_()


def test_calls_that_are_asked_for_the_same_stay_shared(b):
    plan = unshared(b.graph(*head(b, ["a", "b", "a", "b"])))
    assert plan.unshared["head"].calls == ("head", "head_1", "head", "head_1")
    assert plan.unshared["head"].weights == WEIGHTS


def test_equal_norms_of_several_levels_leave_one_set_of_weights(b):
    ends = head(b, ["a", "b", "c"])
    norms = [i for i, node in enumerate(b.nodes) if node.owner in ("a_0", "b_0")]
    b.nodes[norms[1]] = replace(b.nodes[norms[1]], op=b.nodes[norms[0]].op)
    plan = unshared(b.graph(*ends))
    assert plan.unshared["head"].calls == ("head", "head", "head_1")


def test_a_call_without_a_norm_keeps_the_layer(b):
    plan = unshared(b.graph(*head(b, ["a", "", "b", ""])))
    assert plan.unshared["head"].calls == ("head_1", "head", "head_2", "head")
    assert set(plan.of(Fold)) == {"head_1", "head_2"}


def test_a_norm_shared_by_all_calls_needs_no_more_weights(b):
    plan = unshared(b.graph(*head(b, ["a", "a", "a"])))
    assert not plan.unshared


def test_a_layer_stays_shared_where_no_norm_goes_by_it(b):
    """What follows the calls absorbs what follows them."""
    x = b.tanh(b.source(2))
    free = [b.linear(b.norm(b.linear(x, 2, owner="shared")), 2) for _ in range(2)]
    plan = unshared(b.graph(*head(b, ["a", "b"]), *map(b.tanh, free)))
    assert set(plan.unshared) == {"head"}


def test_a_norm_that_stays_anyway_unshares_nothing(b):
    ends = head(b, ["a", "b"])
    last = b.nodes[-1]
    b.nodes[-1] = replace(last, inputs=(last.inputs[0],))
    plan = unshared(b.graph(b.norm(b.tanh(ends[0])), b.norm(b.tanh(ends[1]))), left=2)
    assert plan.unshared
    kept = [decision for decision in plan.decisions if decision.action == "kept"]
    assert not any("weights of its own" in decision.reason for decision in kept)


def test_names_that_are_taken_are_not_given(b):
    x = b.linear(b.source(2), CHANNELS, owner="head_1")
    y = b.linear(x, CHANNELS, owner="head_2/inner")
    plan = unshared(b.graph(b.tanh(y), *head(b, ["a", "b", "c"])))
    assert plan.unshared["head"].calls == ("head", "head_3", "head_4")


def test_a_shift_before_each_call(b):
    """Every call absorbs what is before it."""
    ends = []
    for name in "ab":
        x = b.norm(b.tanh(b.source(2)), owner=name)
        ends.append(b.tanh(b.linear(x, CHANNELS, owner="head")))
    plan = unshared(b.graph(*ends))
    assert plan.unshared["head"].calls == ("head", "head_1")


def test_a_layer_in_parallel_branches_stays_shared(b):
    """They are merged for all calls, or for none."""
    ends = []
    for name in "ab":
        x = b.tanh(b.source(2))
        y = b.linear(x, CHANNELS, owner="wide", window=3)
        y = b.merged(MergeKind.ADD, y, b.linear(x, CHANNELS, owner="narrow"))
        ends.append(b.tanh(b.norm(y, owner=name)))
    check(b.graph(*ends), 1, planned=plan_unsharing)


# --------------------------------------------------------------------------- what forbids it


def reasons(plan):
    return [decision.reason for decision in plan.decisions if decision.action == "kept"]


def test_it_can_be_forbidden(b):
    graph = keep_shared(b.graph(*head(b, ["a", "b", "c"])))
    plan = unshared(graph, left=2)
    assert not plan.unshared
    assert set(reasons(plan)) == {
        "Conv1D 'head' is called several times, and each call would need weights of its own: it is "
        "to stay shared, as it was asked for."
    }


def test_calls_that_cannot_have_layers_of_their_own(b):
    graph = b.graph(*head(b, ["a", "b"]))
    nodes = [replace(n, why_shared="code calls it") if n.owner == "head" else n for n in b.nodes]
    plan = unshared(replace(graph, nodes=tuple(nodes)), left=1)
    assert reasons(plan)[0].endswith("each call would need weights of its own: code calls it.")


@pytest.mark.parametrize(
    ("least", "part", "layers"),
    [
        (2 * WEIGHTS, 0.0, ("head", "other")),
        (2 * WEIGHTS - 1, 0.0, ("head",)),
        (0, 0.34, ("head", "other")),  # of six layers
        (0, 0.17, ("head",)),
        (0, 0.1, ()),
    ],
)
def test_weights_that_are_too_many_stay_shared(least, part, layers, b, monkeypatch):
    monkeypatch.setattr(unshare, "LEAST", least)
    monkeypatch.setattr(unshare, "PART", part)
    graph = b.graph(*head(b, ["a", "b"]), *head(b, ["c", "d"], owner="other"))
    plan = unshared(graph, left=2 - len(layers))
    assert tuple(plan.unshared) == layers
    assert all("that would add 6 weights to a model that has 36" in r for r in reasons(plan))


def test_functions_that_share_a_layer_stay_so(b):
    """What one of them needs as it is, another cannot have otherwise."""
    graph = b.graph(*head(b, ["a", "b"]))
    nodes = list(graph.nodes)
    calls = [i for i, node in enumerate(nodes) if node.owner == "head"]
    nodes[calls[1]] = replace(nodes[calls[1]], function=1)
    assert not unshared(replace(graph, nodes=tuple(nodes)), left=1).unshared


def test_modes_that_fold_nothing_unshare_nothing(b):
    graph = b.graph(*head(b, ["a", "b"]))
    for mode, stride in (("depthwise", None), ("strided", 2), ("mbn", 2)):
        assert not make_plan(graph, mode, stride).unshared


def test_auto_has_the_same_to_choose_from(b):
    graph = b.graph(*head(b, ["a", "b"]))
    assert [plan.left for plan in candidates(graph).values()] == [0]
    assert len(candidates(keep_shared(graph))) > 1


# ------------------------------------------------------------------------- random graphs


# Of graphs in which layers are called twice, those in which calls get weights of their own.
SEEDS = (
    *(3008, 3014, 3015, 3019, 3020, 3024, 3039, 3044, 3071, 3074, 3079, 3082, 3091, 3100, 3162),
    *(3165, 3168, 3215, 3221, 3227, 3250, 3256, 3261, 3270, 3271, 3273, 3282, 3286, 3292, 3322),
)


@pytest.mark.parametrize("seed", SEEDS)
def test_random_graphs_give_what_they_gave(seed):
    graph = random_graph(seed, steps=18)
    plans = [plan_unsharing(graph, **options) for options in OPTIONS]
    assert any(plan.unshared for plan in plans)
    for options, plan in zip(OPTIONS, plans, strict=True):
        assert plan.left <= plan_fold(graph, **options).left
        check(graph, plan.left, exact=False, planned=plan_unsharing, **options)

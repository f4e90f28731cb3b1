"""The planner on neutral graphs, without a framework."""

import json

import numpy as np
import pytest

from mbn_rewrite.ir.channel_map import ChannelMap
from mbn_rewrite.ir.graph import (
    Affine,
    BatchNorm,
    Concat,
    Graph,
    HiddenBatchNorm,
    Input,
    Linear,
    Merge,
    MergeKind,
    Node,
    Opaque,
    Value,
)
from mbn_rewrite.ir.kernels import Kernel
from mbn_rewrite.ir.reasons import Obstacle, Reason
from mbn_rewrite.passes.planner import make_plan
from mbn_rewrite.passes.precision import bounds_out_of_range
from mbn_rewrite.passes.unshare import keep_shared
from mbn_rewrite.plans import Fold, Plan, Reclip, Remap, Remove

C = 3


class Wiring:
    """Builds graphs: each call adds a node and returns its value."""

    def __init__(self):
        self.nodes = []
        self.values = []

    def add(self, owner, op, *inputs, kind=None, dtype="float32", channels=C):
        self.values.append(Value((None, channels), "float32"))
        value = len(self.values) - 1
        self.nodes.append(Node(owner, kind or type(op).__name__, op, inputs, (value,), dtype))
        return value

    def source(self):
        return self.add("input", Input())

    def dense(self, owner, value, inputs=C, **kwargs):
        return self.add(owner, dense_op(inputs), value, kind="Dense", **kwargs)

    def norm(self, owner, value, scale=2.0, shift=1.0):
        return self.add(owner, norm_op(scale, shift), value, kind="BatchNormalization")

    def relu(self, owner, value):
        return self.add(owner, Opaque(), value, kind="ReLU")

    def graph(self, *outputs, weight=1.0, **kwargs):
        def read(owner, name):
            return np.full((C, C) if name == "kernel" else (C,), weight)

        return Graph(
            tuple(self.values), tuple(self.nodes), frozenset(outputs), read_weight=read, **kwargs
        )


def dense_op(inputs=C):
    return Linear((Kernel("kernel", (inputs, C), (0,), (1,)),), "bias", 1, 1)


def norm_op(scale=2.0, shift=1.0):
    return BatchNorm(ChannelMap(np.full(C, scale), np.full(C, shift), 1))


def actions(plan):
    return {d.name: d.action for d in plan.decisions}


@pytest.fixture
def w():
    return Wiring()


def test_norms_in_a_row_become_one_edit(w):
    y = w.dense("dense", w.source())
    y = w.norm("a", y, 2.0, 1.0)
    y = w.norm("b", y, 3.0, 5.0)
    plan = make_plan(w.graph(w.relu("relu", y)), "fold")
    assert plan.left == 0
    assert set(plan.of(Remove)) == {"a", "b"}
    np.testing.assert_array_equal(plan.of(Fold)["dense"].after.scale, [6.0] * C)
    np.testing.assert_array_equal(plan.of(Fold)["dense"].after.shift, [8.0] * C)


def test_backward_is_tried_before_forward(w):
    y = w.norm("bn", w.dense("before", w.source()))
    plan = make_plan(w.graph(w.dense("after", y)), "fold")
    assert plan.decisions[0].into == ("before",)


def test_a_branch_is_all_or_nothing(w):
    x = w.source()
    a, b = w.dense("a", x), w.relu("b", x)
    y = w.norm("bn", w.add("add", Merge(MergeKind.ADD), a, b))
    plan = make_plan(w.graph(w.relu("relu", y)), "fold")
    assert not plan.actions
    assert actions(plan) == {"bn": "kept"}


def test_only_one_branch_of_an_add_is_shifted(w):
    x = w.source()
    y = w.add("add", Merge(MergeKind.ADD), w.dense("a", x), w.dense("b", x), w.dense("c", x))
    plan = make_plan(w.graph(w.relu("relu", w.norm("bn", y))), "fold")
    assert set(plan.decisions[0].into) == {"a", "b", "c"}
    assert [plan.of(Fold)[name].after.has_shift for name in "abc"].count(True) == 1


def test_readers_of_a_removed_norm_count_for_the_next(w):
    y = w.norm("a", w.dense("dense", w.source()))
    z = w.norm("b", y)
    plan = make_plan(w.graph(w.relu("relu", z), w.relu("other", y)), "fold")
    assert actions(plan) == {"a": "folded", "b": "kept"}
    assert "Beside it, ReLU 'other' is no operation" in plan.decisions[1].reason


def test_output_of_a_removed_norm_is_an_output_still(w):
    y = w.norm("a", w.dense("dense", w.source()))
    plan = make_plan(w.graph(y, w.relu("relu", w.norm("b", y))), "fold")
    assert actions(plan) == {"a": "folded", "b": "kept"}
    assert "BatchNormalization 'a' is also an output of the model" in plan.decisions[1].reason


@pytest.mark.parametrize(
    ("names", "left"), [(("bn", "bn"), 0), (("bn0", "bn1"), 1)], ids=["shared", "different"]
)
def test_layer_called_twice_takes_the_norms_that_agree(names, left, w):
    ends = []
    for number, name in enumerate(names):
        y = w.dense("shared", w.relu(f"in{number}", w.source()))
        scale = 4.0 if name == "bn1" else 2.0
        ends.append(w.relu(f"out{number}", w.norm(name, y, scale)))
    plan = make_plan(keep_shared(w.graph(*ends)), "fold")
    assert plan.left == left
    # What stays makes up for what its layer does for the other.
    assert set(plan.of(Remap)) == {"bn1"} & set(names)


def test_value_may_be_read_twice_by_one_node(w):
    y = w.norm("bn", w.dense("dense", w.source()))
    twice = w.add("twice", Merge(MergeKind.ADD), y, y)
    plan = make_plan(w.graph(w.norm("other", twice)), "fold")
    assert actions(plan) == {"bn": "folded", "other": "folded"}
    # 2 (2 x + 1) and that twice, plus 1: each of the two has half of it.
    assert plan.of(Fold)["dense"].after.shift[0] == 2.5


def test_paths_that_meet_again_do_not_multiply(w):
    y = w.norm("bn", w.relu("relu", w.source()))
    for i in range(60):  # walked one by one, these would be 2 ** 60
        y = w.add(f"concat{i}", Concat(0), w.add(f"a{i}", Affine(), y), w.add(f"b{i}", Affine(), y))
    plan = make_plan(w.graph(w.dense("dense", y)), "fold")
    assert actions(plan) == {"bn": "folded"}
    assert plan.decisions[0].into == ("dense",)


def test_paths_that_meet_in_a_concatenation_take_a_part_each(w):
    y = w.norm("bn", w.relu("relu", w.source()), scale=np.arange(1.0, C + 1))
    y = w.add("concat", Concat(1), w.add("a", Affine(), y), w.add("b", Affine(), y), channels=2 * C)
    plan = make_plan(w.graph(w.dense("dense", y, inputs=2 * C)), "fold")
    assert plan.of(Fold)["dense"].before.scale.tolist() == [*range(1, C + 1)] * 2


def test_deeply_nested_merges_are_all_shared_in(w):
    x = w.source()
    y = w.dense("d0", x)
    for i in range(150):
        y = w.add(f"add{i}", Merge(MergeKind.ADD), y, w.dense(f"d{i + 1}", x))
    plan = make_plan(w.graph(w.relu("relu", w.norm("bn", y))), "fold")
    assert len(plan.decisions[0].into) == 151
    assert [fold.after.has_shift for fold in plan.of(Fold).values()].count(True) == 1


def test_long_chains_do_not_overrun_the_stack(w):
    y = w.dense("dense", w.source())
    for i in range(5000):
        y = w.add(f"dropout{i}", Affine(), y)
    plan = make_plan(w.graph(w.relu("relu", w.norm("bn", y))), "fold")
    assert actions(plan) == {"bn": "folded"}


@pytest.mark.parametrize(
    ("dtype", "scale", "shift", "why"),
    [
        ("float16", 1e6, 0.0, "more than float16 can hold"),
        ("float16", 1.0, 1e6, "more than float16 can hold"),
        ("float16", 1e-6, 0.0, "too small for float16"),
        ("float32", 1e39, 0.0, "more than float32 can hold"),
        ("bfloat16", 1e39, 0.0, "more than bfloat16 can hold"),
    ],
)
@pytest.mark.parametrize("mode", ["fold", "depthwise"])
def test_weights_out_of_range_are_declined(dtype, scale, shift, why, mode, w):
    y = w.dense("dense", w.source(), dtype=dtype)
    y = w.add("bn", norm_op(scale, shift), y, dtype=dtype)
    plan = make_plan(w.graph(w.relu("relu", y)), mode)
    assert why in plan.decisions[0].reason


def test_float32_kernel_that_would_overflow_is_declined(w):
    y = w.norm("bn", w.dense("dense", w.source()), scale=2.0**21)
    graph = w.graph(w.relu("relu", y), weight=1e35)
    assert "more than float32 can hold" in make_plan(graph, "fold").decisions[0].reason
    harmless = w.graph(w.relu("relu2", y))
    assert make_plan(harmless, "fold").left == 0


def test_hidden_norms_are_accounted_for(w):
    hidden = tuple(
        HiddenBatchNorm(f"block/bn{i}", "Block 'block'", op, rank, "float32")
        for i, (op, rank) in enumerate(
            [(norm_op(), 4), (norm_op(), None), (BatchNorm(None, Reason(Obstacle.COMPUTED)), 4)]
        )
    )
    graph = w.graph(w.relu("relu", w.source()), hidden=hidden)
    fold, depthwise = make_plan(graph, "fold"), make_plan(graph, "depthwise")
    assert fold.decisions[0].reason == ("Block 'block' holds it, and its calls cannot be seen.")
    assert [d.action for d in depthwise.decisions] == ["depthwise", "kept", "kept"]
    assert depthwise.decisions[2].reason == (
        "Its parameters or statistics are computed while the model runs."
    )


def test_plan_is_data(w):
    y = w.norm("bn", w.dense("dense", w.source()))
    graph = w.graph(w.relu("relu", y))
    plan = make_plan(graph, "fold")
    read = json.loads(plan.to_json())
    assert read["decisions"] == [
        {"name": "bn", "action": "folded", "into": ["dense"], "reason": ""}
    ]
    assert read["counts"] == {"folded": 1}
    assert [edit["layer"] for edit in read["edits"]] == ["dense"]
    assert make_plan(graph, "fold").to_json() == plan.to_json()
    assert "bn" in str(plan)
    assert "1 folded" in str(plan)


def edit_of(lower=None, upper=None):
    actions = {"relu": Reclip(lower, upper, 1)}
    (edit,) = Plan("fold", (), actions).to_dict()["edits"]
    return edit


def test_bounds_are_data():
    bounds, none = np.array([0.5, -np.inf]), np.full(2, np.inf)
    edit = edit_of(bounds)
    assert {**edit, "sha256": ""} == {
        **{"layer": "relu", "side": "bounds"},
        **{"channels": 2, "sha256": ""},
    }
    assert edit == edit_of(bounds, none)  # which says the same
    assert len({edit_of(*case)["sha256"] for case in [(bounds,), (-bounds,), (None, bounds)]}) == 3


@pytest.mark.parametrize(
    ("dtype", "lower", "upper", "why"),
    [
        ("float16", [0.0, -65504.0], None, ""),
        ("float16", [-np.inf, 1.0], [2.0, np.inf], ""),
        ("float16", [0.0, 1e5], None, "its bounds reach 1e+05, more than float16 can hold"),
        ("float16", None, [-1e5, 1.0], "its bounds reach 1e+05, more than float16 can hold"),
        ("float32", [0.0, 1e5], None, ""),
        ("bfloat16", [0.0, 1e39], None, "its bounds reach 1e+39, more than bfloat16 can hold"),
        ("float32", [0.0, np.inf], None, "its bounds are not finite"),
        ("float32", None, [-np.inf, np.inf], "its bounds are not finite"),
        ("float32", [np.nan, 0.0], None, "its bounds are not finite"),
    ],
)
def test_bounds_out_of_range(dtype, lower, upper, why):
    sides = (None if side is None else np.array(side) for side in (lower, upper))
    assert bounds_out_of_range(Reclip(*sides, 1), dtype) == why


def test_nothing_to_do_is_said(w):
    plan = make_plan(w.graph(w.dense("dense", w.source())), "fold")
    assert str(plan) == "mode fold: nothing to do: the model has no BatchNormalization"

"""Parallel branches on neutral graphs: which sums become one layer, and with which weights."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mbn_rewrite.ir import layouts
from mbn_rewrite.ir.channel_map import ChannelMap
from mbn_rewrite.ir.graph import (
    Activation,
    Affine,
    BatchNorm,
    Graph,
    Input,
    Linear,
    Merge,
    MergeKind,
    Monotone,
    Node,
    Opaque,
    Reshape,
    Value,
    ZeroPadding,
)
from mbn_rewrite.ir.kernels import Window
from mbn_rewrite.ir.reasons import Obstacle, Reason
from mbn_rewrite.passes.merge import merge_branches
from mbn_rewrite.passes.planner import candidates, make_plan
from mbn_rewrite.plans import Fold, Remove

C = 4
SIZE = 8


class Wiring:
    """Builds graphs of images: each call adds a node and returns its value."""

    def __init__(self):
        self.nodes = []
        self.values = []
        self.weights = {}
        self.rng = np.random.default_rng(3)

    def add(self, owner, op, *inputs, kind=None, shape=None, dtype="float32", **of_node):
        shape = shape or (self.values[inputs[0]].shape if inputs else (None, SIZE, SIZE, C))
        self.values.append(Value(shape, dtype))
        value = len(self.values) - 1
        kind = kind or type(op).__name__
        self.nodes.append(Node(owner, kind, op, inputs, (value,), **of_node))
        return value

    def _numbers(self, shape):
        return self.rng.integers(-3, 4, shape).astype(np.float64)

    def source(self, **how):
        return self.add(f"input{len(self.nodes)}", Input(), **how)

    def conv(self, owner, value, size=3, *, stride=1, dilation=1, padding="same", groups=1,
             bias=False, filters=C, **how):  # fmt: skip
        kernel = layouts.conv("kernel", (size, size, C // groups, filters), groups)
        return self.linear(owner, value, kernel, size, stride, dilation, padding, bias, **how)

    def depthwise(self, owner, value, size=3, **how):
        kernel = layouts.depthwise("kernel", (size, size, C, 1))
        return self.linear(owner, value, kernel, size, 1, 1, "same", False, **how)

    def linear(self, owner, value, kernel, size, stride, dilation, padding, bias,
               activation=Activation.LINEAR, **how):  # fmt: skip
        window = Window(size, stride, dilation, padding)
        shape = self.values[value].shape
        sizes = [n if n is None else len(window.reads(n)) for n in shape[1:3]]
        pads = any(window.pads(n) for n in shape[1:3])
        op = Linear((kernel,), "bias" if bias else None, 3, 3, pads, activation, (window, window))
        self.weights[owner, "kernel"] = self._numbers(kernel.view)
        self.weights[owner, "bias"] = self._numbers(kernel.out_channels)
        how.setdefault("shape", (None, *sizes, kernel.out_channels))
        return self.add(owner, op, value, kind="Conv2D", **how)

    def norm(self, owner, value, scale=2.0, shift=1.0, **op):
        m = ChannelMap(np.full(C, scale), np.full(C, shift), 3)
        return self.add(owner, BatchNorm(m, **op), value, kind="BatchNormalization")

    def sum(self, *values, owner="add", kind=MergeKind.ADD, **how):
        return self.add(owner, Merge(kind), *values, kind="Add", **how)

    def relu(self, value, owner="relu"):
        return self.add(owner, Opaque(), value, kind="ReLU")

    def graph(self, *outputs):
        read = self.weights.__getitem__
        return Graph(
            tuple(self.values), tuple(self.nodes), frozenset(outputs),
            read_weight=lambda owner, name: read((owner, name)),
        )  # fmt: skip

    def merged(self, *outputs):
        """What stands for what once branches are merged."""
        return make_plan(self.graph(*outputs), "fold").merged


@pytest.fixture
def w():
    return Wiring()


def repvgg(w, x, name="", **how):
    """The branches of a RepVGG block."""
    return [
        w.norm(f"{name}bn3", w.conv(f"{name}conv3", x, 3, **how)),
        w.norm(f"{name}bn1", w.conv(f"{name}conv1", x, 1, **how)),
        w.norm(f"{name}bn0", x, 3.0, 5.0),
    ]


# --------------------------------------------------------------------------- what is decided


def test_a_block_becomes_its_widest_convolution(w):
    x = w.source()
    graph = w.graph(w.relu(w.sum(*repvgg(w, x)[::-1])))
    plan = make_plan(graph, "fold")
    assert plan.left == 0
    assert plan.merged == {"conv3": ("conv1", "add")}
    assert {d.name: d.into for d in plan.decisions} == dict.fromkeys(
        ("bn3", "bn1", "bn0"), ("conv3",)
    )
    assert plan.actions["add"] == Remove(2)  # the branch of the widest was the third
    assert plan.actions["conv1"] == Remove()
    assert set(plan.of(Fold)) == {"conv3"}


def test_weights_are_those_of_the_sum(w):
    x = w.source()
    graph = w.graph(w.relu(w.sum(*repvgg(w, x), x)))
    merged = merge_branches(graph).graph
    expected = 2.0 * w.weights["conv3", "kernel"]
    expected[1, 1] += 2.0 * w.weights["conv1", "kernel"][0, 0] + (3.0 + 1.0) * np.eye(C)
    np.testing.assert_array_equal(merged.read_weight("conv3", "kernel"), expected)
    np.testing.assert_array_equal(merged.read_weight("conv3", "bias"), np.full(C, 1 + 1 + 5.0))


def test_what_is_left_of_the_graph(w):
    x = w.source()
    y = w.sum(*repvgg(w, x))
    graph = w.graph(w.relu(y))
    merged = merge_branches(graph).graph
    assert [node.owner for node in merged.nodes] == ["input0", "conv3", "relu"]
    assert merged.nodes[1].inputs == (x,)
    assert merged.nodes[1].outputs == (y,)


def test_a_norm_after_the_sum_folds_too(w):
    x = w.source()
    plan = make_plan(w.graph(w.relu(w.norm("bn", w.sum(*repvgg(w, x))))), "fold")
    assert plan.left == 0
    assert [d.name for d in plan.decisions] == ["bn3", "bn1", "bn0", "bn"]  # the model's order
    fold = plan.of(Fold)["conv3"]
    assert fold.sums is not None
    np.testing.assert_array_equal(fold.after.scale, [2.0] * C)


def test_a_norm_before_the_branches_folds_forward(w):
    x = w.norm("bn", w.relu(w.source()))
    y = w.sum(w.conv("wide", x, 3, padding=(0, 0)), w.conv("other", x, 3, padding=(0, 0)))
    plan = make_plan(w.graph(w.relu(y, "end")), "fold")
    assert plan.left == 0
    assert plan.of(Fold)["wide"].before is not None


def test_no_bias_without_need(w):
    x = w.source()
    graph = w.graph(w.relu(w.sum(w.conv("a", x), w.conv("b", x, 1))))
    assert make_plan(graph, "fold").actions["a"].op.bias is None


def test_a_model_without_norms_is_merged_and_says_so(w):
    x = w.source()
    plan = make_plan(w.graph(w.relu(w.sum(w.conv("a", x), x))), "fold")
    assert plan.summary == (
        "mode fold: the model has no BatchNormalization; 1 sum of parallel branches merged"
    )


def test_other_modes_do_not_merge(w):
    graph = w.graph(w.relu(w.sum(*repvgg(w, w.source()))))
    assert not make_plan(graph, "depthwise").merged
    assert not make_plan(graph, "strided", 2).merged
    assert all(plan.merged for plan in candidates(graph).values())


def test_sums_within_sums(w):
    x = w.source()
    inner = w.norm("bn", w.sum(w.conv("a", x, 1), x, owner="inner"), 3.0, 7.0)
    graph = w.graph(w.relu(w.sum(inner, w.conv("b", x, 3), owner="outer")))
    assert make_plan(graph, "fold").merged == {"b": ("a", "inner", "outer")}
    merged = merge_branches(graph)
    expected = w.weights["b", "kernel"].copy()
    expected[1, 1] += 3.0 * (w.weights["a", "kernel"][0, 0] + np.eye(C))
    np.testing.assert_array_equal(merged.graph.read_weight("b", "kernel"), expected)
    np.testing.assert_array_equal(merged.graph.read_weight("b", "bias"), np.full(C, 7.0))
    assert merged.decisions["bn"].into == ("b",)


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_a_block_behind_a_norm_as_a_branch(shift, w):
    x = w.source()
    y = w.norm("bn", x, 3.0, shift)
    inner = w.sum(w.conv("a", y, 1), y, owner="inner")  # whose value "bn" gives
    graph = w.graph(w.relu(w.sum(inner, w.conv("b", x, 3), owner="outer")))
    merged = merge_branches(graph)
    assert merged.decisions["bn"].into == ("b",)
    expected = w.weights["b", "kernel"].copy()
    expected[1, 1] += 3.0 * (w.weights["a", "kernel"][0, 0] + np.eye(C))
    np.testing.assert_array_equal(merged.graph.read_weight("b", "kernel"), expected)
    constant = shift * (w.weights["a", "kernel"].sum(axis=(0, 1, 2)) + 1)
    added = merged.graph.read_weight("b", "bias") if shift else np.zeros(C)
    np.testing.assert_array_equal(added, constant)
    assert make_plan(graph, "fold").merged == {"b": ("a", "inner", "outer")}


def test_a_long_sum_of_pairs(w):
    x = w.source()
    y = x
    for number in range(150):
        y = w.sum(y, w.conv(f"conv{number}", x, 1), owner=f"add{number}")
    (layer,) = make_plan(w.graph(w.relu(y)), "fold").merged
    assert layer == "conv0"


@pytest.mark.parametrize(
    ("kind", "factors"),
    [(MergeKind.SUBTRACT, (1.0, -1.0)), (MergeKind.AVERAGE, (0.5, 0.5))],
    ids=["subtract", "average"],
)
def test_weighted_sums(kind, factors, w):
    x = w.source()
    y = w.sum(w.conv("a", x, bias=True), w.conv("b", x, bias=True), kind=kind)
    merged = merge_branches(w.graph(w.relu(y))).graph
    for name in ("kernel", "bias"):
        expected = sum(f * w.weights[o, name] for f, o in zip(factors, "ab", strict=True))
        np.testing.assert_array_equal(merged.read_weight("a", name), expected)


def test_the_plan_tells_what_goes(w):
    x = w.source()
    plan = make_plan(w.graph(w.relu(w.sum(*repvgg(w, x)))), "fold")
    (edit,) = json.loads(plan.to_json())["edits"]
    assert (edit["layer"], edit["side"], edit["channels"]) == ("conv3", "merged", C)
    assert edit["stands_for"] == ["conv1", "add"]
    rows = [line.split() for line in str(plan).splitlines()]
    assert ["conv3", "conv1,", "add"] in rows
    assert "conv1, add" in plan._repr_html_()
    assert plan.summary.endswith("3 folded; 1 sum of parallel branches merged")


def test_many_merges_are_counted_and_named_on_demand(w):
    y = w.source()
    for number in range(40):
        y = w.sum(w.conv(f"wide{number}_", y), y, owner=f"add{number}_")
        y = w.relu(y, f"relu{number}_")
    plan = make_plan(w.graph(y), "fold")
    assert "37 more" in str(plan)
    assert "wide20_" not in str(plan)
    assert "wide20_" in plan.table(full=True)
    assert "wide20_" in plan._repr_html_()


def test_another_sum_has_another_checksum(w):
    x = w.source()
    y = w.sum(w.norm("bn", w.conv("a", x)), x)
    made = [make_plan(w.graph(w.relu(y, f"relu{n}")), "fold") for n in range(2)]
    other = Wiring()
    x = other.source()
    y = other.sum(other.norm("bn", other.conv("a", x), 3.0), x)
    made.append(make_plan(other.graph(other.relu(y)), "fold"))
    sums = [plan.to_dict()["edits"][0]["sha256"] for plan in made]
    assert sums[0] == sums[1] != sums[2]


# ---------------------------------------------------------------------- which branches line up


def zeros(w, x, before=1, after=1, owner="zeros", known=True, channels=0):
    """A value with zeros around its positions."""
    around = (before, after)
    amounts = ((0, 0), around, around, (0, channels))
    size = SIZE + before + after
    op = ZeroPadding(3, 3, amounts=amounts if known else ())
    return w.add(owner, op, x, shape=(None, size, size, C))


def of_zeros(w, x, *convolutions, **how):
    """Convolutions, each given by its owner and size, of a value with zeros around it."""
    value = zeros(w, x, **how)
    return [w.conv(owner, value, size, padding=(0, 0)) for owner, size in convolutions]


MERGE = {
    "zeros_first": lambda w, x: (
        *of_zeros(w, x, ("a", 3)), w.conv("b", x, 1), w.norm("bn", w.conv("c", x)), x),
    "zeros_first_for_several": lambda w, x: (
        *of_zeros(w, x, ("a", 3), ("b", 3)), w.conv("c", x, 1)),
    "zeros_on_one_side": lambda w, x: (*of_zeros(w, x, ("a", 3), before=2, after=0), x),
    "zeros_for_all": lambda w, x: of_zeros(w, x, ("a", 3), ("b", 3)),
    "zeros_first_strided": lambda w, x: (
        w.conv("a", zeros(w, x), 3, stride=2, padding=(0, 0)),
        w.conv("b", x, 1, stride=2, padding=(0, 0))),
    "strided": lambda w, x: (w.conv("a", x, 3, stride=2), w.conv("b", x, 1, stride=2)),
    "valid": lambda w, x: (w.conv("a", x, 3, padding=(0, 0)), w.conv("b", x, 3, padding=(0, 0))),
    "padded_alike": lambda w, x: (w.conv("a", x, 3), w.conv("b", x, 1, padding=(0, 0))),
    "dilated_alike": lambda w, x: (w.conv("a", x, 3, dilation=2), w.conv("b", x, 3, dilation=2)),
    "dilated_within": lambda w, x: (w.conv("a", x, 5), w.conv("b", x, 3, dilation=2)),
    "even": lambda w, x: (w.conv("a", x, 4), w.conv("b", x, 1)),
    "groups": lambda w, x: (w.conv("a", x, 3, groups=2), w.conv("b", x, 1, groups=2), x),
    "depthwise": lambda w, x: (w.depthwise("a", x), w.norm("bn", x), w.depthwise("b", x, 1)),
    "norm_first": lambda w, x: (w.conv("a", x), w.conv("b", w.norm("bn", x), 1)),
    "bare_norm_first": lambda w, x: (w.conv("a", x), w.conv("b", w.norm("bn", x, shift=0.0))),
    "dropout": lambda w, x: (w.conv("a", x), w.add("drop", Affine(), w.conv("b", x))),
    "twice_itself": lambda w, x: (w.conv("a", x), x, x),
    "two_norms": lambda w, x: (w.conv("a", x), w.norm("bn", w.norm("first", x))),
}  # fmt: skip


@pytest.mark.parametrize("name", MERGE)
def test_merges(name, w):
    y = w.sum(*MERGE[name](w, w.source()))
    plan = make_plan(w.graph(w.relu(y)), "fold")
    assert set(plan.merged) == {"a"}
    assert plan.left == 0


def held(w, x):
    value = w.conv("a", x)
    w.nodes[-1] = Node(*(getattr(w.nodes[-1], f) for f in (
        "owner", "kind", "op", "inputs", "outputs", "dtype")), held=True)  # fmt: skip
    return value, x


def masked(w, x):
    w.values[x] = Value(w.values[x].shape, "float32", masked=True)
    return w.conv("a", x), x


KEEP = {
    "zeros_unknown": lambda w, x: (*of_zeros(w, x, ("a", 3), known=False), x),
    "zeros_of_two_kinds": lambda w, x: (
        *of_zeros(w, x, ("a", 3)), *of_zeros(w, x, ("b", 3), before=2, after=0, owner="others")),
    "zeros_on_channels": lambda w, x: (*of_zeros(w, x, ("a", 3), channels=1), x),
    "zeros_around_the_narrower": lambda w, x: (*of_zeros(w, x, ("a", 3)), w.conv("b", x, 5)),
    "zeros_around_another": lambda w, x: (*of_zeros(w, w.source(), ("a", 3)), x),
    "zeros_behind_a_norm": lambda w, x: (
        *of_zeros(w, w.norm("bn", x), ("a", 3)), w.conv("b", x)),
    "strides": lambda w, x: (w.conv("a", x, 3, padding=(1, 1)),
                             w.conv("b", x, 1, stride=2, shape=w.values[x].shape)),
    "dilation": lambda w, x: (w.conv("a", x, 3), w.conv("b", x, 3, dilation=2)),
    "padding": lambda w, x: (w.conv("a", x, 4), w.conv("b", x, 4, padding=(2, 1))),
    "groups": lambda w, x: (w.conv("a", x), w.conv("b", x, groups=2)),
    "depthwise": lambda w, x: (w.depthwise("a", x), w.conv("b", x, 1)),
    "activation": lambda w, x: (w.conv("a", x), w.relu(w.conv("b", x), "between")),
    "fused_activation": lambda w, x: (
        w.conv("a", x), w.conv("b", x, activation=Activation.HOMOGENEOUS)),
    "pool": lambda w, x: (w.conv("a", x), w.add("pool", Monotone(3, 3), x)),
    "average_pool": lambda w, x: (w.conv("a", x), w.add("pool", Affine(3, 3), x)),
    "in_a_row": lambda w, x: (w.conv("a", x), w.conv("c", w.conv("b", x, 1))),
    "shift_into_padding": lambda w, x: (w.conv("a", x), w.conv("b", w.norm("bn", x))),
    "other_source": lambda w, x: (w.conv("a", x), w.conv("b", w.source())),
    "no_convolution": lambda w, x: (x, w.norm("bn", x)),
    "fewer_outputs": lambda w, x: (w.conv("a", x, padding=(0, 0), shape=w.values[x].shape), x),
    "narrow": lambda w, x: (w.conv("a", x, node_dtype="float16"), w.conv("b", x)),
    "cast": lambda w, x: (w.conv("a", x), w.add("cast", Affine(), x, dtype="float16")),
    "held_elsewhere": held,
    "masked": masked,
    "norm_that_stays": lambda w, x: (
        w.conv("a", x), w.norm("bn", x, reason=Reason(Obstacle.MASKED))),
    "norm_not_finite": lambda w, x: (w.conv("a", x), w.norm("bn", x, np.nan)),
    "overflow": lambda w, x: (w.conv("a", x), w.norm("bn", x, 1e39)),
}  # fmt: skip


@pytest.mark.parametrize("name", KEEP)
def test_keeps(name, w):
    add = w.add

    def typed(owner, op, *inputs, node_dtype=None, **how):
        if node_dtype:
            how.setdefault("dtype", "float32")
        value = add(owner, op, *inputs, **how)
        if node_dtype:
            node = w.nodes[-1]
            w.nodes[-1] = Node(node.owner, node.kind, op, inputs, node.outputs, node_dtype)
        return value

    w.add = typed
    assert not w.merged(w.relu(w.sum(*KEEP[name](w, w.source()))))


def test_sizes_that_are_open(w):
    """Where a stride's windows begin depends on whether the size is even."""
    x = w.source(shape=(None, None, None, C))
    sizes = (None, None, None, C)
    y = w.sum(w.conv("a", x, 3, stride=2, shape=sizes), w.conv("b", x, 1, stride=2, shape=sizes))
    assert not w.merged(w.relu(y))
    z = w.source(shape=sizes)
    y = w.sum(w.conv("c", z, 3, shape=sizes), w.conv("d", z, 1, shape=sizes), z, owner="other")
    assert set(w.merged(w.relu(y, "end"))) == {"c"}


def test_what_others_read_is_kept(w):
    x = w.source()
    a, b = w.conv("a", x), w.conv("b", x, 1)
    assert not w.merged(w.relu(w.sum(a, b)), b)  # an output of the model
    w.relu(b, "other")
    assert not w.merged(w.relu(w.sum(a, b, owner="again")))


def test_an_output_is_an_output_still(w):
    x = w.source()
    y = w.sum(w.conv("a", x), x)
    plan = make_plan(w.graph(y), "fold")
    assert set(plan.merged) == {"a"}
    merged = merge_branches(w.graph(y)).graph
    assert merged.outputs == {y}
    assert merged.nodes[-1].outputs == (y,)


def test_a_sum_that_repeats_an_input_is_kept(w):
    x = w.source(shape=(None, SIZE, SIZE, 1))
    kernel = layouts.depthwise("kernel", (3, 3, 1, C))
    y = w.linear("a", x, kernel, 3, 1, 1, "same", False)
    assert not w.merged(w.relu(w.sum(y, x, shape=(None, SIZE, SIZE, C))))


# ----------------------------------------------------------------- layers with several calls


def shared_block(w, number, wide=3, extra=False):
    x = w.relu(w.source(), f"before{number}")
    y = w.sum(w.conv("a", x, wide), w.norm("bn", w.conv("b", x, 1)), owner=f"add{number}")
    return w.relu(w.sum(y, x, owner="more") if extra else y, f"after{number}")


def test_all_calls_in_sums_that_are_alike(w):
    ends = [shared_block(w, number) for number in range(3)]
    assert w.merged(*ends) == {"a": ("b", "add0", "add1", "add2")}


def test_calls_in_other_sums(w):
    ends = [shared_block(w, 0), shared_block(w, 1, extra=True)]
    # The sums of pairs are alike; what is added to one of them is not.
    assert w.merged(*ends) == {"a": ("b", "add0", "add1")}
    lone = w.relu(w.conv("b", w.source(), 1), "lone")
    assert not w.merged(*ends, lone)


def test_a_layer_on_two_branches(w):
    x = w.source()
    assert not w.merged(w.relu(w.sum(w.conv("a", x), w.conv("a", x))))


# ----------------------------------------------------------------------- reshapes on the way


@pytest.mark.parametrize("axis_moves", [True, False], ids=["lost_again", "stays"])
def test_a_line_as_an_image_of_one_row(axis_moves, w):
    """As graphs of TensorFlow do convolutions along one axis."""
    line, row = (None, SIZE, C), (None, 1, SIZE, C)
    x = w.source(shape=line)
    branches = []
    for name, size in (("wide", 3), ("narrow", 1)):
        y = w.add(f"expand_{name}", Reshape(), x, shape=row)
        y = w.conv(name, y, size)
        branches.append(w.add(f"squeeze_{name}", Reshape(), y, shape=line))
    m = ChannelMap(np.full(C, 2.0), np.zeros(C), 2 if axis_moves else 1)
    branches.append(w.add("bn", BatchNorm(m), x, kind="BatchNormalization"))
    merged = w.merged(w.relu(w.sum(*branches)))
    if axis_moves:
        assert merged == {"wide": ("expand_narrow", "narrow", "squeeze_narrow", "add")}
    else:
        assert not merged


# ------------------------------------------------------------------------------------ windows

WINDOWS = st.builds(
    Window,
    st.integers(1, 5),
    st.integers(1, 3),
    st.integers(1, 3),
    st.one_of(st.just("same"), st.tuples(st.integers(0, 3), st.integers(0, 3))),
)


def positions_read(window, positions):
    """The positions that each output reads, far beyond both ends too."""
    reach = (window.size - 1) * window.dilation + 1
    if window.padding == "same":
        outputs = -(-positions // window.stride)
        before = max((outputs - 1) * window.stride + reach - positions, 0) // 2
    else:
        before = window.padding[0]
        outputs = max((positions + sum(window.padding) - reach) // window.stride + 1, 0)
    taps = range(window.size)
    return [
        [i * window.stride - before + j * window.dilation for j in taps] for i in range(outputs)
    ]


@given(WINDOWS, WINDOWS, st.integers(5, 20))
def test_places_are_where_both_read(window, wider, positions):
    places = window.places_in(wider, positions)
    own, other = positions_read(window, positions), positions_read(wider, positions)
    if places is not None:
        assert own == [[row[place] for place in places] for row in other]
    elif window.stride == wider.stride and len(own) == len(other) > 0:
        assert not set(own[0]) <= set(other[0])


@given(WINDOWS, WINDOWS, st.integers(20, 40))
def test_places_of_open_sizes_hold_for_every_size(window, wider, positions):
    places = window.places_in(wider, None)
    if places is not None:
        assert window.places_in(wider, positions) == places

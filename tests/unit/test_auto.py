"""Mode "auto": which plans there are, which is taken, and that what is taken is exact."""

import json
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import tensorflow as tf

import mbn_rewrite as mbn
from mbn_rewrite.errors import RewriteError
from mbn_rewrite.frontends.in_memory import ModelInMemory
from mbn_rewrite.frontends.registry import front_end_of, open_source
from mbn_rewrite.frontends.saved_model.function_graph import op_counts
from mbn_rewrite.ir.graph import BatchNorm, Clip, Opaque
from mbn_rewrite.ir.reasons import Obstacle, Reason
from mbn_rewrite.options import Options, RunConfig, checked_options
from mbn_rewrite.passes.planner import FOLDED, candidates, groups, mixed
from mbn_rewrite.plans import Fold, Reclip
from mbn_rewrite.tuning import trial
from mbn_rewrite.tuning.auto import choose, plan_for
from mbn_rewrite.tuning.trial import INPUT
from tests.support.checks import check_saved_rewrites
from tests.support.kerases import K, Model, norms
from tests.unit.test_planner import Wiring, norm_op


def unfoldable(fusible=False):
    """A graph with one BatchNormalization that folds, and one that does not."""
    wiring = Wiring()
    x = wiring.norm("easy", wiring.dense("dense", wiring.source()))
    x = wiring.relu("relu", x)
    op = norm_op(2.0, 1.0)
    op = BatchNorm(op.map, axis=op.axis, fusible=fusible)
    x = wiring.add("hard", op, x, kind="BatchNormalization")
    return wiring.graph(wiring.relu("relu_2", x))


# ------------------------------------------------------------------------------ the plans


def test_plans_of_a_graph_that_folds_are_one():
    wiring = Wiring()
    graph = wiring.graph(wiring.norm("bn", wiring.dense("dense", wiring.source())))
    assert list(candidates(graph)) == [FOLDED]


@pytest.mark.parametrize("fusible", [True, False])
def test_plans_differ_in_what_does_not_fold(fusible):
    plans = candidates(unfoldable(fusible))
    forms = [FOLDED, *(["fused"] if fusible else []), "scale_and_shift"]
    assert list(plans) == forms  # rank 2 has no depthwise convolution
    for form, plan in plans.items():
        easy, hard = plan.decisions
        assert (easy.action, easy.into) == ("folded", ("dense",))
        assert hard.action == ("kept" if form == FOLDED else form)
        assert "ReLU 'relu'" in hard.reason
        assert plan.mode == "auto"
        assert set(plan.of(Fold)) == {"dense"}
    assert plans["scale_and_shift"].left == 0


def test_there_is_no_depthwise_plan_where_there_is_no_such_convolution():
    """Two that are built alike would be measured twice."""
    wiring = Wiring()
    x = wiring.source()
    for name, convolvable in (("a", True), ("b", False)):
        op = BatchNorm(norm_op(2.0, 1.0).map, axis=1, convolvable=convolvable)
        x = wiring.add(name, op, wiring.relu(f"{name}_relu", x))
    graph = wiring.graph(wiring.relu("last", x))
    actions = [decision.action for decision in candidates(graph)["depthwise"].decisions]
    assert actions == ["depthwise", "scale_and_shift"]


def test_what_must_stay_stays_in_every_plan():
    wiring = Wiring()
    x = wiring.relu("relu", wiring.source())
    x = wiring.add("bn", BatchNorm(None, Reason(Obstacle.TRAINING_CALL)), x)
    assert list(candidates(wiring.graph(wiring.add("last", Opaque(), x)))) == [FOLDED]


# ----------------------------------------------------------------------------- the choice


def chosen(monkeypatch, times, graph=None, options=None, failing=()):
    """The plan that is taken if calls of each form take these times."""
    taken = {name: iter(values) for name, values in times.items()}

    def time_interleaved(runs, deadline, stays=()):
        assert set(stays) == {INPUT, FOLDED}
        return {name: list(taken[name]) for name in runs}

    monkeypatch.setattr(trial, "time_interleaved", time_interleaved)

    def runner(plan):
        actions = [] if plan is None else [decision.action for decision in plan.decisions]
        if set(actions) & set(failing) or (plan is None and INPUT in failing):
            raise RewriteError("it cannot be run")
        return nullcontext(lambda: None)

    return choose(graph or unfoldable(), runner, "a device", options or Options())


def test_a_faster_form_is_taken(monkeypatch):
    times = {INPUT: [3.0] * 9, FOLDED: [2.0] * 9, "scale_and_shift": [1.0] * 9}
    plan = chosen(monkeypatch, times)
    assert plan.counts == {"folded": 1, "scale_and_shift": 1}
    assert plan.measurement.chosen == "scale_and_shift"
    assert plan.measurement.timings[0].form == INPUT
    assert plan.measurement.timings[2].speed_up.median == 3.0
    report = json.loads(plan.to_json())
    assert report["measurement"]["chosen"] == "scale_and_shift"
    assert "times as fast" in str(plan)


def test_within_noise_the_folded_model_is_taken(monkeypatch):
    noisy = [1.9, 2.2, 1.8, 2.1, 1.9, 2.2, 1.8, 2.1, 1.9]
    times = {INPUT: [3.0] * 9, FOLDED: [2.0] * 9, "scale_and_shift": noisy}
    plan = chosen(monkeypatch, times)
    assert plan.measurement.chosen == FOLDED
    assert plan.counts == {"folded": 1, "kept": 1}


def test_the_input_is_taken_where_it_is_fastest(monkeypatch):
    times = {INPUT: [1.0] * 9, FOLDED: [2.0] * 9, "scale_and_shift": [3.0] * 9}
    plan = chosen(monkeypatch, times)
    assert plan.measurement.chosen == INPUT
    assert plan.counts == {"kept": 2}
    assert all(decision.reason for decision in plan.decisions)
    assert not plan.actions


def test_too_few_rounds_decide_nothing(monkeypatch):
    times = {INPUT: [3.0] * 5, FOLDED: [2.0] * 5, "scale_and_shift": [1.0] * 5}
    plan = chosen(monkeypatch, times)
    assert plan.measurement.chosen == FOLDED
    assert "too few rounds" in plan.measurement.why


def test_a_form_that_cannot_be_run_is_said(monkeypatch):
    times = {INPUT: [3.0] * 9, FOLDED: [2.0] * 9}
    plan = chosen(monkeypatch, times, failing=["scale_and_shift"])
    assert plan.measurement.chosen == FOLDED
    assert plan.measurement.timings[-1].note == "not measured: it cannot be run"


def failing_after(calls, error):
    """A run that fails at some call."""
    numbers = iter(range(10**6))

    def run():
        if next(numbers) >= calls:
            raise error

    return run


def test_a_device_that_is_gone_half_way_costs_no_model():
    def runner(plan):
        return nullcontext(failing_after(9, RewriteError("the device is gone")))

    plan = choose(unfoldable(), runner, "a device", Options())
    assert plan.measurement.chosen == FOLDED
    assert plan.measurement.timings[0].note == "not measured: the device is gone"


def test_a_form_that_fails_half_way_costs_the_others_nothing():
    def runner(plan):
        last = plan is not None and plan.counts.get("scale_and_shift")
        error = tf.errors.ResourceExhaustedError(None, None, "Graph execution error:\n\nOOM when")
        return nullcontext(failing_after(9, error) if last else lambda: None)

    measurement = choose(unfoldable(), runner, "a device", Options()).measurement
    assert "nothing was compared" not in measurement.why
    assert [bool(timing.seconds) for timing in measurement.timings] == [True, True, False]
    assert measurement.timings[-1].note == "not measured: out of memory"


def test_memory_that_ends_while_a_form_is_built_costs_no_model(monkeypatch):
    def runner(plan):
        if plan is not None and plan.counts.get("scale_and_shift"):
            raise tf.errors.ResourceExhaustedError(None, None, "OOM when allocating")
        return nullcontext(lambda: None)

    monkeypatch.setattr(
        trial, "time_interleaved", lambda runs, *_, **__: dict.fromkeys(runs, [1.0] * 9)
    )
    measurement = choose(unfoldable(), runner, "a device", Options()).measurement
    assert measurement.timings[-1].note == "not measured: out of memory"


def test_where_the_input_cannot_be_run_nothing_else_is_built():
    built = []

    def runner(plan):
        built.append(plan)
        raise RewriteError("no inputs can be made up")

    measurement = choose(unfoldable(), runner, "a device", Options()).measurement
    assert built == [None]
    assert measurement.timings[-1].note == "not tried: there is nothing to compare it with"


def test_forms_that_the_budget_leaves_no_rounds_for_are_said(monkeypatch):
    times = {INPUT: [3.0] * 9, FOLDED: [2.0] * 9, "scale_and_shift": []}
    plan = chosen(monkeypatch, times)
    assert plan.measurement.chosen == FOLDED
    assert plan.measurement.timings[-1].note == "not tried: the budget of 60 seconds was used up"


def test_where_the_input_cannot_be_run_nothing_is_compared(monkeypatch):
    plan = chosen(monkeypatch, {}, failing=[INPUT])
    assert plan.measurement.chosen == FOLDED
    assert "nothing was compared" in plan.measurement.why


def test_forms_are_left_out_when_the_budget_is_used_up(monkeypatch):
    times = {INPUT: [3.0] * 9, FOLDED: [2.0] * 9}
    plan = chosen(monkeypatch, times, options=Options(budget=1e-9))
    assert "budget" in plan.measurement.timings[-1].note


# --------------------------------------------------------------------------- forms by group


def of_sizes(*sizes):
    """A graph in which BatchNormalizations that do not fold read so many positions."""
    wiring = Wiring()
    x = wiring.relu("first", wiring.source())
    for number, size in enumerate(sizes):
        op = BatchNorm(norm_op(2.0, 1.0).map, axis=1, fusible=True)
        bn = wiring.add(f"bn{number}", op, x, kind="BatchNormalization")
        wiring.values[x] = replace(
            wiring.values[x], shape=(None, *wiring.values[x].shape[1:], size)
        )
        x = wiring.relu(f"relu{number}", bn)
    return wiring.graph(x)


def test_sites_are_grouped_by_the_size_of_what_they_read():
    graph = of_sizes(16, 16, 64, 4, 4, None)
    found = groups(graph, candidates(graph)[FOLDED])
    assert {name: sorted(sites) for name, sites in found.items()} == {
        "large": ["bn0", "bn1", "bn2"],  # those of one size stay together
        "medium": ["bn3", "bn4"],
        "small": ["bn5"],
    }
    alike = of_sizes(8, 8, 8)
    assert list(groups(alike, candidates(alike)[FOLDED])) == ["large"]


def test_every_site_has_the_form_that_it_is_given():
    graph = of_sizes(16, 8, 4)
    plan = mixed(
        graph, candidates(graph)[FOLDED], {"bn0": "fused", "bn1": "scale_and_shift", "bn2": FOLDED}
    )
    assert [d.action for d in plan.decisions] == ["fused", "scale_and_shift", "kept"]
    assert plan.mode == "auto"


def two_clips():
    """Two places at each of which a BatchNormalization goes if a ReLU takes on bounds."""
    wiring = Wiring()
    x = wiring.source()
    for name in "ab":
        x = wiring.add(f"relu_{name}", Clip(), wiring.dense(f"dense_{name}", x))
        x = wiring.norm(f"bn_{name}", x, shift=1.0)
        x = wiring.relu(f"end_{name}", x)
    return wiring.graph(x)


def test_only_the_sites_that_are_given_a_form_at_a_cost_go():
    graph = two_clips()
    assert [plan.left for plan in map(candidates(graph).get, (FOLDED, "clip"))] == [2, 0]
    plan = mixed(graph, candidates(graph)[FOLDED], {"bn_a": "clip", "bn_b": FOLDED})
    assert [d.action for d in plan.decisions] == ["folded", "kept"]
    assert plan.decisions[1] == candidates(graph)[FOLDED].decisions[1]
    assert set(plan.of(Reclip)) == {"relu_a"}
    plan = mixed(graph, candidates(graph)[FOLDED], {"bn_a": "clip", "bn_b": "scale_and_shift"})
    assert [d.action for d in plan.decisions] == ["folded", "scale_and_shift"]


def measured(monkeypatch, graph, cost, options=None):
    """The plan that is taken if a call takes the sum of the costs of (site, action)."""

    def time_interleaved(runs, deadline, stays=()):
        return {name: [run()] * 9 for name, run in runs.items()}

    def runner(plan):
        kept = [(d.name, "kept") for d in candidates(graph)[FOLDED].decisions]
        actions = kept if plan is None else [(d.name, d.action) for d in plan.decisions]
        return nullcontext(lambda: 1.0 + sum(cost(*action) for action in actions))

    monkeypatch.setattr(trial, "time_interleaved", time_interleaved)
    return choose(graph, runner, "a device", options or Options())


def test_forms_are_mixed_where_that_is_faster(monkeypatch):
    faster = {("bn0", "fused"), ("bn1", "scale_and_shift"), ("bn2", "scale_and_shift")}
    graph = of_sizes(16, 8, 4)
    plan = measured(monkeypatch, graph, lambda *action: -0.05 * (action in faster))
    assert [d.action for d in plan.decisions] == ["fused", "scale_and_shift", "scale_and_shift"]
    assert plan.measurement.chosen == "scale_and_shift (large: fused)"
    forms = [timing.form for timing in plan.measurement.timings]
    assert forms[-3:] == [
        f"scale_and_shift ({name}: fused)" for name in ("large", "medium", "small")
    ]
    assert all(len(timing.seconds) == 9 for timing in plan.measurement.timings)


def test_groups_that_gain_are_put_together(monkeypatch):
    gains = {("bn0", "scale_and_shift"): 0.1, ("bn1", "fused"): 0.04, ("bn2", "fused"): 0.04}
    plan = measured(monkeypatch, of_sizes(16, 8, 4), lambda *action: -gains.get(action, 0.0))
    assert [d.action for d in plan.decisions] == ["scale_and_shift", "fused", "fused"]
    assert plan.measurement.chosen == "scale_and_shift (medium, small: fused)"


def test_a_mix_that_gains_nothing_is_not_taken(monkeypatch):
    graph = of_sizes(16, 8, 4)
    plan = measured(monkeypatch, graph, lambda name, action: -0.01 * (action == "fused"))
    assert plan.measurement.chosen == "fused"
    slow = measured(monkeypatch, graph, lambda name, action: -0.2 * (action == "fused"))
    assert len(slow.measurement.timings) == 4  # the next one is too slow to be mixed with it


def test_forms_are_not_mixed_without_time(monkeypatch):
    used = property(lambda self: 0.8 if self.rounds else 0.1)
    monkeypatch.setattr(trial.Trial, "_used", used)
    plan = measured(monkeypatch, of_sizes(16, 8, 4), lambda *_: 0.0)
    notes = {timing.form: timing.note for timing in plan.measurement.timings}
    assert plan.measurement.chosen == FOLDED
    assert notes[FOLDED] == ""
    assert notes["folded (small: fused)"] == "not tried: the budget of 60 seconds was used up"


# ----------------------------------------------------------------------------- in earnest


def model(rank=4):
    shape = {4: (8, 8, 3), 3: (8, 3), 2: (3,)}[rank]
    x = inputs = K.Input(shape)
    x = K.Dense(5)(x)
    x = K.BatchNormalization(name="easy")(x)
    x = K.ReLU()(x)
    x = K.BatchNormalization(name="hard")(x)
    made = Model(inputs, K.Activation("tanh")(x))
    rng = np.random.default_rng(0)
    for norm in norms(made):
        norm.set_weights([rng.uniform(0.5, 1.5, w.shape) for w in norm.get_weights()])
    return made


@pytest.mark.parametrize("rank", [4, 3, 2])
def test_every_form_gives_the_outputs_of_the_original(each_keras, rank):
    original = model(rank)
    front_end = front_end_of(original)
    reading = front_end.read(original)
    plans = candidates(reading.graph)
    assert ("fused" in plans) == (each_keras.__name__ == "keras" or rank != 4)
    assert ("depthwise" in plans) == (rank > 2)
    for plan in plans.values():
        new = front_end.write(original, reading, plan)
        assert mbn.verify(original, new).ok
        assert len(norms(new)) == plan.left


@pytest.mark.parametrize("jit_compile", [False, True])
def test_convert_measures_and_changes_nothing_of_the_original(each_keras, jit_compile):
    original = model()
    before = original.get_weights()
    lines = []
    new = mbn.convert(original, batch_size=2, jit_compile=jit_compile, progress=lines.append)
    assert mbn.verify(original, new).ok
    assert lines[-2].startswith("measuring")
    assert lines[-1] == "comparing with the original"
    for old, now in zip(before, original.get_weights(), strict=True):
        np.testing.assert_array_equal(old, now)


def test_convert_measures_nothing_where_all_fold(each_keras):
    x = inputs = K.Input((8, 8, 3))
    folding = Model(inputs, K.BatchNormalization()(K.Conv2D(4, 3)(x)))
    plan = mbn.plan(folding)
    assert plan.measurement is None
    assert plan.counts == {"folded": 1}


def test_statistics_moved_while_measuring_come_back(each_keras):
    x = inputs = K.Input((8, 8, 3))
    x = K.BatchNormalization(name="training")(x, training=True)
    x = K.BatchNormalization(name="hard")(K.ReLU()(x))
    original = Model(inputs, K.Activation("tanh")(x))
    before = original.get_weights()
    new = mbn.convert(original)
    for old, now in zip(before, original.get_weights(), strict=True):
        np.testing.assert_array_equal(old, now)
    moved = next(layer for layer in new.layers if layer.name == "training")
    np.testing.assert_array_equal(moved.moving_mean.numpy(), np.zeros(3))


def test_given_inputs_are_cut_to_the_batch(each_keras):
    original = model()
    front_end = front_end_of(original)
    given = np.arange(2 * 8 * 8 * 3, dtype=np.float32).reshape(2, 8, 8, 3)
    for size in (1, 3):
        made = np.asarray(front_end.inputs_of_batch(original, given, size))
        np.testing.assert_array_equal(made, given[np.arange(size) % 2])
    assert front_end.inputs_of_batch(original, None, 5).shape == (5, 8, 8, 3)
    x = K.Input(batch_shape=(2, 3))
    fixed = Model(x, K.Dense(1)(x))
    assert front_end.inputs_of_batch(fixed, np.ones((2, 3)), 1).shape == (2, 3)


@pytest.mark.parametrize("taken", ["fused", "depthwise", "scale_and_shift", INPUT])
def test_saved_models_are_written_in_the_form_that_was_chosen(
    each_keras, taken, tmp_path, monkeypatch
):
    def time_interleaved(runs, deadline, stays=()):
        return {name: [1.0 if name == taken else 2.0] * 9 for name in runs}

    if taken == "fused" and each_keras.__name__ == "tf_keras":
        taken = "depthwise"  # it is fused already
    monkeypatch.setattr(trial, "time_interleaved", time_interleaved)
    original = model()
    inputs = tf.constant(np.random.default_rng(0).standard_normal((2, 8, 8, 3)), tf.float32)
    plan = check_saved_rewrites(original, inputs, tmp_path, ["auto"])["auto"]
    assert plan.measurement.chosen == taken
    assert all(timing.seconds for timing in plan.measurement.timings)
    written = tf.saved_model.load(str(tmp_path / "auto"))  # holds the variables
    ops = op_counts(written.signatures["serving_default"])
    kind = {"fused": "FusedBatchNormV3", "depthwise": "DepthwiseConv2dNative"}.get(taken)
    if kind:
        assert ops[kind] == 1
    if taken == "scale_and_shift":
        assert not {"FusedBatchNormV3", "Rsqrt", "DepthwiseConv2dNative"} & set(ops)


def test_what_was_measured_is_let_go(each_keras, tmp_path, monkeypatch):
    """Of the forms that were run, at most the chosen one stays, and no inputs."""

    def time_interleaved(runs, deadline, stays=()):
        return {name: [1.0 if name == "depthwise" else 2.0] * 9 for name in runs}

    monkeypatch.setattr(trial, "time_interleaved", time_interleaved)
    opened = ModelInMemory(front_end_of(original := model()), original)
    plan = plan_for(opened, Options())
    assert [tried.actions is plan.actions for tried, _ in opened._written] == [True]
    assert opened._inputs is None
    original.export(tmp_path / "model")
    source = open_source(tmp_path / "model")
    assert plan_for(source, Options()).measurement.chosen == "depthwise"
    assert (source._copies, source._measured_with) == ({}, None)


# ------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize("mode", ["auto", "fold"])
def test_a_misspelt_option(mode):
    with pytest.raises(TypeError, match="batchsize"):
        mbn.convert_with_plan(None, mode, batchsize=8)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mode": "fold", "batch_size": 2}, 'mode "fold" measures nothing, so it takes no batch_'),
        ({"batch_size": 0}, "from 1 up"),
        ({"budget": 0}, "above 0"),
        ({"budget": float("nan")}, "above 0"),
        ({"dtype": "float8"}, "float16 or bfloat16"),
        ({"stride": 2}, "takes no stride"),
    ],
)
def test_options_that_make_no_sense(given, message):
    with pytest.raises(RewriteError, match=message):
        mbn.convert(None, **given)


def test_mixed_precision_that_the_device_does_not_have():
    if tf.config.list_physical_devices("GPU"):
        pytest.skip("there is a GPU, where float16 is what automatic mixed precision takes")
    x = inputs = K.Input((4,))
    original = Model(inputs, K.Activation("tanh")(K.BatchNormalization()(K.ReLU()(x))))
    with pytest.raises(RewriteError, match="bfloat16 on CPUs"):
        mbn.convert(original, dtype="float16")


def test_mixed_precision_is_set_for_as_long_as_is_measured(monkeypatch):
    name = "auto_mixed_precision_onednn_bfloat16"
    meanwhile = []

    def time_interleaved(runs, *_, **__):
        meanwhile.append(tf.config.optimizer.get_experimental_options()[name])
        return dict.fromkeys(runs, [1.0] * 9)

    monkeypatch.setattr(trial, "time_interleaved", time_interleaved)
    x = inputs = K.Input((4,))
    original = Model(inputs, K.Activation("tanh")(K.BatchNormalization()(K.ReLU()(x))))
    before = tf.config.optimizer.get_experimental_options()
    if not tf.config.list_physical_devices("GPU"):
        plan = mbn.plan(original, dtype="bfloat16")
        assert plan.measurement.run_config == RunConfig(dtype="bfloat16")
        assert meanwhile == [True]
    after = tf.config.optimizer.get_experimental_options()
    assert after.get(name, False) == before.get(name, False)


def test_measuring_options_default_to_one_example_as_the_model_is():
    options = checked_options("auto")
    assert (options.run_config, options.budget) == (RunConfig(1, False, None), 60.0)

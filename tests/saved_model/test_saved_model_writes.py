"""SavedModels some of whose functions write to the weights or statistics of others.

What is right when the model is rewritten must be right after a write too. Many ways to write are
saved in one model, each with a network of its own, since loading and saving is what takes time.
"""

import functools
import re
from typing import NamedTuple

import numpy as np
import pytest
import tensorflow as tf

from tests.saved_model.test_saved_model_hard_cases import (
    CHANNELS,
    INPUTS,
    Dense,
    actions,
    assert_same,
    rewrite,
    rows,
    spec,
    traced,
)
from tests.saved_model.test_saved_models import assert_close, rewritten
from tests.support.saved_models import arithmetic_norm, kernel, statistics

pytestmark = pytest.mark.slow

v1 = tf.compat.v1
raw = tf.raw_ops

VECTOR = spec(CHANNELS, name="given")
NEW = np.array([3.0, 0.2, 0.7, 5.0], np.float32)


@pytest.fixture
def rng():
    return np.random.default_rng(12)


class Written(NamedTuple):
    """A SavedModel in two forms.

    Attributes:
        report: of the rewrite.
        model: the original.
        new: what was written.
    """

    report: object
    model: object
    new: object

    def decision(self, name):
        """What became of the BatchNormalization of a network."""
        (found,) = (d for d in self.report.plan.decisions if re.match(rf"{name}\b", d.name))
        return found

    def assert_same_before_and_after(self, name):
        """Calls a network, has it written to, and calls it again; both forms give the same."""
        before = self.scores(name)
        for loaded in (self.model, self.new):
            loaded.signatures[f"write_{name}"](given=tf.constant(NEW))
        assert np.abs(before - self.scores(name)).max() > 1e-3

    def scores(self, name):
        x = rows(np.random.default_rng(13))
        old, new = (
            loaded.signatures["serving_default"](x=x)[name] for loaded in (self.model, self.new)
        )
        assert_close(new, old)
        return old


# ------------------------------------------------------------------------- TensorFlow 2


def through_a_call(v, new):
    inner = tf.function(lambda: v[:2].assign(new[:2]))
    middle = tf.function(lambda: inner() * 1.0)
    return middle()


def compiled(v, new):
    return tf.function(lambda: v.assign(new), jit_compile=True)() * 1.0


def in_a_loop(v, new):
    def body(i):
        v[i].assign(new[i])
        return i + 1

    return tf.while_loop(lambda i: i < 3, body, [0])


def in_a_branch(v, new):
    return tf.cond(new[0] > 0, lambda: v[1:].assign(new[1:]) * 1.0, lambda: v * 2.0)


def in_one_of_several(v, new):
    branches = [lambda: v * 1.0, lambda: v.scatter_nd_update([[1]], new[:1]) * 1.0]
    return tf.switch_case(tf.cast(new[0] > 0, tf.int32), branches)


def in_a_branch_of_a_loop(v, new):
    def body(i):
        tf.cond(new[i] > 1, lambda: v[i : i + 1].assign(new[i : i + 1]) * 1.0, lambda: v * 1.0)
        return i + 1

    return tf.while_loop(lambda i: i < 4, body, [0])


def over_a_data_set(v, new):
    def add(total, i):
        v.scatter_nd_update([[i]], [new[i]])
        return total + i

    numbers = tf.data.Dataset.range(3).map(lambda i: tf.cast(i, tf.int32))
    return numbers.reduce(0, add)


# How a variable is written to, and the operation that the reason names.
WAYS = {
    "whole": (lambda v, new: v.assign(new), "AssignVariableOp"),
    "slices": (lambda v, new: v[1:3].assign(new[1:3]), "ResourceStridedSliceAssign"),
    "indices": (
        lambda v, new: v.scatter_update(tf.IndexedSlices(new[:2], [2, 0])),
        "ResourceScatterUpdate",
    ),
    "points": (
        lambda v, new: v.scatter_nd_add([[0], [2]], new[:2]),
        "ResourceScatterNdAdd",
    ),
    "optimiser": (
        lambda v, new: raw.ResourceApplyGradientDescent(var=v.handle, alpha=-0.5, delta=new),
        "ResourceApplyGradientDescent",
    ),
    "handle_handed_on": (
        lambda v, new: raw.AssignAddVariableOp(resource=tf.identity(v.handle), value=new),
        "AssignAddVariableOp",
    ),
    "call": (through_a_call, "ResourceStridedSliceAssign"),
    "compiled": (compiled, "AssignVariableOp"),
    "loop": (in_a_loop, "in While"),
    "branch": (in_a_branch, "in If"),
    "case": (in_one_of_several, "in Case"),
    "branch_of_a_loop": (in_a_branch_of_a_loop, "in While"),
    "data_set": (over_a_data_set, "ReduceDataset"),
}


def rewritten_networks(path, networks, writes, mode="fold", block=Dense.block):
    """Networks by name, and what writes to them by the names of signatures."""
    root = tf.Module()
    root.networks = networks

    def serve(x):
        scores = {}
        for name, network in networks.items():
            with tf.name_scope(name):
                scores[name] = block(network, x)
        return scores

    def writing(write):
        def function(given):
            write(given)
            return {"done": tf.constant(1)}

        return traced(function, VECTOR)

    signatures = {f"write_{name}": writing(write) for name, write in writes.items()}
    return Written(*rewrite(path, root, signatures | {"serving_default": traced(serve)}, mode))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A network for each of `WAYS`, written to by a signature."""
    networks = {name: Dense(seed=i) for i, name in enumerate(WAYS)}
    writes = {
        name: functools.partial(WAYS[name][0], network.norm.variance)
        for name, network in networks.items()
    }
    return rewritten_networks(tmp_path_factory.mktemp("written"), networks, writes)


@pytest.mark.parametrize("way", WAYS)
def test_statistics_are_no_constants_however_they_are_written(way, written):
    written.assert_same_before_and_after(way)
    decision = written.decision(way)
    assert decision.action == "kept"
    assert f"of 'write_{way}' writes to its parameters or statistics" in decision.reason
    assert WAYS[way][1] in decision.reason


# What takes the handle of a statistic, and leaves it as it is.
READINGS = {
    "gathered": lambda v: tf.gather(v, [0, 1]),
    "point": lambda v: tf.gather_nd(v, [[0], [1]]),
    "shape": lambda v: tf.cast(tf.shape(v), tf.float32),
    "in_a_loop": lambda v: tf.while_loop(lambda s: s < 9, lambda s: (s + v[0],), [0.0])[0],
    "in_a_branch": lambda v: tf.cond(v[0] > 1, lambda: v * 2.0, lambda: v * 3.0),
}


@pytest.fixture(scope="module")
def read_and_written(tmp_path_factory):
    """Networks that are only read, beside a variable that the same loops and branches write to."""
    root = tf.Module()
    root.networks = {name: Dense(seed=i) for i, name in enumerate(READINGS)}
    root.total = tf.Variable(0.0)

    def serve(x):
        return {name: network.block(x) for name, network in root.networks.items()}

    def count(given):
        def body(i):
            root.total.assign_add(sum(n.norm.variance[0] for n in root.networks.values()))
            return i + 1

        tf.while_loop(lambda i: i < 2, body, [0])
        read = {name: r(root.networks[name].norm.variance) for name, r in READINGS.items()}
        return {"total": root.total + 0.0 * given[0], **read}

    signatures = {"serving_default": traced(serve), "count": traced(count, VECTOR)}
    return Written(*rewrite(tmp_path_factory.mktemp("read"), root, signatures))


def test_statistics_that_are_only_read_are_constants(read_and_written):
    """A loop is handed all variables that its body uses; only what that writes to is written."""
    assert actions(read_and_written.report) == ["folded"] * len(READINGS)
    functions = (loaded.signatures["count"] for loaded in read_and_written[1:])
    assert float(assert_same(*functions, given=tf.constant(NEW))["total"]) > 0


class Shared(Dense):
    """One variable is a row of the kernel, as well as the variance."""

    def dense(self, x):
        return x[:, :1] @ tf.reshape(self.norm.variance, [1, CHANNELS])


def images(network, x):
    return network.norm.fused(tf.reshape(network.dense(x), [-1, 1, 1, CHANNELS]))


PARTS = {
    "gamma": lambda network, given: network.norm.gamma[1:].assign(given[1:]),
    "beta": lambda network, given: network.norm.beta[1:].assign(given[1:]),
    "mean": lambda network, given: network.norm.mean[1:].assign(given[1:]),
    "kernel": lambda network, given: network.kernel[1].assign(given),
    "shared": lambda network, given: network.norm.variance[1:].assign(given[1:]),
}


@pytest.fixture(scope="module", params=["fold", "depthwise"])
def written_in_part(request, tmp_path_factory):
    """Networks with weights that are written to by slices, and two that are not."""
    networks = {
        name: (Shared if name == "shared" else Dense)(seed=i) for i, name in enumerate(PARTS)
    }
    writes = {name: functools.partial(PARTS[name], networks[name]) for name in PARTS}
    networks |= {"untouched": Dense(seed=8), "row": Shared(seed=9)}
    path = tmp_path_factory.mktemp("parts")
    return rewritten_networks(path, networks, writes, request.param, images)


@pytest.mark.parametrize("name", PARTS)
def test_weights_that_are_written_in_part(name, written_in_part):
    written_in_part.assert_same_before_and_after(name)
    decision, mode = written_in_part.decision(name), written_in_part.report.plan.mode
    if name == "kernel" and mode == "depthwise":
        assert decision.action == "depthwise"
    else:
        assert decision.action == "kept"
        assert f"of 'write_{name}' writes to" in decision.reason


def test_weights_beside_those_that_are_written(written_in_part):
    mode = written_in_part.report.plan.mode
    actions = [written_in_part.decision(name).action for name in ("untouched", "row")]
    assert actions == (["folded", "kept"] if mode == "fold" else ["depthwise", "depthwise"])


def test_methods_that_write_to_weights_are_left_out(tmp_path, rng):
    """What the output does not carry over cannot write in it, so nothing stays for its sake."""
    root = Dense()
    root.predict = traced(root.block)

    def writing(way):
        def method(given):
            WAYS[way][0](root.norm.variance, given)
            return 1

        return method

    ways = ("slices", "optimiser", "loop")
    for way in ways:
        setattr(root, way, traced(writing(way), VECTOR))
    report, model, new = rewrite(tmp_path, root, root.predict)
    assert actions(report) == ["folded"]
    assert sorted(name.partition("(")[0] for name in report.left_out) == sorted(ways)
    assert all("writes to weights of other functions" in w for w in report.left_out.values())
    assert not any(hasattr(new, way) for way in ways)
    assert_same(model.predict, new.predict, rows(rng))


# ---------------------------------------------------------------- writes of what was there


def put_back(network, x):
    y = tf.reshape(network.dense(x), [-1, 1, 1, CHANNELS])
    y, mean, variance, *_ = raw.FusedBatchNormV3(
        x=y, scale=network.norm.gamma, offset=network.norm.beta, mean=network.norm.mean,
        variance=network.norm.variance, is_training=False,
    )  # fmt: skip
    return y, mean, variance


def assigned(network, x):
    y, mean, variance = put_back(network, x)
    network.norm.mean.assign(mean)
    network.norm.variance.assign(tf.identity(variance))
    return y


def moved(network, x):
    y, mean, variance = put_back(network, x)
    for statistic, value in ((network.norm.mean, mean), (network.norm.variance, variance)):
        delta = (statistic - value) * tf.constant(0.01)
        statistic.assign_sub(tf.where(tf.shape(x)[0] > 0, delta, tf.zeros_like(delta)))
    return y


def decided(network, x):
    """As ports of detectors do, whose layers ask whether they are trainable."""
    training = tf.logical_and(tf.constant(False), tf.constant(True))

    def by_batch():
        y, mean, variance = put_back(network, x)
        return y, mean + 1.0, variance + 1.0

    y, mean, variance = tf.cond(training, by_batch, lambda: put_back(network, x))
    network.norm.mean.assign(mean)
    network.norm.variance.assign(variance)
    return y


def assigned_and_changed(network, x):
    y = assigned(network, x)
    network.norm.variance.assign_add(tf.ones(CHANNELS))
    return y


PUT_BACK = {
    "assigned": assigned,
    "moved": moved,
    "decided": decided,
    "changed_too": assigned_and_changed,
    "changed_elsewhere": assigned,
}


@pytest.fixture(scope="module", params=["fold", "depthwise"])
def put_back_networks(request, tmp_path_factory):
    networks = {name: Dense(seed=i) for i, name in enumerate(PUT_BACK)}
    elsewhere = networks["changed_elsewhere"].norm.variance
    writes = {"changed_elsewhere": lambda given: elsewhere[1:].assign(given[1:])}
    names = {id(network): name for name, network in networks.items()}
    path = tmp_path_factory.mktemp("put_back")
    return rewritten_networks(
        path, networks, writes, request.param, lambda n, x: PUT_BACK[names[id(n)]](n, x)
    )


@pytest.mark.parametrize("way", ["assigned", "moved", "decided"])
def test_statistics_that_are_put_back_are_constants(way, put_back_networks):
    mode = put_back_networks.report.plan.mode
    action = put_back_networks.decision(way).action
    assert action == ("folded" if mode == "fold" else "depthwise")
    for _ in range(2):
        put_back_networks.scores(way)


def test_statistics_put_back_and_written_elsewhere_are_none(put_back_networks):
    put_back_networks.assert_same_before_and_after("changed_elsewhere")
    decision = put_back_networks.decision("changed_elsewhere")
    assert decision.action == "kept"
    assert "of 'write_changed_elsewhere'" in decision.reason


def test_statistics_put_back_and_changed_are_none(put_back_networks):
    decision = put_back_networks.decision("changed_too")
    assert decision.action == "kept"
    assert "AssignAddVariableOp" in decision.reason
    calls = [put_back_networks.scores("changed_too") for _ in range(2)]
    assert np.abs(calls[0] - calls[1]).max() > 1e-3


# --------------------------------------------------------------------------- TensorFlow 1


def applied(name, **numbers):
    def apply(v, new):
        reference = v.dtype._is_ref_dtype
        function = getattr(raw, name if reference else f"Resource{name}")
        return function(var=v if reference else v.handle, **numbers, delta=new)

    return apply


def after_a_write(v, new):
    """One write goes through what another gives."""
    return v1.assign_add(v1.assign(v, new), new * 0.5)


def in_a_condition(v, new):
    return v1.cond(new[0] > 0, lambda: v1.assign(v, new) * 1.0, lambda: new * 2.0)


V1_WAYS = {
    "assign": v1.assign,
    "assign_sub": lambda v, new: v1.assign_sub(v, 0.03 * new),
    "scatter_add": lambda v, new: v1.scatter_add(v, [0, 2], new[:2]),
    "scatter_nd_update": lambda v, new: v1.scatter_nd_update(v, [[0], [3]], new[:2]),
    "slices": lambda v, new: v[1:3].assign(new[1:3]),
    "optimiser": applied("ApplyGradientDescent", alpha=-0.5),
    "after_a_write": after_a_write,
    "condition": in_a_condition,
}


@pytest.fixture(scope="module", params=[True, False], ids=["resources", "references"])
def written_v1(request, tmp_path_factory):
    """A network for each of `V1_WAYS`, written to by a signature, in one graph."""
    path = tmp_path_factory.mktemp("v1")
    v1.disable_control_flow_v2()
    try:
        _save_v1(path / "in", use_resource=request.param)
    finally:
        v1.enable_control_flow_v2()
    report, model, new = rewritten(path)
    return Written(report, model, new)


def _save_v1(directory, use_resource):
    with tf.Graph().as_default(), v1.Session() as session:
        x = v1.placeholder(tf.float32, [None, INPUTS], "x")
        given = v1.placeholder(tf.float32, [CHANNELS], "given")
        scores, signatures = {}, {}
        for i, (name, write) in enumerate(V1_WAYS.items()):
            rng = np.random.default_rng(i)
            arrays = [kernel(rng, INPUTS, CHANNELS), *statistics(rng, CHANNELS)]
            with v1.variable_scope(name):
                weights, *norm = (
                    v1.get_variable(f"v{j}", initializer=array, use_resource=use_resource)
                    for j, array in enumerate(arrays)
                )
                scores[name] = arithmetic_norm(x @ weights, *norm)
                done = write(norm[-1], given)
                waits = [done.op if isinstance(done, tf.Tensor) else done]
                with tf.control_dependencies(waits):
                    done = tf.identity(norm[-1]) * 1.0
            signatures[f"write_{name}"] = signature({"given": given}, {"new": done})
        scores["put_back"] = put_back_v1(x, use_resource)
        signatures["serving_default"] = signature({"x": x}, scores)
        session.run(v1.global_variables_initializer())
        builder = v1.saved_model.Builder(str(directory))
        builder.add_meta_graph_and_variables(session, ["serve"], signatures)
        builder.save()


def put_back_v1(x, use_resource):
    rng = np.random.default_rng(20)
    with v1.variable_scope("put_back"):
        weights, scale, offset, mean, variance = (
            v1.get_variable(f"v{j}", initializer=array, use_resource=use_resource)
            for j, array in enumerate([kernel(rng, INPUTS, CHANNELS), *statistics(rng, CHANNELS)])
        )
        y, *given = v1.nn.fused_batch_norm(
            tf.reshape(x @ weights, [-1, 1, 1, CHANNELS]), scale, offset, mean, variance,
            is_training=False,
        )  # fmt: skip
        writes = [v1.assign(mean, given[0]), v1.assign_sub(variance, variance - given[1])]
        with tf.control_dependencies(writes):
            return tf.reshape(y, [-1, CHANNELS])


def signature(inputs, outputs):
    return v1.saved_model.build_signature_def(
        *(
            {name: v1.saved_model.build_tensor_info(tensor) for name, tensor in tensors.items()}
            for tensors in (inputs, outputs)
        ),
        v1.saved_model.PREDICT_METHOD_NAME,
    )


@pytest.mark.parametrize("way", V1_WAYS)
def test_statistics_of_tensorflow_1_are_no_constants(way, written_v1):
    written_v1.assert_same_before_and_after(way)
    decision = written_v1.decision(way)
    assert decision.action == "kept"
    assert f"of 'write_{way}' writes to its parameters or statistics" in decision.reason


def test_statistics_of_tensorflow_1_that_are_put_back_are_constants(written_v1):
    assert written_v1.decision("put_back").action == "folded"
    for _ in range(2):
        written_v1.scores("put_back")

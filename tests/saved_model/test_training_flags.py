"""Flags that say whether a model trains: decided beforehand, set for good, or named as obstacle."""

import numpy as np
import pytest
import tensorflow as tf
import tf_keras

import mbn_rewrite as mbn
from mbn_rewrite.errors import RewriteError
from tests.cli.test_tool import run
from tests.saved_model.test_saved_models import assert_close, norms_in, rewritten
from tests.support.saved_models import EPSILON, arithmetic_norm, fused_norm, kernel, statistics

pytestmark = pytest.mark.slow

v1 = tf.compat.v1
INPUTS, CHANNELS = 3, 4
IMAGE = (6, 6, INPUTS)


@pytest.fixture
def rng():
    return np.random.default_rng(31)


@pytest.fixture
def image(rng):
    return tf.constant(rng.standard_normal((3, *IMAGE)), tf.float32)


@pytest.fixture(params=[True, False], ids=["if", "switch"])
def control_flow_v2(request):
    (v1.enable_control_flow_v2 if request.param else v1.disable_control_flow_v2)()
    yield request.param
    v1.enable_control_flow_v2()


# ----------------------------------------------------------------------------- TensorFlow 1


def variable(name, array, **kwargs):
    return v1.get_variable(name, initializer=array, use_resource=True, **kwargs)


def save_tf1(directory, flag, fused=True, trains_if=True):
    """Saves a graph that trains, or not, by a flag.

    Args:
        directory: where to.
        flag: gives the condition, and the inputs of the signature that it is made of.
        fused: whether it normalises by the fused operation.
        trains_if: the value of the condition for which it trains.
    """
    rng = np.random.default_rng(32)
    with tf.Graph().as_default(), v1.Session() as session:
        x = v1.placeholder(tf.float32, [None, *IMAGE], "x")
        weights = variable("kernel", kernel(rng, 3, 3, INPUTS, CHANNELS))
        norm = [variable(f"norm/{i}", array) for i, array in enumerate(statistics(rng, CHANNELS))]
        condition, inputs = flag()
        y = tf.nn.conv2d(x, weights, 1, "VALID")

        def trains():
            mean, variance = tf.nn.moments(y, [0, 1, 2])
            return tf.nn.batch_normalization(y, mean, variance, norm[1], norm[0], EPSILON)

        def serves():
            return (fused_norm if fused else arithmetic_norm)(y, *norm)

        ways = (trains, serves) if trains_if else (serves, trains)
        y = tf.nn.relu(v1.cond(condition, *ways))
        session.run(v1.global_variables_initializer())
        v1.saved_model.simple_save(session, str(directory), {"x": x, **inputs}, {"y": y})


def default(value):
    return v1.placeholder_with_default(value, np.shape(value), "phase")


def stored(value, **kwargs):
    return v1.get_variable("phase", initializer=value, trainable=False, **kwargs)


# What decides -> the condition, which is False, and what is said of it.
DECIDED = {
    "default": (lambda: default(False), "'phase' is False by default"),
    "not": (lambda: tf.logical_not(default(True)), "'phase' is True by default"),
    "and_variable": (
        lambda: tf.logical_and(default(False), stored(True, use_resource=True)),
        "'phase' is False by default",
    ),
    "variable": (lambda: stored(False, use_resource=True), "'phase' is stored as False"),
    "reference": (lambda: tf.identity(stored(False)), "'phase' is stored as False"),
    "number": (lambda: tf.cast(stored(0, use_resource=True), tf.bool), "'phase' is stored as 0"),
    "comparison": (lambda: tf.greater(default(0.25), 0.5), "'phase' is 0.25 by default"),
    "text": (lambda: tf.equal(default("serve"), "train"), "'phase' is 'serve' by default"),
    "element": (lambda: default([True, False])[1], "'phase' is [True, False] by default"),
    "any": (lambda: tf.reduce_any(default([False, False])), "'phase' is [False, False]"),
    "or": (
        lambda: tf.logical_or(default(False), stored(False, use_resource=True)),
        "'phase' is False by default",
    ),
}


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "arithmetic"])
@pytest.mark.parametrize("form", DECIDED)
def test_flag_that_nothing_changes_is_decided(form, fused, control_flow_v2, tmp_path, image):
    flag, said = DECIDED[form]
    save_tf1(tmp_path / "in", lambda: (flag(), {}), fused)
    report, model, new = rewritten(tmp_path)
    assert [d.action for d in report.plan.decisions] == ["folded"]
    assert any(said in note for note in report.plan.notes)
    signatures = model.signatures["serving_default"], new.signatures["serving_default"]
    assert_close(signatures[1](x=image)["y"], signatures[0](x=image)["y"])
    assert norms_in(signatures[1]) == 0


def given():
    flag = v1.placeholder(tf.bool, [], "phase_train")
    return flag, {"phase_train": flag}


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "arithmetic"])
@pytest.mark.parametrize("trains_if", [True, False])
def test_flag_that_is_an_input_is_named_and_can_be_set(
    trains_if, fused, control_flow_v2, tmp_path, image
):
    save_tf1(tmp_path / "in", given, fused, trains_if)
    serving = not trains_if
    report, *_ = rewritten(tmp_path)
    (decision,) = report.plan.decisions
    assert decision.action == "kept"
    assert f"the input 'phase_train' decides (to set it: --set_input=phase_train={serving}," in (
        decision.reason
    )
    report = mbn.rewrite_saved_model(
        tmp_path / "in", tmp_path / "set", "fold", set_input={"phase_train": serving}
    )
    assert report.ok
    assert [d.action for d in report.plan.decisions] == ["folded"]
    assert f"'serving_default' has no input 'phase_train' any more: it is set to {serving}" in (
        report.plan.notes
    )
    model = tf.saved_model.load(str(tmp_path / "in")).signatures["serving_default"]
    loaded = tf.saved_model.load(str(tmp_path / "set"))
    new = loaded.signatures["serving_default"]
    assert list(new.structured_input_signature[1]) == ["x"]
    expected = model(x=image, phase_train=tf.constant(serving))["y"]
    assert_close(new(x=image)["y"], expected)


def test_flag_set_to_train_is_verified_as_it_trains(tmp_path, image):
    save_tf1(tmp_path / "in", given)
    report = mbn.rewrite_saved_model(
        tmp_path / "in", tmp_path / "out", "fold", set_input={"serving_default/phase_train": True}
    )
    assert report.ok
    model = tf.saved_model.load(str(tmp_path / "in")).signatures["serving_default"]
    loaded = tf.saved_model.load(str(tmp_path / "out"))
    expected = model(x=image, phase_train=tf.constant(True))["y"]
    assert_close(loaded.signatures["serving_default"](x=image)["y"], expected)


def test_number_as_flag_can_be_set(control_flow_v2, tmp_path):
    def flag():
        given = v1.placeholder(tf.int32, [], "phase")
        return tf.equal(given, 1), {"phase": given}

    save_tf1(tmp_path / "in", flag)
    report, *_ = rewritten(tmp_path)
    assert "--set_input=phase=...," in report.plan.decisions[0].reason
    report = mbn.rewrite_saved_model(
        tmp_path / "in", tmp_path / "set", "fold", set_input={"phase": 0}
    )
    assert [d.action for d in report.plan.decisions] == ["folded"]


def test_condition_of_data_is_no_flag(control_flow_v2, tmp_path):
    def flag():
        x = v1.get_default_graph().get_tensor_by_name("x:0")
        return tf.reduce_mean(x) > 100.0, {}

    save_tf1(tmp_path / "in", flag)
    report, *_ = rewritten(tmp_path)
    assert [d.action for d in report.plan.decisions] == ["kept"]
    assert "set_input" not in report.plan.decisions[0].reason


WRONG = {
    "unknown": ({"phase": False}, "no input of a signature of .*'serving_default' takes phase_tr"),
    "text": ({"phase_train": "maybe"}, "the value 'maybe', but it takes bool of the shape \\(\\)"),
    "number": ({"phase_train": 2}, "the value 2, but it takes bool"),
    "list": ({"phase_train": [False]}, "\\[False\\], but it takes bool of the shape"),
    "uneven": ({"x": [[1.0], [1.0, 2.0]]}, "but it takes float32 of the shape"),
}


@pytest.mark.parametrize("case", WRONG)
def test_values_that_cannot_be_set_are_refused(case, tmp_path):
    values, words = WRONG[case]
    save_tf1(tmp_path / "in", given)
    with pytest.raises(RewriteError, match=words) as refused:
        mbn.rewrite_saved_model(tmp_path / "in", tmp_path / "out", "fold", set_input=values)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_flag_is_set_from_the_command_line(tmp_path, capsys):
    save_tf1(tmp_path / "in", given)
    out = tmp_path / "out"
    assert run("--mode=fold", "--set-input=phase_train=false", tmp_path / "in", out) == 0
    assert "has no input 'phase_train' any more: it is set to False" in capsys.readouterr().out
    loaded = tf.saved_model.load(str(out))
    assert list(loaded.signatures["serving_default"].structured_input_signature[1]) == ["x"]


@pytest.mark.parametrize(
    ("given_flags", "words"),
    [
        (["phase_train"], "takes NAME=VALUE, not 'phase_train'"),
        (["=False"], "takes NAME=VALUE, not '=False'"),
        (["phase_train=0", "phase_train=1"], "sets 'phase_train' twice"),
        (["phase=0"], "no input of a signature"),
        (["phase_train=[False]"], "takes bool of the shape ()"),
    ],
)
def test_wrong_flags_are_one_line(given_flags, words, tmp_path, capsys):
    save_tf1(tmp_path / "in", given)
    given_flags = [f"--set_input={flag}" for flag in given_flags]
    assert run("--mode=fold", *given_flags, tmp_path / "in", tmp_path / "out") == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert words in line


def test_files_of_keras_have_no_inputs_to_set(tmp_path):
    model = tf_keras.Sequential([tf_keras.layers.Dense(2, input_shape=(3,))])
    model.save(tmp_path / "m.keras")
    with pytest.raises(RewriteError, match="has no signatures whose inputs could be set"):
        mbn.rewrite_saved_model(tmp_path / "m.keras", tmp_path / "out", set_input={"a": 1})


# ----------------------------------------------------------------------------- TensorFlow 2


class Network(tf.Module):
    """A convolution and its BatchNormalization, which trains where a flag says so."""

    def __init__(self):
        super().__init__()
        rng = np.random.default_rng(33)
        self.kernel = tf.Variable(kernel(rng, 3, 3, INPUTS, CHANNELS))
        self.norm = [tf.Variable(array) for array in statistics(rng, CHANNELS)]
        self.trains = tf.Variable(False, name="trains")

    def scores(self, x, trains):
        y = tf.nn.conv2d(x, self.kernel, 1, "VALID")
        gamma, beta, _, _ = self.norm

        def by_the_batch():
            mean, variance = tf.nn.moments(y, [0, 1, 2])
            return tf.nn.batch_normalization(y, mean, variance, beta, gamma, EPSILON)

        return tf.nn.relu(tf.cond(trains, by_the_batch, lambda: arithmetic_norm(y, *self.norm)))


SPEC = tf.TensorSpec([None, *IMAGE], name="x")
FLAG = tf.TensorSpec([], tf.bool, name="trains")


def test_norm_of_a_signature_and_a_method_counts_once(tmp_path, image):
    root = Network()
    root.score = tf.function(lambda x: root.scores(x, root.trains), input_signature=[SPEC])
    serve = tf.function(lambda x: {"y": root.scores(x, root.trains)}, input_signature=[SPEC])
    tf.saved_model.save(root, str(tmp_path / "in"), {"serving_default": serve})
    report, model, new = rewritten(tmp_path)
    assert [d.action for d in report.plan.decisions] == ["folded"]
    assert_close(new.score(image), model.score(image))


def test_variable_that_a_method_writes_to_decides_nothing(tmp_path, image):
    root = Network()
    root.train = tf.function(root.trains.assign, input_signature=[FLAG])
    serve = tf.function(lambda x: {"y": root.scores(x, root.trains)}, input_signature=[SPEC])
    tf.saved_model.save(root, str(tmp_path / "in"), {"serving_default": serve})
    report, model, new = rewritten(tmp_path)
    assert [d.action for d in report.plan.decisions] == ["kept"]
    assert report.plan.notes == ()
    for trains in (True, False):
        model.train(trains)
        new.train(trains)
        signatures = model.signatures["serving_default"], new.signatures["serving_default"]
        assert_close(signatures[1](x=image)["y"], signatures[0](x=image)["y"])


def test_flag_of_a_method_is_left_out_with_the_method(tmp_path, image):
    root = Network()
    root.score = tf.function(root.scores, input_signature=[SPEC, FLAG])
    serve = tf.function(
        lambda x, trains: {"y": root.scores(x, trains)}, input_signature=[SPEC, FLAG]
    )
    tf.saved_model.save(root, str(tmp_path / "in"), {"serving_default": serve})
    report, model, new = rewritten(tmp_path)
    (decision,) = report.plan.decisions
    assert decision.action == "kept"
    assert_close(new.score(image, False), model.score(image, False))
    report = mbn.rewrite_saved_model(
        tmp_path / "in", tmp_path / "set", "fold", set_input={"trains": False}
    )
    assert "--signatures" in report.plan.decisions[0].reason
    report = mbn.rewrite_saved_model(
        tmp_path / "in", tmp_path / "alone", "fold",
        set_input={"trains": False}, signatures=["serving_default"],
    )  # fmt: skip
    assert [d.action for d in report.plan.decisions] == ["folded"]

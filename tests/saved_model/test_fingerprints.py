"""Functions that compute the same are found, whatever their operations are called."""

import numpy as np
import pytest
import tensorflow as tf

import mbn_rewrite as mbn
from mbn_rewrite.frontends.saved_model.fingerprints import fingerprint
from mbn_rewrite.frontends.saved_model.function_graph import function_graph_of
from mbn_rewrite.frontends.saved_model.source import SavedModelDirectory

pytestmark = pytest.mark.slow
FACTOR, OTHER = (tf.Variable(np.full([3], factor, np.float32)) for factor in (2, 3))
ROWS = tf.TensorSpec([None, 3])


def taken(body, *specs, name="f"):
    """The fingerprint of a function of tensors."""
    with tf.name_scope(name):
        function = tf.function(body, autograph=False).get_concrete_function(*specs or [ROWS])
    return fingerprint(function_graph_of(name, function, None, look_inside=True))


def scaled(x):
    return tf.nn.relu(x * FACTOR)


def called(x):
    with tf.name_scope("within"):
        return tf.identity(tf.function(scaled, autograph=False)(tf.identity(x, name="input")))


def looped(step, factor=FACTOR):
    def body(x):
        return tf.while_loop(lambda i, _: i < 2, lambda i, z: (i + step, z * factor), (0, x))[1]

    return body


@pytest.mark.parametrize(
    ("first", "second"),
    [(scaled, scaled), (scaled, called)],
    ids=["traced again", "called"],
)
def test_names_and_calls_do_not_count(first, second):
    assert taken(first) == taken(second, name="g") is not None


def test_numbers_of_bodies_do_not_count():
    """TensorFlow gives each a name of its own, by a number."""
    assert taken(looped(1)) == taken(looped(1)) is not None


def checked(limit, said):
    def body(x):
        tf.raw_ops.Assert(condition=tf.reduce_all(x < limit), data=[said])
        return scaled(x)

    return body


def test_what_a_check_says_does_not_count_but_what_it_checks():
    assert taken(checked(1.0, "too large")) == taken(checked(1.0, "beyond 1"))
    assert len({taken(checked(1.0, "")), taken(checked(2.0, "")), taken(scaled)}) == 3


@pytest.mark.parametrize(
    "other",
    [
        lambda x: tf.nn.relu6(x * FACTOR),
        lambda x: tf.nn.relu(x * OTHER),
        lambda x: tf.nn.relu(x * FACTOR.read_value() * 1.0),
        lambda x: (scaled(x), x),
        looped(1),
    ],
    ids=["operation", "variable", "more", "results", "loop"],
)
def test_what_is_computed_counts(other):
    assert taken(scaled) != taken(other)


@pytest.mark.parametrize("other", [looped(2), looped(1, OTHER)], ids=["body", "variable"])
def test_bodies_of_loops_count(other):
    assert taken(looped(1)) != taken(other)


def test_arguments_count_read_or_not():
    def first(x, *_):
        return scaled(x)

    def second(_, x):
        return scaled(x)

    prints = [taken(first), taken(first, ROWS, ROWS), taken(second, ROWS, ROWS)]
    prints.append(taken(first, tf.TensorSpec([4, 3])))
    assert len(set(prints)) == 4


def test_devices_and_what_xla_compiles_count():
    def on_cpu(x):
        with tf.device("CPU:0"):
            return tf.nn.relu(x * FACTOR)

    def in_part(x):
        return 1.0 + tf.function(scaled, jit_compile=True)(x)

    def plain(x):
        return 1.0 + scaled(x)

    assert taken(scaled) != taken(on_cpu)
    assert taken(plain) != taken(in_part)


def test_branches_of_tensorflow_1_are_not_followed(tmp_path):
    """What they give may hang on a condition by an order alone, without being computed of it."""
    v1 = tf.compat.v1
    with tf.Graph().as_default(), v1.Session() as session:
        v1.disable_control_flow_v2()
        try:
            x = v1.placeholder(tf.float32, [None, 3], "x")
            total, signatures = tf.reduce_sum(x), {}
            for name, condition in (("positive", total > 0), ("negative", total < 0)):
                y = x * v1.cond(condition, lambda: tf.constant(1.0), lambda: tf.constant(2.0))
                signatures[name] = v1.saved_model.predict_signature_def({"x": x}, {"y": y})
            builder = v1.saved_model.Builder(str(tmp_path / "in"))
            builder.add_meta_graph_and_variables(session, ["serve"], signatures)
            builder.save()
        finally:
            v1.enable_control_flow_v2()
    mbn.rewrite_saved_model(tmp_path / "in", tmp_path / "out", "fold")
    new = tf.saved_model.load(str(tmp_path / "out")).signatures
    for x in (tf.ones([1, 3]), -tf.ones([1, 3])):
        is_positive = bool(x[0, 0] > 0)
        np.testing.assert_array_equal(new["positive"](x=x)["y"], x * (1 if is_positive else 2))
        np.testing.assert_array_equal(new["negative"](x=x)["y"], x * (2 if is_positive else 1))


def test_calls_that_go_on_from_each_other_have_none():
    def drawn(x):
        return x + tf.random.uniform([3])

    def counted(x):
        return x + FACTOR.assign_add(tf.ones([3]))

    assert taken(drawn) is taken(counted) is None


class Repeated(tf.Module):
    """Signatures `first` and `second` and a method `serve`, of one function and of another."""

    def __init__(self):
        super().__init__()
        self.factor = tf.Variable(FACTOR)
        self.train = tf.Variable(False)
        self.serve = tf.function(self.computed, input_signature=[ROWS])

    def computed(self, x):
        return tf.nn.relu(x * self.factor)

    def conditional(self, x):
        return tf.cond(self.train, lambda: 2 * x, lambda: self.computed(x))

    def saved(self, directory):
        spec = tf.TensorSpec([None, 3], name="x")
        signatures = {
            name: tf.function(lambda x, body=body: {"y": body(x)}).get_concrete_function(spec)
            for name, body in (("first", self.computed), ("second", self.conditional))
        }
        tf.saved_model.save(self, str(directory), signatures=signatures)
        return SavedModelDirectory(directory, None, None)


def test_what_repeats_others_is_read_once_and_yet_run_and_named(tmp_path):
    opened = Repeated().saved(tmp_path / "in")
    assert [node.kind for node in opened.graph.nodes].count("Relu") == 1
    assert [note.partition(" is ")[0] for note in opened.notes] == ["In 'second' 'Variable'"]
    found = opened.reference_io(None)
    assert [call.method for call in found.values()] == ["", "", "serve"]
    arrays = [array for call in found.values() for array in call.outputs.values()]
    assert len({id(array) for array in arrays}) == 3


def test_what_repeats_others_is_written(tmp_path):
    Repeated().saved(tmp_path / "in")
    report = mbn.rewrite_saved_model(tmp_path / "in", tmp_path / "out", "fold")
    assert len(report.comparisons) == 3
    assert report.ok
    new = tf.saved_model.load(str(tmp_path / "out"))
    x = tf.constant([[1.0, -1.0, 2.0]])
    for result in (
        new.signatures["first"](x=x)["y"],
        new.signatures["second"](x=x)["y"],
        new.serve(x),
    ):
        np.testing.assert_array_equal(result, [[2.0, 0.0, 4.0]])

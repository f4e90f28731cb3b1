"""SavedModels of odd objects, in odd surroundings, and with what cannot be seen into.

Whatever an object holds, each of its methods is carried over or named as left out.
"""

import numpy as np
import pytest
import tensorflow as tf
from google.protobuf import text_format
from tensorflow.core.framework import graph_pb2
from tensorflow.python.saved_model import registration

import mbn_rewrite as mbn
from mbn_rewrite.frontends.saved_model import served
from mbn_rewrite.frontends.saved_model.function_graph import FunctionGraph
from mbn_rewrite.frontends.saved_model.opaque_calls import notes_on
from mbn_rewrite.plans import Plan
from tests.saved_model.test_saved_model_hard_cases import (
    INPUTS,
    ROWS,
    Dense,
    actions,
    assert_same,
    predicting,
    rewrite,
    rows,
    spec,
    traced,
)
from tests.support import saved_models

Object = tf.__internal__.tracking.AutoTrackable


@pytest.fixture
def rng():
    return np.random.default_rng(14)


def never_called():
    return tf.function(lambda x: x)


def doubled():
    return traced(lambda x: x * 2.0)


@registration.register_serializable(package="tests")
class Registered(Object):
    """A class that comes back as itself, with its own `method` in the place of a function."""

    @classmethod
    def _deserialize_from_proto(cls, **_):
        return cls()

    def _add_trackable_child(self, name, value):
        if name != "method":
            setattr(self, name, value)

    def method(self):
        return 3


class WithProperty(tf.Module):
    @property
    def number(self):
        return 1

    @tf.function(input_signature=[ROWS])
    def given(self, x):
        return x

    @tf.function
    def uncalled(self, x):
        return x


def odd_object():
    """One that holds a bit of everything."""
    root = Object()
    root.network = Dense()
    root.predict = traced(root.network.block)
    root.trainable_variables = doubled()
    root.non_trainable_variables = Object()
    root.non_trainable_variables.method = doubled()
    root.uncalled = never_called()
    root.unstorable = tf.function(lambda x, module: x)
    root.unstorable.get_concrete_function(ROWS, root)
    root.inner = tf.Module()
    root.inner.uncalled = never_called()
    root.inner.deeper = tf.Module()
    root.inner.deeper.uncalled = never_called()
    root.inner.back = root
    root.with_property = WithProperty()
    root.in_a_list = [never_called(), root.predict, doubled()]
    root.in_a_dict = {"a": doubled(), "b c": {"z": doubled(), "n": never_called()}}
    root.here_too = predicting()
    root.modules = [root.here_too, predicting()]
    root.concrete = doubled().get_concrete_function()
    root.registered = Registered()
    Object.__setattr__(root.registered, "method", doubled())
    root.registered.other = doubled()
    setattr(root, "dot.ted", doubled())
    setattr(root, "", doubled())
    setattr(root, "sp aced", doubled())
    root.many = tf.function(lambda x, n=1, *more, **named: x * n)
    root.many.get_concrete_function(ROWS)
    root.many.get_concrete_function(spec(None, INPUTS, dtype=tf.int32), 2)
    root.many.get_concrete_function(ROWS, 3.0, ROWS, last=ROWS)
    root.table = tf.lookup.experimental.DenseHashTable(tf.int64, tf.float32, -1.0, -1, -2)
    root.look_up = traced(lambda keys: root.table.lookup(keys), spec(None, dtype=tf.int64))
    root.generator = tf.random.Generator.from_seed(1)
    root.noise = tf.function(lambda: root.generator.normal([2]), input_signature=[])
    return root


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    root = odd_object()
    return rewrite(tmp_path_factory.mktemp("odd"), root, root.predict)


LEFT_OUT = {
    "uncalled": "never called",
    "unstorable": "cannot be stored",
    "inner.uncalled": "never called",
    "inner.deeper.uncalled": "never called",
    "with_property.uncalled": "never called",
    "2 functions in in_a_list": "list",
    "3 functions in in_a_dict": "dict",
    "1 functions in modules": "list",
    "concrete": "concrete function",
    "registered.method": "does not have it under this name",
    "dot.ted": "does not have it under this name",
    "": "no name",
}


def test_every_method_that_is_not_carried_over_is_named(odd):
    report, _, _ = odd
    assert sorted(report.left_out) == sorted(LEFT_OUT)
    assert [n for n, words in LEFT_OUT.items() if words not in report.left_out[n]] == []
    assert actions(report) == ["folded", "folded"]


@pytest.mark.parametrize(
    "get",
    [
        lambda root: root.predict,
        lambda root: root.here_too.predict,
        lambda root: root.with_property.given,
        lambda root: root.registered.other,
        lambda root: root.many,
        lambda root: root.trainable_variables,  # elsewhere a list
        lambda root: root.non_trainable_variables.method,
        lambda root: getattr(root, "sp aced"),
        lambda root: lambda x: root.look_up(tf.range(3, dtype=tf.int64)),
    ],
)
def test_every_other_method_is_carried_over(get, odd, rng):
    _, model, new = odd
    assert_same(get(model), get(new), rows(rng))


# -------------------------------------------------------------------- distribution strategies


@pytest.fixture
def source(tmp_path):
    root = predicting()
    tf.saved_model.save(root, str(tmp_path / "in"), {"serving_default": root.predict})
    return tmp_path / "in"


def test_model_on_disk_is_rewritten_outside_of_the_scope_it_is_called_in(source, tmp_path, rng):
    strategy = tf.distribute.MirroredStrategy(["CPU:0"])
    with strategy.scope():
        report = mbn.rewrite_saved_model(source, tmp_path / "out", "fold")
        assert tf.distribute.get_strategy() is strategy
        assert type(tf.Variable(1.0)).__name__ == "MirroredVariable"
    assert report.ok
    assert actions(report) == ["folded"]
    model, new = (tf.saved_model.load(str(path)) for path in (source, tmp_path / "out"))
    assert_same(model.predict, new.predict, rows(rng))


# ------------------------------------------------------------------- what cannot be seen into


def saved_with(path, function, signature=True):
    """A model with a function that runs Python code, as signature or as method."""
    root = Object()
    root.opaque = traced(function)
    plain = traced(lambda x: {"y": x + 1.0})
    signatures = {"serving_default": root.opaque if signature else plain}
    tf.saved_model.save(root, str(path), signatures)
    return mbn.rewrite_saved_model(path, "", "fold", dry_run=True)


def called_in_python(x):
    return tf.ensure_shape(tf.numpy_function(np.square, [x], tf.float32), x.shape)


@pytest.mark.parametrize(
    ("function", "signature", "who"),
    [
        (called_in_python, True, "'serving_default' and 'opaque("),
        (lambda x: tf.while_loop(lambda y: False, called_in_python, [x])[0], False, "'opaque("),
    ],
    ids=["signature", "loop_of_a_method"],
)
def test_what_cannot_be_seen_into_is_told(function, signature, who, tmp_path):
    report = saved_with(tmp_path / "in", function, signature)
    (note,) = (n for n in report.plan.notes if "cannot be seen into" in n)
    assert note.startswith(who)
    assert "PyFunc" in note
    assert note in str(report)
    assert note in report.to_dict()["plan"]["notes"]
    assert "the model has no BatchNormalization" not in str(report)


def test_nothing_is_told_of_what_can_be_seen_into(source):
    report = mbn.rewrite_saved_model(source, "", "fold", dry_run=True)
    assert report.plan.notes == ()


# Operations by their attributes, and what is said of them.
OPAQUE = {
    "XlaCallModule": (
        'attr { key: "version" value { i: 9 } } attr { key: "module" value { s: "" } } '
        'attr { key: "Tin" value { list { type: DT_FLOAT } } } '
        'attr { key: "Tout" value { list { type: DT_FLOAT } } } '
        'attr { key: "Sout" value { list { shape { dim { size: 2 } } } } }',
        "JAX",
    ),
    "TPUExecute": (
        'input: "key" attr { key: "Targs" value { list { type: DT_FLOAT } } } '
        'attr { key: "Tresults" value { list { type: DT_FLOAT } } }',
        "TPUs",
    ),
    "EagerPyFunc": (
        'attr { key: "token" value { s: "f" } } attr { key: "is_async" value { b: false } } '
        'attr { key: "Tin" value { list { type: DT_FLOAT } } } '
        'attr { key: "Tout" value { list { type: DT_FLOAT } } }',
        "Python code",
    ),
}


@pytest.mark.parametrize("kind", OPAQUE)
def test_kinds_of_what_cannot_be_seen_into(kind):
    """On graphs alone: most of them run on some machines only."""
    attributes, words = OPAQUE[kind]
    graph_def = text_format.Parse(
        'node { name: "x" op: "Placeholder" attr { key: "dtype" value { type: DT_FLOAT } } }'
        'node { name: "key" op: "Placeholder" attr { key: "dtype" value { type: DT_STRING } } }'
        f'node {{ name: "y" op: "{kind}" input: "x" {attributes} }}',
        graph_pb2.GraphDef(),
    )
    with tf.Graph().as_default() as graph:
        tf.graph_util.import_graph_def(graph_def, name="")
    seen = [
        FunctionGraph(name, graph_def, graph, False, ("x",), ("y:0",), {}, {}) for name in "abcde"
    ]
    (note,) = notes_on(seen)
    assert note.startswith(f"'a', 'b', 'c' and 2 more run {kind}: ")
    assert words in note


def test_plan_with_notes_does_not_say_that_there_is_none():
    assert "the model has no BatchNormalization" in Plan("fold", ()).summary
    assert "no BatchNormalization can be seen" in Plan("fold", (), notes=("A note.",)).summary


def test_shapes_of_outputs_may_become_known(tmp_path):
    network = saved_models.Network()
    network.table = tf.lookup.experimental.MutableHashTable(tf.int64, tf.float32, 0.0)

    @tf.function(input_signature=[saved_models.image_spec()])
    def serve(image):
        return {"found": network.table.lookup(tf.argmax(network.scores(image), -1))}

    assert serve.get_concrete_function().structured_outputs["found"].shape.rank is None
    tf.saved_model.save(network, str(tmp_path / "in"), {"serve": serve})
    assert mbn.rewrite_saved_model(tmp_path / "in", tmp_path / "out", "fold").ok


@pytest.mark.parametrize(
    ("name", "original", "new", "kept"),
    [
        ("output y", spec(None, 3), spec(2, 3), True),
        ("output y", spec(2, 3), spec(None, 3), False),
        ("output y", spec(None, 3), spec(None, 4), False),
        ("output y", spec(None, 3), spec(None, 3, dtype=tf.float16), False),
        ("input x", spec(None, 3), spec(2, 3), False),
        ("input x", spec(None, 3), spec(None, 3), True),
    ],
)
def test_interfaces_stay_as_they_are_for_who_is_served(name, original, new, kept):
    assert served._keeps({name: original}, {name: new}) == kept

"""Functions that compute the same are found, whatever their operations are called."""

import numpy as np
import pytest
import tensorflow as tf

from mbn_rewrite.frontends.saved_model.fingerprints import fingerprint
from mbn_rewrite.frontends.saved_model.function_graph import function_graph_of

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


def test_calls_that_go_on_from_each_other_have_none():
    def drawn(x):
        return x + tf.random.uniform([3])

    def counted(x):
        return x + FACTOR.assign_add(tf.ones([3]))

    assert taken(drawn) is taken(counted) is None

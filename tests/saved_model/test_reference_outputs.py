"""The original is loaded no more often than its outputs need."""

import numpy as np
import pytest
import tensorflow as tf

from mbn_rewrite.frontends.saved_model import source

pytestmark = pytest.mark.slow
ONES = np.ones([2, 3], np.float32)


class Model(tf.Module):
    def __init__(self):
        super().__init__()
        self.kernel, self.count = tf.Variable(3 * tf.eye(3)), tf.Variable(0.0)


def checked(model, x):
    tf.debugging.assert_less(x, 1e6)
    return x


def counted(model, x):
    model.count.assign_add(1.0)
    return x + model.count


def drawn(model, x):
    """The numbers go on from call to call, and a loop is a function of its own."""
    start = (0, tf.zeros([3]))
    _, sums = tf.while_loop(
        lambda i, _: i < 2,
        lambda i, sums: (i + 1, sums + tf.random.uniform([3], seed=3)),
        start,
    )
    return x + sums


@pytest.mark.parametrize(("change", "loaded"), [(checked, 1), (counted, 3), (drawn, 3)])
def test_what_differs_from_call_to_call_is_loaded_again(tmp_path, monkeypatch, change, loaded):
    """Inputs are found on one copy and used on another; a check of them changes nothing."""
    model = Model()

    @tf.function(input_signature=[tf.TensorSpec([None, 3], name="x")])
    def function(x):
        return {"scores": tf.math.log(change(model, x)) @ model.kernel}

    tf.saved_model.save(model, str(tmp_path), signatures={"a": function})
    loads = loading(monkeypatch)
    found = source.SavedModelDirectory(tmp_path, None, None).reference_io(None)["a"]
    assert len(loads) == loaded
    fresh = tf.saved_model.load(str(tmp_path)).signatures["a"](**found.inputs)
    np.testing.assert_allclose(found.outputs["scores"], fresh["scores"], rtol=1e-5, atol=1e-6)


def test_what_could_not_be_read_is_loaded_again(tmp_path, monkeypatch):
    """Nobody knows what it changes."""
    model = Model()
    function = tf.function(lambda x: {"scores": x @ model.kernel})
    signature = function.get_concrete_function(tf.TensorSpec([None, 3], name="x"))
    tf.saved_model.save(model, str(tmp_path), signatures={"a": signature})

    def unreadable(*_, **__):
        raise ValueError("it is unreadable")

    monkeypatch.setattr(source, "function_graph_of", unreadable)
    loads = loading(monkeypatch)
    opened = source.SavedModelDirectory(tmp_path, None, None)
    assert list(opened.as_it_was) == ["a"]
    opened.reference_io({"x": ONES})
    assert len(loads) == 3


def loading(monkeypatch):
    """A list of all loads from now on."""
    loads, load = [], source.load

    def noted(*arguments):
        loads.append(arguments)
        return load(*arguments)

    monkeypatch.setattr(source, "load", noted)
    return loads

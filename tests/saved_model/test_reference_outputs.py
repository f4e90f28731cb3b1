"""The original is loaded and run no more often than its outputs need.

So it is with signatures that call one function, as those that Keras 3 exports.
"""

import numpy as np
import pytest
import tensorflow as tf

from mbn_rewrite.frontends.saved_model import source

pytestmark = pytest.mark.slow
ONES, TWOS = np.ones([2, 3], np.float32), np.full([2, 3], 2, np.float32)


class Model(tf.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = (tf.Variable(tf.eye(3) * factor) for factor in (3.0, 5.0))

    def serve(self, variable="first", number=1.0, output="scores"):
        @tf.function(input_signature=[tf.TensorSpec([None, 3], name="x")])
        def function(x):
            return {output: number * (x @ getattr(self, variable))}

        return function


@pytest.fixture
def calls(monkeypatch):
    """Names of the signatures that are called."""
    names, call = [], source.signature_reference

    def noted(name, *rest):
        names.append(name)
        return call(name, *rest)

    monkeypatch.setattr(source, "signature_reference", noted)
    return names


@pytest.mark.parametrize(
    ("inputs", "called"),
    [
        (None, ["a"]),
        ({"x": ONES}, ["a"]),
        ({"a/x": ONES, "b/x": TWOS}, ["a", "b"]),
        ({"a/x": ONES}, ["a", "b"]),
    ],
    ids=["made up", "given", "each its own", "one of them"],
)
def test_one_function_is_run_once_for_the_same_inputs(tmp_path, calls, inputs, called):
    model = Model()
    function = model.serve()
    tf.saved_model.save(model, str(tmp_path), signatures={"a": function, "b": function})
    found = source.SavedModelDirectory(tmp_path, None, None).reference_io(inputs)
    assert calls == called
    for reference in (found["a"], found["b"]):
        np.testing.assert_array_equal(reference.outputs["scores"], 3 * reference.inputs["x"])


@pytest.mark.parametrize(
    "other",
    [{"variable": "second"}, {"number": 2.0}, {"output": "logits"}],
    ids=["variable", "constant", "name"],
)
def test_what_differs_is_run(tmp_path, calls, other):
    model = Model()
    model.functions = [model.serve(), model.serve(**other)]
    signatures = dict(zip("ab", model.functions, strict=True))
    tf.saved_model.save(model, str(tmp_path), signatures=signatures)
    found = source.SavedModelDirectory(tmp_path, None, None).reference_io(None)
    assert calls == ["a", "b"]
    assert list(found["b"].outputs) == [other.get("output", "scores")]


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
    model.count = tf.Variable(0.0)

    @tf.function(input_signature=[tf.TensorSpec([None, 3], name="x")])
    def function(x):
        return {"scores": tf.math.log(change(model, x)) @ model.first}

    tf.saved_model.save(model, str(tmp_path), signatures={"a": function})
    loads = loading(monkeypatch)
    found = source.SavedModelDirectory(tmp_path, None, None).reference_io(None)["a"]
    assert len(loads) == loaded
    fresh = tf.saved_model.load(str(tmp_path)).signatures["a"](**found.inputs)
    np.testing.assert_allclose(found.outputs["scores"], fresh["scores"], rtol=1e-5, atol=1e-6)


def test_what_could_not_be_read_is_loaded_again(tmp_path, monkeypatch):
    """Nobody knows what it changes."""
    model = Model()
    tf.saved_model.save(model, str(tmp_path), signatures={"a": model.serve()})

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

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


@pytest.mark.parametrize(("changes", "loaded"), [(False, 1), (True, 3)])
def test_only_what_changes_state_is_loaded_again(tmp_path, monkeypatch, changes, loaded):
    """Inputs are found on one copy and used on another; a check of them changes nothing."""
    model = Model()
    model.count = tf.Variable(0.0)

    @tf.function(input_signature=[tf.TensorSpec([None, 3], name="x")])
    def function(x):
        tf.debugging.assert_less(x, 1e6)
        if changes:
            model.count.assign_add(1.0)
        return {"scores": x @ model.first + model.count}

    tf.saved_model.save(model, str(tmp_path), signatures={"a": function})
    loads, load = [], source.load

    def counted(*arguments):
        loads.append(arguments)
        return load(*arguments)

    monkeypatch.setattr(source, "load", counted)
    found = source.SavedModelDirectory(tmp_path, None, None).reference_io({"x": ONES})
    assert len(loads) == loaded
    np.testing.assert_array_equal(found["a"].outputs["scores"], 3 * ONES + float(changes))

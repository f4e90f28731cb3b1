"""The original is loaded and run no more often than its outputs need.

So it is with signatures and methods that call one function, as those that Keras exports.
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
    """Names of the signatures and methods that are called."""
    names, signature, method = [], source.signature_reference, source.method_reference

    def noted(name, *rest):
        names.append(name)
        return signature(name, *rest)

    def method_noted(entry, *rest):
        names.append(entry.method)
        return method(entry, *rest)

    monkeypatch.setattr(source, "signature_reference", noted)
    monkeypatch.setattr(source, "method_reference", method_noted)
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


class WithMethod(Model):
    """A method and a signature `serve`, which differ as a test wants it.

    Args:
        method: gives the method's output for the model and its two inputs.
        signature: the same for the signature, if it has a function of its own.
        names: the names of the signature's inputs, in the order of the method's.
    """

    def __init__(self, method, signature=None, names=("a", "b")):
        super().__init__()
        specs = [tf.TensorSpec([None, 3])] * 2
        self.serve = tf.function(lambda x, y: method(self, x, y), input_signature=specs)
        body = self.serve if signature is None else lambda x, y: signature(self, x, y)

        def of_signature(**inputs):
            return {"scores": body(*(inputs[name] for name in names))}

        named = {name: tf.TensorSpec([None, 3], name=name) for name in names}
        self.signature = tf.function(of_signature).get_concrete_function(**named)

    def opened(self, directory):
        tf.saved_model.save(self, str(directory), signatures={"serve": self.signature})
        return source.SavedModelDirectory(directory, None, None)


def difference(model, x, y):
    tf.debugging.assert_less(x, 1e6)
    return (x - y) @ model.first


@pytest.mark.parametrize(("names", "called"), [("ab", 1), ("ba", 2)])
def test_a_method_that_calls_the_function_of_a_signature_is_not_run(tmp_path, calls, names, called):
    """Signatures have their inputs in the order of the alphabet, methods in their own."""
    opened = WithMethod(difference, names=tuple(names)).opened(tmp_path)
    found = opened.reference_io({"a": ONES, "b": TWOS})
    assert len(calls) == called
    signature, (method,) = found.pop("serve"), found.values()
    (x, y), keywords = method.inputs
    assert (method.method, keywords) == ("serve", {})
    np.testing.assert_array_equal(method.outputs["0"], 3 * (x - y))
    if called == 1:
        np.testing.assert_array_equal(signature.outputs["scores"], method.outputs["0"])


@pytest.mark.parametrize(
    "signature",
    [
        lambda model, x, y: (y - x) @ model.first,
        lambda model, x, y: (x - y) @ model.second,
        lambda model, x, y: 2.0 * (x - y) @ model.first,
        lambda model, x, y: tf.nn.relu((x - y) @ model.first),
        lambda model, x, y: tf.while_loop(
            lambda i, _: i < 2, lambda i, z: (i + 1, z - y), (0, x @ model.first)
        )[1],
    ],
    ids=["order", "variable", "constant", "operation", "loop"],
)
def test_a_method_that_computes_something_else_is_run(tmp_path, calls, signature):
    def method(model, x, y):
        return (x - y) @ model.first

    found = WithMethod(method, signature).opened(tmp_path).reference_io(None)
    assert calls == ["serve", "serve"]
    (reference,) = (call for call in found.values() if call.method)
    x, y = reference.inputs[0]
    np.testing.assert_allclose(reference.outputs["0"], 3 * (x - y), rtol=1e-5)


def looped(by):
    def method(model, x, y):
        def body(i, z):
            return i + 1, z - by * y

        return tf.while_loop(lambda i, _: i < 2, body, (0, x @ model.first))[1]

    return method


def test_loops_with_other_bodies_differ(tmp_path, calls):
    WithMethod(looped(1.0), looped(2.0)).opened(tmp_path).reference_io(None)
    assert calls == ["serve", "serve"]


def test_methods_of_several_functions_are_run(tmp_path, calls):
    """The method picks one of them by its arguments."""
    model = Model()

    @tf.function
    def serve(x, doubled=False):
        return (2.0 if doubled else 1.0) * (x @ model.first)

    model.serve = serve
    spec = tf.TensorSpec([None, 3], name="x")
    for doubled in (False, True):
        serve.get_concrete_function(spec, doubled)
    signature = serve.get_concrete_function(spec)
    tf.saved_model.save(model, str(tmp_path), signatures={"a": signature})
    found = source.SavedModelDirectory(tmp_path, None, None).reference_io(None)
    assert calls == ["a", "serve", "serve"]
    for name, call in found.items():
        x = call.inputs["x"] if name == "a" else call.inputs[0][0]
        (output,) = call.outputs.values()
        factor = 6 if "True" in name else 3
        np.testing.assert_allclose(output, factor * x, rtol=1e-5)


def test_a_method_that_gives_infinity_is_noted_without_a_call(tmp_path, calls):
    def divided(model, x, y):
        return x / (y * 0.0) + model.first[0]

    opened = WithMethod(divided).opened(tmp_path)
    assert list(opened.reference_io({"a": ONES, "b": TWOS})) == ["serve"]
    assert calls == ["serve"]
    assert [why for name, why in opened.unverifiable.items() if name.startswith("serve(")] == [
        "it gives NaN or infinity for made-up inputs"
    ]


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

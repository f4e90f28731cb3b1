"""What must hold of any rewrite, shared by the suite and the fuzzer."""

from __future__ import annotations

import numpy as np
import tensorflow as tf

import mbn_rewrite as mbn
from mbn_rewrite.comparison import Comparison, compare_outputs, tolerance_for
from mbn_rewrite.frontends.execution import called
from mbn_rewrite.passes.fold import NOTHING_LEFT
from mbn_rewrite.plans import Plan
from tests.support.kerases import compute_dtypes, names, norms, variables


def outputs(model, inputs, compiled=False):
    """All outputs of a model at inference, as arrays."""

    def function(data):
        return model(data, training=False)

    if compiled:
        function = tf.function(function, jit_compile=True, autograph=False)
    return called(function, inputs, "the model")


def check_rewrites(model, inputs, modes, compiled=False) -> None:
    """Converts a model in each mode and asserts everything that must hold."""
    expected = outputs(model, inputs, compiled)
    for mode in modes:
        _check_rewrite(model, inputs, mode, compiled, expected)


def check_rewrite(model, inputs, mode, compiled=False) -> Comparison:
    """Converts a model and asserts everything that must hold; returns the comparison."""
    return _check_rewrite(model, inputs, mode, compiled, outputs(model, inputs, compiled))


def _check_rewrite(model, inputs, mode, compiled, expected) -> Comparison:
    expected = list(expected)
    before = model.get_weights()
    config = model.get_config()

    # What follows is a stricter check than convert's own.
    new, plan = mbn.convert_with_plan(model, mode, check=False)

    assert len(plan.decisions) == len(norms(model)), "a BatchNormalization without decision"
    assert len({d.name for d in plan.decisions}) == len(plan.decisions)
    for decision in plan.decisions:
        said = ("a layer that stands for it", "clips with bounds by channel", NOTHING_LEFT)
        explained = decision.action == "kept" or any(part in decision.reason for part in said)
        assert bool(decision.reason) == explained, decision
        absorbed = decision.action != "kept" and decision.reason != NOTHING_LEFT
        assert bool(decision.into) == absorbed, decision
    assert len(norms(new)) == plan.left, "another number of BatchNormalizations than planned"
    assert names(new) == names(model)
    assert [t.shape for t in new.outputs] == [t.shape for t in model.outputs]
    assert [t.dtype for t in new.outputs] == [t.dtype for t in model.outputs]

    results = outputs(new, inputs, compiled)
    for number, array in enumerate(expected):  # finite wherever the original is
        if array.dtype.kind == "f" and not np.all(np.isfinite(array)):
            assert np.all(np.isfinite(results[number][np.isfinite(array)]))
            expected[number] = results[number] = np.zeros(1)
    comparison = compare_outputs(expected, results, tolerance_for(compute_dtypes(model)))
    assert comparison.ok, f"{comparison}\n{plan}"
    for old, now in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, now, "the original was changed")
    assert model.get_config() == config, "the original was changed"
    return comparison


def save_with_signature(model, inputs, directory) -> dict[str, np.ndarray]:
    """Writes a model as a plain tf.Module with one signature; returns its inputs by name."""
    flat = tf.nest.flatten(inputs)
    given = {f"input_{i}": tensor for i, tensor in enumerate(flat)}

    def serve(**tensors):
        structure = tf.nest.pack_sequence_as(inputs, [tensors[name] for name in given])
        outputs = tf.nest.flatten(model(structure, training=False))
        return {f"output_{i}": output for i, output in enumerate(outputs)}

    specs = {
        name: tf.TensorSpec([None, *tensor.shape[1:]], tensor.dtype, name=name)
        for name, tensor in given.items()
    }
    module = tf.Module()
    # Not the model itself: Keras would trace each of its layers anew, for hundreds of functions.
    module.held = variables(model)
    function = tf.function(serve, autograph=False).get_concrete_function(**specs)
    tf.saved_model.save(module, str(directory), signatures=function)
    return {name: np.asarray(tensor) for name, tensor in given.items()}


def check_saved_rewrites(model, inputs, directory, modes) -> dict[str, Plan]:
    """Rewrites a model through a SavedModel in each mode and asserts everything that must hold.

    Returns the plans by mode; none where the original gives NaN or infinity on these inputs.
    """
    given = save_with_signature(model, inputs, directory / "in")
    owner = tf.saved_model.load(str(directory / "in"))  # holds the variables
    original = owner.signatures["serving_default"]
    tensors = {name: tf.constant(array) for name, array in given.items()}
    names = sorted(original.structured_outputs)
    expected = called(lambda data: [original(**data)[name] for name in names], tensors, "it")
    if not all(np.all(np.isfinite(array)) for array in expected):
        return {}
    return {mode: _check_saved_rewrite(directory, original, given, mode) for mode in modes}


def _check_saved_rewrite(directory, original, given, mode) -> Plan:
    destination = directory / mode
    report = mbn.rewrite_saved_model(directory / "in", destination, mode, inputs=given)
    assert report.ok
    plan = report.plan
    for decision in plan.decisions:
        # Mode "auto" also says why what it put something else in the place of did not fold.
        unexplained = decision.action == "folded" or (mode != "auto" and decision.action != "kept")
        assert bool(decision.reason) != unexplained, decision
        assert bool(decision.into) == (decision.action != "kept"), decision
    written = tf.saved_model.load(str(destination)).signatures["serving_default"]
    assert written.structured_input_signature == original.structured_input_signature
    assert written.structured_outputs == original.structured_outputs
    return plan

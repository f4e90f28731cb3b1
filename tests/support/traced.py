"""Keras models as SavedModels hold them: as the graph of a function, without a disk between."""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from mbn_rewrite.frontends.saved_model import writer
from mbn_rewrite.frontends.saved_model.function_graph import Writes, function_graph_of
from mbn_rewrite.frontends.saved_model.reader import read
from mbn_rewrite.frontends.saved_model.saving import imported
from mbn_rewrite.passes.planner import make_plan
from mbn_rewrite.plans import Plan
from tests.support.kerases import input_structure


def folded(model, data) -> tuple[Plan, list[np.ndarray], list[np.ndarray]]:
    """Folds the function of a model that it is exported as, open in the number of examples.

    Args:
        model: a Functional model.
        data: inputs for it.

    Returns:
        The plan, what the function gives for the inputs, and what it gives once it is folded.
    """
    structure = input_structure(model)
    specs = [tf.TensorSpec(tensor.shape, tensor.dtype) for tensor in model.inputs]

    def serve(*tensors):
        given = tf.nest.pack_sequence_as(structure, tensors)
        return tf.nest.flatten(model(given, training=False))

    function = tf.function(serve, autograph=False).get_concrete_function(*specs)
    graph = function_graph_of("serve", function, lambda name: None, look_inside=True)
    writes = Writes.of(graph)
    reading = read([graph], writes)
    plan = make_plan(reading.graph, "fold")
    (new,) = writer.rewritten([graph], reading, plan, writes, copies={})
    tensors = tf.nest.flatten(data)
    specs = [tf.TensorSpec(tensor.shape, tensor.dtype) for tensor in tensors]
    run = tf.compat.v1.wrap_function(lambda *given: imported(new, None, list(given)), specs)
    before, after = function(*tensors), run(*tensors)
    return plan, [np.asarray(t) for t in before], [np.asarray(t) for t in after]

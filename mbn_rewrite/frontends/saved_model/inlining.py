"""Flat graphs of the functions of a SavedModel: calls inlined, dead branches removed.

Calls that have to stay calls are loops, branches that are decided while the model runs, and
functions that TensorFlow replaces by device (GRU and LSTM). Functions compiled by XLA in the midst
of others are opened where they are to be read; see `compiled_parts`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import tensorflow as tf
from tensorflow.core.framework.graph_pb2 import GraphDef
from tensorflow.core.framework.tensor_shape_pb2 import TensorShapeProto
from tensorflow.core.protobuf import config_pb2, meta_graph_pb2
from tensorflow.python.grappler import tf_optimizer
from tensorflow.python.training.saver import export_meta_graph

from mbn_rewrite.frontends.saved_model.branches import (
    conditions_in,
    decide_branches,
    decide_switches,
    defaults_in,
)
from mbn_rewrite.frontends.saved_model.compiled_parts import CALLS, COMPILED, is_marked, opened

# Operations that may stand beside a call that XLA compiles, and be compiled with it.
_EMPTY = {"Placeholder", "Identity", "NoOp", "Const", "ReadVariableOp"}
# Larger tensors that are captured are not copied into graphs.
_MOST_CAPTURED = 1 << 20
# Prefix that inlining gives to the names of nodes.
_CALL = re.compile(r"^(Func/)?((Stateful)?PartitionedCall(_\d+)?)/")


class Inlined(NamedTuple):
    """The graph of a function.

    Attributes:
        graph_def: the graph.
        compiled: whether XLA must compile all of it.
        defaults: the defaults that decided branches, in words, by the names of their nodes.
    """

    graph_def: GraphDef
    compiled: bool
    defaults: dict[str, str]


def inlined(function: Any, look_inside: bool = False) -> Inlined:
    """The graph of a concrete function with its calls inlined.

    Args:
        function: a tf.ConcreteFunction.
        look_inside: whether to open what XLA compiles in the midst of others.

    Returns:
        The graph, in which inputs and outputs keep the names that they have in `function.graph`.
    """
    graph_def = function.graph.as_graph_def()
    arguments = {tensor.op.name for tensor in function.inputs}
    # Inputs that are set for good, and tensors of code.
    given = {**getattr(function, "given", {}), **_constants_captured(function)}
    for node in graph_def.node:
        if node.op == "PlaceholderWithDefault" and node.name in arguments:
            node.op = "Placeholder"  # callers always give it, so the default is not used
            del node.input[:]
        if node.name in given:
            _become_constant(node, given[node.name])
    compiled = is_marked(function.function_def, COMPILED)
    compiled = compiled or _is_compiled_whole(graph_def)
    for nodes, attributes in _bodies(graph_def):
        if attributes is not None:
            attributes.pop("_noinline", None)
            if compiled:
                attributes.pop(COMPILED, None)
            if "api_implements" in attributes:
                attributes["_noinline"].b = True
        for node in nodes:
            node.attr.pop("_noinline", None)
            node.attr.pop("_gradient_op_type", None)  # there is no way back at inference
            if compiled:
                node.attr.pop(COMPILED, None)
            if "_lower_using_switch_merge" in node.attr:
                node.attr["_lower_using_switch_merge"].b = False
    fetched = [t.name for t in function.graph.inputs + function.graph.outputs]
    # Side effects that nothing else waits for.
    fetched += [op.name for op in function.graph.control_outputs]
    graph_def = optimized(graph_def, fetched)
    defaults = defaults_in(graph_def)
    while decide_branches(graph_def, conditions_in(graph_def)):
        graph_def = optimized(graph_def, fetched)
        defaults |= defaults_in(graph_def)
    if look_inside and not compiled:
        graph_def = opened(graph_def, lambda graph: optimized(graph, fetched))
    decide_switches(graph_def, conditions_in(graph_def))
    return Inlined(graph_def, compiled, defaults)


def _constants_captured(function: Any) -> dict[str, Any]:
    """The values of tensors that a function captures, by the names of their placeholders.

    A variable, a table and the like are none, nor are tensors that are too large to be copied.
    """
    externals = function.captured_inputs
    placeholders = function.inputs[len(function.inputs) - len(externals) :]
    return {
        placeholder.op.name: external
        for placeholder, external in zip(placeholders, externals, strict=True)
        if tf.is_tensor(external)
        and not tf.is_symbolic_tensor(external)
        and (external.dtype.is_floating or external.dtype.is_integer or external.dtype.is_bool)
        and (external.shape.num_elements() or 0) <= _MOST_CAPTURED
    }


def _become_constant(node: Any, value: Any) -> None:
    node.op = "Const"
    del node.input[:]
    dtype = node.attr["dtype" if "dtype" in node.attr else "T"].type
    node.attr.clear()
    node.attr["dtype"].type = dtype
    node.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(value, dtype))


def bodies_called(graph_def: GraphDef, node: Any) -> Iterator[Any]:
    """The functions that a node calls, those that they call, and so on."""
    library = {function.signature.name: function for function in graph_def.library.function}
    pending, seen = list(called_by(node)), set()
    while pending:
        name = pending.pop()
        if name in library and name not in seen:
            seen.add(name)
            yield library[name]
            for inner in library[name].node_def:
                pending += called_by(inner)


def called_by(node: Any) -> Iterator[str]:
    """The names of all functions that a node may call, and of its operation."""
    yield node.op
    for attribute in node.attr.values():
        if attribute.HasField("func"):
            yield attribute.func.name
        yield from (function.name for function in attribute.list.func)


def display_name(name: str) -> str:
    """A node's name without the calls that it was inlined from."""
    while _CALL.match(name):
        name = _CALL.sub("", name, count=1)
    return name


def _bodies(graph_def: GraphDef) -> Iterator[tuple[Iterable[Any], Any]]:
    """The nodes of the graph and of each function, with the attributes of the function."""
    yield graph_def.node, None
    for function in graph_def.library.function:
        yield function.node_def, function.attr


def optimized(graph_def: GraphDef, fetched: list[str]) -> GraphDef:
    """Has Grappler, TensorFlow's graph optimiser, inline calls and do nothing else.

    `fetched` names the nodes and tensors to keep.

    TensorFlow has no public function for it; its own freezing of functions
    (`convert_variables_to_constants_v2`) goes the same way.
    """
    shapes = _without_shapes_of_arguments(graph_def)
    meta_graph = export_meta_graph(graph_def=graph_def, graph=tf.Graph())
    fetches = meta_graph_pb2.CollectionDef()
    fetches.node_list.value.extend(fetched)
    if not fetches.node_list.value:
        return graph_def  # it has no inputs and outputs, so no shapes either
    meta_graph.collection_def["train_op"].CopyFrom(fetches)
    config = config_pb2.ConfigProto()
    options = config.graph_options.rewrite_options
    options.min_graph_nodes = -1
    options.optimizers.append("function")
    result = tf_optimizer.OptimizeGraph(config, meta_graph)
    for left in result.library.function:
        # A note of Grappler's to itself, which TensorFlow does not load again.
        left.attr.pop("_GrapplerSpecializedFunc", None)
    for node in result.node:
        if node.name in shapes:
            node.attr["shape"].shape.CopyFrom(shapes[node.name])
    return result


def _without_shapes_of_arguments(graph_def: GraphDef) -> dict[str, Any]:
    """Takes the sizes out of the shapes of placeholders; returns the shapes by name.

    Grappler makes up a tensor for each, as large as it says: one of many gigabytes crashes it.
    """
    shapes = {}
    for node in graph_def.node:
        if node.op == "Placeholder" and "shape" in node.attr:
            shapes[node.name] = TensorShapeProto()
            shapes[node.name].CopyFrom(node.attr["shape"].shape)
            for dimension in node.attr["shape"].shape.dim:
                dimension.size = -1
    return shapes


def _is_compiled_whole(graph_def: GraphDef) -> bool:
    """Whether all that a function does is to call one that XLA compiles."""
    compiled = {
        function.signature.name
        for function in graph_def.library.function
        if is_marked(function, COMPILED)
    }
    library = {function.signature.name: function for function in graph_def.library.function}
    nodes: Iterable[Any] = graph_def.node
    while True:
        working = [node for node in nodes if node.op not in _EMPTY]
        if len(working) != 1 or working[0].op not in CALLS:
            return False
        (call,) = working
        if is_marked(call, COMPILED) or call.attr["f"].func.name in compiled:
            return True
        nodes = library[call.attr["f"].func.name].node_def

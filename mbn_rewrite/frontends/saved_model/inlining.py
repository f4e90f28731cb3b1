"""Flat graphs of the functions of a SavedModel: calls inlined, dead branches removed.

Calls that have to stay calls are loops, branches that are decided while the model runs, and
functions that TensorFlow replaces by device (GRU and LSTM). Functions compiled by XLA in the midst
of others are opened where they are to be read; see `compiled_parts`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import tensorflow as tf
from tensorflow.core.framework.graph_pb2 import GraphDef
from tensorflow.core.framework.tensor_shape_pb2 import TensorShapeProto
from tensorflow.core.protobuf import config_pb2, meta_graph_pb2
from tensorflow.python.grappler import tf_optimizer
from tensorflow.python.training.saver import export_meta_graph

from mbn_rewrite.frontends.saved_model.compiled_parts import CALLS, COMPILED, is_marked, opened

_BRANCHES = {"If", "StatelessIf"}
# Operations that may stand beside a call that XLA compiles, and be compiled with it.
_EMPTY = {"Placeholder", "Identity", "NoOp", "Const", "ReadVariableOp"}
# Prefix that inlining gives to the names of nodes.
_CALL = re.compile(r"^(Func/)?((Stateful)?PartitionedCall(_\d+)?)/")


def inlined(function: Any, look_inside: bool = False) -> tuple[GraphDef, bool]:
    """The graph of a concrete function with its calls inlined.

    Args:
        function: a tf.ConcreteFunction.
        look_inside: whether to open what XLA compiles in the midst of others.

    Returns:
        The graph, and whether XLA must compile all of it. Inputs and outputs keep the names
        that they have in `function.graph`.
    """
    graph_def = function.graph.as_graph_def()
    arguments = {tensor.op.name for tensor in function.inputs}
    for node in graph_def.node:
        if node.op == "PlaceholderWithDefault" and node.name in arguments:
            node.op = "Placeholder"  # callers always give it, so the default is not used
            del node.input[:]
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
    graph_def = _optimized(graph_def, function)
    while _decide_branches(graph_def):
        graph_def = _optimized(graph_def, function)
    if look_inside and not compiled:
        graph_def = opened(graph_def, lambda graph: _optimized(graph, function))
    _decide_switches(graph_def)
    return graph_def, compiled


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


def _optimized(graph_def: GraphDef, function: Any) -> GraphDef:
    """Has Grappler, TensorFlow's graph optimiser, inline calls and do nothing else.

    TensorFlow has no public function for it; its own freezing of functions
    (`convert_variables_to_constants_v2`) goes the same way.
    """
    shapes = _without_shapes_of_arguments(graph_def)
    meta_graph = export_meta_graph(graph_def=graph_def, graph=tf.Graph())
    fetches = meta_graph_pb2.CollectionDef()
    fetches.node_list.value.extend(t.name for t in function.graph.inputs + function.graph.outputs)
    # Side effects that nothing else waits for.
    fetches.node_list.value.extend(op.name for op in function.graph.control_outputs)
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


# ------------------------------------------------------------- branches decided beforehand


def _decide_branches(graph_def: GraphDef) -> bool:
    """Turns branches with constant conditions into calls; returns whether there were any."""
    nodes = {node.name: node for node in graph_def.node}
    decided = False
    for node in graph_def.node:
        if node.op not in _BRANCHES:
            continue
        condition = _constant_bool(nodes, node.input[0])
        if condition is None:
            continue
        branch = node.attr["then_branch" if condition else "else_branch"].func
        node.op = "PartitionedCall" if node.op == "StatelessIf" else "StatefulPartitionedCall"
        node.attr["f"].func.CopyFrom(branch)
        for name in ("Tcond", "then_branch", "else_branch", "output_shapes"):
            node.attr.pop(name, None)
        del node.input[0]
        decided = True
    return decided


def _decide_switches(graph_def: GraphDef) -> None:
    """Lets data flow past the Switch and Merge of TensorFlow 1 where they are decided.

    A Switch gives its input on output 1 where its condition is true, else on output 0; what
    reads the other output never runs. A Merge gives the input that arrives.
    """
    nodes = {node.name: node for node in graph_def.node}
    taken: dict[str, int] = {}
    for node in graph_def.node:
        if node.op in ("Switch", "RefSwitch"):
            condition = _constant_bool(nodes, node.input[1])
            if condition is not None:
                taken[node.name] = int(condition)
    if not taken:
        return
    dead = _never_run(graph_def, taken)
    for node in graph_def.node:
        live = [source for source in node.input if not _is_dead(source, dead)]
        if node.op in ("Merge", "RefMerge") and node.name not in dead:
            data = [source for source in live if not source.startswith("^")]
            indexed = any(
                _tensor(source) == (node.name, 1) for n in graph_def.node for source in n.input
            )
            if len(data) == 1 and not indexed:
                _become_identity(node, live)
        elif node.name in taken and node.name not in dead:
            _become_identity(node, [node.input[0], *(x for x in live if x.startswith("^"))])
    for node in graph_def.node:
        for i, source in enumerate(node.input):
            name, _ = _tensor(source)
            if name in taken and not source.startswith("^"):
                node.input[i] = name  # an Identity has one output
    living = [node for node in graph_def.node if node.name not in dead]
    del graph_def.node[:]
    graph_def.node.extend(living)


def _never_run(graph_def: GraphDef, taken: dict[str, int]) -> set[Any]:
    """The nodes, and (switch, output) pairs, that no run of the graph reaches."""
    dead: set[Any] = {(name, 1 - output) for name, output in taken.items()}
    grown = True
    while grown:  # in the order of the nodes mostly one pass, and one that finds no more
        grown = False
        for node in graph_def.node:
            if node.name in dead or not node.input:
                continue
            gone = [_is_dead(source, dead) for source in node.input]
            data = [g for g, s in zip(gone, node.input, strict=True) if not s.startswith("^")]
            merges = node.op in ("Merge", "RefMerge")
            if (all(data) and data) if merges else any(gone):
                dead.add(node.name)
                grown = True
    return dead


def _is_dead(source: str, dead: set[Any]) -> bool:
    name, output = _tensor(source)
    return name in dead or (name, output) in dead


def _tensor(source: str) -> tuple[str, int]:
    """A node's name and output; -1 for a control input."""
    if source.startswith("^"):
        return source[1:], -1
    name, _, output = source.partition(":")
    return name, int(output or 0)


def _become_identity(node: Any, inputs: list[str]) -> None:
    dtype = node.attr["T"].type
    inputs = [s for s in inputs if not s.startswith("^")] + [s for s in inputs if s[0] == "^"]
    node.op = "Identity"
    node.attr.clear()
    node.attr["T"].type = dtype
    del node.input[:]
    node.input.extend(inputs)


def _constant_bool(nodes: dict[str, Any], source: str) -> bool | None:
    """The value of a condition that is the same in every run, or None."""
    node = nodes.get(_tensor(source)[0])
    if node is None:
        return None
    if node.op in ("Identity", "PlaceholderWithDefault"):
        # A default that the caller replaces has become a Placeholder, see `inlined`.
        return _constant_bool(nodes, node.input[0])
    if node.op == "LogicalNot":
        inner = _constant_bool(nodes, node.input[0])
        return None if inner is None else not inner
    if node.op in ("LogicalAnd", "LogicalOr"):
        both = [_constant_bool(nodes, source) for source in node.input[:2]]
        if None in both:
            return None
        return all(both) if node.op == "LogicalAnd" else any(both)
    if node.op == "Const" and node.attr["dtype"].type == tf.bool.as_datatype_enum:
        return bool(tf.make_ndarray(node.attr["value"].tensor))
    return None

"""Functions that XLA compiles in the midst of others: opened to be read, closed to be written.

Keras calls convolutions in groups so, for which TensorFlow has no kernel everywhere. Their nodes
are inlined like those of other calls, and marked. What is marked alike is written as one compiled
function again, with all that was put in between.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import tensorflow as tf
from tensorflow.core.framework import node_def_pb2
from tensorflow.core.framework.function_pb2 import FunctionDef
from tensorflow.core.framework.graph_pb2 import GraphDef
from tensorflow.python.framework import op_def_registry

CALLS = {"PartitionedCall", "StatefulPartitionedCall"}
COMPILED = "_XlaMustCompile"
# Attribute of nodes: the name of the call that they were inlined from.
_MARK = "_compiled_in"
# Stateful operations that XLA runs wherever they are read.
_READS = {"ReadVariableOp", "ResourceGather", "ResourceGatherNd", "VariableShape", "NoOp"}
_FRAMES = {"Switch", "Merge", "Enter", "Exit", "NextIteration"}
_NUMBERS = itertools.count()  # of functions: TensorFlow keeps them by name


def is_marked(node_or_function: Any, attribute: str) -> bool:
    """Whether an attribute is there, and true."""
    # Reading an entry that is not there would make an empty one.
    return attribute in node_or_function.attr and bool(node_or_function.attr[attribute].b)


# ----------------------------------------------------------------------------------- reading


def opened(graph_def: GraphDef, inline: Callable[[GraphDef], GraphDef]) -> GraphDef:
    """A flat graph with the functions inlined that XLA compiles, and their nodes marked.

    Those that write to variables, or have control flow of TensorFlow 1, stay calls.

    Args:
        graph_def: the graph, which is changed.
        inline: gives a graph with its calls inlined.
    """
    library = {function.signature.name: function for function in graph_def.library.function}
    calls = [node for node in graph_def.node if _can_be_opened(node, library)]
    if not calls:
        return graph_def
    before = {node.name for node in graph_def.node}
    names = {called: f"{called}_opened" for call in calls for called in _reached(call, library)}
    for call in calls:
        call.attr.pop(COMPILED, None)
        call.attr["f"].func.name = names[call.attr["f"].func.name]
    for name, new_name in names.items():
        _add_opened(graph_def, library[name], new_name, names)
    marks = {call.name: call.name.encode() for call in calls}
    result = inline(graph_def)
    _mark(result, before, marks)
    return result


def _mark(graph_def: GraphDef, known: set[str], marks: dict[str, bytes]) -> None:
    """Marks what was inlined from calls.

    Args:
        graph_def: the graph, which is changed.
        known: the nodes that were there before.
        marks: calls, each with the mark of what is inlined from it.
    """
    innermost_first = sorted(marks, key=len, reverse=True)
    for node in graph_def.node:
        if node.name not in known:
            for call in innermost_first:
                if node.name.startswith(f"{call}/"):
                    node.attr[_MARK].s = marks[call]
                    break


def marked_like(before: GraphDef, after: GraphDef) -> GraphDef:
    """A graph with calls inlined whose nodes are marked as the calls were.

    Args:
        before: the graph with the calls.
        after: the graph without them, which is changed.
    """
    marks = {node.name: node.attr[_MARK].s for node in before.node if _MARK in node.attr}
    _mark(after, {node.name for node in before.node}, marks)
    return after


def _can_be_opened(node: Any, library: dict[str, Any]) -> bool:
    """Whether a node calls a function that XLA compiles and that only computes."""
    if node.op not in CALLS:
        return False
    function = library[node.attr["f"].func.name]
    if not is_marked(node, COMPILED) and not is_marked(function, COMPILED):
        return False
    return all(
        _computes(inner)
        for name in _reached(node, library)
        for inner in library[name].node_def
        if inner.op not in library
    )


def _computes(node: Any) -> bool:
    if node.op in CALLS | _READS:
        return True
    definition = op_def_registry.get(node.op)
    return definition is not None and not definition.is_stateful and node.op not in _FRAMES


def _reached(node: Any, library: dict[str, Any]) -> list[str]:
    """The functions that a node calls, those that they call, and so on."""
    found: dict[str, None] = {}
    pending = [name for name in _called(node) if name in library]
    while pending:
        name = pending.pop()
        if name not in found:
            found[name] = None
            inner = [called for node in library[name].node_def for called in _called(node)]
            pending += [called for called in inner if called in library]
    return list(found)


def _called(node: Any) -> Iterator[str]:
    yield node.op
    for attribute in node.attr.values():
        for function in (attribute.func, *attribute.list.func):
            yield function.name


def _add_opened(graph_def: GraphDef, function: Any, name: str, names: dict[str, str]) -> None:
    """Adds a copy of a function that is inlined, and calls only others of the kind."""
    new = graph_def.library.function.add()
    new.CopyFrom(function)
    new.signature.name = name
    for attribute in (COMPILED, "_noinline"):
        new.attr.pop(attribute, None)
    for node in new.node_def:
        node.op = names.get(node.op, node.op)
        for attribute in (COMPILED, "_noinline"):
            node.attr.pop(attribute, None)
        for value in node.attr.values():
            for called in (value.func, *value.list.func):
                if called.name in names:
                    called.name = names[called.name]


# ----------------------------------------------------------------------------------- writing


def closed(graph_def: GraphDef, results: Iterable[str]) -> tuple[GraphDef, list[str]]:
    """A graph with what is marked in functions that XLA compiles.

    Args:
        graph_def: a flat graph.
        results: the tensors that it gives.

    Returns:
        The graph, and its results.
    """
    results = list(results)
    marks = {
        node.name: node.attr[_MARK].s.decode() for node in graph_def.node if _MARK in node.attr
    }
    if not marks:
        return graph_def, results
    graph = tf.Graph()
    with graph.as_default():
        tf.graph_util.import_graph_def(graph_def, name="")
    read = _readers(graph)
    moved: dict[str, str] = {}  # tensor -> the output of a call that gives it now
    calls: dict[str, str] = {}  # node -> the call that it is in
    added = []
    for mark in dict.fromkeys(marks.values()):
        part = _Part(graph, read, {name for name, call in marks.items() if call == mark}, results)
        name = _free(mark, {node.name for node in graph_def.node} - set(part.members))
        function = part.function(f"__compiled_{next(_NUMBERS)}_{mark.replace('/', '_')}")
        graph_def.library.function.append(function)
        added.append(part.call(name, function))
        moved |= {t.name: f"{name}:{i}" for i, t in enumerate(part.outputs)}
        calls |= dict.fromkeys(part.members, name)
    kept = [node for node in graph_def.node if node.name not in calls] + added
    del graph_def.node[:]
    for node in kept:
        _redirect(node, moved, calls)
    graph_def.node.extend(kept)
    return graph_def, [moved.get(name, name) for name in results]


def _readers(graph: Any) -> dict[str, list[Any]]:
    """Node -> the operations that read it or wait for it."""
    readers: dict[str, list[Any]] = {op.name: [] for op in graph.get_operations()}
    for op in graph.get_operations():
        for name in {*(t.op.name for t in op.inputs), *(c.name for c in op.control_inputs)}:
            readers[name].append(op)
    return readers


def _free(name: str, taken: set[str]) -> str:
    result, number = name, 1
    while result in taken:
        result, number = f"{name}_{number}", number + 1
    return result


def _redirect(node: Any, moved: dict[str, str], calls: dict[str, str]) -> None:
    """Has a node read, and wait for, calls in place of what is in them now."""
    inputs: dict[str, None] = {}
    data = []
    for source in node.input:
        if source.startswith("^"):
            name = calls.get(source[1:], source[1:])
            if name != node.name:
                inputs[f"^{name}"] = None
        else:
            tensor = source if ":" in source else f"{source}:0"
            data.append(moved.get(tensor, source))
    node.input[:] = [*data, *inputs]


class _Part:
    """The part of a graph that is to be one function.

    Args:
        graph: the graph.
        readers: as `_readers` gives it.
        marked: the names of the nodes that are marked.
        results: the tensors that the graph gives.

    Attributes:
        members: the names of its nodes, which are those and all on the way from one to another.
        inputs, outputs: the tensors that it reads and gives.
    """

    def __init__(
        self, graph: Any, readers: dict[str, list[Any]], marked: set[str], results: list[str]
    ) -> None:
        starts = [graph.get_operation_by_name(name) for name in marked]
        before = _walked(starts, lambda op: [t.op for t in op.inputs] + list(op.control_inputs))
        after = _walked(starts, lambda op: readers[op.name])
        members = marked | (before & after)
        members |= {
            name
            for name in before - members
            if graph.get_operation_by_name(name).type == "Const"
            and all(reader.name in members for reader in readers[name])
            and f"{name}:0" not in results
        }
        self.members = members
        self._ops = [op for op in graph.get_operations() if op.name in members]
        self.inputs = list(
            {t.name: t for op in self._ops for t in op.inputs if t.op.name not in members}.values()
        )
        self.outputs = [
            tensor
            for op in self._ops
            for tensor in op.outputs
            if tensor.name in results or any(c.name not in members for c in tensor.consumers())
        ]

    def function(self, name: str) -> FunctionDef:
        """It as a function, which XLA compiles."""
        function = FunctionDef()
        function.signature.name = name
        function.signature.is_stateful = any(op.op_def.is_stateful for op in self._ops)
        names: dict[str, str] = {}
        for i, tensor in enumerate(self.inputs):
            names[tensor.name] = f"in_{i}"
            function.signature.input_arg.add(name=f"in_{i}", type=_type_of(tensor))
        for op in self._ops:
            names |= zip((t.name for t in op.outputs), _names_in_function(op), strict=True)
        for op in self._ops:
            node = function.node_def.add()
            node.CopyFrom(op.node_def)
            node.attr.pop(_MARK, None)
            waits = [c.name for c in op.control_inputs if c.name in self.members]
            node.input[:] = [*(names[t.name] for t in op.inputs), *(f"^{name}" for name in waits)]
        for i, tensor in enumerate(self.outputs):
            function.signature.output_arg.add(name=f"out_{i}", type=_type_of(tensor))
            function.ret[f"out_{i}"] = names[tensor.name]
        function.attr[COMPILED].b = True
        function.attr["_noinline"].b = True
        return function

    def call(self, name: str, function: FunctionDef) -> Any:
        """The node that calls it."""
        kind = "StatefulPartitionedCall" if function.signature.is_stateful else "PartitionedCall"
        node = node_def_pb2.NodeDef(name=name, op=kind, input=[t.name for t in self.inputs])
        waits = {c.name for op in self._ops for c in op.control_inputs} - self.members
        node.input.extend(f"^{name}" for name in sorted(waits))
        node.attr["Tin"].list.type.extend(_type_of(tensor) for tensor in self.inputs)
        node.attr["Tout"].list.type.extend(_type_of(tensor) for tensor in self.outputs)
        node.attr["f"].func.name = function.signature.name
        for attribute in ("config", "config_proto", "executor_type"):
            node.attr[attribute].s = b""
        node.attr[COMPILED].b = True
        node.attr["_output_shapes"].list.shape.extend(t.shape.as_proto() for t in self.outputs)
        return node


def _walked(starts: list[Any], following: Callable[[Any], list[Any]]) -> set[str]:
    """The names of all operations that are reached from some, without these."""
    seen: set[str] = set()
    pending = [after for op in starts for after in following(op)]
    while pending:
        op = pending.pop()
        if op.name not in seen:
            seen.add(op.name)
            pending += following(op)
    return seen


def _type_of(tensor: Any) -> int:
    return int(tensor.dtype.base_dtype.as_datatype_enum)


def _names_in_function(op: Any) -> Iterator[str]:
    """The names of an operation's outputs in functions: by argument, such as "op:y:0"."""
    for argument in op.op_def.output_arg:
        count = 1
        if argument.number_attr:
            count = op.get_attr(argument.number_attr)
        elif argument.type_list_attr:
            count = len(op.get_attr(argument.type_list_attr))
        yield from (f"{op.name}:{argument.name}:{i}" for i in range(count))

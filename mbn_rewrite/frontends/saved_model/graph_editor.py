"""Editor of function graphs: redirects tensors, adds nodes, drops nodes that nothing needs."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import tensorflow as tf
from tensorflow.core.framework import node_def_pb2
from tensorflow.core.framework.graph_pb2 import GraphDef

from mbn_rewrite.frontends.saved_model.compiled_parts import closed
from mbn_rewrite.frontends.saved_model.function_graph import FunctionGraph, Writes, has_side_effect
from mbn_rewrite.ir.channel_map import Array

_CONTROL_FLOW = {"Switch", "RefSwitch", "Merge", "RefMerge", "Enter", "RefEnter"}


@dataclass
class Rewritten:
    """A function with its plan carried out.

    Attributes:
        graph_def: its new graph.
        compiled: whether XLA must compile it.
        arguments: the names of the Placeholders of its arguments, in order.
        outputs: the names of its output tensors, in order.
        captures: Placeholder name -> the tf.Variable or tensor that it stands for.
    """

    graph_def: GraphDef
    compiled: bool
    arguments: tuple[str, ...]
    outputs: list[str]
    captures: dict[str, Any]

    @property
    def has_frames(self) -> bool:
        """Whether it has control flow of TensorFlow 1."""
        return has_frames(self.graph_def)


def has_frames(graph_def: GraphDef) -> bool:
    """Whether a graph has control flow of TensorFlow 1."""
    return any(node.op in _CONTROL_FLOW for node in graph_def.node)


def unchanged(function: FunctionGraph) -> Rewritten | None:
    """A function without nodes that nothing needs; None if nothing is left to run."""
    if not any(has_side_effect(op) for op in function.operations):
        return None
    return GraphEditor(function, Writes()).finished()


@dataclass
class GraphEditor:
    """Edits one graph. Tensors are named as in a GraphDef, output 0 with ":0"."""

    function: FunctionGraph
    writes: Writes
    captures: dict[str, Any] = field(default_factory=dict)
    _redirected: dict[str, str] = field(default_factory=dict)
    _inputs: dict[tuple[str, int], str] = field(default_factory=dict)
    _constants: dict[str, Array] = field(default_factory=dict)
    _added: dict[str, Any] = field(default_factory=dict)
    _handles: dict[int, str] = field(default_factory=dict)
    _reads: dict[int, str] = field(default_factory=dict)
    _taken: set[str] = field(default_factory=set)
    _forwarded: dict[str, str] = field(default_factory=dict)
    _unordered: set[str] = field(default_factory=set)  # nodes that nobody has to wait for

    def __post_init__(self) -> None:
        ops = self.function.graph.get_operations()
        writes_none = not any(has_side_effect(op) for op in ops)
        # In those, waiting for a node places an operation in its loop or branch.
        waits = any(op.type in _CONTROL_FLOW for op in ops)
        for node in self.function.graph_def.node:
            self._taken.add(node.name)
            if waits:
                continue
            if writes_none or (node.op == "ReadVariableOp" and not self._is_written(node)):
                self._unordered.add(node.name)
            if node.op == "Identity" and len(node.input) == 1:
                source = node.input[0]
                self._forwarded[f"{node.name}:0"] = source if ":" in source else f"{source}:0"

    def redirect(self, tensor: str, to: str) -> None:
        """Has all readers of a tensor read another one."""
        self._redirected[tensor] = to

    def set_input(self, node: str, index: int, tensor: str) -> None:
        """Has one node read a tensor, even if that is redirected for others."""
        self._inputs[node.partition(":")[0], index] = tensor

    def set_constant(self, node: str, value: Array) -> None:
        self._constants[node] = value

    def add(self, name: str, op: str, inputs: list[str], **attributes: Any) -> str:
        """Adds a node; returns the tensor that it gives."""
        name = self._free(name)
        node = node_def_pb2.NodeDef(name=name, op=op, input=inputs)
        for key, value in attributes.items():
            _set_attribute(node, key, value)
        self._added[name] = node
        return f"{name}:0"

    def const(self, name: str, value: Array) -> str:
        """A constant tensor that is no weight."""
        return self.add(name, "Const", [], dtype=tf.as_dtype(value.dtype), value=value)

    def handle(self, variable: Any) -> str:
        """A tensor with the handle of a variable."""
        if id(variable) not in self._handles:
            name = variable.name.partition(":")[0]
            handle = self.add(f"{name}/handle", "Placeholder", [], dtype=tf.resource)
            self.captures[handle.partition(":")[0]] = variable
            self._handles[id(variable)] = handle
        return self._handles[id(variable)]

    def read(self, variable: Any, as_variable: bool) -> str:
        """A tensor with a variable's value; a constant in graphs whose weights are constants."""
        if id(variable) not in self._reads:
            name = variable.name.partition(":")[0]
            if as_variable:
                handle = self.handle(variable)
                read = self.add(f"{name}/read", "ReadVariableOp", [handle], dtype=variable.dtype)
            else:
                read = self.add(name, "Const", [], dtype=variable.dtype, value=variable.numpy())
            self._reads[id(variable)] = read
        return self._reads[id(variable)]

    def _free(self, name: str) -> str:
        name = as_node_name(name)
        result, number = name, 1
        while result in self._taken:
            result, number = f"{name}_{number}", number + 1
        self._taken.add(result)
        return result

    def finished(self) -> Rewritten:
        """The graph with all edits, without nodes that are no longer needed."""
        old = self.function.graph_def
        nodes = {node.name: node for node in old.node} | self._added
        outputs = [self._target(name) for name in self.function.results]
        inputs: dict[str, list[str]] = {}
        pending = [name.partition(":")[0] for name in outputs]
        pending += [op.name for op in self.function.graph.get_operations() if has_side_effect(op)]
        while pending:
            name = pending.pop()
            if name in inputs:
                continue
            inputs[name] = self._inputs_of(nodes[name])
            pending += [source.lstrip("^").partition(":")[0] for source in inputs[name]]
        graph_def = GraphDef(versions=old.versions, library=old.library)
        for name, node in nodes.items():
            if name not in inputs:
                continue
            new = graph_def.node.add()
            new.CopyFrom(node)
            new.attr.pop("_class", None)  # wants to be placed with nodes that may be gone
            del new.input[:]
            new.input.extend(inputs[name])
            if name in self._constants:
                _set_attribute(new, "value", self._constants[name])
        captures = {**self.function.captures, **self.function.variables, **self.captures}
        captures = {name: captures[name] for name in captures if name in inputs}
        graph_def, outputs = closed(graph_def, outputs)
        return Rewritten(
            graph_def, self.function.compiled, self.function.arguments, outputs, captures
        )

    def _inputs_of(self, node: Any) -> list[str]:
        data = [source for source in node.input if not source.startswith("^")]
        controls = [source[1:] for source in node.input if source.startswith("^")]
        controls = [name for name in controls if name not in self._unordered]
        new = []
        for i, source in enumerate(data):
            set_to = self._inputs.get((node.name, i))
            new.append(set_to or self._target(source))
        return new + sorted({f"^{self._control(name)}" for name in controls})

    def _is_written(self, read: Any) -> bool:
        """Whether a function writes to the variable that a node reads."""
        op = self.function.graph.get_operation_by_name(read.name)
        variable = self.function.variable(op.inputs[0])
        return variable is None or id(variable) in self.writes.by

    def _target(self, tensor: str) -> str:
        """The tensor to read in place of a tensor, past nodes that only forward it."""
        name = tensor if ":" in tensor else f"{tensor}:0"
        while True:
            if name in self._redirected:
                name = self._redirected[name]
            elif name in self._forwarded:
                name = self._forwarded[name]
            else:
                return name

    def _control(self, node: str) -> str:
        """The node to wait for in place of one that is taken out."""
        tensor = f"{node}:0"
        while tensor in self._redirected:
            tensor = self._redirected[tensor]
        return tensor.partition(":")[0]


def as_node_name(name: str) -> str:
    """A name with the characters replaced that TensorFlow does not allow."""
    name = re.sub(r"[^A-Za-z0-9_.\\/>-]", "_", name)
    return name if re.match(r"[A-Za-z0-9.]", name) else f"n{name}"


def _set_attribute(node: Any, key: str, value: Any) -> None:
    attribute = node.attr[key]
    if isinstance(value, tf.DType):
        attribute.type = value.as_datatype_enum
    elif isinstance(value, bytes):
        attribute.s = value
    elif isinstance(value, list):
        attribute.list.i.extend(value)
    elif isinstance(value, bool):
        attribute.b = value
    elif isinstance(value, float):
        attribute.f = value
    else:
        attribute.tensor.CopyFrom(tf.make_tensor_proto(value))

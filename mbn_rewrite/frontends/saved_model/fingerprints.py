"""Fingerprints of functions: the same where two compute the same, whatever their nodes are called.

A signature and a method often call one function, as those that Keras and tf.Module write. Their
flat graphs differ in the names that inlining gives, and in operations that only forward.
"""

from __future__ import annotations

import hashlib
from typing import Any

from tensorflow.core.framework.attr_value_pb2 import AttrValue

from mbn_rewrite.frontends.saved_model.compiled_parts import COMPILED, is_marked
from mbn_rewrite.frontends.saved_model.function_graph import (
    FunctionGraph,
    has_side_effect,
    source_of,
)
from mbn_rewrite.frontends.saved_model.graph_editor import has_frames

# Attributes that are notes: on what a user called something, or on what follows from others.
_NOTES = {"_user_specified_name", "_output_shapes", "_class"}


def fingerprint(function: FunctionGraph) -> bytes | None:
    """A digest of all that a function computes from its arguments, in their order.

    Returns:
        The digest. Functions of the same one take arguments of the same dtypes and shapes, give the
        same for the same, and check the same on the way; a check may say something else. None where
        a call depends on the calls before it, or where there is control flow of TensorFlow 1.
    """
    if not function.repeats or has_frames(function.graph_def):
        return None
    bodies = _Bodies(function)
    of: dict[str, bytes] = {}  # by operation
    for op in function.operations:
        inputs = [source_of(tensor) for tensor in op.inputs]
        if op.type == "Assert":
            del inputs[1:]  # what it says when the condition does not hold, with names of its own
        read = [(of[tensor.op.name], tensor.value_index) for tensor in inputs]
        of[op.name] = _digest(_itself(function, op, bodies), read)
    outputs = [source_of(tensor) for tensor in function.outputs]
    effects = sorted(of[op.name] for op in function.operations if has_side_effect(op))
    given = [(of[tensor.op.name], tensor.value_index) for tensor in outputs]
    placeholders = map(function.graph.get_operation_by_name, function.arguments)  # read or not
    taken = [bodies.attributes(op.node_def) for op in placeholders]
    return _digest(function.compiled, taken, given, effects)


def _itself(function: FunctionGraph, op: Any, bodies: _Bodies) -> Any:
    """What an operation is, without its name and what it reads."""
    if op.name in function.arguments:
        return "argument", function.arguments.index(op.name)
    if op.name in function.variables:
        return "variable", id(function.variables[op.name])
    if op.name in function.captures:
        return "captured", id(function.captures[op.name])
    if op.type == "Assert":
        return op.type
    return bodies.what_does(op.type), op.device, bodies.attributes(op.node_def)


class _Bodies:
    """The functions that operations of a graph call, such as the bodies of loops."""

    def __init__(self, function: FunctionGraph) -> None:
        self._library = {f.signature.name: f for f in function.graph_def.library.function}
        self._found: dict[str, str] = {}

    def attributes(self, node: Any) -> list[tuple[str, bytes]]:
        """The attributes of a node, as digests."""
        names = sorted(set(node.attr) - _NOTES)
        return [(name, self._of_attribute(node.attr[name])) for name in names]

    def _of_attribute(self, value: Any) -> bytes:
        """A digest of an attribute, with functions by what they do: their names are numbered."""
        if value.HasField("func") or value.list.func:
            value = AttrValue.FromString(value.SerializeToString())
            for called in value.list.func or [value.func]:
                called.name = self.what_does(called.name)
        return hashlib.sha256(value.SerializeToString(deterministic=True)).digest()

    def what_does(self, name: str) -> str:
        """What a function does, by the names of its nodes; of an operation, its name."""
        body = self._library.get(name)
        if body is None:
            return name
        if name not in self._found:
            self._found[name] = "itself"  # where it calls itself
            inputs = body.signature.input_arg
            arguments = {arg.name: f"#{number}" for number, arg in enumerate(inputs)}

            def source(tensor: str) -> str:
                node, colon, output = tensor.partition(":")
                return arguments.get(node, node) + colon + output

            nodes = sorted(
                (
                    *(node.name, self.what_does(node.op), node.device),
                    *([source(tensor) for tensor in node.input], self.attributes(node)),
                )
                for node in body.node_def
            )
            results = [source(body.ret[arg.name]) for arg in body.signature.output_arg]
            effects = sorted(body.control_ret.values())
            dtypes = [arg.type for arg in inputs]
            compiled = is_marked(body, COMPILED)
            self._found[name] = _digest(dtypes, nodes, results, effects, compiled).hex()
        return self._found[name]


def _digest(*parts: Any) -> bytes:
    return hashlib.sha256(repr(parts).encode()).digest()

"""The variables that a graph writes to, in itself and in all functions that it calls.

An operation that takes the handle of a variable and is not known to only read it counts as writing:
many do (of optimisers, by index, by slices), and more with every version of TensorFlow. Of the
handles that a function is called with, only those count as written that its body writes to, or
passes to others that do.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.core.framework import types_pb2
from tensorflow.core.framework.graph_pb2 import GraphDef

from mbn_rewrite.frontends.saved_model.inlining import bodies_called, called_by, display_name

# Operations that give their input as it is.
ALIASES = {"Identity", "Snapshot", "StopGradient", "PreventGradient", "PlaceholderWithDefault"}
# Operations that take a handle and leave the variable as it is.
READS = {
    *("ReadVariableOp", "_ReadVariablesOp", "ReadVariableXlaSplitND", "DisableCopyOnRead"),
    *("ResourceGather", "ResourceGatherNd", "VariableShape", "VarIsInitializedOp"),
    *("IsResourceHandleRefCounting", "NoOp"),
}
# Operations that forward a handle.
_FORWARDING = ALIASES | {"IdentityN", "Switch", "Merge", "Enter", "Exit", "NextIteration"}
# Calls, and the number of inputs before the arguments of the function.
CALLS_BEFORE_ARGUMENTS = {
    **dict.fromkeys(("PartitionedCall", "StatefulPartitionedCall", "BatchFunction"), 0),
    **dict.fromkeys(("While", "StatelessWhile", "XlaLaunch"), 0),
    **dict.fromkeys(("If", "StatelessIf", "Case", "StatelessCase"), 1),
}
_FUSED_NORMS = {"FusedBatchNorm", "FusedBatchNormV2", "FusedBatchNormV3"}
# The outputs of a fused operation at inference that are its inputs, with their numbers.
_PASSED_THROUGH = {"1": 3, "batch_mean": 3, "2": 4, "batch_variance": 4}
_MOST_ELEMENTS = 1 << 16


@dataclass(frozen=True)
class Write:
    """A node of a flat graph that writes to a variable.

    Attributes:
        node: its name.
        handle: the Placeholder of the variable's handle.
        operation: the operation that writes, in words: the node, or one that it calls.
        puts_back: whether it only writes the value that the variable has.
    """

    node: str
    handle: str
    operation: str
    puts_back: bool


def writes_in(graph_def: GraphDef, handles: Iterable[str]) -> list[Write]:
    """The writes to variables in a flat graph; `handles` are their Placeholders."""
    return list(_Body(graph_def.node, frozenset(handles), _Library(graph_def)).writes())


@dataclass
class _Library:
    """The functions of a graph."""

    graph_def: GraphDef
    functions: dict[str, Any] = field(init=False)
    _written: dict[str, dict[int, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        library = self.graph_def.library
        self.functions = {function.signature.name: function for function in library.function}

    def written_by(self, name: str) -> Mapping[int, str]:
        """The arguments, by number, that a function writes to, and the operation that does."""
        if name not in self._written:
            function = self.functions[name]
            arguments = [argument.name for argument in function.signature.input_arg]
            # One that calls itself may do anything with them.
            self._written[name] = dict.fromkeys(range(len(arguments)), f"'{name}'")
            handles = frozenset(
                argument.name
                for argument in function.signature.input_arg
                if argument.type == types_pb2.DT_RESOURCE
            )
            found: dict[str, str] = {}
            for write in _Body(function.node_def, handles, self).writes():
                if not write.puts_back:
                    found.setdefault(write.handle, write.operation)
            self._written[name] = {
                i: found[argument] for i, argument in enumerate(arguments) if argument in found
            }
        return self._written[name]


class _Body:
    """The nodes of a graph or function.

    Args:
        nodes: the nodes.
        roots: the Placeholders or arguments that are handles.
        library: the functions that may be called.
    """

    def __init__(self, nodes: Iterable[Any], roots: frozenset[str], library: _Library) -> None:
        self._nodes = {node.name: node for node in nodes}
        self._roots = roots
        self._library = library

    def writes(self) -> Iterator[Write]:
        for node in self._nodes.values():
            if node.op in READS or node.op in _FORWARDING:
                continue
            sources = [source for source in node.input if not source.startswith("^")]
            taken = [self._handles(source) for source in sources]
            for handle, operation in self._written_by(node, taken):
                puts_back = len(taken[0]) == 1 and self._puts_back(node, handle)
                yield Write(node.name, handle, operation, puts_back)

    def _written_by(self, node: Any, taken: list[frozenset[str]]) -> Iterator[tuple[str, str]]:
        """The handles that a node writes to, of those that it takes, each with the operation."""
        passed = frozenset[str]().union(*taken)
        if not passed:
            return
        label = f"{node.op} '{display_name(node.name)}'"
        called = [name for name in called_by(node) if name in self._library.functions]
        # Besides the operation itself, which is named first.
        known = len(called) == len(list(called_by(node))) - 1
        if not called or not known:
            yield from ((handle, label) for handle in sorted(passed))
        elif node.op in CALLS_BEFORE_ARGUMENTS:
            for name in called:
                for i, operation in self._library.written_by(name).items():
                    for handle in sorted(taken[i + CALLS_BEFORE_ARGUMENTS[node.op]]):
                        yield handle, f"{operation} in {label}"
        else:  # who knows which argument is which
            bodies = bodies_called(self._library.graph_def, node)
            if any(self._library.written_by(body.signature.name) for body in bodies):
                yield from ((handle, label) for handle in sorted(passed))

    def _handles(self, source: str) -> frozenset[str]:
        """The handles that a tensor may be."""
        found: set[str] = set()
        seen: set[str] = set()
        pending = [source]
        while pending:
            source = pending.pop()
            if source in seen or source.startswith("^"):
                continue
            seen.add(source)
            name, _, output = source.partition(":")
            if name in self._roots:
                found.add(name)
            node = self._nodes.get(name)
            if node is None:
                continue
            if node.op == "IdentityN":
                pending.append(node.input[_number(output)])
            elif node.op in _FORWARDING or _gives_handle(node, output):
                pending += node.input
        return frozenset(found)

    # -- writes of what was read ---------------------------------------------------------

    def _puts_back(self, node: Any, handle: str) -> bool:
        if node.op == "AssignVariableOp":
            return self._variable_of(node.input[1]) == handle
        if node.op in ("AssignAddVariableOp", "AssignSubVariableOp"):
            return self._is_zero(node.input[1])
        return False

    def _variable_of(self, source: str) -> str | None:
        """The variable, by its handle, whose value a tensor is; None where it is of none."""
        while True:
            node, output = self._node(source)
            if node is None:
                return None
            if node.op in ALIASES:
                source = node.input[0]
            elif node.op in _FUSED_NORMS and is_at_inference(node):
                through = _PASSED_THROUGH.get(output.partition(":")[0])
                if through is None:
                    return None
                source = node.input[through]
            elif node.op == "ReadVariableOp":
                handles = self._handles(node.input[0])
                return next(iter(handles)) if len(handles) == 1 else None
            else:
                return None

    def _is_zero(self, source: str) -> bool:
        """Whether a tensor is zero: (v - v) of a variable, perhaps times a constant."""
        node, _ = self._node(source)
        if node is None:
            return False
        if node.op in ALIASES or node.op in ("Reshape", "Cast"):
            return self._is_zero(node.input[0])
        if node.op == "Sub":
            left, right = (self._variable_of(source) for source in node.input[:2])
            return left is not None and left == right
        if node.op == "Mul":
            pairs = (node.input[:2], node.input[1::-1])
            return any(self._is_zero(a) and self._is_settled(b) for a, b in pairs)
        if node.op in ("Select", "SelectV2"):
            return self._is_zero(node.input[1]) and self._is_zero(node.input[2])
        return node.op == "Const" and _is_zero_constant(node)

    def _is_settled(self, source: str) -> bool:
        """Whether a tensor does not depend on what the function is given, so that it is finite."""
        pending, seen = [source], set()
        while pending:
            source = pending.pop()
            if source in seen or source.startswith("^"):
                continue
            seen.add(source)
            node, _ = self._node(source)
            if node is None or node.op == "Placeholder":
                return False
            if node.op != "ReadVariableOp":
                pending += node.input
        return True

    def _node(self, source: str) -> tuple[Any, str]:
        name, _, output = source.partition(":")
        return self._nodes.get(name), output


def _gives_handle(node: Any, output: str) -> bool:
    """Whether an output of a call is a handle."""
    if node.op not in CALLS_BEFORE_ARGUMENTS:
        return False
    types = node.attr["T" if "While" in node.op else "Tout"].list.type
    number = _number(output)
    return number < len(types) and types[number] == types_pb2.DT_RESOURCE


def is_at_inference(node: Any) -> bool:
    """Whether a FusedBatchNorm normalises by statistics that are given (not so by default)."""
    # Reading an entry that is not there would make an empty one.
    return "is_training" in node.attr and not node.attr["is_training"].b


def _number(output: str) -> int:
    """The number of an output: "1" in a graph, "output:1" in a function."""
    return int(output.rpartition(":")[2] or 0)


def _is_zero_constant(node: Any) -> bool:
    tensor = node.attr["value"].tensor
    size = tf.TensorShape(tensor.tensor_shape).num_elements()
    if size is None or size > _MOST_ELEMENTS or tensor.dtype == types_pb2.DT_STRING:
        return False
    return bool(np.all(tf.make_ndarray(tensor) == 0))

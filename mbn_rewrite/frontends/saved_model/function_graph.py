"""The flat graph of a function of a SavedModel, with the variables and tensors it captures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import tensorflow as tf
from tensorflow.core.framework.graph_pb2 import GraphDef
from tensorflow.python.framework import op_def_registry

from mbn_rewrite.frontends.saved_model.inlining import inlined
from mbn_rewrite.frontends.saved_model.ref_variables import variables_in, without_references
from mbn_rewrite.frontends.saved_model.stated_shapes import state_shapes, state_shapes_of_rows
from mbn_rewrite.frontends.saved_model.variable_writes import ALIASES, READS, writes_in

# Stateful operations that change nothing.
_READ = READS | {
    *("VarHandleOp", "Placeholder", "HashTableV2", "HashTable"),
    *("LookupTableFindV2", "LookupTableFind", "LookupTableSizeV2", "LookupTableExportV2"),
}
# Those that are needed only where their output is read: random numbers go on from call to call.
_HARMLESS = _READ | {
    *("RandomUniform", "RandomStandardNormal", "RandomUniformInt", "TruncatedNormal"),
}
# Stateful operations that check or print.
_ONLY_SPEAK = {"Assert", "Print", "PrintV2", "CheckNumerics", "CheckNumericsV2"}
# Operations that cost nothing at run time.
_FREE = {"Placeholder", "Const", "Identity", "IdentityN", "NoOp", "ReadVariableOp", "VariableV2"}
# Operations whose results do not depend on the values that they read, only on shapes.
SHAPE_ONLY = {"Shape", "ShapeN", "Size", "Rank", "ZerosLike", "OnesLike"}


@dataclass(frozen=True)
class FunctionGraph:
    """A concrete function as one flat graph.

    Attributes:
        name: the key of a signature, or the name of a method.
        graph_def: its graph, inlined.
        graph: the same, imported: for shapes, dtypes and who reads what.
        compiled: whether XLA must compile all of it.
        arguments: the names of the Placeholders of its arguments, in order.
        results: the names of the tensors that it gives, in order.
        captures: Placeholder name -> the tensor outside that it stands for.
        variables: Placeholder name -> the tf.Variable whose handle it stands for.
        written: of those variables, the ones that it writes to: Placeholder name -> the
            operation that does, in words.
        flags: what decided branches beforehand: the name of a default or a variable -> its value,
            in words.
        labels: the names of arguments for callers, by those of their Placeholders.
    """

    name: str
    graph_def: GraphDef
    graph: Any
    compiled: bool
    arguments: tuple[str, ...]
    results: tuple[str, ...]
    captures: dict[str, Any]
    variables: dict[str, Any]
    written: dict[str, str] = field(default_factory=dict)
    flags: dict[str, str] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)

    @cached_property
    def outputs(self) -> list[Any]:
        """The tensors of `graph` that are its outputs."""
        return [self.graph.get_tensor_by_name(name) for name in self.results]

    @cached_property
    def output_names(self) -> frozenset[str]:
        """The names of its outputs, past operations that only forward them."""
        return frozenset(source_of(tensor).name for tensor in self.outputs)

    @cached_property
    def operations(self) -> list[Any]:
        """The operations that outputs or side effects depend on, in order."""
        return self._needed(by_shapes=True)

    @cached_property
    def valued(self) -> list[Any]:
        """Those of whose results more than shapes matters, in order."""
        return self._needed(by_shapes=False)

    def _needed(self, by_shapes: bool) -> list[Any]:
        needed: set[str] = set()
        pending = [t.op for t in self.outputs]
        pending += [op for op in self.graph.get_operations() if has_side_effect(op)]
        while pending:
            op = pending.pop()
            if op.name not in needed:
                needed.add(op.name)
                if by_shapes or op.type not in SHAPE_ONLY:
                    pending += [t.op for t in op.inputs]
                pending += op.control_inputs
        return [op for op in self.graph.get_operations() if op.name in needed]

    @property
    def op_counts(self) -> dict[str, int]:
        """Number of operations of each type that it runs, apart from those that cost nothing."""
        needed = {op.name for op in self.operations}
        return counts_of(node for node in self.graph_def.node if node.name in needed)

    @property
    def changes_state(self) -> bool:
        """Whether a call changes what later calls read."""
        return self._runs_others_than(_HARMLESS | _ONLY_SPEAK)

    @property
    def repeats(self) -> bool:
        """Whether a call gives what it would give without the calls before it."""
        return not self._runs_others_than(_READ | _ONLY_SPEAK)

    def _runs_others_than(self, stateful: Set[str]) -> bool:
        library = {f.signature.name: f.node_def for f in self.graph_def.library.function}
        return any(_runs_others_than(stateful, op.node_def, library) for op in self.operations)

    @property
    def draws_random_numbers(self) -> bool:
        """Whether its outputs differ from call to call."""
        return any(
            op.type.startswith(("Random", "TruncatedNormal", "ParameterizedTruncated"))
            or op.type in ("Multinomial", "StatefulUniform", "StatefulStandardNormalV2")
            for op in self.operations
        )

    @cached_property
    def readers(self) -> dict[str, list[tuple[Any, int]]]:
        """Tensor name -> the operations that read its values, past those that only forward it."""
        readers: dict[str, list[tuple[Any, int]]] = {}
        for op in self.valued:
            if op.type not in SHAPE_ONLY and op.type not in ALIASES:
                for i, tensor in enumerate(op.inputs):
                    readers.setdefault(source_of(tensor).name, []).append((op, i))
        return readers

    def only_reader(self, tensor: Any) -> tuple[Any, int] | None:
        """The only operation that reads a tensor, and by which input; None if it is an output."""
        found = self.readers.get(tensor.name, [])
        return found[0] if len(found) == 1 and tensor.name not in self.output_names else None

    def variable(self, handle: Any) -> Any:
        """The variable behind a tensor of dtype resource, or None."""
        return self.variables.get(source_of(handle).op.name)


def counts_of(nodes: Iterable[Any]) -> dict[str, int]:
    """Number of nodes of each operation type, apart from those that cost nothing."""
    return dict(Counter(node.op for node in nodes if node.op not in _FREE))


def op_counts(function: Any) -> dict[str, int]:
    """Number of operations of each type that a concrete function runs."""
    return counts_of(inlined(function, look_inside=True).graph_def.node)


@dataclass
class Writes:
    """The variables that functions write to, or may.

    Attributes:
        by: id(variable) -> the function that does, as the beginning of a sentence that goes on
            with the variable.
    """

    by: dict[int, str] = field(default_factory=dict)

    @classmethod
    def of(cls, *graphs: FunctionGraph) -> Writes:
        """The variables that some functions write to."""
        writes = cls()
        for graph in graphs:
            for name, operation in graph.written.items():
                who = f"{operation} of '{graph.name}' writes to"
                writes.by.setdefault(id(graph.variables[name]), who)
        return writes

    def suspect(self, variables: Iterable[Any], name: str) -> None:
        """Notes that a function that could not be read may write to variables."""
        for variable in variables:
            who = f"'{name}', which is carried over as it was, may write to"
            self.by.setdefault(id(variable), who)


def has_side_effect(op: Any) -> bool:
    """Whether an operation runs for more than its outputs."""
    return bool(op.op_def.is_stateful) and op.type not in _HARMLESS


def _runs_others_than(stateful: Set[str], node: Any, library: Mapping[str, Any]) -> bool:
    """Whether a node runs another stateful operation, by itself or in the functions it calls."""
    called = [value.func.name for value in node.attr.values() if value.HasField("func")]
    called += [func.name for value in node.attr.values() for func in value.list.func]
    known = [name for name in called if name in library]
    if known:
        nodes = (inner for name in known for inner in library[name])
        return any(_runs_others_than(stateful, inner, library) for inner in nodes)
    op_def = op_def_registry.get(node.op)
    is_stateful = op_def is None or op_def.is_stateful
    return bool(is_stateful) and node.op not in stateful


def source_of(tensor: Any) -> Any:
    """The tensor that this one forwards."""
    while tensor.op.type in ALIASES or tensor.op.type == "IdentityN":
        tensor = tensor.op.inputs[tensor.value_index]
    return tensor


def function_graph_of(
    name: str, function: Any, variable_in_graph: Callable[[str], Any], look_inside: bool = False
) -> FunctionGraph:
    """Reads a concrete function.

    Args:
        name: the key of a signature, or the name of a method.
        function: the concrete function.
        variable_in_graph: gives a tf.Variable in place of a variable of TensorFlow 1, which is a
            node of the graph.
        look_inside: whether to open what XLA compiles in the midst of others. Such a graph is to be
            read and written, not to be run.

    Raises:
        RewriteError: it uses such a variable in a way that a tf.Variable cannot be used.
    """
    graph_def, compiled, defaults = inlined(function, look_inside)
    externals = function.captured_inputs
    placeholders = function.inputs[len(function.inputs) - len(externals) :]
    captures = {p.op.name: e for p, e in zip(placeholders, externals, strict=True)}
    handles = {id(variable.handle): variable for variable in function.graph.variables}
    variables = {name: handles[id(e)] for name, e in captures.items() if id(e) in handles}
    runs = [op.name for op in function.graph.control_outputs]
    results = [tensor.name for tensor in function.graph.outputs]
    in_graph = variables_in(graph_def)
    graph_def, results = without_references(graph_def, results, runs)
    kept = {node.name for node in graph_def.node}
    constants = {node.name for node in graph_def.node if node.op == "Const"}
    captures = {name: external for name, external in captures.items() if name not in constants}
    variables |= {name: variable_in_graph(name) for name in sorted(in_graph & kept)}
    written = _written(graph_def, variables)
    arguments = [t.op.name for t in function.inputs[: len(function.inputs) - len(externals)]]
    keywords = getattr(function, "_arg_keywords", None) or arguments
    return FunctionGraph(
        name,
        graph_def,
        _imported(graph_def, variables),
        compiled,
        tuple(arguments),
        tuple(results),
        captures,
        variables,
        written,
        defaults,
        dict(zip(arguments, keywords, strict=False)),
    )


def with_graph_def(function: FunctionGraph, graph_def: GraphDef) -> FunctionGraph:
    """A function with another graph, of the same arguments and results."""
    written = _written(graph_def, function.variables)
    graph = _imported(graph_def, function.variables)
    return replace(function, graph_def=graph_def, graph=graph, written=written)


def _imported(graph_def: GraphDef, variables: dict[str, Any]) -> Any:
    state_shapes(graph_def, variables)
    while True:
        graph = tf.Graph()
        with graph.as_default():
            tf.graph_util.import_graph_def(graph_def, name="")
        if not state_shapes_of_rows(graph_def, graph, variables):
            return graph


def _written(graph_def: GraphDef, variables: dict[str, Any]) -> dict[str, str]:
    """The variables that a function writes to, as `FunctionGraph.written`.

    Writes of a value that a variable already has are taken out: FusedBatchNorm returns the
    statistics that it was given, and some models assign them to the variables they come from. Such
    a write counts only beside another one.
    """
    writes = writes_in(graph_def, variables)
    written: dict[str, str] = {}
    for write in writes:
        if not write.puts_back:
            written.setdefault(write.handle, write.operation)
    changed = {id(variables[handle]) for handle in written}
    idle = {w.node for w in writes if w.puts_back and id(variables[w.handle]) not in changed}
    for node in graph_def.node:
        if node.name in idle:
            node.op = "NoOp"
            node.attr.clear()
            node.input[:] = [source for source in node.input if source.startswith("^")]
    return written

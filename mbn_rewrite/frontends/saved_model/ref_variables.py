"""Conversion of variables that TensorFlow 1 keeps in its graph to variables outside of it.

Such a node (`VariableV2`) gives a reference, which operations read as a value or write through.
A variable outside gives a handle, for which those operations have counterparts, such as
`AssignVariableOp` for `Assign` and `ResourceScatterAdd` for `ScatterAdd`. Once they are replaced by
those, nothing else needs to know of references.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from tensorflow.core.framework import types_pb2
from tensorflow.core.framework.graph_pb2 import GraphDef
from tensorflow.python.framework import op_def_registry

from mbn_rewrite.errors import RewriteError

_VARIABLES = {"VariableV2", "Variable"}
# Operations that forward a reference, and their counterparts.
_FORWARDING = {
    "RefIdentity": "Identity",
    "RefSwitch": "Switch",
    "RefMerge": "Merge",
    "RefEnter": "Enter",
    "RefExit": "Exit",
    "RefNextIteration": "NextIteration",
}
# Other counterparts; that of an operation not listed here is named "Resource" and the same.
_COUNTERPARTS = {
    "Assign": "AssignVariableOp",
    "AssignAdd": "AssignAddVariableOp",
    "AssignSub": "AssignSubVariableOp",
    "IsVariableInitialized": "VarIsInitializedOp",
}


def without_references(
    graph_def: GraphDef, results: Sequence[str], runs: Collection[str]
) -> tuple[GraphDef, list[str]]:
    """A flat graph whose variables are outside of it.

    Args:
        graph_def: the graph.
        results: the names of its outputs.
        runs: the names of other nodes that are run.

    Returns:
        The graph, and its results. Nodes that were variables are Placeholders of handles, by the
        same names. If there were any, nodes that are never run are left out.

    Raises:
        RewriteError: an operation that takes a reference has no counterpart.
    """
    if not any(node.op in _VARIABLES for node in graph_def.node):
        return graph_def, list(results)
    roots = {*runs, *(name.partition(":")[0] for name in results)}
    converter = _Converter(_run_by(graph_def, roots))
    return converter.new, [converter.value(name) for name in results]


def variables_in(graph_def: GraphDef) -> set[str]:
    """The names of the nodes that are variables."""
    return {node.name for node in graph_def.node if node.op in _VARIABLES}


def _run_by(graph_def: GraphDef, roots: set[str]) -> GraphDef:
    """The nodes that are run: graphs of TensorFlow 1 also hold the initializers of variables."""
    nodes = {node.name: node for node in graph_def.node}
    needed: set[str] = set()
    pending = [name for name in roots if name in nodes]
    while pending:
        name = pending.pop()
        if name not in needed:
            needed.add(name)
            pending += [source.lstrip("^").partition(":")[0] for source in nodes[name].input]
    kept = GraphDef(versions=graph_def.versions, library=graph_def.library)
    kept.node.extend(node for node in graph_def.node if node.name in needed)
    return kept


@dataclass
class _Converter:
    """Converts one graph.

    Attributes:
        old: the graph.
        new: the same with handles in place of references.
    """

    old: GraphDef
    new: GraphDef = field(init=False)
    _nodes: dict[str, Any] = field(init=False)
    _references: set[str] = field(init=False)  # the nodes that give one
    _taken: set[str] = field(init=False)

    def __post_init__(self) -> None:
        self._nodes = {node.name: node for node in self.old.node}
        self._taken = set(self._nodes)
        self._references = variables_in(self.old)
        size = 0
        while size < len(self._references):  # loops go back
            size = len(self._references)
            self._references |= {node.name for node in self.old.node if self._passes(node)}
        self.new = GraphDef(versions=self.old.versions, library=self.old.library)
        for node in self.old.node:
            self._convert(node)

    def value(self, source: str) -> str:
        """A tensor, or if it is a reference, one with the value behind it."""
        if not self._is_reference(source):
            return source
        name = self._free(f"{source.partition(':')[0]}/value")
        node = self.new.node.add(name=name, input=[source])
        self._become_read(node)
        return f"{name}:0"

    def _passes(self, node: Any) -> bool:
        """Whether a node gives a reference that it was given."""
        definition = op_def_registry.get(node.op)
        gives = definition is not None and any(output.is_ref for output in definition.output_arg)
        return gives and any(self._is_reference(source) for source in node.input)

    def _is_reference(self, source: str) -> bool:
        name, _, output = source.partition(":")
        # RefMerge gives a number beside the reference.
        is_number = name in self._nodes and self._nodes[name].op == "RefMerge" and output == "1"
        return name in self._references and not is_number

    def _behind(self, source: str) -> str | None:
        """The reference whose value a tensor is, or None.

        An Identity gives the variable's own memory, so that a write is seen through it. One that
        waits for a write, as in `with tf.control_dependencies([write]): tf.identity(v)`, reads
        what was written, though it comes behind the Identity that every variable has.
        """
        while not self._is_reference(source):
            node = self._nodes.get(source.partition(":")[0])
            if node is None or node.op != "Identity":
                return None
            source = node.input[0]
        return source

    def _convert(self, node: Any) -> None:
        if node.op in _VARIABLES:
            handle = self.new.node.add(name=node.name, op="Placeholder")
            handle.attr["dtype"].type = types_pb2.DT_RESOURCE
            return
        read = [i for i, source in enumerate(node.input) if self._is_reference(source)]
        written = [i for i in read if _takes_reference(node, i)]
        new = type(node)()
        new.CopyFrom(node)
        if written:
            self._become_counterpart(new)
        elif node.op == "Identity" and (behind := self._behind(node.input[0])):
            if behind != node.input[0]:
                new.input.append(f"^{node.input[0].partition(':')[0]}")
                new.input[0] = behind
            self._become_read(new)
            read = [0]
        for i in read:
            if i in written or new.op == "ReadVariableOp":
                self._take_handle(new, i)
            else:  # its value, no sooner than it was read
                controls = [source for source in node.input if source.startswith("^")]
                inner = self.new.node.add(
                    name=self._free(f"{node.name}/value"), input=[node.input[i], *controls]
                )
                self._become_read(inner)
                new.input[i] = inner.name
        self.new.node.append(new)

    def _become_read(self, node: Any) -> None:
        """Turns a node into one that reads the variable that its input refers to."""
        node.op = "ReadVariableOp"
        node.attr.clear()
        node.attr["dtype"].type = self._dtype_behind(node.input[0])
        self._take_handle(node, 0)

    def _become_counterpart(self, node: Any) -> None:
        if node.op in _FORWARDING:
            node.op = _FORWARDING[node.op]
            node.attr["T"].type = types_pb2.DT_RESOURCE
            return
        definition = op_def_registry.get(_COUNTERPARTS.get(node.op, f"Resource{node.op}"))
        if definition is None:
            raise RewriteError(
                f"{node.op} '{node.name}' takes a reference variable of TensorFlow 1 in a way that "
                "cannot be carried over. Leave the function out by naming signatures that do "
                "without it (--signatures)"
            )
        before = {key: value for key, value in node.attr.items() if not key.startswith("_")}
        node.op = definition.name
        node.attr.clear()
        for attribute in definition.attr:
            source = "T" if attribute.name == "dtype" and "dtype" not in before else attribute.name
            if source in before:
                node.attr[attribute.name].CopyFrom(before[source])

    def _take_handle(self, node: Any, index: int) -> None:
        """Gives a node a handle as input, and has it wait for the node that gave the reference."""
        source, writers = self._handle(node.input[index])
        node.input[index] = source
        node.input.extend(f"^{name}" for name in writers if f"^{name}" not in node.input)

    def _handle(self, source: str) -> tuple[str, list[str]]:
        """The handle in place of a reference, and the writers that forwarded the reference."""
        writers = []
        node = self._nodes[source.partition(":")[0]]
        while node.op not in _VARIABLES and node.op not in _FORWARDING:
            # Its counterpart has no output; this one gives its first input.
            writers.append(node.name)
            source = node.input[0]
            node = self._nodes[source.partition(":")[0]]
        return source, writers

    def _dtype_behind(self, source: str) -> int:
        node = self._nodes[source.partition(":")[0]]
        return int(node.attr["dtype" if node.op in _VARIABLES else "T"].type)

    def _free(self, name: str) -> str:
        result, number = name, 1
        while result in self._taken:
            result, number = f"{name}_{number}", number + 1
        self._taken.add(result)
        return result


def _takes_reference(node: Any, index: int) -> bool:
    """Whether an operation takes an input as reference, and not its value."""
    definition = op_def_registry.get(node.op)
    for argument in definition.input_arg if definition is not None else ():
        count = 1
        if argument.number_attr:
            count = node.attr[argument.number_attr].i
        elif argument.type_list_attr:
            count = len(node.attr[argument.type_list_attr].list.type)
        if index < count:
            return bool(argument.is_ref)
        index -= count
    return False

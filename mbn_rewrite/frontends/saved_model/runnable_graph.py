"""Graphs of functions that can be run in part, with given values in place of computed ones."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.core.framework import node_def_pb2
from tensorflow.core.framework.graph_pb2 import GraphDef

from mbn_rewrite.frontends.execution import compiled as run_by_xla
from mbn_rewrite.frontends.execution import plain
from mbn_rewrite.frontends.saved_model.function_graph import FunctionGraph
from mbn_rewrite.frontends.saved_model.graph_editor import Rewritten
from mbn_rewrite.frontends.saved_model.saving import imported
from mbn_rewrite.frontends.saved_model.variable_writes import writes_in

_NUMBERS = itertools.count()  # of graphs that are run in part


@dataclass(frozen=True)
class RunnableGraph:
    """A graph with the variables and tensors that it captures.

    Attributes:
        graph_def: the graph.
        arguments: the names of the Placeholders of its arguments, in order.
        captures: Placeholder name -> the tf.Variable or tensor that it stands for.
        compiled: whether XLA runs it.
    """

    graph_def: GraphDef
    arguments: tuple[str, ...]
    captures: Mapping[str, Any]
    compiled: bool

    def run(
        self,
        inputs: Sequence[Any],
        fetches: Sequence[str],
        given: Mapping[tuple[str, int], Any] | None = None,
    ) -> list[np.ndarray]:
        """The values of some of its tensors.

        Args:
            inputs: tensors for its arguments.
            fetches: the names of the tensors.
            given: (node, number of an input) -> value that the node reads in place of that input.

        Raises:
            RewriteError: it cannot be run with these.
        """
        graph_def = GraphDef()
        graph_def.CopyFrom(self.graph_def)
        nodes = {node.name: node for node in graph_def.node}
        arguments = list(self.arguments)
        for number, ((name, index), value) in enumerate((given or {}).items()):
            placeholder = f"given_in_place_{number}"
            nodes[name].input[index] = placeholder
            graph_def.node.append(_placeholder(placeholder, value.dtype))
            arguments.append(placeholder)
        function = Rewritten(
            graph_def, self.compiled, tuple(arguments), list(fetches), dict(self.captures)
        )
        tensors = [*inputs, *(given or {}).values()]
        if self.compiled:
            return run_by_xla(lambda data: imported(function, None, data), tensors, "its graph")
        with self._undisturbed():
            return plain(lambda data: _traced(function, data)(*data), tensors, "its graph")

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """Context manager that undoes all writes to variables."""
        variables = {n: x for n, x in self.captures.items() if isinstance(x, tf.Variable)}
        written = {write.handle for write in writes_in(self.graph_def, variables)}
        before = [(variables[name], tf.identity(variables[name])) for name in sorted(written)]
        try:
            yield
        finally:
            for variable, value in before:
                variable.assign(value)


def _traced(function: Rewritten, tensors: Sequence[Any]) -> Any:
    """A function that runs a graph, without the order that tf.function gives to side effects.

    The graph has that order already, and finding it once more does not terminate where a data set
    is reduced over a variable.
    """
    specs = [tf.TensorSpec(tensor.shape, tensor.dtype) for tensor in tensors]
    return tf.compat.v1.wrap_function(lambda *data: imported(function, None, list(data)), specs)


def with_own_names(graph_def: GraphDef) -> None:
    """Gives the functions of a graph names that no other graph uses.

    TensorFlow keeps functions by name, and drops a name once the graph that brought it is gone.
    """
    mark = f"_{next(_NUMBERS)}_in_part"
    own = {function.signature.name for function in graph_def.library.function}
    for function in graph_def.library.function:
        function.signature.name += mark
    for gradient in graph_def.library.gradient:
        gradient.function_name += mark
        gradient.gradient_func += mark * (gradient.gradient_func in own)
    bodies = [function.node_def for function in graph_def.library.function]
    for node in itertools.chain(graph_def.node, *bodies):
        if node.op in own:
            node.op += mark
        for attribute in node.attr.values():
            for called in (attribute.func, *attribute.list.func):
                if called.name in own:
                    called.name += mark


def runnable_graph_of(graph: FunctionGraph, by_xla: bool = False) -> RunnableGraph:
    """A function graph made runnable; `by_xla` says that nothing else can run it."""
    graph_def = GraphDef()
    graph_def.CopyFrom(graph.graph_def)
    for node in graph_def.node:
        node.attr.pop("_class", None)  # wants to be placed with nodes that may be gone
    with_own_names(graph_def)
    captures = {**graph.captures, **graph.variables}
    return RunnableGraph(graph_def, graph.arguments, captures, graph.compiled or by_xla)


def _placeholder(name: str, dtype: Any) -> Any:
    node = node_def_pb2.NodeDef(name=name, op="Placeholder")
    node.attr["dtype"].type = dtype.as_datatype_enum
    return node

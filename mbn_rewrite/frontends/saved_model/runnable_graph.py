"""Graphs of functions that can be run in part, with given values in place of computed ones.

They can also be widened, so that they compute in float32 instead of narrower dtypes.
"""

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

from mbn_rewrite.comparison import NARROW
from mbn_rewrite.frontends.execution import compiled as run_by_xla
from mbn_rewrite.frontends.execution import plain
from mbn_rewrite.frontends.saved_model.function_graph import FunctionGraph
from mbn_rewrite.frontends.saved_model.graph_editor import Rewritten
from mbn_rewrite.frontends.saved_model.saving import imported
from mbn_rewrite.frontends.saved_model.variable_writes import writes_in

_WIDE = tf.float32
_NUMBERS = itertools.count()  # of graphs that are run in part
_NARROW = frozenset(tf.as_dtype(name).as_datatype_enum for name in NARROW)


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


def _with_own_names(graph_def: GraphDef) -> None:
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
    _with_own_names(graph_def)
    captures = {**graph.captures, **graph.variables}
    return RunnableGraph(graph_def, graph.arguments, captures, graph.compiled or by_xla)


def is_narrow(graph: RunnableGraph) -> bool:
    """Whether a graph computes in a dtype narrower than float32."""
    return any(
        attribute.type in _NARROW
        for node in graph.graph_def.node
        for attribute in node.attr.values()
    )


def weight_dtypes(graph: RunnableGraph) -> set[str]:
    """The names of the dtypes in which a graph's weights are kept."""
    stored = {tf.as_dtype(x.dtype).name for x in graph.captures.values() if hasattr(x, "dtype")}
    return stored | {
        tf.as_dtype(node.attr["dtype"].type).name
        for node in graph.graph_def.node
        if node.op == "Const" and len(node.attr["value"].tensor.tensor_shape.dim)
    }


def widened(graph: RunnableGraph) -> RunnableGraph:
    """The same graph with float32 in place of every narrower dtype, with the same weights."""
    graph_def = GraphDef()
    graph_def.CopyFrom(graph.graph_def)
    for node in graph_def.node:
        _widen(node)
    for function in graph_def.library.function:
        for argument in (*function.signature.input_arg, *function.signature.output_arg):
            if argument.type in _NARROW:
                argument.type = _WIDE.as_datatype_enum
        for node in function.node_def:
            _widen(node)
    captures = {name: as_wide(external) for name, external in graph.captures.items()}
    return RunnableGraph(graph_def, graph.arguments, captures, graph.compiled)


def as_wide(value: Any) -> Any:
    """A tensor or variable as one of float32, if its dtype is narrower."""
    dtype = tf.as_dtype(value.dtype)
    if dtype.name not in NARROW:
        return value
    wide = tf.cast(value, _WIDE)
    return tf.Variable(wide, trainable=False) if isinstance(value, tf.Variable) else wide


def _widen(node: Any) -> None:
    for attribute in node.attr.values():
        if attribute.type in _NARROW:
            attribute.type = _WIDE.as_datatype_enum
        for i, dtype in enumerate(attribute.list.type):
            if dtype in _NARROW:
                attribute.list.type[i] = _WIDE.as_datatype_enum
        if attribute.HasField("tensor") and attribute.tensor.dtype in _NARROW:
            array = tf.make_ndarray(attribute.tensor).astype(_WIDE.as_numpy_dtype)
            attribute.tensor.CopyFrom(tf.make_tensor_proto(array))


def _placeholder(name: str, dtype: Any) -> Any:
    node = node_def_pb2.NodeDef(name=name, op="Placeholder")
    node.attr["dtype"].type = dtype.as_datatype_enum
    return node

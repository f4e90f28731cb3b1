"""Values of tensors that are the same in every run, computed by TensorFlow itself.

Such are those of constants, of variables that nothing writes to, and whatever deterministic
operations without state compute of them alone: masked kernels, averages of replicas, scales that
are kept as logarithms, conditions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.core.framework import node_def_pb2
from tensorflow.core.framework.graph_pb2 import GraphDef
from tensorflow.python.framework import op_def_registry

from mbn_rewrite.frontends import effects
from mbn_rewrite.frontends.saved_model.function_graph import FunctionGraph, Writes
from mbn_rewrite.frontends.saved_model.inlining import bodies_called
from mbn_rewrite.ir.channel_map import Array

# Larger tensors are not computed, not even on the way to smaller ones.
MOST_ELEMENTS = 1 << 26
# Larger constants are given to a computation rather than copied into its graph.
_LARGE = 1 << 12
_READS = {"ReadVariableOp", "ResourceGather"}
# Control flow of TensorFlow 1, and loops, which need not end.
_EXCLUDED = {
    *("Switch", "Merge", "Enter", "Exit", "NextIteration", "LoopCond"),
    *("StatelessWhile", "Placeholder", "PlaceholderV2"),
}


class Evaluation:
    """The tensors of a function that are the same in every run.

    Args:
        function: the function.
        writes: variables that functions write to, which are not the same in every run.
        given: the names of operations whose results are given; see `run`.
    """

    def __init__(self, function: FunctionGraph, writes: Writes, given: Iterable[str] = ()) -> None:
        self._function = function
        self._writes = writes
        self._given = frozenset(given)
        self._sessions: list[Any] = []

    def is_fixed(self, tensor: Any) -> bool:
        """Whether a tensor is the same in every run."""
        return tensor.op.name in self._fixed

    @cached_property
    def _fixed(self) -> frozenset[str]:
        fixed: set[str] = set()
        for op in self._function.graph.get_operations():  # each after what it reads
            known = op.inputs and all(tensor.op.name in fixed for tensor in op.inputs)
            given = op.name in self._given or self._is_source(op, fixed)
            if given or (known and self._computes(op)):
                fixed.add(op.name)
        return frozenset(fixed)

    def _is_source(self, op: Any, fixed: set[str]) -> bool:
        if op.type == "Const":
            return True
        if op.type not in _READS:
            return False
        variable = self._function.variable(op.inputs[0])
        if variable is None or id(variable) in self._writes.by:
            return False
        known = variable.shape.is_fully_defined() and variable.dtype == op.outputs[0].dtype
        return known and all(t.op.name in fixed for t in list(op.inputs)[1:])

    def _computes(self, op: Any) -> bool:
        """Whether an operation gives the same for the same, within bounds, and does no more."""
        if op.type in _EXCLUDED or not _is_pure(op.type):
            return False
        if any((t.shape.num_elements() or 0) > MOST_ELEMENTS for t in op.outputs):
            return False
        return all(
            inner.op in library or (inner.op not in _EXCLUDED and _is_pure(inner.op))
            for library, inner in self._bodies(op)
        )

    def _bodies(self, op: Any) -> Iterator[tuple[frozenset[str], Any]]:
        """The nodes of the functions that an operation calls, each with their names."""
        if not any("func" in attribute.type for attribute in op.op_def.attr):
            return iter(())
        bodies = list(bodies_called(self._function.graph_def, op.node_def))
        names = frozenset(body.signature.name for body in bodies)
        return ((names, node) for body in bodies for node in body.node_def)

    def run(self, tensors: list[Any], given: Mapping[str, Array] | None = None) -> list[Array]:
        """The values of tensors.

        Args:
            tensors: tensors that are the same in every run.
            given: the results of operations that are given, by the operation's name.
        """
        if not self._sessions:
            on_cpu = tf.compat.v1.ConfigProto(device_count={"GPU": 0})  # GPUs round products
            # Values are computed once or a few times: to optimise that takes longer.
            on_cpu.graph_options.rewrite_options.disable_meta_optimizer = True
            self._sessions.append(tf.compat.v1.Session(graph=self._imported(), config=on_cpu))
        (session,) = self._sessions
        feeds = {
            f"{op.name}:0": (given or {})[op.name]
            if op.name in self._given
            else self._source_value(op)
            for op in self._sources_of(tensors)
        }
        return [np.asarray(value) for value in session.run([t.name for t in tensors], feeds)]

    def _imported(self) -> Any:
        """The operations whose results are fixed, without what they wait for."""
        graph_def = GraphDef(
            versions=self._function.graph_def.versions, library=self._function.graph_def.library
        )
        for op in self._function.graph.get_operations():
            if op.name not in self._fixed:
                continue
            if self._is_fed(op):
                node = node_def_pb2.NodeDef(name=op.name, op="Placeholder")
                node.attr["dtype"].type = op.outputs[0].dtype.as_datatype_enum
            else:
                node = op.node_def
                data = [source for source in node.input if not source.startswith("^")]
                node.input[:] = data
                node.device = ""
                node.attr.pop("_class", None)
            graph_def.node.append(node)
        graph = tf.Graph()
        with graph.as_default():
            tf.graph_util.import_graph_def(graph_def, name="")
        return graph

    def _is_fed(self, op: Any) -> bool:
        if op.type == "Const":
            return (op.outputs[0].shape.num_elements() or 0) > _LARGE
        return op.type in _READS or op.name in self._given

    def _sources_of(self, tensors: list[Any]) -> Iterator[Any]:
        """The operations that are fed for tensors."""
        pending, seen = [tensor.op for tensor in tensors], set()
        while pending:
            op = pending.pop()
            if op.name in seen:
                continue
            seen.add(op.name)
            if self._is_fed(op):
                yield op
            else:
                pending += [tensor.op for tensor in op.inputs]

    def _source_value(self, op: Any) -> Array:
        if op.type == "Const":
            return tf.make_ndarray(op.get_attr("value"))
        variable = self._function.variable(op.inputs[0])
        if op.type == "ReadVariableOp":
            return np.asarray(variable.numpy())
        (indices,) = self.run([op.inputs[1]])
        return tf.gather(variable, indices, batch_dims=op.get_attr("batch_dims")).numpy()


def _is_pure(kind: str) -> bool:
    """Whether operations of a type give the same for the same, and do no more."""
    definition = op_def_registry.get(kind)
    return definition is not None and not definition.is_stateful and not effects.acts(kind)

"""Graphs that compute in a wider dtype, with the same weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.core.framework import node_def_pb2
from tensorflow.core.framework.graph_pb2 import GraphDef

from mbn_rewrite.comparison import NARROW, TOLERANCES
from mbn_rewrite.errors import RewriteError
from mbn_rewrite.frontends.saved_model.runnable_graph import RunnableGraph, with_own_names


@dataclass(frozen=True)
class Widening:
    """A dtype in place of narrower ones.

    Attributes:
        narrow: the names of the dtypes that it stands in for.
        wide: what a graph then computes in.
        most: how far the original may be from itself in that dtype, relative to its outputs, for
            anything to be concluded from how far another model is.
    """

    narrow: frozenset[str]
    wide: tf.DType
    most: float

    def applied(self, graph: RunnableGraph) -> RunnableGraph:
        """The same graph in the wide dtype.

        Raises:
            RewriteError: it uses more of a fused operation than there is in the wide dtype.
        """
        graph_def = GraphDef()
        graph_def.CopyFrom(graph.graph_def)
        for function in graph_def.library.function:
            for argument in (*function.signature.input_arg, *function.signature.output_arg):
                if self._is_narrow(argument.type):
                    argument.type = self.wide.as_datatype_enum
        bodies = [graph_def.node, *(function.node_def for function in graph_def.library.function)]
        for nodes in bodies:
            for node in nodes:
                self._widen(node)
        if self.wide == tf.float64:
            _unfuse_batch_norms(graph_def)
        with_own_names(graph_def)  # its functions are not those of the narrow graph
        captures = {name: self.tensor(external) for name, external in graph.captures.items()}
        return RunnableGraph(graph_def, graph.arguments, captures, graph.compiled)

    def tensor(self, value: Any) -> Any:
        """A tensor or variable in the wide dtype, if its dtype is narrower."""
        if not self._is_narrow(tf.as_dtype(value.dtype).as_datatype_enum):
            return value
        wide = tf.cast(value, self.wide)
        return tf.Variable(wide, trainable=False) if isinstance(value, tf.Variable) else wide

    def _is_narrow(self, datatype: int) -> bool:
        return bool(datatype) and tf.as_dtype(datatype).name in self.narrow

    def _widen(self, node: Any) -> None:
        for attribute in node.attr.values():
            if self._is_narrow(attribute.type):
                attribute.type = self.wide.as_datatype_enum
            for i, dtype in enumerate(attribute.list.type):
                if self._is_narrow(dtype):
                    attribute.list.type[i] = self.wide.as_datatype_enum
            if attribute.HasField("tensor") and self._is_narrow(attribute.tensor.dtype):
                array = tf.make_ndarray(attribute.tensor).astype(self.wide.as_numpy_dtype)
                attribute.tensor.CopyFrom(tf.make_tensor_proto(array))


TO_FLOAT32 = Widening(frozenset(NARROW), tf.float32, np.inf)
TO_FLOAT64 = Widening(frozenset({*NARROW, "float32"}), tf.float64, TOLERANCES["float16"])


def is_narrow(graph: RunnableGraph) -> bool:
    """Whether a graph computes in a dtype narrower than float32."""
    narrow = {tf.as_dtype(name).as_datatype_enum for name in NARROW}
    return any(
        attribute.type in narrow
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


# ------------------------------------------------------ the fused operation has no float64


def _unfuse_batch_norms(graph_def: GraphDef) -> None:
    """Arithmetic in place of fused BatchNormalizations at inference."""
    _unfuse_in(graph_def.node, "")
    for function in graph_def.library.function:
        unfused = _unfuse_in(function.node_def, ":z:0")
        for name, output in function.ret.items():
            function.ret[name] = _renamed(output, unfused)


def _unfuse_in(nodes: Any, output: str) -> set[str]:
    """The names of what is arithmetic now.

    Args:
        nodes: of a graph or of the body of a function.
        output: what follows a node's name, where its output is an input of others.
    """
    fused = [node for node in nodes if node.op.startswith("FusedBatchNorm")]
    names = {node.name for node in fused}
    added = [each for node in fused for each in _arithmetic(node, output)]
    nodes.extend(added)
    for node in nodes:
        for i, read in enumerate(node.input):
            node.input[i] = _renamed(read, names)
    return names


def _renamed(read: str, unfused: set[str]) -> str:
    """An input with the name that the output of a sum has, if it was that of a fused operation.

    Raises:
        RewriteError: it is another output than the first.
    """
    name, *rest = read.split(":")
    if name not in unfused or not rest or rest[0] in ("0", "z"):
        return read
    if rest[0] != "y":
        raise RewriteError(f"output {':'.join(rest)} of '{name}' is read")
    return f"{name}:z:0"


def _arithmetic(node: Any, output: str) -> list[Any]:
    """Turns a fused operation into the sum that gives its output; all that comes before it.

    Raises:
        RewriteError: it normalises by the batch.
    """
    if node.attr["is_training"].b:
        raise RewriteError(f"'{node.name}' normalises by the batch")
    dtype = node.attr["T"].type
    data_format, epsilon = node.attr["data_format"].s, node.attr["epsilon"].f
    x, gamma, beta, mean, variance, *controls = node.input
    added: list[Any] = []

    def call(op: str, *inputs: str) -> str:
        each = node_def_pb2.NodeDef(name=f"{node.name}/{op}_{len(added)}", op=op, input=inputs)
        each.attr["T"].type = dtype
        added.append(each)
        return each.name + (":y:0" if output and op == "Rsqrt" else output)

    def constant(array: np.ndarray) -> str:
        each = node_def_pb2.NodeDef(name=f"{node.name}/Const_{len(added)}", op="Const")
        each.attr["dtype"].type = tf.as_dtype(array.dtype).as_datatype_enum
        each.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(array))
        added.append(each)
        return each.name + (":output:0" if output else "")

    def along_channels(vector: str) -> str:
        if not data_format.startswith(b"NC"):
            return vector
        shape = constant(np.array([-1] + [1] * (len(data_format) - 2), np.int32))
        result = call("Reshape", vector, shape)
        added[-1].attr["Tshape"].type = tf.int32.as_datatype_enum
        return f"{added[-1].name}:output:0" if output else result

    wide = tf.as_dtype(dtype).as_numpy_dtype
    root = call("Rsqrt", call("AddV2", variance, constant(np.asarray(epsilon, wide))))
    scale = call("Mul", gamma, root)
    shift = call("Sub", beta, call("Mul", mean, scale))
    product = call("Mul", x, along_channels(scale))
    inputs = [product, along_channels(shift), *controls]
    node.op = "AddV2"
    node.attr.clear()
    node.attr["T"].type = dtype
    del node.input[:]
    node.input.extend(inputs)
    return added

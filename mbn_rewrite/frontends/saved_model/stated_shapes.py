"""Shapes that TensorFlow does not find by itself, noted in a graph before it is imported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tensorflow as tf
from tensorflow.core.framework.graph_pb2 import GraphDef

from mbn_rewrite.frontends.saved_model.variable_writes import ALIASES

_TRANSPOSED = {"Conv2DBackpropInput": 4, "Conv3DBackpropInputV2": 5}  # with their ranks


def state_shapes(graph_def: GraphDef, variables: Mapping[str, Any]) -> None:
    """Notes the shapes of variables where they are read, and the channels of convolutions.

    A handle does not tell the shape of its variable. A transposed convolution is told the shape of
    its result, in which the number of channels may have been put into a vector and taken out again.

    Args:
        graph_def: the graph.
        variables: Placeholder name -> the tf.Variable whose handle it stands for.
    """
    nodes = {node.name: node for node in graph_def.node}
    for node in graph_def.node:
        if node.op in ("ReadVariableOp", "ResourceGather"):
            variable = _variable_read(nodes, node, variables)
            shape = None if variable is None else _shape_read(nodes, node, variable.shape)
            if shape is not None:
                _note(node, shape)
        elif node.op in _TRANSPOSED:
            rank = _TRANSPOSED[node.op]
            axis = 1 if node.attr["data_format"].s in (b"NCHW", b"NCDHW") else rank - 1
            channels = _element(nodes, node.input[0], axis)
            if channels is not None:
                _note(node, tf.TensorShape([None] * axis + [channels] + [None] * (rank - 1 - axis)))


def state_shapes_of_rows(graph_def: GraphDef, graph: Any, variables: Mapping[str, Any]) -> bool:
    """Notes the shapes of rows that are gathered by indices of known shape; returns whether it did.

    Args:
        graph_def: the graph.
        graph: the same, imported, which tells the shapes of indices.
        variables: as for `state_shapes`.
    """
    nodes = {node.name: node for node in graph_def.node}
    found = False
    for node in graph_def.node:
        if node.op == "ResourceGather" and not node.attr["batch_dims"].i:
            op, variable = (
                graph.get_operation_by_name(node.name),
                _variable_read(nodes, node, variables),
            )
            if variable is not None and op.outputs[0].shape.rank is None:
                rows = op.inputs[1].shape.concatenate(variable.shape[1:])
                found = found or rows.rank is not None
                _note(node, rows)
    return found


def _variable_read(nodes: Mapping[str, Any], node: Any, variables: Mapping[str, Any]) -> Any:
    """The variable whose handle an operation is given, or None."""
    source = nodes[_name(node.input[0])]
    while source.op in ALIASES:
        source = nodes[_name(source.input[0])]
    return variables.get(source.name)


def _shape_read(nodes: Mapping[str, Any], node: Any, shape: Any) -> Any:
    """The shape of what is read of a variable of some shape, or None."""
    if node.op == "ReadVariableOp":
        return shape
    indices = _constant(nodes, node.input[1])
    if indices is None or node.attr["batch_dims"].i or shape.rank is None:
        return None
    return tf.TensorShape([*indices.shape, *shape[1:]])


def _note(node: Any, shape: Any) -> None:
    del node.attr["_output_shapes"].list.shape[:]
    node.attr["_output_shapes"].list.shape.add().CopyFrom(shape.as_proto())


def _name(source: str) -> str:
    return source.partition(":")[0]


def _element(nodes: Mapping[str, Any], source: str, index: int) -> int | None:
    """An element of a vector of sizes, where it is a constant."""
    node = nodes.get(_name(source))
    while node is not None and node.op in ALIASES:
        node = nodes.get(_name(node.input[0]))
    if node is None:
        return None
    if node.op == "Pack":
        count = node.attr["N"].i
        return _number(nodes, node.input[index]) if -count <= index < count else None
    values = _constant(nodes, source)
    return int(values[index]) if values is not None and values.ndim == 1 else None


def _number(nodes: Mapping[str, Any], source: str) -> int | None:
    """A size, where it is a constant or one element of a vector."""
    value = _constant(nodes, source)
    if value is not None:
        return int(value) if value.ndim == 0 else None
    node = nodes.get(_name(source))
    if node is None or node.op != "StridedSlice" or node.attr["shrink_axis_mask"].i != 1:
        return None
    first = _constant(nodes, node.input[1])
    return None if first is None or first.size != 1 else _element(nodes, node.input[0], first[0])


def _constant(nodes: Mapping[str, Any], source: str) -> Any:
    node = nodes.get(_name(source))
    return tf.make_ndarray(node.attr["value"].tensor) if node and node.op == "Const" else None

"""Finds BatchNormalization that cannot be rewritten, so that it is listed all the same.

It is in the body of a loop, a branch or a call that stays one, or its variance is written to.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mbn_rewrite.frontends.saved_model.function_graph import FunctionGraph, source_of
from mbn_rewrite.frontends.saved_model.inlining import bodies_called
from mbn_rewrite.frontends.saved_model.match_batchnorm import FUSED
from mbn_rewrite.frontends.saved_model.variable_writes import ALIASES, is_at_inference
from mbn_rewrite.frontends.saved_model.weights import Constants


def in_functions_called(function: FunctionGraph, op: Any) -> Iterator[tuple[str, str]]:
    """The BatchNormalizations in the functions that an operation calls.

    Yields:
        The name of the function, and of the node.
    """
    for body in bodies_called(function.graph_def, op.node_def):
        for node in body.node_def:
            if _is_batchnorm(node, body):
                yield body.signature.name, node.name


def written_variances(constants: Constants, op: Any) -> Iterator[tuple[Any, str]]:
    """The variables in a variance that an operation takes the root of, if functions write to them.

    Yields:
        The variable, and the function that writes to it, as in `Writes.by`.
    """
    if op.type not in ("Rsqrt", "Sqrt") or constants.value(op.outputs[0]) is not None:
        return
    added = source_of(op.inputs[0]).op
    for tensor in added.inputs if added.type in ("Add", "AddV2") else ():
        written = constants.written(tensor)
        if written is not None:
            yield written


def _is_batchnorm(node: Any, body: Any) -> bool:
    """Whether a node of a function is a BatchNormalization at inference, or part of one.

    Arithmetic is known by the root of a variance that is not computed from data: it is
    read, or handed to the function.
    """
    if node.op in FUSED:
        return is_at_inference(node)
    if node.op not in ("Rsqrt", "Sqrt"):
        return False
    nodes = {inner.name: inner for inner in body.node_def}
    added = nodes.get(node.input[0].partition(":")[0])
    if added is None or added.op not in ("Add", "AddV2"):
        return False
    return any(_is_given(nodes, source) for source in added.input)


def _is_given(nodes: dict[str, Any], source: str) -> bool:
    node = nodes.get(source.lstrip("^").partition(":")[0])
    while node is not None and node.op in ALIASES | {"Cast", "Reshape", "ReadVariableOp"}:
        node = nodes.get(node.input[0].partition(":")[0])
    return node is None  # an argument of the function

"""Finds BatchNormalization that cannot be rewritten, so that it is listed all the same.

It is in the body of a loop, a branch or a call that stays one, behind a switch of TensorFlow 1, its
variance is written to, or it normalises over several axes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mbn_rewrite.frontends.saved_model.branches import BRANCHES
from mbn_rewrite.frontends.saved_model.function_graph import FunctionGraph, source_of
from mbn_rewrite.frontends.saved_model.inlining import bodies_called, called_by
from mbn_rewrite.frontends.saved_model.match_batchnorm import FUSED
from mbn_rewrite.frontends.saved_model.variable_writes import (
    ALIASES,
    CALLS_BEFORE_ARGUMENTS,
    is_at_inference,
)
from mbn_rewrite.frontends.saved_model.weights import Constants

# What TensorFlow appends to names in functions of functions that it inlines.
_INLINED = re.compile("_tfg_inlined_.*")


@dataclass(frozen=True)
class Found:
    """A BatchNormalization in a function that an operation calls.

    Attributes:
        body: the name of the function.
        node: the name of the node.
        condition: of a branch, the condition under which it is taken, else None.
        variable: the variable that is its variance, or its scale; None where that is not known.
    """

    body: str
    node: str
    condition: bool | None
    variable: Any


def in_functions_called(function: FunctionGraph, op: Any) -> Iterator[Found]:
    """The BatchNormalizations in the functions that an operation calls."""
    for called, condition in _ways_of(op.node_def):
        for body in bodies_called(function.graph_def, called):
            for node in body.node_def:
                parameter = _parameter_of_norm(node, body)
                if parameter is not None:
                    variable = _variable_behind(function, op, body, parameter)
                    name = _INLINED.sub("", node.name)
                    yield Found(body.signature.name, name, condition, variable)


def _variable_behind(function: FunctionGraph, op: Any, body: Any, source: str) -> Any:
    """The variable that a tensor of a function is, if the function is called directly."""
    if body.signature.name not in called_by(op.node_def) or op.type not in CALLS_BEFORE_ARGUMENTS:
        return None
    argument = _argument_behind({node.name: node for node in body.node_def}, source)
    names = [given.name for given in body.signature.input_arg]
    if argument not in names:
        return None
    tensor = op.inputs[CALLS_BEFORE_ARGUMENTS[op.type] + names.index(argument)]
    before = source_of(tensor).op
    handle = before.inputs[0] if before.type == "ReadVariableOp" else tensor
    return function.variable(handle)


def _ways_of(node: Any) -> Iterator[tuple[Any, bool | None]]:
    """A node; a branch as a node for each of its ways, with the condition."""
    if node.op not in BRANCHES:
        yield node, None
        return
    for attribute, condition in (("then_branch", True), ("else_branch", False)):
        way = type(node)()
        way.attr[attribute].CopyFrom(node.attr[attribute])
        yield way, condition


def over_several_axes(constants: Constants, op: Any) -> tuple[Any, str] | None:
    """A variance that varies along several axes, if an operation takes its root.

    Returns:
        The stored array, and its axes in words.
    """
    if op.type not in ("Rsqrt", "Sqrt") or not constants.is_fixed(op.outputs[0]):
        return None
    added = source_of(op.inputs[0]).op
    for tensor in added.inputs if added.type in ("Add", "AddV2") else ():
        weight = constants.weight(tensor)
        axes = [axis for axis, size in enumerate(weight.shape) if size > 1] if weight else []
        if weight is not None and len(axes) > 1:
            shape = weight.shape
            return weight.stored, str(axes) if shape[0] == 1 else f"of the sizes {list(shape)}"
    return None


def switched_variance(constants: Constants, op: Any) -> Any:
    """The output of a switch of TensorFlow 1 that a variance comes through, or None.

    The operation takes the root of that variance, if it is of a BatchNormalization at all.
    """
    if op.type not in ("Rsqrt", "Sqrt") or constants.is_fixed(op.outputs[0]):
        return None
    added = source_of(op.inputs[0]).op
    for tensor in added.inputs if added.type in ("Add", "AddV2") else ():
        found = constants.switch_before(tensor)
        if found is not None:
            return found
    return None


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


def _parameter_of_norm(node: Any, body: Any) -> str | None:
    """A parameter of a BatchNormalization at inference; None where a node of a function is none.

    Arithmetic is known by the root of a variance that is not computed from data: it is
    read, or handed to the function.
    """
    if node.op in FUSED:
        return node.input[1] if is_at_inference(node) else None
    if node.op not in ("Rsqrt", "Sqrt"):
        return None
    nodes = {inner.name: inner for inner in body.node_def}
    added = nodes.get(node.input[0].partition(":")[0])
    if added is None or added.op not in ("Add", "AddV2"):
        return None
    return next((source for source in added.input if _argument_behind(nodes, source)), None)


def _argument_behind(nodes: dict[str, Any], source: str) -> str:
    """The argument of a function that a tensor holds, or ""."""
    while True:
        name = source.lstrip("^").partition(":")[0]
        node = nodes.get(name)
        if node is None:
            return name
        if node.op not in ALIASES | {"Cast", "Reshape", "ReadVariableOp"}:
            return ""
        source = node.input[0]

"""Flags that decide which branches a function takes.

A flag may be a default or a variable that nothing writes to: then its branches are decided
beforehand. Or it is an input of the function: then a BatchNormalization in such a branch stays, and
the reason names the input.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.core.framework.graph_pb2 import GraphDef

from mbn_rewrite.frontends.saved_model.branches import (
    CONDITION,
    SELECTIONS,
    decide_branches,
    decide_selections,
    decide_switches,
)
from mbn_rewrite.frontends.saved_model.compiled_parts import marked_like, opened
from mbn_rewrite.frontends.saved_model.evaluation import Evaluation
from mbn_rewrite.frontends.saved_model.function_graph import (
    FunctionGraph,
    Writes,
    has_side_effect,
    with_graph_def,
)
from mbn_rewrite.frontends.saved_model.inlining import display_name, optimized

_NAMED = 3  # flags that a sentence names


# ---------------------------------------------------------------------- decided beforehand


def decided(function: FunctionGraph, writes: Writes) -> FunctionGraph | None:
    """A function without the branches that it never takes; None where none is known.

    Args:
        function: the function.
        writes: variables that functions write to, which decide nothing beforehand.
    """
    evaluation = Evaluation(function, writes)
    conditions, flags = _known_conditions(function, evaluation)
    chosen = _chosen(function, evaluation, flags)
    if not conditions and not chosen:
        return None
    graph_def = GraphDef()
    graph_def.CopyFrom(function.graph_def)
    fetched = [f"{name}:0" for name in _placeholders(function)] + list(function.results)
    fetched += [op.name for op in function.graph.get_operations() if has_side_effect(op)]
    if decide_branches(graph_def, lambda node: conditions.get(node.name)):
        graph_def = marked_like(graph_def, optimized(graph_def, fetched))
        if not function.compiled:
            graph_def = opened(graph_def, lambda graph: optimized(graph, fetched))
    decide_switches(graph_def, lambda node: conditions.get(node.name))
    decide_selections(graph_def, chosen)
    return replace(with_graph_def(function, graph_def), flags=function.flags | flags)


def _placeholders(function: FunctionGraph) -> list[str]:
    """The Placeholders of a function that are there."""
    there = {node.name for node in function.graph_def.node}
    names = dict.fromkeys([*function.arguments, *function.captures, *function.variables])
    return [name for name in names if name in there]


def _known_conditions(
    function: FunctionGraph, evaluation: Evaluation
) -> tuple[dict[str, bool], dict[str, str]]:
    """The conditions of branches that are the same in every run, and the flags behind them."""
    conditions: dict[str, bool] = {}
    flags: dict[str, str] = {}
    for op in function.graph.get_operations():
        if op.type in CONDITION:
            tensor = op.inputs[CONDITION[op.type]]
            if evaluation.is_fixed(tensor):
                conditions[op.name] = _truth(evaluation.run([tensor])[0])
                flags |= _flags_behind(function, evaluation, tensor)
    return conditions, flags


def _chosen(
    function: FunctionGraph, evaluation: Evaluation, flags: dict[str, str]
) -> dict[str, int]:
    """The inputs that selections by one flag give in every run; adds the flags to `flags`.

    What is the same in every run itself is left alone, and so is what is broadcast.
    """
    found: dict[str, int] = {}
    for op in function.graph.get_operations():
        if op.type not in SELECTIONS or evaluation.is_fixed(op.outputs[0]):
            continue
        condition = op.inputs[0]
        if condition.shape.num_elements() != 1 or not evaluation.is_fixed(condition):
            continue
        index = 1 if evaluation.run([condition])[0].item() else 2
        shape = op.inputs[index].shape
        if shape.is_fully_defined() and shape == op.outputs[0].shape:
            found[op.name] = index
            flags.update(_flags_behind(function, evaluation, condition))
    return found


def _truth(value: Any) -> bool:
    """The condition that a value stands for: a number, a text, or whether there is any."""
    if value.ndim:
        return bool(value.size)
    return bool(value.item())


def _flags_behind(
    function: FunctionGraph, evaluation: Evaluation, tensor: Any
) -> Iterator[tuple[str, str]]:
    for op in _upstream(tensor):
        variable = function.variable(op.inputs[0]) if op.type == "ReadVariableOp" else None
        if variable is not None:
            yield variable.name.partition(":")[0], f"stored as {_shown(variable.numpy())}"
        elif op.type == "PlaceholderWithDefault" and evaluation.is_fixed(op.outputs[0]):
            (value,) = evaluation.run([op.outputs[0]])
            yield display_name(op.name), f"{_shown(value)} by default"


def _shown(value: Any) -> str:
    value = np.asarray(value)
    if value.size > 4:
        return f"an array of the shape {value.shape}"
    found = value.tolist()
    return repr(found.decode(errors="replace") if isinstance(found, bytes) else found)


def _upstream(tensor: Any) -> Iterator[Any]:
    """The operations that a tensor is computed from."""
    pending, seen = [tensor.op], set()
    while pending:
        op = pending.pop()
        if op.name not in seen:
            seen.add(op.name)
            yield op
            pending += [before.op for before in reversed(op.inputs)]


def notes_on(functions: Iterable[FunctionGraph]) -> tuple[str, ...]:
    """Notes for the user on what was decided beforehand, a sentence for each function."""
    return tuple(_note(function) for function in functions if function.flags)


def _note(function: FunctionGraph) -> str:
    listed = [f"'{name}' is {value}" for name, value in list(function.flags.items())[:_NAMED]]
    if len(function.flags) > _NAMED:
        listed.append(f"so on for {len(function.flags) - _NAMED} more")
    known = " and ".join(filter(None, [", ".join(listed[:-1]), listed[-1]]))
    return (
        f"In '{function.name}' {known}, and nothing changes that: the branches that would be taken "
        "otherwise are left out"
    )


# --------------------------------------------------------------------- decided by an input


def input_that_decides(function: FunctionGraph, op: Any) -> str:
    """The input of a function that alone decides what a branch or switch does, or ""."""
    tensor = op.inputs[CONDITION[op.type]]
    arguments = set(function.arguments)
    found = [before.name for before in _upstream(tensor) if before.name in arguments]
    if len(found) != 1:
        return ""
    (argument,) = found
    (given,) = function.graph.get_operation_by_name(argument).outputs
    one = given.dtype == tf.bool if given.shape.rank is None else given.shape.num_elements() == 1
    if not one or not Evaluation(function, Writes.of(function), [argument]).is_fixed(tensor):
        return ""
    return argument


def switch_before(function: FunctionGraph, evaluation: Evaluation, tensor: Any) -> Any:
    """The output of a switch of TensorFlow 1 that a weight comes through, or None.

    None also where anything else than weights comes through a switch.
    """
    found = None
    pending, seen = [tensor], set()
    while pending:
        current = pending.pop()
        if current.name in seen:
            continue
        seen.add(current.name)
        if current.op.type == "Switch":
            data = current.op.inputs[0]
            if function.variable(data) is None and not evaluation.is_fixed(data):
                return None
            found = current
        else:
            pending += list(current.op.inputs)
    return found


def advice(function: FunctionGraph, op: Any, wanted: bool | None = None) -> str:
    """What decides a branch, and how to have it taken, to complete "it is in a branch that ...".

    Args:
        function: the function.
        op: the branch or switch.
        wanted: the condition under which it is taken, if that is to be said.
    """
    argument = input_that_decides(function, op)
    if not argument:
        return ""
    label = function.labels.get(argument)
    if label is None:  # of a method
        return (
            f"the argument '{argument}' of '{function.name}' decides (--signatures, in Python "
            "signatures=[...], leaves that method out)"
        )
    value = None if wanted is None else _value_for(function, argument, op, wanted)
    shown = "..." if value is None else value
    return (
        f"the input '{label}' decides (to set it: --set_input={label}={shown}, in Python "
        f"set_input={{'{label}': {shown}}})"
    )


def advice_on_switch(function: FunctionGraph, tensor: Any) -> str:
    """As `advice`, on the branch that an output of a switch of TensorFlow 1 leads into."""
    said = advice(function, tensor.op, bool(tensor.value_index))
    return said or f"Switch '{display_name(tensor.op.name)}' decides while the model runs"


def _value_for(function: FunctionGraph, argument: str, op: Any, wanted: bool) -> bool | None:
    """The value of a flag for which a branch is taken; None where it is no truth value."""
    tensor = op.inputs[CONDITION[op.type]]
    given = function.graph.get_operation_by_name(argument).outputs[0]
    if given.dtype != tf.bool:
        return None
    evaluation = Evaluation(function, Writes.of(function), [argument])
    for value in (False, True):
        array = np.full(given.shape.as_list() if given.shape.rank else (), value)
        if _truth(evaluation.run([tensor], {argument: array})[0]) == wanted:
            return value
    return None

"""Branches that are decided beforehand: what would be done otherwise is taken out of a graph.

Some conditions are the same in every run, as flags are that say whether a model trains: a default
that no caller replaces, a constant, what is computed of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import tensorflow as tf
from tensorflow.core.framework.graph_pb2 import GraphDef

BRANCHES = {"If", "StatelessIf"}
SWITCHES = {"Switch", "RefSwitch"}
# The number of the input that decides.
CONDITION = {**dict.fromkeys(BRANCHES, 0), **dict.fromkeys(SWITCHES, 1)}
SELECTIONS = {"Select", "SelectV2"}  # input 1 where input 0 is true, else input 2

# Gives the condition of a branch or switch, None where it is not known.
ConditionOf = Callable[[Any], bool | None]


def conditions_in(graph_def: GraphDef) -> ConditionOf:
    """The conditions that are constants of a graph, or computed of such."""
    nodes = {node.name: node for node in graph_def.node}
    return lambda node: _constant_bool(nodes, node.input[CONDITION[node.op]])


def defaults_in(graph_def: GraphDef) -> dict[str, str]:
    """The defaults that decide branches, in words, by the names of their nodes."""
    nodes = {node.name: node for node in graph_def.node}
    found: dict[str, str] = {}
    for node in graph_def.node:
        if node.op in CONDITION:
            source = node.input[CONDITION[node.op]]
            if _constant_bool(nodes, source) is not None:
                found |= _defaults_behind(nodes, source)
    return found


def _defaults_behind(nodes: Mapping[str, Any], source: str) -> Iterator[tuple[str, str]]:
    node = nodes.get(_tensor(source)[0])
    if node is None:
        return
    if node.op == "PlaceholderWithDefault":
        yield node.name, f"{_constant_bool(nodes, source)} by default"
    else:
        for before in node.input:
            yield from _defaults_behind(nodes, before)


# ------------------------------------------------------------------------------- decisions


def decide_branches(graph_def: GraphDef, condition_of: ConditionOf) -> bool:
    """Turns branches whose conditions are known into calls; returns whether there were any."""
    decided = False
    for node in graph_def.node:
        if node.op not in BRANCHES:
            continue
        condition = condition_of(node)
        if condition is None:
            continue
        branch = node.attr["then_branch" if condition else "else_branch"].func
        node.op = "PartitionedCall" if node.op == "StatelessIf" else "StatefulPartitionedCall"
        node.attr["f"].func.CopyFrom(branch)
        for name in ("Tcond", "then_branch", "else_branch", "output_shapes"):
            node.attr.pop(name, None)
        del node.input[0]
        decided = True
    return decided


def decide_switches(graph_def: GraphDef, condition_of: ConditionOf) -> bool:
    """Lets data flow past the Switch and Merge of TensorFlow 1 where they are decided.

    A Switch gives its input on output 1 where its condition is true, else on output 0; what
    reads the other output never runs. A Merge gives the input that arrives.

    Returns:
        Whether any is decided.
    """
    taken: dict[str, int] = {}
    for node in graph_def.node:
        if node.op in SWITCHES:
            condition = condition_of(node)
            if condition is not None:
                taken[node.name] = int(condition)
    if not taken:
        return False
    dead = _never_run(graph_def, taken)
    for node in graph_def.node:
        live = [source for source in node.input if not _is_dead(source, dead)]
        if node.op in ("Merge", "RefMerge") and node.name not in dead:
            data = [source for source in live if not source.startswith("^")]
            indexed = any(
                _tensor(source) == (node.name, 1) for n in graph_def.node for source in n.input
            )
            if len(data) == 1 and not indexed:
                _become_identity(node, live)
        elif node.name in taken and node.name not in dead:
            _become_identity(node, [node.input[0], *(x for x in live if x.startswith("^"))])
    for node in graph_def.node:
        for i, source in enumerate(node.input):
            name, _ = _tensor(source)
            if name in taken and not source.startswith("^"):
                node.input[i] = name  # an Identity has one output
    living = [node for node in graph_def.node if node.name not in dead]
    del graph_def.node[:]
    graph_def.node.extend(living)
    return True


def decide_selections(graph_def: GraphDef, chosen: Mapping[str, int]) -> None:
    """Lets data flow past operations that choose between two tensors, where they are decided.

    Args:
        graph_def: the graph.
        chosen: the name of such an operation -> the number of the input that it gives.
    """
    for node in graph_def.node:
        if node.name in chosen:
            waits = [source for source in node.input if source.startswith("^")]
            _become_identity(node, [node.input[chosen[node.name]], *waits])


def _never_run(graph_def: GraphDef, taken: dict[str, int]) -> set[Any]:
    """The nodes, and (switch, output) pairs, that no run of the graph reaches."""
    dead: set[Any] = {(name, 1 - output) for name, output in taken.items()}
    grown = True
    while grown:  # in the order of the nodes mostly one pass, and one that finds no more
        grown = False
        for node in graph_def.node:
            if node.name in dead or not node.input:
                continue
            gone = [_is_dead(source, dead) for source in node.input]
            data = [g for g, s in zip(gone, node.input, strict=True) if not s.startswith("^")]
            merges = node.op in ("Merge", "RefMerge")
            if (all(data) and data) if merges else any(gone):
                dead.add(node.name)
                grown = True
    return dead


def _is_dead(source: str, dead: set[Any]) -> bool:
    name, output = _tensor(source)
    return name in dead or (name, output) in dead


def _tensor(source: str) -> tuple[str, int]:
    """A node's name and output; -1 for a control input."""
    if source.startswith("^"):
        return source[1:], -1
    name, _, output = source.partition(":")
    return name, int(output or 0)


def _become_identity(node: Any, inputs: list[str]) -> None:
    dtype = node.attr["T"].type
    inputs = [s for s in inputs if not s.startswith("^")] + [s for s in inputs if s[0] == "^"]
    node.op = "Identity"
    node.attr.clear()
    node.attr["T"].type = dtype
    del node.input[:]
    node.input.extend(inputs)


def _constant_bool(nodes: Mapping[str, Any], source: str) -> bool | None:
    """The value of a condition that is the same in every run, or None."""
    node = nodes.get(_tensor(source)[0])
    if node is None:
        return None
    if node.op in ("Identity", "PlaceholderWithDefault"):
        # A default that the caller replaces has become a Placeholder, see `inlined`.
        return _constant_bool(nodes, node.input[0])
    if node.op == "LogicalNot":
        inner = _constant_bool(nodes, node.input[0])
        return None if inner is None else not inner
    if node.op in ("LogicalAnd", "LogicalOr"):
        both = [_constant_bool(nodes, source) for source in node.input[:2]]
        if None in both:
            return None
        return all(both) if node.op == "LogicalAnd" else any(both)
    if node.op == "Const" and node.attr["dtype"].type == tf.bool.as_datatype_enum:
        return bool(tf.make_ndarray(node.attr["value"].tensor))
    return None

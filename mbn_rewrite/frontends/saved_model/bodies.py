"""Functions that loops and calls run, as their operations read each other, by names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import tensorflow as tf
from tensorflow.core.framework.attr_value_pb2 import AttrValue
from tensorflow.python.framework import op_def_registry

from mbn_rewrite.frontends.saved_model.function_graph import SHAPE_ONLY
from mbn_rewrite.frontends.saved_model.variable_writes import ALIASES, READS
from mbn_rewrite.ir.channel_map import Array


def attribute(node: Any, name: str) -> Any:
    """An attribute of a node; an empty one where it has none of that name."""
    # Asking the node itself would give it an empty one.
    return node.attr[name] if name in node.attr else AttrValue()


def operands(node: Any) -> tuple[str, ...]:
    """The tensors that a node reads, without what it only waits for."""
    return tuple(source for source in node.input if source[0] != "^")


def _acts(node: Any) -> bool:
    """Whether a node may do more than give its outputs."""
    definition = op_def_registry.get(node.op)
    return definition is None or (definition.is_stateful and node.op not in READS)


@dataclass(frozen=True)
class Body:
    """A function in a graph's library. Tensors are named as there: "node:output:0", or arguments.

    Attributes:
        definition: its FunctionDef.
    """

    definition: Any

    @cached_property
    def nodes(self) -> dict[str, Any]:
        """Its nodes by name."""
        return {node.name: node for node in self.definition.node_def}

    @cached_property
    def arguments(self) -> list[str]:
        return [argument.name for argument in self.definition.signature.input_arg]

    @cached_property
    def results(self) -> list[str]:
        """The tensors that it gives, past operations that only forward them."""
        given = self.definition.ret
        return [self.source(given[out.name]) for out in self.definition.signature.output_arg]

    def source(self, tensor: str) -> str:
        """The tensor that this one forwards."""
        node = self.node(tensor)
        while node is not None and node.op in ALIASES:
            tensor = node.input[0]
            node = self.node(tensor)
        return tensor

    def node(self, tensor: str) -> Any:
        """The node that gives a tensor, or None for an argument."""
        return self.nodes.get(tensor.partition(":")[0]) if ":" in tensor else None

    def constant(self, tensor: str) -> Array | None:
        """The value of a constant."""
        node = self.node(self.source(tensor))
        is_constant = node is not None and node.op == "Const"
        return tf.make_ndarray(node.attr["value"].tensor) if is_constant else None

    @cached_property
    def _readers(self) -> dict[str, list[tuple[Any, int]]]:
        """By tensor, the operations that read it for results, by more than shapes, or that act."""
        needed: set[str] = set()
        pending = [self.node(tensor) for tensor in self.results]
        pending += [node for node in self.definition.node_def if _acts(node)]
        while pending:
            node = pending.pop()
            if node is not None and node.name not in needed:
                needed.add(node.name)
                read = () if node.op in SHAPE_ONLY else operands(node)
                pending += [self.node(source) for source in read]
        readers: dict[str, list[tuple[Any, int]]] = {}
        for node in self.definition.node_def:
            if node.name in needed and node.op not in ALIASES:
                for place, source in enumerate(operands(node)):
                    readers.setdefault(self.source(source), []).append((node, place))
        return readers

    def readers(self, tensor: str) -> list[tuple[Any, int]]:
        """The operations that read a tensor, and by which input."""
        return self._readers.get(tensor, [])

    def readers_of(self, node: Any) -> Iterator[tuple[str, list[tuple[Any, int]]]]:
        """The tensors of a node that are read, with the operations that do."""
        for tensor, found in self._readers.items():
            if tensor.startswith(f"{node.name}:"):
                yield tensor, found

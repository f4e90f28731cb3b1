"""Calls as Keras has them on record: what decides whether they can have layers of their own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from mbn_rewrite.frontends.keras_common.adapter import KerasAdapter
from mbn_rewrite.frontends.keras_common.calls import Record
from mbn_rewrite.frontends.keras_common.cloning import label
from mbn_rewrite.ir.graph import Node


@dataclass
class RecordedCalls:
    """The recorded calls behind nodes of a graph.

    Attributes:
        keras: the adapter of the model's Keras.
        by_value: the first value that a node gives -> its call, and the model that makes it.
    """

    keras: KerasAdapter
    by_value: dict[int, tuple[Record, Any]] = field(default_factory=dict)

    def add(self, value: int, record: Record, model: Any) -> None:
        """Notes a call, unless the value is that of a call within it."""
        self.by_value.setdefault(value, (record, model))

    def described(self, nodes: Iterable[Node], held: Collection[int]) -> list[Node]:
        """Nodes with what there is to know where their layer is called several times.

        Args:
            nodes: the nodes.
            held: ids of layers in attributes of others.
        """
        visits = Counter(id(record.outputs[0]) for record, _ in self.by_value.values())
        return [
            replace(node, why_shared=self._why_shared(node, visits, held), place=self._place(node))
            for node in nodes
        ]

    def numbers(self, nodes: Iterable[Node]) -> dict[int, int]:
        """id(first Keras tensor that a call gives) -> its number among the calls of its layer."""
        counts: Counter[str] = Counter()
        numbers = {}
        for node in nodes:
            if node.outputs[0] in self.by_value:
                record, _ = self.by_value[node.outputs[0]]
                numbers[id(record.outputs[0])] = counts[node.owner]
            counts[node.owner] += 1
        return numbers

    def _why_shared(self, node: Node, visits: Counter[int], held: Collection[int]) -> str:
        """Why a call cannot be made by a layer of its own in a copy, as a clause, or ""."""
        if node.caller:
            return f"code of {node.caller} calls it"
        if node.outputs[0] not in self.by_value:
            return "it is part of another layer"
        record, model = self.by_value[node.outputs[0]]
        if visits[id(record.outputs[0])] > 1:
            return f"it is part of {label(model)}, which is called several times"
        if id(record.layer) in held:
            return "it is held in an attribute, too"
        return ""

    def _place(self, node: Node) -> int:
        """Place of a call among all of its layer, in the order in which they were made."""
        if not node.op.chains or node.outputs[0] not in self.by_value:
            return 0
        record, _ = self.by_value[node.outputs[0]]
        made = enumerate(self.keras.all_calls_of(record.layer))
        return next((i for i, call in made if call.outputs[0] is record.outputs[0]), 0)

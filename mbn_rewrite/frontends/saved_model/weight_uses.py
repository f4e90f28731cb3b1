"""Uses of stored arrays by all functions, which decide whether weights can be edited."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import tensorflow as tf

from mbn_rewrite.frontends.saved_model.function_graph import SHAPE_ONLY, Writes
from mbn_rewrite.frontends.saved_model.reading import LinearCall
from mbn_rewrite.frontends.saved_model.variable_writes import ALIASES
from mbn_rewrite.frontends.saved_model.weights import Constants
from mbn_rewrite.ir.graph import Linear, Recurrent


@dataclass
class WeightUses:
    """Stored arrays, and the operations that use them.

    Attributes:
        writes: variables that functions write to.
        pinned: the keys of stored arrays that functions carried over unread use.
    """

    writes: Writes
    pinned: set[Any]
    _labels: dict[Any, dict[int, str]] = field(default_factory=dict)  # key -> id(op) -> label

    def note(self, constants: Constants, op: Any, label: str) -> None:
        """Notes the stored arrays that an operation uses, past reshapes and casts."""
        if op.type in SHAPE_ONLY:
            return
        gives_weight = op.outputs and constants.weight(op.outputs[0]) is not None
        for tensor in op.inputs:
            weight = constants.weight(tensor)
            if weight is not None and not gives_weight:
                self._add(weight.stored.key, op, label)
            computed = constants.computed(tensor)
            if computed is not None and op.type not in ALIASES:
                self._add(computed.stored.key, op, label)
            is_handle = tensor.dtype == tf.resource
            variable = constants.function.variable(tensor) if is_handle else None
            if variable is not None and op.type not in ALIASES | {"ReadVariableOp"}:
                self._add(("variable", id(variable)), op, label)

    def note_output(self, constants: Constants, tensor: Any) -> None:
        """Notes the stored array that a function gives as an output, if it is one."""
        weight = constants.weight(tensor) or constants.computed(tensor)
        if weight is not None:
            self._add(weight.stored.key, tensor, f"an output of '{constants.function.name}'")

    def _add(self, key: Any, user: Any, label: str) -> None:
        self._labels.setdefault(key, {})[id(user)] = label

    def why_fixed(self, calls: Sequence[LinearCall]) -> str:
        """Why the weights of an owner with these calls cannot be edited, or ""."""
        first = calls[0].described
        expected: dict[Any, set[int]] = {}
        for call in calls:
            described = call.described
            assert isinstance(described.op, (Linear, Recurrent))
            if described.op != first.op:
                return "uses its weights in several ways"
            users = {"kernel": call.op, "bias": described.result.op, **described.users}
            for name, weight in described.weights.items():
                user = users[name]
                expected.setdefault(weight.stored.key, set()).add(id(user))
        stored = {weight.stored.key: weight.stored for weight in first.weights.values()}
        if len(stored) < len(first.weights):
            return "has one array as kernel and bias"
        for key, array in stored.items():
            if key in self.pinned:
                return f"shares '{array.name}' with a function that is carried over as it was"
            if id(array.place) in self.writes.by:
                return f"has weights that {self.writes.by[id(array.place)]}"
            labels = self._labels.get(key, {})
            others = [label for op, label in labels.items() if op not in expected[key]]
            if others:
                return f"shares its weights with {others[0]}"
        return ""

"""Attribution of operations to the BatchNormalization that they run for.

    layers = by_layer(times, model, step.get_concrete_function(x, y))   # ByLayer
    layers["conv1_bn"].forward_milliseconds

To which layer an operation belongs is read from the graph that was traced:

- Those that a layer's call has made, and TensorFlow's own gradients of them
  ("gradient_tape/..."), have the layer's name scope. TensorFlow counts up the names of scopes,
  and Keras 3 enters each twice, so that the layer "bn" may be found in "bn_1" beside a layer
  "bn_1"; which scope is whose is therefore told by the variable in it: the moving mean.
- Those of a custom gradient, and the sums of gradients (AddN), have no scope. They belong to the
  layer whose operations they read, directly or through others of their kind, or whose gradient
  alone reads them. A sum does if it adds up nothing else. One that reads of several layers is
  *unattributed*, as is an operation without a scope that is not in the graph, and any
  BatchNormalization outside all layers.

Backward is what depends on the gradient of the loss, forward is the rest. A sample that both
need is taken once, and counted forward. Where TensorFlow fuses an activation into the operation
before it (..Ex), its time is in that of the layer.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.training.operations import ByLayer, LayerTime, OpTime, norms_of

_SUM = "AddN"  # as a tape sums gradients
_BACKWARD_SCOPE = "gradient_tape"


def by_layer(ops: Iterable[OpTime], model: Any, function: Any) -> ByLayer:
    """Finds the BatchNormalization that each operation belongs to.

    Args:
        ops: what ran, of `profiled` or `compiled`.
        model: a built model of either Keras.
        function: the concrete function that ran, which calls the model.

    Raises:
        ValueError: the function does not call one of the layers.
    """
    places = _Places.of(model, function.graph)
    names = [layer.name for layer in norms_of(model)]
    forward: dict[str, list[OpTime]] = {name: [] for name in names}
    backward: dict[str, list[OpTime]] = {name: [] for name in names}
    elsewhere, unattributed = [], []
    for op in ops:
        owner, is_backward = places.of_operation(op.name)
        if owner is _UNKNOWN or (owner is None and "BatchNorm" in op.op):
            unattributed.append(op)
        elif owner is None:
            elsewhere.append(op)
        else:
            (backward if is_backward else forward)[owner].append(op)
    layers = {name: LayerTime(name, tuple(forward[name]), tuple(backward[name])) for name in names}
    return ByLayer(layers, tuple(elsewhere), tuple(unattributed))


_UNKNOWN = ""  # an owner that cannot be told; no layer is called so
_Owner = str | None  # the name of a layer, None for no layer


@dataclass(frozen=True)
class _Places:
    """Owners of the operations of a graph.

    Attributes:
        scopes: layers by name scope.
        owners: by the name of an operation in the graph.
        backward: the names of those that depend on the gradient of the loss.
    """

    scopes: Mapping[str, str]
    owners: Mapping[str, _Owner]
    backward: frozenset[str]

    @classmethod
    def of(cls, model: Any, graph: Any) -> _Places:
        scopes = _scopes(model, graph)
        owners: dict[str, _Owner] = {}
        backward: set[str] = set()
        ops = graph.get_operations()
        # Operations are in the order in which they were made: inputs before their readers.
        for op in ops:
            inputs = [tensor.op.name for tensor in op.inputs]
            if op.name.startswith(_BACKWARD_SCOPE) or not backward.isdisjoint(inputs):
                backward.add(op.name)
            owners[op.name] = (
                _by_scope(op.name, scopes)
                if _has_scope(op.name)
                else _by_inputs(op.type, {owners.get(name, _UNKNOWN) for name in inputs})
            )
        for op in reversed(ops):
            if owners[op.name] is None and not _has_scope(op.name) and op.name not in backward:
                owners[op.name] = _by_readers(op, owners)
        return cls(scopes, owners, frozenset(backward))

    def of_operation(self, name: str) -> tuple[_Owner, bool]:
        """The layer that what ran under a name belongs to, and whether it is backward."""
        # What changes the layout for an operation is called after it, with a hyphen.
        for known in (name, name.partition("-")[0]):
            if known in self.owners:
                return self.owners[known], known in self.backward
        owner = _by_scope(name, self.scopes) if _has_scope(name) else _UNKNOWN
        return owner, _BACKWARD_SCOPE in name


def _by_scope(name: str, scopes: Mapping[str, str]) -> _Owner:
    parts = name.split("/")
    for start, end in itertools.combinations(range(len(parts)), 2):
        found = scopes.get("/".join(parts[start:end]))
        if found:
            return found
    return None


def _by_inputs(kind: str, owners: set[_Owner]) -> _Owner:
    layers = owners - {None}
    if not layers:
        return None
    mixed = kind == _SUM and None in owners
    return _UNKNOWN if mixed or len(layers) > 1 else layers.pop()


def _by_readers(op: Any, owners: Mapping[str, _Owner]) -> _Owner:
    """The layer whose gradient alone reads an operation that reads nothing of the layer's.

    So is a sample taken of the layer's input.
    """
    readers = [reader.name for output in op.outputs for reader in output.consumers()]
    found = {owners[name] for name in readers}
    return found.pop() if len(found) == 1 and not any(map(_has_scope, readers)) else None


def _has_scope(name: str) -> bool:
    return "/" in name


def _scopes(model: Any, graph: Any) -> dict[str, str]:
    """The name scopes of the calls of BatchNormalization layers, by what reads their variables.

    Raises:
        ValueError: a layer is not called in the graph.
    """
    readers: dict[int, list[Any]] = {}
    for external, internal in graph.captures:
        readers[id(external)] = internal.consumers()
    scopes: dict[str, str] = {}
    for layer in norms_of(model):
        mean = layer.moving_mean
        # A variable of Keras 3 holds one of TensorFlow.
        handle = mean.handle if hasattr(mean, "handle") else mean.value.handle
        found = {_scope(op.name, layer.name) for op in readers.get(id(handle), [])} - {""}
        if not found:
            raise ValueError(f"the function does not call the layer '{layer.name}' of the model")
        scopes |= dict.fromkeys(found, layer.name)
    return scopes


def _scope(name: str, layer: str) -> str:
    """The part of an operation's name up to the scope of a layer; "" where that is not in it."""
    found = re.match(rf"(?:.*/)?{re.escape(layer)}(?:_\d+)*(?=/)", name)
    return found[0] if found else ""

"""Probes, which are called in the place of layers, and what such a call shows of their code."""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mbn_rewrite.frontends.keras_common.calls import Record


class NotTraceable(Exception):  # noqa: N818 - what a layer is, not what went wrong
    """A layer's calls cannot be traced; the message says why, as a clause."""


@dataclass(frozen=True, eq=False)
class Trace:
    """What a layer calls.

    Attributes:
        inputs: Keras tensors that stand for those it was called with, as `Record.inputs` has them.
        records: its calls, each after those on which it depends; those that nothing depends on are
            left out.
        outputs: what it returns, flattened.
        reads: ids of variables that are read by code of other layers than theirs, so that they
            cannot be changed.
        unseen: ids of layers that its code calls where no record tells of it, or has from elsewhere
            than the attributes in which another layer could be.
        asked: ids of layers in whose place code would not do the same with others.
    """

    inputs: tuple[Any, ...]
    records: tuple[Record, ...]
    outputs: tuple[Any, ...]
    reads: frozenset[int]
    unseen: frozenset[int] = frozenset()
    asked: frozenset[int] = frozenset()


def probe_of(layer: Any) -> Any:
    """An object of a layer's class that has its attributes.

    Lists, dictionaries and sets of attributes are its own. It takes no losses and metrics.
    """
    probe: Any = object.__new__(type(layer))
    for name, value in vars(layer).items():
        own = next((each for each in (list, dict, set) if isinstance(value, each)), None)
        vars(probe)[name] = own(value) if own else value
    for method in ("add_loss", "add_metric"):
        vars(probe)[method] = _does_nothing
    return probe


def _does_nothing(*_: Any, **__: Any) -> None:
    """Takes the place of a method that changes the layer."""


def set_method(probe: Any, name: str, method: Callable[..., Any]) -> None:
    """Gives one object a method."""
    vars(probe)[name] = types.MethodType(method, probe)


def in_order(
    outputs: list[Any], inputs: list[Any], record_of: Callable[[Any], Record]
) -> list[Record]:
    """The calls on which Keras tensors depend, each after those on which it depends itself.

    Args:
        outputs: the Keras tensors.
        inputs: Keras tensors at which to stop.
        record_of: the call that gave a Keras tensor.
    """
    known = set(map(id, inputs))
    records: list[Record] = []
    pending = [(tensor, False) for tensor in reversed(outputs)]
    while pending:
        tensor, visited = pending.pop()
        if id(tensor) in known:
            continue
        record = record_of(tensor)
        missing = [t for t in record.inputs if id(t) not in known]
        if missing and not visited:
            pending.append((tensor, True))
            pending += [(t, False) for t in reversed(missing)]
            continue
        records.append(record)
        known.update(map(id, record.outputs))
    return records

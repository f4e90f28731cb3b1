"""Traces of layers that call other layers in Python code: what they call, at inference.

The `call` of such a layer is run on Keras tensors, and Keras records what it calls. It runs on a
probe: an object of the layer's class with its attributes. It runs once more on a probe that has
other layers in the places of those that the layer holds, as a rewritten copy would: code that then
calls something else is code in which they cannot be exchanged.

Neither the layer nor anything in it is changed: what Keras notes at the layers that are called is
taken back.
"""

from __future__ import annotations

import types
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from unittest import mock

from mbn_rewrite.errors import cause_of
from mbn_rewrite.frontends.keras_common.batch_norm import is_batch_norm
from mbn_rewrite.frontends.keras_common.calls import Record
from mbn_rewrite.frontends.keras_common.cloning import parts
from mbn_rewrite.frontends.keras_common.sublayers import put, sublayers

if TYPE_CHECKING:
    from mbn_rewrite.frontends.keras_common.adapter import KerasAdapter


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
        reads: ids of variables that its code reads itself, so that they cannot be changed.
        unseen: ids of layers that its code calls where no record tells of it.
    """

    inputs: tuple[Any, ...]
    records: tuple[Record, ...]
    outputs: tuple[Any, ...]
    reads: frozenset[int]
    unseen: frozenset[int] = frozenset()


def probe_of(layer: Any) -> Any:
    """An object of a layer's class that has its attributes.

    Lists, dictionaries and sets of attributes are its own. It takes no losses and metrics.
    """
    probe: Any = object.__new__(type(layer))
    attributes = vars(probe)
    attributes.update(vars(layer))
    for name, value in attributes.items():
        if isinstance(value, (list, dict, set)):
            attributes[name] = next(kind for kind in (list, dict, set) if isinstance(value, kind))(value)
    for method in ("add_loss", "add_metric"):
        attributes[method] = _does_nothing
    return probe


def _does_nothing(*_: Any, **__: Any) -> None:
    """Takes the place of a method that changes the layer."""


def set_method(probe: Any, name: str, method: Callable[..., Any]) -> None:
    """Gives one object a method."""
    vars(probe)[name] = types.MethodType(method, probe)


def trace(record: Record, keras: KerasAdapter, outputs: tuple[Any, ...] | None) -> Trace:
    """Traces one call of a layer, at inference.

    Args:
        record: the call.
        keras: the adapter of its Keras.
        outputs: what it gave, flattened, if that is known.

    Raises:
        NotTraceable: its code cannot be run on Keras tensors, or gives something else on them, or
            calls something else where other layers are in the places of those that it holds.
    """
    layer = record.layer
    if type(layer).__call__ is not _own_call(layer, keras):
        raise NotTraceable("its class has a __call__ of its own")
    exchanged: dict[int, Any] = {}
    try:
        with left_as_it_is(layer):
            found = _seen(record, probe_of(layer), keras)
            probe = _exchanged_in(probe_of(layer), layer, keras, exchanged, found.reads)
            again = keras.traced(record, probe)
    except NotTraceable as why:
        raise NotTraceable(cause_of(why).removesuffix(".")) from why  # without what Keras adds
    except Exception as error:  # the user's code may raise anything
        told = cause_of(error).removesuffix(".")
        raise NotTraceable(f"its code fails on Keras tensors ({told})") from error
    given, gives = (
        [(keras.shape_of(t), keras.dtype_of(t)) for t in tensors]
        for tensors in (outputs or (), found.outputs)
    )
    if outputs is not None and given != gives:
        raise NotTraceable("it gives something else when its code is run on Keras tensors")
    if not _calls_the_same(found, again, exchanged):
        raise NotTraceable("its code calls something else where it has other layers")
    return found


def _own_call(layer: Any, keras: KerasAdapter) -> Any:
    kind = keras.model if isinstance(layer, keras.model) else keras.layers.Layer
    return kind.__call__


# -------------------------------------------------------------------------- other layers


def _exchanged_in(
    probe: Any, layer: Any, keras: KerasAdapter, exchanged: dict[int, Any], reads: frozenset[int]
) -> Any:
    """A probe that has other layers in the places of a layer's own: a pass-through for each norm.

    Args:
        probe: the probe.
        layer: the layer.
        keras: the adapter of its Keras.
        exchanged: id of each layer -> the other one, which is added to.
        reads: ids of variables that code reads. Layers that have them stay what they are.
    """
    for place, inner in sublayers(layer, keras):
        if id(inner) not in exchanged:
            stays = any(id(variable) in reads for variable in inner.variables)
            if is_batch_norm(inner, keras) and not stays:
                make: Any = keras.pass_through
                exchanged[id(inner)] = make(name=inner.name, dtype=inner.dtype_policy)
            else:
                exchanged[id(inner)] = probe_of(inner)
                _exchanged_in(exchanged[id(inner)], inner, keras, exchanged, reads)
        value = vars(probe)[place.attribute]
        vars(probe)[place.attribute] = put(value, place.keys, exchanged[id(inner)])
    return probe


def _calls_the_same(first: Trace, second: Trace, exchanged: dict[int, Any]) -> bool:
    """Whether the second trace has the same calls, of the other layers."""
    if len(first.records) != len(second.records):
        return False
    for one, other in zip(first.records, second.records, strict=True):
        if id(one.layer) in exchanged:
            if other.layer is not exchanged[id(one.layer)]:
                return False
        elif type(one.layer) is not type(other.layer):
            return False
    return True


# ------------------------------------------------------------------------------- one trace


def _seen(record: Record, probe: Any, keras: KerasAdapter) -> Trace:
    """A trace, with what its code calls where no record tells of it."""
    with _noting_calls(record.layer, keras) as calls:
        found = keras.traced(record, probe)
    told = Counter(id(each.layer) for each in found.records)
    made = Counter(id(layer) for callers, layer in calls if callers and callers[-1] is probe)
    unseen = {number for number, count in made.items() if count > told[number]}
    within: dict[int, set[int]] = {}  # of a layer that the code calls
    for callers, layer in calls:
        if probe in callers[:-1]:
            direct = callers[callers.index(probe) + 1]
            if id(direct) not in within:
                within[id(direct)] = set(map(id, parts(direct)))
            if id(layer) not in within[id(direct)]:
                unseen.add(id(layer))
    return replace(found, unseen=frozenset(unseen))


@contextmanager
def _noting_calls(layer: Any, keras: KerasAdapter) -> Iterator[list[tuple[list[Any], Any]]]:
    """Context manager that lists the layers that are called, with those that call them.

    None that the layer holds gets weights by it.
    """
    calls: list[tuple[list[Any], Any]] = []
    callers: list[Any] = []
    base = keras.layers.Layer
    original = base.__call__
    add_weight, own = base.add_weight, {id(part) for part in parts(layer)}

    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append((list(callers), self))
        callers.append(self)
        try:
            return original(self, *args, **kwargs)
        finally:
            callers.pop()

    def refused(self: Any, *args: Any, **kwargs: Any) -> Any:
        if id(self) in own:
            raise NotTraceable(f"its layer '{self.name}' was never called")
        return add_weight(self, *args, **kwargs)

    with (
        mock.patch.object(base, "__call__", noted),
        mock.patch.object(base, "add_weight", refused),
    ):
        yield calls


@contextmanager
def left_as_it_is(layer: Any) -> Iterator[None]:
    """Context manager that takes back what calls do to the attributes of a layer's sublayers."""
    before = [(vars(part), dict(vars(part))) for part in parts(layer)]
    lists = [
        (each, list(each))
        for _, kept in before
        for value in kept.values()
        if isinstance(value, list)
        for each in {id(value): value, id(_within(value)): _within(value)}.values()
    ]
    trackers = [kept["_tracker"] for _, kept in before if hasattr(kept.get("_tracker"), "locked")]
    locked = [tracker.locked for tracker in trackers]
    try:
        yield
    finally:
        for tracker, was_locked in zip(trackers, locked, strict=True):
            tracker.locked = was_locked
        for attributes, kept in before:
            attributes.clear()
            attributes.update(kept)
        for value, items in lists:
            list.__setitem__(
                value, slice(None), items
            )  # Keras's own lists track what they are given


def _within(value: Any) -> Any:
    """The list within one of TensorFlow's lists; else the list itself."""
    return getattr(value, "_storage", value)


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

"""Traces of layers that call other layers in Python code: what they call, at inference.

The `call` of such a layer is run on Keras tensors, and Keras records what it calls. It runs on a
probe: an object of the layer's class with its attributes. It runs once more on a probe that has
other layers in the places of those that the layer holds, as a rewritten copy would: code that then
calls something else is code in which they cannot be exchanged. These others are not called where
the first trace tells what they would give.

Neither the layer nor anything in it is changed: what Keras notes at the layers that are called is
taken back.
"""

from __future__ import annotations

import inspect
import types
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from threading import RLock, get_ident
from typing import TYPE_CHECKING, Any
from unittest import mock

from mbn_rewrite.errors import cause_of
from mbn_rewrite.frontends.keras_common.batch_norm import is_batch_norm
from mbn_rewrite.frontends.keras_common.calls import Record
from mbn_rewrite.frontends.keras_common.cloning import parts
from mbn_rewrite.frontends.keras_common.sublayers import put, sublayers

if TYPE_CHECKING:
    from mbn_rewrite.frontends.keras_common.adapter import KerasAdapter


_ONE_AT_A_TIME = RLock()  # methods of a class of Keras are exchanged meanwhile


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
            attributes[name] = next(kind for kind in (list, dict, set) if isinstance(value, kind))(
                value
            )
    for method in ("add_loss", "add_metric"):
        attributes[method] = _does_nothing
    return probe


def _does_nothing(*_: Any, **__: Any) -> None:
    """Takes the place of a method that changes the layer."""


def set_method(probe: Any, name: str, method: Callable[..., Any]) -> None:
    """Gives one object a method."""
    vars(probe)[name] = types.MethodType(method, probe)


class Tracer:
    """Traces layers of one model, while it watches the calls that layers make.

    Args:
        keras: the adapter of their Keras.
    """

    def __init__(self, keras: KerasAdapter) -> None:
        self._keras = keras
        self._stand_ins: dict[int, tuple[Any, Any]] = {}  # id -> layer, what stands in for it
        pass_through: Any = keras.pass_through
        self._accepted = inspect.signature(pass_through.call)
        self._call: Callable[..., Any] = keras.layers.Layer.__call__
        self._in_its_place: Callable[..., Any] | None = None
        self._complete: set[int] = set()  # ids of layers that get no further weights

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Context manager in which there can be traces. It takes time, so there is one for all."""
        base, thread = self._keras.layers.Layer, get_ident()

        def called(layer: Any, *args: Any, **kwargs: Any) -> Any:
            in_its_place = self._in_its_place if get_ident() == thread else None
            return (in_its_place or self._call)(layer, *args, **kwargs)

        def weight_added(layer: Any, *args: Any, **kwargs: Any) -> Any:
            if id(layer) in self._complete and get_ident() == thread:
                raise NotTraceable(f"its layer '{layer.name}' was never called")
            return add_weight(layer, *args, **kwargs)

        with _ONE_AT_A_TIME:
            self._call, add_weight = base.__call__, base.add_weight
            with (
                self._keras.tracing(),
                mock.patch.object(base, "__call__", called),
                mock.patch.object(base, "add_weight", weight_added),
            ):
                yield

    def trace(self, record: Record, outputs: tuple[Any, ...] | None) -> Trace:
        """Traces one call of a layer, at inference.

        Args:
            record: the call.
            outputs: what it gave, flattened, if that is known.

        Raises:
            NotTraceable: its code cannot be run on Keras tensors, or gives something else on them,
                or calls something else where other layers are in the places of those that it holds.
        """
        layer, keras = record.layer, self._keras
        if type(layer).__call__ is not _own_call(layer, keras):
            raise NotTraceable("its class has a __call__ of its own")
        exchanged: dict[int, Any] = {}
        try:
            with left_as_it_is(layer):
                found, results = self._seen(record, probe_of(layer))
                probe = self._with_stand_ins(probe_of(layer), layer, found.reads, exchanged)
                by_stand_in = {
                    id(exchanged[number]): given
                    for number, given in results.items()
                    if number in exchanged
                }
                with self._giving(by_stand_in):
                    again = keras.traced(record, probe)
        except NotTraceable as why:
            raise NotTraceable(cause_of(why).removesuffix(".")) from why  # without Keras's words
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

    # -- the layers that are there ---------------------------------------------------------

    def _seen(self, record: Record, probe: Any) -> tuple[Trace, dict[int, list[_Result]]]:
        """A trace that knows what code calls unseen; and id of a layer -> results of its calls."""
        keras = self._keras
        with self._noting(record.layer) as calls:
            found = keras.traced(record, probe)
        direct = [call for call in calls if call.callers and call.callers[-1] is probe]
        told = Counter(id(each.layer) for each in found.records)
        made = Counter(id(call.layer) for call in direct)
        unseen = {number for number, count in made.items() if count > told[number]}
        within: dict[int, set[int]] = {}  # of a layer that the code calls
        for call in calls:
            if probe in call.callers[:-1]:
                called = call.callers[call.callers.index(probe) + 1]
                if id(called) not in within:
                    within[id(called)] = set(map(id, parts(called)))
                if id(call.layer) not in within[id(called)]:
                    unseen.add(id(call.layer))
        results: dict[int, list[_Result]] = {}
        for call in direct:
            if call.told is not None and all(map(self._is_plain, keras.flatten(call.outputs))):
                results.setdefault(id(call.layer), []).append((call.told, call.outputs))
        return replace(found, unseen=frozenset(unseen)), results

    @contextmanager
    def _noting(self, layer: Any) -> Iterator[list[_NotedCall]]:
        """Context manager that lists the layers that are called, with those that call them.

        None that the layer holds gets weights by it.
        """
        calls: list[_NotedCall] = []
        callers: list[Any] = []

        def noted(called: Any, *args: Any, **kwargs: Any) -> Any:
            call = _NotedCall(list(callers), called)
            calls.append(call)
            callers.append(called)
            try:
                call.outputs = self._call(called, *args, **kwargs)
            finally:
                callers.pop()
            call.told = self._told(args, kwargs)
            return call.outputs

        self._complete, self._in_its_place = set(map(id, parts(layer))), noted
        try:
            yield calls
        finally:
            self._complete, self._in_its_place = set(), None

    # -- other layers ----------------------------------------------------------------------

    def _with_stand_ins(
        self, probe: Any, layer: Any, reads: frozenset[int], exchanged: dict[int, Any]
    ) -> Any:
        """A probe with others in the places of a layer's own layers: a pass-through for each norm.

        Args:
            probe: the probe.
            layer: the layer.
            reads: ids of variables that code reads. Layers that have them stay what they are.
            exchanged: id of each layer -> what stands in for it, which is added to.
        """
        for place, inner in sublayers(layer, self._keras):
            if id(inner) not in exchanged:
                if len(parts(inner)) == 1:
                    exchanged[id(inner)] = self._stand_in(inner, reads)
                else:
                    exchanged[id(inner)] = probe_of(inner)
                    self._with_stand_ins(exchanged[id(inner)], inner, reads, exchanged)
            value = vars(probe)[place.attribute]
            vars(probe)[place.attribute] = put(value, place.keys, exchanged[id(inner)])
        return probe

    def _stand_in(self, layer: Any, reads: frozenset[int]) -> Any:
        """What stands in for a layer that holds no others, the same in all traces."""
        if any(id(variable) in reads for variable in layer.variables):
            return probe_of(layer)
        if id(layer) not in self._stand_ins:
            make: Any = self._keras.pass_through
            is_norm = is_batch_norm(layer, self._keras)
            made = make(name=layer.name, dtype=layer.dtype_policy) if is_norm else probe_of(layer)
            self._stand_ins[id(layer)] = layer, made
        return self._stand_ins[id(layer)][1]

    @contextmanager
    def _giving(self, results: dict[int, list[_Result]]) -> Iterator[None]:
        """Context manager in which layers are not called, but give what is known of such calls.

        Args:
            results: id of a layer -> its known results.
        """

        def given(layer: Any, *args: Any, **kwargs: Any) -> Any:
            known = results.get(id(layer))
            call = self._told(args, kwargs) if known else None
            for told, outputs in known or ():
                if call is not None and call == told:
                    if isinstance(layer, self._keras.pass_through):
                        self._accepted.bind(layer, *args, **kwargs)
                    return self._keras.called_on_record(layer, args, kwargs, outputs)
            return self._call(layer, *args, **kwargs)

        self._in_its_place = given
        try:
            yield
        finally:
            self._in_its_place = None

    def _told(self, args: Any, kwargs: Any) -> _Told | None:
        """What a layer is called with, to be compared; None where values decide."""
        told: _Told = []
        for value in self._keras.flatten((args, sorted(kwargs.items()))):
            if self._is_plain(value):
                told.append((self._keras.shape_of(value), self._keras.dtype_of(value)))
            elif value is None or isinstance(value, (bool, int, str)):
                told.append(value)
            else:
                return None
        return told

    def _is_plain(self, value: Any) -> bool:
        """Whether something is a Keras tensor without a mask."""
        return self._keras.is_symbolic(value) and not self._keras.carries_mask(value)


_Told = list[Any]  # shapes and dtypes of Keras tensors, and other arguments
_Result = tuple[_Told, Any]  # of a call: with what it was made, what it gave


@dataclass(eq=False)
class _NotedCall:
    """A call of a layer: by which others, of which, with what, and what it gave."""

    callers: list[Any]
    layer: Any
    told: _Told | None = None
    outputs: Any = None


def _own_call(layer: Any, keras: KerasAdapter) -> Any:
    kind = keras.model if isinstance(layer, keras.model) else keras.layers.Layer
    return kind.__call__


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
            for name in [name for name in attributes if name not in kept]:
                del attributes[name]
            attributes.update(kept)
        for value, items in lists:
            # Keras's own lists track what they are given.
            list.__setitem__(value, slice(None), items)


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

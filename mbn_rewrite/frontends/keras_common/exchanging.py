"""Whether code does the same where other layers are in the places of those that it has.

The code runs once more, on a probe that has other layers in its attributes, as a rewritten copy
would. Where it then calls a layer that was to be another, it has that from elsewhere. Where it
does something else, or fails, it asks what its layers are.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from mbn_rewrite.frontends.keras_common.batch_norm import is_batch_norm
from mbn_rewrite.frontends.keras_common.calls import Record, other_arguments
from mbn_rewrite.frontends.keras_common.cloning import parts
from mbn_rewrite.frontends.keras_common.probing import Trace, probe_of
from mbn_rewrite.frontends.keras_common.sublayers import layers_of, put, sublayers
from mbn_rewrite.frontends.keras_common.watching import Watch

if TYPE_CHECKING:
    from mbn_rewrite.frontends.keras_common.adapter import KerasAdapter


class Others:
    """Layers that take the places of those that code calls, the same in all traces."""

    def __init__(self) -> None:
        self.originals: dict[int, Any] = {}
        self.others: dict[int, Any] = {}


def with_others(
    record: Record, found: Trace, keras: KerasAdapter, watch: Watch, others: Others
) -> Trace:
    """A trace, with the layers that cannot be exchanged.

    Args:
        record: the call.
        found: its trace.
        keras: the adapter of its Keras.
        watch: what watches the code.
        others: layers to take, to which more are added.
    """
    read = found.reads and any(map(found.reads.__contains__, map(id, record.layer.variables)))
    # Where code reads weights, their layers stay what they are.
    again = _Exchange(record, found, keras, watch, Others() if read else others)
    if again.is_the_same:
        return replace(found, unseen=found.unseen | again.not_exchanged)
    asked = _asked(record, found, keras, watch, lambda layer: is_batch_norm(layer, keras))
    asked |= _asked(record, found, keras, watch, lambda layer: not is_batch_norm(layer, keras))
    return replace(found, asked=frozenset(asked))


def _asked(
    record: Record,
    found: Trace,
    keras: KerasAdapter,
    watch: Watch,
    chosen: Callable[[Any], bool],
) -> set[int]:
    """Ids of layers of a kind, if code does something else where it has others of it."""
    again = _Exchange(record, found, keras, watch, Others(), chosen)
    return set() if again.is_the_same else {each for each in again.others if again.is_one(each)}


class _Exchange:
    """One run of code with other layers.

    Args:
        record: the call.
        found: its trace, as it is.
        keras: the adapter of its Keras.
        watch: what watches the code.
        others: layers to take, to which more are added.
        chosen: tells which layers to exchange; of what holds one, there is another, too.

    Attributes:
        others: id of each layer that was exchanged -> the other one.
        is_the_same: whether the code does the same.
        not_exchanged: ids of layers that it called all the same.
    """

    def __init__(
        self,
        record: Record,
        found: Trace,
        keras: KerasAdapter,
        watch: Watch,
        others: Others,
        chosen: Callable[[Any], bool] = lambda layer: True,
    ) -> None:
        self._keras = keras
        self._found = found
        self._chosen = chosen
        self._known = watch.results
        self._originals, self.others = others.originals, others.others
        pass_through: Any = keras.pass_through
        self._accepted = inspect.signature(pass_through.call)
        self.not_exchanged: frozenset[int] = frozenset()
        try:
            probe = probe_of(record.layer)
            self._exchange_in(probe, record.layer)
            self._replaced = {
                id(other): self._originals[number]
                for number, other in self.others.items()
                if other is not self._originals[number]
            }
            for _, other in sublayers(probe, keras):
                watch.keep_other(other)
            watch.probe, watch.instead = probe, self._as_is_known
            again = keras.traced(record, probe)
        except Exception:  # the user's code may raise anything
            self.is_the_same = False
        else:
            self.is_the_same = self._does_the_same(again)
        finally:
            watch.instead = None

    def _as_is_known(self, layer: Any, args: Any, kwargs: Any) -> Any:
        """What a call of another layer gives, if it is known what the first one gave."""
        original = self._replaced.get(id(layer))
        outputs = None if original is None else self._known.of(original, args, kwargs)
        if outputs is None:
            return None
        if isinstance(layer, self._keras.pass_through):
            self._accepted.bind(layer, *args, **kwargs)
        return self._keras.called_on_record(layer, args, kwargs, outputs)

    def is_one(self, number: int) -> bool:
        """Whether a layer that was exchanged is one of those chosen, or of what these hold."""
        return self._chosen(self._originals[number])

    def _exchange_in(self, probe: Any, layer: Any) -> None:
        """Gives the probe of a layer other layers."""
        containers: dict[int, list[Any]] = {}
        for place, inner in sublayers(layer, self._keras):
            value = vars(probe)[place.attribute]
            whole = vars(layer)[place.attribute]
            containers.setdefault(id(whole), []).append(self._other(inner))
            vars(probe)[place.attribute] = put(value, place.keys, self._other(inner))
        if self._keras.is_visible(layer):
            for inner in layers_of(layer):
                self._other(inner)
        for name in self._keras.layer_lists:
            if name in vars(probe):
                vars(probe)[name] = list(self._listed(vars(layer)[name], containers))

    def _listed(self, listed: Any, containers: dict[int, list[Any]]) -> Iterator[Any]:
        """What Keras has in its list of what a layer has, with other layers."""
        for each in listed:
            if id(each) in self.others:
                yield self.others[id(each)]
            elif id(each) in containers:
                yield from containers[id(each)]
            else:
                yield each

    def _other(self, layer: Any) -> Any:
        """The layer that takes the place of another."""
        if id(layer) not in self.others:
            self._originals[id(layer)] = layer
            if not any(map(self._chosen, parts(layer))):
                self.others[id(layer)] = layer
            elif is_batch_norm(layer, self._keras) and not self._is_read(layer):
                make: Any = self._keras.pass_through
                self.others[id(layer)] = make(name=layer.name, dtype=layer.dtype_policy)
            else:
                probe = self.others[id(layer)] = probe_of(layer)
                self._keras.give_outputs_of(layer, probe)  # the code within is tried by itself
                if getattr(layer, "use_bias", None) is False:
                    vars(probe).update(use_bias=True, bias=np.zeros(1))
                self._exchange_in(probe, layer)
        return self.others[id(layer)]

    def _is_read(self, layer: Any) -> bool:
        """Whether code reads what a layer has, which then stays what it is."""
        return any(id(variable) in self._found.reads for variable in layer.variables)

    def _does_the_same(self, again: Trace) -> bool:
        """Whether a second trace has the same calls, of the other layers."""
        first, second = self._found.records, again.records
        if len(first) != len(second):
            return False
        kept: set[int] = set()
        for one, other in zip(first, second, strict=True):
            expected = self.others.get(id(one.layer))
            if expected is None:
                if not _is_like(one.layer, other.layer):
                    return False
            elif other.layer is not expected:
                if other.layer is not one.layer:
                    return False
                kept.add(id(one.layer))
            if not _are_equal(*(other_arguments(each, self._keras) for each in (one, other))):
                return False
        self.not_exchanged = frozenset(kept)
        return _wiring(self._found) == _wiring(again)


def _is_like(one: Any, other: Any) -> bool:
    """Whether two functions, or layers that are made when they are called, do the same."""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    kept, others = (
        {name: value for name, value in vars(each).items() if isinstance(value, _PLAIN)}
        for each in (one, other)
    )
    names = {name for name in {*kept, *others} if not name.startswith("_") and name != "name"}
    return all(_are_equal((kept.get(name),), (others.get(name),)) for name in names)


_PLAIN = (bool, int, float, str, tuple, list)


def _are_equal(values: tuple[Any, ...], others: tuple[Any, ...]) -> bool:
    if len(values) != len(others):
        return False
    for one, other in zip(values, others, strict=True):
        if type(one) is not type(other):
            return False
        if isinstance(one, (np.ndarray, np.generic)):
            if not np.array_equal(one, other):
                return False
        elif isinstance(one, _PLAIN) and one != other:
            return False
    return True


def _wiring(trace: Trace) -> list[list[int]]:
    """The numbers of the tensors that calls read, and of those that a trace returns."""
    results = [t for record in trace.records for t in record.outputs]
    numbers = {id(t): number for number, t in enumerate([*trace.inputs, *results])}
    reads = [*(record.inputs for record in trace.records), trace.outputs]
    return [[numbers[id(t)] for t in tensors] for tensors in reads]

"""Traces of layers that call other layers in Python code: what they call, at inference.

The `call` of such a layer is run on Keras tensors, and Keras records what it calls. It runs on a
probe: an object of the layer's class with its attributes. See `exchanging` for what else is tried.

Neither the layer nor anything in it is changed; see `watching`.
"""

from __future__ import annotations

from collections import Counter
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mbn_rewrite.errors import cause_of
from mbn_rewrite.frontends.keras_common.calls import Record
from mbn_rewrite.frontends.keras_common.cloning import is_stock, parts
from mbn_rewrite.frontends.keras_common.exchanging import Others, with_others
from mbn_rewrite.frontends.keras_common.probing import NotTraceable, Trace, probe_of
from mbn_rewrite.frontends.keras_common.references import referred_to
from mbn_rewrite.frontends.keras_common.sublayers import sublayers
from mbn_rewrite.frontends.keras_common.watching import NeverCalled, Watch, Watcher

if TYPE_CHECKING:
    from mbn_rewrite.frontends.keras_common.adapter import KerasAdapter


class Tracer:
    """Traces layers of one model.

    Args:
        keras: the adapter of its Keras.
    """

    def __init__(self, keras: KerasAdapter) -> None:
        self._keras = keras
        self._watcher = Watcher(keras)
        self._others = Others()

    def at_work(self) -> AbstractContextManager[None]:
        """Context manager in which layers can be traced."""
        return self._watcher.at_work()

    def trace(self, record: Record, outputs: tuple[Any, ...] | None) -> Trace:
        """Traces one call of a layer, at inference.

        Args:
            record: the call.
            outputs: what it gave, flattened, if that is known.

        Raises:
            NotTraceable: its code cannot be run on Keras tensors, or does something else on them.
        """
        keras = self._keras
        try:
            with self._watcher.watched(record.layer) as watch:
                watch.probe = probe = probe_of(record.layer)
                found = keras.traced(record, probe)
                _check_layers(record.layer, probe, keras)
                found = _with_what_is_noted(found, probe, watch, keras)
                _check_sizes(record, found, keras)
                found = with_others(record, found, keras, watch, self._others)
        except (NotTraceable, NeverCalled) as why:
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
        return found


def _check_layers(layer: Any, probe: Any, keras: KerasAdapter) -> None:
    """Raises NotTraceable if a probe that was called has other layers than what it stands for."""
    before, after = (
        {place: id(inner) for place, inner in sublayers(each, keras)} for each in (layer, probe)
    )
    if before != after:
        raise NotTraceable("it changes its layers when it is called")


_A_SIZE = 64  # of what a model leaves open


def _check_sizes(record: Record, found: Trace, keras: KerasAdapter) -> None:
    """Raises NotTraceable if code calls something else where sizes are known that are open."""
    if not any(None in keras.shape_of(tensor)[1:] for tensor in record.inputs):
        return
    try:
        again = keras.traced(record, probe_of(record.layer), _A_SIZE)
    except Exception:  # code may not take this size
        return
    own = {id(part) for part in parts(record.layer)}

    def calls_of(found: Trace) -> list[Any]:
        return [
            id(each.layer)
            if id(each.layer) in own
            else (type(each.layer), getattr(each.layer, "symbol", ""))
            for each in found.records
            if not all(keras.dtype_of(t).startswith("int") for t in each.outputs)  # sizes
        ]

    if calls_of(found) != calls_of(again):
        raise NotTraceable("its code calls something else where the sizes of its input are known")


def _with_what_is_noted(found: Trace, probe: Any, watch: Watch, keras: KerasAdapter) -> Trace:
    """A trace, with what code calls and reads where no record tells of it."""
    told = Counter(id(each.layer) for each in found.records)
    made = Counter(id(layer) for callers, layer in watch.calls if callers and callers[-1] is probe)
    unseen = {number for number, count in made.items() if count > told[number]}
    # Those that are called by a method that code has kept.
    by_method = [each.layer for each in found.records if id(each.layer) not in made]
    by_method = [layer for layer in by_method if isinstance(layer, keras.layers.Layer)]
    unseen |= set(map(id, by_method))
    within: dict[int, set[int]] = {}  # of a layer that the code calls
    for callers, layer in watch.calls:
        if probe in callers[:-1]:
            direct = callers[callers.index(probe) + 1]
            if id(direct) not in within:
                within[id(direct)] = set(map(id, parts(direct)))
            if id(layer) not in within[id(direct)]:
                unseen.add(id(layer))
    called = {id(layer): layer for _, layer in watch.calls} | referred_to(probe, keras)
    owners = {id(part): part for layer in called.values() for part in parts(layer)}
    variables = [(id(v), keras.read_as(v)) for part in owners.values() for v in part.variables]

    def keys_of(layer: Any) -> set[int]:
        is_its_own_business = is_stock(type(layer))
        own = layer.variables if is_its_own_business else keras.own_variables(layer)
        return {keras.read_as(variable) for variable in own}

    keys = watch.read_by_others(keys_of, probe)
    keys -= {key for layer in by_method for key in keys_of(layer)}
    reads = {variable for variable, key in variables if key in keys}
    return replace(found, reads=found.reads | reads, unseen=frozenset(unseen))

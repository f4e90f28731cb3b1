"""Watches the code of layers as it runs, and takes back what it does.

Layers that are called while they are watched are left as they were: their attributes, what is in
containers and objects among these, what Keras notes at them, and the state of random numbers.
"""

from __future__ import annotations

import operator
import random
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from threading import RLock, get_ident
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np

from mbn_rewrite.frontends.keras_common.cloning import parts
from mbn_rewrite.frontends.keras_common.custom_models import BUILT_IN, FRAMEWORKS, is_of
from mbn_rewrite.frontends.keras_common.known_results import KnownResults

if TYPE_CHECKING:
    from mbn_rewrite.frontends.keras_common.adapter import KerasAdapter


_ONE_AT_A_TIME = RLock()  # methods of Keras's classes are exchanged meanwhile


class NeverCalled(Exception):  # noqa: N818 - what a layer is, not what went wrong
    """A layer would get its weights by the call; the message says which, as a clause."""


class Watch:
    """What the code of layers does while it is watched.

    Attributes:
        calls: the layers that were called, each with those that called it, outermost first.
        results: what calls gave that the code of `probe` made.
        probe: a layer.
        instead: called with a layer and its arguments; what it gives, if that is not None, stands
            for what a call would give, which is then not made.
        keep_other: keeps what a layer has that stands for one that is watched.
    """

    def __init__(self, results: KnownResults) -> None:
        self.calls: list[tuple[list[Any], Any]] = []
        self.results = results
        self.probe: Any = None
        self.instead: Callable[[Any, Any, Any], Any] | None = None
        self.keep_other: Callable[[Any], None]
        self._callers: list[Any] = []
        self._reads: list[tuple[Any, Any]] = []
        self._thread = get_ident()

    @property
    def is_in_this_thread(self) -> bool:
        """Whether what runs is the code that is watched, and not that of another thread."""
        return get_ident() == self._thread

    def called(
        self, call: Callable[..., Any], layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Calls a layer."""
        outputs = self.instead(layer, args, kwargs) if self.instead else None
        if outputs is not None:
            return outputs
        is_direct = bool(self._callers) and self._callers[-1] is self.probe
        self.calls.append((list(self._callers), layer))
        self._callers.append(layer)
        try:
            outputs = call(layer, *args, **kwargs)
        finally:
            self._callers.pop()
        if is_direct:
            self.results.note(layer, args, kwargs, outputs)
        return outputs

    def note_read(self, key: Any) -> None:
        """Notes that a variable is read, by what the Keras at hand knows it by."""
        if self._callers:
            self._reads.append((self._callers[-1], key))

    def read_by_others(self, keys_of: Callable[[Any], set[int]], probe: Any) -> set[int]:
        """Ids of what was read by code of other layers than those it belongs to.

        Args:
            keys_of: ids of what belongs to a layer.
            probe: what was called first; whatever it reads counts.
        """
        own: dict[int, set[int]] = {}
        found = set()
        for reader, key in self._reads:
            if reader is not probe:
                if id(reader) not in own:
                    own[id(reader)] = keys_of(reader)
                if id(key) in own[id(reader)]:
                    continue
            found.add(id(key))
        return found


class Watcher:
    """Watches the code of layers, one at a time.

    Args:
        keras: the adapter of their Keras.
    """

    def __init__(self, keras: KerasAdapter) -> None:
        self._keras = keras
        self._snapshots = _Snapshots()
        self._watch: Watch | None = None
        self._kept = _KeptLayers(self._snapshots)
        self._own: set[int] = set()

    def _is_watched(self) -> bool:
        """Whether what runs is the code that is watched, and not that of another thread."""
        return self._watch is not None and self._watch.is_in_this_thread

    def _note_read(self, key: Any) -> None:
        assert self._watch is not None
        self._watch.note_read(key)

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Context manager in which layers can be watched; one thread's at a time.

        Methods of Keras's base class are exchanged in it, once for all layers. The code of other
        threads goes on as it was.
        """
        base = self._keras.layers.Layer
        call, add_weight = base.__call__, base.add_weight

        def noted(layer: Any, *args: Any, **kwargs: Any) -> Any:
            watch = self._watch
            if watch is None or not watch.is_in_this_thread:
                return call(layer, *args, **kwargs)
            if layer is not watch.probe:  # it has what is kept, and is used no more
                self._kept.keep_layers_of(layer)
            return watch.called(call, layer, args, kwargs)

        def refused(layer: Any, *args: Any, **kwargs: Any) -> Any:
            if id(layer) in self._own and self._is_watched():
                raise NeverCalled(f"its layer '{layer.name}' was never called")
            return add_weight(layer, *args, **kwargs)

        with (
            _ONE_AT_A_TIME,
            mock.patch.object(base, "__call__", noted),
            mock.patch.object(base, "add_weight", refused),
            self._keras.watched(self._is_watched, self._note_read),
        ):
            yield

    @contextmanager
    def watched(self, layer: Any) -> Iterator[Watch]:
        """Context manager in which the code of a layer may run, without any effect that lasts.

        Raises:
            NeverCalled: a layer in it would be given weights.
        """
        watch, self._kept = Watch(KnownResults(self._keras)), _KeptLayers(self._snapshots)
        self._own = {id(part) for part in parts(layer)}
        self._kept.keep_layers_of(layer, is_lasting=True)
        watch.keep_other = partial(self._kept.keep_layers_of, is_lasting=True)
        numbers, generator = np.random.get_state(), random.getstate()
        self._watch = watch
        try:
            with self._keras.set_apart():
                yield watch
        finally:
            self._watch = None
            self._kept.restore()
            np.random.set_state(numbers)
            random.setstate(generator)


@contextmanager
def objects_left_alone(layer: Any) -> Iterator[None]:
    """Context manager after which objects of the user's that a layer has are what they were.

    A copy of a layer shares them with it.
    """
    kept = _Kept()
    for part in parts(layer) if hasattr(layer, "_flatten_layers") else ():  # functions have none
        for value in vars(part).values():
            if _is_users(value):
                kept.keep(value)
    try:
        yield
    finally:
        kept.restore()


class _Snapshots:
    """What layers have. It is put back whenever they are watched, so one of each layer will do."""

    def __init__(self) -> None:
        self._taken: dict[int, tuple[Any, _Kept]] = {}

    def of(self, layer: Any, is_lasting: bool) -> _Kept:
        """A snapshot of a layer: the one that was taken, or one of what it has now.

        Args:
            layer: the layer.
            is_lasting: whether that is to be put back in other watches, too.
        """
        if id(layer) in self._taken:
            return self._taken[id(layer)][1]
        kept = _Kept()
        kept.keep_layer(layer)
        if is_lasting:
            self._taken[id(layer)] = layer, kept
        return kept


class _KeptLayers:
    """What layers have, to be put back."""

    def __init__(self, snapshots: _Snapshots) -> None:
        self._snapshots = snapshots
        self._kept: dict[int, _Kept] = {}

    def restore(self) -> None:
        for each in reversed(self._kept.values()):  # what was kept first was as it was before
            each.restore()

    def keep_layers_of(self, layer: Any, is_lasting: bool = False) -> None:
        """Keeps what a layer has, and what all layers in it have; see `_Snapshots.of`."""
        if id(layer) not in self._kept:
            for part in parts(layer):
                if id(part) not in self._kept:
                    self._kept[id(part)] = self._snapshots.of(part, is_lasting)


class _Kept:
    """What a layer has, and containers and objects among that, to be put back."""

    def __init__(self) -> None:
        self._restore: list[Callable[[], None]] = []
        self._contents: list[tuple[Any, Any]] = []  # containers, and what was in them
        self._seen: dict[int, Any] = {}

    def restore(self) -> None:
        for restore in self._restore:
            restore()
        for container, items in self._contents:
            is_changed = len(container) != len(items) or any(map(operator.is_not, container, items))
            if isinstance(items, dict) and not is_changed:
                is_changed = any(map(operator.is_not, container.values(), items.values()))
            if is_changed:
                _fill(container, items)

    def keep_layer(self, layer: Any) -> None:
        tracker = vars(layer).get("_tracker")
        if hasattr(tracker, "locked"):
            was_locked = tracker.locked
            self._restore.append(lambda: setattr(tracker, "locked", was_locked))
        self._keep_contents(vars(layer))

    def _keep_contents(self, container: Any) -> None:
        kind = _kind_of(container)
        items: Any = kind(container) if kind is not deque else list(container)
        self._contents.append((container, items))
        for value in items.values() if isinstance(items, dict) else items:
            if type(value) not in _UNCHANGING:
                self.keep(value)

    def keep(self, value: Any) -> None:
        if is_of(value, FRAMEWORKS):
            value = getattr(value, "__wrapped__", value)  # tf_keras wraps containers
        is_array = isinstance(value, np.ndarray)
        if not is_array and not isinstance(value, (*_CONTAINERS, tuple)) and not _is_users(value):
            return
        if id(value) in self._seen:
            return
        self._seen[id(value)] = value
        if is_array:
            if value.flags.writeable:
                before = value.copy()
                self._restore.append(lambda: np.copyto(value, before))
        elif isinstance(value, _CONTAINERS):
            self._keep_contents(value)
            storage = vars(value).get("_storage") if hasattr(value, "__dict__") else None
            if isinstance(storage, list):
                self._keep_contents(storage)
        elif isinstance(value, tuple):
            for item in value:
                self.keep(item)
        else:
            self._keep_contents(vars(value))


_UNCHANGING = frozenset({type(None), bool, int, float, str, bytes, type, FunctionType, MethodType})
_CONTAINERS = (OrderedDict, dict, list, set, deque)


def _kind_of(container: Any) -> Any:
    kind = type(container)
    if kind in _CONTAINERS:
        return kind
    return next(each for each in _CONTAINERS if isinstance(container, each))


def _fill(container: Any, items: Any) -> None:
    """Puts back what was in a container."""
    kind = _kind_of(container)
    kind.clear(container)  # not its own methods, which may track what they are given
    fill = kind.update if kind in (OrderedDict, dict, set) else kind.extend
    fill(container, items)


def _is_users(value: Any) -> bool:
    """Whether something is an object of the user's classes, with attributes of its own."""
    return (
        not is_of(value, BUILT_IN)
        and not isinstance(value, type)
        and hasattr(value, "__dict__")
        and not hasattr(value, "_flatten_layers")  # layers, which are kept if they are called
    )

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
from threading import RLock, get_ident
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np

from mbn_rewrite.frontends.keras_common.cloning import parts
from mbn_rewrite.frontends.keras_common.custom_models import BUILT_IN, FRAMEWORKS, is_of

if TYPE_CHECKING:
    from mbn_rewrite.frontends.keras_common.adapter import KerasAdapter


_ONE_AT_A_TIME = RLock()  # methods of Keras's classes are exchanged meanwhile


class NeverCalled(Exception):  # noqa: N818 - what a layer is, not what went wrong
    """A layer would get its weights by the call; the message says which, as a clause."""


class Watch:
    """What the code of layers does while it is watched.

    Attributes:
        calls: the layers that were called, each with those that called it, outermost first.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[list[Any], Any]] = []
        self._callers: list[Any] = []
        self._reads: list[tuple[Any, Any]] = []
        self._thread = get_ident()

    @property
    def is_in_this_thread(self) -> bool:
        """Whether what runs is the code that is watched, and not that of another thread."""
        return get_ident() == self._thread

    @contextmanager
    def calling(self, layer: Any) -> Iterator[None]:
        """Context manager in which a layer is called."""
        self.calls.append((list(self._callers), layer))
        self._callers.append(layer)
        try:
            yield
        finally:
            self._callers.pop()

    def note_read(self, key: Any) -> None:
        """Notes that a variable is read, by what the Keras at hand knows it by."""
        if self._callers and self.is_in_this_thread:
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


@contextmanager
def watched(layer: Any, keras: KerasAdapter) -> Iterator[Watch]:
    """Context manager in which the code of a layer may run, without any effect that lasts.

    One thread watches at a time; the code of others goes on as it was.

    Raises:
        NeverCalled: a layer in it would be given weights.
    """
    with _ONE_AT_A_TIME:
        yield from _watched(layer, keras)


def _watched(layer: Any, keras: KerasAdapter) -> Iterator[Watch]:
    watch, kept = Watch(), _Kept()
    base = keras.layers.Layer
    call, add_weight = base.__call__, base.add_weight
    own = {id(part) for part in parts(layer)}
    kept.keep_layers_of(layer)

    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not watch.is_in_this_thread:
            return call(self, *args, **kwargs)
        kept.keep_layers_of(self)
        with watch.calling(self):
            return call(self, *args, **kwargs)

    def refused(self: Any, *args: Any, **kwargs: Any) -> Any:
        if id(self) in own and watch.is_in_this_thread:
            raise NeverCalled(f"its layer '{self.name}' was never called")
        return add_weight(self, *args, **kwargs)

    numbers, generator = np.random.get_state(), random.getstate()
    try:
        with (
            mock.patch.object(base, "__call__", noted),
            mock.patch.object(base, "add_weight", refused),
            keras.set_apart(watch.note_read),
        ):
            yield watch
    finally:
        kept.restore()
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


class _Kept:
    """What layers have, and containers and objects among that, to be put back."""

    def __init__(self) -> None:
        self._restore: list[Callable[[], None]] = []
        self._seen: dict[int, Any] = {}

    def restore(self) -> None:
        for restore in self._restore:
            restore()

    def keep_layers_of(self, layer: Any) -> None:
        """Keeps what a layer has, and what all layers in it have."""
        if id(layer) not in self._seen:
            for part in parts(layer):
                self._keep_layer(part)

    def _keep_layer(self, layer: Any) -> None:
        if id(layer) not in self._seen:
            self._seen[id(layer)] = layer
            tracker = vars(layer).get("_tracker")
            if hasattr(tracker, "locked"):
                was_locked = tracker.locked
                self._restore.append(lambda: setattr(tracker, "locked", was_locked))
            self._keep_contents(vars(layer))

    def _keep_contents(self, container: Any) -> None:
        kind: Any = next(kind for kind in _CONTAINERS if isinstance(container, kind))
        items: Any = kind(container) if kind is not deque else list(container)
        fill = kind.update if kind in (OrderedDict, dict, set) else kind.extend

        def restore() -> None:
            now, before = _contents(container), _contents(items)
            if len(now) != len(before) or any(map(operator.is_not, now, before)):
                kind.clear(container)  # not its own methods, which may track what they are given
                fill(container, items)

        self._restore.append(restore)
        for value in items.values() if isinstance(items, dict) else items:
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


_CONTAINERS = (OrderedDict, dict, list, set, deque)


def _contents(container: Any) -> list[Any]:
    return [*container, *container.values()] if isinstance(container, dict) else [*container]


def _is_users(value: Any) -> bool:
    """Whether something is an object of the user's classes, with attributes of its own."""
    return (
        not is_of(value, BUILT_IN)
        and not isinstance(value, type)
        and hasattr(value, "__dict__")
        and not hasattr(value, "_flatten_layers")  # layers, which are kept if they are called
    )

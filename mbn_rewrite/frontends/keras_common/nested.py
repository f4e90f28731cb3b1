"""Layers that hold other layers, found and exchanged where they are held.

A custom layer, a wrapper or a subclassed model calls the layers that it holds in Python
code, which cannot be seen. What can be done is to exchange one of them, in a copy of its
holder, for another that does the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mbn_rewrite.frontends.keras_common.adapter import KerasAdapter


@dataclass(frozen=True)
class Place:
    """Where a layer is held.

    Attributes:
        attribute: the attribute of its holder.
        keys: indices and keys within that attribute, where it is a list, tuple or dict.
    """

    attribute: str
    keys: tuple[Any, ...] = ()


def held(layer: Any, keras: KerasAdapter) -> Iterator[tuple[Place, Any]]:
    """The layers that a layer holds in its attributes, with their places."""
    # What a Functional model with a `call` of its own keeps of the calls on record is private.
    calls_itself = keras.has_calls_on_record(layer) and not keras.is_visible(layer)
    private = ("_",) if calls_itself else keras.private
    for attribute, value in list(vars(layer).items()):
        if not attribute.startswith(private):
            for keys, inner in _layers_in(value, (), keras.layers.Layer):
                yield Place(attribute, keys), inner


def _layers_in(
    value: Any, keys: tuple[Any, ...], base: type
) -> Iterator[tuple[tuple[Any, ...], Any]]:
    if isinstance(value, base):
        yield keys, value
    elif isinstance(value, dict):
        for key, inner in list(value.items()):
            yield from _layers_in(inner, (*keys, key), base)
    elif isinstance(value, (list, tuple)):
        for i, inner in enumerate(value):
            yield from _layers_in(inner, (*keys, i), base)


def at(holder: Any, place: Place) -> Any:
    """The layer at a place."""
    value = getattr(holder, place.attribute)
    for key in place.keys:
        value = value[key]
    return value


def exchange(holder: Any, place: Place, layer: Any, keras: KerasAdapter) -> None:
    """Puts a layer at a place.

    Containers are made anew: tf_keras refuses to save a list in which an item was replaced.
    """
    value = getattr(holder, place.attribute)
    with keras.exchanging(holder, at(holder, place), layer):
        setattr(holder, place.attribute, _with(value, place.keys, layer))


def _with(value: Any, keys: tuple[Any, ...], layer: Any) -> Any:
    if not keys:
        return layer
    key, *rest = keys
    new = _with(value[key], tuple(rest), layer)
    if isinstance(value, dict):
        return {k: new if k == key else inner for k, inner in value.items()}
    items = [new if i == key else inner for i, inner in enumerate(value)]
    if isinstance(value, tuple):
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return items

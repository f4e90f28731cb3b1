"""Sublayers: layers in the attributes of another, found and replaced where they are kept.

A custom layer, a wrapper or a subclassed model calls its sublayers in Python code, which cannot be
seen. In a copy of it, though, a sublayer can be replaced by another that does the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mbn_rewrite.errors import RewriteError
from mbn_rewrite.frontends.keras_common.adapter import KerasAdapter
from mbn_rewrite.frontends.keras_common.cloning import label


@dataclass(frozen=True)
class Place:
    """Place of a sublayer within its parent.

    Attributes:
        attribute: the attribute of the parent.
        keys: indices and keys within that attribute, if it is a list, tuple or dict.
    """

    attribute: str
    keys: tuple[Any, ...] = ()


def sublayers(layer: Any, keras: KerasAdapter) -> Iterator[tuple[Place, Any]]:
    """Layers in the attributes of a layer, with their places."""
    kinds = (keras.layers.Layer, dict, list, tuple)
    for attribute, value in own_attributes(layer, keras, kinds).items():
        for keys, inner in _layers_in(value, (), keras.layers.Layer):
            yield Place(attribute, keys), inner


def own_attributes(
    layer: Any, keras: KerasAdapter, kinds: tuple[type, ...] = (object,)
) -> dict[str, Any]:
    """Attributes of a layer, or whatever else is called, in which Keras does not list layers.

    Args:
        layer: the layer.
        keras: the adapter of its Keras.
        kinds: of which classes they are.
    """
    # A Functional model with a `call` of its own keeps its recorded calls in private attributes.
    calls_itself = keras.has_calls_on_record(layer) and not keras.is_visible(layer)
    return {
        name: value
        for name, value in vars(layer).items()
        if isinstance(value, kinds)
        and not (name.startswith("_") if calls_itself else keras.is_private(name))
    }


def layers_of(model: Any) -> list[Any]:
    """The layers of a Functional or Sequential model, by its number of which code may have one."""
    return list(model._flatten_layers(include_self=False, recursive=False))


def all_sublayers(layer: Any, keras: KerasAdapter) -> Iterator[Any]:
    """Layers that can be exchanged within a layer, at any depth, each once."""
    known = {id(layer)}
    pending = [layer]
    while pending:
        holder = pending.pop()
        found = [inner for _, inner in sublayers(holder, keras)]
        if keras.is_visible(holder):
            found += layers_of(holder)
        for inner in found:
            if id(inner) not in known:
                known.add(id(inner))
                pending.append(inner)
                yield inner


def _layers_in(
    value: Any, keys: tuple[Any, ...], base: type
) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Layers in a value that is one, or a container."""
    if isinstance(value, base):
        yield keys, value
        return
    items = list(value.items()) if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        if isinstance(inner, (base, dict, list, tuple)):
            yield from _layers_in(inner, (*keys, key), base)


def sublayer_at(parent: Any, place: Place) -> Any:
    """The sublayer at a place of a copy.

    Raises:
        RewriteError: the copy has no such place.
    """
    try:
        value = getattr(parent, place.attribute)
        for key in place.keys:
            value = value[key]
    except (AttributeError, KeyError, IndexError) as error:
        raise RewriteError(
            f"{label(parent)} was copied without its attribute '{place.attribute}': make the "
            "layer in __init__ or build, so that a copy of the model has it too"
        ) from error
    return value


def replace_sublayer(parent: Any, place: Place, layer: Any, keras: KerasAdapter) -> None:
    """Puts a layer at a place.

    Containers are created anew: tf_keras refuses to save a list in which an item was replaced.
    """
    old = sublayer_at(parent, place)
    value = getattr(parent, place.attribute)
    with keras.replacing(parent, old, layer):
        setattr(parent, place.attribute, put(value, place.keys, layer))


def put(value: Any, keys: tuple[Any, ...], layer: Any) -> Any:
    """A copy of nested containers with a layer at the place that the keys lead to; or the layer."""
    if not keys:
        return layer
    key, *rest = keys
    new = put(value[key], tuple(rest), layer)
    if isinstance(value, dict):
        return {k: new if k == key else inner for k, inner in value.items()}
    items = [new if i == key else inner for i, inner in enumerate(value)]
    if isinstance(value, tuple):
        kind = type(getattr(value, "__wrapped__", value))  # tf_keras wraps containers
        return kind(*items) if hasattr(kind, "_fields") else tuple(items)
    return items

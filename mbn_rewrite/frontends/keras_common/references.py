"""Layers that code refers to by other ways than the attributes in which they can be exchanged.

Functions refer to what is in their closures, defaults and globals, methods to their objects, and
objects of the user's classes to what they have.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from types import CodeType, FunctionType, MethodType
from typing import Any

import numpy as np

from mbn_rewrite.frontends.keras_common.adapter import KerasAdapter
from mbn_rewrite.frontends.keras_common.cloning import is_from
from mbn_rewrite.frontends.keras_common.custom_models import (
    BUILT_IN,
    CheckedConfig,
    filled_cells,
    is_of,
)
from mbn_rewrite.frontends.keras_common.sublayers import own_attributes


def referred_to(called: Any, keras: KerasAdapter) -> dict[int, Any]:
    """Layers, by id, that a layer refers to, or whatever else is called.

    Args:
        called: the layer, function or operation.
        keras: the adapter of its Keras.
    """
    methods = (
        value
        for kind in type(called).__mro__
        if not is_from(kind, BUILT_IN)
        for value in vars(kind).values()
        if isinstance(value, FunctionType)
    )
    found = {**kept_elsewhere(called, keras), **_layers(methods, keras)}
    found.pop(id(called), None)
    return found


def kept_elsewhere(layer: Any, keras: KerasAdapter) -> dict[int, Any]:
    """Layers, by id, that a layer has, but not in attributes in which they can be exchanged."""
    values = own_attributes(layer, keras).values()
    return _layers(_leaves_but_layers(values, keras.layers.Layer), keras)


def among(arguments: Iterable[Any], keras: KerasAdapter) -> dict[int, Any]:
    """Layers, by id, that functions among the arguments of a call refer to."""
    return _layers((each for each in arguments if callable(each)), keras)


def _leaves_but_layers(values: Iterable[Any], base: type) -> Iterator[Any]:
    for value in values:
        if isinstance(value, dict):
            yield from _leaves_but_layers(value.values(), base)
        elif isinstance(value, (list, tuple)):
            yield from _leaves_but_layers(value, base)
        elif not isinstance(value, base):
            yield value


def _layers(values: Iterable[Any], keras: KerasAdapter) -> dict[int, Any]:
    """Layers that values are, or refer to; not what those have in turn."""
    layers: dict[int, Any] = {}
    seen: dict[int, Any] = {}
    pending = list(values)
    while pending:
        value = pending.pop()
        if isinstance(value, _PLAIN) or id(value) in seen:
            continue
        seen[id(value)] = value
        if isinstance(value, keras.layers.Layer):
            layers[id(value)] = value
        else:
            pending += _parts_of(value, keras.layers.Layer)
    return layers


_PLAIN = (str, bytes, int, float, bool, type(None), type, np.ndarray, CheckedConfig)


def _parts_of(value: Any, base: type) -> list[Any]:
    """What a value refers to."""
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, (list, tuple, set, frozenset)):
        return list(value)
    if isinstance(value, MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, FunctionType):
        named = [value.__globals__.get(name) for name in _names(value.__code__)]
        return [
            *(cell.cell_contents for cell in filled_cells(value)),
            *(value.__defaults__ or ()),
            *(value.__kwdefaults__ or {}).values(),
            *(each for each in named if isinstance(each, base)),
        ]
    if hasattr(value, "python_function"):  # a tf.function
        return [value.python_function]
    if is_of(value, BUILT_IN):
        return []
    slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
    kept = getattr(value, "__dict__", {})
    return [*kept.values(), *(getattr(value, name, None) for name in slots)]


# The methods of a class are looked through for every layer of it.
@functools.lru_cache(maxsize=1000)
def _names(code: CodeType) -> tuple[str, ...]:
    """Names of globals that a function's code uses, and functions within it."""
    within = (_names(inner) for inner in code.co_consts if isinstance(inner, CodeType))
    return tuple(dict.fromkeys([*code.co_names, *(name for names in within for name in names)]))

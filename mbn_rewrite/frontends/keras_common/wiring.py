"""Connections between the layers of a Functional model, in its configuration.

Both Kerases call layers in whatever order their inputs become available, and wait forever for one
that never does: if a call is missing from a file, or layers wait for each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def never_called(config: Any) -> list[str]:
    """Layers of a model, and of models in it, with calls that lack an input.

    Args:
        config: its configuration, as parsed JSON.
    """
    found = []
    pending = [config]
    while pending:
        part = pending.pop()
        if isinstance(part, dict):
            layers = part.get("layers")
            if isinstance(layers, list):
                found += _waiting([x for x in layers if isinstance(x, dict)])
            pending += part.values()
        elif isinstance(part, list):
            pending += part
    return found


def _waiting(layers: list[dict[str, Any]]) -> list[str]:
    """Layers of one model that would wait forever."""
    calls: dict[str, list[Any]] = {}
    made: dict[str, int] = {}
    for layer in layers:
        nodes, name = layer.get("inbound_nodes"), layer.get("name")
        if isinstance(nodes, list) and isinstance(name, str):
            calls[name] = nodes
            made[name] = int(_is_called_when_created(layer))
    blocked: dict[str, list[str]] = {}
    done = dict.fromkeys(calls, 0)
    pending = list(reversed(calls))
    while pending:
        name = pending.pop()
        while done[name] < len(calls[name]):
            needs = _inputs(calls[name][done[name]], made)
            lacking = next((other for other, index in needs if made[other] <= index), None)
            if lacking is not None:
                blocked.setdefault(lacking, []).append(name)
                break
            done[name] += 1
            made[name] += 1
            pending += blocked.pop(name, [])
    return [name for name in calls if done[name] < len(calls[name])]


def _is_called_when_created(layer: dict[str, Any]) -> bool:
    """Whether a layer has a first call that is not stored, as inputs and nested models do."""
    config = layer.get("config")
    is_model = isinstance(config, dict) and "layers" in config
    return is_model or (layer.get("class_name") == "InputLayer" and not layer["inbound_nodes"])


def _inputs(call: Any, layers: dict[str, int]) -> Iterator[tuple[str, int]]:
    """Outputs that a call takes, as the layer and the number of its call.

    Both Kerases write them as [layer, number of the call, number of the output].
    """
    pending = [call]
    while pending:
        part = pending.pop()
        if isinstance(part, dict):
            pending += part.values()
        elif isinstance(part, list):
            name, index = part[:2] if len(part) > 2 else (None, None)
            if isinstance(name, str) and name in layers and isinstance(index, int):
                yield name, index
            pending += [inner for inner in part if isinstance(inner, (dict, list))]

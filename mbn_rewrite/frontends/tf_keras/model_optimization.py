"""Wrappers of TensorFlow Model Optimization, which put layers into training for some target.

They are known by their names, so that the toolkit need not be there. What they wrap is computed by
its `call` alone, with weights that the wrapper computes, so that no trace shows it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import tf_keras

from mbn_rewrite.errors import CopyError, cause_of
from mbn_rewrite.frontends.keras_common.cloning import custom_classes, is_stock, label, parts
from mbn_rewrite.frontends.keras_common.toolkit_wrappers import QUANTISING, stripped_by
from mbn_rewrite.ir.reasons import Obstacle, Reason

_BUILT_IN = ("builtins", "collections", "keras", "numpy", "tensorflow", "tf_keras")


def _names(layer: Any) -> set[str]:
    return {kind.__name__ for kind in type(layer).__mro__ if not is_stock(kind)}


def is_quantising(layer: Any) -> bool:
    """Whether a layer has what it wraps, or what it is given, be quantised in training."""
    return not QUANTISING.isdisjoint(_names(layer))


def reason_within(layer: Any) -> Reason | None:
    """See `KerasAdapter.reason_within`."""
    if is_quantising(layer):
        return Reason(Obstacle.QUANTISED, label(layer))
    stripping = stripped_by(_names(layer))
    if stripping:
        return Reason(Obstacle.STRIPPABLE, f"{label(layer)} wraps it for training: {stripping}")
    return None


def why_opaque(layer: Any) -> str:
    """Phrase on a wrapper, as of `graph.Opaque`, or ""."""
    if is_quantising(layer):
        return "quantises, as for training"
    stripping = stripped_by(_names(layer))
    return f"is there for training: {stripping} takes it away" if stripping else ""


def copy_of(layer: Any) -> tuple[Any, Callable[[], None]]:
    """A copy of a quantising layer, not yet built, and what sets its weights once it is.

    Weights are matched by name. They are in the wrapper, and not where the layer within made them.
    """
    seen: set[int] = set()
    objects = {kind.__name__: kind for part in parts(layer) for kind in _classes_in(part, seen)}
    try:
        with tf_keras.utils.custom_object_scope({**objects, **custom_classes(layer)}):
            new = type(layer).from_config(layer.get_config())
    except Exception as error:  # the toolkit's classes may raise anything
        why = cause_of(error).removesuffix(".")
        raise CopyError(f"{label(layer)} cannot be copied from its configuration: {why}") from error

    def finish() -> None:
        old, made = _by_name(layer), _by_name(new)
        if old.keys() != made.keys() or len(old) < len({id(v) for v in layer.weights}):
            raise CopyError(
                f"{label(layer)} cannot be copied: its weights are {sorted(old)}, those of its "
                f"copy {sorted(made)}"
            )
        for name, variable in made.items():
            variable.assign(old[name])

    return new, finish


def _by_name(layer: Any) -> dict[str, Any]:
    """A layer's variables, by the last parts of their names."""
    return {v.name.partition(":")[0].rpartition("/")[2]: v for v in layer.weights}


def _classes_in(value: Any, seen: set[int]) -> Iterator[type]:
    """Classes of the toolkit's objects, and the user's, in the attributes of a layer."""
    for inner in list(vars(value).values()):
        kind = type(inner)
        if id(inner) in seen or kind.__module__.partition(".")[0] in _BUILT_IN:
            continue
        seen.add(id(inner))
        yield kind
        if hasattr(inner, "__dict__"):
            yield from _classes_in(inner, seen)

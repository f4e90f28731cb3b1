"""Copies Keras layers, with everything of theirs that their configuration leaves out.

A configuration names functions and classes, and a name can stand for something else where
it is looked up. So functions, initializers, regularizers and constraints are taken over from
the original layer itself, and classes are looked up among those that the layer holds.
Weights are matched layer by layer inside a layer: the order of `layer.weights` depends on
what is frozen.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from mbn_rewrite.errors import RewriteError, cause_of
from mbn_rewrite.keras_models.dialect import Dialect
from mbn_rewrite.keras_models.holders import label

_FUNCTIONS = ("activation", "recurrent_activation")
_OBJECTS = ("_regularizer", "_constraint")
_INITIALIZER = "_initializer"


def config_of(layer: Any) -> dict[str, Any]:
    """A layer's configuration.

    Raises:
        RewriteError: it has none.
    """
    try:
        config = layer.get_config()
        if getattr(layer, "virtual_batch_size", None) is not None:
            # Building such a BatchNormalization counts its axes from one further on.
            config["axis"] = [axis - 1 for axis in layer.axis]
        return config
    except Exception as error:
        raise RewriteError(
            f"{label(layer)} cannot be copied, because its get_config() fails: "
            f"{cause_of(error)} Define get_config() so that it returns the arguments of __init__"
        ) from error


def from_config(layer: Any, config: dict[str, Any], dialect: Dialect, kind: Any = None) -> Any:
    """A new layer of a layer's class, not built yet, from a configuration of it.

    Args:
        layer: the original.
        config: its configuration, or a changed one.
        dialect: the Keras it is of.
        kind: another class, with the same arguments and more, that takes its place.

    Raises:
        RewriteError: it cannot be made, or would not be the same.
    """
    if "call" in vars(layer) and not isinstance(layer, dialect.call_is_made):
        raise RewriteError(
            f"{label(layer)} cannot be copied: its call method was exchanged on the object. Make "
            "a subclass of its class that has the method"
        )
    if _is_stock(type(layer)):
        config = _without_objects(config)
    try:
        with dialect.keras.utils.custom_object_scope(_own_classes(layer, dialect)):
            new = (kind or type(layer)).from_config(config)
    except RewriteError:
        raise
    except Exception as error:
        raise RewriteError(
            f"{label(layer)} cannot be copied from its configuration: {cause_of(error)} "
            "Define get_config() so that it returns the arguments of __init__"
        ) from error
    dialect.rename(new, layer.name)
    if kind is not None:
        _take_over(layer, new, dialect)
        _take_over_attributes(layer, new, _initializers(layer), dialect)
        return new
    for old_part, new_part in paired(layer, new, dialect):
        _take_over(old_part, new_part, dialect)
    return new


def copy_weights(old: Any, new: Any, dialect: Dialect) -> None:
    """Sets all weights, flags and states of a built layer to those of the original.

    The copy may have a bias that the original has not; that is set to zero.

    Raises:
        RewriteError: the two do not have the same weights.
    """
    if {id(v) for v in old.weights} & {id(v) for v in new.weights}:
        raise RewriteError(
            f"{label(old)} cannot be copied: its get_config() gives layers themselves, not their "
            "configurations. Use keras.layers.serialize in get_config"
        )
    copied: set[int] = set()
    pairs: list[tuple[Any, Any]] = []
    for old_part, new_part in paired(old, new, dialect):
        new_own = dialect.own_variables(new_part)
        old_own = dialect.own_variables(old_part)
        bias = getattr(new_part, "bias", None)
        if bias is not None and getattr(old_part, "bias", None) is None:
            new_own = [v for v in new_own if v is not bias]
            bias.assign(np.zeros(bias.shape))
            copied.add(id(bias))
        pairs += _zipped(old, old_own, new_own)
        if getattr(old_part, "stateful", False) and getattr(old_part, "states", None):
            states = zip(*map(dialect.flatten, (old_part.states, new_part.states)), strict=True)
            pairs += [(a, b) for a, b in states if a is not None and b is not None]
        dialect.set_own_trainable(new_part, old_part._trainable)
        # Not before: Keras warns where one initializer is used for two layers.
        _take_over_attributes(old_part, new_part, _initializers(old_part), dialect)
        _copy_vocabulary(old_part, new_part)
    copied |= {id(variable) for pair in pairs for variable in pair}
    # What remains is held by tf.Modules, which both have in the same order.
    rest = ([v for v in dialect.variables(layer) if id(v) not in copied] for layer in (old, new))
    for source, target in [*pairs, *_zipped(old, *rest)]:
        target.assign(source)
    for part in dialect.parts(new):
        if isinstance(part, dialect.keras.layers.Normalization):
            part.finalize_state()  # its mean and variance are computed from its weights


def paired(old: Any, new: Any, dialect: Dialect) -> Iterator[tuple[Any, Any]]:
    """A layer and all that it holds, each with its copy.

    Raises:
        RewriteError: the copy holds other layers.
    """
    olds, news = dialect.parts(old), dialect.parts(new)
    if [type(part) for part in olds] != [type(part) for part in news]:
        raise RewriteError(
            f"{label(old)} cannot be copied: its copy holds other layers "
            f"({_kinds(news)}; the original {_kinds(olds)}). Make the layers in __init__ or "
            "build, and give classes of your own names that Keras does not have"
        )
    return zip(olds, news, strict=True)


def _kinds(layers: list[Any]) -> str:
    return ", ".join(type(part).__name__ for part in layers[1:6]) or "none"


def _is_stock(kind: type) -> bool:
    return kind.__module__.partition(".")[0] in ("tf_keras", "keras")


def _own_classes(layer: Any, dialect: Dialect) -> dict[str, type]:
    """The classes that are not Keras's own among a layer and those that it holds."""
    classes: dict[str, type] = {}
    for part in dialect.parts(layer):
        kind = type(part)
        if not _is_stock(kind) and classes.setdefault(kind.__name__, kind) is not kind:
            raise RewriteError(
                f"{label(layer)} cannot be copied: it holds layers of two different classes "
                f"that are both named {kind.__name__}. Rename one of them"
            )
    return classes


def _without_objects(config: dict[str, Any]) -> dict[str, Any]:
    """A stock layer's configuration with placeholders for what `_take_over` brings."""
    result = dict(config)
    for key, value in config.items():
        if key in _FUNCTIONS:
            if not _describes_a_layer(value):
                result[key] = "linear"
        elif key.endswith(_OBJECTS):
            result[key] = None
        elif key.endswith(_INITIALIZER) and value is not None:
            result[key] = "zeros"  # all weights are set anyway
        elif key in ("layer", "backward_layer") and isinstance(value, dict):
            module = str(value.get("module", "")).partition(".")[0]
            if module in ("tf_keras", "keras") and isinstance(value.get("config"), dict):
                result[key] = {**value, "config": _without_objects(value["config"])}
    return result


def _describes_a_layer(value: Any) -> bool:
    """Whether a configured activation is a layer, and no function."""
    functions = (None, "function", "__lambda__")
    return isinstance(value, dict) and value.get("class_name") not in functions


def _take_over(old: Any, new: Any, dialect: Dialect) -> None:
    """Gives a copy the very functions and objects of the original."""
    names = [name for name in vars(old) if name in _FUNCTIONS or name.endswith(_OBJECTS)]
    if isinstance(old, dialect.keras.layers.Lambda):
        names.append("function")
    _take_over_attributes(old, new, names, dialect)
    new._supports_masking = old._supports_masking
    if isinstance(old, dialect.keras.layers.Discretization):
        new.bin_boundaries = old.bin_boundaries


def _initializers(layer: Any) -> list[str]:
    return [name for name in vars(layer) if name.endswith(_INITIALIZER)]


def _take_over_attributes(old: Any, new: Any, names: list[str], dialect: Dialect) -> None:
    for name in names:
        value = getattr(old, name)
        if (
            not isinstance(value, dialect.keras.layers.Layer)
            and getattr(new, name, None) is not value
        ):
            setattr(new, name, value)


def _zipped(layer: Any, old: list[Any], new: list[Any]) -> list[tuple[Any, Any]]:
    shapes, new_shapes = [tuple(v.shape) for v in old], [tuple(v.shape) for v in new]
    if shapes != new_shapes:
        raise RewriteError(
            f"{label(layer)} cannot be copied: its weights have the shapes {shapes}, those of "
            f"its copy {new_shapes}"
        )
    return list(zip(old, new, strict=True))


def _copy_vocabulary(old: Any, new: Any) -> None:
    """Gives a lookup layer the words that the original was adapted to."""
    if not hasattr(old, "set_vocabulary") or new.get_vocabulary() == old.get_vocabulary():
        return
    if getattr(old, "output_mode", getattr(old, "_output_mode", "")) == "tf_idf":
        raise RewriteError(
            f"{label(old)} cannot be copied: its document frequencies were adapted. Give them to "
            "the layer as vocabulary and idf_weights, or rewrite the model behind it"
        )
    new.set_vocabulary(old.get_vocabulary(include_special_tokens=False))

"""Copies layers, including everything that their configuration leaves out.

A configuration refers to functions and classes by name, and a name may be looked up as something
else. So the copy shares functions, initializers, regularizers and constraints with the original,
and classes are looked up among those of the layer and its sublayers. Whatever a layer keeps solely
for its configuration is updated to match what it does. Weights are matched sublayer by sublayer,
because the order of `layer.weights` depends on which of them are frozen.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from mbn_rewrite.errors import CopyError, RewriteError, cause_of
from mbn_rewrite.frontends.keras_common.adapter import KerasAdapter
from mbn_rewrite.frontends.keras_common.weights import numpy_dtype

_FUNCTIONS = ("activation", "recurrent_activation")
# Attributes that configurations leave out, or do not describe well enough to restore.
_LEFT_OUT = ("bin_boundaries", "use_cudnn")
_OBJECTS = ("_regularizer", "_constraint")
_INITIALIZER = "_initializer"
_OF_LAMBDA = (
    "function",
    "mask",
    "_output_shape",
    "_fn_expects_training_arg",
    "_fn_expects_mask_arg",
)
# Keys under which a configuration has those of other layers.
_NESTED = ("layer", "backward_layer", "cell", "cells")
_PACKAGES = ("tf_keras", "keras")


def label(layer: Any) -> str:
    """Class and name of a layer, for messages."""
    return f"{type(layer).__name__} '{layer.name}'"


def config_of(layer: Any, keras: KerasAdapter) -> dict[str, Any]:
    """Configuration of a layer.

    Raises:
        RewriteError: it has none.
    """
    try:
        return keras.config_of(layer)
    except Exception as error:
        raise CopyError(
            f"{label(layer)} cannot be copied, because its get_config() fails: "
            f"{cause_of(error)} Define get_config() so that it returns the arguments of __init__"
        ) from error


def from_config(layer: Any, config: dict[str, Any], keras: KerasAdapter, kind: Any = None) -> Any:
    """A new layer, not yet built, from a configuration of an existing one.

    Args:
        layer: the original.
        config: its configuration, or an edited one.
        keras: the adapter of its Keras.
        kind: the class of the new layer, if not that of the original.

    Raises:
        RewriteError: it cannot be created, or would not be the same.
    """
    check_call(layer, keras)
    if is_stock(type(layer)):
        config = _with_placeholders(config, keras)
    try:
        with keras.scope({**_custom_functions(layer), **custom_classes(layer)}):
            new = (kind or type(layer)).from_config(config)
    except RewriteError:
        raise
    except Exception as error:
        if isinstance(error.__context__, RewriteError):  # Keras 3 wraps errors
            raise error.__context__ from None
        raise CopyError(
            f"{label(layer)} cannot be copied from its configuration: {cause_of(error)} "
            "Define get_config() so that it returns the arguments of __init__"
        ) from error
    keras.rename(new, layer.name)
    # Sublayers that are created when the layer is built follow in `copy_weights`.
    complete = kind is None and has_the_same_layers(layer, new, keras)
    for old_part, new_part in paired(layer, new, keras) if complete else [(layer, new)]:
        _share_objects(old_part, new_part, keras)
    return new


def check_copy(layer: Any, keras: KerasAdapter) -> None:
    """Raises RewriteError if a layer, or whatever else is called, cannot be copied."""
    if isinstance(layer, keras.layers.Layer):
        check_call(layer, keras)
    else:
        keras.copy_operation(layer)


def check_call(layer: Any, keras: KerasAdapter) -> None:
    """Raises RewriteError if a layer does something else than its class."""
    own_call = vars(layer).get("call")  # saving leaves the class's method there
    is_own = own_call is not None and getattr(own_call, "__func__", None) is not type(layer).call
    if is_own and not keras.assigns_its_own_call(layer):
        raise CopyError(
            f"{label(layer)} cannot be copied: its call method was exchanged on the object. Make "
            "a subclass of its class that has the method"
        )


def has_the_same_layers(old: Any, new: Any, keras: KerasAdapter) -> bool:
    """Whether a copy holds layers of the same classes as the original does."""
    return _kinds(parts(old), keras) == _kinds(parts(new), keras)


def check_own_layers(old: Any, new: Any, keras: KerasAdapter) -> None:
    """Raises RewriteError if a copy has layers of the original."""
    if {id(part) for part in parts(old)} & {id(part) for part in parts(new)}:
        raise CopyError(
            f"{label(old)} cannot be copied: its get_config() gives layers themselves, not their "
            f"configurations. Use {keras.package}.layers.serialize in get_config"
        )


def copy_weights(old: Any, new: Any, keras: KerasAdapter) -> None:
    """Sets all weights, flags and states of a built layer to those of the original.

    The copy may have a bias that the original lacks, which is set to zero.

    Raises:
        RewriteError: the two do not have the same weights.
    """
    check_own_layers(old, new, keras)
    copied: set[int] = set()
    pairs: list[tuple[Any, Any]] = []
    for old_part, new_part in paired(old, new, keras):
        if type(old_part) is not type(new_part):  # to be replaced, see `paired`
            copied |= {id(v) for part in (old_part, new_part) for v in part.weights}
            continue
        new_own = keras.own_variables(new_part)
        old_own = keras.own_variables(old_part)
        bias = getattr(new_part, "bias", None)
        if bias is not None and getattr(old_part, "bias", None) is None:
            new_own = [v for v in new_own if v is not bias]
            bias.assign(np.zeros(tuple(bias.shape), numpy_dtype(bias)))
            copied.add(id(bias))
        pairs += _zipped(old, old_own, new_own)
        states = zip(keras.states(old_part), keras.states(new_part), strict=True)
        pairs += [(a, b) for a, b in states if a is not None and b is not None]
        new_part._trainable = old_part._trainable
        _share_objects(old_part, new_part, keras)
        # Not earlier: tf_keras warns if one initializer is used for two layers.
        share_initializers(old_part, new_part, keras)
        _copy_vocabulary(old_part, new_part)
    copied |= {id(variable) for pair in pairs for variable in pair}
    # The rest is kept where Keras does not look, in the same order in both.
    rest = ([v for v in keras.variables(layer) if id(v) not in copied] for layer in (old, new))
    for source, target in [*pairs, *_zipped(old, *rest)]:
        keras.assign(target, source)
    for part in parts(new):
        keras.sync_config(part)
        if isinstance(part, keras.layers.Normalization):
            part.finalize_state()  # its mean and variance are computed from its weights


def paired(old: Any, new: Any, keras: KerasAdapter) -> Iterator[tuple[Any, Any]]:
    """A layer and all its sublayers, each with its copy.

    A training layer that took the place of a BatchNormalization may be paired with a
    BatchNormalization: that is what the constructor of its parent creates.

    Raises:
        RewriteError: the copy has other sublayers.
    """
    olds, news = parts(old), parts(new)
    if _kinds(olds, keras) != _kinds(news, keras):
        raise CopyError(
            f"{label(old)} cannot be copied: its copy holds other layers "
            f"({_listed(news)}; the original {_listed(olds)}). Make the layers in __init__ or "
            "build, and give classes of your own names that Keras does not have"
        )
    return zip(olds, news, strict=True)


def parts(layer: Any) -> list[Any]:
    """A layer and its sublayers at any depth."""
    return list(layer._flatten_layers(include_self=True, recursive=True))


def _kinds(layers: list[Any], keras: KerasAdapter) -> list[type]:
    kinds = [type(layer) for layer in layers]
    return [keras.batch_norms[0] if kind in keras.training_layers else kind for kind in kinds]


def _listed(layers: list[Any]) -> str:
    return ", ".join(type(part).__name__ for part in layers[1:6]) or "none"


def is_stock(kind: type) -> bool:
    """Whether a class is one of Keras's own."""
    return is_from(kind, _PACKAGES)


def is_from(kind: type, packages: tuple[str, ...]) -> bool:
    """Whether a class is of one of some packages."""
    return kind.__module__.partition(".")[0] in packages


def stock_call(layer: Any) -> Any:
    """The `__call__` of Keras's own class that a layer's class derives from.

    What Keras records is a call of that one, whatever the layer's class has in its place.
    """
    kinds = type(layer).__mro__
    return next(vars(k)["__call__"] for k in kinds if is_stock(k) and "__call__" in vars(k))


def custom_classes(layer: Any) -> dict[str, type]:
    """Custom classes of a layer and its sublayers, by name."""
    classes: dict[str, type] = {}
    for part in parts(layer):
        kind = type(part)
        if not is_stock(kind) and classes.setdefault(kind.__name__, kind) is not kind:
            raise CopyError(
                f"{label(layer)} cannot be copied: it holds layers of two different classes "
                f"that are both named {kind.__name__}. Rename one of them"
            )
    return classes


def _custom_functions(layer: Any) -> dict[str, Any]:
    """Custom functions and classes of objects that a layer's configurations refer to, by name.

    Of two with one name this has the last; `_share_objects` sets the right one in the end. Layers
    that serve as activations count as custom, since Keras before 3.13 does not look up its own.
    """
    found: dict[str, Any] = {}
    for part in parts(layer):
        for name, value in vars(part).items():
            is_one = name in (*_FUNCTIONS, *_OF_LAMBDA) or name.endswith((*_OBJECTS, _INITIALIZER))
            named = value if hasattr(value, "__name__") else type(value)
            is_layer = name in _FUNCTIONS and named is not value
            if is_one and callable(value) and (is_layer or not is_stock(named)):
                found[named.__name__] = named
    return found


def _with_placeholders(config: dict[str, Any], keras: KerasAdapter) -> dict[str, Any]:
    """Configuration of a stock layer, with placeholders for what `_share_objects` sets."""
    result = dict(config)
    for key, value in config.items():
        if key in _FUNCTIONS:
            if not _describes_a_layer(value):
                result[key] = "linear"
        elif key.endswith(_OBJECTS):
            result[key] = None
        elif key.endswith(_INITIALIZER) and value is not None:
            result[key] = "zeros"  # all weights are set anyway
        elif key in _NESTED:
            result[key] = _nested_with_placeholders(value, keras)
    return keras.without_functions(result)


def _nested_with_placeholders(value: Any, keras: KerasAdapter) -> Any:
    """The same for the configurations of other layers in a configuration, and lists of them."""
    if isinstance(value, (list, tuple)):
        return type(value)(_nested_with_placeholders(item, keras) for item in value)
    config = value.get("config") if isinstance(value, dict) else None
    if not isinstance(config, dict) or "layers" in config:
        return value  # a model calls its layers as soon as it is created, so they must be complete
    if str(value.get("module", "")).partition(".")[0] not in _PACKAGES:
        return value
    # It must not be built before it has its regularizers and constraints.
    kept = {key: item for key, item in value.items() if key != "build_config"}
    return {**kept, "config": _with_placeholders(config, keras)}


def _describes_a_layer(value: Any) -> bool:
    """Whether a configured activation is a layer rather than a function."""
    functions = (None, "function", "__lambda__")
    return isinstance(value, dict) and value.get("class_name") not in functions


def _share_objects(old: Any, new: Any, keras: KerasAdapter) -> None:
    """Makes a copy use the very functions and objects of the original."""
    names = [name for name in vars(old) if name in _FUNCTIONS or name.endswith(_OBJECTS)]
    if isinstance(old, keras.layers.Lambda):
        names += _OF_LAMBDA
    names += [name for name in _LEFT_OUT if name in vars(old)]
    _share_attributes(old, new, names, keras)
    new._supports_masking = old._supports_masking


def share_config_objects(kept: Any, layer: Any, keras: KerasAdapter) -> None:
    """Makes a layer that only serves configurations use the objects of the one that runs."""
    for part, other in zip(parts(kept), parts(layer), strict=True):
        _share_objects(other, part, keras)
        share_initializers(other, part, keras)


def share_initializers(old: Any, new: Any, keras: KerasAdapter) -> None:
    """Makes a built copy use the very initializers of the original, for its configuration."""
    initializers = [name for name in vars(old) if name.endswith(_INITIALIZER)]
    _share_attributes(old, new, initializers, keras)


def _share_attributes(old: Any, new: Any, names: list[str], keras: KerasAdapter) -> None:
    for name in names:
        value = getattr(old, name)
        if isinstance(value, keras.layers.Layer) or getattr(new, name, None) is value:
            continue
        setattr(new, name, value)


def _zipped(layer: Any, old: list[Any], new: list[Any]) -> list[tuple[Any, Any]]:
    shapes, new_shapes = [tuple(v.shape) for v in old], [tuple(v.shape) for v in new]
    if shapes != new_shapes:
        raise CopyError(
            f"{label(layer)} cannot be copied: its weights have the shapes {shapes}, those of "
            f"its copy {new_shapes}"
        )
    return list(zip(old, new, strict=True))


def _copy_vocabulary(old: Any, new: Any) -> None:
    """Copies the vocabulary to which a lookup layer was adapted."""
    if not hasattr(old, "set_vocabulary") or new.get_vocabulary() == old.get_vocabulary():
        return
    if getattr(old, "output_mode", getattr(old, "_output_mode", "")) == "tf_idf":
        raise CopyError(
            f"{label(old)} cannot be copied: its document frequencies were adapted. Give them to "
            "the layer as vocabulary and idf_weights, or rewrite the model behind it"
        )
    new.set_vocabulary(old.get_vocabulary(include_special_tokens=False))

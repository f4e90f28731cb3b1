"""Models of custom classes that are otherwise Functional or Sequential models.

Such a class builds its network in its constructor, and adds methods and attributes. Its
configuration, if there is one, describes the network as it was, not as it is rewritten. So a copy
is created without that constructor: as a Functional or Sequential model, but with the original's
class. Attributes that the original has in addition to its network are copied after that, with
references to whatever was copied pointing to the copies.
"""

from __future__ import annotations

import copy
import warnings
from collections import ChainMap, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any

import numpy as np

from mbn_rewrite.errors import RewriteError, cause_of
from mbn_rewrite.frontends.keras_common.adapter import KerasAdapter
from mbn_rewrite.frontends.keras_common.cloning import (
    custom_classes,
    is_from,
    is_stock,
    label,
    parts,
)
from mbn_rewrite.passes.wording import listed

FRAMEWORKS = ("keras", "tf_keras", "tensorflow")
BUILT_IN = (*FRAMEWORKS, "builtins", "numpy")  # their objects refer to no layer of a model


def is_of(value: Any, packages: tuple[str, ...]) -> bool:
    """Whether something is of a class of one of these packages."""
    return is_from(type(value), packages)


def made_without_constructor(old: Any, base: type, *args: Any, **kwargs: Any) -> Any:
    """An instance of a model's class for which only the constructor of a base class was run."""
    kind: Any = type(old)
    new = kind.__new__(kind)
    base.__init__(new, *args, **kwargs)  # type: ignore[misc]
    return new


def copied_by_attributes(old: Any, keras: KerasAdapter, copier: AttributeCopier) -> Any:
    """A copy of a layer whose class cannot make one from a configuration.

    It is of the same class, whose constructor is not run, and has a copy of every attribute. It is
    built as far as the original is.
    """
    base = keras.model if isinstance(old, keras.model) else keras.layers.Layer
    new = made_without_constructor(
        old, base, name=old.name, dtype=old.dtype_policy, trainable=old.trainable
    )
    made = dict(vars(new))
    for name, value in vars(old).items():
        kept = name in made or name.startswith("_self_") or isinstance(value, CheckedConfig)
        if not kept:
            setattr(new, name, copier.copied(value))
    for name, value in made.items():  # what the constructor of the base class has set anew
        kept = vars(old).get(name)
        if kept is not value and (isinstance(kept, _PLAIN) or name in _OF_BUILDING):
            vars(new)[name] = kept
    return new


_PLAIN = (bool, int, float, str, tuple)
_OF_BUILDING = (
    *("_build_shapes_dict", "_build_input_shape", "input_spec", "_input_spec"),
    *("_saved_model_inputs_spec", "_saved_model_arg_spec"),
)


def attributes(model: Any, keras: KerasAdapter) -> dict[str, Any]:
    """Attributes of a model that were not set by Keras when it was created or used.

    In models of Keras's own classes, all private attributes are Keras's.
    """
    is_keras_own = is_stock(type(model))
    return {
        name: value
        for name, value in vars(model).items()
        if name not in keras.model_attributes
        and not (name.startswith("_") if is_keras_own else keras.is_private(name))
        and not isinstance(value, CheckedConfig)
    }


def leaves(value: Any) -> Iterator[Any]:
    """Leaves of nested lists, tuples, sets and dictionaries."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple, set, frozenset)):
        for inner in list(value):
            yield from leaves(inner)
    else:
        yield value


# ---------------------------------------------------------------------------- attributes


class AttributeCopier:
    """Copies what a model has in its attributes.

    Layers and Keras tensors are replaced by their copies; variables, metrics and arrays are
    copied, and so are lists, tuples, sets and dictionaries. Methods, functions and other objects
    that refer to something copied are recreated to refer to the copy. Everything else is shared:
    losses, optimizers, tokenizers, layers without weights, and metrics that cannot be recreated
    from their configuration.

    Args:
        keras: the adapter of the model's Keras.
        layer: maps a layer to its copy.
        tensors: id(Keras tensor of the original) -> that of the copy.
    """

    def __init__(
        self, keras: KerasAdapter, layer: Callable[[Any], Any], tensors: dict[int, Any]
    ) -> None:
        self._keras = keras
        self._layer = layer
        self._copies: ChainMap[int, Any] = ChainMap({}, tensors)  # which may come to hold more

    def copied(self, value: Any) -> Any:
        """The copy's counterpart of a value."""
        if id(value) not in self._copies:
            self._copies[id(value)] = self._of(value)
        return self._copies[id(value)]

    def _of(self, value: Any) -> Any:
        if isinstance(value, self._keras.metric):  # in tf_keras a layer too
            return self._metric(value)
        if isinstance(value, self._keras.layers.Layer):
            return self._layer(value)
        if isinstance(value, (tuple, frozenset)):
            return self._frozen(value)
        if isinstance(value, (dict, list, set)):
            return self._container(value)
        if isinstance(value, np.ndarray):
            return value.copy()
        if self._keras.is_variable(value):
            return self._keras.copy_variable(value)
        if self._keras.draws_seeds(value):
            return self._keras.copy_seeds(value)
        if isinstance(value, MethodType):
            owner = self.copied(value.__self__)
            return value if owner is value.__self__ else MethodType(value.__func__, owner)
        if isinstance(value, FunctionType):
            return self._function(value)
        if isinstance(value, partial):
            return self._partial(value)
        if hasattr(value, "python_function"):  # a tf.function, to be traced again
            function = self.copied(value.python_function)
            return value if function is value.python_function else value._clone(function)
        return self._object(value)

    def _metric(self, value: Any) -> Any:
        try:
            new = type(value).from_config(value.get_config())
        except Exception:  # the user's class may raise anything
            return value
        for old_state, state in zip(value.variables, new.variables, strict=False):
            self._keras.assign(state, old_state)
        return new

    def _frozen(self, value: Any) -> Any:
        items = [self.copied(item) for item in value]
        kind = type(getattr(value, "__wrapped__", value))  # tf_keras wraps containers
        return kind(*items) if hasattr(kind, "_fields") else kind(items)

    def _container(self, value: Any) -> Any:
        new = self._copies[id(value)] = _emptied(getattr(value, "__wrapped__", value))
        if isinstance(new, dict):
            new.update({key: self.copied(item) for key, item in value.items()})
        elif isinstance(new, list):
            new.extend(map(self.copied, value))
        else:
            new.update(map(self.copied, value))
        return new

    def _function(self, value: Any) -> Any:
        if not self._refers([cell.cell_contents for cell in filled_cells(value)]):
            return value
        closure = tuple(CellType() for _ in value.__closure__)
        new = FunctionType(
            value.__code__, value.__globals__, value.__name__, value.__defaults__, closure
        )
        new.__kwdefaults__ = value.__kwdefaults__
        self._copies[id(value)] = new  # a function may be in its own closure
        for old_cell, cell in zip(value.__closure__, closure, strict=True):
            if _is_filled(old_cell):
                cell.cell_contents = self.copied(old_cell.cell_contents)
        return new

    def _partial(self, value: partial[Any]) -> partial[Any]:
        parts_of_it = (value.func, *value.args, *value.keywords.values())
        if all(self.copied(part) is part for part in parts_of_it):
            return value
        keywords = {name: self.copied(inner) for name, inner in value.keywords.items()}
        return partial(self.copied(value.func), *map(self.copied, value.args), **keywords)

    def _object(self, value: Any) -> Any:
        is_users = not is_of(value, BUILT_IN) and hasattr(value, "__dict__")
        if not (is_users and self._refers(vars(value))):
            return value
        new = self._copies[id(value)] = copy.copy(value)
        vars(new).update({name: self.copied(inner) for name, inner in vars(value).items()})
        return new

    def _refers(self, values: Any) -> bool:
        """Whether values, or leaves of containers among them, have copies of their own."""
        return any(
            (isinstance(leaf, self._keras.layers.Layer) or id(leaf) in self._copies)
            and self.copied(leaf) is not leaf
            for leaf in leaves(values)
        )


def _emptied(container: Any) -> Any:
    """An empty container of the same kind; a plain one in place of a framework's."""
    if is_of(container, FRAMEWORKS):
        plain = (OrderedDict, dict, list, set)
        return next(kind for kind in plain if isinstance(container, kind))()
    new = copy.copy(container)
    new.clear()
    return new


def filled_cells(function: FunctionType) -> list[CellType]:
    """Cells of a function's closure that have a value."""
    return [cell for cell in function.__closure__ or () if _is_filled(cell)]


def _is_filled(cell: CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


# --------------------------------------------------------------------------------- files


class CheckedConfig:
    """The `get_config` of a copy whose class has a constructor of its own.

    A configuration is wanted for a file. If the class would create another network from it than
    the copy has, this raises an error, rather than let a file be written that cannot be loaded.

    Args:
        model: the copy.
        keras: the adapter of its Keras.
    """

    def __init__(self, model: Any, keras: KerasAdapter) -> None:
        self._model = model
        self._keras = keras
        self._is_good = False

    def __call__(self) -> dict[str, Any]:
        """The configuration.

        Raises:
            RewriteError: the class does not recreate the copy from it.
        """
        model = self._model
        network = self._keras.network_config(model)
        if network is not None:
            return network
        del vars(model)["get_config"]  # Keras checks whether it is the class's own
        try:
            self._is_good = self._is_good or self._check()
            config: dict[str, Any] = model.get_config()
            return config
        finally:
            vars(model)["get_config"] = self

    def _check(self) -> bool:
        model = self._model
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                made = self._keras.reloaded(model, custom_classes(model))
        except RewriteError:
            raise
        except Exception as error:
            why = f"it cannot be made from its configuration: {cause_of(error)}"
        else:
            if _structure(made, self._keras) == _structure(model, self._keras):
                return True
            why = "its class makes the network of it as it was before it was rewritten."
        raise RewriteError(
            f"{label(model)} has no configuration, so that no file of the whole model can be "
            f"loaded: {why} {_WHAT_WORKS}, or {self._keras.how_to_export}"
        )


_WHAT_WORKS = (
    "Save its weights (save_weights) and load them into what convert makes of the original"
)


def _structure(model: Any, keras: KerasAdapter) -> list[tuple[type, list[tuple[int, ...]]]]:
    """Classes of a model and its sublayers, with the shapes of their own variables."""
    return [
        (type(part), [tuple(variable.shape) for variable in keras.own_variables(part)])
        for part in parts(model)
    ]


def needs_check(model: Any, keras: KerasAdapter) -> bool:
    """Whether a class may create another network from a copy's configuration than it has."""
    kind = type(model)
    if is_stock(kind):
        return False
    defined = {name for cls in kind.__mro__ if not is_stock(cls) for name in vars(cls)}
    return not keras.has_stock_constructor(kind) or bool({"get_config", "from_config"} & defined)


def note_on_files(model: Any, keras: KerasAdapter) -> str:
    """Note on saving a rewritten model that its class may not be able to recreate."""
    try:
        describes_parts = any(_is_configuration(part) for part in _dicts(keras.config_of(model)))
    except Exception:  # saving the original would report it
        describes_parts = False
    rule = (
        "from a configuration that may describe it as it was. If so, saving it as .keras or .h5 "
        "raises an error"
        if describes_parts
        else "as it was before it was rewritten, so that saving it as .keras or .h5 raises an error"
    )
    return (
        f"{label(model)} stays of its class, whose constructor makes the network {rule}. "
        f"{_WHAT_WORKS}, or {keras.how_to_export}."
    )


def note_on_holders(labels: Sequence[str], keras: KerasAdapter) -> str:
    """Note on saving a rewritten model with layers that make and call others in code."""
    return (
        f"The code of {listed(labels)} makes the layers that it calls, as they were before they "
        "were rewritten. Where one was, saving as .keras or .h5 raises an error. "
        f"{_WHAT_WORKS}, or {keras.how_to_export}."
    )


def _dicts(value: Any) -> Iterator[dict[Any, Any]]:
    if isinstance(value, dict):
        yield value
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for inner in value:
            yield from _dicts(inner)


def _is_configuration(value: dict[Any, Any]) -> bool:
    """Whether a dictionary is a serialized layer or model."""
    inner = value.get("config")
    return "class_name" in value and isinstance(inner, dict) and "trainable" in inner

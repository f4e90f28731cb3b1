"""Models that are made as Functional or Sequential models are, with more to them than that.

A class of its own builds its network in its constructor and adds methods and attributes. Its
configuration, if it has one, says how to build the network as it was, not as it is rewritten.
So a copy is made without that constructor: as a Functional or Sequential model is, but of the
class of the original. What the original has in attributes beside its network follows, with
whatever was copied exchanged for its copy.
"""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from types import CellType, FunctionType, MethodType
from typing import Any

import numpy as np

from mbn_rewrite.errors import RewriteError, cause_of
from mbn_rewrite.frontends.keras_common.adapter import KerasAdapter
from mbn_rewrite.frontends.keras_common.cloning import is_stock, label, own_classes, parts

_FRAMEWORKS = ("keras", "tf_keras", "tensorflow")
_BUILT_IN = (*_FRAMEWORKS, "builtins", "numpy")  # whose objects refer to no layer of a model


def made_without_constructor(old: Any, base: type, *args: Any, **kwargs: Any) -> Any:
    """An object of a model's class, of which only the constructor of a base class was run."""
    kind: Any = type(old)
    new = kind.__new__(kind)
    base.__init__(new, *args, **kwargs)  # type: ignore[misc]
    return new


def attributes(model: Any, keras: KerasAdapter) -> dict[str, Any]:
    """What a model has in attributes that Keras did not set when it was made or used.

    Models of Keras's own classes have no private attributes but Keras's.
    """
    private = ("_",) if is_stock(type(model)) else keras.private
    return {
        name: value
        for name, value in vars(model).items()
        if name not in keras.model_attributes
        and not name.startswith(private)
        and not isinstance(value, CheckedConfig)
    }


def leaves(value: Any) -> Iterator[Any]:
    """What is in lists, tuples, sets and dictionaries within one another."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple, set, frozenset)):
        for inner in list(value):
            yield from leaves(inner)
    else:
        yield value


# ---------------------------------------------------------------------------- attributes


class Belongings:
    """What a copy has in place of what its original has in attributes.

    Layers and Keras tensors give way to their copies; variables, metrics and arrays are copied,
    and so are lists, tuples, sets and dictionaries. Methods, functions and other objects that
    refer to something copied are made anew to refer to the copy. All else is shared: losses,
    optimizers, tokenizers, layers without weights. So is a metric that cannot be made again
    from its configuration.

    Args:
        keras: the Keras of the model.
        layer: gives the copy of a layer.
        tensors: id(a Keras tensor of the original) -> that of the copy.
    """

    def __init__(
        self, keras: KerasAdapter, layer: Callable[[Any], Any], tensors: dict[int, Any]
    ) -> None:
        self._keras = keras
        self._layer = layer
        self._made = dict(tensors)

    def exchanged(self, value: Any) -> Any:
        """What the copy has for a value."""
        if id(value) not in self._made:
            self._made[id(value)] = self._of(value)
        return self._made[id(value)]

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
            return self._keras.copy_of_variable(value)
        if isinstance(value, MethodType):
            owner = self.exchanged(value.__self__)
            return value if owner is value.__self__ else MethodType(value.__func__, owner)
        if isinstance(value, FunctionType):
            return self._function(value)
        if hasattr(value, "python_function"):  # a tf.function, to be traced again
            function = self.exchanged(value.python_function)
            return value if function is value.python_function else value._clone(function)
        return self._object(value)

    def _metric(self, value: Any) -> Any:
        try:
            new = type(value).from_config(value.get_config())
        except Exception:  # whatever a class of the user's raises
            return value
        for old_state, state in zip(value.variables, new.variables, strict=False):
            state.assign(old_state)
        return new

    def _frozen(self, value: Any) -> Any:
        items = [self.exchanged(item) for item in value]
        kind = type(getattr(value, "__wrapped__", value))  # which tf_keras wraps
        return kind(*items) if hasattr(kind, "_fields") else kind(items)

    def _container(self, value: Any) -> Any:
        new = self._made[id(value)] = _emptied(getattr(value, "__wrapped__", value))
        if isinstance(new, dict):
            new.update({key: self.exchanged(item) for key, item in value.items()})
        elif isinstance(new, list):
            new.extend(map(self.exchanged, value))
        else:
            new.update(map(self.exchanged, value))
        return new

    def _function(self, value: Any) -> Any:
        cells = [cell for cell in value.__closure__ or () if _is_filled(cell)]
        if not self._refers([cell.cell_contents for cell in cells]):
            return value
        closure = tuple(CellType() for _ in value.__closure__)
        new = FunctionType(
            value.__code__, value.__globals__, value.__name__, value.__defaults__, closure
        )
        new.__kwdefaults__ = value.__kwdefaults__
        self._made[id(value)] = new  # which may be in its own closure
        for old_cell, cell in zip(value.__closure__, closure, strict=True):
            if _is_filled(old_cell):
                cell.cell_contents = self.exchanged(old_cell.cell_contents)
        return new

    def _object(self, value: Any) -> Any:
        is_users = type(value).__module__.partition(".")[0] not in _BUILT_IN
        if not (is_users and hasattr(value, "__dict__") and self._refers(vars(value))):
            return value
        new = self._made[id(value)] = copy.copy(value)
        vars(new).update({name: self.exchanged(inner) for name, inner in vars(value).items()})
        return new

    def _refers(self, values: Any) -> bool:
        """Whether something copied is among values, or in containers among them."""
        return any(
            (isinstance(leaf, self._keras.layers.Layer) or id(leaf) in self._made)
            and self.exchanged(leaf) is not leaf
            for leaf in leaves(values)
        )


def _emptied(container: Any) -> Any:
    """A container of the same kind with nothing in it; a plain one for those of frameworks."""
    if type(container).__module__.partition(".")[0] in _FRAMEWORKS:
        plain = (OrderedDict, dict, list, set)
        return next(kind for kind in plain if isinstance(container, kind))()
    new = copy.copy(container)
    new.clear()
    return new


def _is_filled(cell: CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


# --------------------------------------------------------------------------------- files


class CheckedConfig:
    """The `get_config` of a copy whose class has a constructor of its own.

    What is asked for a configuration is asked for a file. If the class would make another
    network of it than the copy has, that is said instead of writing a file that cannot be
    loaded.

    Args:
        model: the copy.
        keras: its Keras.
    """

    def __init__(self, model: Any, keras: KerasAdapter) -> None:
        self._model = model
        self._keras = keras
        self._is_good = False

    def __call__(self) -> dict[str, Any]:
        """The configuration.

        Raises:
            RewriteError: the class does not make the copy of it.
        """
        model = self._model
        network = self._keras.network_config(model)
        if network is not None:
            return network
        del vars(model)["get_config"]  # Keras looks whether that is the class's own
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
                made = self._keras.made_again(model, own_classes(model))
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
    "Save its weights (save_weights) and load them into what convert makes of a new "
    "model of that class"
)


def _structure(model: Any, keras: KerasAdapter) -> list[tuple[type, list[tuple[int, ...]]]]:
    """The class and the shapes of the own variables of a model and of all that it holds."""
    return [
        (type(part), [tuple(variable.shape) for variable in keras.own_variables(part)])
        for part in parts(model)
    ]


def needs_check(model: Any, keras: KerasAdapter) -> bool:
    """Whether a class may make another network of a copy's configuration than the copy has."""
    kind = type(model)
    if is_stock(kind):
        return False
    defined = {name for cls in kind.__mro__ if not is_stock(cls) for name in vars(cls)}
    return not keras.is_made_alike(kind) or bool({"get_config", "from_config"} & defined)


def note_on_files(model: Any, keras: KerasAdapter) -> str:
    """What becomes of files of a rewritten model whose class may not make it again."""
    try:
        describes_parts = any(_is_configuration(part) for part in _dicts(keras.config_of(model)))
    except Exception:  # of which saving the original would tell
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


def _dicts(value: Any) -> Iterator[dict[Any, Any]]:
    if isinstance(value, dict):
        yield value
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for inner in value:
            yield from _dicts(inner)


def _is_configuration(value: dict[Any, Any]) -> bool:
    """Whether a dictionary is how Keras writes down a layer or model."""
    inner = value.get("config")
    return "class_name" in value and isinstance(inner, dict) and "trainable" in inner

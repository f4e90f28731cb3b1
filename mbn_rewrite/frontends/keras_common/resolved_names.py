"""Objects that the names in a Keras file resolve to, checked right before it is loaded."""

from __future__ import annotations

import importlib
import sys
import sysconfig
import types
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

from mbn_rewrite.errors import RewriteError
from mbn_rewrite.frontends.keras_common.pure_functions import computes
from mbn_rewrite.frontends.keras_common.trust import (
    Finding,
    is_raw,
    parts_of,
    refuse,
    unsafe_effect,
)

# Class names that Keras writes for plain values and for objects that it creates itself.
_VALUES = {
    *("__tensor__", "__numpy__", "__bytes__", "__slice__", "__ellipsis__", "__tuple__"),
    *("__keras_tensor__", "__lambda__", "TensorShape", "TypeSpec", "CompositeTensor"),
}
# Modules of Keras with the classes and functions that old files name without a module.
_PLACES = (
    *("layers", "models", "activations", "initializers", "regularizers", "constraints"),
    *("losses", "metrics", "optimizers", "optimizers.schedules", "mixed_precision"),
)


def check_objects(source: object, configs: Iterable[Any], keras: Any) -> None:
    """Refuses configurations with names that resolve to something models are not made of.

    Imports nothing but Keras.

    Args:
        source: the file, for the message.
        configs: its configurations, which `check` has let pass.
        keras: the package that is to load it.

    Raises:
        RewriteError: a name resolves to such a thing, or to something that is not loaded.
    """
    for config in configs:
        for part, where in parts_of(source, config):
            name = part.get("class_name")
            if isinstance(name, str) and name not in _VALUES and "config" in part:
                refuse(source, _unsafe_operation(part["config"], (name,), where))
                for found in _candidates(source, part, where, keras):
                    refuse(source, _unsafe_object(found, part["config"], where, keras))


def _candidates(source: object, part: dict[str, Any], where: str, keras: Any) -> list[Any]:
    """All objects to which Keras may resolve the name in a dictionary."""
    name = part["class_name"]
    if name == "function":
        name = key = part["config"]
    elif name == "__typespec__":
        name, key = part.get("spec_name"), part.get("registered_name")
    else:
        key = part.get("registered_name", name)
    if not isinstance(name, str):
        return []  # Keras refuses it
    module = part.get("module")
    registered = _registered(keras, key)
    if not isinstance(module, str):
        # Old files name a class and nothing else.
        other = _registered(keras, name)
        others = _anywhere(keras, name) if other is None else [_Registered(other)]
        return [*others, *([] if registered is None else [_Registered(registered)])]
    if registered is not None:
        return [_Registered(registered)]
    names = [name, key] if isinstance(key, str) else [name]
    if module.partition(".")[0] in ("keras", "tf_keras", "builtins"):
        return _of_keras(keras, module, names)
    if module not in sys.modules:
        raise RewriteError(
            f"{source} names {module}.{name} ({where}), which is not loaded. Import the module "
            f"that defines it first (--import_modules={module})"
        )
    return [x for x in (_attribute(sys.modules[module], name) for name in names) if x is not None]


@dataclass(frozen=True)
class _Registered:
    """Something that the user has registered with Keras."""

    found: Any


def _registered(keras: Any, name: Any) -> Any:
    return keras.saving.get_registered_object(name) if isinstance(name, str) else None


def _unsafe_object(found: Any, config: Any, where: str, keras: Any) -> Finding | None:
    """Reason not to create an object from what a name resolves to."""
    is_registered = isinstance(found, _Registered)
    if is_registered:
        found = found.found
    elif not _is_for_models(found, keras):
        what = f"{getattr(found, '__module__', '')}.{getattr(found, '__name__', found)}"
        return Finding(f"names {what}, which models are not made of", where)
    if not isinstance(found, type):
        return None
    names = [cls.__name__ for cls in found.__mro__]
    return unsafe_effect({}, config, names, where) or _unsafe_operation(config, names, where)


def _unsafe_operation(config: Any, names: Iterable[str], where: str) -> Finding | None:
    """Side effect of an operation that a layer runs as it is, if it does more than compute."""
    from mbn_rewrite.frontends import effects

    if not isinstance(config, dict):
        return None
    op = None
    if "TensorFlowOpLayer" in names:
        node = config.get("node_def")
        # As text it would be serialized, which Keras accepts but does not write.
        op = str(node.get("op")) if isinstance(node, dict) else "?"
    elif "TFOpLambda" in names and is_raw(str(config.get("function"))):
        op = str(config["function"]).removeprefix("raw_ops.")
    if op is None or (op != "?" and not effects.acts(op)):
        return None
    return Finding(f"runs the operation {op}, which does more than compute", where)


def _attribute(owner: Any, path: str) -> Any:
    for name in path.split("."):
        owner = getattr(owner, name, None)
    return owner


def _of_keras(keras: Any, module: str, names: Iterable[str]) -> list[Any]:
    """All objects to which Keras may resolve names in one of its own modules."""
    package = keras.__name__
    found = []
    own = module.split(".", 1)[1] if "." in module else ""
    for name in names:
        public = f"{own}.{name}" if own else name
        found.append(_attribute(keras, public))
        if module == "builtins":
            found += [*_anywhere(keras, name), getattr(sys.modules["builtins"], name, None)]
        else:
            found.append(_attribute(_imported(f"{package}.{own}" if own else package), name))
            found.append(_symbol(package, f"keras.{public}"))
    return [each for each in found if each is not None]


def _anywhere(keras: Any, name: str) -> list[Any]:
    found = [_attribute(keras, f"{place}.{name}") for place in _PLACES]
    found += [_attribute(_imported(f"{keras.__name__}.src.{place}"), name) for place in _PLACES]
    return [each for each in found if each is not None]


@cache
def _imported(module: str) -> Any:
    """A module of Keras, or None if there is none of that name."""
    try:
        return importlib.import_module(module)
    except (ImportError, ValueError, TypeError):
        return None


def _symbol(package: str, name: str) -> Any:
    """The object that a Keras exports under a public name."""
    if package == "keras":
        from keras.src.api_export import get_symbol_from_name
    else:
        from tensorflow.python.util.tf_export import get_symbol_from_name
    return get_symbol_from_name(name)


def _is_for_models(found: Any, keras: Any) -> bool:
    """Whether models are made of such objects: known kinds of classes, and pure functions."""
    if isinstance(found, type):
        return issubclass(found, _kinds(keras)) or _is_a_value(found)
    if not isinstance(found, types.FunctionType):
        return isinstance(found, types.ModuleType)  # nothing can be created from it
    return _computes(found) or _is_user_module(found.__module__)


@cache
def _kinds(keras: Any) -> tuple[type, ...]:
    """Base classes of the objects that models consist of."""
    paths = (
        *("layers.Layer", "initializers.Initializer", "regularizers.Regularizer", "Operation"),
        *("constraints.Constraint", "losses.Loss", "metrics.Metric", "optimizers.Optimizer"),
        *("optimizers.schedules.LearningRateSchedule", "optimizers.legacy.Optimizer"),
        *("mixed_precision.Policy", "DTypePolicy", "dtype_policies.DTypePolicyMap"),
        *("quantizers.Quantizer", "quantizers.QuantizationConfig", "random.SeedGenerator"),
        *("layers.InputSpec", "KerasTensor"),
    )
    found = [_attribute(keras, path) for path in paths]
    return tuple(each for each in found if isinstance(each, type))


def _is_a_value(cls: type) -> bool:
    """Whether a class describes tensors, features or initial values, and contains only numbers.

    Old files name initializers without a module, and may mean those of TensorFlow.
    """
    if cls.__module__.endswith(".feature_space"):
        return True
    of_tensorflow = cls.__module__.startswith("tensorflow.")
    names = ("TypeSpec", "FeatureColumn", *(("Initializer",) if of_tensorflow else ()))
    return any(base.__name__ in names for base in cls.__mro__)


def _computes(function: types.FunctionType) -> bool:
    """Whether a function is one of those of Keras or TensorFlow that only compute."""
    package, _, rest = function.__module__.partition(".src.")
    if package in ("keras", "tf_keras"):
        return rest.partition(".")[0] in (
            "activations", "initializers", "regularizers", "constraints", "losses", "metrics", "ops"
        )  # fmt: skip
    if not function.__module__.startswith("tensorflow."):
        return False
    from tensorflow.python.util.tf_export import get_canonical_name_for_symbol

    name = get_canonical_name_for_symbol(function, add_prefix_to_v1_names=True)
    return name is not None and computes(name)


def _is_user_module(module: str) -> bool:
    """Whether a module is the user's own: neither the standard library's nor an installed one."""
    loaded = sys.modules.get(module)
    place = getattr(loaded, "__file__", None)
    if not place or module.partition(".")[0] in ("mbn_rewrite", "tools", "__main__"):
        return False
    libraries = [
        sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")
    ]
    return not any(place.startswith(f"{library}/") for library in libraries)

"""Both Kerases for one test: `K` stands for the layers of whichever is in use.

Tests with the fixture `each_keras` (see conftest.py) run once with either. They build models
of `K` and `Model`, in functions, since what they stand for changes.
"""

from __future__ import annotations

from typing import Any

import keras as keras_3
import numpy as np
import tensorflow as tf
import tf_keras

from mbn_rewrite.frontends.keras3.adapter import KERAS_3
from mbn_rewrite.frontends.keras_common.adapter import KerasAdapter
from mbn_rewrite.frontends.keras_common.batch_norm import is_batch_norm
from mbn_rewrite.frontends.keras_common.cloning import parts
from mbn_rewrite.frontends.keras_common.weights import numpy_dtype
from mbn_rewrite.frontends.registry import front_end_of
from mbn_rewrite.frontends.tf_keras.adapter import TF_KERAS

_PACKAGES = {"tf_keras": tf_keras, "keras": keras_3}
BATCH_NORMS = tuple(each.layers.BatchNormalization for each in _PACKAGES.values())
_in_use = "tf_keras"


def use(name: str) -> None:
    """Has `K` and the others stand for what is in this package."""
    global _in_use
    _in_use = name


def package() -> Any:
    """The Keras in use."""
    return _PACKAGES[_in_use]


class _Layers:
    def __getattr__(self, name: str) -> Any:
        return getattr(package().layers, name)


K = _Layers()


def Model(*args: Any, **kwargs: Any) -> Any:  # noqa: N802
    return package().Model(*args, **kwargs)


def set_policy(name: str) -> None:
    """Sets the dtypes of all layers made from now on."""
    package().mixed_precision.set_global_policy(name)


def policy() -> Any:
    return package().mixed_precision.global_policy()


def clear() -> None:
    """Forgets models and policies, so that names and memory do not pile up."""
    for each in _PACKAGES.values():
        each.mixed_precision.set_global_policy("float32")
        each.backend.clear_session()


def function(name: str) -> Any:
    """A function of the library that the Keras in use takes in Functional models."""
    if _in_use == "keras":
        return getattr(keras_3.ops, name)
    return {"concatenate": tf.concat, "relu": tf.nn.relu}[name]


# ----------------------------------------------------------------- models of either Keras


def adapter_of(model: Any) -> KerasAdapter:
    return KERAS_3 if isinstance(model, keras_3.Model) else TF_KERAS


def norms(model: Any) -> list[Any]:
    """All BatchNormalization layers of a model."""
    return [layer for layer in parts(model) if is_batch_norm(layer, adapter_of(model))]


def variables(model: Any) -> list[Any]:
    """A model's variables, as TensorFlow has them."""
    if adapter_of(model) is KERAS_3:
        return [variable.value for variable in model.variables]
    return list(model.variables)


def compute_dtypes(model: Any) -> set[str]:
    return front_end_of(model).compute_dtypes(model)


def input_structure(model: Any) -> Any:
    """A model's inputs as it takes them."""
    if adapter_of(model) is TF_KERAS:
        return model._nested_inputs
    return getattr(model, "_functional", model)._inputs_struct


def names(model: Any) -> tuple[list[str], list[str]]:
    """The names of a model's inputs and outputs."""
    if adapter_of(model) is TF_KERAS:
        return model.input_names, model.output_names
    functional = getattr(model, "_functional", model)
    return [tensor.name for tensor in functional.inputs], functional.output_names


def inputs_like(model: Any, arrays: list[Any]) -> Any:
    """Arrays as tensors, in the structure in which a model takes its inputs."""
    tensors = [tf.constant(a, t.dtype) for a, t in zip(arrays, model.inputs, strict=True)]
    structure = input_structure(model)
    if adapter_of(model) is KERAS_3:
        return keras_3.tree.pack_sequence_as(structure, tensors)
    return tf.nest.pack_sequence_as(structure, tensors)


def assign(variable: Any, values: Any) -> None:
    """Sets a variable; casts to its dtype."""
    variable.assign(np.asarray(values).astype(numpy_dtype(variable)))

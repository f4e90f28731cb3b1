"""Calls Keras 3 models: with made-up inputs, and without changing them."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from mbn_rewrite.errors import RewriteError
from mbn_rewrite.keras_frontend.dialect import KERAS_3, functional_of
from mbn_rewrite.keras_layers import running as shared
from mbn_rewrite.keras_layers.copying import parts
from mbn_rewrite.made_up import GIVE_REAL_ONES, random_array, uncallable


def compute_dtypes(model: Any) -> set[str]:
    """The names of the dtypes that the model's layers compute in."""
    return shared.compute_dtypes(model, keras)


def random_inputs(model: Any, seed: int = 0) -> Any:
    """Random inputs in the structure in which the model takes them.

    Raises:
        RewriteError: the model takes text, or it is not known what it takes.
    """
    rng = np.random.default_rng(seed)
    made = shared.made_for(model, keras)

    def made_up(spec: Any) -> Any:
        if getattr(spec, "sparse", False):
            raise RewriteError(f"cannot make up inputs that are not dense. {GIVE_REAL_ONES}")
        array = random_array(tuple(spec.shape), str(spec.dtype), rng, made)
        return keras.ops.convert_to_tensor(array, spec.dtype)

    return keras.tree.map_structure(made_up, _taken_by(model))


def _taken_by(model: Any) -> Any:
    """What a model takes, as Keras tensors."""
    if KERAS_3.is_visible(model):
        return functional_of(model)._inputs_struct
    shapes = (model.get_build_config() or {}).get("input_shape")
    if shapes is None:
        raise RewriteError(
            f"no inputs can be made up for '{model.name}', whose arguments are several or not "
            f"known. {GIVE_REAL_ONES}"
        )
    if any(isinstance(layer, keras.layers.Embedding) for layer in parts(model)):
        raise RewriteError(
            f"no inputs can be made up for '{model.name}', which looks something up but does not "
            f"say of what dtype its inputs are. {GIVE_REAL_ONES}"
        )
    return keras.tree.map_shape_structure(
        lambda shape: keras.KerasTensor(shape, dtype=model.input_dtype), shapes
    )


def outputs_of(model: Any, inputs: Any, who: str = "the model") -> list[np.ndarray]:
    """All outputs of a model at inference as a flat list; the model stays as it is.

    Raises:
        RewriteError: the model cannot be called with these inputs.
    """
    # A BatchNormalization called with training=True moves its statistics even here.
    states = [state for layer in parts(model) for state in KERAS_3.states(layer)]
    variables = [*model.non_trainable_weights, *states]
    before = [(variable, variable.numpy()) for variable in variables]
    try:
        return _called(lambda data: model(data, training=False), inputs, who)
    finally:
        for variable, value in before:
            variable.assign(value)


def _called(function: Any, inputs: Any, who: str) -> list[np.ndarray]:
    if keras.backend.backend() == "tensorflow":
        from mbn_rewrite.running import called  # which knows what only XLA can do

        return called(function, inputs, who)
    try:
        outputs = keras.tree.flatten(function(inputs))
    except Exception as error:
        raise uncallable(who, error) from error
    return [keras.ops.convert_to_numpy(output) for output in outputs]

"""Calls models of Keras 3, on any backend: with made-up inputs, and without changing them."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from mbn_rewrite.errors import RewriteError
from mbn_rewrite.running import GIVE_REAL_ONES, Made, random_tensor, uncallable


def compute_dtypes(model: Any) -> set[str]:
    """The names of the dtypes that the model's layers compute in."""
    return {
        layer.compute_dtype
        for layer in model._flatten_layers(include_self=False, recursive=True)
        if not isinstance(layer, (keras.Model, keras.layers.InputLayer))
    }


def random_inputs(model: Any, seed: int = 0) -> Any:
    """Random inputs in the structure in which the model takes them, as numpy arrays.

    Raises:
        RewriteError: the model takes text, or tensors that are not dense, or it is not known
            what it takes.
    """
    functional = model._functional if isinstance(model, keras.Sequential) else model
    rng = np.random.default_rng(seed)
    layers = list(model._flatten_layers(include_self=False, recursive=True))
    made = Made(
        # What a model scales down first are the pixels of images.
        top=255.0 if any(isinstance(x, keras.layers.Rescaling) for x in layers) else None,
        words=min(
            (x.input_dim for x in layers if isinstance(x, keras.layers.Embedding)), default=2
        ),
    )
    specs = getattr(functional, "_inputs_struct", None)
    if specs is None:
        specs = _specs_of_built(model)
    return keras.tree.map_structure(lambda t: _random(t, rng, made), specs)


def _specs_of_built(model: Any) -> Any:
    """What a subclassed model takes, from the shape that it was built for."""
    config = model.get_build_config() or {}
    shape = config.get("input_shape")
    flat = isinstance(shape, (list, tuple)) and all(
        size is None or isinstance(size, int) for size in shape
    )
    if not flat or not shape:
        raise RewriteError(
            f"no inputs can be made up for '{model.name}', whose arguments are not known. "
            f"{GIVE_REAL_ONES}"
        )
    return keras.KerasTensor(tuple(shape), dtype=model.input_dtype)


def _random(tensor: Any, rng: np.random.Generator, made: Made) -> np.ndarray:
    if tensor.sparse or getattr(tensor, "ragged", False):
        raise RewriteError(f"cannot make up inputs that are not dense. {GIVE_REAL_ONES}")
    return np.asarray(random_tensor(tf.TensorSpec(tensor.shape, tensor.dtype), rng, made))


def outputs_of(model: Any, inputs: Any, who: str = "the model") -> list[np.ndarray]:
    """All outputs of a model at inference as a flat list; the model stays as it is.

    Raises:
        RewriteError: the model cannot be called with these inputs.
    """
    # A BatchNormalization called with training=True moves its statistics even here.
    variables = [v for v in model.variables if not v.trainable]
    before = [np.array(keras.ops.convert_to_numpy(v.value)) for v in variables]
    try:
        outputs = keras.tree.flatten(model(inputs, training=False))
        return [np.asarray(keras.ops.convert_to_numpy(t)) for t in outputs if t is not None]
    except Exception as error:
        raise uncallable(who, error) from error
    finally:
        for variable, value in zip(variables, before, strict=True):
            variable.assign(value)

"""Calls tf_keras models: with made-up inputs, and without changing them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras

from mbn_rewrite.errors import RewriteError, cause_of

# What stands for a size that the model leaves open.
_OPEN_SIZE = 64
_BATCH = 4


def compute_dtypes(model: Any) -> set[str]:
    """The names of the dtypes that the model's layers compute in."""
    return {
        layer.compute_dtype
        for layer in model._flatten_layers(include_self=False, recursive=True)
        if not isinstance(layer, (tf_keras.Model, tf_keras.layers.InputLayer))
    }


def random_inputs(model: Any, seed: int = 0) -> Any:
    """Random inputs in the structure in which the model takes them.

    Raises:
        RewriteError: the model takes text, or tensors that are not dense.
    """
    if getattr(model, "_is_graph_network", False):
        specs = model._nested_inputs
    else:
        spec = model.save_spec(dynamic_batch=False)
        if spec is None or len(spec[0]) != 1:
            raise RewriteError(
                f"no inputs can be made up for '{model.name}', whose arguments are "
                f"{'not known' if spec is None else 'several'}. Give real ones (inputs=... in "
                "Python, --verify_inputs on the command line)"
            )
        specs = spec[0][0]
    rng = np.random.default_rng(seed)
    layers = list(model._flatten_layers(include_self=False, recursive=True))
    # What a model scales down first are the pixels of images.
    top = 255.0 if any(isinstance(x, tf_keras.layers.Rescaling) for x in layers) else None
    words = min(
        (x.input_dim for x in layers if isinstance(x, tf_keras.layers.Embedding)), default=2
    )
    return tf.nest.map_structure(lambda spec: _random_tensor(spec, rng, top, words), specs)


def _random_tensor(spec: Any, rng: np.random.Generator, top: float | None, words: int) -> Any:
    dtype = tf.as_dtype(spec.dtype)
    kind = getattr(spec, "type_spec", spec)
    dense = not isinstance(kind, (tf.SparseTensorSpec, tf.RaggedTensorSpec))
    if not dense or not (dtype.is_floating or dtype.is_integer or dtype.is_bool):
        raise RewriteError(
            f"cannot make up inputs of dtype {dtype.name}{'' if dense else ', not dense'}. Give "
            "real ones (inputs=... in Python, --verify_inputs on the command line)"
        )
    shape = [
        (_BATCH if i == 0 else _OPEN_SIZE) if size is None else size
        for i, size in enumerate(spec.shape.as_list())
    ]
    if not dtype.is_floating:
        return tf.cast(rng.integers(0, 2 if dtype.is_bool else words, shape), dtype)
    values = rng.standard_normal(shape) if top is None else rng.uniform(0, top, shape)
    return tf.cast(values, dtype)


def outputs_of(model: Any, inputs: Any, who: str = "the model") -> list[np.ndarray]:
    """All outputs of a model at inference as a flat list; the model stays as it is.

    Raises:
        RewriteError: the model cannot be called with these inputs.
    """
    # A BatchNormalization called with training=True moves its statistics even here. Values
    # read share memory with their variables until one of the two changes.
    variables = [*model.non_trainable_weights, *_states(model)]
    before = [(variable, variable.read_value()) for variable in variables]
    try:
        return called(lambda data: model(data, training=False), inputs, who)
    finally:
        for variable, value in before:
            variable.assign(value)


def called(function: Callable[[Any], Any], inputs: Any, who: str) -> list[np.ndarray]:
    """What a function of tensors gives, as a flat list.

    TensorFlow's own kernels take channels-first layouts on GPUs only; XLA takes them
    everywhere, so it is tried where they fail.

    Raises:
        RewriteError: the function cannot be called with these inputs.
    """
    try:
        try:
            outputs = function(inputs)
        except (tf.errors.UnimplementedError, tf.errors.InvalidArgumentError):
            if tf.config.list_physical_devices("GPU"):
                raise
            outputs = tf.function(function, jit_compile=True, autograph=False)(inputs)
    except Exception as error:
        raise RewriteError(
            f"{who} cannot be called with these inputs: {cause_of(error)} Give inputs that it "
            "takes (inputs=... in Python, --verify_inputs on the command line)"
        ) from error
    return [np.asarray(output) for output in tf.nest.flatten(outputs, expand_composites=True)]


def _states(model: Any) -> list[tf.Variable]:
    """The states that stateful recurrent layers keep from call to call."""
    layers = model._flatten_layers(include_self=False, recursive=True)
    states = [x.states for x in layers if getattr(x, "stateful", False) and hasattr(x, "states")]
    return [state for state in tf.nest.flatten(states) if isinstance(state, tf.Variable)]

"""Calls tf_keras models: with made-up inputs, and without changing them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras

from mbn_rewrite.comparison import Comparison
from mbn_rewrite.errors import RewriteError
from mbn_rewrite.frontends.execution import called, random_tensor, runner
from mbn_rewrite.frontends.keras_common import execution as shared
from mbn_rewrite.frontends.sample_inputs import GIVE_REAL_ONES, InputRecipe, of_batch, with_batch
from mbn_rewrite.frontends.saved_model.closer_look import look_closer_at_calls
from mbn_rewrite.options import RunConfig


def compute_dtypes(model: Any) -> set[str]:
    """The names of the dtypes that the model's layers compute in."""
    return shared.compute_dtypes(model, tf_keras)


def recipe_for(model: Any, batch: int | None = None) -> InputRecipe:
    """How inputs for a model are made up."""
    return shared.recipe_for(model, tf_keras, batch)


def random_inputs(model: Any, seed: int = 0, recipe: InputRecipe | None = None) -> Any:
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
                f"{'not known' if spec is None else 'several'}. {GIVE_REAL_ONES}"
            )
        specs = spec[0][0]
    rng = np.random.default_rng(seed)
    shapes = [tuple(s.shape) for s in tf.nest.flatten(specs) if s.shape.rank]
    recipe = with_batch(recipe or recipe_for(model), shapes)
    return tf.nest.map_structure(lambda spec: random_tensor(spec, rng, recipe), specs)


def outputs_of(model: Any, inputs: Any, who: str = "the model") -> list[np.ndarray]:
    """All outputs of a model at inference as a flat list; the model stays as it is.

    Raises:
        RewriteError: the model cannot be called with these inputs.
    """
    with _undisturbed(model):
        return called(lambda data: model(data, training=False), inputs, who)


def inputs_of_batch(model: Any, inputs: Any, batch: int) -> Any:
    """Inputs with so many examples: made up, or of those that are given."""
    if inputs is None:
        return random_inputs(model, recipe=recipe_for(model, batch))
    size = batch if shared.takes_any_batch(model) else None

    def cut(array: Any) -> Any:
        if isinstance(array, (tf.RaggedTensor, tf.SparseTensor)):
            return array  # as it is given
        return tf.constant(of_batch(array, size))

    return tf.nest.map_structure(cut, inputs)


@contextmanager
def running(model: Any, inputs: Any, run_config: RunConfig) -> Iterator[Callable[[], object]]:
    """Gives a function that runs the model; the model stays as it is."""
    with _undisturbed(model):
        yield runner(lambda data: model(data, training=False), inputs, run_config)


def closer_look(
    model: Any, new: Any, inputs: Any, plain: Comparison, rounding: bool
) -> Comparison | None:
    """See `protocols.FrontEnd`."""
    calls = [lambda data, each=each: each(data, training=False) for each in (model, new)]
    return look_closer_at_calls(calls[0], calls[1], inputs, plain, rounding)


@contextmanager
def _undisturbed(model: Any) -> Iterator[None]:
    """In which a model may be called without lasting effect."""
    # A BatchNormalization called with training=True moves its statistics even at inference.
    # Values read share memory with their variables until one of the two changes.
    variables = [*model.non_trainable_weights, *_states(model)]
    before = [(variable, variable.read_value()) for variable in variables]
    try:
        yield
    finally:
        for variable, value in before:
            variable.assign(value)


def _states(model: Any) -> list[tf.Variable]:
    """The states that stateful recurrent layers keep from call to call."""
    layers = model._flatten_layers(include_self=False, recursive=True)
    states = [x.states for x in layers if getattr(x, "stateful", False) and hasattr(x, "states")]
    return [state for state in tf.nest.flatten(states) if isinstance(state, tf.Variable)]

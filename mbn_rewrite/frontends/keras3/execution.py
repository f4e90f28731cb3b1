"""Calls Keras 3 models: with made-up inputs, and without changing them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np

from mbn_rewrite.comparison import Comparison
from mbn_rewrite.device import processor
from mbn_rewrite.errors import RewriteError
from mbn_rewrite.frontends.keras3.adapter import KERAS_3, functional_of
from mbn_rewrite.frontends.keras_common import execution as shared
from mbn_rewrite.frontends.keras_common.cloning import parts
from mbn_rewrite.frontends.sample_inputs import (
    GIVE_REAL_ONES,
    InputRecipe,
    of_batch,
    random_array,
    uncallable,
    with_batch,
)
from mbn_rewrite.options import RunConfig


def compute_dtypes(model: Any) -> set[str]:
    """The names of the dtypes that the model's layers compute in."""
    return shared.compute_dtypes(model, keras)


def recipe_for(model: Any, batch: int | None = None) -> InputRecipe:
    """How inputs for a model are made up."""
    return shared.recipe_for(model, keras, batch)


def random_inputs(model: Any, seed: int = 0, recipe: InputRecipe | None = None) -> Any:
    """Random inputs in the structure in which the model takes them.

    Raises:
        RewriteError: the model takes text, or it is not known what it takes.
    """
    rng = np.random.default_rng(seed)
    taken = _taken_by(model)
    way = with_batch(
        recipe or recipe_for(model), [tuple(s.shape) for s in keras.tree.flatten(taken) if s.shape]
    )

    def made_up(spec: Any) -> Any:
        if getattr(spec, "sparse", False):
            raise RewriteError(f"cannot make up inputs that are not dense. {GIVE_REAL_ONES}")
        array = random_array(tuple(spec.shape), str(spec.dtype), rng, way)
        return keras.ops.convert_to_tensor(array, spec.dtype)

    return keras.tree.map_structure(made_up, taken)


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
    with _undisturbed(model):
        return _called(lambda data: model(data, training=False), inputs, who)


def inputs_of_batch(model: Any, inputs: Any, batch: int) -> Any:
    """Inputs with so many examples: made up, or of those that are given."""
    if inputs is None:
        return random_inputs(model, recipe=recipe_for(model, batch))
    size = batch if shared.takes_any_batch(model) else None
    return keras.tree.map_structure(
        lambda array: keras.ops.convert_to_tensor(
            of_batch(keras.ops.convert_to_numpy(array), size)
        ),
        inputs,
    )


@contextmanager
def running(model: Any, inputs: Any, run_config: RunConfig) -> Iterator[Callable[[], object]]:
    """Gives a function that runs the model; the model stays as it is."""
    with _undisturbed(model):
        if _on_tensorflow():
            from mbn_rewrite.frontends.execution import runner

            yield runner(lambda data: model(data, training=False), inputs, run_config)
        else:
            yield lambda: _called(lambda data: model(data, training=False), inputs, "it")


def closer_look(
    model: Any, new: Any, inputs: Any, plain: Comparison, rounding: bool
) -> Comparison | None:
    """See `protocols.FrontEnd`. Only TensorFlow has graphs to look into."""
    if not _on_tensorflow():
        return None
    from mbn_rewrite.frontends.saved_model.closer_look import look_closer_at_calls

    calls = [lambda data, each=each: each(data, training=False) for each in (model, new)]
    return look_closer_at_calls(calls[0], calls[1], inputs, plain, rounding)


@contextmanager
def set_up(run_config: RunConfig) -> Iterator[None]:
    """In which models run in this way.

    Raises:
        RewriteError: this machine, or the backend, has no such way.
    """
    if _on_tensorflow():
        from mbn_rewrite.frontends import execution

        with execution.set_up(run_config):
            yield
        return
    if run_config.jit_compile or run_config.dtype:
        raise RewriteError(
            f"Keras runs on {keras.backend.backend()}, where models are measured as they are "
            "called. Give neither jit_compile nor dtype, or set KERAS_BACKEND=tensorflow"
        )
    yield


def device() -> str:
    """What models run on."""
    if _on_tensorflow():
        from mbn_rewrite.frontends import execution

        return execution.device()
    return f"{processor()}, Keras on {keras.backend.backend()}"


def _on_tensorflow() -> bool:
    return bool(keras.backend.backend() == "tensorflow")


@contextmanager
def _undisturbed(model: Any) -> Iterator[None]:
    """In which a model may be called without lasting effect."""
    # A BatchNormalization called with training=True moves its statistics even at inference.
    states = [state for layer in parts(model) for state in KERAS_3.states(layer)]
    variables = [*model.non_trainable_weights, *states]
    before = [(variable, variable.numpy()) for variable in variables]
    try:
        yield
    finally:
        for variable, value in before:
            if not np.array_equal(variable.numpy(), value):  # to assign takes longer
                variable.assign(value)


def _called(function: Any, inputs: Any, who: str) -> list[np.ndarray]:
    if _on_tensorflow():
        from mbn_rewrite.frontends.execution import called  # which knows what only XLA can do

        return called(function, inputs, who)
    try:
        outputs = keras.tree.flatten(function(inputs))
    except Exception as error:
        raise uncallable(who, error) from error
    return [keras.ops.convert_to_numpy(output) for output in outputs]

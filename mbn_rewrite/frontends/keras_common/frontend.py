"""Front end for models of one Keras in memory, as far as the Kerases have it in common."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from mbn_rewrite.errors import CopyError
from mbn_rewrite.frontends.keras_common import compile_state, reader
from mbn_rewrite.frontends.keras_common.adapter import KerasAdapter
from mbn_rewrite.frontends.keras_common.cloning import parts
from mbn_rewrite.frontends.keras_common.custom_models import leaves
from mbn_rewrite.frontends.keras_common.reader import Reading
from mbn_rewrite.frontends.keras_common.writer import Writer
from mbn_rewrite.frontends.sample_inputs import InputRecipe, is_open, with_batch
from mbn_rewrite.options import RunConfig
from mbn_rewrite.plans import Plan

if TYPE_CHECKING:
    from mbn_rewrite.comparison import Comparison


class KerasFrontEnd(ABC):
    """Front end for models of one Keras; see `protocols.FrontEnd`.

    Models run on TensorFlow here. It is imported where it is needed, since Keras 3 may do without.

    Args:
        keras: the adapter of the Keras.
        writer: its class of writers.
    """

    def __init__(self, keras: KerasAdapter, writer: type[Writer]) -> None:
        self._keras = keras
        self._writer = writer

    def read(self, model: Any, leaves_code: bool = False) -> Reading:
        with self._with_way_around():
            return reader.read(model, self._keras, leaves_code)

    def write(self, model: Any, reading: Reading, plan: Plan) -> Any:
        with self._with_way_around():
            return self._writer(self._keras, reading, plan).write(model)

    def check_compiled(self, model: Any) -> None:
        compile_state.check_compiled(model, self._keras)

    def compile_like(self, model: Any, new: Any) -> None:
        compile_state.compile_like(model, new, self._keras)

    @contextmanager
    def _with_way_around(self) -> Iterator[None]:
        """Context manager that says what to do where a layer cannot be copied."""
        try:
            yield
        except CopyError as error:
            raise CopyError(f"{error}. {self._keras.way_around}") from error

    # -- inputs ----------------------------------------------------------------------------

    @abstractmethod
    def _input_specs(self, model: Any) -> Any:
        """Specifications of a model's inputs, in the structure in which it takes them.

        Raises:
            RewriteError: they are not known.
        """

    @abstractmethod
    def _random_tensor(self, spec: Any, rng: np.random.Generator, recipe: InputRecipe) -> Any:
        """A random tensor that meets a specification.

        Raises:
            RewriteError: it cannot be made up.
        """

    @abstractmethod
    def _resized(self, array: Any, batch: int | None) -> Any:
        """An input of the caller's as a tensor with this many examples, if not None."""

    def recipe_for(self, model: Any, batch: int | None = None) -> InputRecipe:
        layers, kinds = parts(model), self._keras.layers
        embeddings = [layer for layer in layers if isinstance(layer, kinds.Embedding)]
        masking = [layer for layer in layers if isinstance(layer, kinds.Masking)]
        # A model that rescales its input first is given the pixels of images.
        pixels = any(isinstance(layer, kinds.Rescaling) for layer in layers)
        return InputRecipe(
            top=255.0 if pixels else None,
            words=min((layer.input_dim for layer in embeddings), default=2),
            batch=batch,
            padding=float(masking[0].mask_value) if masking else None,
            pad_id=0 if any(layer.mask_zero for layer in embeddings) else None,
            largest=max(map(_largest_output, layers), default=0),
        )

    def random_inputs(self, model: Any, seed: int = 0, recipe: InputRecipe | None = None) -> Any:
        specs = self._input_specs(model)
        shapes = [self._keras.shape_of(spec) for spec in self._keras.flatten(specs)]
        recipe = with_batch(recipe or self.recipe_for(model), [shape for shape in shapes if shape])
        rng = np.random.default_rng(seed)
        return self._keras.map_structure(lambda spec: self._random_tensor(spec, rng, recipe), specs)

    def inputs_of_batch(self, model: Any, inputs: Any, batch: int) -> Any:
        if inputs is None:
            return self.random_inputs(model, recipe=self.recipe_for(model, batch))
        any_batch = all(is_open(tensor.shape) for tensor in getattr(model, "inputs", None) or ())
        size = batch if any_batch else None
        return self._keras.map_structure(lambda array: self._resized(array, size), inputs)

    # -- running ---------------------------------------------------------------------------

    @abstractmethod
    def _value(self, variable: Any) -> Any:
        """Value of a variable, to be restored later."""

    @abstractmethod
    def _restore(self, variable: Any, value: Any) -> None:
        """Sets a variable to the value that it had."""

    def compute_dtypes(self, model: Any) -> set[str]:
        no_layers = (self._keras.model, self._keras.layers.InputLayer)
        layers = [layer for layer in parts(model) if not isinstance(layer, no_layers)]
        # TensorFlow resizes images in float32 whatever their dtype, except by nearest neighbours.
        resizes = any(getattr(layer, "interpolation", "nearest") != "nearest" for layer in layers)
        return {layer.compute_dtype for layer in layers} | ({"float32"} if resizes else set())

    def outputs_of(self, model: Any, inputs: Any, who: str = "the model") -> list[np.ndarray]:
        with self._undisturbed(model):
            return self._called(_inference(model), inputs, who)

    @contextmanager
    def running(
        self, model: Any, inputs: Any, run_config: RunConfig
    ) -> Iterator[Callable[[], object]]:
        with self._undisturbed(model):
            yield self._runner(_inference(model), inputs, run_config)

    def closer_look(
        self, model: Any, new: Any, inputs: Any, plain: Comparison, rounding: bool
    ) -> Comparison | None:
        from mbn_rewrite.frontends.saved_model.closer_look import look_closer_at_calls

        return look_closer_at_calls(_inference(model), _inference(new), inputs, plain, rounding)

    def set_up(self, run_config: RunConfig) -> AbstractContextManager[None]:
        from mbn_rewrite.frontends import execution

        return execution.set_up(run_config)

    def device(self) -> str:
        from mbn_rewrite.frontends import execution

        return execution.device()

    def _called(self, function: Callable[[Any], Any], inputs: Any, who: str) -> list[np.ndarray]:
        from mbn_rewrite.frontends import execution

        return execution.called(function, inputs, who)

    def _runner(
        self, function: Callable[[Any], Any], inputs: Any, run_config: RunConfig
    ) -> Callable[[], object]:
        from mbn_rewrite.frontends import execution

        return execution.runner(function, inputs, run_config)

    @contextmanager
    def _undisturbed(self, model: Any) -> Iterator[None]:
        """Context manager in which a model may be called without lasting effect."""
        # A BatchNormalization called with training=True updates its statistics even at inference.
        states = [state for layer in parts(model) for state in self._keras.states(layer)]
        variables = filter(self._keras.is_variable, [*model.non_trainable_weights, *states])
        before = [(variable, self._value(variable)) for variable in variables]
        try:
            yield
        finally:
            for variable, value in before:
                self._restore(variable, value)


def _inference(model: Any) -> Callable[[Any], Any]:
    return lambda data: model(data, training=False)


def _largest_output(layer: Any) -> int:
    """Size of a layer's largest known output for one example, in numbers."""
    nodes = getattr(layer, "_inbound_nodes", ())
    shapes = [tensor.shape for node in nodes for tensor in leaves(node.output_tensors)]
    known = [shape for shape in shapes if getattr(shape, "rank", 0) is not None]
    # An open dimension counts as 1, which makes this a lower bound.
    return max((math.prod(size or 1 for size in shape) for shape in known), default=0)

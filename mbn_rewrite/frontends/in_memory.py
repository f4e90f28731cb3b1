"""Keras models in memory, opened for rewriting."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np

from mbn_rewrite.frontends.protocols import FrontEnd, Run
from mbn_rewrite.frontends.sample_inputs import InputRecipe, at_open_sizes, tried
from mbn_rewrite.ir.graph import Graph
from mbn_rewrite.options import Options, RunConfig
from mbn_rewrite.plans import Plan


class ModelInMemory:
    """See `protocols.OpenModel`.

    Args:
        front_end: the front end for the model.
        model: the model, which is not changed.
        leaves_code: whether what code of its layers calls stays as it is.
    """

    def __init__(self, front_end: FrontEnd, model: Any, leaves_code: bool = False) -> None:
        self.front_end = front_end
        self.model = model
        self._reading = front_end.read(model, leaves_code)
        self._written: list[tuple[Plan, Any]] = []
        self._inputs: Any = None

    @cached_property
    def graph(self) -> Graph:
        return self._reading.graph

    @cached_property
    def notes(self) -> tuple[str, ...]:
        return tuple(self._reading.notes)

    def set_up(self, run_config: RunConfig) -> AbstractContextManager[None]:
        return self.front_end.set_up(run_config)

    def device(self) -> str:
        return self.front_end.device()

    def running(self, plan: Plan | None, options: Options) -> AbstractContextManager[Run]:
        run_config = options.run_config
        model = self.model
        if plan is not None:
            model = self.front_end.write(self.model, self._reading, plan)
            self._written.append((plan, model))
        if self._inputs is None:  # the same for all forms
            self._inputs = self.front_end.inputs_of_batch(
                self.model, options.inputs, run_config.batch_size
            )
        return self.front_end.running(model, self._inputs, run_config)

    def keep_only(self, plan: Plan | None) -> None:
        # What was measured is added to a plan; its actions stay the same object.
        kept = plan and plan.actions
        self._written = [(tried, new) for tried, new in self._written if tried.actions is kept]
        self._inputs = None

    def write(self, plan: Plan) -> Any:
        """A copy of the model with a plan carried out: the one that was run, if there is one."""
        self.keep_only(plan)
        new = next((new for _, new in self._written), None)
        self.keep_only(None)
        return self.front_end.write(self.model, self._reading, plan) if new is None else new


def outputs_of_original(
    front_end: FrontEnd, model: Any, inputs: Any = None, seed: int = 0, pictures: int = 2
) -> tuple[Any, list[np.ndarray]]:
    """Inputs for a model, made up unless they are given, and all of its outputs for them.

    Made-up inputs contain rare values, unless the model gives NaN for those; see
    `sample_inputs.MANNERS`.

    Args:
        front_end, model, inputs, seed: as for `verify`.
        pictures: how many examples are made up where one is as large as a picture.

    Raises:
        RewriteError: inputs cannot be made up, or the model cannot be called with them.
    """
    if inputs is not None:
        return inputs, front_end.outputs_of(model, inputs, "the original")

    def call(recipe: InputRecipe) -> tuple[Any, list[np.ndarray]]:
        inputs = front_end.random_inputs(model, seed, recipe)
        return inputs, front_end.outputs_of(model, inputs, "the original")

    recipe = replace(front_end.recipe_for(model), pictures=pictures)
    shapes = [tuple(tensor.shape) for tensor in getattr(model, "inputs", None) or ()]
    return tried(at_open_sizes(recipe, shapes), call, lambda found: found[1])

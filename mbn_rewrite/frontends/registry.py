"""Finds the front end for a model.

A front end knows one kind of model. It reads it, writes it, and runs it; it decides nothing.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from mbn_rewrite.errors import RewriteError
from mbn_rewrite.frontends.sample_inputs import Made
from mbn_rewrite.ir.graph import Graph
from mbn_rewrite.plans import Plan
from mbn_rewrite.tuning.timing import RunConfig

if TYPE_CHECKING:  # which imports this module
    from mbn_rewrite.verification import Comparison


class Reading(Protocol):
    """A model as its front end has read it."""

    @property
    def graph(self) -> Graph:
        """What the planner sees of it."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know of any copy of it, in sentences."""


class FrontEnd(Protocol):
    """What every front end can do."""

    def read(self, model: Any) -> Any:
        """A `Reading` of a model."""

    def write(self, model: Any, reading: Any, plan: Plan) -> Any:
        """A copy of the model with the plan carried out."""

    def made_for(self, model: Any, batch: int | None = None) -> Made:
        """How inputs that suit the model are made up."""

    def random_inputs(self, model: Any, seed: int = 0, made: Made | None = None) -> Any:
        """Inputs of the model's shapes and dtypes, in the structure that it takes.

        RewriteError: they cannot be made up.
        """

    def inputs_of_batch(self, model: Any, inputs: Any, batch: int) -> Any:
        """Inputs with so many examples: made up, or of those that are given."""

    def running(
        self, model: Any, inputs: Any, run_config: RunConfig
    ) -> AbstractContextManager[Any]:
        """Gives a function that runs the model to the end; the model stays as it is."""

    def set_up(self, run_config: RunConfig) -> AbstractContextManager[None]:
        """In which models are run in this way."""

    def device(self) -> str:
        """What models run on."""

    def outputs_of(self, model: Any, inputs: Any, who: str) -> list[np.ndarray]:
        """All outputs at inference; the model stays as it is. `who` is for errors."""

    def closer_look(
        self, model: Any, new: Any, inputs: Any, plain: Comparison, rounding: bool
    ) -> Comparison | None:
        """Whether rounding explains how outputs differ; None where that cannot be seen.

        `plain` says how they differ, and `rounding` whether a narrow dtype may explain more
        than its tolerance.
        """

    def compute_dtypes(self, model: Any) -> set[str]:
        """The names of the dtypes that the model computes in."""


def front_end_of(model: Any) -> FrontEnd:
    """The front end for a model, chosen by where its class comes from.

    Raises:
        RewriteError: there is none for this kind of model, or it has not been built.
    """
    if isinstance(model, (str, os.PathLike)):
        raise RewriteError(
            f"a model is needed, not the path {os.fspath(model)!r}. Load it first with "
            "load_model of tf_keras or keras, or use rewrite_saved_model or the command "
            "mbn-rewrite, which take paths"
        )
    packages = {cls.__module__.partition(".")[0] for cls in type(model).__mro__}
    if "tf_keras" in packages:
        import tf_keras

        _check_model(model, tf_keras.Model, "tf_keras")
        from mbn_rewrite.frontends.tf_keras import frontend as tf_keras_entry

        return tf_keras_entry
    if "keras" in packages:
        import keras

        _check_model(model, keras.Model, "keras")
        from mbn_rewrite.frontends.keras3 import frontend as keras_entry

        return keras_entry
    raise RewriteError(
        f"a model of tf_keras or Keras 3 is needed, not {type(model).__name__}. "
        "Give a tf_keras.Model or keras.Model, Functional, Sequential or subclassed"
    )


def _check_model(model: Any, kind: Any, package: str) -> None:
    if not isinstance(model, kind):
        raise RewriteError(
            f"a model is needed, not the {type(model).__name__} '{getattr(model, 'name', model)}'. "
            f"Put layers in a {package}.Sequential with an input shape"
        )
    if not model.built or not (model.weights or model.inputs):
        raise RewriteError(
            f"{type(model).__name__} '{model.name}' has not been built, so it has no weights. "
            "Call it once on data, or give it an input shape"
        )

"""Finds the front end for a model.

A front end knows one kind of model. It reads it, writes it, and runs it; it decides nothing.
"""

from __future__ import annotations

import importlib
import os
from typing import Any, Protocol

import numpy as np

from mbn_rewrite.decisions import Plan
from mbn_rewrite.errors import RewriteError
from mbn_rewrite.graph import Graph


class Reading(Protocol):
    """A model as its front end has read it."""

    @property
    def graph(self) -> Graph:
        """What the planner sees of it."""


class FrontEnd(Protocol):
    """What every front end can do."""

    def read(self, model: Any) -> Any:
        """A `Reading` of a model."""

    def write(self, model: Any, reading: Any, plan: Plan) -> Any:
        """A copy of the model with the plan carried out."""

    def random_inputs(self, model: Any, seed: int) -> Any:
        """Inputs of the model's shapes and dtypes, in the structure that it takes."""

    def outputs_of(self, model: Any, inputs: Any, who: str) -> list[np.ndarray]:
        """All outputs at inference; the model stays as it is. `who` is for errors."""

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
            "tf_keras.models.load_model or keras.saving.load_model, or use rewrite_saved_model or "
            "tools/rewrite_savedmodel.py, which take paths"
        )
    packages = {cls.__module__.partition(".")[0] for cls in type(model).__mro__}
    if "tf_keras" in packages:
        return _checked(model, "tf_keras")
    if "keras" in packages:
        return _checked(model, "keras")
    raise RewriteError(
        f"a Keras model is needed, not {type(model).__name__}. "
        "Give a tf_keras.Model or a keras.Model, Functional, Sequential or subclassed"
    )


def _checked(model: Any, package: str) -> FrontEnd:
    """The front end for models of a package."""
    keras = importlib.import_module(package)
    if not isinstance(model, keras.Model):
        raise RewriteError(
            f"a model is needed, not the {type(model).__name__} '{getattr(model, 'name', model)}'. "
            f"Put layers in a {package}.Sequential with an input shape"
        )
    if not model.built or not (model.weights or getattr(model, "inputs", None)):
        raise RewriteError(
            f"{type(model).__name__} '{model.name}' has not been built, so it has no weights. "
            "Call it once on data, or give it an input shape"
        )
    entry: FrontEnd = importlib.import_module(f"mbn_rewrite.{package}_frontend.entry")
    return entry

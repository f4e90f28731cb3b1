"""Protocols of front ends: models in memory, models on disk, and what both have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from mbn_rewrite.frontends.sample_inputs import InputRecipe
from mbn_rewrite.ir.graph import Graph
from mbn_rewrite.options import Options, RunConfig
from mbn_rewrite.plans import Plan

if TYPE_CHECKING:
    from mbn_rewrite.comparison import Comparison
    from mbn_rewrite.frontends.footprint import Footprint
    from mbn_rewrite.frontends.reference_io import ReferenceIO

Run = Callable[[], object]  # runs a form of a model once, to the end


class Reading(Protocol):
    """A model as its front end has read it."""

    @property
    def graph(self) -> Graph:
        """The model as passes see it."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences that the user should know of any copy of it."""


class OpenModel(Reading, Protocol):
    """A model in memory or on disk that has been read and whose forms can be run."""

    def running(self, plan: Plan | None, options: Options) -> AbstractContextManager[Run]:
        """A function that runs the form of the model with a plan carried out.

        Args:
            plan: the plan; None stands for the model as it was.
            options: how to run it.

        Raises:
            RewriteError: it cannot be run like that.
        """

    def keep_only(self, plan: Plan | None) -> None:
        """Ends a measurement: lets go of all forms that were run but the one of a plan."""

    def set_up(self, run_config: RunConfig) -> AbstractContextManager[None]:
        """Context manager that has models run as configured."""

    def device(self) -> str:
        """Device name."""


class FrontEnd(Protocol):
    """Front end for models of one Keras in memory."""

    def read(self, model: Any, leaves_code: bool = False) -> Any:
        """A `Reading` of a model, in which what code calls may have to stay as it is."""

    def write(self, model: Any, reading: Any, plan: Plan) -> Any:
        """A copy of the model with the plan carried out."""

    def check_compiled(self, model: Any) -> None:
        """Raises RewriteError where a copy of a model cannot be compiled as the model is."""

    def compile_like(self, model: Any, new: Any) -> None:
        """Compiles a copy for training as the model is compiled, with its optimizer's state.

        Raises RewriteError where that cannot be done.
        """

    def recipe_for(self, model: Any, batch: int | None = None) -> InputRecipe:
        """The recipe for inputs that suit the model."""

    def random_inputs(self, model: Any, seed: int = 0, recipe: InputRecipe | None = None) -> Any:
        """Inputs of the model's shapes and dtypes, in the structure that it takes.

        Raises RewriteError where they cannot be made up.
        """

    def inputs_of_batch(self, model: Any, inputs: Any, batch: int) -> Any:
        """Inputs with this many examples: made up, or taken from those that are given."""

    def running(
        self, model: Any, inputs: Any, run_config: RunConfig
    ) -> AbstractContextManager[Run]:
        """A function that runs the model to the end; the model stays as it is."""

    def set_up(self, run_config: RunConfig) -> AbstractContextManager[None]:
        """Context manager that has models run as configured."""

    def device(self) -> str:
        """Device name."""

    def outputs_of(self, model: Any, inputs: Any, who: str) -> list[np.ndarray]:
        """All outputs at inference; the model stays as it is. `who` names it in errors."""

    def closer_look(
        self, model: Any, new: Any, inputs: Any, plain: Comparison, rounding: bool
    ) -> Comparison | None:
        """Comparison that tells whether rounding explains a difference; None if that is unknown.

        `plain` compares the outputs as they are; `rounding` says whether the rounding of a narrow
        dtype may explain more than the tolerance.
        """

    def compute_dtypes(self, model: Any) -> set[str]:
        """The names of the dtypes that the model computes in."""


class ModelSource(OpenModel, Protocol):
    """A model on disk, opened to be rewritten."""

    @property
    def footprint(self) -> Footprint:
        """The model's size."""

    @property
    def left_out(self) -> Mapping[str, str]:
        """The functions that are not carried over, and why."""

    @property
    def as_it_was(self) -> Mapping[str, str]:
        """The functions that are carried over as they were, and why."""

    @property
    def names(self) -> Sequence[str]:
        """The signatures and methods that are carried over."""

    @property
    def unverifiable(self) -> dict[str, str]:
        """The signatures and methods that are not to be run and compared, and why."""

    @property
    def dtypes(self) -> set[str]:
        """The names of the dtypes that it computes in."""

    def check_inputs(self, inputs: Mapping[str, np.ndarray]) -> None:
        """Raises RewriteError where no signature takes inputs of these names."""

    def inputs_to_measure(self, options: Options) -> dict[str, np.ndarray]:
        """The inputs, by name, that `running` calls the model with for these options.

        Raises:
            RewriteError: none can be made up, or it cannot be called again and again.
        """

    def reference_io(self, inputs: Mapping[str, np.ndarray] | None) -> dict[str, ReferenceIO]:
        """The outputs of its signatures, for these inputs or for made-up ones."""

    @property
    def opened_again(self) -> Callable[[Path], Any]:
        """A function that loads the original again, as a `loaded_model.Loaded`, for a closer look.

        It takes a path where nothing exists, which it may write to, and holds no part of the
        opened model.
        """

    def write(self, plan: Plan, directory: Path) -> int:
        """Writes the model with a plan carried out; returns how many weights it has.

        The opened model is not used after that.
        """

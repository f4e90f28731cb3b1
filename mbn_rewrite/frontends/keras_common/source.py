"""Model files of either Keras (.h5, .hdf5, .keras), to be rewritten as SavedModels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mbn_rewrite.errors import RewriteError
from mbn_rewrite.frontends.footprint import Footprint, bytes_on_disk
from mbn_rewrite.frontends.in_memory import ModelInMemory, outputs_of_original
from mbn_rewrite.frontends.keras_common import files
from mbn_rewrite.frontends.protocols import FrontEnd, Run
from mbn_rewrite.frontends.reference_io import ReferenceIO
from mbn_rewrite.ir.graph import Graph
from mbn_rewrite.options import Options, RunConfig
from mbn_rewrite.plans import Plan

SERVING = "serving_default"  # the signature that Keras makes


class KerasFile(ABC):
    """Model file of one Keras; see `protocols.ModelSource`.

    Args:
        source: the file.
        trusted: whether code in it may be run.
        keras: the package that wrote it.
        front_end: the front end for its models.
    """

    def __init__(self, source: Path, trusted: bool, keras: Any, front_end: FrontEnd) -> None:
        self._source = source
        self._trusted = trusted
        self._front_end = front_end
        self.model = files.load(source, trusted, keras)
        self._opened = ModelInMemory(front_end, self.model)
        self.left_out: Mapping[str, str] = {}
        self.as_it_was: Mapping[str, str] = {}
        self.unverifiable: dict[str, str] = {}
        self.names = [SERVING]

    @abstractmethod
    def save(self, model: Any, directory: Path) -> None:
        """Saves a model as a SavedModel."""

    @abstractmethod
    def by_name(self, structure: Any) -> dict[str, Any]:
        """Inputs in the model's structure, by the names that they have in its signature."""

    @abstractmethod
    def structured(self, inputs: Mapping[str, np.ndarray]) -> Any:
        """Inputs by name, in the structure in which the model takes them.

        Raises:
            RewriteError: they have other names, shapes or kinds than the model's.
        """

    @abstractmethod
    def output_names(self, count: int) -> list[str]:
        """Names of the outputs in the signature of the written model."""

    @property
    def footprint(self) -> Footprint:
        return Footprint(self.model.count_params(), bytes_on_disk(self._source))

    @property
    def dtypes(self) -> set[str]:
        return self._front_end.compute_dtypes(self.model)

    @property
    def graph(self) -> Graph:
        return self._opened.graph

    @property
    def notes(self) -> tuple[str, ...]:
        return self._opened.notes

    def set_up(self, run_config: RunConfig) -> AbstractContextManager[None]:
        return self._opened.set_up(run_config)

    def device(self) -> str:
        return self._opened.device()

    def running(self, plan: Plan | None, options: Options) -> AbstractContextManager[Run]:
        if options.inputs is not None:
            options = replace(options, inputs=self.structured(options.inputs))
        return self._opened.running(plan, options)

    def inputs_to_measure(self, options: Options) -> dict[str, np.ndarray]:
        given = None if options.inputs is None else self.structured(options.inputs)
        size = options.run_config.batch_size
        inputs = self._front_end.inputs_of_batch(self.model, given, size)
        return {name: np.asarray(tensor) for name, tensor in self.by_name(inputs).items()}

    def keep_only(self, plan: Plan | None) -> None:
        self._opened.keep_only(plan)

    def check_inputs(self, inputs: Mapping[str, np.ndarray]) -> None:
        self.structured(inputs)

    def reference_io(self, inputs: Mapping[str, np.ndarray] | None) -> dict[str, ReferenceIO]:
        if SERVING in self.unverifiable:
            return {}
        given = None if inputs is None else self.structured(inputs)
        structure, arrays = outputs_of_original(self._front_end, self.model, given)
        outputs = dict(zip(self.output_names(len(arrays)), arrays, strict=True))
        return {SERVING: ReferenceIO(self.by_name(structure), outputs)}

    @property
    def opened_again(self) -> Callable[[Path], Any]:
        opened, source, trusted = type(self), self._source, self._trusted

        def again(work: Path) -> Any:
            from mbn_rewrite.frontends.saved_model.loading import load

            file = opened(source, trusted)  # type: ignore[call-arg]
            file.save(file.model, work)
            return load(work)

        return again

    def write(self, plan: Plan, directory: Path) -> int:
        new = self._opened.write(plan)
        try:
            self.save(new, directory)
        except RewriteError:
            raise
        except Exception as error:
            raise files.saving_failed(error) from error
        return int(new.count_params())


def check_names(inputs: Mapping[str, np.ndarray], names: list[str]) -> None:
    """Raises RewriteError if inputs have other names than the model's."""
    if set(inputs) != set(names):
        raise RewriteError(
            f"the inputs are named {sorted(inputs)}; the model's are named {sorted(names)}"
        )


def lone(inputs: Mapping[str, np.ndarray]) -> np.ndarray:
    """The input of a model that takes exactly one, whatever its name."""
    if len(inputs) != 1:
        raise RewriteError(f"the model takes one input, not {len(inputs)}")
    return next(iter(inputs.values()))

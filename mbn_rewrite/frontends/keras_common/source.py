"""A file of a Keras (.h5, .hdf5, .keras), to be rewritten as SavedModel."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mbn_rewrite.errors import RewriteError
from mbn_rewrite.frontends.keras_common import files
from mbn_rewrite.frontends.registry import FrontEnd
from mbn_rewrite.frontends.source import Footprint, ReferenceIO, bytes_on_disk
from mbn_rewrite.plans import Plan
from mbn_rewrite.tuning.auto import Options, plan_in_memory
from mbn_rewrite.verification import outputs_of_original

SERVING = "serving_default"  # the signature that Keras makes


class KerasFile(ABC):
    """See `stored.ModelSource`.

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
        self._reading = front_end.read(self.model)
        self._plan: Plan | None = None
        self._new: Any = None  # the model with the plan carried out, if that was made already
        self.left_out: Mapping[str, str] = {}
        self.as_it_was: Mapping[str, str] = {}
        self.unverifiable: dict[str, str] = {}
        self.names = [SERVING]

    @abstractmethod
    def save(self, model: Any, directory: Path) -> None:
        """Writes a SavedModel."""

    @abstractmethod
    def by_name(self, structure: Any) -> dict[str, Any]:
        """Inputs in the structure that the model takes, by the names that its signature has."""

    @abstractmethod
    def structured(self, inputs: Mapping[str, np.ndarray]) -> Any:
        """Inputs by name in the structure that the model takes.

        Raises:
            RewriteError: they have other names, shapes or kinds than the model's.
        """

    @abstractmethod
    def output_names(self, count: int) -> list[str]:
        """The names that the signature of the written model has for its outputs."""

    @property
    def footprint(self) -> Footprint:
        return Footprint(self.model.count_params(), bytes_on_disk(self._source))

    @property
    def dtypes(self) -> set[str]:
        return self._front_end.compute_dtypes(self.model)

    def plan(self, mode: str, options: Options) -> Plan:
        if mode == "auto" and options.inputs is not None:
            options = replace(options, inputs=self.structured(options.inputs))
        self._plan, self._new = plan_in_memory(
            self._front_end, self.model, self._reading, mode, options=options
        )
        return self._plan

    def exchanges(self, inputs: Mapping[str, np.ndarray] | None) -> dict[str, ReferenceIO]:
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

    def write(self, directory: Path) -> int:
        assert self._plan is not None
        new = self._new
        if new is None:
            new = self._front_end.write(self.model, self._reading, self._plan)
        try:
            self.save(new, directory)
        except RewriteError:
            raise
        except Exception as error:
            raise files.saving_failed(error) from error
        return int(new.count_params())


def check_names(inputs: Mapping[str, np.ndarray], names: list[str]) -> None:
    """Raises RewriteError where inputs have other names than the model's."""
    if set(inputs) != set(names):
        raise RewriteError(
            f"the inputs are named {sorted(inputs)}; the model's are named {sorted(names)}"
        )


def lone(inputs: Mapping[str, np.ndarray]) -> np.ndarray:
    """The input of a model that takes one, whatever its name."""
    if len(inputs) != 1:
        raise RewriteError(f"the model takes one input, not {len(inputs)}")
    return next(iter(inputs.values()))

"""A file of tf_keras (.h5, .hdf5, .keras), to be rewritten as SavedModel."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from mbn_rewrite.decisions import Plan
from mbn_rewrite.errors import RewriteError
from mbn_rewrite.planner import make_plan
from mbn_rewrite.running import as_specified
from mbn_rewrite.stored import Exchange, Footprint, bytes_on_disk
from mbn_rewrite.tf_keras_frontend import files, reader, running, writer

SERVING = "serving_default"  # the one signature that Keras makes


class KerasFile:
    """See `stored.StoredModel`."""

    def __init__(self, source: Path, trusted: bool) -> None:
        self._source = source
        self._model = files.load(source, trusted)
        self._reading = reader.read(self._model)
        self._plan: Plan | None = None
        self.left_out: Mapping[str, str] = {}
        self.as_it_was: Mapping[str, str] = {}
        self.unverifiable: Mapping[str, str] = {}

    @property
    def footprint(self) -> Footprint:
        return Footprint(self._model.count_params(), bytes_on_disk(self._source))

    @property
    def dtypes(self) -> set[str]:
        return running.compute_dtypes(self._model)

    def plan(self, mode: str) -> Plan:
        self._plan = make_plan(self._reading.graph, mode)
        return self._plan

    def exchanges(self, inputs: Mapping[str, np.ndarray] | None) -> dict[str, Exchange]:
        model = self._model
        structure = running.random_inputs(model) if inputs is None else self._structured(inputs)
        arrays = running.outputs_of(model, structure, "the original")
        names = list(model.output_names or ())
        if len(names) != len(arrays):
            names = [f"output_{i}" for i in range(1, len(arrays) + 1)]
        flat = tf.nest.flatten(structure)
        given = dict(zip(self._input_names(structure), flat, strict=True))
        return {SERVING: Exchange(given, dict(zip(names, arrays, strict=True)))}

    def write(self, directory: Path) -> int:
        assert self._plan is not None
        new = writer.write(self._model, self._reading, self._plan)
        files.save(new, directory)
        return int(new.count_params())

    def _input_names(self, structure: Any) -> list[str]:
        if isinstance(structure, dict):
            return sorted(structure)
        return list(self._model.input_names or ["input"])

    def _structured(self, inputs: Mapping[str, np.ndarray]) -> Any:
        """Inputs by name in the structure that the model takes."""
        model = self._model
        if model.inputs is None:
            if len(inputs) != 1:
                raise RewriteError(f"the model takes one input, not {len(inputs)}")
            return tf.constant(next(iter(inputs.values())))
        structure = getattr(model, "_nested_inputs", model.inputs)
        names = sorted(structure) if isinstance(structure, dict) else list(model.input_names)
        if set(inputs) != set(names):
            raise RewriteError(
                f"the inputs are named {sorted(inputs)}; the model's are named {sorted(names)}"
            )
        tensors = [
            as_specified(name, inputs[name], spec)
            for name, spec in zip(names, tf.nest.flatten(structure), strict=True)
        ]
        return tf.nest.pack_sequence_as(structure, tensors)

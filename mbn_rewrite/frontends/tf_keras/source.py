"""Model files of tf_keras, to be rewritten as SavedModels."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras

from mbn_rewrite.frontends.execution import as_specified
from mbn_rewrite.frontends.keras_common.source import KerasFile, check_names, lone
from mbn_rewrite.frontends.tf_keras.frontend import TfKerasFrontEnd


class TfKerasFile(KerasFile):
    """See `protocols.ModelSource`."""

    def __init__(self, source: Path, trusted: bool) -> None:
        super().__init__(source, trusted, tf_keras, TfKerasFrontEnd())

    def save(self, model: Any, directory: Path) -> None:
        tf_keras.models.save_model(model, directory, save_format="tf", include_optimizer=False)

    def by_name(self, structure: Any) -> dict[str, Any]:
        if isinstance(structure, dict):
            names = sorted(structure)
        else:
            names = list(self.model.input_names or ["input"])
        return dict(zip(names, tf.nest.flatten(structure), strict=True))

    def structured(self, inputs: Mapping[str, np.ndarray]) -> Any:
        model = self.model
        if model.inputs is None:
            return tf.constant(lone(inputs))
        structure = getattr(model, "_nested_inputs", model.inputs)
        names = sorted(structure) if isinstance(structure, dict) else list(model.input_names)
        check_names(inputs, names)
        tensors = [
            as_specified(name, inputs[name], spec)
            for name, spec in zip(names, tf.nest.flatten(structure), strict=True)
        ]
        return tf.nest.pack_sequence_as(structure, tensors)

    def output_names(self, count: int) -> list[str]:
        names = list(self.model.output_names or ())
        return names if len(names) == count else [f"output_{i}" for i in range(1, count + 1)]

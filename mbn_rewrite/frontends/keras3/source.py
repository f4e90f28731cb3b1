"""Model files of Keras 3, to be rewritten as SavedModels, which takes its TensorFlow backend."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras.src.export.export_utils import get_input_signature

from mbn_rewrite.errors import RewriteError
from mbn_rewrite.frontends.execution import as_specified
from mbn_rewrite.frontends.keras3.adapter import KERAS_3, functional_of
from mbn_rewrite.frontends.keras3.frontend import Keras3FrontEnd
from mbn_rewrite.frontends.keras_common.source import KerasFile, check_names, lone


class Keras3File(KerasFile):
    """See `protocols.ModelSource`."""

    def __init__(self, source: Path, trusted: bool) -> None:
        if keras.backend.backend() != "tensorflow":
            raise RewriteError(
                f"Keras runs on {keras.backend.backend()}, and only its TensorFlow backend writes "
                "SavedModels. Set KERAS_BACKEND=tensorflow"
            )
        super().__init__(source, trusted, keras, Keras3FrontEnd())

    def save(self, model: Any, directory: Path) -> None:
        # As `model.export` does, which stores each variable twice: once as a variable of Keras's,
        # and once as the variable of TensorFlow's that it wraps and that the graph reads.
        archive = keras.export.ExportArchive()
        archive.track_and_add_endpoint("serve", model, get_input_signature(model))
        tracked = archive._tf_trackable
        for name in ("variables", "trainable_variables", "non_trainable_variables"):
            setattr(tracked, name, [variable.value for variable in getattr(tracked, name)])
        archive.write_out(directory, verbose=False)

    def by_name(self, structure: Any) -> dict[str, Any]:
        tensors = keras.tree.flatten(structure)
        return dict(zip(self._input_names() or ["input"], tensors, strict=True))

    def structured(self, inputs: Mapping[str, np.ndarray]) -> Any:
        names = self._input_names()
        if not names:
            return tf.constant(lone(inputs))
        check_names(inputs, names)
        functional = functional_of(self.model)
        tensors = [
            as_specified(name, inputs[name], tf.TensorSpec(spec.shape, spec.dtype))
            for name, spec in zip(names, functional.inputs, strict=True)
        ]
        return keras.tree.pack_sequence_as(functional._inputs_struct, tensors)

    def output_names(self, count: int) -> list[str]:
        if KERAS_3.is_visible(self.model):
            structure = functional_of(self.model)._outputs_struct
            if isinstance(structure, dict):
                return sorted(structure)
        return [f"output_{i}" for i in range(count)]

    def _input_names(self) -> list[str]:
        """The names of a visible model's inputs, in their order; [] for other models."""
        if not KERAS_3.is_visible(self.model):
            return []
        return [tensor.name for tensor in functional_of(self.model).inputs]

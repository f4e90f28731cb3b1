"""Front end for tf_keras models in memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from mbn_rewrite.errors import RewriteError
from mbn_rewrite.frontends.execution import random_tensor
from mbn_rewrite.frontends.keras_common.frontend import KerasFrontEnd
from mbn_rewrite.frontends.sample_inputs import GIVE_REAL_ONES, InputRecipe, of_batch
from mbn_rewrite.frontends.tf_keras.adapter import TF_KERAS
from mbn_rewrite.frontends.tf_keras.writer import TfKerasWriter


class TfKerasFrontEnd(KerasFrontEnd):
    """See `protocols.FrontEnd`."""

    def __init__(self) -> None:
        super().__init__(TF_KERAS, TfKerasWriter)

    def _input_specs(self, model: Any) -> Any:
        if getattr(model, "_is_graph_network", False):
            return model._nested_inputs
        spec = model.save_spec(dynamic_batch=False)
        if spec is None or len(spec[0]) != 1:
            raise RewriteError(
                f"no inputs can be made up for '{model.name}', whose arguments are "
                f"{'not known' if spec is None else 'several'}. {GIVE_REAL_ONES}"
            )
        return spec[0][0]

    def _random_tensor(self, spec: Any, rng: np.random.Generator, recipe: InputRecipe) -> Any:
        return random_tensor(spec, rng, recipe)

    def _resized(self, array: Any, batch: int | None) -> Any:
        if isinstance(array, (tf.RaggedTensor, tf.SparseTensor)):
            return array  # only dense tensors are resized
        return tf.constant(of_batch(array, batch))

    def _value(self, variable: Any) -> Any:
        # Shares memory with the variable until one of the two changes.
        return variable.read_value()

    def _restore(self, variable: Any, value: Any) -> None:
        variable.assign(value)

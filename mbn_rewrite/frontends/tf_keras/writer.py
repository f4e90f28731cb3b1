"""Writer of tf_keras models: the steps that depend on this Keras."""

from __future__ import annotations

from typing import Any

import tensorflow as tf
import tf_keras

from mbn_rewrite.errors import RewriteError
from mbn_rewrite.frontends.keras_common.cloning import label, parts
from mbn_rewrite.frontends.keras_common.custom_models import made_without_constructor
from mbn_rewrite.frontends.keras_common.writer import Writer, called


class TfKerasWriter(Writer):
    """Writer of one tf_keras model."""

    def sequential(self, old: Any) -> Any:
        new = made_without_constructor(old, tf_keras.Sequential, name=old.name)
        records = {id(record.layer): record for record in self.keras.calls_of(old)}
        if old._has_explicit_input_shape:
            new.add(self.layer(records[id(old.inputs[0]._keras_history.layer)]))
        for layer in old.layers:
            if not self.is_removed(layer):
                new.add(self.layer(records[id(layer)]))
                if new.built:
                    self.finish()
            elif self.is_in_code(old):
                new.add(self.in_place_of_removed(layer))
            elif layer is old.layers[-1]:
                new.add(self.identity_in_place_of(layer))
        if not new.built:
            # As `build` does, which has no argument for the dtype.
            new._build_graph_network_for_inferred_shape(old.input_shape, old.inputs[0].dtype)
        self.finish()
        return new

    def build_subclassed(self, old: Any, new: Any) -> None:
        spec = old.save_spec(dynamic_batch=False)
        if spec is None:
            raise RewriteError(
                f"{label(old)} was built but never called, so it is not known how to call its "
                "copy. Call it once on data"
            )
        arguments, keywords = (tf.nest.map_structure(_zeros, part) for part in spec)
        called(new, arguments, keywords)

    def set_own_trainable(self, model: Any, trainable: bool) -> None:
        flags = [(layer, layer.trainable) for layer in parts(model) if layer is not model]
        model.trainable = trainable  # this changes the flags of its layers
        for layer, flag in flags:
            layer._trainable = flag


def _zeros(spec: Any) -> Any:
    if not isinstance(spec, tf.TensorSpec):
        return spec
    return tf.zeros([1 if size is None else size for size in spec.shape], spec.dtype)

"""Writer of Keras 3 models: the steps that depend on this Keras."""

from __future__ import annotations

import warnings
from typing import Any

import keras

from mbn_rewrite.errors import RewriteError, cause_of
from mbn_rewrite.frontends.keras_common.cloning import label
from mbn_rewrite.frontends.keras_common.custom_models import made_without_constructor
from mbn_rewrite.frontends.keras_common.writer import Writer

_DEFINE = "Define build(), or get_build_config() and build_from_config()"


class Keras3Writer(Writer):
    """Writer of one Keras 3 model."""

    def copied(self, old: Any) -> Any:
        new = super().copied(old)
        if isinstance(old, keras.layers.InputLayer):
            # The name of this input in exported signatures, which may differ from the layer's.
            new.output.name = old.output.name
        return new

    def sequential(self, old: Any) -> Any:
        records = {id(record.layer): record for record in self.keras.calls_of(old)}
        layers = []
        for layer in old._layers:  # with the input layer, which `layers` leaves out
            if not self.is_removed(layer):
                layers.append(self.layer(records[id(layer)]))
            elif self.is_in_code(old):
                layers.append(self.in_place_of_removed(layer))
            elif layer is old._layers[-1]:
                layers.append(self.identity_in_place_of(layer))
        new = made_without_constructor(old, keras.Sequential, layers, name=old.name)
        self.finish()
        return new

    def build_subclassed(self, old: Any, new: Any) -> None:
        config = old.get_build_config()
        if not config:
            raise RewriteError(f"it is not known how to build a copy of {label(old)}. {_DEFINE}")
        if new.built:
            return
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                new.build_from_config(config)
        except Exception as error:
            raise RewriteError(
                f"the copy of {label(old)} cannot be built as the original was: {cause_of(error)} "
                + _DEFINE
            ) from error
        new.built, new._called = True, old._called  # `export` asks for both

    def set_own_trainable(self, model: Any, trainable: bool) -> None:
        model._trainable = trainable

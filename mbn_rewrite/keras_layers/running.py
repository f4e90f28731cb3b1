"""What is asked of a model before it is called, whatever its Keras."""

from __future__ import annotations

from typing import Any

from mbn_rewrite.keras_layers.copying import parts
from mbn_rewrite.made_up import Made, is_open


def compute_dtypes(model: Any, keras: Any) -> set[str]:
    """The names of the dtypes that the model's layers compute in; `keras` is its package."""
    return {
        layer.compute_dtype
        for layer in parts(model)
        if not isinstance(layer, (keras.Model, keras.layers.InputLayer))
    }


def takes_any_batch(model: Any) -> bool:
    """Whether no input of a model has a fixed number of examples."""
    return all(is_open(tensor.shape) for tensor in getattr(model, "inputs", None) or ())


def made_for(model: Any, keras: Any, batch: int | None = None) -> Made:
    """How inputs that suit the model's layers are made up; `keras` is its package."""
    layers = parts(model)
    tables = [layer.input_dim for layer in layers if isinstance(layer, keras.layers.Embedding)]
    # What a model scales down first are the pixels of images.
    pixels = any(isinstance(layer, keras.layers.Rescaling) for layer in layers)
    return Made(top=255.0 if pixels else None, words=min(tables, default=2), batch=batch)

"""What is asked of a model before it is called, whatever its Keras."""

from __future__ import annotations

import math
from typing import Any

from mbn_rewrite.frontends.keras_common.cloning import parts
from mbn_rewrite.frontends.sample_inputs import InputRecipe, is_open


def compute_dtypes(model: Any, keras: Any) -> set[str]:
    """The names of the dtypes that the model's layers compute in; `keras` is its package."""
    layers = [
        layer
        for layer in parts(model)
        if not isinstance(layer, (keras.Model, keras.layers.InputLayer))
    ]
    # TensorFlow resizes pictures in float32, whatever it is given, unless it takes the nearest.
    resizes = any(getattr(layer, "interpolation", "nearest") != "nearest" for layer in layers)
    return {layer.compute_dtype for layer in layers} | ({"float32"} if resizes else set())


def takes_any_batch(model: Any) -> bool:
    """Whether no input of a model has a fixed number of examples."""
    return all(is_open(tensor.shape) for tensor in getattr(model, "inputs", None) or ())


def recipe_for(model: Any, keras: Any, batch: int | None = None) -> InputRecipe:
    """How inputs that suit the model's layers are made up; `keras` is its package."""
    layers = list(parts(model))
    embeddings = [layer for layer in layers if isinstance(layer, keras.layers.Embedding)]
    masking = [layer for layer in layers if isinstance(layer, keras.layers.Masking)]
    # What a model scales down first are the pixels of images.
    pixels = any(isinstance(layer, keras.layers.Rescaling) for layer in layers)
    return InputRecipe(
        top=255.0 if pixels else None,
        words=min((layer.input_dim for layer in embeddings), default=2),
        batch=batch,
        padding=float(masking[0].mask_value) if masking else None,
        pad_id=0 if any(layer.mask_zero for layer in embeddings) else None,
        largest=max(map(_largest_output, layers), default=0),
    )


def _largest_output(layer: Any) -> int:
    """How many numbers the largest output of a layer has for one example, where that is known."""
    nodes = getattr(layer, "_inbound_nodes", ())
    shapes = [tensor.shape for node in nodes for tensor in _flat(node.output_tensors)]
    known = [shape for shape in shapes if getattr(shape, "rank", 0) is not None]
    # A size that is left open counts as 1: what is computed is no less than that.
    return max((math.prod(size or 1 for size in shape) for shape in known), default=0)


def _flat(structure: Any) -> list[Any]:
    if isinstance(structure, dict):
        structure = list(structure.values())
    if isinstance(structure, (list, tuple)):
        return [tensor for part in structure for tensor in _flat(part)]
    return [structure]

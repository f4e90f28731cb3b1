"""Sample inputs for signatures and methods, after the hints that their graphs give."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import tensorflow as tf

from mbn_rewrite.frontends.sample_inputs import InputRecipe, at_open_sizes, with_batch
from mbn_rewrite.frontends.saved_model.function_graph import FunctionGraph, source_of
from mbn_rewrite.frontends.saved_model.sample_strings import Text, texts_for


def input_recipes(
    specs: Mapping[str, Any], function: FunctionGraph | None, batch: int | None
) -> list[InputRecipe]:
    """Recipes for the inputs of a signature or method, the likeliest first."""
    recipe = InputRecipe(batch=batch) if function is None else _recipe_for(function, batch)
    texts: list[Text | None] = [None]
    if any(spec.dtype == tf.string for spec in specs.values()):
        texts = [*texts_for(function)]
    shapes = [tuple(spec.shape) for spec in specs.values() if spec.shape.rank]
    return [
        with_batch(replace(each, text=text), shapes)
        for each in at_open_sizes(recipe, shapes)
        for text in texts
    ]


def _recipe_for(function: FunctionGraph, batch: int | None) -> InputRecipe:
    """The recipe for inputs that suit a graph."""
    compared = list(_compared_with_constants(function))
    padding = [value for tensor, value in compared if tensor.dtype.is_floating]
    ids = [value for tensor, value in compared if tensor.dtype.is_integer]
    shapes = [tensor.shape for op in function.operations for tensor in op.outputs]
    known = [[size or 1 for size in shape.as_list()] for shape in shapes if shape.rank is not None]
    return InputRecipe(
        top=255.0 if _scales_down(function) else None,
        words=_words(function),
        batch=batch,
        padding=float(padding[0]) if padding else None,
        pad_id=int(ids[0]) if ids else None,
        largest=max(map(math.prod, known), default=0),
    )


def _compared_with_constants(function: FunctionGraph) -> Iterator[tuple[Any, Any]]:
    """Arguments that are compared with one number, as masks are made, with that number."""
    arguments = {function.graph.get_tensor_by_name(f"{name}:0").name for name in function.arguments}
    for op in function.operations:
        if op.type not in ("NotEqual", "Equal", "Greater"):
            continue
        for tensor, other in (op.inputs, reversed(op.inputs)):
            value = tf.get_static_value(other)
            if _cast_from(tensor).name in arguments and np.size(value) == 1 and value is not None:
                yield _cast_from(tensor), np.ravel(value)[0]


def _cast_from(tensor: Any) -> Any:
    """The tensor that a tensor was cast from."""
    tensor = source_of(tensor)
    while tensor.op.type == "Cast":
        tensor = source_of(tensor.op.inputs[0])
    return tensor


def _scales_down(function: FunctionGraph) -> bool:
    """Whether an input is multiplied by one number first, as the pixels of images are."""
    for name in function.arguments:
        tensor = function.graph.get_tensor_by_name(f"{name}:0")
        for op, _ in function.readers.get(tensor.name, []):
            others = [source_of(t) for t in op.inputs if source_of(t) is not tensor]
            numbers = all(t.shape.rank == 0 for t in others)
            if op.type in ("Mul", "RealDiv", "Div") and others and numbers:
                return True
    arguments = [function.graph.get_tensor_by_name(f"{name}:0") for name in function.arguments]
    return any(tensor.dtype == tf.uint8 for tensor in arguments)


def _words(function: FunctionGraph) -> int:
    """Number of rows of the smallest embedding, which integers index."""
    rows = [256]
    for op in function.operations:
        shape = None
        if op.type == "ResourceGather":
            variable = function.variable(op.inputs[0])
            shape = None if variable is None else variable.shape
        elif op.type in ("GatherV2", "Gather") and op.inputs[0].dtype.is_floating:
            shape = op.inputs[0].shape
        if shape is not None and shape.rank and shape[0]:
            rows.append(shape[0])
    return min(rows)

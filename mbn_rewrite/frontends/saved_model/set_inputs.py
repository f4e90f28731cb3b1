"""Inputs of signatures that are set to a value for good, so that they are inputs no more."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from mbn_rewrite.errors import RewriteError
from mbn_rewrite.ir.channel_map import Array

_EXAMPLES = {"bool": "False", "string": "eval"}


class WithSetInputs:
    """A signature with some inputs set; for the rest the concrete function that it was.

    Args:
        function: the concrete function.
        values: tensors for inputs, by name.

    Attributes:
        given: their values, by the names of the Placeholders.
        set_to: their values in words, by the names of the inputs.
    """

    def __init__(self, function: Any, values: Mapping[str, Any]) -> None:
        self._function = function
        self._values = dict(values)
        keywords = list(function._arg_keywords)
        self._arg_keywords = [name for name in keywords if name not in values]
        named = dict(zip(keywords, function.inputs, strict=False))
        self.given: dict[str, Array] = {
            named[name].op.name: value.numpy() for name, value in self._values.items()
        }

        self.set_to = {name: repr(_plain(value)) for name, value in self._values.items()}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._function, name)

    def __call__(self, **inputs: Any) -> Any:
        return self._function(**inputs, **self._values)

    @property
    def inputs(self) -> list[Any]:
        return [tensor for tensor in self._function.inputs if tensor.op.name not in self.given]

    @cached_property
    def structured_input_signature(self) -> tuple[tuple[()], dict[str, Any]]:
        specs = self._function.structured_input_signature[1]
        return (), {name: spec for name, spec in specs.items() if name not in self._values}

    def concrete(self) -> Any:
        """It as a concrete function."""
        specs = {
            name: tf.TensorSpec(spec.shape, spec.dtype, name)
            for name, spec in self.structured_input_signature[1].items()
        }
        traced = tf.function(lambda **inputs: self(**inputs), autograph=False)
        return traced.get_concrete_function(**specs)


def _plain(value: Any) -> Any:
    found = value.numpy()
    found = found.tolist() if hasattr(found, "tolist") else found
    return found.decode(errors="replace") if isinstance(found, bytes) else found


def with_inputs_set(
    source: Path, signatures: Mapping[str, Any], wanted: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Signatures with inputs set.

    Args:
        source: the SavedModel, for errors.
        signatures: key -> concrete function.
        wanted: values, by the names of inputs, or "signature/input".

    Raises:
        RewriteError: there is no such input, or it takes no such value.
    """
    found: dict[str, dict[str, Any]] = {key: {} for key in signatures}
    for path, value in (wanted or {}).items():
        places = list(_places(signatures, path))
        if not places:
            listed = "; ".join(
                f"'{key}' takes {', '.join(sorted(_specs(function))) or 'nothing'}"
                for key, function in signatures.items()
            )
            raise RewriteError(
                f"set_input names '{path}', which is no input of a signature of {source}: "
                f"{listed}. Name one of these, or leave it out"
            )
        for key, name in places:
            found[key][name] = _tensor(key, name, value, _specs(signatures[key])[name])
    return {
        key: WithSetInputs(function, found[key]) if found[key] else function
        for key, function in signatures.items()
    }


def _specs(function: Any) -> dict[str, Any]:
    return dict(function.structured_input_signature[1])


def _places(signatures: Mapping[str, Any], path: str) -> Iterator[tuple[str, str]]:
    """The inputs, as (signature, name), that a path names."""
    for key, function in signatures.items():
        for name in _specs(function):
            if path in (name, f"{key}/{name}"):
                yield key, name


def _tensor(key: str, name: str, value: Any, spec: Any) -> Any:
    """A value as a tensor for an input."""
    array = _as_dtype(value, spec.dtype)
    if array is not None and spec.shape.is_compatible_with(array.shape):
        return tf.constant(array, spec.dtype)
    shape = "any shape" if spec.shape.rank is None else f"the shape {spec.shape}"
    example = _EXAMPLES.get(spec.dtype.name, "0")
    example = f"[{example}]" if spec.shape.rank else example
    raise RewriteError(
        f"set_input gives the input '{name}' of signature '{key}' the value {value!r}, but it "
        f"takes {spec.dtype.name} of {shape}. Give such a value, as in "
        f"--set_input={name}={example}, or leave it out"
    )


def _as_dtype(value: Any, dtype: Any) -> Array | None:
    """A value as an array of a dtype; None where that would change it."""
    try:
        array = np.asarray(value)
    except ValueError:  # of lists of several lengths
        return None
    if dtype == tf.string:
        return array.astype(object) if array.dtype.kind in "SU" else None
    if array.dtype.kind not in ("biuf" if dtype.is_floating else "biu"):
        return None
    if array.dtype.kind == "b" and dtype != tf.bool:
        return None
    with np.errstate(all="ignore"):
        cast = array.astype(dtype.as_numpy_dtype)
    same = np.array_equal(cast.astype(array.dtype), array)
    return cast if same or (dtype.is_floating and np.all(np.isfinite(cast))) else None

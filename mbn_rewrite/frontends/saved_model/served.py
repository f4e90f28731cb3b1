"""Models on disk called again with the inputs that the original was given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from mbn_rewrite.errors import RewriteError, cause_of
from mbn_rewrite.frontends.saved_model.execution import called_method, exchanged, specs_of
from mbn_rewrite.frontends.saved_model.loaded_model import Interface, Loaded, attribute_of
from mbn_rewrite.frontends.source import ReferenceIO


@dataclass(frozen=True)
class Called:
    """A concrete function, and tensors for its arguments in their order."""

    function: Any
    inputs: Sequence[Any]


def signature_called(function: Any, exchange: ReferenceIO) -> Called:
    """A signature with reference inputs; a lone input may have another name."""
    inputs = exchange.inputs
    if len(inputs) == 1:
        return Called(function, list(inputs.values()))
    return Called(function, [inputs[name] for name in Interface.of(function).keywords])


def method_called(root: Any, exchange: ReferenceIO) -> Called:
    """A method with reference arguments."""
    args, kwargs = exchange.inputs
    function = attribute_of(root, exchange.method).get_concrete_function(*args, **kwargs)
    flat = tf.nest.flatten(exchange.inputs, expand_composites=True)
    return Called(function, [value for value in flat if isinstance(value, tf.Tensor)])


def _for_signature(signature: Any, exchange: ReferenceIO) -> Mapping[str, Any]:
    """Reference inputs by the names of a signature; a lone one may have had another name."""
    specs, inputs = specs_of(signature), exchange.inputs
    if len(specs) == len(inputs) == 1:
        return dict(zip(specs, inputs.values(), strict=True))
    return dict(inputs)


def repeated(loaded: Loaded, name: str, exchange: ReferenceIO) -> ReferenceIO:
    """A second call of a signature or method of the original, with the same inputs."""
    by_xla = exchange.compiled
    if exchange.method:
        return called_method(loaded.root, exchange.method, exchange.inputs, name, by_xla)
    function = loaded.signatures[name]
    return exchanged(function, _for_signature(function, exchange), name, by_xla)


class Served:
    """A SavedModel as its users load it.

    Attributes:
        signatures: key -> concrete function.
    """

    def __init__(self, directory: Path) -> None:
        try:
            self._owner = tf.saved_model.load(str(directory))  # holds the variables
            self.signatures = dict(self._owner.signatures)
        except Exception as error:
            raise RewriteError(f"{directory} cannot be served: {cause_of(error)}") from error

    def called(self, name: str, exchange: ReferenceIO) -> Called:
        """The function to call with reference inputs, and the tensors for it."""
        if exchange.method:
            return method_called(self._owner, exchange)
        return signature_called(self.signatures[name], exchange)

    def __call__(self, name: str, exchange: ReferenceIO) -> Mapping[str, np.ndarray]:
        """The outputs of a signature or method for reference inputs.

        The lone input of a signature may have another name.
        """
        who = "the rewritten model"
        if exchange.method:
            return called_method(
                self._owner, exchange.method, exchange.inputs, who, exchange.compiled
            ).outputs
        signature = self.signatures[name]
        specs, inputs = specs_of(signature), _for_signature(signature, exchange)
        if set(inputs) != set(specs):
            raise RewriteError(
                f"signature '{name}' of the rewritten model names its inputs {sorted(specs)}, "
                f"the original {sorted(inputs)}"
            )
        result = exchanged(signature, inputs, who, exchange.compiled)
        if exchange.interface and not _keeps(exchange.interface, result.interface):
            raise RewriteError(
                f"signature '{name}' would declare {dict(result.interface)}, the original "
                f"declares {dict(exchange.interface)}; please report this"
            )
        return result.outputs


def _keeps(original: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether clients of one interface are served by another.

    The shapes of outputs may be known better, never less well, and inputs have to be the same.
    """
    return original.keys() == new.keys() and all(
        new[name].is_subtype_of(spec) if name.startswith("output ") else new[name] == spec
        for name, spec in original.items()
    )

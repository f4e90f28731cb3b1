"""Models on disk called again with the inputs that the original was given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from mbn_rewrite.errors import RewriteError, cause_of
from mbn_rewrite.frontends.reference_io import ReferenceIO
from mbn_rewrite.frontends.saved_model.loaded_model import Interface, Loaded, attribute_of
from mbn_rewrite.frontends.saved_model.signature_calls import call_method, call_signature, specs_of


@dataclass(frozen=True)
class Call:
    """A concrete function, and tensors for its arguments in their order."""

    function: Any
    inputs: Sequence[Any]


def signature_call(function: Any, reference: ReferenceIO) -> Call:
    """A signature with reference inputs; a lone input may have another name."""
    inputs = reference.inputs
    if len(inputs) == 1:
        return Call(function, list(inputs.values()))
    return Call(function, [inputs[name] for name in Interface.of(function).keywords])


def method_call(root: Any, reference: ReferenceIO) -> Call:
    """A method with reference arguments."""
    args, kwargs = reference.inputs
    function = attribute_of(root, reference.method).get_concrete_function(*args, **kwargs)
    flat = tf.nest.flatten(reference.inputs, expand_composites=True)
    return Call(function, [value for value in flat if isinstance(value, tf.Tensor)])


def loaded_call(loaded: Loaded, name: str, reference: ReferenceIO) -> Call:
    """A signature or method of the original with reference inputs."""
    if reference.method:
        return method_call(loaded.root, reference)
    return signature_call(loaded.signatures[name], reference)


def _for_signature(signature: Any, reference: ReferenceIO) -> Mapping[str, Any]:
    """Reference inputs by the names of a signature; a lone one may have had another name."""
    specs, inputs = specs_of(signature), reference.inputs
    if len(specs) == len(inputs) == 1:
        return dict(zip(specs, inputs.values(), strict=True))
    return dict(inputs)


def called_again(loaded: Loaded, name: str, reference: ReferenceIO) -> ReferenceIO:
    """A second call of a signature or method of the original, with the same inputs."""
    by_xla = reference.compiled
    if reference.method:
        return call_method(loaded.root, reference.method, reference.inputs, name, by_xla)
    function = loaded.signatures[name]
    return call_signature(function, _for_signature(function, reference), name, by_xla)


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

    def call(self, name: str, reference: ReferenceIO) -> Call:
        """The function to call with reference inputs, and the tensors for it."""
        if reference.method:
            return method_call(self._owner, reference)
        return signature_call(self.signatures[name], reference)

    def __call__(self, name: str, reference: ReferenceIO) -> Mapping[str, np.ndarray]:
        """The outputs of a signature or method for reference inputs.

        The lone input of a signature may have another name.
        """
        who = "the rewritten model"
        if reference.method:
            return call_method(
                self._owner, reference.method, reference.inputs, who, reference.compiled
            ).outputs
        signature = self.signatures[name]
        specs, inputs = specs_of(signature), _for_signature(signature, reference)
        if set(inputs) != set(specs):
            raise RewriteError(
                f"signature '{name}' of the rewritten model names its inputs {sorted(specs)}, "
                f"the original {sorted(inputs)}"
            )
        result = call_signature(signature, inputs, who, reference.compiled)
        if reference.interface and not _keeps(reference.interface, result.interface):
            raise RewriteError(
                f"signature '{name}' would declare {dict(result.interface)}, the original "
                f"declares {dict(reference.interface)}; please report this"
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

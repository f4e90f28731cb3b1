"""Calls of the signatures and methods of a SavedModel, with given or sample inputs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import tensorflow as tf

from mbn_rewrite.errors import RewriteError
from mbn_rewrite.frontends.execution import (
    as_specified,
    called,
    compiled,
    plain,
    random_tensor,
    xla_may_run,
)
from mbn_rewrite.frontends.reference_io import ReferenceIO
from mbn_rewrite.frontends.sample_inputs import (
    PLAIN,
    WITH_EDGES,
    InputRecipe,
    is_open,
    nans,
    of_batch,
    tried,
)
from mbn_rewrite.frontends.saved_model.function_graph import FunctionGraph
from mbn_rewrite.frontends.saved_model.loaded_model import Entry, attribute_of
from mbn_rewrite.frontends.saved_model.signature_inputs import input_recipes


def specs_of(function: Any) -> dict[str, Any]:
    """The inputs of a signature: name -> tf.TensorSpec."""
    return {
        _declared_name(key, spec): spec
        for key, spec in function.structured_input_signature[1].items()
    }


def _declared_name(key: str, spec: Any) -> str:
    """The name of an input, in whose key TensorFlow's loader replaces what is in no identifier."""
    name = spec.name
    return name if name and re.sub(r"[^A-Za-z0-9_]", "_", name) == key else key


def interface_of(function: Any) -> dict[str, Any]:
    """The inputs and outputs that a signature declares: a tf.TensorSpec for each."""
    given = {
        name: x if isinstance(x, tf.TypeSpec) else tf.type_spec_from_value(x)
        for name, x in function.structured_outputs.items()
    }
    return {
        f"{what} {name}": tf.TensorSpec(spec.shape, spec.dtype)
        for what, specs in (("input", specs_of(function)), ("output", given))
        for name, spec in sorted(specs.items())
    }


def signature_reference(
    name: str,
    function: Any,
    graph: FunctionGraph | None,
    given: Mapping[str, np.ndarray] | None,
    batch: int | None = None,
) -> ReferenceIO:
    """Calls a signature.

    Args:
        name: its key.
        function: its concrete function.
        graph: its graph, if it could be read, which tells about its inputs.
        given: arrays for its inputs, by name; None to make them up.
        batch: how many examples to call it with; None for all that are given, or a few.

    Raises:
        RewriteError: the arrays do not fit, or no inputs can be made up that it takes.
    """
    specs, who = specs_of(function), f"signature '{name}' of the original"
    if given is not None:
        if batch is not None:
            given = {
                key: of_batch(array, batch if is_open(specs[key].shape) else None)
                for key, array in given.items()
            }
        inputs = {key: as_specified(key, given[key], spec) for key, spec in specs.items()}
        return call_signature(function, inputs, who)

    def call(inputs: dict[str, Any], by_xla: bool) -> ReferenceIO:
        return call_signature(function, inputs, who, by_xla)

    try:
        found = _first_that_fits(specs, graph, call, batch)
    except RewriteError as error:
        said = str(error).partition(" Give ")[0]  # what follows names the inputs
        raise RewriteError(f"{said} {_how_to_give(name, specs)}") from error
    if any(array.size and nans([array]) == array.size for array in _outputs(found)):
        raise RewriteError(
            f"{who} gives NaN for made-up inputs, so nothing could be compared. "
            f"{_how_to_give(name, specs)}"
        )
    return found


def _how_to_give(name: str, specs: Mapping[str, Any]) -> str:
    """Advice on giving inputs for a signature, or on leaving it unverified."""
    takes = ", ".join(
        f"'{name}/{key}' ({spec.dtype.name}, shape {spec.shape})" for key, spec in specs.items()
    )
    key = f"{name}/{next(iter(specs), 'x')}"
    return (
        f"Signature '{name}' takes {takes}: save real ones with "
        f"numpy.savez('inputs.npz', **{{'{key}': ...}}) and pass --inputs=inputs.npz "
        f"(inputs={{'{key}': ...}} in Python), or carry it over unverified with "
        f"--unverified={name} (unverified=['{name}'])"
    )


def method_reference(
    entry: Entry, root: Any, graph: FunctionGraph | None, known: Iterable[ReferenceIO]
) -> ReferenceIO:
    """Calls a method: with the inputs of a signature that takes the same, or with sample inputs.

    Args:
        entry: one of its functions.
        root: the object that has the method.
        graph: the graph of the function, if it could be read.
        known: the inputs and outputs of signatures.

    Raises:
        RewriteError: no inputs can be made up that it takes, or it gives NaN or infinity.
    """
    arguments = entry.interface.arguments
    flat = tf.nest.flatten(arguments, expand_composites=True)
    if len(flat) > len(tf.nest.flatten(arguments)):
        raise RewriteError("it takes sparse or ragged tensors, which cannot be made up")
    specs = {f"{i:04}": x for i, x in enumerate(flat) if isinstance(x, tf.TensorSpec)}

    def call(inputs: Mapping[str, Any], by_xla: bool | None = None) -> ReferenceIO:
        filled = [inputs.get(f"{i:04}", x) for i, x in enumerate(flat)]
        packed = tf.nest.pack_sequence_as(arguments, filled, expand_composites=True)
        return call_method(root, entry.method, packed, f"method '{entry.name}'", by_xla)

    inputs = next((x for e in known if (x := _suitable(e.inputs, specs)) is not None), None)
    found = _first_that_fits(specs, graph, call) if inputs is None else call(inputs)
    for array in found.outputs.values():
        if array.dtype.kind in "fc" and not np.all(np.isfinite(array)):
            raise RewriteError("it gives NaN or infinity for made-up inputs")
    return found


def _suitable(inputs: Any, specs: Mapping[str, Any]) -> dict[str, Any] | None:
    """The inputs of a signature by other names, if they match these specifications."""
    if not isinstance(inputs, dict) or len(inputs) != len(specs):
        return None
    pairs = dict(zip(sorted(specs), (inputs[name] for name in sorted(inputs)), strict=True))
    fit = all(
        specs[key].dtype == tensor.dtype and specs[key].shape.is_compatible_with(tensor.shape)
        for key, tensor in pairs.items()
    )
    return pairs if fit else None


def call_method(
    root: Any, path: str, arguments: Any, who: str, by_xla: bool | None = None
) -> ReferenceIO:
    """The inputs and outputs of a call of a method; see `call_signature`."""
    method = attribute_of(root, path)
    arrays, by_xla = _run(lambda given: method(*given[0], **given[1]), arguments, who, by_xla)
    outputs = {str(i): array for i, array in enumerate(arrays)}
    return ReferenceIO(arguments, outputs, by_xla, path)


def _first_that_fits(
    specs: Mapping[str, Any],
    graph: FunctionGraph | None,
    call: Callable[[dict[str, Any], bool], ReferenceIO],
    batch: int | None = None,
) -> ReferenceIO:
    """Calls a function with one kind of sample inputs after the other until it takes them.

    The second argument of `call` has XLA run the function. That is tried last, since XLA checks
    less than TensorFlow does and takes long to compile.
    """

    def made_up(recipe: InputRecipe) -> dict[str, Any]:
        rng = np.random.default_rng(0)
        return {key: random_tensor(specs[key], rng, recipe) for key in sorted(specs)}

    recipes = input_recipes(specs, graph, batch)
    try:
        return tried(recipes, lambda recipe: call(made_up(recipe), False), _outputs)
    except RewriteError as error:
        if not xla_may_run(error) or any(spec.dtype == tf.string for spec in specs.values()):
            raise
        with suppress(RewriteError):
            by_xla = (WITH_EDGES, PLAIN)
            return tried(recipes, lambda recipe: call(made_up(recipe), True), _outputs, by_xla)
        raise


def _outputs(found: ReferenceIO) -> Iterable[np.ndarray]:
    return found.outputs.values()


def call_signature(
    function: Any, inputs: Mapping[str, Any], who: str, by_xla: bool | None = None
) -> ReferenceIO:
    """The inputs and outputs of a call of a signature.

    Args:
        function: its concrete function.
        inputs: tensors by name.
        who: the name of the function in errors.
        by_xla: whether XLA runs it; by default only where nothing else can.
    """
    names = sorted(function.structured_outputs)

    def flat(data: Mapping[str, Any]) -> list[Any]:
        outputs = function(**data)
        return [outputs[name] for name in names]

    labels: list[str] = []
    for name in names:
        parts = tf.nest.flatten(function.structured_outputs[name], expand_composites=True)
        labels += [name] if len(parts) == 1 else [f"{name}/{i}" for i in range(len(parts))]
    data = dict(inputs)
    arrays, by_xla = _run(flat, data, who, by_xla)
    outputs = dict(zip(labels, arrays, strict=True))
    return ReferenceIO(data, outputs, by_xla, interface=interface_of(function))


def _run(
    function: Callable[[Any], Any], inputs: Any, who: str, by_xla: bool | None
) -> tuple[list[np.ndarray], bool]:
    """The outputs of a function, and whether XLA ran it."""
    if by_xla is not None:
        return (compiled if by_xla else plain)(function, inputs, who), by_xla
    try:
        return plain(function, inputs, who), False
    except RewriteError:
        return called(function, inputs, who), True


def given_for(
    name: str, function: Any, inputs: Mapping[str, np.ndarray] | None
) -> dict[str, np.ndarray] | None:
    """The caller's arrays for one signature: by the input's name, or "signature/name".

    Raises:
        RewriteError: there are some for this signature, but not all.
    """
    names = sorted(specs_of(function))
    found: dict[str, np.ndarray] = {}
    for key in names:
        for path in (f"{name}/{key}", key):
            if inputs is not None and path in inputs:
                found.setdefault(key, inputs[path])
    if not found:
        return None
    if len(found) < len(names):
        raise RewriteError(
            f"the inputs are named {sorted(inputs or ())}; those of signature '{name}' are named "
            f"{names}"
        )
    return found

"""Calls the signatures of SavedModels: with made-up inputs, and without changing states."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from mbn_rewrite.errors import RewriteError, cause_of
from mbn_rewrite.frontends.execution import (
    as_specified,
    called,
    compiled,
    plain,
    random_tensor,
    xla_may_run,
)
from mbn_rewrite.frontends.sample_inputs import (
    PLAIN,
    WITH_EDGES,
    Made,
    is_open,
    nans,
    of_batch,
    tried,
    with_batch,
)
from mbn_rewrite.frontends.saved_model.function_graph import View, source_of
from mbn_rewrite.frontends.saved_model.loading import Entry, Interface, Loaded, attribute_of
from mbn_rewrite.frontends.saved_model.sample_texts import Text, texts_for
from mbn_rewrite.frontends.source import ReferenceIO

# What is tried for sizes that a signature leaves open: networks have least sizes.
_OPEN_SIZES = (64, 224, 16, 1)


def specs_of(function: Any) -> dict[str, Any]:
    """The inputs of a signature: name -> tf.TensorSpec."""
    return dict(function.structured_input_signature[1])


def _interface_of(function: Any) -> dict[str, Any]:
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


def _keeps(original: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether who is served what one interface declares is served by another.

    More may be known of the shapes of outputs, never less, and inputs have to be the same.
    """
    return original.keys() == new.keys() and all(
        new[name].is_subtype_of(spec) if name.startswith("output ") else new[name] == spec
        for name, spec in original.items()
    )


def exchange(
    name: str,
    function: Any,
    view: View | None,
    given: Mapping[str, np.ndarray] | None,
    batch: int | None = None,
) -> ReferenceIO:
    """Calls a signature.

    Args:
        name: its key.
        function: its concrete function.
        view: the same as a graph, if it could be read: for what its inputs look like.
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
        return exchanged(function, inputs, who)

    def call(inputs: dict[str, Any], by_xla: bool) -> ReferenceIO:
        return exchanged(function, inputs, who, by_xla)

    try:
        found = _first_that_fits(specs, view, call, batch)
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
    """How to give inputs for a signature, or do without."""
    takes = ", ".join(
        f"'{name}/{key}' ({spec.dtype.name}, shape {spec.shape})" for key, spec in specs.items()
    )
    key = f"{name}/{next(iter(specs), 'x')}"
    return (
        f"Signature '{name}' takes {takes}: save real ones with "
        f"numpy.savez('inputs.npz', **{{'{key}': ...}}) and pass --verify_inputs=inputs.npz "
        f"(inputs={{'{key}': ...}} in Python), or carry it over unverified with "
        f"--unverified={name} (unverified=['{name}'])"
    )


def method_exchange(
    entry: Entry, root: Any, view: View | None, known: Iterable[ReferenceIO]
) -> ReferenceIO:
    """Calls a method: with the inputs of a signature that takes alike, or made-up ones.

    Args:
        entry: one of its functions.
        root: the object that has the method.
        view: the function as a graph, if it could be read.
        known: what signatures were given.

    Raises:
        RewriteError: no inputs can be made up that it takes, or it gives what is no number.
    """
    arguments = entry.interface.arguments
    flat = tf.nest.flatten(arguments, expand_composites=True)
    if len(flat) > len(tf.nest.flatten(arguments)):
        raise RewriteError("it takes sparse or ragged tensors, which cannot be made up")
    specs = {f"{i:04}": x for i, x in enumerate(flat) if isinstance(x, tf.TensorSpec)}

    def call(inputs: Mapping[str, Any], by_xla: bool | None = None) -> ReferenceIO:
        filled = [inputs.get(f"{i:04}", x) for i, x in enumerate(flat)]
        packed = tf.nest.pack_sequence_as(arguments, filled, expand_composites=True)
        return called_method(root, entry.method, packed, f"method '{entry.name}'", by_xla)

    inputs = next((x for e in known if (x := _suitable(e.inputs, specs)) is not None), None)
    found = _first_that_fits(specs, view, call) if inputs is None else call(inputs)
    for array in found.outputs.values():
        if array.dtype.kind in "fc" and not np.all(np.isfinite(array)):
            raise RewriteError("it gives NaN or infinity for made-up inputs")
    return found


def _suitable(inputs: Any, specs: Mapping[str, Any]) -> dict[str, Any] | None:
    """The inputs of a signature in the place of others, if they are as those have to be."""
    if not isinstance(inputs, dict) or len(inputs) != len(specs):
        return None
    pairs = dict(zip(sorted(specs), (inputs[name] for name in sorted(inputs)), strict=True))
    fit = all(
        specs[key].dtype == tensor.dtype and specs[key].shape.is_compatible_with(tensor.shape)
        for key, tensor in pairs.items()
    )
    return pairs if fit else None


def called_method(
    root: Any, path: str, arguments: Any, who: str, by_xla: bool | None = None
) -> ReferenceIO:
    """What a method gives for these arguments; see `exchanged`."""
    method = attribute_of(root, path)
    arrays, by_xla = _run(lambda given: method(*given[0], **given[1]), arguments, who, by_xla)
    outputs = {str(i): array for i, array in enumerate(arrays)}
    return ReferenceIO(arguments, outputs, by_xla, path)


def _first_that_fits(
    specs: Mapping[str, Any],
    view: View | None,
    call: Callable[[dict[str, Any], bool], ReferenceIO],
    batch: int | None = None,
) -> ReferenceIO:
    """Makes up inputs in one way after the other until they can be used.

    `call` is told whether XLA is to run the function: only where nothing else can in any way,
    since it does not check what others do, and compiles for long.
    """

    def made_up(made: Made) -> dict[str, Any]:
        rng = np.random.default_rng(0)
        return {key: random_tensor(specs[key], rng, made) for key in sorted(specs)}

    ways = _ways(specs, view, batch)
    try:
        return tried(ways, lambda made: call(made_up(made), False), _outputs)
    except RewriteError as error:
        if not xla_may_run(error) or any(spec.dtype == tf.string for spec in specs.values()):
            raise
        with suppress(RewriteError):
            by_xla = (WITH_EDGES, PLAIN)
            return tried(ways, lambda made: call(made_up(made), True), _outputs, by_xla)
        raise


def _outputs(found: ReferenceIO) -> Iterable[np.ndarray]:
    return found.outputs.values()


def exchanged(
    function: Any, inputs: Mapping[str, Any], who: str, by_xla: bool | None = None
) -> ReferenceIO:
    """What a signature gives for these inputs.

    Args:
        function: its concrete function.
        inputs: tensors by name.
        who: it, for errors.
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
    return ReferenceIO(data, outputs, by_xla, interface=_interface_of(function))


def _run(
    function: Callable[[Any], Any], inputs: Any, who: str, by_xla: bool | None
) -> tuple[list[np.ndarray], bool]:
    """What a function gives, and whether XLA ran it."""
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


def _ways(specs: Mapping[str, Any], view: View | None, batch: int | None) -> list[Made]:
    """Ways to make up inputs, the likeliest first."""
    made = Made(batch=batch) if view is None else _made_for(view, batch)
    texts: list[Text | None] = [None]
    if any(spec.dtype == tf.string for spec in specs.values()):
        texts = [*texts_for(view)]
    shapes = [tuple(spec.shape) for spec in specs.values() if spec.shape.rank]
    is_open = any(None in shape[1:] for shape in shapes)
    return [
        with_batch(replace(made, open_size=size, text=text), shapes)
        for size in (_OPEN_SIZES if is_open else _OPEN_SIZES[:1])
        for text in texts
    ]


def _made_for(view: View, batch: int | None) -> Made:
    """How inputs that suit a graph are made up."""
    compared = list(_compared_with_constants(view))
    padding = [value for tensor, value in compared if tensor.dtype.is_floating]
    ids = [value for tensor, value in compared if tensor.dtype.is_integer]
    shapes = [tensor.shape for op in view.operations for tensor in op.outputs]
    known = [[size or 1 for size in shape.as_list()] for shape in shapes if shape.rank is not None]
    return Made(
        top=255.0 if _scales_down(view) else None,
        words=_words(view),
        batch=batch,
        padding=float(padding[0]) if padding else None,
        pad_id=int(ids[0]) if ids else None,
        largest=max(map(math.prod, known), default=0),
    )


def _compared_with_constants(view: View) -> Iterator[tuple[Any, Any]]:
    """Arguments that are compared with one number, as masks are made; and that number."""
    arguments = {view.graph.get_tensor_by_name(f"{name}:0").name for name in view.arguments}
    for op in view.operations:
        if op.type not in ("NotEqual", "Equal", "Greater"):
            continue
        for tensor, other in (op.inputs, reversed(op.inputs)):
            value = tf.get_static_value(other)
            if _cast_from(tensor).name in arguments and np.size(value) == 1 and value is not None:
                yield _cast_from(tensor), np.ravel(value)[0]


def _cast_from(tensor: Any) -> Any:
    """A tensor before its dtype was changed."""
    tensor = source_of(tensor)
    while tensor.op.type == "Cast":
        tensor = source_of(tensor.op.inputs[0])
    return tensor


def _scales_down(view: View) -> bool:
    """Whether an input is first multiplied by one number: the pixels of images are."""
    for name in view.arguments:
        tensor = view.graph.get_tensor_by_name(f"{name}:0")
        for op, _ in view.readers.get(tensor.name, []):
            others = [source_of(t) for t in op.inputs if source_of(t) is not tensor]
            numbers = all(t.shape.rank == 0 for t in others)
            if op.type in ("Mul", "RealDiv", "Div") and others and numbers:
                return True
    arguments = [view.graph.get_tensor_by_name(f"{name}:0") for name in view.arguments]
    return any(tensor.dtype == tf.uint8 for tensor in arguments)


def _words(view: View) -> int:
    """The fewest rows of what integers look things up in."""
    rows = [256]
    for op in view.operations:
        shape = None
        if op.type == "ResourceGather":
            variable = view.variable(op.inputs[0])
            shape = None if variable is None else variable.shape
        elif op.type in ("GatherV2", "Gather") and op.inputs[0].dtype.is_floating:
            shape = op.inputs[0].shape
        if shape is not None and shape.rank and shape[0]:
            rows.append(shape[0])
    return min(rows)


@dataclass(frozen=True)
class Called:
    """A concrete function, and tensors for its arguments in their order."""

    function: Any
    inputs: Sequence[Any]


def signature_called(function: Any, exchange: ReferenceIO) -> Called:
    """A signature with the inputs of an exchange; a lone input may have another name."""
    inputs = exchange.inputs
    if len(inputs) == 1:
        return Called(function, list(inputs.values()))
    return Called(function, [inputs[name] for name in Interface.of(function).keywords])


def method_called(root: Any, exchange: ReferenceIO) -> Called:
    """A method with the arguments of an exchange."""
    args, kwargs = exchange.inputs
    function = attribute_of(root, exchange.method).get_concrete_function(*args, **kwargs)
    flat = tf.nest.flatten(exchange.inputs, expand_composites=True)
    return Called(function, [value for value in flat if isinstance(value, tf.Tensor)])


def _for_signature(signature: Any, exchange: ReferenceIO) -> Mapping[str, Any]:
    """The inputs of an exchange by the names that a signature has; a lone one by its name."""
    specs, inputs = specs_of(signature), exchange.inputs
    if len(specs) == len(inputs) == 1:
        return dict(zip(specs, inputs.values(), strict=True))
    return dict(inputs)


def repeated(loaded: Loaded, name: str, exchange: ReferenceIO) -> ReferenceIO:
    """What a signature or method of the original gives for the same inputs another time."""
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
        """What is called for an exchange."""
        if exchange.method:
            return method_called(self._owner, exchange)
        return signature_called(self.signatures[name], exchange)

    def __call__(self, name: str, exchange: ReferenceIO) -> Mapping[str, np.ndarray]:
        """What a signature or method gives for the inputs of an exchange.

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

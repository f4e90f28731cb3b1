"""Freezes a SavedModel: its weights become constants of its graphs.

TensorFlow then computes beforehand what depends on weights alone, such as the layouts that kernels
are multiplied in. What is left are the signatures: there are no variables to train or to restore,
and a graph holds less than 2 GiB.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tensorflow as tf
from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2
from tensorflow.python.saved_model.loader_impl import parse_saved_model

from mbn_rewrite.errors import RewriteError, cause_of
from mbn_rewrite.frontends.saved_model.graph_editor import as_node_name
from mbn_rewrite.frontends.saved_model.saving import finish
from mbn_rewrite.frontends.saved_model.signature_calls import specs_of

_MOST_BYTES = 2**31 - 2**24  # of a protocol buffer, less what is no weight


def freeze(directory: Path, destination: Path) -> frozenset[str]:
    """Writes a SavedModel with constants for weights; methods beside signatures are left out.

    Returns:
        The names of its signatures.

    Raises:
        RewriteError: it writes to its variables, uses tables, or is too large.
    """
    loaded = tf.saved_model.load(str(directory))
    signatures = dict(loaded.signatures)
    for name, function in signatures.items():
        _check(name, function)
    root = tf.__internal__.tracking.AutoTrackable()
    try:
        frozen_functions = _Frozen()
        new = {name: frozen_functions.of(function) for name, function in signatures.items()}
        tf.saved_model.save(root, str(destination), signatures=new)
    except Exception as error:
        raise RewriteError(f"the model cannot be frozen: {cause_of(error)}") from error
    finish(parse_saved_model(str(directory)).meta_graphs[0], directory, destination)
    return frozenset(new)


def _check(name: str, function: Any) -> None:
    """Raises RewriteError where the weights of a signature cannot become constants."""
    variables = {id(variable.handle) for variable in function.graph.variables}
    size = sum(v.dtype.size * v.shape.num_elements() for v in function.graph.variables)
    if size > _MOST_BYTES:
        why = f"its weights take {size / 2**30:.1f} GiB, and a graph holds less than 2"
    elif any(id(tensor) not in variables for tensor in _resources(function)):
        why = "it uses tables or the like, which are no constants"
    elif any(node.op.startswith("Assign") for node in _nodes(function)):
        why = "it writes to its variables"
    else:
        return
    raise RewriteError(f"signature '{name}' cannot be frozen: {why}. Leave freeze out")


def _resources(function: Any) -> Iterator[Any]:
    return (x for x in function.captured_inputs if x.dtype in (tf.resource, tf.variant))


def _nodes(function: Any) -> Iterator[Any]:
    graph = function.graph.as_graph_def()
    yield from graph.node
    for inner in graph.library.function:
        yield from inner.node_def


class _Frozen:
    """Signatures that read no variable; those that do the same share their constants."""

    def __init__(self) -> None:
        self._known: dict[bytes, Any] = {}

    def of(self, function: Any) -> Any:
        """A concrete function with the interface of a signature."""
        frozen = convert_variables_to_constants_v2(function, lower_control_flow=False)
        arguments = [tensor.name.partition(":")[0] for tensor in frozen.inputs]
        graph = frozen.graph.as_graph_def().SerializeToString(deterministic=True)
        outputs = "".join(tensor.name for tensor in frozen.outputs).encode()
        frozen = self._known.setdefault(hashlib.sha256(graph + outputs).digest(), frozen)
        return _with_interface_of(function, frozen, arguments)


def _with_interface_of(function: Any, frozen: Any, arguments: Sequence[str]) -> Any:
    specs, names = specs_of(function), sorted(function.structured_outputs)
    keys = function.structured_input_signature[1]  # names as the loader has them
    by_node = {
        as_node_name(key): name for of in (keys, specs) for key, name in zip(of, specs, strict=True)
    }

    def signature(*tensors: Any) -> dict[str, Any]:
        given = dict(zip(specs, tensors, strict=True))
        results = frozen(*(given[by_node.get(argument, argument)] for argument in arguments))
        results = tf.nest.flatten(results)
        for name, result in zip(names, results, strict=True):
            result.set_shape(function.structured_outputs[name].shape)
        return dict(zip(names, results, strict=True))

    given = [
        tf.TensorSpec(spec.shape, spec.dtype, name=as_node_name(name))
        for name, spec in specs.items()
    ]
    concrete = tf.function(signature, autograph=False).get_concrete_function(*given)
    concrete._arg_keywords = list(specs)  # as for signatures that are not frozen
    concrete._num_positional_args = int(len(specs) == 1)
    return concrete

"""Writes functions, rewritten or as they were, as a SavedModel with the resources they need."""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2
from tensorflow.python.saved_model import fingerprinting_utils

from mbn_rewrite.errors import RewriteError, cause_of
from mbn_rewrite.frontends.saved_model.graph_editor import Rewritten, as_node_name
from mbn_rewrite.frontends.saved_model.loaded_model import Entry, Interface, Loaded
from mbn_rewrite.frontends.saved_model.set_inputs import WithSetInputs


def save(
    loaded: Loaded,
    functions: list[tuple[Entry, Rewritten | None]],
    initializer: Rewritten | None,
    source: Path,
    directory: Path,
) -> int:
    """Writes a SavedModel; returns the number of elements of its variables.

    Args:
        loaded: the original.
        functions: each function with its new graph, or None where it is carried over as it was.
        initializer: the function that TensorFlow 1 runs before all signatures, or None.
        source: the directory of the original.
        directory: the directory to write.

    Raises:
        RewriteError: the disk is full, or a function cannot be traced.
    """
    root = tf.__internal__.tracking.AutoTrackable()
    signatures = {}
    try:
        for entry, new in functions:
            if not entry.method:
                signatures[entry.name] = signature_of(entry, new)
        for method in dict.fromkeys(entry.method for entry, _ in functions if entry.method):
            concrete = [(entry, new) for entry, new in functions if entry.method == method]
            owner, name = _owner_of(root, method)
            setattr(owner, name, _method(loaded.methods[method], concrete))
        kept = _track(root, loaded, functions)
        if initializer is not None:
            _hold(root, "initializer", _Initializer(initializer, loaded.asset_paths))
        tf.saved_model.save(root, str(directory), signatures=signatures)
    except Exception as error:
        raise RewriteError(f"the rewritten model cannot be written: {cause_of(error)}") from error
    finish(loaded.meta_graph, source, directory)
    return sum(map(size_of, kept))


# -------------------------------------------------------------------------------- functions


def imported(new: Rewritten, interface: Interface | None, tensors: list[Any]) -> Any:
    """Imports a graph into the function that is being traced; returns its outputs."""
    graph = tf.compat.v1.get_default_graph()
    inputs = {
        f"{name}:0": graph.capture(tensor)
        for name, tensor in zip(new.arguments, tensors, strict=True)
    }
    for name, external in new.captures.items():
        if name not in new.arguments:
            handle = external.handle if isinstance(external, tf.Variable) else external
            inputs[f"{name}:0"] = graph.capture(handle)
    body = type(new.graph_def)(versions=new.graph_def.versions, library=new.graph_def.library)
    body.node.extend(node for node in new.graph_def.node if f"{node.name}:0" not in inputs)
    read = {source for node in body.node for source in _tensors(node)}
    results = tf.graph_util.import_graph_def(
        body,
        input_map={name: tensor for name, tensor in inputs.items() if name in read},
        return_elements=[name for name in new.outputs if name not in inputs],
        name="",
    )
    given = iter(results)
    outputs = [inputs[name] if name in inputs else next(given) for name in new.outputs]
    if interface is None:
        return outputs
    for output, spec in zip(outputs, interface.outputs, strict=True):
        output.set_shape(spec.shape)
    return interface.packed(outputs)


def _tensors(node: Any) -> list[str]:
    return [
        source if ":" in source else f"{source}:0"
        for source in node.input
        if not source.startswith("^")
    ]


def signature_of(entry: Entry, new: Rewritten | None) -> Any:
    """A concrete function with the arguments of a signature."""
    if new is None:
        is_set = isinstance(entry.function, WithSetInputs)
        return entry.function.concrete() if is_set else entry.function
    interface = entry.interface
    specs = [
        tf.TensorSpec(spec.shape, spec.dtype, name=as_node_name(name))
        for name, spec in zip(interface.keywords, interface.inputs, strict=True)
    ]

    def signature(*tensors: Any) -> Any:
        return imported(new, interface, list(tensors))

    if new.has_frames:
        # Control flow of TensorFlow 1 is known by the names of its nodes alone, which the
        # tracing of a tf.function does not understand.
        function = tf.compat.v1.wrap_function(signature, specs)
    else:
        traced = tf.function(signature, autograph=False, jit_compile=new.compiled or None)
        function = traced.get_concrete_function(*specs)
    # Names that are no identifiers cannot be those of arguments; TensorFlow's own loader of
    # its first version's models sets them in this way.
    function._arg_keywords = list(interface.keywords)
    function._num_positional_args = int(len(specs) == 1)
    return function


def _method(declared: inspect.Signature, concrete: list[tuple[Entry, Rewritten | None]]) -> Any:
    """A method of the root object, traced for all that the original was traced for."""

    def method(*args: Any, **kwargs: Any) -> Any:
        entry, new = next(pair for pair in concrete if _takes(pair[0], declared, args, kwargs))
        flat = tf.nest.flatten((args, kwargs), expand_composites=True)
        tensors = [value for value in flat if isinstance(value, tf.Tensor)]
        if new is None:
            return entry.interface.packed(tf.nest.flatten(entry.function(*tensors)))
        return imported(new, entry.interface, tensors)

    method.__signature__ = declared  # type: ignore[attr-defined]
    compiled = any(new is not None and new.compiled for _, new in concrete)
    function = tf.function(method, autograph=False, jit_compile=compiled or None)
    for entry, _ in concrete:
        args, kwargs = entry.interface.arguments
        function.get_concrete_function(*args, **kwargs)
    return function


def _takes(entry: Entry, declared: inspect.Signature, args: Any, kwargs: Any) -> bool:
    """Whether a function was traced for arguments like these."""

    def described(args: Any, kwargs: Any) -> Any:
        bound = declared.bind(*args, **kwargs)
        bound.apply_defaults()
        return _described(dict(bound.arguments))

    return bool(described(*entry.interface.arguments) == described(args, kwargs))


def _described(value: Any) -> Any:
    """Arguments with their tensors described, so that they can be compared."""
    if isinstance(value, Mapping):
        return {key: _described(value[key]) for key in value}
    if isinstance(value, (list, tuple)):
        return [_described(part) for part in value]
    if isinstance(value, (tf.Tensor, tf.TensorSpec)):
        return (value.dtype, str(value.shape))  # an open size equals nothing else
    parts = tf.nest.flatten(value, expand_composites=True)
    return value if parts == [value] else [_described(part) for part in parts]


# ------------------------------------------------------------------------------ resources


def _owner_of(root: Any, path: str) -> tuple[Any, str]:
    """The object that has a method such as "encoder.encode", made if need be, and its name."""
    *names, last = path.split(".")
    for name in names:
        if not hasattr(root, name):
            setattr(root, name, tf.__internal__.tracking.AutoTrackable())
        root = getattr(root, name)
    return root, last


def size_of(variable: Any) -> int:
    """Number of elements of a variable."""
    known = variable.shape.num_elements()
    return int(tf.size(variable)) if known is None else known


def _hold(root: Any, name: str, value: Any) -> None:
    """Sets an attribute, under a longer name where a method has this one."""
    while hasattr(root, name):
        name = f"_{name}"
    setattr(root, name, value)


def _track(root: Any, loaded: Loaded, functions: list[tuple[Entry, Rewritten | None]]) -> list[Any]:
    """Makes the new root own what its functions use; returns its variables."""
    captured: dict[int, Any] = {}
    for entry, new in functions:
        if new is None:
            variables = {id(v): v for v in entry.function.graph.variables}
            captured |= variables | {id(t): t for t in entry.function.captured_inputs}
        else:
            captured |= {id(external): external for external in new.captures.values()}
    kept = [x for x in captured.values() if isinstance(x, tf.Variable)]
    ids = {id(variable) for variable in kept}
    for name, variable in loaded.attributes.items():
        if id(variable) in ids:
            _hold(root, name, variable)
    for name, listed in loaded.lists.items():
        _hold(root, name, [variable for variable in listed if id(variable) in ids])
    _hold(root, "variables", kept)
    resources = [x for x in loaded.resources if _is_used(x, captured)]
    if resources:
        _hold(root, "resources", resources)
    return kept


class _Initializer(tf.saved_model.experimental.TrackableResource):
    """Initializer to run when the model is loaded: TensorFlow 1 fills its tables in the graph."""

    def __init__(self, initializer: Rewritten, assets: list[Any]) -> None:
        super().__init__()
        self._assets = assets
        self._paths = [asset.asset_path for asset in assets]
        self._rewritten = initializer

    def _create_resource(self) -> Any:
        return tf.constant(1.0)  # there is no resource to hold: the graph names its own

    def _initialize(self) -> Any:
        return imported(self._rewritten, None, self._paths)[0]

    def _destroy_resource(self) -> None:
        pass


def _is_used(resource: Any, captured: Mapping[int, Any]) -> bool:
    """Whether functions use a table or the like; assets may be read when a table is filled."""
    return hasattr(resource, "asset_path") or id(resource.resource_handle) in captured


def finish(meta_graph: Any, source: Path, directory: Path) -> None:
    """Gives the written model the properties that `tf.saved_model.save` has no argument for."""
    if (source / "assets.extra").is_dir():
        shutil.copytree(source / "assets.extra", directory / "assets.extra")
    file = directory / "saved_model.pb"
    proto = saved_model_pb2.SavedModel()
    proto.ParseFromString(file.read_bytes())
    (new,) = proto.meta_graphs
    before = new.SerializeToString(deterministic=True)
    new.meta_info_def.tags[:] = meta_graph.meta_info_def.tags
    for key, signature in meta_graph.signature_def.items():
        if key in new.signature_def and not key.startswith("__"):
            new.signature_def[key].method_name = signature.method_name
            for name, value in signature.defaults.items():
                if name not in new.signature_def[key].inputs:
                    continue  # it was set
                new.signature_def[key].defaults[name].CopyFrom(value)
    if new.SerializeToString(deterministic=True) != before:
        file.write_bytes(proto.SerializeToString(deterministic=True))
        (directory / "fingerprint.pb").unlink(missing_ok=True)
        fingerprinting_utils.write_fingerprint(str(directory))

"""Loads a SavedModel and says which of its functions to carry over.

Carried over are the signatures and the methods of the root object; left out, and listed, is
what only makes sense in training or belongs to inner objects.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tensorflow as tf
from google.protobuf import text_format
from tensorflow.core.protobuf import saved_model_pb2

from mbn_rewrite.errors import NO_SPACE, RewriteError, cause_of
from mbn_rewrite.frontends import effects
from mbn_rewrite.frontends.saved_model import admission
from mbn_rewrite.frontends.saved_model.files import GRAPH_FILES
from mbn_rewrite.frontends.saved_model.strip_unused import Functions, SlimCopy, functions_of

# Methods that Keras saves for its own loading and training.
_OF_KERAS = {
    *("call_and_return_all_conditional_losses", "call_and_return_conditional_losses"),
}
# `variables` is written anew.
_VARIABLE_LISTS = ("trainable_variables", "non_trainable_variables")
_TRAINING_ARGUMENTS = {"training", "is_training", "train"}


@dataclass(frozen=True)
class Interface:
    """How a function is called, without the function.

    Attributes:
        keywords: the names of the arguments of a signature, in the order of `inputs`.
        inputs: a tf.TensorSpec for each tensor that it takes.
        arguments: all that it takes, as (args, kwargs) of tf.TensorSpec and Python values.
        outputs: a tf.TensorSpec for each tensor that it gives.
        structure: what it gives, with specifications in the place of tensors.
    """

    keywords: tuple[str, ...]
    inputs: tuple[Any, ...]
    arguments: Any
    outputs: tuple[Any, ...]
    structure: Any

    @classmethod
    def of(cls, function: Any) -> Interface:
        """That of a tf.ConcreteFunction."""
        captured = len(function.captured_inputs)
        inputs = function.inputs[: len(function.inputs) - captured]
        return cls(
            tuple(getattr(function, "_arg_keywords", None) or ()),
            tuple(tf.TensorSpec(t.shape, t.dtype) for t in inputs),
            function.structured_input_signature,
            tuple(tf.TensorSpec(t.shape, t.dtype) for t in function.graph.outputs),
            tf.nest.map_structure(_as_spec, function.structured_outputs),
        )

    def packed(self, tensors: list[Any]) -> Any:
        """Flat outputs in the structure that the function gives."""
        given = iter(tensors)
        flat = tf.nest.flatten(self.structure, expand_composites=True)
        filled = [x if x is None else next(given) for x in flat]
        return tf.nest.pack_sequence_as(self.structure, filled, expand_composites=True)


def _as_spec(value: Any) -> Any:
    """A tensor, or what consists of several, as its specification."""
    is_tensor = isinstance(value, (tf.Tensor, tf.SparseTensor, tf.RaggedTensor))
    return tf.type_spec_from_value(value) if is_tensor else value


@dataclass
class Entry:
    """A function to carry over.

    Attributes:
        name: the key of a signature, or "method(arguments)".
        method: the attribute of the root object that it is called by, or "" for a signature.
        interface: how it is called.
        function: the tf.ConcreteFunction; None once it is no longer needed.
    """

    name: str
    method: str
    interface: Interface
    function: Any


@dataclass
class Loaded:
    """A SavedModel in memory.

    Attributes:
        root: what tf.saved_model.load gave.
        meta_graph: its MetaGraphDef as stored, but for the graph.
        entries: the functions to carry over.
        left_out: what is not carried over: a name, and why.
        methods: the methods to carry over, by name, and the arguments that they declare.
        attributes: the variables that are attributes of the root object, by name.
        lists: the lists of variables that Keras and TF-Hub modules offer, by name.
        resources: tables and the like, and assets.
        asset_paths: the assets of TensorFlow 1, which are arguments of its initializer.
        copy: what it was loaded from, if not from the SavedModel itself.
        in_graph: what stands in the place of variables that TensorFlow 1 keeps as nodes of its
            graph, by name.
    """

    root: Any
    meta_graph: Any
    entries: list[Entry]
    left_out: dict[str, str] = field(default_factory=dict)
    methods: dict[str, inspect.Signature] = field(default_factory=dict)
    attributes: dict[str, Any] = field(default_factory=dict)
    lists: dict[str, list[Any]] = field(default_factory=dict)
    resources: list[Any] = field(default_factory=list)
    asset_paths: list[Any] = field(default_factory=list)
    copy: SlimCopy | None = None
    in_graph: dict[str, Any] = field(default_factory=dict)

    @property
    def signatures(self) -> dict[str, Any]:
        """The signatures to carry over."""
        return {entry.name: entry.function for entry in self.entries if not entry.method}

    def release(self, names: Iterable[str]) -> None:
        """Lets go of functions, which hold more memory than small models do."""
        gone = set(names)
        for entry in self.entries:
            if entry.name in gone:
                entry.function = None
        if not hasattr(self.root, "prune"):  # TensorFlow 1 keeps variables in its functions
            self.root = None

    @property
    def initializer(self) -> Any:
        """The function that TensorFlow 1 runs before all signatures, or None.

        Its arguments are the paths of the assets. TensorFlow keeps it where it is not public.
        """
        return getattr(getattr(self.root, "initializer", None), "_init_fn", None)

    def variable_in_graph(self, name: str) -> Any:
        """A tf.Variable in the place of one that TensorFlow 1 keeps as a node of its graph.

        Raises:
            RewriteError: to read its value does more than that.
        """
        if name not in self.in_graph:
            reference = self.root.graph.get_operation_by_name(name).outputs[0]
            with self.root.graph.as_default(), tf.control_dependencies(None):
                value = tf.identity(reference)
            read = self.root.prune([], value)
            if acts := effects.in_graph(read.graph.as_graph_def()):
                raise RewriteError(f"to read the variable '{name}' {effects.in_words(acts)}")
            self.in_graph[name] = tf.Variable(read(), name=name, trainable=False)
        return self.in_graph[name]


def load(
    source: Path,
    tags: Sequence[str] | None = None,
    signatures: Sequence[str] | None = None,
    trusted: bool = False,
) -> Loaded:
    """Loads a SavedModel.

    Raises:
        RewriteError: it cannot be loaded, has no such tags or signatures, or would act when it
            is loaded and is not trusted.
    """
    if isinstance(signatures, str):
        signatures = [signatures]
    if isinstance(tags, str):
        tags = [tags]
    meta_graph = _meta_graph(source, tags)
    stored = sorted(key for key in meta_graph.signature_def if not key.startswith("__"))
    _check_signatures(source, stored, signatures)
    if not trusted:
        admission.check_assets(source, meta_graph)
    asked_for = [key for key in stored if signatures is None or key in signatures]
    left_out = {f"signature {key}": "not asked for" for key in stored if key not in asked_for}
    methods: list[str] = []
    copy: SlimCopy | None = None
    try:
        if meta_graph.HasField("object_graph_def"):
            functions = functions_of(meta_graph)
            methods = _methods_of(functions, left_out) if signatures is None else []
            wanted = [functions.signatures[key] for key in asked_for]
            wanted += [name for method in methods for name in functions.methods[method]]
            copy = SlimCopy(source, meta_graph, wanted)
            admission.check_size(source, meta_graph)
            if not trusted:
                admission.check_objects(source, meta_graph)
            # The checkpoint has values of variables that the copy leaves out.
            options = tf.saved_model.LoadOptions(allow_partial_checkpoint=copy.has_variables)
            root = tf.saved_model.load(str(copy.path), options=options)
        else:  # TensorFlow 1 has neither methods nor objects
            admission.check_size(source, meta_graph)
            if not trusted:
                admission.check_graph(source, meta_graph)
            root = tf.saved_model.load(str(source), tags=list(meta_graph.meta_info_def.tags))
    except RewriteError:
        raise
    except Exception as error:
        cause = _cause(error)
        if copy is not None:
            cause = cause.replace(str(copy.path), str(source))
        raise RewriteError(f"{source} cannot be loaded: {cause}") from error
    for part in ("graph_def", "object_graph_def"):  # large, and of no more use
        meta_graph.ClearField(part)
    loaded = Loaded(root, meta_graph, [], left_out, copy=copy)
    for key in asked_for:
        function = root.signatures[key]
        loaded.entries.append(Entry(key, "", Interface.of(function), function))
    for name in methods:
        function = _restored(root, name)
        if function is None:
            left_out[name] = "the loaded model does not have it under this name"
        else:
            _add_method(loaded, name, function)
    _note_holdings(loaded)
    return loaded


def _methods_of(functions: Functions, left_out: dict[str, str]) -> list[str]:
    """The methods to carry over; notes those that are not."""
    if functions.inner:
        left_out[f"{functions.inner} functions of inner objects"] = "of layers and the like"
    for name in functions.bare:
        why = _why_not(name, [name])
        left_out[name] = why or "it is a single concrete function, which is no method"
    for name, number in functions.contained.items():
        left_out[f"{number} functions in {name}"] = "it is a list, tuple or dict"
    reasons = {name: _why_not(name, traces) for name, traces in functions.methods.items()}
    left_out |= {name: why for name, why in reasons.items() if why}
    return [name for name, why in reasons.items() if not why]


def _restored(root: Any, path: str) -> Any:
    """A method with its functions, or None.

    Classes that are registered load as they like, and a name may hold a dot.
    """
    try:
        function = attribute_of(root, path)
    except AttributeError:
        return None
    return function if getattr(function, "concrete_functions", None) else None


def _note_holdings(loaded: Loaded) -> None:
    """Notes what the root object holds beside functions."""
    for name, value in vars(loaded.root).items():
        if isinstance(value, tf.Variable):
            loaded.attributes[name] = value
        elif name in _VARIABLE_LISTS and isinstance(value, Sequence):
            loaded.lists[name] = list(value)
    loaded.asset_paths = list(getattr(loaded.root, "asset_paths", ()))
    loaded.resources = [
        node
        for node in tf.train.TrackableView(loaded.root).descendants()
        if not isinstance(node, tf.Variable)
        and (hasattr(node, "asset_path") or hasattr(node, "resource_handle"))
    ]


def _why_not(path: str, traces: Sequence[str]) -> str:
    """Why a method is not carried over, as far as is known before loading, or "".

    Args:
        path: the method.
        traces: the names of its concrete functions.
    """
    name = path.rpartition(".")[2]
    if name in _OF_KERAS:
        return "Keras trains by it"
    if name.startswith("_") and name != "__call__":
        return "it is private"
    if not name:
        return "it has no name to be called by"
    if not traces:
        return "no graph of it is stored: it was never called, or with what cannot be stored"
    return ""


def attribute_of(root: Any, path: str) -> Any:
    """What an object has under a path such as "encoder.encode"."""
    for name in path.split("."):
        root = getattr(root, name)
    return root


def _meta_graph(source: Path, tags: Sequence[str] | None) -> Any:
    """The MetaGraphDef with these tags, or the only one."""
    proto = saved_model_pb2.SavedModel()
    file = next(source / name for name in GRAPH_FILES if (source / name).is_file())
    try:
        if file.suffix == ".pb":
            proto.ParseFromString(file.read_bytes())
        else:
            text_format.Parse(file.read_text(), proto)
    except OSError as error:
        raise RewriteError(f"{file} cannot be read: {cause_of(error)}") from error
    except Exception as error:
        raise RewriteError(f"{file} is damaged; it may be cut short") from error
    if not proto.meta_graphs:
        raise RewriteError(f"{file} is damaged or empty: it holds no graph")
    found = {frozenset(graph.meta_info_def.tags): graph for graph in proto.meta_graphs}
    listed = " and ".join("{" + ", ".join(sorted(names)) + "}" for names in found)
    if tags is None:
        if len(found) > 1 and frozenset({"serve"}) not in found:
            raise RewriteError(f"{source} has graphs tagged {listed}. Say which: --tags")
        return found.get(frozenset({"serve"}), proto.meta_graphs[0])
    if frozenset(tags) not in found:
        raise RewriteError(f"{source} has no graph tagged {', '.join(tags)}; there is {listed}")
    return found[frozenset(tags)]


def _check_signatures(source: Path, stored: list[str], wanted: Sequence[str] | None) -> None:
    if not stored:
        raise RewriteError(f"{source} has no signatures, so there is nothing to serve")
    if wanted is not None and not wanted:
        raise RewriteError(f"no signature is asked for; there is {', '.join(stored)}")
    unknown = sorted(set(wanted or ()) - set(stored))
    if unknown:
        raise RewriteError(
            f"{source} has no signature {', '.join(unknown)}; there is {', '.join(stored)}"
        )


def _cause(error: Exception) -> str:
    text = str(error)
    if "not registered" in text:
        # "Op type not registered 'Foo' in binary running on <host>. Make sure ..."
        return (
            f"{text.partition(' in binary')[0]}. Import the library that defines it first "
            "(--import_modules)"
        )
    cause = cause_of(error)
    return cause if cause == NO_SPACE else f"{cause} It may be damaged or cut short"


def _add_method(loaded: Loaded, name: str, function: Any) -> None:
    declared = function.function_spec
    defaults = declared.default_values
    empty = inspect.Parameter.empty
    loaded.methods[name] = inspect.Signature(
        [
            inspect.Parameter(p.name, p.kind, default=defaults.get(p.name, empty))
            for p in declared.function_type.parameters.values()
        ]
    )
    taken = {entry.name for entry in loaded.entries} | set(loaded.left_out)
    for concrete in function.concrete_functions:
        label = shown = f"{name}{_arguments(concrete)}"
        number = 2
        while label in taken:  # arguments may differ in what is not shown
            label, number = f"{shown}#{number}", number + 1
        taken.add(label)
        if _is_for_training(concrete):
            loaded.left_out[label] = "it is for training"
        else:
            loaded.entries.append(Entry(label, name, Interface.of(concrete), concrete))


def _is_for_training(function: Any) -> bool:
    arguments, keywords = function.structured_input_signature
    names = [p.name for p in function.function_type.parameters.values()]
    given = dict(zip(names, arguments, strict=False)) | dict(keywords)
    return any(given.get(name) is True for name in _TRAINING_ARGUMENTS)


def _arguments(function: Any) -> str:
    arguments, keywords = function.structured_input_signature

    def shown(value: Any) -> str:
        if isinstance(value, tf.TensorSpec):
            return f"{value.dtype.name}{list(value.shape) if value.shape.rank else ''}"
        return repr(value) if isinstance(value, (bool, int, float, str, type(None))) else "..."

    listed = [shown(value) for value in arguments]
    listed += [f"{key}={shown(value)}" for key, value in keywords.items()]
    return f"({', '.join(listed)})"

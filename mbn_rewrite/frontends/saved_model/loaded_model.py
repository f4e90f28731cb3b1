"""A loaded SavedModel: the functions to carry over, their interfaces, and their resources."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import tensorflow as tf

from mbn_rewrite.errors import RewriteError
from mbn_rewrite.frontends import effects
from mbn_rewrite.frontends.saved_model.strip_unused import SlimCopy


@dataclass(frozen=True)
class Interface:
    """The interface of a function, without the function.

    Attributes:
        keywords: the names of the arguments of a signature, in the order of `inputs`.
        inputs: a tf.TensorSpec for each tensor that it takes.
        arguments: all arguments, as (args, kwargs) of tf.TensorSpec and Python values.
        outputs: a tf.TensorSpec for each tensor that it gives.
        structure: its outputs, with specifications in place of tensors.
    """

    keywords: tuple[str, ...]
    inputs: tuple[Any, ...]
    arguments: Any
    outputs: tuple[Any, ...]
    structure: Any

    @classmethod
    def of(cls, function: Any) -> Interface:
        """The interface of a tf.ConcreteFunction."""
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
    """The specification of a tensor, of whatever kind; other values as they are."""
    is_tensor = isinstance(value, (tf.Tensor, tf.SparseTensor, tf.RaggedTensor))
    return tf.type_spec_from_value(value) if is_tensor else value


@dataclass
class Entry:
    """A function to carry over.

    Attributes:
        name: the key of a signature, or "method(arguments)".
        method: the attribute of the root object that it is called by, or "" for a signature.
        interface: its arguments and outputs.
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
        root: the object that tf.saved_model.load gave.
        meta_graph: its MetaGraphDef as stored, but for the graph.
        entries: the functions to carry over.
        left_out: name of a function that is not carried over -> why.
        methods: the methods to carry over, by name, and the arguments that they declare.
        attributes: the variables that are attributes of the root object, by name.
        lists: the lists of variables that Keras and TF-Hub modules offer, by name.
        resources: tables and the like, and assets.
        asset_paths: the assets of TensorFlow 1, which are arguments of its initializer.
        copy: the copy that it was loaded from, if any.
        in_graph: tf.Variables in place of those that TensorFlow 1 keeps as nodes of its graph, by
            name.
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

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences on inputs that were set for good."""
        return tuple(
            f"'{entry.name}' has no input '{name}' any more: it is set to {value}"
            for entry in self.entries
            for name, value in getattr(entry.function, "set_to", {}).items()
        )

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
        """A tf.Variable in place of one that TensorFlow 1 keeps as a node of its graph.

        Raises:
            RewriteError: reading its value would have other effects.
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


def attribute_of(root: Any, path: str) -> Any:
    """The attribute of an object under a path such as "encoder.encode"."""
    for name in path.split("."):
        root = getattr(root, name)
    return root

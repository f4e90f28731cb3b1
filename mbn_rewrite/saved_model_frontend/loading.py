"""Loads a SavedModel and says which of its functions to carry over.

Carried over are the signatures and the methods of the root object; left out, and listed, is
what only makes sense in training or belongs to inner objects.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tensorflow as tf
from google.protobuf import text_format
from tensorflow.core.protobuf import saved_model_pb2

from mbn_rewrite.errors import RewriteError, cause_of
from mbn_rewrite.saved_model_frontend.files import GRAPH_FILES
from mbn_rewrite.saved_model_frontend.slimming import functions_of, slimmed

# Methods that Keras saves for its own loading and training.
_OF_KERAS = {
    *("call_and_return_all_conditional_losses", "call_and_return_conditional_losses"),
    *("_default_save_signature", "_call_fn"),
}
_TRAINING_ARGUMENTS = {"training", "is_training", "train"}


@dataclass(frozen=True)
class Entry:
    """A function to carry over.

    Attributes:
        name: the key of a signature, or "method(arguments)".
        method: the attribute of the root object that it is called by, or "" for a signature.
        function: the tf.ConcreteFunction.
    """

    name: str
    method: str
    function: Any


@dataclass
class Loaded:
    """A SavedModel in memory.

    Attributes:
        root: what tf.saved_model.load gave.
        meta_graph: its MetaGraphDef, as stored.
        entries: the functions to carry over.
        left_out: what is not carried over: a name, and why.
    """

    root: Any
    meta_graph: Any
    entries: list[Entry]
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def signatures(self) -> dict[str, Any]:
        """The signatures to carry over."""
        return {entry.name: entry.function for entry in self.entries if not entry.method}

    @property
    def initializer(self) -> Any:
        """The function that TensorFlow 1 runs before all signatures, or None.

        Its arguments are the paths of the assets. TensorFlow keeps it where it is not public.
        """
        return getattr(getattr(self.root, "initializer", None), "_init_fn", None)

    def value_in_graph(self, name: str) -> Any:
        """The value of a variable that TensorFlow 1 keeps as a node of its graph."""
        op = self.root.graph.get_operation_by_name(name)
        reads = [reader for reader in op.outputs[0].consumers() if reader.type == "Identity"]
        if not reads:
            raise RewriteError(f"the variable '{name}' is never read as a value")
        return self.root.prune([], reads[0].outputs[0])().numpy()


def load(
    source: Path, tags: Sequence[str] | None = None, signatures: Sequence[str] | None = None
) -> Loaded:
    """Loads a SavedModel.

    Raises:
        RewriteError: it cannot be loaded, or has no such tags or signatures.
    """
    meta_graph = _meta_graph(source, tags)
    stored = sorted(key for key in meta_graph.signature_def if not key.startswith("__"))
    _check_signatures(source, stored, signatures)
    asked_for = [key for key in stored if signatures is None or key in signatures]
    left_out = {f"signature {key}": "not asked for" for key in stored if key not in asked_for}
    try:
        if meta_graph.HasField("object_graph_def"):
            root = _load_slim(source, meta_graph, asked_for, signatures is None)
        else:  # of TensorFlow 1
            root = tf.saved_model.load(str(source), tags=list(meta_graph.meta_info_def.tags))
    except RewriteError:
        raise
    except Exception as error:
        raise RewriteError(f"{source} cannot be loaded: {_cause(error)}") from error
    loaded = Loaded(root, meta_graph, [], left_out)
    for key in asked_for:
        loaded.entries.append(Entry(key, "", root.signatures[key]))
    for name in sorted(vars(root)):
        function = getattr(root, name)
        if hasattr(function, "concrete_functions"):
            _add_method(loaded, name, function)
    return loaded


def _load_slim(source: Path, meta_graph: Any, signatures: list[str], methods: bool) -> Any:
    """Loads the functions that may be carried over, and nothing else."""
    keys, named = functions_of(meta_graph)
    wanted = [keys[key] for key in signatures if key in keys]
    if methods:
        wanted += [f for name, fs in named.items() if name not in _OF_KERAS for f in fs]
    slim = type(meta_graph)()
    slim.CopyFrom(meta_graph)
    with slimmed(source, slim, wanted) as directory:
        return tf.saved_model.load(str(directory))


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
    return f"{cause_of(error)} It may be damaged or cut short"


def _add_method(loaded: Loaded, name: str, function: Any) -> None:
    for concrete in function.concrete_functions:
        label = f"{name}{_arguments(concrete)}"
        if _is_for_training(concrete):
            loaded.left_out[label] = "it is for training"
        else:
            loaded.entries.append(Entry(label, name, concrete))


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

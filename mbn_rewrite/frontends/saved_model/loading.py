"""Loads a SavedModel and decides which of its functions are carried over.

The signatures and the methods of the root object are. What only makes sense in training or belongs
to inner objects is left out, and listed.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tensorflow as tf

from mbn_rewrite.errors import NO_SPACE, RewriteError, cause_of
from mbn_rewrite.frontends.saved_model import load_checks
from mbn_rewrite.frontends.saved_model.loaded_model import Entry, Interface, Loaded, attribute_of
from mbn_rewrite.frontends.saved_model.meta_graph import check_signatures, read_meta_graph
from mbn_rewrite.frontends.saved_model.set_inputs import with_inputs_set
from mbn_rewrite.frontends.saved_model.strip_unused import Functions, SlimCopy, functions_of

# Methods that Keras saves for its own loading and training.
_OF_KERAS = {
    *("call_and_return_all_conditional_losses", "call_and_return_conditional_losses"),
}
# `variables` is written anew.
_VARIABLE_LISTS = ("trainable_variables", "non_trainable_variables")
_TRAINING_ARGUMENTS = {"training", "is_training", "train"}


def load(
    source: Path,
    tags: Sequence[str] | None = None,
    signatures: Sequence[str] | None = None,
    trusted: bool = False,
    set_input: Mapping[str, Any] | None = None,
) -> Loaded:
    """Loads a SavedModel.

    Args:
        source, ...: as for `rewrite_saved_model`.

    Raises:
        RewriteError: it cannot be loaded, has no such tags, signatures or inputs, or would act when
            it is loaded and is not trusted.
    """
    if isinstance(signatures, str):
        signatures = [signatures]
    if isinstance(tags, str):
        tags = [tags]
    meta_graph = read_meta_graph(source, tags)
    stored = sorted(key for key in meta_graph.signature_def if not key.startswith("__"))
    check_signatures(source, stored, signatures)
    if not trusted:
        load_checks.check_assets(source, meta_graph)
    asked_for = [key for key in stored if signatures is None or key in signatures]
    left_out = {f"signature {key}": "not asked for" for key in stored if key not in asked_for}
    methods: list[str] = []
    copy: SlimCopy | None = None
    if meta_graph.HasField("object_graph_def"):  # TensorFlow 1 has neither methods nor objects
        with _blaming(source):
            stored_functions = functions_of(meta_graph)
            methods = _methods_of(stored_functions, left_out) if signatures is None else []
            copy = _copy_of(source, meta_graph, stored_functions, asked_for, methods)
    with _blaming(source, copy):
        root = _root(source, meta_graph, copy, trusted)
    for part in ("graph_def", "object_graph_def"):  # large, and of no more use
        meta_graph.ClearField(part)
    loaded = Loaded(root, meta_graph, [], left_out, copy=copy)
    functions = {key: root.signatures[key] for key in asked_for}
    for key, function in with_inputs_set(source, functions, set_input).items():
        loaded.entries.append(Entry(key, "", Interface.of(function), function))
    for name in methods:
        function = _restored(root, name)
        if function is None:
            left_out[name] = "the loaded model does not have it under this name"
        else:
            _add_method(loaded, name, function)
    _note_holdings(loaded)
    return loaded


@contextmanager
def _blaming(source: Path, copy: SlimCopy | None = None) -> Iterator[None]:
    """Context manager that reports errors as those of a SavedModel, even if a copy is loaded."""
    try:
        yield
    except RewriteError:
        raise
    except Exception as error:
        cause = _cause(error)
        if copy is not None:
            cause = cause.replace(str(copy.path), str(source))
        raise RewriteError(f"{source} cannot be loaded: {cause}") from error


def _copy_of(
    source: Path, meta_graph: Any, functions: Functions, signatures: list[str], methods: list[str]
) -> SlimCopy:
    """A copy with these signatures and methods alone; see `SlimCopy`."""
    wanted = [functions.signatures[key] for key in signatures]
    wanted += [name for method in methods for name in functions.methods[method]]
    return SlimCopy(source, meta_graph, wanted)


def _root(source: Path, meta_graph: Any, copy: SlimCopy | None, trusted: bool) -> Any:
    """The root object, loaded once it is known what else loading would do."""
    load_checks.check_size(source, meta_graph)
    if not trusted:
        check = load_checks.check_graph if copy is None else load_checks.check_objects
        check(source, meta_graph)
    if copy is None:
        return tf.saved_model.load(str(source), tags=list(meta_graph.meta_info_def.tags))
    # The checkpoint has values of variables that the copy leaves out.
    options = tf.saved_model.LoadOptions(allow_partial_checkpoint=copy.has_variables)
    return tf.saved_model.load(str(copy.path), options=options)


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
    """Notes the variables, tables and assets of the root object."""
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

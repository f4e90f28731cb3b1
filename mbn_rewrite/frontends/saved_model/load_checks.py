"""Checks of a MetaGraphDef before TensorFlow loads it, since loading runs parts of a model.

These are the functions that make and fill tables, those that restore variables from a checkpoint,
and the initializer of TensorFlow 1. They are inspected as data.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tensorflow.core.framework import variable_pb2
from tensorflow.core.protobuf import meta_graph_pb2

from mbn_rewrite.errors import RewriteError
from mbn_rewrite.frontends import effects, limits
from mbn_rewrite.frontends.effects import Effect
from mbn_rewrite.frontends.saved_model.files import check_inside

# The methods of an object that loading runs, or that run when it is gone.
_RUN = ("_create_resource", "_initialize", "_destroy_resource")
_STRING = 7  # DT_STRING


def check_size(source: Path, meta_graph: Any) -> None:
    """Raises RewriteError where calls that multiply would make a graph of absurd size."""
    size = effects.inlined_size(meta_graph.graph_def)
    if size > limits.INLINED_NODES:
        raise RewriteError(
            f"{source} has functions that call each other so often that their graph would have "
            f"{size:,} operations; no model has more than {limits.INLINED_NODES:,}"
        )


def check_assets(source: Path, meta_graph: Any) -> None:
    """Raises RewriteError where an asset is a file outside of the SavedModel."""
    for name in (asset.filename for asset in _assets(meta_graph)):
        if Path(name).is_absolute() or ".." in Path(name).parts or "://" in name:
            raise RewriteError(
                f"{source} names {name!r} as an asset, which lies outside of it and would be "
                "copied into what is written. If you trust whoever made the model, pass --trusted "
                "(trusted=True in Python)"
            )
        check_inside(source, source / "assets" / name)


def _assets(meta_graph: Any) -> list[Any]:
    """The AssetFileDefs of a graph: old files have them in a collection."""
    found = list(meta_graph.asset_file_def)
    if "saved_model_assets" in meta_graph.collection_def:
        for packed in meta_graph.collection_def["saved_model_assets"].any_list.value:
            found.append(meta_graph_pb2.AssetFileDef())
            packed.Unpack(found[-1])
    return found


def check_objects(source: Path, meta_graph: Any) -> None:
    """Checks the functions that loading a SavedModel of TensorFlow 2 would run.

    Raises:
        RewriteError: they do more than make and fill the objects of the model.
    """
    objects = meta_graph.object_graph_def
    library = effects.library_of(meta_graph.graph_def)
    for name in dict.fromkeys(_run_by_loading(objects)):
        found = effects.in_functions(library, [name])
        found += _reads_elsewhere(objects, library, name)
        _refuse(source, found)


def _run_by_loading(objects: Any) -> Iterator[str]:
    """The names of the functions that loading runs."""

    def names(node_id: int) -> Iterable[str]:
        node = objects.nodes[node_id]
        if node.WhichOneof("kind") == "bare_concrete_function":
            return [node.bare_concrete_function.concrete_function_name]
        return list(node.function.concrete_functions)

    for node in objects.nodes:
        for child in node.children:
            if child.local_name in _RUN:
                yield from names(child.node_id)
        for saved in node.saveable_objects.values():
            for node_id in (saved.save_function, saved.restore_function):
                if 0 < node_id < len(objects.nodes):
                    yield from names(node_id)


def _reads_elsewhere(objects: Any, library: dict[str, Any], name: str) -> list[Effect]:
    """The operations of a function that fill tables from files that are no assets."""
    fillers = [
        (node, function)
        for function in effects.reached(library, [name])
        for node in library[function].node_def
        if node.op in effects.TABLES_FROM_FILES
    ]
    bound = objects.concrete_functions[name].bound_inputs if fillers else []
    kinds = [objects.nodes[i].WhichOneof("kind") for i in bound]
    arguments = library[name].signature.input_arg if name in library else []
    given = list(arguments)[len(arguments) - len(kinds) :]
    texts = [kind for kind, x in zip(kinds, given, strict=False) if x.type == _STRING]
    if all(kind == "asset" for kind in texts):
        return []
    return [Effect(node.op, node.name, function) for node, function in fillers]


def check_graph(source: Path, meta_graph: Any) -> None:
    """Checks the operations that loading a SavedModel of TensorFlow 1 would run.

    Raises:
        RewriteError: they do more than restore variables and fill tables.
    """
    graph_def = meta_graph.graph_def
    assets = [asset.tensor_info.name.partition(":")[0] for asset in _assets(meta_graph)]
    _refuse(source, effects.in_ancestors(graph_def, _initializers(meta_graph), assets))
    if meta_graph.HasField("saver_def"):
        saver = meta_graph.saver_def
        found = effects.in_ancestors(graph_def, [saver.restore_op_name], assets)
        nodes = {node.name: node for node in graph_def.node}
        checkpoint = effects.source_of(saver.filename_tensor_name, nodes)
        _refuse(source, [each for each in found if not _restores(each, checkpoint, nodes)])


def _restores(effect: Effect, checkpoint: str, nodes: dict[str, Any]) -> bool:
    """Whether an operation reads the checkpoint that belongs to the model."""
    return (
        effect.op in ("Restore", "RestoreV2", "RestoreSlice")
        and not effect.function
        and effects.source_of(nodes[effect.node].input[0], nodes) == checkpoint
    )


def _initializers(meta_graph: Any) -> Iterator[str]:
    """The nodes that TensorFlow 1 runs when a model is loaded, or may run."""
    for key in ("__saved_model_init_op", "__saved_model_train_op"):
        if key in meta_graph.signature_def:
            yield from (info.name for info in meta_graph.signature_def[key].outputs.values())
    for key, collection in meta_graph.collection_def.items():
        if key in ("legacy_init_op", "saved_model_main_op", "table_initializer"):
            yield from collection.node_list.value
        elif key == "local_variables":
            for packed in collection.bytes_list.value:
                yield variable_pb2.VariableDef.FromString(packed).initializer_name


def _refuse(source: Path, found: list[Effect]) -> None:
    if found:
        raise RewriteError(
            f"{source} acts when it is loaded: it {effects.in_words(found)}. If you trust whoever "
            "made it, pass --trusted (trusted=True in Python)"
        )

"""Slim copies of SavedModels to load: wanted functions and what they need, nothing else.

Loading a SavedModel makes Python objects of all its functions, and Keras saves hundreds: for
training, and for each layer. They cost more time and memory than the model itself. The slim
copy has the same objects at the same places, so that variables are found in the checkpoint,
but those that are not needed are empty, and functions that nobody wants are gone.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tensorflow.core.protobuf import saved_model_pb2

from mbn_rewrite.frontends.saved_model.inlining import called_by
from mbn_rewrite.output_dir import OwnFolder


class SlimCopy:
    """A directory to load a TensorFlow 2 SavedModel from.

    It is gone when this object is. What is loaded from it reads its assets there.

    Attributes:
        path: the directory.
        has_variables: whether any is left.
    """

    def __init__(self, source: Path, meta_graph: Any, wanted: Iterable[str]) -> None:
        """Makes the copy.

        Args:
            source: the SavedModel.
            meta_graph: its MetaGraphDef; it is changed.
            wanted: the names of the concrete functions to keep.
        """
        _slim(meta_graph, set(wanted))
        kinds = {node.WhichOneof("kind") for node in meta_graph.object_graph_def.nodes}
        self.has_variables = "variable" in kinds
        self._folder = OwnFolder(Path(tempfile.gettempdir()))
        self.path = self._folder.path
        for part in ("variables", "assets"):
            if (source / part).exists():
                os.symlink((source / part).resolve(), self.path / part)
        proto = saved_model_pb2.SavedModel(saved_model_schema_version=1)
        proto.meta_graphs.append(meta_graph)
        (self.path / "saved_model.pb").write_bytes(proto.SerializeToString())


@dataclass
class Functions:
    """The functions that users call, by the names of their concrete functions.

    Attributes:
        signatures: key -> the function.
        methods: "method" of the root object, or "attribute.method" of an object in it -> its
            functions; none for one that was never called.
        bare: "attribute" of the root object, or of an object in it, that is one concrete function.
        contained: the attribute of a list, tuple or dict -> how many functions are in there.
        inner: how many functions belong to other objects, such as those that Keras made.
    """

    signatures: dict[str, str] = field(default_factory=dict)
    methods: dict[str, list[str]] = field(default_factory=dict)
    bare: list[str] = field(default_factory=list)
    contained: dict[str, int] = field(default_factory=dict)
    inner: int = 0


_CONTAINERS = {"trackable_list_wrapper", "trackable_dict_wrapper", "trackable_tuple_wrapper"}


def functions_of(meta_graph: Any) -> Functions:
    """The functions of a TensorFlow 2 SavedModel."""
    search = _Search(meta_graph.object_graph_def.nodes)
    search.find_methods()
    search.count_contained()
    search.count_inner()
    return search.found


@dataclass
class _Search:
    """Search for functions in the objects of a SavedModel, from the root object on.

    Attributes:
        nodes: the objects.
        found: the functions that were found.
        seen: the numbers of the objects that were looked at.
        counted: the names of the concrete functions that `found` lists.
    """

    nodes: Any
    found: Functions = field(default_factory=Functions)
    seen: set[int] = field(default_factory=set)
    counted: set[str] = field(default_factory=set)
    _pending: list[tuple[str, int]] = field(default_factory=lambda: [("", 0)])
    _containers: list[tuple[str, int]] = field(default_factory=list)

    def find_methods(self) -> None:
        """Finds the functions of the root object, and of the objects that it holds by name."""
        while self._pending:
            path, i = self._pending.pop(0)
            self.seen.add(i)
            for child in self.nodes[i].children:
                self._add(f"{path}{child.local_name}", child)

    def _add_signatures(self, node: Any) -> None:
        for signature in node.children:
            inner = self.nodes[signature.node_id].bare_concrete_function
            self.found.signatures[signature.local_name] = inner.concrete_function_name

    def _add(self, name: str, child: Any) -> None:
        """Adds a function; notes an object or container to be looked at."""
        node = self.nodes[child.node_id]
        kind = node.WhichOneof("kind")
        if kind == "function":
            self.found.methods[name] = list(node.function.concrete_functions)
            self.counted.update(self.found.methods[name])
            self.seen.add(child.node_id)
        elif kind == "bare_concrete_function":
            self.found.bare.append(name)
        elif name == "signatures":  # of the root object: other names hold a dot
            self._add_signatures(node)
        elif kind != "user_object" or child.node_id in self.seen:
            return
        elif node.user_object.identifier in _CONTAINERS:
            self._containers.append((name, child.node_id))
        elif (
            node.user_object.identifier == "_generic_user_object"
            and child.local_name.isidentifier()
            and child.local_name != "keras_api"  # the same again, for Keras's own loading
        ):
            self._pending.append((f"{name}.", child.node_id))

    def count_contained(self) -> None:
        """Counts the functions in lists, tuples and dicts.

        This comes after `find_methods`, since what is in there may be an attribute too.
        """
        for name, i in self._containers:
            functions = _contained(self.nodes, i, self.seen)
            if functions:
                self.found.contained[name] = len(functions)
            for function in functions:
                self.counted.update(function.concrete_functions)

    def count_inner(self) -> None:
        """Counts the functions that nothing else has counted."""
        resources = {
            child.node_id
            for node in self.nodes
            if node.WhichOneof("kind") == "resource"  # carried over with what makes it
            for child in node.children
        }
        self.found.inner = sum(
            node.WhichOneof("kind") == "function"
            and i not in resources
            and not self.counted.intersection(node.function.concrete_functions)
            and bool(node.function.concrete_functions)
            for i, node in enumerate(self.nodes)
        )


def _contained(nodes: Any, container: int, seen: set[int]) -> list[Any]:
    """The functions in a list, tuple or dict, and of the objects in there."""
    functions = []
    pending = [container]
    while pending:
        i = pending.pop()
        if i in seen:
            continue
        seen.add(i)
        kind = nodes[i].WhichOneof("kind")
        if kind == "function":
            functions.append(nodes[i].function)
        elif kind == "user_object" and (
            nodes[i].user_object.identifier in {*_CONTAINERS, "_generic_user_object"}
        ):
            pending += [child.node_id for child in nodes[i].children]
    return functions


def _slim(meta_graph: Any, wanted: set[str]) -> None:
    objects = meta_graph.object_graph_def
    needed, functions = _needed(objects, wanted)
    gone: set[int] = set()
    for i, node in enumerate(objects.nodes):
        kind = node.WhichOneof("kind")
        if kind == "function":
            kept = [name for name in node.function.concrete_functions if name in functions]
            del node.function.concrete_functions[:]
            node.function.concrete_functions.extend(kept)
            if not kept:
                gone.add(i)
        elif kind == "bare_concrete_function":
            if node.bare_concrete_function.concrete_function_name not in functions:
                gone.add(i)
        elif kind != "user_object" and i not in needed:
            _empty(node)
        if i not in needed:
            node.saveable_objects.clear()
            del node.slot_variables[:]
        if i in gone:
            _empty(node)
    for node in objects.nodes:
        kept_children = [child for child in node.children if child.node_id not in gone]
        del node.children[:]
        node.children.extend(kept_children)
        del node.dependencies[:]
    for name in list(objects.concrete_functions):
        if name not in functions:
            del objects.concrete_functions[name]
    _slim_library(meta_graph.graph_def, functions)


def _empty(node: Any) -> None:
    """Makes an object one that only holds others."""
    children = list(node.children)
    node.Clear()
    node.children.extend(children)
    node.user_object.identifier = "_generic_user_object"
    node.user_object.version.producer = 1
    node.user_object.version.min_consumer = 1


def _needed(objects: Any, wanted: set[str]) -> tuple[set[int], set[str]]:
    """The objects that functions use, and the functions that those objects need."""
    needed: set[int] = set()
    functions: set[str] = set()
    pending: list[Any] = [name for name in wanted if name in objects.concrete_functions]
    while pending:
        item = pending.pop()
        if isinstance(item, str):
            if item not in functions:
                functions.add(item)
                pending += objects.concrete_functions[item].bound_inputs
            continue
        if item in needed:
            continue
        needed.add(item)
        node = objects.nodes[item]
        kind = node.WhichOneof("kind")
        if kind == "function":
            pending += node.function.concrete_functions
        elif kind == "bare_concrete_function":
            pending.append(node.bare_concrete_function.concrete_function_name)
        if kind != "variable":  # a table needs what makes, fills and saves it
            pending += [child.node_id for child in node.children]
        for saved in node.saveable_objects.values():
            pending += [saved.save_function, saved.restore_function]
    return needed, functions


def _slim_library(graph_def: Any, functions: set[str]) -> None:
    """Keeps the functions and those that they call, and the constants of the graph."""
    library = {function.signature.name: function for function in graph_def.library.function}
    reached: set[str] = set()
    pending = [name for name in functions if name in library]
    while pending:
        name = pending.pop()
        if name not in reached:
            reached.add(name)
            for node in library[name].node_def:
                pending += [called for called in called_by(node) if called in library]
    kept = [function for name, function in library.items() if name in reached]
    constants = [node for node in graph_def.node if node.op == "Const"]
    del graph_def.library.function[:], graph_def.library.gradient[:], graph_def.node[:]
    del graph_def.library.registered_gradients[:]
    graph_def.library.function.extend(kept)
    graph_def.node.extend(constants)

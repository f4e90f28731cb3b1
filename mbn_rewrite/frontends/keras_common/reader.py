"""Reads a model made of layers into the neutral graph. Decides nothing, changes nothing.

Functional and Sequential models are read call by call; nested ones are read in place, as
if their layers were the outer model's. What a custom layer or a subclassed model does with
the layers it holds is not visible: the Functional models among them are read as parts of
their own, whose outputs are outputs, and the BatchNormalizations are listed as hidden.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from mbn_rewrite.frontends.keras_common import weights
from mbn_rewrite.frontends.keras_common.adapter import KerasAdapter, Record
from mbn_rewrite.frontends.keras_common.cloning import check_call, check_copy, label, parts
from mbn_rewrite.frontends.keras_common.nested import held
from mbn_rewrite.frontends.keras_common.op_table import Call, batch_norm, describe, is_batch_norm
from mbn_rewrite.frontends.keras_common.own_classes import (
    attributes,
    leaves,
    needs_check,
    note_on_files,
)
from mbn_rewrite.ir.graph import BatchNorm, Graph, HiddenBatchNorm, Input, Node, Value


@dataclass(frozen=True)
class Reading:
    """A model as the planner sees it, and the way back to its layers.

    Attributes:
        graph: the neutral graph.
        layers: the layer of each owner named in the graph.
        owners: id(layer) -> owner.
        masked: owners of layers that some call gives a mask.
        notes: what the user should know of any copy of the model, in sentences.
    """

    graph: Graph
    layers: dict[str, Any]
    owners: dict[int, str]
    masked: frozenset[str]
    notes: tuple[str, ...] = ()


def read(model: Any, keras: KerasAdapter) -> Reading:
    """Reads a built model of a Keras."""
    reader = _Reader(keras)
    if keras.is_visible(model):
        reader.owners[id(model)] = ""
        reader.outputs.update(reader.read_calls(model, "", training=False))
    else:
        check_copy(model, keras)
        reader.read_held(model, "", label(model), training=False)
    reader.account_for_the_rest(model)
    reader.root_what_is_also_held()
    layers = reader.layers
    graph = Graph(
        tuple(reader.values),
        tuple(reader.nodes),
        frozenset(reader.outputs),
        tuple(reader.hidden),
        lambda owner, name: weights.read(layers[owner], name),
    )
    notes = tuple(note_on_files(each, keras) for each in reader.with_class.values())
    any_norm = reader.hidden or any(isinstance(node.op, BatchNorm) for node in reader.nodes)
    return Reading(
        graph, layers, reader.owners, frozenset(reader.masked), notes if any_norm else ()
    )


@dataclass
class _Reader:
    keras: KerasAdapter
    values: list[Value] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    outputs: set[int] = field(default_factory=set)
    hidden: list[HiddenBatchNorm] = field(default_factory=list)
    layers: dict[str, Any] = field(default_factory=dict)
    owners: dict[int, str] = field(default_factory=dict)
    masked: set[str] = field(default_factory=set)
    with_mask: set[int] = field(default_factory=set)  # values that may have one with them
    holders: dict[int, str] = field(default_factory=dict)  # id(held layer) -> who holds it
    with_class: dict[int, Any] = field(default_factory=dict)  # models of classes to be checked

    def read_calls(
        self,
        model: Any,
        prefix: str,
        training: bool | None,
        inputs: list[int] | None = None,
        seen: dict[int, int] | None = None,
    ) -> list[int]:
        """Reads a visible model; returns the values of its outputs.

        Args:
            prefix: what to put before the names of its layers.
            training: how it is called; see `describe.Call`.
            inputs: the values it is called with; None for one that is not called.
            seen: id(a Keras tensor) -> its value, of a model that may have tensors in common.
        """
        check_call(model, self.keras)
        seen = {} if seen is None else seen
        if inputs is not None:
            seen = {id(t): v for t, v in zip(model.inputs, inputs, strict=True)}
        # Sequential models take inputs of other sizes than they declare.
        sizes_hold = not isinstance(model, self.keras.sequential)
        for record in self.keras.calls_of(model):
            if all(id(t) in seen for t in record.outputs):
                continue
            sources = [seen[id(t)] for t in record.inputs]
            results = self._read_call(record, prefix, training, sources, sizes_hold)
            seen.update(zip(map(id, record.outputs), results, strict=True))
        self._read_attributes(model, prefix, training, seen)
        return [seen[id(t)] for t in model.outputs]

    def _read_attributes(
        self, model: Any, prefix: str, training: bool | None, seen: dict[int, int]
    ) -> None:
        """Reads what a visible model holds beside its calls, for its methods to use.

        What tensors it holds are to keep their values, as the outputs of models do.
        """
        for value in attributes(model, self.keras).values():
            self.outputs |= {seen[id(leaf)] for leaf in leaves(value) if id(leaf) in seen}
        self.read_held(model, prefix, label(model), training, seen)
        if needs_check(model, self.keras) and id(model) not in self.with_class:
            self.with_class[id(model)] = model

    def _read_call(
        self,
        record: Record,
        prefix: str,
        training: bool | None,
        sources: list[int],
        sizes_hold: bool,
    ) -> list[int]:
        layer = record.layer
        training = self._training_of(record, training)
        if self.keras.is_visible(layer) and self._fits(record, sources):
            return self.read_calls(layer, self._path(layer, prefix), training, sources)
        if id(layer) not in self.owners:
            check_copy(layer, self.keras)
        results = [self._add_value(t) for t in record.outputs]
        owner = self._owner(layer, prefix)
        op = describe(
            Call(
                self.keras,
                layer,
                tuple(self.values[value].shape for value in sources),
                self.values[results[0]].shape,
                training,
                self._other_arguments(record),
                sizes_hold,
            )
        )
        if isinstance(op, BatchNorm) and not op.ineligible:
            before, after = self.values[sources[0]].dtype, self.values[results[0]].dtype
            if before != after:
                op = replace(op, pinned=f"it turns {before} into {after}")
            elif len(sources) > 1:
                op = replace(op, pinned="it is given a mask, which others read from it")
        with_mask = self.with_mask & set(sources) or any(
            map(self.keras.carries_mask, record.inputs)
        )
        if with_mask or len(sources) > 1:
            self.masked.add(owner)
        if with_mask and self.keras.may_pass_mask(layer):
            self.with_mask.update(results)
        self.nodes.append(
            Node(owner, type(layer).__name__, op, tuple(sources), tuple(results), _dtype(layer))
        )
        if not isinstance(op, (Input, BatchNorm)):
            calls = [self._training_of(call, training) for call in self.keras.all_calls_of(layer)]
            worst = False if all(value is False for value in calls) else (True in calls or None)
            self.read_held(layer, f"{owner}/", self.nodes[-1].label, worst)
        return results

    def read_held(
        self,
        holder: Any,
        prefix: str,
        who: str,
        training: bool | None,
        seen: dict[int, int] | None = None,
    ) -> None:
        """Reads what a layer holds whose calls cannot be seen.

        Args:
            holder: the layer.
            prefix: what to put before the names of the layers that it holds.
            who: its label.
            training: how the holder itself is called; see `describe.Call`.
            seen: of a holder that is visible itself; see `read_calls`.
        """
        is_visible = self.keras.is_visible(holder)
        for _, layer in held(holder, self.keras):
            if not is_visible:  # in whose copy the layer's copy takes its place
                self.holders.setdefault(id(layer), who)
            if id(layer) in self.owners:
                continue
            if is_batch_norm(layer, self.keras):
                self._add_hidden(layer, prefix, who, batch_norm(layer, training, self.keras))
            elif self.keras.is_visible(layer):
                path = self._path(layer, prefix)
                self.owners[id(layer)] = path
                self.outputs.update(self.read_calls(layer, path, training, seen=seen))
            else:
                owner = self._owner(layer, prefix)
                self.read_held(layer, f"{owner}/", label(layer), training)
        if not is_visible:
            self._account_for(self.keras.everything_in(holder), who)

    def account_for_the_rest(self, model: Any) -> None:
        """Lists the BatchNormalizations that are nowhere to be found, so that none is lost."""
        for part in parts(model):
            direct = part._flatten_layers(include_self=False, recursive=False)
            self._account_for(direct, label(part))

    def _account_for(self, modules: Iterable[Any], who: str) -> None:
        for layer in modules:
            if is_batch_norm(layer, self.keras) and id(layer) not in self.owners:
                why = (
                    f"{who} holds it where it cannot be exchanged; held in an attribute of its "
                    "own, or in a list, tuple or dictionary in one, and called from there, it could"
                )
                op = BatchNorm(None, why, not_trainable=why)
                self._add_hidden(layer, "", who, op)

    def root_what_is_also_held(self) -> None:
        """A BatchNormalization that is called in sight and held out of sight cannot move."""
        nodes = [(node, self.holders.get(id(self.layers[node.owner]))) for node in self.nodes]
        seen = {node.owner for node in self.nodes}
        self.hidden = [hidden for hidden in self.hidden if hidden.owner not in seen]
        self.nodes = [
            replace(node, op=replace(node.op, pinned=f"{who} holds it too"))
            if isinstance(node.op, BatchNorm) and who
            else node
            for node, who in nodes
        ]

    def _add_hidden(self, layer: Any, prefix: str, who: str, op: BatchNorm) -> None:
        rank = getattr(layer.input_spec, "ndim", None)
        owner = self._owner(layer, prefix)
        self.hidden.append(HiddenBatchNorm(owner, who, op, rank, _dtype(layer)))

    def _add_value(self, tensor: Any) -> int:
        value = len(self.values)
        self.values.append(Value(self.keras.shape_of(tensor), self.keras.dtype_of(tensor)))
        if self.keras.carries_mask(tensor):
            self.with_mask.add(value)
        return value

    def _other_arguments(self, record: Record) -> tuple[Any, ...]:
        """What a call was given beside Keras tensors; names, flags and Nones left out."""
        arguments = (record.args, {k: v for k, v in record.kwargs.items() if k != "name"})
        tensors = {id(t) for t in record.inputs}
        return tuple(
            value
            for value in self.keras.flatten(arguments)
            if value is not None and not isinstance(value, bool) and id(value) not in tensors
        )

    def _path(self, model: Any, prefix: str) -> str:
        return f"{prefix}{model.name}/"

    def _owner(self, layer: Any, prefix: str) -> str:
        """The unique name of a layer: its path of names, with a number if that is taken."""
        if id(layer) not in self.owners:
            name = path = f"{prefix}{layer.name}"
            number = 2
            while name in self.layers:
                name, number = f"{path}#{number}", number + 1
            self.owners[id(layer)] = name
            self.layers[name] = layer
        return self.owners[id(layer)]

    def _training_of(self, record: Record, inherited: bool | None) -> bool | None:
        """Whether a call is in training; see `describe.Call`."""
        value = record.kwargs.get("training")
        if value is None and len(record.args) > 1:
            names = list(inspect.signature(record.layer.call).parameters)
            if "training" in names[: len(record.args)]:
                value = record.args[names.index("training")]
        value = self.keras.training(value, inherited)
        return bool(value) if isinstance(value, (bool, int, np.bool_)) else None

    def _fits(self, record: Record, sources: list[int]) -> bool:
        """Whether a nested model takes these values as they are."""
        inputs = record.layer.inputs
        return (
            len(inputs) == len(sources)
            and self.keras.takes_as_it_is(record.layer, record)
            and all(
                len(self.values[value].shape) == len(self.keras.shape_of(tensor))
                and self.values[value].dtype == self.keras.dtype_of(tensor)
                for value, tensor in zip(sources, inputs, strict=True)
            )
        )


_SIZES = {"float16": 2, "bfloat16": 2, "float32": 4}  # of dtypes narrower than the widest


def _dtype(layer: Any) -> str:
    """The narrowest dtype that a layer's weights are stored or used in."""
    names = [getattr(layer, name, None) for name in ("compute_dtype", "dtype")]
    return min(filter(None, names), key=lambda name: _SIZES.get(name, 8), default="float32")

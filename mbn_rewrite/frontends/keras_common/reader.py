"""Reads a model made of layers into the neutral graph. Decides nothing, changes nothing.

Functional and Sequential models are read call by call; nested ones are read in place, as if their
layers belonged to the outer model. So are custom layers and subclassed models, by a trace of what
their code calls. Where that cannot be traced, Functional models that they hold are read as separate
parts, whose outputs count as outputs of the model, and their BatchNormalizations are listed as
hidden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mbn_rewrite.errors import CopyError
from mbn_rewrite.frontends.keras_common import weights
from mbn_rewrite.frontends.keras_common.adapter import KerasAdapter
from mbn_rewrite.frontends.keras_common.calls import Record, other_arguments, training_of
from mbn_rewrite.frontends.keras_common.cloning import check_call, check_copy, label
from mbn_rewrite.frontends.keras_common.custom_models import (
    attributes,
    leaves,
    needs_check,
    note_on_files,
    note_on_holders,
)
from mbn_rewrite.frontends.keras_common.layer_reader import narrowest_dtype
from mbn_rewrite.frontends.keras_common.references import among
from mbn_rewrite.frontends.keras_common.time_step_reader import TimeStepReader
from mbn_rewrite.ir.graph import BatchNorm, Clip, Graph, Input, Node, Op, Several, Shape
from mbn_rewrite.passes.wording import listed


@dataclass(frozen=True)
class Reading:
    """A model as passes see it, and the way back to its layers.

    Attributes:
        graph: the neutral graph.
        layers: the layer of each owner named in the graph.
        owners: id(layer) -> owner.
        numbers: id(first Keras tensor that a call gives) -> which of its layer's calls it is, in
            the order of the graph.
        in_code: ids of Functional and Sequential models whose layers code may have by number.
        masked: owners of layers that are called with a mask at least once.
        notes: sentences that the user should know about any copy of the model.
    """

    graph: Graph
    layers: dict[str, Any]
    owners: dict[int, str]
    numbers: dict[int, int]
    in_code: frozenset[int]
    masked: frozenset[str]
    notes: tuple[str, ...] = ()

    def shape_read_by(self, owner: str) -> Shape:
        """Shape of what a call of a layer reads."""
        node = next(node for node in self.graph.nodes if node.owner == owner)
        return self.graph.values[node.inputs[0]].shape


def read(model: Any, keras: KerasAdapter, leaves_code: bool = False) -> Reading:
    """Reads a built model of a Keras.

    Args:
        model: the model.
        keras: the adapter of its Keras.
        leaves_code: whether what code calls is to stay as it is, and is not traced.
    """
    reader = _Reader(keras, leaves_code)
    with reader.tracer.at_work():
        if keras.is_visible(model):
            reader.owners[id(model)] = ""
            reader.outputs.update(reader.read_calls(model, "", training=False))
        else:
            check_copy(model, keras)
            reader.read_subclassed(model)
    reader.list_not_called()
    reader.list_unreachable(model)
    reader.apply_bindings()
    layers = reader.layers
    graph = Graph(
        tuple(
            replace(value, masked=number in reader.with_mask)
            for number, value in enumerate(reader.values)
        ),
        tuple(reader.nodes),
        frozenset(reader.outputs),
        tuple(reader.hidden),
        lambda owner, name: weights.read(layers[owner], name),
    )
    notes = tuple(note_on_files(each, keras) for each in reader.unsure.values())
    makers = reader.holders_of_norms()
    if makers:
        notes += (note_on_holders(makers, keras),)
    holders = sorted({each.holder for each in reader.hidden if each.op.reason is None})
    if holders:
        notes += (f"Calls inside {listed(holders)} cannot be seen here. {keras.way_around}.",)
    any_norm = reader.hidden or any(isinstance(node.op, BatchNorm) for node in reader.nodes)
    return Reading(
        graph,
        layers,
        reader.owners,
        reader.calls.numbers(reader.nodes),
        frozenset(reader.bindings.in_code),
        frozenset(reader.masked),
        notes if any_norm else (),
    )


def _values_of(tensors: Sequence[Any], seen: Mapping[int, int], model: Any) -> list[int]:
    """Values of Keras tensors of a model whose calls were read.

    Raises:
        CopyError: no call gave one.
    """
    if not all(id(tensor) in seen for tensor in tensors):
        raise CopyError(
            f"{label(model)} cannot be copied: Keras has lost calls that it is made of. It does "
            "where layers belong to two Sequential models that are called at several sizes. Give "
            "each layers of its own"
        )
    return [seen[id(tensor)] for tensor in tensors]


@dataclass
class _Reader(TimeStepReader):
    """Reader of one model."""

    def read_calls(
        self,
        model: Any,
        prefix: str,
        training: bool | None,
        inputs: list[int] | None = None,
        seen: dict[int, int] | None = None,
    ) -> list[int]:
        """Reads a Functional or Sequential model call by call."""
        check_call(model, self.keras)
        seen = {} if seen is None else seen
        if inputs is not None:
            seen = {id(t): v for t, v in zip(model.inputs, inputs, strict=True)}
        # Sequential models accept inputs of other sizes than they declare.
        sizes_hold = not isinstance(model, self.keras.sequential)
        given = [self.values[value].shape for value in inputs or ()]
        at_sizes = self.keras.tensors_at(model, given) if given else {}
        for record in self.keras.calls_of(model):
            if all(id(t) in seen for t in record.outputs):
                continue
            sources = _values_of(record.inputs, seen, model)
            outputs = tuple(at_sizes.get(id(t), t) for t in record.outputs)
            as_called = replace(record, outputs=outputs)
            results = self._read_call(as_called, prefix, training, sources, sizes_hold)
            self.calls.add(results[0], record, model)
            seen.update(zip(map(id, record.outputs), results, strict=True))
        self._read_attributes(model, prefix, training, seen)
        return _values_of(model.outputs, seen, model)

    def _read_attributes(
        self, model: Any, prefix: str, training: bool | None, seen: dict[int, int]
    ) -> None:
        """Reads what a visible model keeps in addition to its calls, for its methods to use.

        Tensors among that have to keep their values, as outputs of the model do.
        """
        for value in attributes(model, self.keras).values():
            self.outputs |= {seen[id(leaf)] for leaf in leaves(value) if id(leaf) in seen}
        self.read_sublayers(model, prefix, label(model), training, seen)
        if needs_check(model, self.keras) and id(model) not in self.unsure:
            self.unsure[id(model)] = model

    def _read_call(
        self,
        record: Record,
        prefix: str,
        training: bool | None,
        sources: list[int],
        sizes_hold: bool,
        caller: str = "",
    ) -> list[int]:
        layer = record.layer
        training = training_of(record, training, self.keras)
        if self.keras.is_visible(layer) and self._fits(record, sources):
            path = self.owners.get(id(layer), self._path(layer, prefix))
            if caller:  # there is no other part of it to be read
                self.owners[id(layer)] = path
                self.called_by_code.add(id(layer))
            return self.read_calls(layer, path, training, sources)
        # A function that code calls is part of the code, and not copied.
        if id(layer) not in self.owners and (
            not caller or isinstance(layer, self.keras.layers.Layer)
        ):
            check_copy(layer, self.keras)
        of_steps = self._read_steps(record, prefix, training, sources)
        if of_steps is not None:
            return of_steps
        if self._is_holder(layer):
            trace = self._trace_of(record, training, sources)
            if trace is not None:
                return self._read_trace(layer, trace, self._owner(layer, prefix), sources)
        if not caller:
            arguments = other_arguments(record, self.keras)
            self.bind_referred(among(arguments, self.keras), label(layer))
        results = [self._add_value(t) for t in record.outputs]
        owner = self._owner(layer, prefix)
        op = self._operation(record, training, sources, results, sizes_hold)
        if caller:
            self.bindings.held.add(id(layer))
            op = self._as_code_has_it(record, op)
        self._follow_masks(record, owner, sources, results)
        # Functions, which may clip, have no dtype of their own.
        dtype = self.values[results[0]].dtype if isinstance(op, Clip) else narrowest_dtype(layer)
        described: list[tuple[Op, tuple[int, ...]]]
        if isinstance(op, Several):
            described = [(each, (value,)) for each, value in zip(op.ops, results, strict=True)]
        else:
            described = [(op, tuple(results))]
        for each, outputs in described:
            kind = type(layer).__name__
            node = Node(owner, kind, each, tuple(sources), outputs, dtype, caller=caller)
            self.nodes.append(node)
        is_part_of_code = caller and not isinstance(layer, self.keras.layers.Layer)
        if not isinstance(op, (Input, BatchNorm)) and not is_part_of_code:
            worst = self._worst_training(layer, training)
            self.read_sublayers(layer, f"{owner}/", node.label, worst)
        return results

    def _fits(self, record: Record, sources: list[int]) -> bool:
        """Whether a nested model accepts these values as they are."""
        inputs = record.layer.inputs
        return (
            len(inputs) == len(sources)
            and self.keras.takes_inputs_in_order(record.layer, record)
            and all(
                len(self.values[value].shape) == len(self.keras.shape_of(tensor))
                and self.values[value].dtype == self.keras.dtype_of(tensor)
                for value, tensor in zip(sources, inputs, strict=True)
            )
        )

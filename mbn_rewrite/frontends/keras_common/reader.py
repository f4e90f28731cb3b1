"""Reads a model made of layers into the neutral graph. Decides nothing, changes nothing.

Functional and Sequential models are read call by call; nested ones are read in place, as if their
layers belonged to the outer model. So are custom layers and subclassed models, by a trace of what
their code calls. Where that cannot be traced, Functional models that they hold are read as separate
parts, whose outputs count as outputs of the model, and their BatchNormalizations are listed as
hidden.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from mbn_rewrite.frontends.keras_common import weights
from mbn_rewrite.frontends.keras_common.adapter import KerasAdapter
from mbn_rewrite.frontends.keras_common.batch_norm import batch_norm, is_batch_norm
from mbn_rewrite.frontends.keras_common.bindings import Bindings
from mbn_rewrite.frontends.keras_common.calls import (
    Call,
    Record,
    Several,
    other_arguments,
    training_of,
)
from mbn_rewrite.frontends.keras_common.cloning import (
    check_call,
    check_copy,
    is_stock,
    label,
    parts,
)
from mbn_rewrite.frontends.keras_common.custom_models import (
    attributes,
    leaves,
    needs_check,
    note_on_files,
    note_on_holders,
)
from mbn_rewrite.frontends.keras_common.op_table import describe
from mbn_rewrite.frontends.keras_common.sublayers import all_sublayers, sublayers
from mbn_rewrite.frontends.keras_common.time_distributed import (
    examples_as_steps,
    steps_as_examples,
)
from mbn_rewrite.frontends.keras_common.tracing import NotTraceable, Trace, Tracer
from mbn_rewrite.ir.graph import (
    BatchNorm,
    Clip,
    Graph,
    HiddenBatchNorm,
    Input,
    Node,
    Op,
    Opaque,
    PositivelyHomogeneous,
    Shape,
    Value,
)
from mbn_rewrite.ir.reasons import Obstacle, Reason
from mbn_rewrite.passes.wording import listed


@dataclass(frozen=True)
class Reading:
    """A model as passes see it, and the way back to its layers.

    Attributes:
        graph: the neutral graph.
        layers: the layer of each owner named in the graph.
        owners: id(layer) -> owner.
        masked: owners of layers that are called with a mask at least once.
        notes: sentences that the user should know about any copy of the model.
    """

    graph: Graph
    layers: dict[str, Any]
    owners: dict[int, str]
    masked: frozenset[str]
    notes: tuple[str, ...] = ()

    def shape_read_by(self, owner: str) -> Shape:
        """Shape of what a call of a layer reads."""
        node = next(node for node in self.graph.nodes if node.owner == owner)
        return self.graph.values[node.inputs[0]].shape


def read(model: Any, keras: KerasAdapter) -> Reading:
    """Reads a built model of a Keras."""
    reader = _Reader(keras)
    with reader.tracer.watching():
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
    with_mask: set[int] = field(default_factory=set)  # values that may come with a mask
    traced: dict[int, tuple[Any, str]] = field(default_factory=dict)  # id -> layer, its owner
    untraced: dict[int, str] = field(default_factory=dict)  # id(layer) -> why it was not traced
    tracer: Tracer = field(init=False)
    bindings: Bindings = field(default_factory=Bindings)
    unsure: dict[int, Any] = field(default_factory=dict)  # models whose configuration may mislead
    called_by_code: set[int] = field(default_factory=set)  # ids of visible models, read in place

    def __post_init__(self) -> None:
        self.tracer = Tracer(self.keras)

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
            model: the model.
            prefix: the prefix of its layers' names.
            training: how it is called; see `calls.Call`.
            inputs: the values it is called with; None if it is not called.
            seen: id(Keras tensor) -> value, for tensors it may share with a model read before.
        """
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
            sources = [seen[id(t)] for t in record.inputs]
            outputs = tuple(at_sizes.get(id(t), t) for t in record.outputs)
            as_called = replace(record, outputs=outputs)
            results = self._read_call(as_called, prefix, training, sources, sizes_hold)
            seen.update(zip(map(id, record.outputs), results, strict=True))
        self._read_attributes(model, prefix, training, seen)
        return [seen[id(t)] for t in model.outputs]

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
            if caller:
                self.called_by_code.add(id(layer))
            return self.read_calls(layer, self._path(layer, prefix), training, sources)
        # A function that code calls is part of the code, and not copied.
        if id(layer) not in self.owners and (
            not caller or isinstance(layer, self.keras.layers.Layer)
        ):
            check_copy(layer, self.keras)
        if not caller and self._is_distributed(record, sources):
            return self._read_distributed(record, prefix, training, sources[0])
        if self._is_holder(layer):
            trace = self._trace_of(record, training, sources)
            if trace is not None:
                return self._read_trace(layer, trace, self._owner(layer, prefix), sources)
        results = [self._add_value(t) for t in record.outputs]
        owner = self._owner(layer, prefix)
        op = self._operation(record, training, sources, results, sizes_hold)
        if caller:
            self.bindings.held.add(id(layer))
            op = self._as_code_has_it(record, op)
        self._follow_masks(record, owner, sources, results)
        # Functions, which may clip, have no dtype of their own.
        dtype = self.values[results[0]].dtype if isinstance(op, Clip) else _dtype(layer)
        described: list[tuple[Op, tuple[int, ...]]]
        if isinstance(op, Several):
            described = [(each, (value,)) for each, value in zip(op.ops, results, strict=True)]
        else:
            described = [(op, tuple(results))]
        for each, outputs in described:
            kind = type(layer).__name__
            node = Node(owner, kind, each, tuple(sources), outputs, dtype, caller=caller)
            self.nodes.append(node)
        if not isinstance(op, (Input, BatchNorm)):
            worst = self._worst_training(layer, training)
            self.read_sublayers(layer, f"{owner}/", node.label, worst)
        return results

    # -- layers that call others in Python code --------------------------------------------

    def read_subclassed(self, model: Any) -> None:
        """Reads a model that calls its layers in Python code."""
        record = self.keras.call_of(model) if not self.keras.is_traced(model) else None
        trace = self._trace(record, None) if record is not None else None
        if trace is None:
            self.read_sublayers(model, "", label(model), training=False)
            return
        self.owners[id(model)] = ""
        sources = [self._add_value(tensor) for tensor in trace.inputs]
        for number, value in enumerate(sources):
            name = f"input_{number}" if len(sources) > 1 else "input"
            self.nodes.append(Node(name, "Input", Input(), (), (value,)))
            self.layers[name] = model
        self.outputs.update(self._read_trace(model, trace, "", sources))

    def _is_distributed(self, record: Record, sources: list[int]) -> bool:
        """Whether a call applies a BatchNormalization, or a visible model, at every time step."""
        layer = record.layer
        if type(layer) is not self.keras.layers.TimeDistributed or other_arguments(
            record, self.keras
        ):
            return False
        inner = layer.layer
        if len(sources) != 1 or len(record.outputs) != 1 or self.with_mask & set(sources):
            return False
        if not self.keras.is_visible(inner):
            return is_batch_norm(inner, self.keras)
        shape, dtype = self.values[sources[0]].shape, self.values[sources[0]].dtype
        if len(inner.inputs) != 1 or len(inner.outputs) != 1:
            return False
        (tensor,) = inner.inputs
        rank = len(self.keras.shape_of(tensor))
        return (rank, self.keras.dtype_of(tensor)) == (len(shape) - 1, dtype)

    def _read_distributed(
        self, record: Record, prefix: str, training: bool | None, source: int
    ) -> list[int]:
        """Reads what is applied at every time step, with the steps as further examples."""
        layer, inner, (tensor,) = record.layer, record.layer.layer, record.outputs
        owner = self._owner(layer, prefix)
        self.traced[id(layer)] = layer, owner
        self.bindings.held.add(id(inner))
        shape, dtype = self.values[source].shape, self.values[source].dtype
        step = len(self.values)
        self.values.append(Value((None, *shape[2:]), dtype))
        kind, merged = type(layer).__name__, steps_as_examples(len(shape))
        self.nodes.append(Node(owner, kind, merged, (source,), (step,), _dtype(layer)))
        given = self._read_step(inner, owner, training, step, tensor)
        result = self._add_value(tensor)
        parted = examples_as_steps(len(self.values[result].shape))
        self.nodes.append(Node(owner, kind, parted, (given,), (result,), _dtype(layer)))
        return [result]

    def _read_step(
        self, inner: Any, holder: str, training: bool | None, step: int, tensor: Any
    ) -> int:
        """Reads what a layer applies to each step; returns the value of what that gives.

        Args:
            inner: what is applied.
            holder: owner of the layer.
            training: how it is called; see `calls.Call`.
            step: the value that it reads.
            tensor: what the layer gives.
        """
        if self.keras.is_visible(inner):
            path = self.owners.setdefault(id(inner), self._path(inner, f"{holder}/"))
            (given,) = self.read_calls(inner, path, training, [step])
            return given
        given = len(self.values)
        shape = self.keras.shape_of(tensor)
        self.values.append(Value((None, *shape[2:]), self.keras.dtype_of(tensor)))
        call = Record(inner, (), {}, (), ())
        op = self._operation(call, training, [step], [given], True)
        assert isinstance(op, BatchNorm)
        name, kind = self._owner(inner, f"{holder}/"), type(inner).__name__
        who = label(self.layers[holder])
        node = Node(name, kind, op, (step,), (given,), _dtype(inner), caller=who)
        self.nodes.append(node)
        return given

    def _is_holder(self, layer: Any) -> bool:
        """Whether a layer may call others in code that can be traced."""
        return (
            isinstance(layer, self.keras.layers.Layer)
            and not is_batch_norm(layer, self.keras)
            and not is_stock(type(layer))
            and type(layer).__module__.partition(".")[0] != _OURS  # they are as they are to be
            and not self.keras.is_traced(layer)
            and len(parts(layer)) > 1
        )

    def _trace_of(self, record: Record, training: bool | None, sources: list[int]) -> Trace | None:
        """Trace of a call, if it is one at inference, without a mask."""
        if training is not False:
            self.untraced[id(record.layer)] = "it is called in training"
        elif self.with_mask & set(sources):
            self.untraced[id(record.layer)] = "it is called with a mask"
        else:
            return self._trace(record, record.outputs)
        return None

    def _trace(self, record: Record, outputs: tuple[Any, ...] | None) -> Trace | None:
        try:
            return self.tracer.trace(record, outputs)
        except NotTraceable as why:
            self.untraced[id(record.layer)] = str(why)
            return None

    def _read_trace(self, layer: Any, trace: Trace, owner: str, sources: list[int]) -> list[int]:
        """Reads what the code of a layer calls; returns the values of its results."""
        who = label(layer)
        self.traced[id(layer)] = layer, owner
        self.bindings.reads |= dict.fromkeys(trace.reads, who)
        within = {id(inner) for inner in all_sublayers(layer, self.keras)}
        seen = dict(zip(map(id, trace.inputs), sources, strict=True))
        prefix = f"{owner}/" if owner else ""
        self.bindings.strangers |= dict.fromkeys(trace.unseen, who)
        for record in trace.records:
            if id(record.layer) not in within and isinstance(record.layer, self.keras.layers.Layer):
                strangers = {id(part) for part in parts(record.layer)}
                self.bindings.strangers |= dict.fromkeys(strangers, who)
            given = [seen[id(t)] for t in record.inputs]
            results = self._read_call(record, prefix, False, given, True, caller=who)
            seen.update(zip(map(id, record.outputs), results, strict=True))
        return [seen[id(t)] for t in trace.outputs]

    def _as_code_has_it(self, record: Record, op: Op | Several) -> Op | Several:
        """An operation as code calls it, in which functions cannot be exchanged."""
        layer = record.layer
        is_layer = isinstance(layer, self.keras.layers.Layer)
        is_function = not is_layer or self.keras.assigns_its_own_call(layer)
        if is_function and any(map(_is_tensor, other_arguments(record, self.keras))):
            return Opaque("computes with what its code makes anew in every call")
        if not isinstance(op, Clip) or not is_function:
            return op
        return PositivelyHomogeneous() if op.is_homogeneous else Opaque(op.why)

    def holders_of_norms(self) -> list[str]:
        """Labels of the outermost layers whose code calls BatchNormalizations, as it was traced."""
        norms = [node.owner for node in self.nodes if isinstance(node.op, BatchNorm)]
        outermost = {
            owner: label(layer)
            for layer, owner in self.traced.values()
            if not any(owner.startswith(f"{other}/") for _, other in self.traced.values())
        }
        return [
            who
            for owner, who in outermost.items()
            if not owner or any(norm.startswith(f"{owner}/") for norm in norms)
        ]

    def list_not_called(self) -> None:
        """Lists BatchNormalizations that code which was traced holds but does not call."""
        for layer, owner in self.traced.values():
            prefix = f"{owner}/" if owner else ""
            for _, inner in sublayers(layer, self.keras):
                if is_batch_norm(inner, self.keras) and id(inner) not in self.owners:
                    op = BatchNorm(None, Reason(Obstacle.NOT_CALLED, label(layer)))
                    self._add_hidden(inner, prefix, label(layer), op)
            self.read_sublayers(layer, prefix, label(layer), training=False, is_seen=True)

    def _operation(
        self,
        record: Record,
        training: bool | None,
        sources: list[int],
        results: list[int],
        sizes_hold: bool,
    ) -> Op | Several:
        """Operation of a call; a BatchNormalization that does more than its map stays."""
        call = Call(
            self.keras,
            record.layer,
            tuple(self.values[value].shape for value in sources),
            self.values[results[0]].shape,
            training,
            other_arguments(record, self.keras),
            sizes_hold,
            record,
        )
        op = describe(call)
        if not isinstance(op, BatchNorm) or op.reason:
            return op
        before, after = self.values[sources[0]].dtype, self.values[results[0]].dtype
        if before != after:
            return replace(op, reason=Reason(Obstacle.CASTS, f"{before} into {after}"))
        if len(sources) > 1:
            return replace(op, reason=Reason(Obstacle.MASKED))
        return op

    def _follow_masks(
        self, record: Record, owner: str, sources: list[int], results: list[int]
    ) -> None:
        """Notes whether a call is given a mask, and whether its results may pass it on."""
        with_mask = self.with_mask & set(sources) or any(
            map(self.keras.carries_mask, record.inputs)
        )
        if with_mask or len(sources) > 1:
            self.masked.add(owner)
        if with_mask and self.keras.may_pass_mask(record.layer):
            self.with_mask.update(results)

    def _worst_training(self, layer: Any, training: bool | None) -> bool | None:
        """Whether any call of a layer is in training; None if that is not known."""
        recorded = self.keras.all_calls_of(layer)  # but those of traces
        calls = [training, *(training_of(call, training, self.keras) for call in recorded)]
        return False if all(value is False for value in calls) else (True in calls or None)

    def read_sublayers(
        self,
        parent: Any,
        prefix: str,
        who: str,
        training: bool | None,
        seen: dict[int, int] | None = None,
        is_seen: bool = False,
    ) -> None:
        """Reads the sublayers of a layer, whose calls cannot be seen, if they were not read before.

        Args:
            parent: the layer.
            prefix: the prefix of its sublayers' names.
            who: its label.
            training: how it is called itself; see `calls.Call`.
            seen: for a parent that is visible itself; see `read_calls`.
            is_seen: whether its calls were read.
        """
        is_visible = is_seen or self.keras.is_visible(parent)
        for _, layer in sublayers(parent, self.keras):
            self.bindings.held.add(id(layer))
            if not is_visible:  # in a visible parent's copy, the sublayer's copy takes its place
                self.bindings.parents.setdefault(id(layer), who)
            # Models that a model has, an encoder and a decoder, are used by themselves, too.
            for_itself = isinstance(parent, self.keras.model)
            if is_seen and id(layer) in self.called_by_code and not for_itself:
                continue
            if id(layer) in self.owners:
                if is_batch_norm(layer, self.keras) and training is not False:
                    reason = batch_norm(layer, training, self.keras).reason
                    self.bindings.reasons |= {id(layer): reason} if reason else {}
                continue
            if is_batch_norm(layer, self.keras):
                op = batch_norm(layer, training, self.keras)
                self._add_hidden(layer, prefix, who, op, self.untraced.get(id(parent), ""))
            elif self.keras.is_visible(layer):
                path = self._path(layer, prefix)
                self.owners[id(layer)] = path
                self.outputs.update(self.read_calls(layer, path, training, seen=seen))
            else:
                self.untraced.setdefault(id(layer), self.untraced.get(id(parent), ""))
                owner = self._owner(layer, prefix)
                self.read_sublayers(layer, f"{owner}/", label(layer), training)
        if not is_visible:
            self._list_unreachable(self.keras.all_layers_in(parent), who)

    def list_unreachable(self, model: Any) -> None:
        """Lists BatchNormalizations that were not found in any attribute, so that none is lost."""
        for part in parts(model):
            direct = part._flatten_layers(include_self=False, recursive=False)
            self._list_unreachable(direct, label(part))

    def _list_unreachable(self, modules: Iterable[Any], who: str) -> None:
        for layer in modules:
            if is_batch_norm(layer, self.keras) and id(layer) not in self.owners:
                op = BatchNorm(None, Reason(Obstacle.OUT_OF_REACH, who))
                self._add_hidden(layer, "", who, op)

    def apply_bindings(self) -> None:
        """Notes which layers are called visibly and cannot be changed for all that."""
        seen = {node.owner for node in self.nodes}
        for hidden in self.hidden:
            if hidden.owner in seen and hidden.op.reason:
                self.bindings.reasons[id(self.layers[hidden.owner])] = hidden.op.reason
        self.hidden = [hidden for hidden in self.hidden if hidden.owner not in seen]
        self.nodes = [
            self.bindings.applied(node, self.layers[node.owner], self.keras) for node in self.nodes
        ]

    def _add_hidden(self, layer: Any, prefix: str, who: str, op: BatchNorm, why: str = "") -> None:
        rank = getattr(layer.input_spec, "ndim", None)
        owner = self._owner(layer, prefix)
        self.hidden.append(HiddenBatchNorm(owner, who, op, rank, _dtype(layer), why))

    def _add_value(self, tensor: Any) -> int:
        value = len(self.values)
        self.values.append(Value(self.keras.shape_of(tensor), self.keras.dtype_of(tensor)))
        if self.keras.carries_mask(tensor):
            self.with_mask.add(value)
        return value

    def _path(self, model: Any, prefix: str) -> str:
        return f"{prefix}{model.name}/"

    def _owner(self, layer: Any, prefix: str) -> str:
        """Unique name of a layer: its path of names, with a number if that is taken."""
        if id(layer) not in self.owners:
            name = path = f"{prefix}{layer.name}"
            number = 2
            while name in self.layers:
                name, number = f"{path}#{number}", number + 1
            self.owners[id(layer)] = name
            self.layers[name] = layer
        return self.owners[id(layer)]

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


def _is_tensor(argument: Any) -> bool:
    """Whether an argument is a tensor or variable, and no array that is part of the code."""
    return hasattr(argument, "shape") and not isinstance(argument, (np.ndarray, np.generic))


_OURS = __name__.partition(".")[0]
_SIZES = {"float16": 2, "bfloat16": 2, "float32": 4}  # of dtypes narrower than the widest


def _dtype(layer: Any) -> str:
    """The narrowest dtype in which a layer's weights are stored or used."""
    names = [getattr(layer, name, None) for name in ("compute_dtype", "dtype")]
    return min(filter(None, names), key=lambda name: _SIZES.get(name, 8), default="float32")

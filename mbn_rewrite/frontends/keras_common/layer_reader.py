"""Reads layers, and what they hold, into the neutral graph; see `reader`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from mbn_rewrite.frontends.keras_common.adapter import KerasAdapter
from mbn_rewrite.frontends.keras_common.batch_norm import batch_norm, is_batch_norm
from mbn_rewrite.frontends.keras_common.bindings import Bindings
from mbn_rewrite.frontends.keras_common.calls import (
    Call,
    Record,
    other_arguments,
    training_of,
)
from mbn_rewrite.frontends.keras_common.cloning import is_stock, label, parts
from mbn_rewrite.frontends.keras_common.op_table import describe
from mbn_rewrite.frontends.keras_common.recorded_calls import RecordedCalls
from mbn_rewrite.frontends.keras_common.references import referred_to
from mbn_rewrite.frontends.keras_common.sublayers import sublayers
from mbn_rewrite.ir.graph import BatchNorm, HiddenBatchNorm, Node, Op, Several, Value
from mbn_rewrite.ir.reasons import Obstacle, Reason


@dataclass
class LayerReader(ABC):
    """What has been read of a model, and the readers of its single layers.

    Attributes:
        keras: the adapter of the model's Keras.
        leaves_code: whether what code calls is to stay as it is.
        values: the values of the graph.
        nodes: its nodes.
        outputs: values that have to stay what they are.
        hidden: BatchNormalizations whose calls cannot be seen.
        layers: the layer of each owner.
        owners: id(layer) -> owner.
        masked: owners of layers that are called with a mask at least once.
        with_mask: values that may come with a mask.
        calls: the calls behind nodes, as Keras has them on record.
        traced: id(layer) -> layer whose code was traced, and its owner.
        untraced: id(layer) -> why it was not traced.
        bindings: what binds layers to be as they are.
        unsure: models whose configuration may mislead, by their id.
        called_by_code: ids of visible models that were read where code calls them, and only there.
    """

    keras: KerasAdapter
    leaves_code: bool = False
    values: list[Value] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    outputs: set[int] = field(default_factory=set)
    hidden: list[HiddenBatchNorm] = field(default_factory=list)
    layers: dict[str, Any] = field(default_factory=dict)
    owners: dict[int, str] = field(default_factory=dict)
    masked: set[str] = field(default_factory=set)
    with_mask: set[int] = field(default_factory=set)
    calls: RecordedCalls = field(init=False)
    traced: dict[int, tuple[Any, str]] = field(default_factory=dict)
    untraced: dict[int, str] = field(default_factory=dict)
    bindings: Bindings = field(default_factory=Bindings)
    unsure: dict[int, Any] = field(default_factory=dict)
    called_by_code: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.calls = RecordedCalls(self.keras)

    @abstractmethod
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
        referred = {} if is_visible else referred_to(parent, self.keras)
        self.bind_referred(referred, who)
        for _, layer in sublayers(parent, self.keras):
            self.bindings.held.add(id(layer))
            if not self.keras.is_visible(parent):
                visible = filter(self.keras.is_visible, parts(layer))
                self.bindings.in_code |= {id(model) for model in visible}
            if not is_visible:  # in a visible parent's copy, the sublayer's copy takes its place
                self.bindings.parents.setdefault(id(layer), who)
            # Models that a model has, an encoder and a decoder, are used by themselves, too.
            for_itself = isinstance(parent, self.keras.model) and id(layer) in self.called_by_code
            if id(layer) in self.owners and not for_itself:
                if is_batch_norm(layer, self.keras) and training is not False:
                    reason = batch_norm(layer, training, self.keras).reason
                    self.bindings.reasons |= {id(layer): reason} if reason else {}
                continue
            if is_batch_norm(layer, self.keras):
                op = batch_norm(layer, training, self.keras)
                reason = self.keras.reason_within(parent)
                op = BatchNorm(None, reason, op.axis) if reason else op
                if self.leaves_code and not is_visible and not op.reason:
                    op = BatchNorm(None, Reason(Obstacle.TRIED, who))
                self._add_hidden(layer, prefix, who, op, self.untraced.get(id(parent), ""))
            elif self.keras.is_visible(layer):
                path = self._path(layer, prefix)
                self.owners[id(layer)] = path
                self.called_by_code.discard(id(layer))
                self.outputs.update(self.read_calls(layer, path, training, seen=seen))
            else:
                self.untraced.setdefault(id(layer), self.untraced.get(id(parent), ""))
                owner = self._owner(layer, prefix)
                self.read_sublayers(layer, f"{owner}/", label(layer), training)
        # Keras's own classes have theirs in attributes, unless they were given something else.
        if not is_visible and (referred or not is_stock(type(parent))):
            self._list_unreachable(self.keras.all_layers_in(parent), who)

    def bind_referred(self, referred: dict[int, Any], who: str) -> None:
        """Binds layers that code which is not seen refers to, with all that they hold."""
        for layer in referred.values():
            self.bindings.strangers |= dict.fromkeys(map(id, parts(layer)), who)

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
        self.nodes = self.calls.described(
            [self.bindings.applied(n, self.layers[n.owner], self.keras) for n in self.nodes],
            self.bindings.held,
        )

    def _add_hidden(self, layer: Any, prefix: str, who: str, op: BatchNorm, why: str = "") -> None:
        rank = getattr(layer.input_spec, "ndim", None)
        owner = self._owner(layer, prefix)
        self.hidden.append(HiddenBatchNorm(owner, who, op, rank, narrowest_dtype(layer), why))

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


_SIZES = {"float16": 2, "bfloat16": 2, "float32": 4}  # of dtypes narrower than the widest


def narrowest_dtype(layer: Any) -> str:
    """The narrowest dtype in which a layer's weights are stored or used."""
    names = [getattr(layer, name, None) for name in ("compute_dtype", "dtype")]
    return min(filter(None, names), key=lambda name: _SIZES.get(name, 8), default="float32")

"""Reads what the code of layers calls, by a trace of it; see `reader`."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import numpy as np

from mbn_rewrite.frontends.keras_common.batch_norm import is_batch_norm
from mbn_rewrite.frontends.keras_common.calls import Record, other_arguments
from mbn_rewrite.frontends.keras_common.cloning import is_stock, label, parts
from mbn_rewrite.frontends.keras_common.layer_reader import LayerReader
from mbn_rewrite.frontends.keras_common.probing import NotTraceable, Trace
from mbn_rewrite.frontends.keras_common.references import referred_to
from mbn_rewrite.frontends.keras_common.sublayers import all_sublayers, sublayers
from mbn_rewrite.frontends.keras_common.tracing import Tracer
from mbn_rewrite.ir.graph import (
    BatchNorm,
    Clip,
    Input,
    Node,
    Op,
    Opaque,
    PositivelyHomogeneous,
    Several,
)
from mbn_rewrite.ir.reasons import Obstacle, Reason


class CodeReader(LayerReader):
    """Reader of layers, and models, that call others in Python code."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.tracer = Tracer(self.keras)

    @abstractmethod
    def _read_call(
        self,
        record: Record,
        prefix: str,
        training: bool | None,
        sources: list[int],
        sizes_hold: bool,
        caller: str = "",
    ) -> list[int]:
        """Reads a call; returns the values of its results."""

    def read_subclassed(self, model: Any) -> None:
        """Reads a model that calls its layers in Python code."""
        record = self.keras.call_of(model)
        if record is None:
            self.untraced[id(model)] = "it is not known what it is called with"
        elif self.keras.is_traced(model):
            self.untraced[id(model)], record = "its call is a tf.function", None
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

    def _is_holder(self, layer: Any) -> bool:
        """Whether a layer may call others in code that can be traced."""
        if (
            not isinstance(layer, self.keras.layers.Layer)
            or is_batch_norm(layer, self.keras)
            or type(layer).__module__.partition(".")[0] == _OURS  # they are as they are to be
            or self.keras.is_traced(layer)
            or self.keras.reason_within(layer)
        ):
            return False
        if is_stock(type(layer)):
            is_code = type(layer) is self.keras.layers.Lambda
            return is_code and bool(referred_to(layer, self.keras))
        return len(parts(layer)) > 1 or bool(referred_to(layer, self.keras))

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
        if self.leaves_code:
            return None
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
        self.bindings.asked |= dict.fromkeys(trace.asked, who)
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
        arguments = other_arguments(record, self.keras) if is_function else ()
        if any(map(self.keras.is_variable, arguments)):
            return Opaque("computes with a weight that code gives it")
        if any(map(_is_tensor, arguments)):
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
                    is_unseen = id(inner) in self.bindings.strangers
                    obstacle = Obstacle.CALLED_UNSEEN if is_unseen else Obstacle.NOT_CALLED
                    op = BatchNorm(None, Reason(obstacle, label(layer)))
                    self._add_hidden(inner, prefix, label(layer), op)
            self.read_sublayers(layer, prefix, label(layer), training=False, is_seen=True)


def _is_tensor(argument: Any) -> bool:
    """Whether an argument is a tensor or variable, and no array that is part of the code."""
    return hasattr(argument, "shape") and not isinstance(argument, (np.ndarray, np.generic))


_OURS = __name__.partition(".")[0]

"""Reads TimeDistributed layers, with the steps as further examples; see `reader`."""

from __future__ import annotations

from typing import Any

from mbn_rewrite.frontends.keras_common.batch_norm import is_batch_norm
from mbn_rewrite.frontends.keras_common.calls import Record, other_arguments
from mbn_rewrite.frontends.keras_common.cloning import label
from mbn_rewrite.frontends.keras_common.code_reader import CodeReader
from mbn_rewrite.frontends.keras_common.layer_reader import narrowest_dtype
from mbn_rewrite.frontends.keras_common.probing import Trace
from mbn_rewrite.frontends.keras_common.time_distributed import examples_as_steps, steps_as_examples
from mbn_rewrite.ir.graph import BatchNorm, Node, Value


class TimeStepReader(CodeReader):
    """Reader of layers that apply others at every time step."""

    def _is_distributed(self, record: Record, sources: list[int]) -> bool:
        """Whether a call applies something that can be read at every time step."""
        layer = record.layer
        if type(layer) is not self.keras.layers.TimeDistributed or other_arguments(
            record, self.keras
        ):
            return False
        inner = layer.layer
        if len(sources) != 1 or len(record.outputs) != 1 or self.with_mask & set(sources):
            return False
        if not self.keras.is_visible(inner):
            return is_batch_norm(inner, self.keras) or self._is_holder(inner)
        shape, dtype = self.values[sources[0]].shape, self.values[sources[0]].dtype
        if len(inner.inputs) != 1 or len(inner.outputs) != 1:
            return False
        (tensor,) = inner.inputs
        rank = len(self.keras.shape_of(tensor))
        return (rank, self.keras.dtype_of(tensor)) == (len(shape) - 1, dtype)

    def _read_steps(
        self, record: Record, prefix: str, training: bool | None, sources: list[int]
    ) -> list[int] | None:
        """Reads what is applied at every time step, with the steps as further examples.

        Returns:
            The values of the results, as `_read_call` does; None where it cannot be read.
        """
        if not self._is_distributed(record, sources):
            return None
        layer, inner, (tensor,), (source,) = (
            record.layer,
            record.layer.layer,
            record.outputs,
            sources,
        )
        trace = None
        if self._is_holder(inner):
            trace = self._trace_of_step(inner, training, source)
            if trace is None:
                return None
        owner = self._owner(layer, prefix)
        self.traced[id(layer)] = layer, owner
        self.bindings.held.add(id(inner))
        shape, dtype = self.values[source].shape, self.values[source].dtype
        step = len(self.values)
        self.values.append(Value((None, *shape[2:]), dtype))
        kind, merged = type(layer).__name__, steps_as_examples(len(shape))
        self.nodes.append(Node(owner, kind, merged, (source,), (step,), narrowest_dtype(layer)))
        if trace is None:
            given = self._read_step(inner, owner, training, step, tensor)
        else:
            (given,) = self._read_trace(inner, trace, self._owner(inner, f"{owner}/"), [step])
        result = self._add_value(tensor)
        parted = examples_as_steps(len(self.values[result].shape))
        self.nodes.append(Node(owner, kind, parted, (given,), (result,), narrowest_dtype(layer)))
        return [result]

    def _trace_of_step(self, inner: Any, training: bool | None, source: int) -> Trace | None:
        """Trace of what a layer that calls others does with one step; None without one result."""
        shape, dtype = self.values[source].shape, self.values[source].dtype
        step = self.keras.tensor_like((None, *shape[2:]), dtype)
        call = Record(inner, (step,), {}, (step,), ())
        if training is not False:
            self.untraced[id(inner)] = "it is called in training"
            return None
        trace = self._trace(call, None)
        return trace if trace is not None and len(trace.outputs) == 1 else None

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
        node = Node(name, kind, op, (step,), (given,), narrowest_dtype(inner), caller=who)
        self.nodes.append(node)
        return given

"""Recognises BatchNormalization in graphs.

It is one operation (FusedBatchNorm, V2, V3, BatchNormWithGlobalNormalization), which is recognised
here, or arithmetic; see `match_arithmetic`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from mbn_rewrite.frontends.saved_model.flags import advice_on_switch
from mbn_rewrite.frontends.saved_model.function_graph import FunctionGraph, source_of
from mbn_rewrite.frontends.saved_model.weights import Constants
from mbn_rewrite.ir.channel_map import ChannelMap
from mbn_rewrite.ir.reasons import Obstacle, Reason

FUSED = {
    *("FusedBatchNorm", "FusedBatchNormV2", "FusedBatchNormV3"),
    "BatchNormWithGlobalNormalization",
}


@dataclass(frozen=True)
class Norm:
    """A BatchNormalization in a graph.

    Attributes:
        ops: its operations; those that compute its constants are left out.
        source: the tensor that it normalises.
        sink: the tensor that it gives.
        rank: the number of axes of both.
        axis: of its channels, or None where it stays.
        map: scale and shift of each channel, or None where it stays.
        keys: the keys of the stored arrays, and of the constants, that it reads.
        reason: why it stays, or None.
    """

    ops: tuple[Any, ...]
    source: Any
    sink: Any
    rank: int
    axis: int | None
    map: ChannelMap | None
    keys: tuple[Any, ...]
    reason: Reason | None = None


@dataclass(frozen=True)
class _FusedOp:
    """Operands and attributes of a fused operation, whatever its type.

    Attributes:
        op: the operation.
        source: the tensor that it normalises.
        parameters: gamma, beta, mean and variance.
        epsilon: what is added to the variance.
        is_scaled: whether gamma is used.
        is_training: whether it normalises by the batch.
    """

    op: Any
    source: Any
    parameters: tuple[Any, Any, Any, Any]
    epsilon: float
    is_scaled: bool
    is_training: bool

    @classmethod
    def of(cls, op: Any) -> _FusedOp:
        if op.type == "BatchNormWithGlobalNormalization":
            source, mean, variance, beta, gamma = op.inputs
            epsilon = op.get_attr("variance_epsilon")
            is_scaled, is_training = bool(op.get_attr("scale_after_normalization")), False
        else:
            source, gamma, beta, mean, variance = op.inputs
            epsilon, is_scaled = op.get_attr("epsilon"), True
            is_training = op.get_attr("is_training")
        parameters = (gamma, beta, mean, variance)
        return cls(op, source, parameters, epsilon, is_scaled, is_training)


def fused_norm(constants: Constants, op: Any) -> Norm | None:
    """The BatchNormalization of a fused operation; None where it is no BatchNormalization."""
    fused = _FusedOp.of(op)
    rank, axis = _fused_rank(op), channel_axis(op)
    keys = tuple(key for tensor in fused.parameters for key in keys_of(constants, tensor))
    if fused.is_training and _is_other_normalization(constants, fused, keys):
        return None
    reason = _reason_to_stay(constants, fused)
    channel_map = None if reason else _map_of(constants, fused, axis)
    if channel_map is not None and not channel_map.is_finite:
        reason = Reason(Obstacle.NO_FINITE_SCALE, "its moving variance and epsilon")
    if reason:
        return Norm((op,), fused.source, op.outputs[0], rank, None, None, keys, reason)
    source, sink, casts = ends_of(constants.function, fused.source, op.outputs[0])
    return Norm((op, *casts), source, sink, rank, axis, channel_map, keys)


def _is_other_normalization(constants: Constants, fused: _FusedOp, keys: tuple[Any, ...]) -> bool:
    """Whether a fused operation in training mode is part of another normalisation."""
    gamma_and_beta = fused.parameters[:2]
    if any(constants.value(t) is None and not constants.written(t) for t in gamma_and_beta):
        return True  # LayerNormalization makes its scale of ones as it runs
    # or beforehand, where the batch size is fixed
    reshaped = source_of(fused.source).op.type == "Reshape"
    return reshaped and all(key[0] == "constant" for key in keys)


def _reason_to_stay(constants: Constants, fused: _FusedOp) -> Reason | None:
    """Reason why a fused operation stays, apart from its map, or None."""
    if fused.is_training:
        return Reason(Obstacle.TRAINING_OPERATION)
    for tensor in fused.parameters:
        written = constants.written(tensor)
        if written is not None:
            return Reason(Obstacle.WRITTEN, written[1])
    arrays = [constants.value(tensor) for tensor in fused.parameters]
    if any(array is None for array in arrays):
        switch = next(filter(_given, map(constants.switch_before, fused.parameters)), None)
        advised = "" if switch is None else advice_on_switch(constants.function, switch)
        return Reason(Obstacle.BRANCH, advised) if advised else Reason(Obstacle.COMPUTED)
    if any(_is_read(constants.function, tensor) for tensor in fused.op.outputs[1:]):
        return Reason(Obstacle.STATISTICS_READ)
    if not all(np.all(np.isfinite(array)) for array in arrays if array is not None):
        return Reason(Obstacle.NOT_FINITE)
    return None


def _given(switch: Any) -> bool:
    return switch is not None


def _map_of(constants: Constants, fused: _FusedOp, axis: int) -> ChannelMap:
    gamma, beta, mean, variance = (np.asarray(constants.value(t)) for t in fused.parameters)
    scale = gamma if fused.is_scaled else np.ones_like(gamma)
    return ChannelMap.of_batch_norm(scale, beta, mean, variance, fused.epsilon, axis)


def channel_axis(op: Any) -> int:
    """The channel axis of an operation that has a data format."""
    return 1 if _layout(op) in (b"NCHW", b"NCDHW") else _fused_rank(op) - 1


def _fused_rank(op: Any) -> int:
    """The rank of an operation's input, by its layout where the shape is not known."""
    return op.inputs[0].shape.rank or (5 if _layout(op) in (b"NDHWC", b"NCDHW") else 4)


def _layout(op: Any) -> bytes:
    return bytes(op.get_attr("data_format")) if "data_format" in op.node_def.attr else b"NHWC"


def _is_read(function: FunctionGraph, tensor: Any) -> bool:
    return bool(function.readers.get(tensor.name)) or tensor.name in function.output_names


def keys_of(constants: Constants, tensor: Any) -> tuple[Any, ...]:
    """The keys of all stored arrays in the expression of a parameter."""
    return tuple(stored.key for stored in constants.stored_in(tensor))


def ends_of(function: FunctionGraph, source: Any, sink: Any) -> tuple[Any, Any, tuple[Any, ...]]:
    """Source and sink of a BatchNormalization, beyond casts around it that undo each other.

    Returns:
        The source, the sink, and the casts.
    """
    inner = source_of(source)
    reader = function.only_reader(sink)
    if (
        inner.op.type == "Cast"
        and function.only_reader(inner) is not None
        and reader is not None
        and reader[0].type == "Cast"
        and reader[0].outputs[0].dtype == inner.op.inputs[0].dtype
        and inner.op.inputs[0].dtype.is_floating
    ):
        return inner.op.inputs[0], reader[0].outputs[0], (inner.op, reader[0])
    return source, sink, ()

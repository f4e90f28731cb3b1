"""Operations in their graphs, and their descriptions for passes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tensorflow as tf

from mbn_rewrite.frontends.saved_model.function_graph import FunctionGraph
from mbn_rewrite.frontends.saved_model.stored_arrays import Weight
from mbn_rewrite.frontends.saved_model.weights import Constants
from mbn_rewrite.ir.graph import Op, Several, Shape


@dataclass(frozen=True)
class Site:
    """An operation in its graph.

    Attributes:
        op: the tf.Operation.
        constants: the constants of its function.
    """

    op: Any
    constants: Constants

    @property
    def function(self) -> FunctionGraph:
        return self.constants.function

    def shape(self, index: int) -> Shape:
        return shape_of(self.op.inputs[index])

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        """The shape of operand 1; () where it is not fully known."""
        shape = self.op.inputs[1].shape
        return tuple(shape) if shape.is_fully_defined() else ()

    @property
    def output(self) -> Shape:
        return shape_of(self.op.outputs[0])

    def number(self, index: int) -> np.ndarray | None:
        """A constant operand such as an axis, or None."""
        value = tf.get_static_value(self.op.inputs[index])
        return self.constants.value(self.op.inputs[index]) if value is None else np.asarray(value)

    def numbers(self, index: int) -> list[int | None] | None:
        """The whole numbers in an operand, None for each that is computed while the model runs."""
        value = self.number(index)
        if value is None:
            value = tf.get_static_value(self.op.inputs[index], partial=True)
        return None if value is None else [None if each is None else int(each) for each in value]

    def attribute(self, name: str) -> Any:
        return self.op.get_attr(name)

    @property
    def layout(self) -> str | None:
        """The order of the axes, such as "NHWC", if the operation says it."""
        says = "data_format" in self.op.node_def.attr
        return self.attribute("data_format").decode() if says else None

    @property
    def channels_first(self) -> bool:
        return self.layout in ("NCHW", "NCDHW")

    @property
    def channel_axis(self) -> int:
        return 1 if self.channels_first else len(self.output) - 1


@dataclass(frozen=True)
class Described:
    """Description of an operation for passes.

    Attributes:
        op: the neutral operation, or one for each output.
        data: the tensors that it works on; weights are left out.
        result: its output.
        weights: by the names that `op` uses.
        absorbed: operations that belong to it: the addition of its bias, and those in between.
        axis: of a linear operation, the channel axis of its own output, before any bias, or None
            where there are several.
        users: the operations that use its weights, by name, where these are not the operation
            itself and the addition of the bias.
        otherwise: what it is where its weights cannot be edited, or None for `Opaque`.
    """

    op: Op | Several
    data: tuple[Any, ...]
    result: Any
    weights: dict[str, Weight] = field(default_factory=dict)
    absorbed: tuple[Any, ...] = ()
    axis: int | None = -1
    users: Mapping[str, Any] = field(default_factory=dict)
    otherwise: Op | None = None


Answer = Op | Described


def shape_of(tensor: Any) -> Shape:
    """A tensor's shape; () also where its rank is not known."""
    return () if tensor.shape.rank is None else tuple(tensor.shape.as_list())

"""Operations in their graphs, and their descriptions for passes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tensorflow as tf

from mbn_rewrite.frontends.saved_model.function_graph import FunctionGraph
from mbn_rewrite.frontends.saved_model.stored_arrays import Weight
from mbn_rewrite.frontends.saved_model.weights import Constants
from mbn_rewrite.ir.graph import Op, Shape


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
        return None if value is None else np.asarray(value)

    def attribute(self, name: str) -> Any:
        return self.op.get_attr(name)

    @property
    def channels_first(self) -> bool:
        return "data_format" in self.op.node_def.attr and self.attribute("data_format") in (
            b"NCHW",
            b"NCDHW",
        )

    @property
    def channel_axis(self) -> int:
        return 1 if self.channels_first else len(self.output) - 1


@dataclass(frozen=True)
class Described:
    """Description of an operation for passes.

    Attributes:
        op: the neutral operation.
        data: the tensors that it works on; weights are left out.
        result: its output.
        weights: by the names that `op` uses.
        absorbed: operations that belong to it: the addition of its bias, and those in between.
        axis: of a linear operation, the channel axis of its own output, before any bias.
    """

    op: Op
    data: tuple[Any, ...]
    result: Any
    weights: dict[str, Weight] = field(default_factory=dict)
    absorbed: tuple[Any, ...] = ()
    axis: int = -1


Answer = Op | Described


def shape_of(tensor: Any) -> Shape:
    """A tensor's shape; () also where its rank is not known."""
    return () if tensor.shape.rank is None else tuple(tensor.shape.as_list())

"""Calls of layers: as models record them, and as the table of operations looks at them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mbn_rewrite.ir.graph import Op, Several, Shape

if TYPE_CHECKING:
    from mbn_rewrite.frontends.keras_common.adapter import KerasAdapter


@dataclass(frozen=True, eq=False)
class Record:
    """One call of a layer as recorded in a model.

    Attributes:
        layer: the layer, or whatever else was called.
        args: its positional arguments.
        kwargs: its keyword arguments.
        inputs: the Keras tensors among the arguments, flattened.
        outputs: the Keras tensors it returned, flattened; an input layer has only these.
    """

    layer: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: tuple[Any, ...]
    outputs: tuple[Any, ...]


@dataclass(frozen=True)
class Call:
    """One call of a layer, with all that decides which operation it is.

    Attributes:
        keras: the adapter of the layer's Keras.
        layer: the layer.
        inputs: the shapes of all tensors passed to it.
        output: the shape of its first output.
        training: False at inference, True if its caller asked for training, None if that is
            decided at run time.
        arguments: the arguments other than tensors.
        sizes_hold: whether inputs of other sizes are refused.
        record: the call as recorded, where it is.
    """

    keras: KerasAdapter
    layer: Any
    inputs: tuple[Shape, ...]
    output: Shape
    training: bool | None = False
    arguments: tuple[Any, ...] = ()
    sizes_hold: bool = True
    record: Record | None = None

    @property
    def sure_output(self) -> Shape:
        """Shape of the output; its last size, which matters for biases, only if it is certain."""
        return self.output if self.sizes_hold else (*self.output[:-1], None)


Describer = Callable[[Call], Op | Several]  # maps a call to the operation that it performs


def training_of(record: Record, inherited: bool | None, keras: KerasAdapter) -> bool | None:
    """Whether a call is in training; see `Call`.

    Args:
        record: the call.
        inherited: whether the call of the model is.
        keras: the adapter of its Keras.
    """
    value = record.kwargs.get("training")
    if value is None and len(record.args) > 1:
        names = list(inspect.signature(record.layer.call).parameters)
        if "training" in names[: len(record.args)]:
            value = record.args[names.index("training")]
    value = keras.training(value, inherited)
    return bool(value) if isinstance(value, (bool, int, np.bool_)) else None


def other_arguments(record: Record, keras: KerasAdapter) -> tuple[Any, ...]:
    """Arguments of a call other than Keras tensors, without names, flags and Nones."""
    arguments = (record.args, {k: v for k, v in record.kwargs.items() if k != "name"})
    tensors = {id(t) for t in record.inputs}
    return tuple(
        value
        for value in keras.flatten(arguments)
        if value is not None and not isinstance(value, bool) and id(value) not in tensors
    )

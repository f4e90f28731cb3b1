"""Weights of its own for a call that shares a stored array with others."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from mbn_rewrite.frontends.saved_model.graph_editor import GraphEditor
from mbn_rewrite.frontends.saved_model.reading import LinearCall

_TABLE_FIRST = ("ResourceGather", "GatherV2")  # others read their data first, and then a kernel


def use_in_place(editor: GraphEditor, call: LinearCall, name: str, variable: Any) -> None:
    """Has a call use a variable in the place of the stored array of a weight.

    What the call does with that array on the way, it does with the variable.

    Args:
        editor: of the call's function.
        call: the call.
        name: of the weight, "kernel" or "bias".
        variable: of the shape and the dtype of the stored array.
    """
    weight, (op, index) = call.described.weights[name], _reader(call, name)
    if op.inputs[index].dtype == tf.resource:
        editor.set_input(op.name, index, editor.handle(variable))
        return
    place, dtype = f"{call.op.name}/{name}", variable.dtype
    tensor = editor.read(variable, weight.stored.is_variable)
    if weight.view != tuple(variable.shape):
        shape = editor.const(f"{place}/shape", np.array(weight.view, np.int32))
        tensor = editor.add(
            f"{place}/reshaped", "Reshape", [tensor, shape], T=dtype, Tshape=tf.int32
        )
    if weight.order != tuple(range(len(weight.order))):
        order = editor.const(f"{place}/order", np.array(weight.order, np.int32))
        tensor = editor.add(
            f"{place}/transposed", "Transpose", [tensor, order], T=dtype, Tperm=tf.int32
        )
    for wanted in (tf.as_dtype(weight.dtype), op.inputs[index].dtype):
        if wanted != dtype:
            tensor = editor.add(f"{place}/cast", "Cast", [tensor], SrcT=dtype, DstT=wanted)
            dtype = wanted
    editor.set_input(op.name, index, tensor)


def _reader(call: LinearCall, name: str) -> tuple[Any, int]:
    """The operation that reads a weight, and at which position."""
    if name == "kernel":
        return call.op, 0 if call.op.type in _TABLE_FIRST else 1
    *before, total = (call.op, *call.described.absorbed)
    if total.type == "BiasAdd":
        return total, 1
    return total, int(total.inputs[0].name == before[-1].outputs[0].name)

"""Weights of a SavedModel: variables and constants, and values computed from them.

A graph rarely feeds a variable straight to an operation: it is read, cast, and reshaped on the
way. `Constants.weight` follows that way back to the stored array, `Constants.kernel` takes what is
computed of stored arrays alone for one, and `Constants.value` computes small expressions such as
the gamma * rsqrt(variance + epsilon) of a BatchNormalization, in float64 where it knows how.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import tensorflow as tf

from mbn_rewrite.frontends.saved_model.evaluation import MOST_ELEMENTS, Evaluation
from mbn_rewrite.frontends.saved_model.flags import switch_before
from mbn_rewrite.frontends.saved_model.function_graph import FunctionGraph, Writes, source_of
from mbn_rewrite.frontends.saved_model.stored_arrays import Computed, Stored, Weight
from mbn_rewrite.frontends.saved_model.variable_writes import ALIASES
from mbn_rewrite.ir.channel_map import Array

# Larger results are no per-channel parameters.
_MOST_ELEMENTS = 1 << 20
_FEW = 1 << 14  # elements up to which computed arrays are told apart by their values in float64


class Constants:
    """Tensors of one function that do not change from run to run.

    Args:
        function: the function.
        writes: variables that functions write to, which are no constants.
    """

    def __init__(self, function: FunctionGraph, writes: Writes) -> None:
        self.function = function
        self._writes = writes
        self._values: dict[str, Array | None] = {}
        self._weights: dict[str, Weight | None] = {}
        self._computed: dict[str, Weight] = {}  # by the tensor, past what forwards it

    @cached_property
    def _evaluation(self) -> Evaluation:
        return Evaluation(self.function, self._writes)

    @cached_property
    def _if_nothing_wrote(self) -> Evaluation:
        return Evaluation(self.function, Writes())

    def is_fixed(self, tensor: Any) -> bool:
        """Whether a tensor is the same in every run."""
        return self._evaluation.is_fixed(tensor)

    def switch_before(self, tensor: Any) -> Any:
        """The output of a switch of TensorFlow 1 that a weight comes through, or None."""
        return switch_before(self.function, self._evaluation, tensor)

    @cached_property
    def evaluation_given_shapes(self) -> Evaluation:
        """Evaluation of what is computed of shapes, too: the results of Shape are given."""
        shapes = [op.name for op in self.function.graph.get_operations() if op.type == "Shape"]
        return Evaluation(self.function, self._writes, shapes)

    # -- stored arrays -------------------------------------------------------------------

    def weight(self, tensor: Any) -> Weight | None:
        """The stored array that a tensor holds; None where it is computed."""
        if tensor.name not in self._weights:
            self._weights[tensor.name] = self._weight(tensor)
        return self._weights[tensor.name]

    def _weight(self, tensor: Any) -> Weight | None:
        op = tensor.op
        if op.type in ("ReadVariableOp", "Const"):
            stored = self._stored(op)
            if stored is None:
                return None
            return whole(stored)
        if op.type not in ALIASES | {"Cast", "Transpose"} and not _reshapes(op):
            return None
        inner = self.weight(op.inputs[0])
        if inner is None or op.type in ALIASES:
            return inner
        if op.type == "Cast":
            return _cast(inner, tensor.dtype)
        if op.type == "Transpose":
            order = tf.get_static_value(op.inputs[1])
            if order is None:
                return None
            return replace(inner, order=tuple(inner.order[int(axis)] for axis in order))
        shape = tensor.shape
        if not shape.is_fully_defined() or inner.order != tuple(range(len(inner.order))):
            return None
        return replace(inner, view=tuple(shape), order=tuple(range(shape.rank)))

    def gathered(self, op: Any) -> Weight | None:
        """The stored array whose rows an operation gathers by its handle."""
        stored = self._stored(op)
        return None if stored is None else whole(stored)

    def _stored(self, op: Any) -> Stored | None:
        if op.type == "Const":
            tensor = op.outputs[0]
            if tensor.dtype == tf.string or not tensor.shape.is_fully_defined():
                return None
            return Stored(
                ("constant", id(self.function), op.name), op.name, tuple(tensor.shape),
                tensor.dtype.name, lambda: _array(op), (self.function, op.name),
            )  # fmt: skip
        stored = self.stored_behind(op.inputs[0])
        dtype = op.outputs[0].dtype
        return stored if stored is not None and stored.dtype == dtype.name else None

    def stored_behind(self, handle: Any) -> Stored | None:
        """The variable behind a handle."""
        variable = self.function.variable(handle)
        if variable is None or id(variable) in self._writes.by:
            return None
        if not variable.shape.is_fully_defined():
            return None
        return Stored(
            ("variable", id(variable)), variable.name.partition(":")[0],
            tuple(variable.shape), variable.dtype.name, lambda: _read(variable), variable,
        )  # fmt: skip

    def kernel(self, tensor: Any) -> Weight | None:
        """The stored array that a tensor holds, or the one that is computed of stored ones."""
        weight = self.weight(tensor)
        if weight is not None:
            return weight
        tensor = source_of(tensor)
        if tensor.name not in self._computed:
            shape = tensor.shape
            if not tensor.dtype.is_floating or not shape.is_fully_defined():
                return None
            if shape.num_elements() > MOST_ELEMENTS or not self.is_fixed(tensor):
                return None
            if self.depends_on(tensor, _QUANTISING):
                return None  # it is to stay on its grid
            stored = self._stored_computed(tensor)
            order = tuple(range(shape.rank))
            self._computed[tensor.name] = Weight(stored, stored.shape, order, stored.dtype)
        return self._computed[tensor.name]

    def computed(self, tensor: Any) -> Weight | None:
        """The computed array that a tensor was found to be by `kernel`, if it was."""
        return self._computed.get(source_of(tensor).name)

    def _stored_computed(self, tensor: Any) -> Stored:
        variables = sorted({s.key for s in self.stored_in(tensor) if s.is_variable})
        place = Computed(self.function, tensor.name, bool(variables))

        def read() -> Array:
            return self._evaluation.run([tensor])[0]

        name = tensor.op.name
        # Functions that compute the same of the same variables share it.
        own = () if variables else (id(self.function), name)
        # Of few numbers without a session where that can be: it takes longer than all else here.
        value = self.value(tensor) if tensor.shape.num_elements() <= _FEW else None
        array = np.ascontiguousarray(read() if value is None else value)
        digest = hashlib.sha256(array.tobytes()).hexdigest()
        key = ("computed", tuple(variables), tensor.dtype.name, digest, own)
        return Stored(key, name, tuple(tensor.shape), tensor.dtype.name, read, place)

    def written(self, tensor: Any) -> tuple[Any, str] | None:
        """A variable in the expression of a parameter that functions write to, and who does."""
        if not self._if_nothing_wrote.is_fixed(tensor):
            return None
        pending, seen = [tensor.op], set()
        while pending:
            op = pending.pop()
            if op.name in seen:
                continue
            seen.add(op.name)
            if op.type in ("ReadVariableOp", "ResourceGather"):
                variable = self.function.variable(op.inputs[0])
                who = self._writes.by.get(id(variable))
                if who is not None:
                    return variable, who
            pending += [source.op for source in reversed(op.inputs)]
        return None

    # -- computed values -----------------------------------------------------------------

    def value(self, tensor: Any) -> Array | None:
        """A tensor's value, floats in float64; None where it depends on the run's inputs.

        None also for large tensors.
        """
        if tensor.name not in self._values:
            self._values[tensor.name] = None  # graphs of TensorFlow 1 may have cycles
            self._values[tensor.name] = self._value(tensor)
        return self._values[tensor.name]

    def _value(self, tensor: Any) -> Array | None:
        size = tensor.shape.num_elements()
        dtype, op = tensor.dtype.base_dtype, tensor.op
        if size is None or size > _MOST_ELEMENTS or not self.is_fixed(tensor):
            return None
        if not (dtype.is_floating or dtype.is_integer or dtype.is_bool):
            return None
        if op.type in ("Const", "ReadVariableOp"):
            weight = self.weight(tensor)
            return None if weight is None else _wide(weight.stored.read())
        if op.type == "BroadcastTo" or _reshapes(op):
            inner = self.value(op.inputs[0])
            if inner is None:
                return None
            if op.type == "BroadcastTo":
                return np.broadcast_to(inner, tuple(tensor.shape))
            return inner.reshape(tuple(tensor.shape))
        compute = _COMPUTE.get(op.type) if dtype.is_floating else None
        arguments = [self.value(argument) for argument in op.inputs] if compute else [None]
        if compute is None or any(argument is None for argument in arguments):
            return _wide(self._evaluation.run([tensor])[0])
        if op.type == "Cast":  # to fewer digits, perhaps
            return _wide(np.asarray(arguments[0]).astype(dtype.as_numpy_dtype))
        with np.errstate(all="ignore"):  # what is not finite is said by who asked
            return np.asarray(compute(*arguments), np.float64)

    def depends_on(self, tensor: Any, kinds: set[str]) -> frozenset[str]:
        """The names of all operations of some kinds in the expression of a constant."""
        found, seen, pending = set(), set(), [tensor.op]
        while pending:
            op = pending.pop()
            if op.name not in seen:
                seen.add(op.name)
                if op.type in kinds:
                    found.add(op.name)
                pending += [source.op for source in op.inputs]
        return frozenset(found)

    def stored_in(self, tensor: Any) -> list[Stored]:
        """The stored arrays in the expression of a constant, in the order they are met."""
        found: dict[Any, Stored] = {}
        pending, seen = [tensor], set()
        while pending:
            current = pending.pop()
            if current.name in seen:
                continue
            seen.add(current.name)
            weight = self.weight(current)
            stored = weight.stored if weight is not None else None
            if current.op.type == "ResourceGather":
                stored = self.stored_behind(current.op.inputs[0])
            if stored is not None:
                found.setdefault(stored.key, stored)
            else:
                pending += reversed(current.op.inputs)
        return list(found.values())


_QUANTISING = {
    *("FakeQuantWithMinMaxArgs", "FakeQuantWithMinMaxVars", "FakeQuantWithMinMaxVarsPerChannel"),
    *("QuantizeAndDequantize", *(f"QuantizeAndDequantizeV{n}" for n in (2, 3, 4))),
}
_COMPUTE: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(ALIASES, lambda x: x),
    "Cast": lambda x: x,  # see `Constants._value`
    "Add": np.add,
    "AddV2": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Div": np.divide,
    "RealDiv": np.divide,
    "Maximum": np.maximum,
    "Minimum": np.minimum,
    "Pow": np.power,
    "Neg": np.negative,
    "Sqrt": np.sqrt,
    "Square": np.square,
    "Rsqrt": lambda x: 1.0 / np.sqrt(x),
    "Reciprocal": np.reciprocal,
    "Inv": np.reciprocal,
}


def _reshapes(op: Any) -> bool:
    """Whether an operation puts its first operand into another shape, and does no more."""
    if op.type != "StridedSlice":
        return op.type in ("Reshape", "ExpandDims", "Squeeze")
    # x[None, :]: all elements are still there, and only axes of size 1 may be new or gone.
    sizes = [tensor.shape.num_elements() for tensor in (op.inputs[0], op.outputs[0])]
    steps = tf.get_static_value(op.inputs[3])
    return sizes[0] == sizes[1] is not None and steps is not None and bool(np.all(steps == 1))


def _read(variable: Any) -> Array:
    """The value of a variable. Not to be written to: on a CPU it is not copied."""
    return np.asarray(variable.read_value())


def whole(stored: Stored) -> Weight:
    """A weight that holds an array as it is stored."""
    return Weight(stored, stored.shape, tuple(range(len(stored.shape))), stored.dtype)


def _cast(weight: Weight, dtype: Any) -> Weight | None:
    """A cast to or from integers is no weight."""
    if not (dtype.is_floating and tf.as_dtype(weight.stored.dtype).is_floating):
        return None
    narrow = min(weight.dtype, dtype.name, key=lambda name: tf.as_dtype(name).size)
    return replace(weight, dtype=narrow)


def _wide(array: Array) -> Array:
    return array.astype(np.float64) if array.dtype.kind in "fV" else array


def _array(op: Any) -> Array:
    return tf.make_ndarray(op.get_attr("value"))

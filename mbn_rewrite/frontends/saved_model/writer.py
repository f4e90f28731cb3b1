"""Carries out a plan on the graphs of a SavedModel's functions.

Graphs are edited as they are stored: readers of a removed BatchNormalization read its input
instead, weights that absorbed something get their new values, and nodes that are no longer needed
are left out. Variables that were not edited stay the same objects.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from mbn_rewrite.errors import RewriteError
from mbn_rewrite.frontends.saved_model.function_graph import FunctionGraph, Writes
from mbn_rewrite.frontends.saved_model.graph_editor import GraphEditor, Rewritten, as_node_name
from mbn_rewrite.frontends.saved_model.own_weights import use_in_place
from mbn_rewrite.frontends.saved_model.reading import (
    ClipCall,
    LinearCall,
    NormCall,
    PlainCall,
    Reading,
)
from mbn_rewrite.frontends.saved_model.stored_arrays import Computed, Row, Stored
from mbn_rewrite.ir.algebra import fold
from mbn_rewrite.ir.channel_map import Array, ChannelMap
from mbn_rewrite.ir.graph import Linear
from mbn_rewrite.passes.precision import check_bounds
from mbn_rewrite.plans import Fold, Form, Plan, Reclip, Remap, Remove, Replace

_EPSILON = 1e-3  # of inserted fused operations, whose variance is 1 less this


def rewritten(
    functions: list[FunctionGraph],
    reading: Reading,
    plan: Plan,
    writes: Writes,
    copies: dict[Any, Any] | None = None,
) -> list[Rewritten]:
    """New graphs for functions, with their weights.

    Variables that absorb something are assigned their new values: functions that were loaded
    with them give other results from then on. With `copies` they are left as they are, and there
    are new ones, which are kept there for other plans with the same edits.

    Raises:
        RewriteError: folding takes weights out of the range of their dtype.
    """
    writer = _Writer(functions, reading, plan, writes, copies)
    writer.carry_out()
    missed = set(plan.actions) ^ writer.done
    if missed:  # a defect of this library, never of the model
        raise RewriteError(f"the plan was not carried out on {sorted(missed)}; please report this")
    new = [editor.finished() for editor in writer.editors.values()]
    for function in new:
        function.captures = {
            name: writer.in_place_of.get(id(external), external)
            for name, external in function.captures.items()
        }
    return new


class _Writer:
    def __init__(
        self,
        functions: list[FunctionGraph],
        reading: Reading,
        plan: Plan,
        writes: Writes,
        copies: dict[Any, Any] | None,
    ) -> None:
        self.copies = copies
        self.in_place_of: dict[int, Any] = {}  # id(a variable) -> its copy with new values
        self.reading = reading
        self.plan = plan
        self.editors = {id(function): GraphEditor(function, writes) for function in functions}
        self.done: set[str] = set()
        self._variables: dict[Any, Any] = {}  # new ones, by owner, name, dtype and shape
        # The calls of each layer as the plan has it, and the owner that they have in the reading.
        self._calls: dict[str, list[LinearCall]] = {}
        self._source: dict[str, str] = {}
        for owner, calls in reading.linears.items():
            for number, call in enumerate(calls):
                maker = plan.maker(owner, number)
                self._calls.setdefault(maker, []).append(call)
                self._source[maker] = owner

    def carry_out(self) -> None:
        calls_of: dict[str, Sequence[Any]] = {**self.reading.norms, **self.reading.clips}
        for owner, calls in calls_of.items():
            action = self.plan.actions.get(owner)
            if action is not None:
                for call in calls:
                    _WRITERS[type(action)](self, owner, call, action)
                self.done.add(owner)
        for owner, removal in self.plan.of(Remove).items():
            for plain in self.reading.plain.get(owner, ()):
                self._bypass(plain, removal)
            self.done.add(owner)  # with what has weights, since nothing reads its result then
        folds = self.plan.of(Fold).items()
        # What is stored is still as it was for the layers that are made for calls of others.
        for owner, action in sorted(folds, key=lambda item: self._is_stored(item[0])):
            self._fold(owner, action)
            self.done.add(owner)

    def _editor(self, function: FunctionGraph) -> GraphEditor:
        return self.editors[id(function)]

    def _bypass(self, call: PlainCall, action: Remove) -> None:
        kept = call.described.data[action.keeps]
        self._editor(call.function).redirect(call.described.result.name, kept.name)

    # -- BatchNormalizations -------------------------------------------------------------

    def _remove(self, owner: str, call: NormCall, action: Remove) -> None:
        self._editor(call.function).redirect(call.norm.sink.name, call.norm.source.name)

    def _replace(self, owner: str, call: NormCall, action: Replace) -> None:
        """Puts a depthwise 1x1 convolution, scale and shift, or a fused operation in its place."""
        editor, norm, m = self._editor(call.function), call.norm, action.map
        dtype = norm.source.dtype
        stored = _is_stored_in_variables(norm)
        if action.form is Form.FUSED:
            name = self._fused(owner, call, m, stored)
        elif action.form is Form.DEPTHWISE:
            kernel = self._new(owner, "depthwise_kernel", m.scale.reshape(1, 1, -1, 1), dtype)
            bias = self._new(owner, "bias", m.shift, dtype)
            name = editor.add(
                f"{norm.sink.op.name}/depthwise",
                "DepthwiseConv2dNative",
                [norm.source.name, editor.read(kernel, stored)],
                T=dtype,
                strides=[1, 1, 1, 1],
                padding=b"VALID",
                data_format=b"NHWC",
            )
            name = editor.add(
                f"{norm.sink.op.name}/bias", "BiasAdd", [name, editor.read(bias, stored)], T=dtype
            )
        else:
            name = self._scaled_and_shifted(owner, call, m, stored)
        editor.redirect(norm.sink.name, name)

    def _scaled_and_shifted(self, owner: str, call: NormCall, m: ChannelMap, stored: bool) -> str:
        editor, norm = self._editor(call.function), call.norm
        dtype = norm.source.dtype
        shape = (-1,) + (1,) * (norm.rank - 1 - m.axis)
        scale = self._new(owner, "scale", m.scale.reshape(shape), dtype)
        shift = self._new(owner, "shift", m.shift.reshape(shape), dtype)
        place = norm.sink.op.name
        name = norm.source.name
        if np.any(m.scale != 1):
            name = editor.add(
                f"{place}/scale", "Mul", [norm.source.name, editor.read(scale, stored)], T=dtype
            )
        return editor.add(f"{place}/shift", "AddV2", [name, editor.read(shift, stored)], T=dtype)

    def _fused(self, owner: str, call: NormCall, m: ChannelMap, stored: bool) -> str:
        """A fused operation, on the input reshaped to images; returns its output."""
        editor, norm = self._editor(call.function), call.norm
        place, source, dtype = norm.sink.op.name, norm.source.name, norm.source.dtype
        if norm.rank != 4:
            images = editor.const(f"{place}/images", np.array([-1, 1, 1, m.channels], np.int32))
            shape = editor.add(f"{place}/shape", "Shape", [source], T=dtype, out_type=tf.int32)
            source = editor.add(
                f"{place}/as_images", "Reshape", [source, images], T=dtype, Tshape=tf.int32
            )
        parameters = [
            editor.read(self._new(owner, name, array, tf.float32), stored)
            for name, array in _parameters(m, _EPSILON)
        ]
        result = editor.add(
            f"{place}/fused",
            "FusedBatchNormV3",
            [source, *parameters],
            T=dtype,
            U=tf.float32,
            epsilon=_EPSILON,
            data_format=b"NHWC",
            is_training=False,
        )
        if norm.rank == 4:
            return result
        return editor.add(
            f"{place}/as_it_was", "Reshape", [result, shape], T=dtype, Tshape=tf.int32
        )

    def _remap(self, owner: str, call: NormCall, action: Remap) -> None:
        """Gives a BatchNormalization another map, by its gamma and beta if it is fused."""
        editor, norm, m = self._editor(call.function), call.norm, action.map
        stored = _is_stored_in_variables(norm)
        op = norm.ops[0]
        if not op.type.startswith("FusedBatchNorm") or np.all(m.scale == 1):
            editor.redirect(norm.sink.name, self._scaled_and_shifted(owner, call, m, stored))
            return
        parameters = _parameters(m, op.get_attr("epsilon"))
        dtype = op.inputs[1].dtype
        for index, (name, array) in enumerate(parameters, start=1):
            weight = self._new(owner, name, array, dtype)
            editor.set_input(op.name, index, editor.read(weight, stored))

    def _new(self, owner: str, name: str, value: Array, dtype: Any) -> Any:
        """A new weight, made once for all calls of an owner."""
        key = (owner, name, dtype, value.shape)  # one array may be used in two dtypes
        if key not in self._variables:
            self._variables[key] = tf.Variable(
                value.astype(dtype.as_numpy_dtype),
                name=as_node_name(f"{owner}/{name}"),
                trainable=False,
            )
        return self._variables[key]

    # -- clips -----------------------------------------------------------------------------

    def _reclip(self, owner: str, call: ClipCall, action: Reclip) -> None:
        """Puts a maximum and a minimum with bounds per channel in its place."""
        editor, result = self._editor(call.function), call.described.result
        check_bounds(action, result.dtype.name, f"'{owner}'")
        (data,) = call.described.data
        name, stored = data.name, bool(call.function.variables)
        shape = (-1,) + (1,) * (result.shape.rank - 1 - action.axis)
        for side, bounds in action.bounds.items():
            weight = self._new(owner, side, bounds.reshape(shape), result.dtype)
            kind = "Maximum" if side == "lower" else "Minimum"
            inputs = [name, editor.read(weight, stored)]
            name = editor.add(f"{call.op.name}/{side}", kind, inputs, T=result.dtype)
        editor.redirect(result.name, name)

    # -- linear operations that absorb ----------------------------------------------------

    def _fold(self, owner: str, action: Fold) -> None:
        op, calls, source = action.op, self._calls[owner], self._source[owner]

        def read(name: str) -> Array:
            return op.weight(source, name, self.reading.graph.read_weight)

        ((kernels, bias_name),) = op.chains
        (new_kernel,), new_bias = fold(
            [(kernels[0], read("kernel"))],
            read("bias").reshape(-1) if bias_name else None,
            before=action.before,
            after=action.after,
            border=action.border,
        )
        self._store(owner, "kernel", self.reading.weight(source, "kernel"), new_kernel, action)
        as_variable = self.reading.weight(source, "kernel").is_variable
        if action.border is not None:
            for call in calls:
                self._add_border(owner, call, new_bias, as_variable)
            return
        full = np.broadcast_to(new_bias, (kernels[-1].out_channels,))
        if "bias" in calls[0].described.weights:
            bias = self.reading.weight(source, "bias")
            self._store(owner, "bias", bias, full.reshape(bias.shape), action)
        elif np.any(full != 0):
            for call in calls:
                self._add_bias(owner, call, full, as_variable)

    def _is_stored(self, owner: str) -> bool:
        """Whether a layer has the stored arrays of its owner; else it is made for some calls."""
        return self._source[owner] == owner

    def _store(self, owner: str, name: str, stored: Stored, value: Array, action: Fold) -> None:
        dtype = tf.as_dtype(stored.dtype)
        with np.errstate(all="ignore"):
            array = value.astype(dtype.as_numpy_dtype, copy=False)
        if not np.all(np.isfinite(array)):
            raise RewriteError(_out_of_range(owner, stored.dtype))
        if not self._is_stored(owner):
            variable = self._new(owner, name, array, dtype)
            for call in self._calls[owner]:
                use_in_place(self._editor(call.function), call, name, variable)
        elif isinstance(stored.place, Row):
            rows = stored.place.whole.read().copy()
            rows[stored.place.number] = array
            self._store(owner, name, stored.place.whole, rows, action)
        elif isinstance(stored.place, Computed):
            variable = self._new(owner, name, array, dtype)
            for call in self._calls[owner]:
                place = call.described.weights[name].stored.place
                editor = self._editor(place.function)
                editor.redirect(place.tensor, editor.read(variable, place.of_variables))
        elif isinstance(stored.place, tf.Variable):
            if self.copies is None:
                stored.place.assign(array)
                return
            key = (stored.key, id(action))
            if key not in self.copies:
                self.copies[key] = tf.Variable(array, trainable=False)
            self.in_place_of[id(stored.place)] = self.copies[key]
        else:
            function, node = stored.place
            self._editor(function).set_constant(node, array)

    def _add_border(self, owner: str, call: LinearCall, border: Array, as_variable: bool) -> None:
        """Adds a border map right after a convolution, in place of its bias."""
        editor, result = self._editor(call.function), call.op.outputs[0]
        if call.described.axis == 1:  # channels first
            border = np.moveaxis(border, -1, 0)
        # See `_add_bias`: a map of one position looks like a bias.
        op, sign = ("Sub", -1.0) if _is_grouped(call) else ("AddV2", 1.0)
        weight = self._new(owner, "border", sign * border[np.newaxis], result.dtype)
        if not np.all(np.isfinite(weight.numpy())):
            raise RewriteError(_out_of_range(owner, result.dtype.name))
        name = editor.add(
            f"{call.op.name}/border", op, ["", editor.read(weight, as_variable)], T=result.dtype
        )
        editor.redirect(result.name, name)
        editor.set_input(name, 0, result.name)
        if call.described.absorbed:  # the operations before the bias, and the addition of it
            *between, _ = [result, *(op.outputs[0] for op in call.described.absorbed)]
            editor.redirect(call.described.result.name, between[-1].name)

    def _add_bias(self, owner: str, call: LinearCall, bias: Array, as_variable: bool) -> None:
        """Adds a bias right after an operation that has none."""
        editor, result = self._editor(call.function), call.op.outputs[0]
        axis, rank = call.described.axis, result.shape.rank
        layout = b"NHWC" if axis == rank - 1 else b"NCHW"
        shaped = bias.reshape(_bias_shape(call))
        attributes: dict[str, Any] = {"T": result.dtype}
        if _is_grouped(call):
            # TensorFlow fuses a bias with the convolution before it, and then cannot run it
            # in groups on a CPU. It fuses no subtraction.
            op, weight = "Sub", self._new(owner, "minus_bias", -shaped, result.dtype)
        elif axis is not None and (layout == b"NHWC" or rank == 4):
            op, weight = "BiasAdd", self._new(owner, "bias", bias, result.dtype)
            attributes["data_format"] = layout
        else:
            op, weight = "AddV2", self._new(owner, "bias", shaped, result.dtype)
        inputs = ["", editor.read(weight, as_variable)]
        name = editor.add(f"{call.op.name}/bias", op, inputs, **attributes)
        editor.redirect(result.name, name)
        editor.set_input(name, 0, result.name)


# Action on a BatchNormalization or a clip -> method that carries it out at one of its calls. `Fold`
# is not here: linear operations are edited at all their calls at once.
_WRITERS: dict[type, Callable[..., None]] = {
    Remove: _Writer._remove,
    Remap: _Writer._remap,
    Replace: _Writer._replace,
    Reclip: _Writer._reclip,
}


def _parameters(m: ChannelMap, epsilon: float) -> list[tuple[str, Array]]:
    """Parameters of a fused operation: gamma / sqrt(1 - epsilon + epsilon) (x - 0) + beta"""
    return [
        ("gamma", m.scale),
        ("beta", m.shift),
        ("moving_mean", np.zeros(m.channels)),
        ("moving_variance", np.full(m.channels, 1.0 - epsilon)),
    ]


def _is_grouped(call: LinearCall) -> bool:
    op = call.described.op
    assert isinstance(op, Linear)
    return call.op.type.startswith("Conv") and len(op.kernels[0].in_dims) > 1


def _bias_shape(call: LinearCall) -> tuple[int, ...]:
    """Shape in which a bias is added to the own output of an operation."""
    op, axis = call.described.op, call.described.axis
    assert isinstance(op, Linear)
    kernel = op.kernels[-1]
    if axis is None:
        return tuple(kernel.view[dim] for dim in kernel.out_dims)
    return (kernel.out_channels,) + (1,) * (call.op.outputs[0].shape.rank - 1 - axis)


def _is_stored_in_variables(norm: Any) -> bool:
    return any(key[0] != "constant" for key in norm.keys)


def _out_of_range(owner: str, dtype: str) -> str:
    return (
        f"'{owner}' cannot absorb a BatchNormalization: its weights would leave the range of "
        f'{dtype}. Use mode "depthwise" for this model'
    )

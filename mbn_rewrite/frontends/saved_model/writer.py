"""Carries out a plan on the graphs of a SavedModel's functions.

Graphs are edited as they are stored: readers of a removed BatchNormalization read its input
instead, weights that absorbed something get their new values, and what then nothing needs is
left out. Variables that were not edited stay the same objects.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.core.framework import node_def_pb2
from tensorflow.core.framework.graph_pb2 import GraphDef

from mbn_rewrite.errors import RewriteError
from mbn_rewrite.frontends.saved_model.function_graph import View, Writes, has_side_effect
from mbn_rewrite.frontends.saved_model.reader import LinearCall, NormCall, Reading
from mbn_rewrite.frontends.saved_model.weights import Stored
from mbn_rewrite.ir.algebra import Array, ChannelMap, fold
from mbn_rewrite.ir.graph import Linear
from mbn_rewrite.plans import Fold, Form, Plan, Remap, Remove, Replace

_EPSILON = 1e-3  # of fused operations that are put in, whose variance is 1 less this
_CONTROL_FLOW = {"Switch", "RefSwitch", "Merge", "RefMerge", "Enter", "RefEnter"}


@dataclass
class Rewritten:
    """A function with its plan carried out.

    Attributes:
        graph_def: its new graph.
        compiled: whether XLA must compile it.
        arguments: the names of the Placeholders of its arguments, in order.
        outputs: the names of the tensors that it gives, in order.
        captures: Placeholder name -> the tf.Variable or tensor that it stands for.
    """

    graph_def: GraphDef
    compiled: bool
    arguments: tuple[str, ...]
    outputs: list[str]
    captures: dict[str, Any]

    @property
    def has_frames(self) -> bool:
        """Whether it has control flow of TensorFlow 1."""
        return any(node.op in _CONTROL_FLOW for node in self.graph_def.node)


def unchanged(view: View) -> Rewritten | None:
    """A function without what nothing needs; None where then nothing is left to run."""
    if not any(has_side_effect(op) for op in view.operations):
        return None
    return _Editor(view, Writes()).finished()


def rewritten(
    views: list[View],
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
    writer = _Writer(views, reading, plan, writes, copies)
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
        views: list[View],
        reading: Reading,
        plan: Plan,
        writes: Writes,
        copies: dict[Any, Any] | None,
    ) -> None:
        self.copies = copies
        self.in_place_of: dict[int, Any] = {}  # id(a variable) -> its copy with new values
        self.reading = reading
        self.plan = plan
        self.editors = {id(view): _Editor(view, writes) for view in views}
        self.done: set[str] = set()
        self._variables: dict[Any, Any] = {}  # new ones, by what they are for

    def carry_out(self) -> None:
        for owner, calls in self.reading.norms.items():
            action = self.plan.actions.get(owner)
            if action is not None:
                for call in calls:
                    _WRITERS[type(action)](self, owner, call, action)
                self.done.add(owner)
        for owner, edit in self.plan.of(Fold).items():
            self._fold(owner, edit)
            self.done.add(owner)

    def _editor(self, view: View) -> _Editor:
        return self.editors[id(view)]

    # -- BatchNormalizations -------------------------------------------------------------

    def _remove(self, owner: str, call: NormCall, action: Remove) -> None:
        self._editor(call.view).redirect(call.norm.sink.name, call.norm.source.name)

    def _replace(self, owner: str, call: NormCall, action: Replace) -> None:
        """By a depthwise 1x1 convolution, a multiplication and an addition, or one operation."""
        editor, norm, m = self._editor(call.view), call.norm, action.map
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
        editor, norm = self._editor(call.view), call.norm
        dtype = norm.source.dtype
        shape = (-1,) + (1,) * (norm.rank - 1 - m.axis)
        scale = self._new(owner, "scale", m.scale.reshape(shape), dtype)
        shift = self._new(owner, "shift", m.shift.reshape(shape), dtype)
        place = norm.sink.op.name
        name = editor.add(
            f"{place}/scale", "Mul", [norm.source.name, editor.read(scale, stored)], T=dtype
        )
        return editor.add(f"{place}/shift", "AddV2", [name, editor.read(shift, stored)], T=dtype)

    def _fused(self, owner: str, call: NormCall, m: ChannelMap, stored: bool) -> str:
        """The fused operation, on what looks like images to it."""
        editor, norm = self._editor(call.view), call.norm
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
        """Gives a BatchNormalization another map: by its gamma and beta, if it is fused."""
        editor, norm, m = self._editor(call.view), call.norm, action.map
        stored = _is_stored_in_variables(norm)
        op = norm.ops[0]
        if not op.type.startswith("FusedBatchNorm"):
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

    # -- layers that absorb --------------------------------------------------------------

    def _fold(self, owner: str, edit: Fold) -> None:
        op = edit.op
        assert isinstance(op, Linear)
        calls = self.reading.linears[owner]
        kernel = self.reading.weight(owner, "kernel")
        bias = self.reading.weight(owner, "bias") if op.bias else None
        (new_kernel,), new_bias = fold(
            [(op.kernels[0], kernel.read())],
            None if bias is None else bias.read().reshape(-1),
            before=edit.before,
            after=edit.after,
            border=edit.border,
        )
        self._store(owner, kernel, new_kernel, edit)
        if edit.border is not None:
            for call in calls:
                self._add_border(owner, call, new_bias, kernel.is_variable)
            return
        channels = calls[0].op.outputs[0].shape[calls[0].described.axis]
        full = np.broadcast_to(new_bias, (channels,))
        if bias is not None:
            self._store(owner, bias, full.reshape(bias.shape), edit)
        elif np.any(full != 0):
            for call in calls:
                self._add_bias(owner, call, full, kernel.is_variable)

    def _store(self, owner: str, stored: Stored, value: Array, edit: Fold) -> None:
        dtype = tf.as_dtype(stored.dtype)
        with np.errstate(all="ignore"):
            array = value.astype(dtype.as_numpy_dtype)
        if not np.all(np.isfinite(array.astype(np.float64))):
            raise RewriteError(_out_of_range(owner, stored.dtype))
        if isinstance(stored.place, tf.Variable):
            if self.copies is None:
                stored.place.assign(array)
                return
            key = (stored.key, id(edit))
            if key not in self.copies:
                self.copies[key] = tf.Variable(array, trainable=False)
            self.in_place_of[id(stored.place)] = self.copies[key]
        else:
            view, name = stored.place
            self._editor(view).set_constant(name, array)

    def _add_border(self, owner: str, call: LinearCall, border: Array, as_variable: bool) -> None:
        """Adds a border map right behind a convolution, in place of the bias that it holds."""
        editor, result = self._editor(call.view), call.op.outputs[0]
        if call.described.axis == 1:  # channels first
            border = np.moveaxis(border, -1, 0)
        # See `_add_bias`: a map of one position looks like a bias.
        op, sign = ("Sub", -1.0) if _is_grouped(call) else ("AddV2", 1.0)
        weight = self._new(owner, "border", sign * border[np.newaxis], result.dtype)
        if not np.all(np.isfinite(weight.numpy().astype(np.float64))):
            raise RewriteError(_out_of_range(owner, result.dtype.name))
        name = editor.add(
            f"{call.op.name}/border", op, ["", editor.read(weight, as_variable)], T=result.dtype
        )
        editor.redirect(result.name, name)
        editor.set_input(name, 0, result.name)
        if call.described.absorbed:  # what adds the bias, and before it what lies between
            *between, _ = [result, *(op.outputs[0] for op in call.described.absorbed)]
            editor.redirect(call.described.result.name, between[-1].name)

    def _add_bias(self, owner: str, call: LinearCall, bias: Array, as_variable: bool) -> None:
        """Adds a bias right behind an operation that has none."""
        editor, result = self._editor(call.view), call.op.outputs[0]
        axis, rank = call.described.axis, result.shape.rank
        layout = b"NHWC" if axis == rank - 1 else b"NCHW"
        shaped = bias.reshape((-1,) + (1,) * (rank - 1 - axis))
        attributes: dict[str, Any] = {"T": result.dtype}
        if _is_grouped(call):
            # TensorFlow fuses a bias with the convolution before it, and then cannot run it
            # in groups on a CPU. It fuses no subtraction.
            op, weight = "Sub", self._new(owner, "minus_bias", -shaped, result.dtype)
        elif layout == b"NHWC" or rank == 4:
            op, weight = "BiasAdd", self._new(owner, "bias", bias, result.dtype)
            attributes["data_format"] = layout
        else:
            op, weight = "AddV2", self._new(owner, "bias", shaped, result.dtype)
        inputs = ["", editor.read(weight, as_variable)]
        name = editor.add(f"{call.op.name}/bias", op, inputs, **attributes)
        editor.redirect(result.name, name)
        editor.set_input(name, 0, result.name)


# How an action on a BatchNormalization is carried out at one of its calls. Layers that absorb
# something (`Fold`) are edited at all calls at once.
_WRITERS: dict[type, Callable[..., None]] = {
    Remove: _Writer._remove,
    Remap: _Writer._remap,
    Replace: _Writer._replace,
}


def _parameters(m: ChannelMap, epsilon: float) -> list[tuple[str, Array]]:
    """What has a fused operation do a map: gamma / sqrt(1 - epsilon + epsilon) (x - 0) + beta"""
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


def _is_stored_in_variables(norm: Any) -> bool:
    return any(key[0] != "constant" for key in norm.keys)


@dataclass
class _Editor:
    """Edits one graph. Tensors are named as in a GraphDef, output 0 with ":0"."""

    view: View
    writes: Writes
    captures: dict[str, Any] = field(default_factory=dict)
    _redirected: dict[str, str] = field(default_factory=dict)
    _inputs: dict[tuple[str, int], str] = field(default_factory=dict)
    _constants: dict[str, Array] = field(default_factory=dict)
    _added: dict[str, Any] = field(default_factory=dict)
    _reads: dict[int, str] = field(default_factory=dict)
    _taken: set[str] = field(default_factory=set)
    _handed_on: dict[str, str] = field(default_factory=dict)
    _unordered: set[str] = field(default_factory=set)  # nodes that nobody has to wait for

    def __post_init__(self) -> None:
        ops = self.view.graph.get_operations()
        writes_none = not any(has_side_effect(op) for op in ops)
        # There, waiting for a node puts one into its loop or branch.
        waits = any(op.type in _CONTROL_FLOW for op in ops)
        for node in self.view.graph_def.node:
            self._taken.add(node.name)
            if waits:
                continue
            if writes_none or (node.op == "ReadVariableOp" and not self._is_written(node)):
                self._unordered.add(node.name)
            if node.op == "Identity" and len(node.input) == 1:
                source = node.input[0]
                self._handed_on[f"{node.name}:0"] = source if ":" in source else f"{source}:0"

    def redirect(self, tensor: str, to: str) -> None:
        """Lets all who read a tensor read another."""
        self._redirected[tensor] = to

    def set_input(self, node: str, index: int, tensor: str) -> None:
        """Lets one node read a tensor, wherever that is redirected for others."""
        self._inputs[node.partition(":")[0], index] = tensor

    def set_constant(self, node: str, value: Array) -> None:
        self._constants[node] = value

    def add(self, name: str, op: str, inputs: list[str], **attributes: Any) -> str:
        """Adds a node; returns the tensor that it gives."""
        name = self._free(name)
        node = node_def_pb2.NodeDef(name=name, op=op, input=inputs)
        for key, value in attributes.items():
            _set_attribute(node, key, value)
        self._added[name] = node
        return f"{name}:0"

    def const(self, name: str, value: Array) -> str:
        """A tensor with a value that is no weight."""
        return self.add(name, "Const", [], dtype=tf.as_dtype(value.dtype), value=value)

    def read(self, variable: Any, as_variable: bool) -> str:
        """A tensor with a variable's value, which is a constant in a frozen graph."""
        if id(variable) not in self._reads:
            name = variable.name.partition(":")[0]
            if as_variable:
                handle = self.add(f"{name}/handle", "Placeholder", [], dtype=tf.resource)
                self.captures[handle.partition(":")[0]] = variable
                read = self.add(f"{name}/read", "ReadVariableOp", [handle], dtype=variable.dtype)
            else:
                read = self.add(name, "Const", [], dtype=variable.dtype, value=variable.numpy())
            self._reads[id(variable)] = read
        return self._reads[id(variable)]

    def _free(self, name: str) -> str:
        name = as_node_name(name)
        result, number = name, 1
        while result in self._taken:
            result, number = f"{name}_{number}", number + 1
        self._taken.add(result)
        return result

    # -- the new graph -------------------------------------------------------------------

    def finished(self) -> Rewritten:
        """The graph with all edits, without what is no longer needed."""
        old = self.view.graph_def
        nodes = {node.name: node for node in old.node} | self._added
        outputs = [self._target(name) for name in self.view.results]
        inputs: dict[str, list[str]] = {}
        pending = [name.partition(":")[0] for name in outputs]
        pending += [op.name for op in self.view.graph.get_operations() if has_side_effect(op)]
        while pending:
            name = pending.pop()
            if name in inputs:
                continue
            inputs[name] = self._inputs_of(nodes[name])
            pending += [source.lstrip("^").partition(":")[0] for source in inputs[name]]
        graph_def = GraphDef(versions=old.versions, library=old.library)
        for name, node in nodes.items():
            if name not in inputs:
                continue
            new = graph_def.node.add()
            new.CopyFrom(node)
            new.attr.pop("_class", None)  # wants to be placed with nodes that may be gone
            del new.input[:]
            new.input.extend(inputs[name])
            if name in self._constants:
                _set_attribute(new, "value", self._constants[name])
        captures = {**self.view.captures, **self.view.variables, **self.captures}
        captures = {name: captures[name] for name in captures if name in inputs}
        return Rewritten(graph_def, self.view.compiled, self.view.arguments, outputs, captures)

    def _inputs_of(self, node: Any) -> list[str]:
        data = [source for source in node.input if not source.startswith("^")]
        controls = [source[1:] for source in node.input if source.startswith("^")]
        controls = [name for name in controls if name not in self._unordered]
        new = []
        for i, source in enumerate(data):
            set_to = self._inputs.get((node.name, i))
            new.append(set_to or self._target(source))
        return new + sorted({f"^{self._control(name)}" for name in controls})

    def _is_written(self, read: Any) -> bool:
        """Whether a function writes to the variable that a node reads."""
        op = self.view.graph.get_operation_by_name(read.name)
        variable = self.view.variable(op.inputs[0])
        return variable is None or id(variable) in self.writes.by

    def _target(self, tensor: str) -> str:
        """What to read in place of a tensor; nodes that only hand it on are passed by."""
        name = tensor if ":" in tensor else f"{tensor}:0"
        while True:
            if name in self._redirected:
                name = self._redirected[name]
            elif name in self._handed_on:
                name = self._handed_on[name]
            else:
                return name

    def _control(self, node: str) -> str:
        """What to wait for in place of a node that is taken out."""
        tensor = f"{node}:0"
        while tensor in self._redirected:
            tensor = self._redirected[tensor]
        return tensor.partition(":")[0]


def _out_of_range(owner: str, dtype: str) -> str:
    return (
        f"'{owner}' cannot absorb a BatchNormalization: its weights would leave the range of "
        f'{dtype}. Use mode "depthwise" for this model'
    )


def as_node_name(name: str) -> str:
    """A name with what TensorFlow does not allow in names exchanged."""
    name = re.sub(r"[^A-Za-z0-9_.\\/>-]", "_", name)
    return name if re.match(r"[A-Za-z0-9.]", name) else f"n{name}"


def _set_attribute(node: Any, key: str, value: Any) -> None:
    attribute = node.attr[key]
    if isinstance(value, tf.DType):
        attribute.type = value.as_datatype_enum
    elif isinstance(value, bytes):
        attribute.s = value
    elif isinstance(value, list):
        attribute.list.i.extend(value)
    elif isinstance(value, bool):
        attribute.b = value
    elif isinstance(value, float):
        attribute.f = value
    else:
        attribute.tensor.CopyFrom(tf.make_tensor_proto(value))

"""Recurrent layers in graphs: loops over time steps, and calls of functions with such a loop.

The loop takes the steps of a sequence from a list. Where all that it does with a step is to
multiply it by kernels, and biases are added to the products, these can absorb what comes before.
Weights come into a loop from outside, as they are or as variables, whole or to be split by gates.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import tensorflow as tf

from mbn_rewrite.frontends.saved_model.bodies import Body, attribute, operands
from mbn_rewrite.frontends.saved_model.function_graph import SHAPE_ONLY, source_of
from mbn_rewrite.frontends.saved_model.op_site import Described, Site
from mbn_rewrite.frontends.saved_model.stored_arrays import Row, Stored, Weight
from mbn_rewrite.frontends.saved_model.weights import Constants, whole
from mbn_rewrite.ir import layouts
from mbn_rewrite.ir.channel_map import Array
from mbn_rewrite.ir.graph import Chain, Recurrent

LOOPS = {"While", "StatelessWhile"}
CALLS = {"PartitionedCall", "StatefulPartitionedCall"}
_WITHOUT_BIAS = "has a cell without a bias"


class _OtherUseError(Exception):
    """A loop does something else with what it reads."""


@dataclass(frozen=True)
class _Frame:
    """A function as it is called.

    Attributes:
        body: the function.
        given: for each argument the tensor of the graph, or the tensor of the outer function.
        outer: that of which the arguments are, or None where they are of the graph.
        caller: the operation, or the node of the outer function, that calls it.
        is_loop: whether it gives its arguments for the next step.
    """

    body: Body
    given: tuple[Any, ...]
    outer: _Frame | None
    caller: Any
    is_loop: bool


@dataclass(frozen=True)
class _Part:
    """A weight, or one of several equal parts of it along its last axis."""

    weight: Weight
    number: int = 0
    count: int = 1


@dataclass(frozen=True)
class _Product:
    """A product of a step with a kernel, and the bias that is added to it."""

    node: Any
    kernel: _Part
    bias: _Part | None


def recurrence(site: Site) -> Described | None:
    """The description of a loop or call that is one of a recurrent layer; None if it is not."""
    try:
        return _Reader(site.constants).described(site)
    except _OtherUseError:
        return None


class _Reader:
    def __init__(self, constants: Constants) -> None:
        self._constants = constants
        library = constants.function.graph_def.library.function
        self._library = {function.signature.name: function for function in library}

    def described(self, site: Site) -> Described | None:
        op = site.op
        if op.type in CALLS:
            return (
                self._from(op, 0, op.inputs[0], (), self._steps_of_call(op)) if op.inputs else None
            )
        lists = [source_of(tensor).op for tensor in op.inputs]
        for number, made in enumerate(lists):
            alone = self._constants.function.only_reader(op.inputs[number])
            if made.type == "TensorListFromTensor" and alone == (op, number):
                products = self._steps_of_list(op.node_def, number, tuple(op.inputs), None, op)
                return self._from(op, number, made.inputs[0], (made,), products)
        return None

    def _from(
        self,
        op: Any,
        number: int,
        data: Any,
        absorbed: tuple[Any, ...],
        products: Iterator[_Product],
    ) -> Described | None:
        """A description by the products of each step of a sequence, an input by its number."""
        found = list(products)
        kernel, bias = _whole(found)
        node, rank = found[0].node, data.shape.rank
        is_product = node.op == "MatMul"
        layout = layouts.matrix if is_product else layouts.conv
        laid_out = kernel.laid_out(layout("kernel", kernel.shape))
        if laid_out is None or rank is None or data.shape[rank - 1] != laid_out.in_channels:
            return None
        uneven = "" if bias is not None else _WITHOUT_BIAS
        same = not is_product and attribute(node, "padding").s != b"VALID"
        if same and math.prod(kernel.shape[:-2]) > 1:
            uneven = "pads its input with zeros"
        chain: Chain = ((laid_out,), "bias" if bias is not None else None)
        weights = {"kernel": kernel} | ({"bias": bias} if bias is not None else {})
        others = [tensor for i, tensor in enumerate(op.inputs) if i != number]
        given = [key for tensor in others for key in self._keys(tensor)]
        if any(given.count(weight.stored.key) != 1 for weight in weights.values()):
            return None  # it is used twice
        return Described(
            Recurrent((chain,), rank - 1, uneven),
            (data, *others),
            op.outputs[0],
            weights,
            absorbed=(*absorbed, op) if absorbed else (),
        )

    def _keys(self, tensor: Any) -> list[Any]:
        """The keys of the stored arrays that an operation is given by a tensor."""
        if tensor.dtype == tf.resource:
            stored = self._constants.stored_behind(tensor)
            return [] if stored is None else [stored.key]
        weight = self._constants.kernel(tensor)
        return [] if weight is None else [weight.stored.key]

    # -- what is done with a step -----------------------------------------------------------

    def _steps_of_call(self, op: Any) -> Iterator[_Product]:
        body = Body(self._library[attribute(op.node_def, "f").func.name])
        frame = _Frame(body, tuple(op.inputs), None, op, is_loop=False)
        yield from self._uses(frame, body.arguments[0])

    def _steps_of_list(
        self, loop: Any, number: int, given: tuple[Any, ...], outer: _Frame | None, caller: Any
    ) -> Iterator[_Product]:
        """The products of the steps in a list that a loop is given."""
        frame = _Frame(self._body(loop, "body"), given, outer, caller, is_loop=True)
        condition = self._body(loop, "cond")
        if condition.readers(condition.arguments[number]) or not self._stays(frame, number):
            raise _OtherUseError
        readers = frame.body.readers(frame.body.arguments[number])
        if not readers or any(reader.op != "TensorListGetItem" for reader, _ in readers):
            raise _OtherUseError
        for reader, _ in readers:
            yield from self._uses_of(frame, reader)

    def _body(self, loop: Any, part: str) -> Body:
        return Body(self._library[attribute(loop, part).func.name])

    def _stays(self, frame: _Frame, number: int) -> bool:
        """Whether an argument is the same in each step of a loop, and nothing reads it behind."""
        name = frame.body.arguments[number]
        places = [i for i, result in enumerate(frame.body.results) if result == name]
        if places != ([number] if frame.is_loop else []):
            return False
        if not frame.is_loop:
            return True
        if frame.outer is None:
            function, tensor = self._constants.function, frame.caller.outputs[number]
            is_read = bool(function.readers.get(tensor.name))
            return not is_read and tensor.name not in function.output_names
        given = f"{frame.caller.name}:output:{number}"
        return not frame.outer.body.readers(given) and given not in frame.outer.body.results

    def _uses_of(self, frame: _Frame, node: Any) -> Iterator[_Product]:
        for tensor, _ in list(frame.body.readers_of(node)):
            yield from self._uses(frame, tensor)

    def _uses(self, frame: _Frame, tensor: str) -> Iterator[_Product]:
        """The products in which a tensor is used, if it is used in nothing else."""
        body = frame.body
        if tensor in body.results:
            raise _OtherUseError
        for reader, place in body.readers(tensor):
            if reader.op in SHAPE_ONLY:
                continue
            if place != 0:
                raise _OtherUseError
            if reader.op in ("Transpose", "ReverseV2"):
                if not _moves_steps(reader.op, body.constant(reader.input[1])):
                    raise _OtherUseError
                yield from self._uses_of(frame, reader)
            elif reader.op == "TensorListFromTensor":
                yield from self._listed(frame, reader)
            else:
                yield self._product(frame, reader)

    def _listed(self, frame: _Frame, made: Any) -> Iterator[_Product]:
        """The products of the steps in a list that is made in a function."""
        for _, readers in list(frame.body.readers_of(made)):
            for loop, number in readers:
                if loop.op not in LOOPS:
                    raise _OtherUseError
                yield from self._steps_of_list(loop, number, operands(loop), frame, loop)

    def _product(self, frame: _Frame, node: Any) -> _Product:
        if node.op == "MatMul":
            fits = not (attribute(node, "transpose_a").b or attribute(node, "transpose_b").b)
        else:
            fits = node.op in ("Conv2D", "Conv3D")
            fits = fits and attribute(node, "data_format").s in (b"NHWC", b"NDHWC")
            fits = fits and attribute(node, "padding").s in (b"VALID", b"SAME")
        kernel = self._weight(frame, node.input[1]) if fits else None
        if kernel is None:
            raise _OtherUseError
        return _Product(node, kernel, self._bias_after(frame, node))

    def _bias_after(self, frame: _Frame, node: Any) -> _Part | None:
        """The bias that is added to a product, perhaps after other sums."""
        while True:
            tensors = list(frame.body.readers_of(node))
            if len(tensors) != 1 or len(tensors[0][1]) != 1:
                return None
            if tensors[0][0] in frame.body.results:
                return None
            ((reader, place),) = tensors[0][1]
            if reader.op not in ("BiasAdd", "Add", "AddV2"):
                return None
            bias = self._weight(frame, reader.input[1 - place])
            if bias is not None or reader.op == "BiasAdd":
                return bias
            node = reader

    # -- weights --------------------------------------------------------------------------

    def _weight(self, frame: _Frame, tensor: str) -> _Part | None:
        """The weight that a tensor of a function is, if nothing else there uses it."""
        tensor = frame.body.source(tensor)
        if len(frame.body.readers(tensor)) != 1:
            return None
        node = frame.body.node(tensor)
        if node is None:
            return self._given(frame, tensor, self._constants.kernel)
        if node.op == "ReadVariableOp":
            handle = frame.body.source(node.input[0])
            return self._given(frame, handle, self._variable)
        if node.op in ("Reshape", "Squeeze"):
            inner = self._weight(frame, node.input[0])
            shape = frame.body.constant(node.input[1]) if node.op == "Reshape" else np.ones(1)
            is_vector = shape is not None and bool(np.all(shape[:-1] == 1))
            return (
                inner if inner is not None and is_vector and len(inner.weight.shape) == 1 else None
            )
        if node.op in ("Split", "Unpack"):
            return self._part(frame, node, tensor)
        return None

    def _part(self, frame: _Frame, node: Any, tensor: str) -> _Part | None:
        """A part of a weight: by gate, or that of a bias of two rows."""
        inner = self._weight(frame, operands(node)[-1])
        number = int(tensor.rpartition(":")[2])
        if inner is None or inner.count > 1:
            return None
        shape, count = inner.weight.shape, attribute(node, "num_split").i
        is_split = node.op == "Split"
        axis = frame.body.constant(node.input[0]) if is_split else attribute(node, "axis").i
        if axis is None:
            return None
        if int(axis) == 0 and len(shape) == 2 and (not is_split or count == shape[0]):
            return _Part(_row(inner.weight, number))
        is_last = is_split and int(axis) % len(shape) == len(shape) - 1
        return _Part(inner.weight, number, count) if is_last else None

    def _given(self, frame: _Frame, name: str, of_graph: Any) -> _Part | None:
        """The weight that an argument is given, the same in each step of a loop."""
        if frame.body.node(name) is not None or len(frame.body.readers(name)) != 1:
            return None
        number = frame.body.arguments.index(name)
        if not self._stays(frame, number):
            return None
        given = frame.given[number]
        if frame.outer is None:
            weight = of_graph(given)
            return None if weight is None else _Part(weight)
        outer = frame.outer.body.source(given)
        node = frame.outer.body.node(outer)
        if of_graph == self._variable or node is None:
            return self._given(frame.outer, outer, of_graph)
        return self._weight(frame.outer, outer)

    def _variable(self, handle: Any) -> Weight | None:
        """The variable behind a handle of the graph."""
        stored = self._constants.stored_behind(handle)
        return None if stored is None else whole(stored)


def _moves_steps(kind: str, axes: Array | None) -> bool:
    """Whether a transpose or reversal leaves the last axis as it is, by its operand."""
    if axes is None:
        return False
    if kind == "Transpose":
        return bool(axes[-1] == len(axes) - 1)
    return bool(np.all(axes >= 0) and np.all(axes < 2))  # of the three or more that a sequence has


def _row(weight: Weight, number: int) -> Weight:
    """One row of a weight of several."""
    inner = weight.stored
    stored = Stored(
        inner.key, inner.name, inner.shape[1:], inner.dtype,
        lambda: inner.read()[number], Row(inner, number),
    )  # fmt: skip
    return replace(whole(stored), dtype=weight.dtype)


def _whole(products: list[_Product]) -> tuple[Weight, Weight | None]:
    """The kernel and the bias of which products use all parts, each once."""
    if not products:
        raise _OtherUseError
    first = products[0]
    products = sorted(products, key=lambda product: product.kernel.number)
    kernels, biases = [p.kernel for p in products], [p.bias for p in products]
    count = first.kernel.count
    if [_place(kernel) for kernel in kernels] != [
        _place(replace(first.kernel, number=number)) for number in range(count)
    ]:
        raise _OtherUseError
    channels = first.kernel.weight.shape[-1]
    known = [bias for bias in biases if bias is not None]
    if len(known) < len(biases):
        return first.kernel.weight, None
    bias = known[0].weight
    parts = [_place(replace(known[0], number=number)) for number in range(count)]
    is_vector = bias.shape[-1] == math.prod(bias.shape) == channels
    fits = is_vector and [_place(part) for part in known] == parts and known[0].count == count
    return first.kernel.weight, bias if fits else None


def _place(part: _Part) -> tuple[Any, ...]:
    """What tells parts of weights apart."""
    weight = part.weight
    return weight.stored.key, weight.view, weight.order, part.number, part.count

"""Gamma and beta of LayerNormalization, GroupNormalization and the like, in the forms of graphs.

With what is computed of each example, its mean m and the inverse r of its deviation,

    (r * gamma) * x + (beta - m * (r * gamma))
    (r * (x - m)) * gamma + beta

are linear in gamma and beta, and whatever scales and shifts them by channel can be done by these.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from mbn_rewrite.frontends.saved_model.function_graph import source_of
from mbn_rewrite.frontends.saved_model.op_site import Described, Site, shape_of
from mbn_rewrite.frontends.saved_model.stored_arrays import Weight
from mbn_rewrite.frontends.saved_model.weights import Constants
from mbn_rewrite.ir.constants import constant_map
from mbn_rewrite.ir.graph import Linear, Op, Shape
from mbn_rewrite.ir.kernels import Kernel

_ADDITIONS = {"Add", "AddV2"}


@dataclass(frozen=True)
class _Parts:
    """Operations and operands of the first form.

    Attributes:
        scaling: multiplies by gamma.
        shifting: adds beta, or subtracts from it.
        others: the other operations, but the last addition.
        data: x, r and the mean.
        gamma, beta: the weights.
    """

    scaling: Any
    shifting: Any
    others: tuple[Any, ...]
    data: tuple[Any, ...]
    gamma: Weight
    beta: Weight


def normalization(site: Site) -> Described | None:
    """The addition, or reshape of one, that a normalisation of examples ends in."""
    is_reshape = site.op.type == "Reshape"
    addition = source_of(site.op.inputs[0]).op if is_reshape else site.op
    if addition.type not in _ADDITIONS:
        return None
    parts = _parts_of(site.constants, addition)
    if parts is None:
        return None
    shape = shape_of(addition.outputs[0])
    groups = _reshaped_groups(site, addition, parts, shape)
    if (groups is not None) != is_reshape:
        return None
    if groups is None:
        axis = _axis_of(parts.gamma, shape)
        if axis is None or _axis_of(parts.beta, shape) != axis:
            return None
    else:
        axis = len(shape_of(groups.outputs[0])) - 1
    return Described(
        _linear(parts.gamma, None, axis),
        parts.data,
        site.op.outputs[0],
        {"kernel": parts.gamma, "bias": parts.beta},
        absorbed=(*parts.others, parts.scaling, parts.shifting, addition, site.op),
        axis=axis,
        users={"kernel": parts.scaling, "bias": parts.shifting},
    )


def _linear(gamma: Weight, in_axis: int | None, axis: int) -> Linear:
    kernel = Kernel("kernel", (math.prod(gamma.shape),), (0,), (0,))
    return Linear((kernel,), "bias", in_axis, axis)


def _axis_of(weight: Weight, shape: Shape) -> int | None:
    """The axis of a tensor along which an array varies that is broadcast to it."""
    first = len(shape) - len(weight.shape)
    along = [first + axis for axis, size in enumerate(weight.shape) if size != 1]
    fits = len(along) == 1 and along[0] > 0 and shape[along[0]] == math.prod(weight.shape)
    return along[0] if fits and weight.is_plain else None


def _reshaped_groups(site: Site, addition: Any, parts: _Parts, shape: Shape) -> Any:
    """The reshape that joins groups of channels again, after the addition, or None."""
    reader = site.function.only_reader(addition.outputs[0])
    if reader is None or reader[0].type != "Reshape" or reader[1] != 0 or len(shape) < 3:
        return None
    after = shape_of(reader[0].outputs[0])
    for weight in (parts.gamma, parts.beta):
        sizes = (1,) * (len(shape) - len(weight.shape)) + weight.shape
        by_group = sizes[-2:] == shape[-2:] and math.prod(sizes[:-2]) == 1
        if not by_group or not weight.is_plain or after[-1:] != (math.prod(sizes),):
            return None
    return reader[0]


def _parts_of(constants: Constants, addition: Any) -> _Parts | None:
    for product, rest in itertools.permutations(source_of(t) for t in addition.inputs):
        if product.op.type != "Mul" or rest.op.type not in _ADDITIONS | {"Sub"}:
            continue
        for factor, data in itertools.permutations(product.op.inputs):
            parts = _around(constants, addition, product.op, rest.op, source_of(factor), data)
            if parts is not None:
                return parts
    return None


def _around(
    constants: Constants, addition: Any, product: Any, rest: Any, factor: Any, data: Any
) -> _Parts | None:
    """The parts around r * gamma, if that is what a factor is."""
    function = constants.function
    scaling = factor.op
    beta, turned = rest.inputs
    if rest.type != "Sub" and constants.kernel(beta) is None:
        beta, turned = turned, beta
    other = source_of(turned).op  # -m * (r * gamma), or that without the sign
    if scaling.type != "Mul" or other.type != "Mul":
        return None
    gamma, inverse = scaling.inputs
    if constants.kernel(gamma) is None:
        gamma, inverse = inverse, gamma
    means = [tensor for tensor in other.inputs if source_of(tensor) is not factor]
    weights = constants.kernel(gamma), constants.kernel(beta)
    if len(means) != 1 or weights[0] is None or weights[1] is None:
        return None
    if any(constants.is_fixed(tensor) for tensor in (inverse, data, *means)):
        return None
    read_alone = all(
        function.only_reader(inner.outputs[0]) == (reader, place)
        for inner, reader, place in (
            (product, addition, _place(addition, product)),
            (rest, addition, _place(addition, rest)),
            (other, rest, _place(rest, other)),
        )
    )
    readers = {reader.name for reader, _ in function.readers.get(factor.name, ())}
    if not read_alone or readers != {product.name, other.name}:
        return None
    if factor.name in function.output_names:
        return None
    operands = (data, inverse, *means)
    return _Parts(scaling, rest, (product, other), operands, weights[0], weights[1])


def _place(reader: Any, op: Any) -> int:
    """By which input an operation is read."""
    return next(i for i, tensor in enumerate(reader.inputs) if source_of(tensor).op is op)


def scale_and_shift(site: Site) -> Described | None:
    """A product with an array that varies by channel, and the addition of another such array."""
    reader = site.function.only_reader(site.op.outputs[0])
    if site.op.type != "Mul" or reader is None or reader[0].type not in _ADDITIONS | {"BiasAdd"}:
        return None
    addition, place = reader
    for data, factor in itertools.permutations(site.op.inputs):
        gamma = site.constants.kernel(factor)
        beta = site.constants.kernel(addition.inputs[1 - place])
        if gamma is None or beta is None or site.constants.is_fixed(data):
            continue
        axis = _axis_of(gamma, site.output)
        shapes = {shape_of(t) for t in (data, site.op.outputs[0], addition.outputs[0])}
        if axis is None or len(shapes) != 1:
            continue
        is_bias = addition.type == "BiasAdd"
        along = Site(addition, site.constants).channel_axis if is_bias else _axis_of(beta, *shapes)
        if along != axis or not beta.is_plain:
            continue
        return Described(
            _linear(gamma, axis, axis),
            (data,),
            addition.outputs[0],
            {"kernel": gamma, "bias": beta},
            absorbed=(addition,),
            axis=axis,
            otherwise=_constant(site, axis, factor, addition.inputs[1 - place]),
        )
    return None


def _constant(site: Site, axis: int, *factors: Any) -> Op:
    """A product and a sum with arrays along an axis, as they are."""
    shape = (-1,) + (1,) * (len(site.output) - 1 - axis)
    arrays = [np.asarray(site.constants.value(tensor)).reshape(shape) for tensor in factors]
    return constant_map(arrays[0], arrays[1], site.output)

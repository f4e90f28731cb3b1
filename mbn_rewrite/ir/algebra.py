"""Per-channel affine maps and what they do to weights. numpy only, float64 inside.

A BatchNormalization at inference is the map

    y = s * x + t,   s = gamma / sqrt(variance + epsilon),   t = beta - mean * s

(Ioffe and Szegedy, "Batch Normalization", 2015, algorithm 2), one pair (s, t) per
channel. A linear layer y = W x + b absorbs a map on either side of it:

    after:   s * (W x + b) + t  =  (s W) x + (s b + t)
    before:  W (s * x + t) + b  =  (W s) x + (W t + b)

A table of an embedding, of which x picks a row, absorbs one behind it: every row r becomes s r + t.
Where a convolution reads zeros around its input, W t is not the same at every position:

    before:  W pad(s * x + t) + b  =  (W s) pad(x) + B + b,   B = W pad(t)

B, the border map, depends on the sizes of the input and not on the input.

Weights are multiplied in float64 and rounded once, to the dtype they are stored in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mbn_rewrite.ir.channel_map import Array, ChannelMap
from mbn_rewrite.ir.kernels import Kernel, Window


@dataclass(frozen=True)
class Border:
    """Border of an input of known sizes, where a convolution reads padding.

    Attributes:
        windows: for each axis of positions.
        sizes: of the input along these axes.
    """

    windows: tuple[Window, ...]
    sizes: tuple[int, ...]

    @property
    def outputs(self) -> tuple[int, ...]:
        """The sizes of the output along the axes of positions."""
        pairs = zip(self.windows, self.sizes, strict=True)
        return tuple(len(window.reads(size)) for window, size in pairs)

    def map(self, kernels: Sequence[tuple[Kernel, Array]], shift: Array) -> Array:
        """The border map B of the module's last equation.

        Args:
            kernels: as for `fold`; those after the first are of one position.
            shift: float64, one value per input channel.

        Returns:
            float64, shape (*outputs, output channels).
        """
        (first, array), *rest = kernels
        result = first.applied_by_position(array, shift)
        for axis, (window, size) in enumerate(zip(self.windows, self.sizes, strict=True)):
            along = np.tensordot(window.reads(size), result, axes=(1, axis))
            result = np.moveaxis(along, 0, axis)
        for _, pointwise in rest:
            result = result @ pointwise.reshape(result.shape[-1], -1).astype(np.float64)
        return result


def fold(
    kernels: Sequence[tuple[Kernel, Array]],
    bias: Array | None,
    *,
    before: ChannelMap | None = None,
    after: ChannelMap | None = None,
    border: Border | None = None,
) -> tuple[list[Array], Array]:
    """Weights of the linear layer that does `before`, then this layer, then `after`.

    Args:
        kernels: the layer's kernels in the order in which they are applied (a separable
            convolution has two), each with its layout.
        bias: shape (output channels,), or None.
        before: a map of the layer's input. If it shifts, the layer must not read padding,
            unless it is said where.
        after: a map of the layer's output.
        border: where the layer reads padding, for a bias that differs by position.

    Returns:
        The kernels, each with its shape and dtype, and the bias in float64, of shape
        (output channels,), or (1,) where it is zero for every channel; with a border, of
        shape (*outputs, output channels).
    """
    arrays = [array for _, array in kernels]
    new_bias = np.zeros(1) if bias is None else bias.astype(np.float64)
    if before is not None:
        if border is not None:
            new_bias = new_bias + border.map(kernels, before.shift)
        elif before.has_shift:
            constant = before.shift
            for kernel, array in kernels:
                constant = kernel.applied_to_constant(array, constant)
            new_bias = new_bias + constant
        arrays[0] = kernels[0][0].scaled(arrays[0], inputs=before.scale)
    last = kernels[-1][0]
    if after is not None and last.is_table:
        arrays[-1] = last.mapped(arrays[-1], after)
    elif after is not None:
        arrays[-1] = last.scaled(arrays[-1], outputs=after.scale)
        new_bias = after.scale * new_bias + after.shift
    return arrays, new_bias

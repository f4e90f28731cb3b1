"""Per-channel affine maps and what they do to weights. numpy only, float64 inside.

A BatchNormalization at inference is the map

    y = s * x + t,   s = gamma / sqrt(variance + epsilon),   t = beta - mean * s

(Ioffe and Szegedy, "Batch Normalization", 2015, algorithm 2), one pair (s, t) per
channel. A linear layer y = W x + b absorbs a map on either side of it:

    after:   s * (W x + b) + t  =  (s W) x + (s b + t)
    before:  W (s * x + t) + b  =  (W s) x + (W t + b)

Where a convolution reads zeros around its input, W t is not the same at every position:

    before:  W pad(s * x + t) + b  =  (W s) pad(x) + B + b,   B = W pad(t)

B, the border map, depends on the sizes of the input and not on the input.

Weights are multiplied in float64 and rounded once, to the dtype they are stored in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Array = np.ndarray


@dataclass(frozen=True, eq=False)
class ChannelMap:
    """The map x -> scale * x + shift, per channel, along one axis of a tensor.

    Attributes:
        scale: float64, shape (channels,).
        shift: float64, shape (channels,).
        axis: which axis of the tensor the channels lie on, counted from 0 (the batch).
    """

    scale: Array
    shift: Array
    axis: int

    @classmethod
    def of_batch_norm(
        cls, gamma: Array, beta: Array, mean: Array, variance: Array, epsilon: float, axis: int
    ) -> ChannelMap:
        """The map of a BatchNormalization at inference; see the module's first equation."""
        gamma, beta, mean, variance = (
            np.asarray(array, np.float64) for array in (gamma, beta, mean, variance)
        )
        with np.errstate(all="ignore"):  # a map that is not finite is reported by the planner
            scale = gamma / np.sqrt(variance + epsilon)
            return cls(scale, beta - mean * scale, axis)

    @property
    def channels(self) -> int:
        return len(self.scale)

    @property
    def has_shift(self) -> bool:
        return bool(np.any(self.shift != 0))

    @property
    def has_negative_scale(self) -> bool:
        return bool(np.any(self.scale < 0))

    @property
    def is_finite(self) -> bool:
        return bool(np.all(np.isfinite(self.scale)) and np.all(np.isfinite(self.shift)))

    def without_shift(self) -> ChannelMap:
        return ChannelMap(self.scale, np.zeros_like(self.shift), self.axis)

    def on_axis(self, axis: int) -> ChannelMap:
        return ChannelMap(self.scale, self.shift, axis)

    def part(self, start: int, stop: int) -> ChannelMap:
        """The map of channels start..stop-1 alone."""
        return ChannelMap(self.scale[start:stop], self.shift[start:stop], self.axis)

    def widened(self, start: int, channels: int) -> ChannelMap:
        """This map on channels start.., the identity on all the others of `channels`."""
        scale, shift = np.ones(channels), np.zeros(channels)
        scale[start : start + self.channels] = self.scale
        shift[start : start + self.channels] = self.shift
        return ChannelMap(scale, shift, self.axis)

    def then(self, later: ChannelMap) -> ChannelMap:
        """The map that applies this one first and `later` after it."""
        with np.errstate(all="ignore"):  # the planner checks what it composes
            return ChannelMap(
                self.scale * later.scale, self.shift * later.scale + later.shift, self.axis
            )

    def equals(self, other: ChannelMap) -> bool:
        """Equal bit for bit, on the same axis."""
        return (
            self.axis == other.axis
            and np.array_equal(self.scale, other.scale)
            and np.array_equal(self.shift, other.shift)
        )


@dataclass(frozen=True)
class Kernel:
    """Layout of an array of weights by channel.

    Attributes:
        name: the array's name in its layer.
        view: a shape of the array in which the channels are whole axes. It differs from
            the stored shape for grouped convolutions only.
        in_dims: the axes of the view that, in this order, count the input channels.
        out_dims: likewise the output channels, in ascending order. An axis may be in both
            (depthwise kernels).
    """

    name: str
    view: tuple[int, ...]
    in_dims: tuple[int, ...]
    out_dims: tuple[int, ...]

    @property
    def out_channels(self) -> int:
        return math.prod(self.view[dim] for dim in self.out_dims)

    def _spread(self, vector: Array, dims: tuple[int, ...]) -> Array:
        """A vector over channels, shaped so that it broadcasts against the view."""
        spread = vector.reshape([self.view[dim] for dim in dims])
        spread = np.transpose(spread, np.argsort(dims))
        return spread.reshape([size if i in dims else 1 for i, size in enumerate(self.view)])

    def scaled(
        self, array: Array, *, inputs: Array | None = None, outputs: Array | None = None
    ) -> Array:
        """`array` times a factor per input channel and per output channel.

        Computed in float64 a buffer at a time and rounded once, so that the whole array
        is never held in float64.
        """
        factor = np.ones((1,) * len(self.view))
        if inputs is not None:
            factor = factor * self._spread(inputs, self.in_dims)
        if outputs is not None:
            factor = factor * self._spread(outputs, self.out_dims)
        result = np.empty(self.view, array.dtype)
        with np.errstate(all="ignore"):  # the caller checks that the result is finite
            # "unsafe" only because some dtypes (bfloat16) have no "same_kind" rule.
            np.multiply(
                array.reshape(self.view), factor, out=result, dtype=np.float64, casting="unsafe"
            )
        return result.reshape(array.shape)

    def applied_to_constant(self, array: Array, vector: Array) -> Array:
        """Sum that the layer adds to each output channel when its input is constant.

        Args:
            array: the weights.
            vector: float64, one value per input channel, the same at every position.

        Returns:
            float64, one value per output channel, at positions where no padding is read.
        """
        axes = list(range(len(self.view)))
        return np.einsum(  # without "optimize", a buffer at a time: no float64 copy
            array.reshape(self.view),
            axes,
            self._spread(vector, self.in_dims),
            axes,
            list(self.out_dims),
            dtype=np.float64,
            casting="unsafe",
        ).reshape(-1)

    def applied_by_position(self, array: Array, vector: Array) -> Array:
        """Sums that each place of the window alone adds when its input is constant.

        Args:
            array: the weights of a convolution.
            vector: float64, one value per input channel.

        Returns:
            float64, shape (*window, output channels).
        """
        axes = list(range(len(self.view)))
        window = [axis for axis in axes if axis not in (*self.in_dims, *self.out_dims)]
        sums = np.einsum(
            array.reshape(self.view),
            axes,
            self._spread(vector, self.in_dims),
            axes,
            [*window, *self.out_dims],
            dtype=np.float64,
            casting="unsafe",
        )
        return sums.reshape(*sums.shape[: len(window)], -1)

    def largest(self, array: Array) -> Array:
        """The largest magnitude among the weights of each output channel."""
        others = tuple(i for i in range(len(self.view)) if i not in self.out_dims)
        return np.abs(array.reshape(self.view)).max(axis=others).astype(np.float64).reshape(-1)


@dataclass(frozen=True)
class Window:
    """Window of a convolution along one axis of positions.

    Attributes:
        size: how many positions it reads for each output.
        stride: how far apart they are for neighbouring outputs.
        dilation: how far apart they are for one output.
        padding: how many zeros are put before and after the axis; or "same", for as many as
            let ceil(positions / stride) outputs be given, half of them before, rounded down.
    """

    size: int
    stride: int
    dilation: int
    padding: tuple[int, int] | str

    def reads(self, positions: int) -> Array:
        """Mask of the places at which real positions are read.

        Returns:
            float64, shape (outputs, size): 1 where an output reads one of the positions of
            the input at a place of the window, 0 where it reads a zero of the padding.
        """
        reach = (self.size - 1) * self.dilation + 1
        if self.padding == "same":
            outputs = -(-positions // self.stride)
            before = max((outputs - 1) * self.stride + reach - positions, 0) // 2
        else:
            before, after = (int(amount) for amount in self.padding)
            outputs = max((before + positions + after - reach) // self.stride + 1, 0)
        read = np.arange(outputs)[:, None] * self.stride - before
        read = read + np.arange(self.size) * self.dilation
        return ((read >= 0) & (read < positions)).astype(np.float64)

    def pads(self, positions: int | None) -> bool:
        """Whether padding is read beside so many positions; None where they are not known."""
        if self.padding == (0, 0) or (self.padding == "same" and self.size == 1):
            return False
        return positions is None or not self.reads(positions).all()


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
    if after is not None:
        arrays[-1] = kernels[-1][0].scaled(arrays[-1], outputs=after.scale)
        new_bias = after.scale * new_bias + after.shift
    return arrays, new_bias


def reshaped(
    channel_map: ChannelMap,
    shape: Sequence[int | None],
    new_shape: Sequence[int | None],
) -> ChannelMap | None:
    """A map of a tensor, as a map of the same tensor reshaped.

    Flattening repeats the map; taking a flat tensor apart again is possible where the
    map repeats in just that way.

    Args:
        shape: the tensor's shape, batch first; None where a size is not known.
        new_shape: likewise, reshaped.

    Returns:
        None where the reshaped map is not a map per channel.
    """
    axis, channels = channel_map.axis, channel_map.channels
    if len(shape) < 2 or len(new_shape) < 2 or 0 in (*shape, *new_shape):
        return None
    inner = list(shape[axis:])
    if None not in inner and inner == list(new_shape[1:][-len(inner) :]):
        # What lies inside each channel is left as it was.
        return channel_map.on_axis(len(new_shape) - len(inner))
    outer = list(shape[1 : axis + 1])
    if None not in outer and outer == list(new_shape[1 : axis + 1]):
        return channel_map  # likewise what lies outside
    if None in shape[1:] or None in new_shape[1:]:
        return None
    sizes = [int(size) for size in shape[1:] if size is not None]
    new_sizes = [int(size) for size in new_shape[1:] if size is not None]
    if math.prod(sizes) != math.prod(new_sizes):
        return None
    spread = [channels if i == axis - 1 else 1 for i in range(len(sizes))]
    # (scale, shift) pairs are moved as one index, so that one pass finds the axis.
    index = np.broadcast_to(np.arange(channels).reshape(spread), sizes).reshape(new_sizes)
    pairs = np.stack([channel_map.scale, channel_map.shift])
    unique = np.unique(pairs, axis=1, return_inverse=True)[1].reshape(-1)
    labels = unique[index]
    varying = [i for i in range(labels.ndim) if np.any(labels != labels.take([0], axis=i))]
    if len(varying) > 1:
        return None
    kept = varying[0] if varying else labels.ndim - 1
    line = np.moveaxis(index, kept, 0).reshape(new_sizes[kept], -1)[:, 0]
    return ChannelMap(channel_map.scale[line], channel_map.shift[line], kept + 1)

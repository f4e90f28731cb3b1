"""Kernels of linear layers by channel, and the windows in which convolutions read. numpy only."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from mbn_rewrite.ir.channel_map import Array, ChannelMap

_ROWS = 4096  # of a table, that are held in float64 at once


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
        is_table: whether each output is a row of it, as of an embedding, so that a shift is
            added to every row. Rows are its first axis and channels its second.
    """

    name: str
    view: tuple[int, ...]
    in_dims: tuple[int, ...]
    out_dims: tuple[int, ...]
    is_table: bool = False

    @property
    def size(self) -> int:
        return math.prod(self.view)

    @property
    def in_channels(self) -> int:
        return math.prod(self.view[dim] for dim in self.in_dims)

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

    def mapped(self, array: Array, m: ChannelMap) -> Array:
        """A table with a map done on every row, rounded as `scaled` does."""
        result, table = np.empty(self.view, array.dtype), array.reshape(self.view)
        with np.errstate(all="ignore"):  # as there
            for start in range(0, len(table), _ROWS):
                rows = slice(start, start + _ROWS)
                result[rows] = m.scale * table[rows].astype(np.float64) + m.shift
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
        return self._largest(array, self.out_dims)

    def largest_read(self, array: Array) -> Array:
        """The largest magnitude among the weights of each input channel."""
        return self._largest(array, self.in_dims)

    def largest_by(self, array: Array, dims: Collection[int]) -> Array:
        """The largest magnitudes by some axes of the view, float64; the others have one place."""
        others = tuple(i for i in range(len(self.view)) if i not in dims)
        sizes = np.abs(array.reshape(self.view)).max(axis=others, keepdims=True)
        return np.asarray(sizes, np.float64)

    def _largest(self, array: Array, dims: tuple[int, ...]) -> Array:
        others = (i for i in range(len(self.view)) if i not in dims)
        order = (*dims, *others)  # input channels need not be counted in the order of axes
        return np.transpose(self.largest_by(array, dims), order).reshape(-1)


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
        outputs, first = self._laid_over(positions)
        read = np.arange(outputs)[:, None] * self.stride + first
        read = read + np.arange(self.size) * self.dilation
        return ((read >= 0) & (read < positions)).astype(np.float64)

    @property
    def _reach(self) -> int:
        return (self.size - 1) * self.dilation + 1

    def _laid_over(self, positions: int) -> tuple[int, int]:
        """The number of outputs, and the position that the first one reads first."""
        if self.padding == "same":
            outputs = -(-positions // self.stride)
            padded = max((outputs - 1) * self.stride + self._reach - positions, 0)
            return outputs, -(padded // 2)
        before, after = (int(amount) for amount in self.padding)
        return max((before + positions + after - self._reach) // self.stride + 1, 0), -before

    def places_in(self, wider: Window, positions: int | None) -> tuple[int, ...] | None:
        """The places of another window at which this one reads, for every output.

        Args:
            wider: the other window.
            positions: of the input; None where they are not known.

        Returns:
            None where this window reads what the other does not, or gives more or fewer outputs.
        """
        if self.stride != wider.stride:
            return None
        # What is read depends on the number of positions by its remainder at most.
        least = max(self._reach, wider._reach)
        sizes = range(least, least + self.stride) if positions is None else [positions]
        found = {self._places(wider, size) for size in sizes}
        return found.pop() if len(found) == 1 else None

    def _places(self, wider: Window, positions: int) -> tuple[int, ...] | None:
        (outputs, first), (others, its_first) = (
            window._laid_over(positions) for window in (self, wider)
        )
        if outputs != others:
            return None
        its_places = range(its_first, its_first + wider._reach, wider.dilation)
        own = range(first, first + self._reach, self.dilation)
        if not all(position in its_places for position in own):
            return None
        return tuple(its_places.index(position) for position in own)

    def pads(self, positions: int | None) -> bool:
        """Whether padding is read beside so many positions; None where they are not known."""
        if self.padding == (0, 0) or (self.padding == "same" and self.size == 1):
            return False
        return positions is None or not self.reads(positions).all()

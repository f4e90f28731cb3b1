"""Per-channel affine maps: composed, moved to other axes, reshaped. numpy only, in float64."""

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
        """The map of a BatchNormalization at inference; see `ir.algebra`."""
        gamma, beta, mean, variance = (
            np.asarray(array, np.float64) for array in (gamma, beta, mean, variance)
        )
        with np.errstate(all="ignore"):  # a map that is not finite is reported by passes
            scale = gamma / np.sqrt(variance + epsilon)
            return cls(scale, beta - mean * scale, axis)

    @property
    def channels(self) -> int:
        return len(self.scale)

    @property
    def has_shift(self) -> bool:
        return bool(np.any(self.shift != 0))

    @property
    def is_finite(self) -> bool:
        return bool(np.all(np.isfinite(self.scale)) and np.all(np.isfinite(self.shift)))

    def without_shift(self) -> ChannelMap:
        return ChannelMap(self.scale, np.zeros_like(self.shift), self.axis)

    def on_axis(self, axis: int) -> ChannelMap:
        return ChannelMap(self.scale, self.shift, axis)

    def then(self, later: ChannelMap) -> ChannelMap:
        """The map that applies this one first and `later` after it."""
        with np.errstate(all="ignore"):  # passes check what they compose
            return ChannelMap(
                self.scale * later.scale, self.shift * later.scale + later.shift, self.axis
            )


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

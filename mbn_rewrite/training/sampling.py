"""Where statistics are taken, and the statistics: data that every backend shares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Sampling:
    """Where statistics are taken, and how the result is applied.

    Attributes:
        axis: that of the channels, from 0: 1 or the last.
        strides: one for each spatial axis; () for none.
        epsilon: what is added to the variance.
        synchronized: whether the statistics are those of all replicas together.
        depthwise: apply scale and shift by a depthwise 1x1 convolution.
    """

    axis: int
    strides: tuple[int, ...]
    epsilon: float
    synchronized: bool = False
    depthwise: bool = False

    @property
    def everything(self) -> bool:
        """Whether the sample is every position."""
        return all(stride == 1 for stride in self.strides)

    def steps(self, rank: int) -> list[int]:
        """The stride along every axis of an input of this rank."""
        strides = list(self.strides)
        return [1, *strides, 1] if self.axis == rank - 1 else [1, 1, *strides]


@dataclass(frozen=True)
class Moments:
    """Statistics of a sample, per channel, in float32 (float64 for such an input).

    Attributes:
        mean: shape [C].
        variance: the population variance, shape [C].
        count: how many positions they are of, a scalar.
    """

    mean: Any
    variance: Any
    count: Any

"""Operations that ran, or were compiled, and the BatchNormalization that each belongs to.

How they are found is each backend's; see `backends`.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class OpTime:
    """An operation as it ran under a profiler, or one of its kernels on a GPU.

    Attributes:
        name: that in the graph; "" where a kernel has none.
        op: its kind, as FusedBatchNormV3; that of oneDNN is so marked.
        kernel: the name of the kernel on a GPU, else "".
        times: how long each of its runs took, in milliseconds, over all calls; () for what was
            compiled and not profiled.
        calls: how many calls were profiled.
        listed: whether it is worth listing: it is more than plain arithmetic, and moves data.
    """

    name: str
    op: str
    kernel: str = ""
    times: tuple[float, ...] = ()
    calls: int = 1
    listed: bool = True

    @property
    def count(self) -> int:
        """Number of runs in a call. The profiler now and then misses an event."""
        return round(len(self.times) / self.calls)

    @property
    def milliseconds(self) -> float:
        """Its time in a call: the median of a run, times the runs."""
        return statistics.median(self.times) * self.count if self.times else 0.0


@dataclass(frozen=True)
class LayerTime:
    """Operations that ran for one BatchNormalization.

    Attributes:
        name: that of the layer.
        forward, backward: what ran; backward is what depends on the gradient of the loss.
    """

    name: str
    forward: tuple[OpTime, ...]
    backward: tuple[OpTime, ...]

    @property
    def forward_milliseconds(self) -> float:
        """Milliseconds forward in a call."""
        return total(self.forward)

    @property
    def backward_milliseconds(self) -> float:
        """Milliseconds backward in a call."""
        return total(self.backward)


@dataclass(frozen=True)
class ByLayer:
    """Operations by the BatchNormalization that they belong to.

    Attributes:
        layers: by name, in the order of the model, each with what ran for it, if only nothing.
        elsewhere: what belongs to no BatchNormalization.
        unattributed: what may or may not belong to one.
    """

    layers: Mapping[str, LayerTime]
    elsewhere: tuple[OpTime, ...]
    unattributed: tuple[OpTime, ...]

    def __getitem__(self, name: str) -> LayerTime:
        return self.layers[name]

    @property
    def milliseconds(self) -> float:
        """All operations in a call."""
        return self.bn_milliseconds + total(self.elsewhere) + total(self.unattributed)

    @property
    def bn_milliseconds(self) -> float:
        """All that belongs to a BatchNormalization, in a call."""
        return sum(
            layer.forward_milliseconds + layer.backward_milliseconds
            for layer in self.layers.values()
        )

    @property
    def unattributed_share(self) -> float:
        """The part of all time that may or may not belong to a BatchNormalization."""
        return total(self.unattributed) / self.milliseconds if self.milliseconds else 0.0


def norms_of(model: Any) -> list[Any]:
    """The BatchNormalization layers of a Keras model, of whatever class, in its order."""
    layers = model._flatten_layers(include_self=False, recursive=True)
    return [layer for layer in layers if hasattr(layer, "moving_mean")]


def bn_ops_of(layers: ByLayer) -> dict[str, dict[str, list[str]]]:
    """The kinds of operations that ran, by layer, "forward" and "backward", sorted.

    Plain arithmetic is left out: it is mostly of one element for each channel, and the same work
    may be written in many ways.
    """
    return {
        name: {"forward": _kinds(layer.forward), "backward": _kinds(layer.backward)}
        for name, layer in layers.layers.items()
    }


def _kinds(ops: Iterable[OpTime]) -> list[str]:
    return sorted({op.op for op in ops if op.listed})


def total(ops: Iterable[OpTime]) -> float:
    """Milliseconds of operations in a call."""
    return sum(op.milliseconds for op in ops)


def counted(ops: Iterable[OpTime]) -> dict[str, int]:
    """Number of runs in a call of each listed kind of operation, or kernel of a GPU, sorted."""
    counts: Counter[str] = Counter()
    for op in ops:
        if op.listed:
            counts[op.kernel or op.op] += op.count
    return dict(sorted(counts.items()))

"""Which operations of BatchNormalization a step of training executed, and how long they took.

TensorFlow's profiler watches a few steps of the run itself. An event is named
"path/of/name:Kernel", and the path has the name of the layer, forward and backward. Only the
gradients of this library's layers have none: of those kinds of operations, each such layer has one,
or each with a stride, and the gradients are made from the last layer to the first.

This is all that the study knows of the profiler.
"""

from __future__ import annotations

import itertools
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import tensorflow as tf
from tensorflow.tsl.profiler.protobuf import xplane_pb2

from benchmarks.studying.errors import StudyError

# Kernels that move nothing, look after variables, or compute with one element per channel.
_UNLISTED = {
    *("Const", "Identity", "IdentityN", "NoOp", "_Arg", "_Retval", "Cast", "Shape", "Reshape"),
    *("ReadVariableOp", "AssignVariableOp", "AssignSubVariableOp", "AssignAddVariableOp"),
    *("Mul", "Sub", "AddV2", "Neg", "RealDiv", "DivNoNan", "Rsqrt", "RsqrtGrad", "Sqrt"),
    *("Maximum", "Minimum", "Fill", "Tile", "ExpandDims", "Squeeze", "Prod", "Reciprocal"),
    *("Snapshot", "StridedSlice", "Pack", "ConcatV2", "Size"),
}
# What gradients without a layer's name are made of, as far as nothing else is made of it: the
# pipeline gathers too, at the same time.
_UNNAMED = ("FusedBatchNormGradV3", "FusedBatchNormV3", "InplaceAdd")


@dataclass(frozen=True)
class Executed:
    """A kernel that ran for a layer.

    Attributes:
        layer: the layer's name; "" where that is not known.
        backward: whether it is of the gradient.
        kernel: what ran, such as "FusedBatchNormV3 (oneDNN)".
        milliseconds: how long.
    """

    layer: str
    backward: bool
    kernel: str
    milliseconds: float


def kinds(operations: Iterable[str]) -> set[str]:
    """What ran, whoever computed it, and whether or not a ReLU was in it."""
    return {
        operation.removesuffix(" (oneDNN)").replace("FusedBatchNormEx", "FusedBatchNormV3")
        for operation in operations
    }


@dataclass(frozen=True)
class Steps:
    """What ran in BatchNormalization layers while the profiler watched.

    Attributes:
        count: how many steps that were.
        executed: all kernels.
    """

    count: int
    executed: tuple[Executed, ...]

    def operations(self) -> dict[str, int]:
        """How often each kernel ran in a step, less those that cost next to nothing."""
        counts = Counter(one.kernel for one in self.executed if one.kernel not in _UNLISTED)
        each = {kernel: round(count / self.count) for kernel, count in sorted(counts.items())}
        return {kernel: count for kernel, count in each.items() if count}

    def milliseconds(self) -> dict[str, dict[str, float]]:
        """Time of a step by layer, "forward" and "backward"."""
        result: dict[str, dict[str, float]] = {}
        for one in (one for one in self.executed if one.layer):
            of_layer = result.setdefault(one.layer, {"forward": 0.0, "backward": 0.0})
            of_layer["backward" if one.backward else "forward"] += one.milliseconds / self.count
        return result


class Profiler:
    """Watches steps between `start` and `stop`.

    Args:
        layers: names of layers, in the order of the network, and whether each has a stride above 1.
    """

    def __init__(self, layers: Mapping[str, bool]) -> None:
        self._layers = dict(layers)
        self._directory: tempfile.TemporaryDirectory[str] | None = None

    def start(self) -> None:
        """From here on."""
        # Level 3 has cheap operations, too.
        options = tf.profiler.experimental.ProfilerOptions(
            host_tracer_level=3, python_tracer_level=0, device_tracer_level=0
        )
        self._directory = tempfile.TemporaryDirectory()
        tf.profiler.experimental.start(self._directory.name, options)

    def stop(self, steps: int) -> Steps:
        """What ran in so many steps."""
        assert self._directory is not None
        tf.profiler.experimental.stop()
        path = next(Path(self._directory.name).rglob("*.xplane.pb"), None)
        if path is None:
            raise StudyError(
                "the profiler wrote nothing; is there room in the temporary directory?"
            )
        space = xplane_pb2.XSpace.FromString(path.read_bytes())
        self.close()
        return Steps(steps, tuple(attributed(_events(space), self._layers)))

    def close(self) -> None:
        """Whatever state it is in."""
        if self._directory is not None:
            self._directory.cleanup()
            self._directory = None

    def abort(self) -> None:
        """Stops without a result, where it has been started."""
        if self._directory is not None:
            tf.profiler.experimental.stop(save=False)
            self.close()


def _events(space: xplane_pb2.XSpace) -> Iterator[tuple[str, str, float]]:
    """Path, kernel and milliseconds of each operation."""
    for plane in space.planes:
        for event in itertools.chain.from_iterable(line.events for line in plane.lines):
            name = plane.event_metadata[event.metadata_id].name
            found = re.fullmatch(r"([\w./>-]+):(\w+)", name)
            if found:
                yield found[1], found[2], event.duration_ps / 1e9


def attributed(
    events: Iterable[tuple[str, str, float]], layers: Mapping[str, bool]
) -> Iterator[Executed]:
    """The kernels that belong to layers.

    Args:
        events: path, kernel and milliseconds of all that ran.
        layers: see `Profiler`.
    """
    # Keras 3 adds a number where it calls a layer for another time.
    named = (
        re.compile(rf"(?:^|/)({'|'.join(map(re.escape, layers))})(?:_\d+)?/") if layers else None
    )
    unnamed: list[tuple[str, int, str, float]] = []
    backward = set()
    for path, kernel, milliseconds in events:
        listed = _readable(kernel)
        found = named.search(f"{path}/") if named else None
        if found:
            is_backward = "gradient_tape/" in path
            if is_backward:
                backward.add(found[1])
            yield Executed(found[1], is_backward, listed, milliseconds)
            continue
        numbered = re.fullmatch(r"(?:(?:\w+Call|replica_\d+)/)*(\w+?)(?:_(\d+))?", path)
        if numbered and numbered[1] in _UNNAMED:
            unnamed.append((numbered[1], int(numbered[2] or 0), listed, milliseconds))
    # The layers whose gradients have no name, last first.
    owners = [layer for layer in reversed(list(layers)) if layer not in backward]
    sampling = [layer for layer in owners if layers[layer]]
    for kind in _UNNAMED:
        of_kind = [one for one in unnamed if one[0] == kind]
        numbers = sorted({number for _, number, _, _ in of_kind})
        of = next((some for some in (owners, sampling) if len(some) == len(numbers)), None)
        for _, number, kernel, milliseconds in of_kind:
            layer = of[numbers.index(number)] if of else ""
            yield Executed(layer, True, kernel, milliseconds)


def _readable(kernel: str) -> str:
    """The kernel's name, with oneDNN's renamed."""
    return re.sub("^_Mkl(?:Native)?(.*)", r"\1 (oneDNN)", kernel)

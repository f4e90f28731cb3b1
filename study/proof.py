"""Operations of BatchNormalization that a step of training executed, and their times.

TensorFlow's profiler watches a few steps of the run itself. The name of an operation has that of
its layer in it, forward and backward. Only the gradients of this library's layers have none: of
those kinds of operations, each such layer has one, or each with a stride, and the gradients are
made from the last layer to the first.

Profiles are read by `benchmarks.training.tensorflow.profiles`; this is all that the study knows of
the profiler.
"""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import tensorflow as tf
from tensorflow.tsl.profiler.protobuf import xplane_pb2

from benchmarks.training.operations import OpTime
from benchmarks.training.tensorflow import profiles
from study.errors import StudyError

# What gradients without a layer's name are made of, as far as nothing else is made of it: the
# pipeline gathers too, at the same time.
_UNNAMED = ("FusedBatchNormGradV3", "FusedBatchNormV3", "InplaceAdd")


@dataclass(frozen=True)
class Executed:
    """An operation that ran for a layer.

    Attributes:
        layer: the layer's name; "" where that is not known.
        backward: whether it is of the gradient.
        operation: what ran, and how long.
    """

    layer: str
    backward: bool
    operation: OpTime


def kinds(operations: Iterable[str]) -> set[str]:
    """Kinds of operations, whoever computed them, and whether or not a ReLU was in them."""
    return {
        operation.removesuffix(" (oneDNN)").replace("FusedBatchNormEx", "FusedBatchNormV3")
        for operation in operations
    }


@dataclass(frozen=True)
class Steps:
    """Operations of BatchNormalization layers that ran while the profiler watched some steps."""

    executed: tuple[Executed, ...]

    def operations(self) -> dict[str, int]:
        """Number of runs of each kind in a step, less those that cost next to nothing."""
        runs: Counter[str] = Counter()
        steps = 1
        for one in (one.operation for one in self.executed if one.operation.listed):
            runs[one.op] += len(one.times)
            steps = one.calls
        each = {op: round(count / steps) for op, count in sorted(runs.items())}
        return {op: count for op, count in each.items() if count}

    def milliseconds(self) -> dict[str, dict[str, float]]:
        """Time of a step by layer, "forward" and "backward"."""
        result: dict[str, dict[str, float]] = {}
        for one in (one for one in self.executed if one.layer):
            of_layer = result.setdefault(one.layer, {"forward": 0.0, "backward": 0.0})
            of_layer["backward" if one.backward else "forward"] += one.operation.milliseconds
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
        """Begins to watch."""
        # Level 3 has cheap operations, too.
        options = tf.profiler.experimental.ProfilerOptions(
            host_tracer_level=3, python_tracer_level=0, device_tracer_level=0
        )
        self._directory = tempfile.TemporaryDirectory()
        tf.profiler.experimental.start(self._directory.name, options)

    def stop(self, steps: int) -> Steps:
        """Ends it; the operations of so many steps."""
        assert self._directory is not None
        directory, self._directory = self._directory, None
        with directory:
            tf.profiler.experimental.stop()
            path = next(Path(directory.name).rglob("*.xplane.pb"), None)
            if path is None:
                raise StudyError(
                    "the profiler wrote nothing; is there room in the temporary directory?"
                )
            space = xplane_pb2.XSpace.FromString(path.read_bytes())
        return Steps(tuple(attributed(profiles.read(space, steps), self._layers)))

    def abort(self) -> None:
        """Stops without a result, where it has been started."""
        if self._directory is not None:
            directory, self._directory = self._directory, None
            with directory, contextlib.suppress(tf.errors.UnavailableError):
                tf.profiler.experimental.stop(save=False)


def attributed(operations: Iterable[OpTime], layers: Mapping[str, bool]) -> Iterator[Executed]:
    """The operations that belong to layers.

    `benchmarks.training.tensorflow.attribution` finds more, from the graph. What `fit` traces is
    not to be had, so that here names have to do.

    Args:
        operations: all that ran.
        layers: see `Profiler`.
    """
    # Keras 3 adds a number where it calls a layer for another time.
    named = (
        re.compile(rf"(?:^|/)({'|'.join(map(re.escape, layers))})(?:_\d+)?/") if layers else None
    )
    unnamed: list[tuple[str, int, OpTime]] = []
    backward = set()
    for one in operations:
        found = named.search(f"{one.name}/") if named else None
        if found:
            is_backward = "gradient_tape/" in one.name
            if is_backward:
                backward.add(found[1])
            yield Executed(found[1], is_backward, one)
            continue
        numbered = re.fullmatch(r"(?:(?:\w+Call|replica_\d+)/)*(\w+?)(?:_(\d+))?", one.name)
        if numbered and numbered[1] in _UNNAMED:
            unnamed.append((numbered[1], int(numbered[2] or 0), one))
    # The layers whose gradients have no name, last first.
    owners = [layer for layer in reversed(list(layers)) if layer not in backward]
    sampling = [layer for layer in owners if layers[layer]]
    for kind in _UNNAMED:
        of_kind = [(number, one) for name, number, one in unnamed if name == kind]
        numbers = sorted({number for number, _ in of_kind})
        of = next((some for some in (owners, sampling) if len(some) == len(numbers)), None)
        for number, one in of_kind:
            yield Executed(of[numbers.index(number)] if of else "", True, one)

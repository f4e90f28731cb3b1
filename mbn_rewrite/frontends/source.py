"""What the exporter needs of a model on disk, whatever kind it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mbn_rewrite.plans import Plan
from mbn_rewrite.tuning.auto import Options


@dataclass(frozen=True)
class ReferenceIO:
    """What a signature or method was given, and what it gave.

    Attributes:
        inputs: tensors by name; for a method all its arguments, as (args, kwargs).
        outputs: arrays by name; of what consists of several, each by name and number.
        compiled: whether only XLA could run it on this machine.
        method: the path of the method, or "" for a signature.
        interface: what a signature declares, by name, as tf.TensorSpec; {} if not known.
    """

    inputs: Any
    outputs: Mapping[str, np.ndarray]
    compiled: bool = False
    method: str = ""
    interface: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Footprint:
    """How large a model is.

    Attributes:
        weights: how many numbers its variables hold.
        bytes: its size on disk.
        ops: operation type -> how many run in `signature`; empty for a file of Keras.
        signature: the signature whose operations are counted.
    """

    weights: int
    bytes: int
    ops: Mapping[str, int] = field(default_factory=dict)
    signature: str = ""


class ModelSource(Protocol):
    """A model on disk, opened to be rewritten."""

    @property
    def footprint(self) -> Footprint:
        """How large it is."""

    @property
    def left_out(self) -> Mapping[str, str]:
        """The functions that are not carried over, and why."""

    @property
    def as_it_was(self) -> Mapping[str, str]:
        """The functions that are carried over as they were, and why."""

    @property
    def names(self) -> Sequence[str]:
        """The signatures and methods that are carried over."""

    @property
    def unverifiable(self) -> dict[str, str]:
        """The signatures and methods that are not to be run and compared, and why."""

    @property
    def dtypes(self) -> set[str]:
        """The dtypes that it computes in."""

    def plan(self, mode: str, options: Options) -> Plan:
        """What becomes of every BatchNormalization; kept for `write`."""

    def exchanges(self, inputs: Mapping[str, np.ndarray] | None) -> dict[str, ReferenceIO]:
        """What its signatures give, for these inputs or for made-up ones."""

    @property
    def opened_again(self) -> Callable[[Path], Any]:
        """Loads the original again, as a `loading.Loaded`, to look at it more closely.

        It is given a path at which there is nothing, to write to if it has to, and holds no
        part of the opened model.
        """

    def write(self, directory: Path) -> int:
        """Writes the model with the plan carried out; returns how many weights it has.

        The opened model is not used after that.
        """


def bytes_on_disk(path: Path) -> int:
    """The size of a file, or of all files in a directory."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())

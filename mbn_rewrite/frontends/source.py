"""Facts about models on disk, whatever kind they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np


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


def bytes_on_disk(path: Path) -> int:
    """The size of a file, or of all files in a directory."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())

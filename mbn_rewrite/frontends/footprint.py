"""Size of models on disk: weights, bytes, operations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Footprint:
    """Size of a model.

    Attributes:
        weights: number of elements of its variables.
        bytes: its size on disk.
        ops: operation type -> number of such operations in `signature`; empty for Keras files.
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

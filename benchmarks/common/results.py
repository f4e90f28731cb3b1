"""Results on disk: whole, or as they were before."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from benchmarks.common.console import progress


def write_whole(path: Path, text: str) -> None:
    """Writes a file beside its place, has it on the disk, and renames it."""
    part = path.with_name(f"{path.name}.part")
    try:
        with part.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def save(path: str | Path, results: Any) -> None:
    """Writes results as JSON, so that the file is whole at any time.

    What is not finite is written as null: JSON knows no such numbers.
    """
    write_whole(Path(path), json.dumps(_finite(results), indent=2, allow_nan=False) + "\n")


def keep(path: str | Path | None, results: Any) -> None:
    """Saves what is measured so far, where a file is asked for.

    A disk that is full for a while costs no measurement.
    """
    if not path:
        return
    try:
        save(path, results)
    except OSError as error:
        progress(f"error: {path} cannot be written: {error.strerror or error}")


def check_writable(path: str | Path) -> None:
    """Looks whether a file can be there, before anything long starts.

    Raises:
        ValueError: it cannot.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a directory; a file is needed")
    parent = path.resolve().parent
    if not parent.is_dir():
        raise ValueError(f"there is no directory for {path}")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ValueError(f"{parent} is not writable")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

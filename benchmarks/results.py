"""Results on disk: never a part of them."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Any


def save(path: str | Path, results: Any) -> None:
    """Writes results as JSON, beside the file first, so that it is whole at any time.

    What is not finite is written as null: JSON knows no such numbers.
    """
    path = Path(path)
    new = path.with_name(f".{path.name}.new")
    new.write_text(json.dumps(_finite(results), indent=2, allow_nan=False) + "\n")
    os.replace(new, path)


def keep(path: str | Path, results: Any) -> None:
    """Saves what is measured so far. A disk that is full for a while costs no measurement."""
    try:
        save(path, results)
    except OSError as error:
        print(f"error: {path} cannot be written: {error.strerror or error}", file=sys.stderr)


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

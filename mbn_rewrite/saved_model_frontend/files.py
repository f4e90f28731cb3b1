"""Finds out whether a directory may be a SavedModel, without TensorFlow."""

from __future__ import annotations

import os
from pathlib import Path

from mbn_rewrite.errors import RewriteError, cause_of

GRAPH_FILES = ("saved_model.pb", "saved_model.pbtxt")


def check(source: Path) -> None:
    """Finds what is wrong with a directory.

    Raises:
        RewriteError: it is no SavedModel, or parts of it are missing or cannot be read.
    """
    try:
        graphs = [source / name for name in GRAPH_FILES if (source / name).is_file()]
        if not graphs:
            inside = sorted(path.parent for path in source.glob("*/saved_model.pb"))
            hint = f" ({inside[0]} is one)" if inside else ""
            raise RewriteError(
                f"{source} is a directory without saved_model.pb, so no SavedModel{hint}"
            )
        for path in (*graphs, *(source / "variables").glob("*")):
            if not os.access(path, os.R_OK):
                raise RewriteError(f"{path} cannot be read: no permission")
        if not graphs[0].stat().st_size:
            raise RewriteError(f"{graphs[0]} is empty; it may be cut short")
    except OSError as error:
        raise RewriteError(f"{source} cannot be read: {cause_of(error)}") from error

"""Checks of the files of a SavedModel, without TensorFlow.

The graph and the variables may be links: caches of model hubs keep files elsewhere. Assets are
copied into what is written, so one that lies elsewhere could be any file of the host: they must
lie in the directory, or where the hub of that directory keeps its files (`blobs` beside
`snapshots`), unless the model is trusted.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from mbn_rewrite import file_formats
from mbn_rewrite.errors import RewriteError, cause_of
from mbn_rewrite.frontends import limits

GRAPH_FILES = ("saved_model.pb", "saved_model.pbtxt")
_COPIED = ("assets", "assets.extra")


def check(source: Path, trusted: bool = False) -> None:
    """Checks that a directory can be read as a SavedModel.

    Raises:
        RewriteError: it is no SavedModel, parts of it are missing, cannot be read or are larger
            than any model's, or assets lie outside of it and it is not trusted.
    """
    try:
        graphs = [source / name for name in GRAPH_FILES if (source / name).is_file()]
        if not graphs:
            raise RewriteError(file_formats.in_directory(source))
        copied = [path for part in _COPIED for path in _files_in(source, source / part, trusted)]
        for path in (*graphs, *(source / "variables").glob("*"), *copied):
            if not path.is_file():
                raise RewriteError(f"{path} is no file, so {source} is no SavedModel")
            if not os.access(path, os.R_OK):
                raise RewriteError(f"{path} cannot be read: no permission")
        size, most = graphs[0].stat().st_size, _MOST[graphs[0].name]
        if not size:
            raise RewriteError(f"{graphs[0]} is empty; it may be cut short")
        if size > most:
            raise RewriteError(f"{graphs[0]} has {size:,} bytes; no graph has more than {most:,}")
        if graphs[0].suffix == ".pb":
            file_formats.check_saved_model(graphs[0])
    except (OSError, RuntimeError) as error:  # a loop of links is a RuntimeError
        raise RewriteError(f"{source} cannot be read: {cause_of(error)}") from error


_MOST = dict(zip(GRAPH_FILES, (limits.GRAPH_BYTES, limits.GRAPH_TEXT_BYTES), strict=True))


def check_inside(source: Path, asset: Path) -> None:
    """Checks that an asset, which will be copied, lies in its SavedModel.

    Raises:
        RewriteError: it lies elsewhere.
    """
    place = asset.resolve()
    if any(place.is_relative_to(allowed) for allowed in _places(source)):
        return
    raise RewriteError(
        f"{asset} is an asset that lies outside of {source} (at {place}); it would be copied into "
        "what is written. If you trust whoever made the model, pass --trusted (trusted=True in "
        "Python)"
    )


def _places(source: Path) -> Iterator[Path]:
    """Directories in which the assets of a SavedModel may lie."""
    inside = source.resolve()
    yield inside
    for parent in inside.parents:
        if parent.name == "snapshots" and (parent.parent / "blobs").is_dir():
            yield (parent.parent / "blobs").resolve()


def _files_in(source: Path, directory: Path, trusted: bool) -> Iterator[Path]:
    """All files below a directory; links are followed where that is allowed."""
    entered: set[Path] = set()
    pending = [directory] if directory.exists() or directory.is_symlink() else []
    while pending:
        current = pending.pop()
        if not trusted:
            check_inside(source, current)
        if not current.is_dir():
            yield current
            continue
        if current.resolve() in entered:
            raise RewriteError(f"{current} is a link to a directory that it lies in")
        entered.add(current.resolve())
        pending += sorted(current.iterdir())

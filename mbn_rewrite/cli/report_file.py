"""The file that --report names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mbn_rewrite import output_dir
from mbn_rewrite.cli.console import say
from mbn_rewrite.errors import RewriteError, cause_of


def check(path: str | None, source: Path, destination: Path | None) -> None:
    """Raises RewriteError where the report would overwrite a model, or cannot be written."""
    if path is None:
        return
    report = Path(path)
    try:
        place = report.resolve()
        for model in filter(None, (source, destination)):
            if model.resolve() in (place, *place.parents):
                raise RewriteError(f"the report {report} would lie in {model}. Give another path")
        if not path or (place.exists() and not place.is_file()):
            raise RewriteError(f"the report {path!r} is no file. Give another path")
        if not place.parent.is_dir():
            raise RewriteError(f"there is no directory for the report {report}")
    except (OSError, RuntimeError) as error:
        raise RewriteError(f"the report cannot be written: {cause_of(error)}") from error


def write(path: str | None, report: Mapping[str, Any], what: str) -> bool:
    """Writes the report whole or not at all; says so where it cannot.

    Args:
        path: where to, or None for nowhere.
        report: what to write, in types that JSON knows.
        what: what was written beside, in words.
    """
    if not path:
        return True
    place = Path(path).resolve()
    try:
        with output_dir.working_folder(place) as folder:
            folder.new.write_text(json.dumps(report, indent=2) + "\n")
            folder.new.replace(place)
    except RewriteError as error:
        say(f"error: {what}, but the report cannot be: {error}")
        return False
    return True

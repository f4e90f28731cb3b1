"""Messages of a program while it runs."""

from __future__ import annotations

import sys


def progress(what: str) -> None:
    """Writes a line to standard error, at once."""
    print(what, file=sys.stderr, flush=True)

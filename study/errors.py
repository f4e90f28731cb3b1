"""The one error of the study that people are meant to read, and how the program ends."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

from benchmarks.common.console import progress


class StudyError(Exception):
    """The study cannot go on.

    The message says what was found, what was expected, and how to get on.
    """


def exit_code(command: Callable[[], None], results: Path) -> int:
    """Calls a command of the program, and says on standard error what went wrong.

    Returns:
        0, 1 for an error, or 130 for an interrupt.
    """
    try:
        command()
    except StudyError as error:
        progress(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        progress(f"interrupted. {_kept(results)}")
        return 130
    except OSError as error:
        full = error.errno == errno.ENOSPC
        what, then = ("the disk is full", ", once there is room") if full else (error, "")
        progress(f"error: {what}. {_kept(results)}{then}")
        return 1
    return 0


def _kept(results: Path) -> str:
    runs = len(list(results.glob("runs/*.json")))
    return f"Finished runs are kept, {runs} in {results}; the same command goes on from there"

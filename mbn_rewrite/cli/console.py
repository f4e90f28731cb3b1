"""Standard output and error of the command."""

from __future__ import annotations

import sys
from contextlib import suppress

from mbn_rewrite.errors import cause_of


def say(line: str) -> None:
    """Prints a line for people; whether somebody reads it makes no difference to what is done."""
    with suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def pass_on(printed: bytes) -> None:
    """Passes on what the process that works has printed."""
    with suppress(OSError):
        sys.stderr.buffer.write(printed)
        sys.stderr.flush()


def print_result(text: str, what: str) -> bool:
    """Prints the result; says so where it cannot.

    Args:
        text: the result.
        what: what was written, in words.
    """
    try:
        print(text, end="", flush=True)
    except BrokenPipeError:
        pass  # who read it had read enough
    except OSError as error:
        say(f"error: {what}, but what was done cannot be printed: {cause_of(error)}")
        return False
    return True

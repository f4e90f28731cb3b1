"""Entry point of the command `mbn-rewrite`.

Signals and streams come first, before anything is imported that takes a while.
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from typing import NoReturn

from mbn_rewrite.cli.interrupts import ENDING, Interrupted, Interrupts

_ERROR = 1


def main() -> NoReturn:
    """Runs the command with the arguments of this process, and ends the process."""
    _heed_signals()
    _open_closed_streams()
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    from absl import app

    from mbn_rewrite.cli import flags
    from mbn_rewrite.cli.console import say
    from mbn_rewrite.errors import cause_of

    try:
        app.run(_run, flags_parser=flags.parse)
    except SystemExit as end:  # of --help, --version, and wrong flags
        _end(end.code if isinstance(end.code, int) else _ERROR)
    except BrokenPipeError:  # who read the help had read enough
        _end(_ERROR)
    except OSError as error:
        say(f"error: nothing can be printed: {cause_of(error)}")
        _end(_ERROR)
    _end(0)


def _run(argv: list[str]) -> NoReturn:
    from mbn_rewrite.cli.command import run

    with Interrupts() as interrupts:
        _end(run(argv[1:], interrupts))


def _heed_signals() -> None:
    """Has signals end the process with one line, until `Interrupts` takes over."""
    for number in ENDING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _end_at_once)


def _end_at_once(number: int, _: object) -> None:
    interrupted = Interrupted(number)
    try:
        os.write(2, f"{interrupted.said('nothing was written')}\n".encode())
    finally:
        os._exit(interrupted.exit_code)


def _open_closed_streams() -> None:
    """Opens streams that are closed, lest one become a file that is opened later."""
    for stream in (0, 1, 2):
        try:
            os.fstat(stream)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = sys.stdout or open(1, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w")  # noqa: SIM115


def _end(code: int) -> NoReturn:
    """Ends the process, without what Python does at its end, where a signal would be lost."""
    with suppress(OSError):
        sys.stdout.flush()
    os._exit(code)

"""Signals that ask a process to end: noted, so that it ends where nothing is half done."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from types import FrameType
from typing import Any

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(Exception):  # noqa: N818 - no error: it was asked for
    """A signal has asked the process to end.

    Attributes:
        number: which.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"signal {number}")
        self.number = number

    @property
    def exit_code(self) -> int:
        """Exit code that shells give for a process that a signal has ended."""
        return 128 + self.number

    def said(self, what: str) -> str:
        """The line for the user, of which the last words say what there is now."""
        how = "" if self.number == signal.SIGINT else f" by {signal.Signals(self.number).name}"
        return f"interrupted{how}: {what}"


class Interrupts:
    """Context manager that notes signals, which then end nothing by themselves.

    What waits for `fileno` wakes when one comes, and when a child process ends. What the caller
    of this process had it ignore (as nohup does) stays ignored. Signals reach the main thread
    only, so that this is for it alone.

    Attributes:
        number: the first that came, or None.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._at_once: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        self._wakes, self._woken_by = os.pipe()
        for end in (self._wakes, self._woken_by):
            os.set_blocking(end, False)
        self._woken_before = signal.set_wakeup_fd(self._woken_by, warn_on_full_buffer=False)
        for number in ENDING:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._note)
        self._before[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, lambda *_: None)
        return self

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before or signal.SIG_DFL)
        signal.set_wakeup_fd(self._woken_before)
        os.close(self._wakes)
        os.close(self._woken_by)

    def fileno(self) -> int:
        """File descriptor that becomes readable when a signal comes."""
        return self._wakes

    def awake(self) -> None:
        """Reads what a signal has made readable."""
        with suppress(BlockingIOError):
            while os.read(self._wakes, 512):
                pass

    def check(self) -> None:
        """Raises Interrupted where a signal has come."""
        if self.number is not None:
            raise Interrupted(self.number)

    def end_at_once(self, what: str) -> None:
        """From now on a signal ends the process where it is, with a line that says this."""
        self._at_once = what

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = self.number or number
        if self._at_once is not None:
            interrupted = Interrupted(number)
            with suppress(OSError):
                os.write(2, f"{interrupted.said(self._at_once)}\n".encode())
            os._exit(interrupted.exit_code)

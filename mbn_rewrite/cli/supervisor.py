"""Has a job done by a process of its own, and stays master of it.

Loading, measuring and running models may hang, crash, run out of memory, or print what it likes.
In a process of its own none of that reaches the tool: however that process ends, the tool goes on,
says in a line what happened, and leaves nothing behind.
"""

from __future__ import annotations

import os
import re
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from mbn_rewrite.cli.interrupts import Interrupts
from mbn_rewrite.cli.job import NO_MEMORY, UNEXPECTED, Ending, Job, Step, read_message
from mbn_rewrite.errors import RewriteError, cause_of

_ROOT = str(Path(__file__).resolve().parents[2])
# The folder that the user is in may hide no modules, and the folder that this package is installed
# in no modules of Python.
WORKER = (
    sys.executable,
    "-c",
    f"import sys; path = [place for place in sys.path if place]; "
    f"sys.path[:] = path if {_ROOT!r} in path else [{_ROOT!r}, *path]; "
    "from mbn_rewrite.cli.worker import main; main()",
)

_CHUNK = 1 << 16
_TICK = 1.0  # seconds: how long a signal that was missed, or an ended process, may go unseen
_TOLD = 4000  # bytes of what was printed last, which may say why a process ended


@dataclass(frozen=True)
class Limits:
    """Limits of a job, and what its process is given.

    Attributes:
        seconds: what one step may take, beside what it means to take.
        environment: variables of the process, beside those of this one.
        keep_open: files that the process has open for as long as it lives.
    """

    seconds: float
    environment: Mapping[str, str]
    keep_open: Sequence[int] = ()


def supervised(
    job: Job,
    step: Callable[[str], None],
    printed: Callable[[bytes], None],
    interrupts: Interrupts,
    limits: Limits,
    command: Sequence[str] = WORKER,
) -> Ending:
    """Does a job in a process of its own, of which nothing is left afterwards.

    Args:
        job: what to do.
        step: called with a line when a step begins.
        printed: called with whatever the process prints.
        interrupts: noted signals.
        limits: how long it may take, and what the process is given.
        command: what does the job: a command that takes the number of a socket as its last
            argument, see `job`.

    Raises:
        RewriteError: the process crashed, or took too long.
        Interrupted: a signal has come.
    """
    ours, theirs = socket.socketpair()
    with ours:
        try:
            with theirs, _as_file(job.to_json()) as text:
                process = _started([*command, str(theirs.fileno())], text, theirs, limits)
        except OSError as error:
            raise RewriteError(f"no process can be started: {cause_of(error)}") from error
        child = _Child(process, ours)
        try:
            return _watched(child, job, step, printed, interrupts, limits.seconds)
        finally:
            child.end()


def _started(
    command: Sequence[str], text: IO[bytes], channel: socket.socket, limits: Limits
) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command,
        stdin=text,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, **limits.environment},
        pass_fds=(channel.fileno(), *limits.keep_open),
        start_new_session=True,  # what the terminal sends reaches the tool alone
    )


class _Child:
    """A process in a session of its own, and what comes from it.

    Attributes:
        process: the process.
        open: the files to read that have not ended.
    """

    def __init__(self, process: subprocess.Popen[bytes], channel: socket.socket) -> None:
        assert process.stdout is not None
        self.process = process
        self._channel, self._output = channel.fileno(), process.stdout.fileno()
        self.open = {self._channel, self._output}
        for file in self.open:
            os.set_blocking(file, False)
        self._unread = b""

    def messages(self) -> Iterator[Step | Ending]:
        """The messages that have come, as far as they are whole."""
        self._unread += _read(self._channel, self.open)
        *lines, self._unread = self._unread.split(b"\n")
        yield from map(read_message, lines)

    def printed(self) -> bytes:
        """Bytes that it has printed since the last call."""
        return _read(self._output, self.open)

    def end(self) -> None:
        """Ends it, and all processes that it has started."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


def _read(file: int, still_open: set[int]) -> bytes:
    """Bytes that can be read without waiting; drops a file that has ended from those still open."""
    data = b""
    try:
        while file in still_open:
            chunk = os.read(file, _CHUNK)
            data += chunk
            if not chunk:
                still_open.remove(file)
    except BlockingIOError:
        pass
    except ConnectionResetError:
        still_open.remove(file)
    return data


@contextmanager
def _as_file(text: str) -> Iterator[IO[bytes]]:
    """A file with this text, to read: however long it is, nobody waits for who writes it."""
    with tempfile.TemporaryFile() as file:
        file.write(text.encode())
        file.seek(0)
        yield file


def _watched(
    child: _Child,
    job: Job,
    step: Callable[[str], None],
    printed: Callable[[bytes], None],
    interrupts: Interrupts,
    seconds: float,
) -> Ending:
    doing, last = f"opening {job.source}", b""
    limit = seconds
    deadline = time.monotonic() + limit
    while True:
        _wait([interrupts, *child.open], min(_TICK, max(0.0, deadline - time.monotonic())))
        interrupts.awake()
        interrupts.check()
        code = child.process.poll()  # before reading: what it said last is read still
        if noise := child.printed():
            printed(noise)
            last = (last + noise)[-_TOLD:]
        try:
            for message in child.messages():
                if isinstance(message, Ending):
                    return _explained(message, doing, job)
                step(message.line)
                doing, limit = message.line, seconds + message.planned
                deadline = time.monotonic() + limit
        except ValueError:
            code = 0  # it is no worker any more
        if code is not None:
            advice = _NEEDS_MEMORY if code == -signal.SIGKILL else _MAY_BE_REPORTED
            raise RewriteError(f"{_how(code, last)} while {doing}{job.outcome}{advice}")
        if time.monotonic() > deadline:
            raise RewriteError(
                f"{doing} took more than {limit:g} seconds{job.outcome}. If it needs "
                "more, pass --timeout=SECONDS; it may also go on for ever"
            )


def _wait(files: Sequence[Interrupts | int], seconds: float) -> None:
    """Waits until one of these can be read, but not for longer."""
    with selectors.DefaultSelector() as selector:
        for file in files:
            selector.register(file, selectors.EVENT_READ)
        selector.select(seconds)


def _explained(ending: Ending, doing: str, job: Job) -> Ending:
    """An ending, with the step in which it came where that says more than the rest."""
    if ending.how == NO_MEMORY:
        message = f"there was not enough memory while {doing}{job.outcome}{_NEEDS_MEMORY}"
    elif ending.how == UNEXPECTED:
        message = (
            f"an unexpected error while {doing}: {ending.message}{job.outcome}. Please "
            "report this line, with the model if you can"
        )
    else:
        return ending
    return Ending(ending.how, message)


_MAY_BE_REPORTED = (
    ". The file may be damaged, or ask for more memory than there is; otherwise please report this "
    "line, with the model if you can"
)
_NEEDS_MEMORY = (
    ". Try again on a machine with more, or give smaller examples (--inputs) if the model "
    "takes them"
)

# What ends processes most often.
_SIGNALS: Mapping[int, str] = {
    signal.SIGKILL: "the system ended the work, most likely for lack of memory,",
    signal.SIGSEGV: "TensorFlow crashed (segmentation fault)",
    signal.SIGBUS: "TensorFlow crashed (bus error)",
    signal.SIGABRT: "TensorFlow gave up",
    signal.SIGILL: "TensorFlow needs instructions that this processor lacks: it crashed",
    signal.SIGFPE: "TensorFlow crashed (division by zero)",
}


def _how(code: int, last: bytes) -> str:
    """End of a process in words, from its exit code and what it printed last."""
    if code >= 0:
        return f"the work ended without a result (exit code {code})"
    how = _SIGNALS.get(-code, f"signal {-code} ended the work")
    # What TensorFlow checks, and the C++ library, say why they give up.
    found = re.findall(rb"(?:F .*\] |what\(\): *)(.+)", last)
    return f"{how} ({found[-1].decode(errors='replace').strip()[:200]})" if found else how

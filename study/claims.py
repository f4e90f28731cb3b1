"""Claims of runs, by which several processes add to one directory of results.

    DIRECTORY/.lock                     held by the process that chooses a run, or ends one
    DIRECTORY/.members                  held in common by all that add to the directory
    DIRECTORY/runs/VARIANT-SEED.claim   held by the process that trains the run; names its device

The locks are those of flock, which go with the process: what a killed one has claimed is free.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

# A variant, and a seed.
Run = tuple[str, int]
RUNS = "runs"  # the directory of their files
_LOCK, _MEMBERS, _CLAIM = ".lock", ".members", ".claim"
_ROOM = 1 << 20  # bytes held for a result
_NAME = 1 << 12  # of them at the beginning, for the device


class Claims:
    """Claims in one directory, which are made, looked at and ended under `lock`.

    Args:
        directory: of results.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Has other processes wait that want it."""
        with locked(self._directory / _LOCK):
            yield

    @contextmanager
    def joined(self, begin: Callable[[bool], None]) -> Iterator[None]:
        """Makes this process one that adds to the directory.

        Args:
            begin: called under `lock` with whether this is the only one.
        """
        with (self._directory / _MEMBERS).open("a+b") as members:
            with self.lock():
                is_alone = _flock(members, fcntl.LOCK_EX | fcntl.LOCK_NB)
                fcntl.flock(members, fcntl.LOCK_SH)
                begin(is_alone)
            yield

    def held(self) -> dict[Run, str]:
        """The device of each run that is being trained."""
        devices = {}
        for path in self._runs.glob(f"*{_CLAIM}"):
            variant, _, seed = path.stem.rpartition("-")
            with path.open("r+b") as file:
                if _flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB):
                    path.unlink()  # its process was killed
                else:
                    devices[variant, int(seed)] = file.readline(_NAME).decode().strip()
        return devices

    def take(self, run: Run, device: str) -> IO[bytes]:
        """Claims a run that nobody holds, with disk space for its result.

        Raises:
            OSError: there is no space.
        """
        path = self._path(run)
        file = path.open("wb")
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write(f"{device}\n".encode().ljust(_ROOM, b"\0"))
            file.flush()
            os.fsync(file.fileno())
        except BaseException:
            path.unlink()
            file.close()
            raise
        return file

    def give_room(self, run: Run) -> None:
        """Frees the disk space that was held for the result of a run, which stays claimed."""
        with suppress(FileNotFoundError):
            os.truncate(self._path(run), _NAME)

    def end(self, run: Run, file: IO[bytes]) -> None:
        """Gives up a claim."""
        self._path(run).unlink(missing_ok=True)
        file.close()

    @property
    def _runs(self) -> Path:
        return self._directory / RUNS

    def _path(self, run: Run) -> Path:
        return self._runs / f"{stem(run)}{_CLAIM}"


def stem(run: Run) -> str:
    """Name of a run's files, without what says of which kind they are."""
    variant, seed = run
    return f"{variant}-{seed:03d}"


@contextmanager
def locked(path: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Holds a file that processes take in turn; calls `waiting` where another one has it."""
    with path.open("ab") as file:
        if not _flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB):
            waiting()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _flock(file: IO[bytes], kind: int) -> bool:
    """Whether a lock could be had without waiting."""
    try:
        fcntl.flock(file, kind)
    except BlockingIOError:
        return False
    return True

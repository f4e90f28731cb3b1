"""Finished runs on disk.

    DIRECTORY/study.json            the configuration that all runs have in common
    DIRECTORY/runs/VARIANT-SEED.json    one finished run

A run is written beside its file and renamed, so that a file is whole or not there. Several
processes may add to one directory: each claims the run that it trains, by a lock on a file beside
the run's. Room for the result is held in that file: a full disk is noticed before the work and not
after it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from benchmarks.common.results import write_whole
from study import program
from study.errors import StudyError

FORMAT = 1  # of these files; another number is another version
_ROOM = 1 << 20  # bytes held for a run
_STUDY, _RUNS, _LOCK, _CLAIM = "study.json", "runs", ".lock", ".claim"


class Results:
    """The finished runs of one configuration.

    Args:
        directory: where they are.
        configuration: what all of them have in common, nested as may be.
    """

    def __init__(self, directory: Path, configuration: Mapping[str, Any]) -> None:
        self.directory = directory
        self.configuration = json.loads(json.dumps(configuration))  # as it reads when it is read
        self.digest = _digest(self.configuration)

    @classmethod
    def open(cls, directory: Path) -> Results:
        """Opens the results that are there.

        Raises:
            StudyError: there are none, or they were written by another version.
        """
        path = directory / _STUDY
        if not path.exists():
            raise StudyError(f"there are no results in {directory}: it has no {_STUDY}")
        found = _read(path)
        if found.get("format") != FORMAT:
            raise StudyError(
                f"{path} was written by another version of this program: its format is "
                f"{found.get('format')}, and this one reads {FORMAT}"
            )
        return cls(directory, found["configuration"])

    def begin(self) -> None:
        """Makes the directory, or sees that what is there is of the same configuration.

        Raises:
            StudyError: it is not.
        """
        runs = self.directory / _RUNS
        # Where no run is finished or training, there is nothing another configuration could spoil.
        if any(runs.glob("*.json")) or any(map(_is_held, runs.glob(f"*{_CLAIM}"))):
            self._go_on_with(Results.open(self.directory))
        runs.mkdir(parents=True, exist_ok=True)
        content = {"format": FORMAT, "configuration": self.configuration}
        _write(self.directory / _STUDY, content)

    def _go_on_with(self, found: Results) -> None:
        """Takes the configuration of finished runs, which name it, if it is the same to training.

        Raises:
            StudyError: it is not.
        """
        before = program.renewed(found.configuration)
        before.pop("device", None)  # of all runs, before runs named their own
        lines = list(differences(before, self.configuration))
        if lines:
            raise StudyError(
                f"{self.directory} has results of another configuration:\n"
                + "\n".join(f"  {line}" for line in lines)
                + "\nName another directory with --results, or give the flags that those runs had"
            )
        self.configuration, self.digest = found.configuration, found.digest

    @contextmanager
    def claimed(self, variant: str, seed: int, wait: bool = False) -> Iterator[bool]:
        """Claims a run for this process, and holds disk space for it while it trains.

        Args:
            variant: whose run it is.
            seed: which.
            wait: for another process that trains it, until it is finished or given up.

        Yields:
            Whether the run is this process's: not if it is finished, or another one's.
        """
        path = self._claim(variant, seed)
        with path.open("ab") as file:
            if not _locked(file, wait):
                yield False
                return
            try:
                missing = not self.path(variant, seed).exists()
                if missing:
                    file.write(bytes(_ROOM))
                    file.flush()
                    os.fsync(file.fileno())
                yield missing
            finally:
                path.unlink(missing_ok=True)

    def path(self, variant: str, seed: int) -> Path:
        """The file of a run."""
        return self.directory / _RUNS / f"{variant}-{seed:03d}.json"

    def _claim(self, variant: str, seed: int) -> Path:
        return self.path(variant, seed).with_suffix(_CLAIM)

    def save(self, variant: str, seed: int, record: Mapping[str, Any]) -> None:
        """Keeps a finished run.

        Raises:
            StudyError: it cannot be written there, and is kept elsewhere.
        """
        content = {"format": FORMAT, "digest": self.digest, "variant": variant, "seed": seed}
        with suppress(FileNotFoundError):
            os.truncate(self._claim(variant, seed), 0)
        path = self.path(variant, seed)
        try:
            _write(path, content | {"record": record})
        except OSError as error:
            aside = _write_elsewhere(path.name, content | {"record": record})
            raise StudyError(
                f"{path} cannot be written: {error.strerror or error}. The run is kept as {aside}; "
                "move it there before the study goes on"
            ) from error

    def finished(self) -> dict[tuple[str, int], dict[str, Any]]:
        """The records of all finished runs, by variant and seed, with the device of each.

        Raises:
            StudyError: a file cannot be read, or is of another configuration.
        """
        runs = {}
        for path in sorted((self.directory / _RUNS).glob("*.json")):
            found = _read(path)
            if found.get("format") != FORMAT or found.get("digest") != self.digest:
                raise StudyError(
                    f"{path} is no run of the configuration in {self.directory / _STUDY}: its "
                    f"digest is {found.get('digest')}, not {self.digest}. Take it away to go on"
                )
            key = found["variant"], found["seed"]
            if path != self.path(*key):
                raise StudyError(f"{path} is a copy of the run {key[0]}, seed {key[1]}. Delete it")
            runs[key] = {"device": self.configuration.get("device"), **found["record"]}
        return runs


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Keeps other processes waiting that begin a study in a directory, which it makes."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / _LOCK).open("ab") as file:
        _locked(file, wait=True)
        yield


def _locked(file: IO[bytes], wait: bool) -> bool:
    """Whether a file could be locked; closing it, or the end of the process, unlocks it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_held(claim: Path) -> bool:
    """Whether a process trains the run: the lock of one that was killed is gone."""
    with claim.open("ab") as file:
        return not _locked(file, wait=False)


def differences(before: Any, now: Any, name: str = "") -> Iterator[str]:
    """Differences of two configurations, a line each."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in dict.fromkeys([*before, *now]):
            inner = f"{name}.{key}" if name else key
            yield from differences(before.get(key), now.get(key), inner)
    elif before != now:
        yield f"{name}: there {json.dumps(before)}, here {json.dumps(now)}"


def _digest(configuration: Mapping[str, Any]) -> str:
    text = json.dumps(configuration, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise StudyError(f"{path} cannot be read ({error}). Delete it to run it again") from error
    return dict(found)


def _write_elsewhere(name: str, content: Mapping[str, Any]) -> Path:
    """Writes a file in a temporary directory of its own, which goes again where that fails."""
    directory = Path(tempfile.mkdtemp(prefix="study-"))
    try:
        _write(directory / name, content)
    except OSError:
        directory.rmdir()
        raise
    return directory / name


def _write(path: Path, content: Mapping[str, Any]) -> None:
    write_whole(path, json.dumps(content, indent=1) + "\n")

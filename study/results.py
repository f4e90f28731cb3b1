"""Finished runs on disk.

    DIRECTORY/study.json            the configuration that all runs have in common
    DIRECTORY/runs/VARIANT-SEED.json    one finished run

A run is written beside its file and renamed, so that a file is whole or not there. Several
processes may add to one directory: each claims the run that it trains. Room for the result is held
with the claim: a full disk is noticed before the work and not after it.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.common.results import write_whole
from study import program
from study.claims import RUNS, Claims, Run, stem
from study.errors import StudyError
from study.standing import Standing

FORMAT = 1  # of these files; another number is another version
_STUDY = "study.json"
_LEFT_OVER = (f"{_STUDY}.part", f"{RUNS}/*.json.part")
# Records by variant and seed.
Finished = dict[Run, dict[str, Any]]


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
        self._claims = Claims(directory)

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

    @contextmanager
    def joined(self) -> Iterator[None]:
        """Begins the study, or goes on with it, be it beside other processes.

        Raises:
            StudyError: what is there is of another configuration.
        """
        (self.directory / RUNS).mkdir(parents=True, exist_ok=True)
        with self._claims.joined(self._begin):
            yield

    def _begin(self, is_alone: bool) -> None:
        # Otherwise there is nothing that another configuration could spoil.
        if any(self.directory.glob(f"{RUNS}/*.json")) or not is_alone:
            self._go_on_with(Results.open(self.directory))
        if is_alone:
            for path in (path for left in _LEFT_OVER for path in self.directory.glob(left)):
                path.unlink()
        _write(self.directory / _STUDY, {"format": FORMAT, "configuration": self.configuration})

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
    def claimed(
        self, standing: Callable[[Finished, Mapping[Run, str]], Standing]
    ) -> Iterator[Standing]:
        """Claims the next run for this process, and holds disk space for it while it trains.

        Args:
            standing: that of the study, by the finished runs and those that processes train, with
                their devices.

        Yields:
            The standing, whose next run is this process's.
        """
        with self._claims.lock():
            now = standing(self.finished(), self._claims.held())
            claim = now.next and self._claims.take(now.next, now.device)
        try:
            yield now
        finally:
            if now.next and claim:
                with self._claims.lock():
                    self._claims.end(now.next, claim)

    def training(self) -> dict[Run, str]:
        """The device of each run that a process trains just now."""
        with self._claims.lock():
            return self._claims.held()

    def path(self, variant: str, seed: int) -> Path:
        """The file of a run."""
        return self.directory / RUNS / f"{stem((variant, seed))}.json"

    def save(self, variant: str, seed: int, record: Mapping[str, Any]) -> None:
        """Keeps a finished run.

        Raises:
            StudyError: it cannot be written there, and is kept elsewhere.
        """
        content = {"format": FORMAT, "digest": self.digest, "variant": variant, "seed": seed}
        self._claims.give_room((variant, seed))
        path = self.path(variant, seed)
        try:
            _write(path, content | {"record": record})
        except OSError as error:
            aside = _write_elsewhere(path.name, content | {"record": record})
            raise StudyError(
                f"{path} cannot be written: {error.strerror or error}. The run is kept as {aside}; "
                "move it there before the study goes on"
            ) from error

    def finished(self) -> Finished:
        """The records of all finished runs, by variant and seed, with the device of each.

        Raises:
            StudyError: a file cannot be read, or is of another configuration.
        """
        runs = {}
        for path in sorted((self.directory / RUNS).glob("*.json")):
            found = _read(path)
            if found.get("format") != FORMAT or found.get("digest") != self.digest:
                raise StudyError(
                    f"{path} is no run of the configuration in {self.directory / _STUDY}: its "
                    f"digest is {found.get('digest')}, not {self.digest}. Take it away to go on"
                )
            key = found["variant"], found["seed"]
            if path != self.path(*key):
                raise StudyError(f"{path} is a copy of the run {key[0]}, seed {key[1]}. Delete it")
            record = {"device": self.configuration.get("device"), **found["record"]}
            # As one core was written formerly.
            record["device"] = str(record["device"]).replace(", 1 cores", ", 1 core")
            runs[key] = record
        return runs


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

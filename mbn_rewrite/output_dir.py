"""Folders to work in, and the last step, by which output appears whole or not at all.

A run works in folders of its own: one beside the output, so that the output can be renamed into
its place, and others among the temporary files of the system. In each lies a file that says whose
it is, locked for as long as the folder is used. A run that is killed leaves its folders behind,
and the next one finds them: what is marked and no longer locked is removed.
"""

from __future__ import annotations

import json
import os
import platform
import re
import secrets
import shutil
import tempfile
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mbn_rewrite import file_formats
from mbn_rewrite.atomic_rename import EXCHANGE, KEEP, renamed
from mbn_rewrite.errors import RewriteError, cause_of

try:
    import fcntl
except ImportError:  # a system without such locks: nothing is taken for left behind there
    fcntl = None  # type: ignore[assignment]

# The names of our folders, and of the file that makes them ours.
_NAME = re.compile(r"(\..+\.)?mbn_rewrite\.[0-9a-f]{16}")
_MARK = ".mbn_rewrite"
_NEW, _OLD = "new", "old"

# Where file systems are shared, locks may be seen by one machine only. No run takes this long.
_FOREIGN_IS_LEFT = 24 * 3600  # seconds


class OwnFolder:
    """A new folder of this process. It is gone when this object is, or after `remove`.

    Attributes:
        path: the folder.
    """

    def __init__(self, directory: Path, destination: Path | None = None) -> None:
        """Makes it.

        Args:
            directory: where.
            destination: what the output in it is for, which `clean_up` puts back where a run was
                killed after it had moved that aside.

        Raises:
            OSError: it cannot be made.
        """
        # Names of files are of at most 255 bytes, and that of the destination may be as long.
        stem = f".{destination.name[:40]}." if destination else ""
        self.path, self._lock = _made(directory, f"{stem}mbn_rewrite.")
        self._remove = weakref.finalize(self, _give_up, self.path, self._lock)
        mark = {"folder_of": "mbn_rewrite", "machine": platform.node()}
        if destination:
            mark["destination"] = destination.name
        try:
            os.write(self._lock, json.dumps(mark).encode())
        except OSError:
            self.remove()
            raise

    @property
    def new(self) -> Path:
        """Path that output is written to."""
        return self.path / _NEW

    def fileno(self) -> int:
        """The file that locks it: a process that has it too uses the folder too."""
        return self._lock

    def remove(self) -> None:
        """Removes the folder, with all that is in it."""
        self._remove()


def _made(directory: Path, stem: str) -> tuple[Path, int]:
    """A new folder, and the file in it, which is locked."""
    while True:
        path = directory / f"{stem}{secrets.token_hex(8)}"
        path.mkdir(0o700)
        try:
            lock = os.open(path / _MARK, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        except FileNotFoundError:
            continue  # another run took it for left behind before it was marked
        # Another run may do so before it is locked, too: then it has the lock, or had it.
        if _locked(lock) is not False and os.fstat(lock).st_nlink:
            return path, lock
        os.close(lock)


def _locked(lock: int) -> bool | None:
    """Locks a file; False if somebody else has locked it, None if there are no locks here."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _give_up(path: Path, lock: int) -> None:
    _remove(path)
    os.close(lock)


def _remove(path: Path) -> None:
    """Removes a folder of ours. What marks it goes last: whoever is killed here leaves it ours."""
    with suppress(OSError):
        for part in path.iterdir():
            if part.name != _MARK:
                _remove_any(part)
        if {part.name for part in path.iterdir()} <= {_MARK}:
            (path / _MARK).unlink(missing_ok=True)
            path.rmdir()


def _remove_any(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def temporary_folder() -> Iterator[OwnFolder]:
    """A folder among the temporary files of the system, for as long as this lasts.

    Raises:
        RewriteError: it cannot be made.
    """
    try:
        folder = OwnFolder(Path(tempfile.gettempdir()))
    except OSError as error:
        raise RewriteError(
            f"there is no place for temporary files: {cause_of(error)} Say where there is one "
            "with the environment variable TMPDIR"
        ) from error
    try:
        yield folder
    finally:
        folder.remove()


# ------------------------------------------------------------------- what killed runs left


def clean_up(*directories: Path) -> list[Path]:
    """Removes what killed runs left in directories, and puts back what they had moved aside.

    A folder that is in use, or not provably ours, is left alone.

    Returns:
        The outputs that were put back.
    """
    restored = []
    for directory in dict.fromkeys([*directories, _temporary()]):
        if directory is None:
            continue
        with suppress(OSError):  # what cannot be seen cannot be ours
            names = [name for name in os.listdir(directory) if _NAME.fullmatch(name)]
            restored += [found for name in names if (found := _cleaned(directory / name))]
    return restored


def _temporary() -> Path | None:
    try:
        return Path(tempfile.gettempdir())
    except OSError:
        return None


def _cleaned(path: Path) -> Path | None:
    """Removes a folder if it was left behind; the output that was put back, if there was one."""
    with suppress(OSError):
        if path.is_symlink() or path.stat().st_uid != os.geteuid():
            return None
        try:
            lock = os.open(path / _MARK, os.O_RDWR | os.O_NOFOLLOW)
        except FileNotFoundError:
            path.rmdir()  # killed before it was marked; what holds anything is not ours
            return None
        try:
            if _locked(lock):
                return _cleaned_locked(path, lock)
        finally:
            os.close(lock)
    return None


def _cleaned_locked(path: Path, lock: int) -> Path | None:
    text = os.read(lock, 4096)
    if not text and os.listdir(path) == [_MARK]:  # killed before it was written
        _remove(path)
        return None
    try:
        mark = json.loads(text)
    except ValueError:
        return None
    if not isinstance(mark, dict) or mark.get("folder_of") != "mbn_rewrite":
        return None
    is_old = time.time() - os.fstat(lock).st_mtime > _FOREIGN_IS_LEFT
    if mark.get("machine") != platform.node() and not is_old:
        return None
    restored = _put_back(path, mark.get("destination"))
    _remove(path)
    return restored


def _put_back(path: Path, name: Any) -> Path | None:
    """Renames an output that was moved aside, unless there is another; returns where it is now."""
    if not isinstance(name, str) or Path(name).name != name or not (path / _OLD).is_dir():
        return None
    destination = path.parent / name
    if os.path.lexists(destination):
        return None
    (path / _OLD).rename(destination)
    return destination


# ---------------------------------------------------------------------------- the output


# What a SavedModel consists of; anything else in its directory is somebody's.
_PARTS = {
    "saved_model.pb", "keras_metadata.pb", "fingerprint.pb", "variables", "assets", "assets.extra",
}  # fmt: skip


def check_destination(source: Path, destination: Path, overwrite: bool) -> None:
    """Raises RewriteError where a destination cannot be written, or must not be."""
    try:
        _check_replaced(destination, overwrite)
        _check_apart(source, destination)
    except (OSError, RuntimeError) as error:  # names too long, links in a circle
        raise RewriteError(f"{destination} cannot be written: {cause_of(error)}") from error
    file_formats.check_output_name(source, destination)


def _check_replaced(destination: Path, overwrite: bool) -> None:
    if not destination.exists() and not destination.is_symlink():
        return
    if not overwrite:
        raise RewriteError(
            f"{destination} exists. Give another path, or pass --overwrite "
            "(overwrite=True in Python) to replace it"
        )
    if not destination.is_dir() or not (destination / "saved_model.pb").exists():
        raise RewriteError(
            f"{destination} is no SavedModel, so it is not replaced. Give another path"
        )
    others = sorted(path.name for path in destination.iterdir() if path.name not in _PARTS)
    if others:
        raise RewriteError(
            f"{destination} holds more than a SavedModel ({', '.join(others[:3])}), so it is "
            "not replaced. Give another path"
        )


def _check_apart(source: Path, destination: Path) -> None:
    inside = destination.resolve()
    if source.resolve() in (inside, *inside.parents):
        raise RewriteError(f"the output {destination} would lie in the input {source}")
    if source.exists() and inside in source.resolve().parents:
        raise RewriteError(f"the output {destination} would replace the input {source}")
    parent = inside.parent
    if not parent.is_dir():
        raise RewriteError(f"there is no directory {parent} to write {destination.name} in")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise RewriteError(f"{parent} is not writable")


@contextmanager
def working_folder(destination: Path) -> Iterator[OwnFolder]:
    """A folder beside an output to write it in, for as long as this lasts; see `put_in_place`.

    Raises:
        RewriteError: it cannot be made, or written to.
    """
    destination = destination.resolve()
    try:
        folder = OwnFolder(destination.parent, destination)
    except OSError as error:
        raise RewriteError(f"{destination.parent} is not writable ({error.strerror})") from error
    try:
        yield folder
    except OSError as error:
        raise _unwritable(destination, error) from error
    finally:
        folder.remove()


def put_in_place(folder: OwnFolder, destination: Path, overwrite: bool) -> None:
    """Makes what is `new` in a working folder the output, in one step where the system can.

    Raises:
        RewriteError: that cannot be done, or must not be.
    """
    destination = destination.resolve()
    try:
        _check_replaced(destination, overwrite)  # it may have come meanwhile
        _give_default_permissions(folder.new)
        if not overwrite:
            if not renamed(folder.new, destination, KEEP):
                folder.new.rename(destination)
        elif not destination.exists():
            folder.new.rename(destination)
        elif not renamed(folder.new, destination, EXCHANGE):
            _exchange_in_two_steps(folder, destination)
    except OSError as error:
        raise _unwritable(destination, error) from error


def _unwritable(destination: Path, error: OSError) -> RewriteError:
    return RewriteError(f"{destination} cannot be written: {error.strerror or error}")


def _give_default_permissions(directory: Path) -> None:
    """Makes public what was made in a private folder; inside it, the usual mask was used."""
    mask = os.umask(0)
    os.umask(mask)
    directory.chmod(0o777 & ~mask)


def _exchange_in_two_steps(folder: OwnFolder, destination: Path) -> None:
    """Exchanges two folders where the system cannot do it in one step.

    After a run that was killed between the two, `clean_up` brings back the old one.
    """
    kept = folder.path / _OLD
    destination.rename(kept)
    try:
        folder.new.rename(destination)
    finally:
        if not destination.exists():
            kept.rename(destination)

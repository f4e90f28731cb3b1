"""Images from a folder with a folder for each class.

Training images are in `train` and test images in `test`, `val` or `validation`; where there are
class folders only, every sixth image of a class, by name, is for testing. Files that cannot be
decoded are named, left out and counted. With fewer examples than there are, every class gives the
same number, the first by name that can be decoded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from study.errors import StudyError
from study.images import Data, Part, decoded
from study.recipes import Recipe

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif")
TRAIN_FOLDERS, TEST_FOLDERS = ("train",), ("test", "val", "validation")
TESTED = 6  # one image in so many is for testing, where no folder says which
_MOST_NAMED = 20  # classes in a message


def from_folder(
    recipe: Recipe,
    folder: Path,
    examples: int | None,
    test_examples: int | None,
    known: Path | None,
) -> Data:
    """The images of a folder; see `data.load`."""
    listed = _listed(folder)
    classes = tuple(sorted(listed[0]))
    reader = _Reader(recipe, folder, *_known(known, listed))
    parts = [
        reader.part(files, classes, count, flag)
        for files, count, flag in zip(
            listed, (examples, test_examples), ("examples", "test_examples"), strict=True
        )
    ]
    corrupt = tuple(sorted(reader.corrupt))
    if known is not None and not recipe.decoded:
        found = {"listing": _listing(listed), "corrupt": corrupt, "fine": sorted(reader.fine)}
        known.write_text(json.dumps(found) + "\n")
    digest = hashlib.sha256("\n".join(reader.used).encode()).hexdigest()[:16]
    train, test = (sum(map(len, files.values())) for files in listed)
    return Data(*parts, classes, f"folder {folder.name}", corrupt, (train, test), digest)


def _listed(folder: Path) -> tuple[dict[str, list[Path]], dict[str, list[Path]]]:
    """The files of each class, for training and for testing."""
    if not folder.is_dir():
        raise StudyError(f"there is no folder {folder}. --data_dir names one with images")
    train, test = (_first(folder, names) for names in (TRAIN_FOLDERS, TEST_FOLDERS))
    if bool(train) != bool(test):
        raise StudyError(
            f"{folder} has no {'test' if train else 'train'} folder. Expected are train and "
            f"{' or '.join(TEST_FOLDERS)}, each with a folder for each class; or class folders"
        )
    if train and test:
        listed = _by_class(train), _by_class(test)
    else:
        every = _by_class(folder)
        listed = (
            {
                name: [f for i, f in enumerate(files) if (i + 1) % TESTED]
                for name, files in every.items()
            },
            {name: files[TESTED - 1 :: TESTED] for name, files in every.items()},
        )
    if not listed[0]:
        raise StudyError(
            f"{folder} has no images. Expected are folders train and test with a folder for each "
            f"class, and in those files that end in {', '.join(SUFFIXES)}"
        )
    if listed[0].keys() != listed[1].keys():
        differing = sorted(listed[0].keys() ^ listed[1].keys())
        named = ", ".join(differing[:_MOST_NAMED]) + (" ..." if differing[_MOST_NAMED:] else "")
        raise StudyError(f"{folder}: the classes for training and testing differ: {named}")
    if len(listed[0]) < 2:
        raise StudyError(f"{folder} has the class {next(iter(listed[0]))} alone; two are needed")
    return listed


def _first(folder: Path, names: Sequence[str]) -> Path | None:
    """The first that is there and has classes: ImageNet's test images have none."""
    there = [folder / name for name in names if (folder / name).is_dir()]
    return next((each for each in there if _by_class(each)), there[0] if there else None)


def _by_class(folder: Path) -> dict[str, list[Path]]:
    found = {
        each.name: sorted(f for f in each.iterdir() if f.suffix.lower() in SUFFIXES)
        for each in sorted(folder.iterdir())
        if each.is_dir()
    }
    return {name: files for name, files in found.items() if files}


class _Reader:
    """Reads images, and notes which are used and which are corrupt."""

    def __init__(self, recipe: Recipe, folder: Path, corrupt: set[str], fine: set[str]) -> None:
        self.corrupt = corrupt
        self.fine = fine
        self.used: list[str] = []
        self._recipe = recipe
        self._folder = folder

    def part(
        self, files: dict[str, list[Path]], classes: Sequence[str], count: int | None, flag: str
    ) -> Part:
        """Images or files, the same number of each class, or all."""
        wanted = None if count is None else self._of_each(count, classes, flag)
        images: list[Any] = []
        labels: list[int] = []
        with _threads() as pool:
            for label, name in enumerate(classes):
                usable = self._usable(files[name], wanted, pool)
                if not usable:
                    raise StudyError(
                        f"{self._folder}: of class {name} there are {len(files[name])} images for "
                        f"--{flag}, and none that can be decoded. Every class needs some; where "
                        f"there are class folders only, every {TESTED}th image is for testing"
                    )
                if wanted is not None and len(usable) < wanted:
                    raise StudyError(
                        f"--{flag}={count} asks for {wanted} images of each class; of {name} there "
                        f"are {len(usable)} that can be decoded"
                    )
                images += usable
                labels += [label] * len(usable)
        stacked = np.stack(images) if self._recipe.decoded else np.array(images)
        return Part.of_arrays(stacked, np.array(labels))

    @staticmethod
    def _of_each(count: int, classes: Sequence[str], flag: str) -> int:
        if count % len(classes):
            raise StudyError(
                f"--{flag}={count} is not the same number of each of {len(classes)} classes; a "
                f"multiple of {len(classes)} is"
            )
        return count // len(classes)

    def _usable(
        self, files: Sequence[Path], wanted: int | None, pool: ThreadPoolExecutor
    ) -> list[Any]:
        usable: list[Any] = []
        start = 0
        wanted = len(files) if wanted is None else wanted
        while len(usable) < wanted and start < len(files):
            some = files[start : start + wanted - len(usable)]
            start += len(some)
            for file, image in zip(some, pool.map(self._read, some), strict=True):
                name = str(file.relative_to(self._folder))
                if image is None:
                    self.corrupt.add(name)
                else:
                    self.fine.add(name)
                    usable.append(image)
                    self.used.append(f"{name} {file.stat().st_size}")
        return usable

    def _read(self, file: Path) -> Any:
        """The decoded image, or the file's name; None where it is corrupt."""
        name = str(file.relative_to(self._folder))
        if name in self.corrupt:
            return None
        if name in self.fine and not self._recipe.decoded:
            return str(file)
        try:
            image = decoded(tf.io.read_file(str(file)))
        except tf.errors.OpError:
            return None
        if not self._recipe.decoded:
            return str(file)
        size = self._recipe.size
        if image.shape != (size, size, 3):
            image = tf.cast(tf.round(tf.image.resize(image, (size, size))), tf.uint8)
        return image.numpy()


@contextmanager
def _threads() -> Iterator[ThreadPoolExecutor]:
    """Context manager of threads that, when it is left by an interrupt, begin nothing more."""
    pool = ThreadPoolExecutor()
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _listing(listed: Iterable[dict[str, list[Path]]]) -> str:
    """Changes with names, sizes and times of files."""
    text = hashlib.sha256()
    for files in listed:
        for file in (file for name in sorted(files) for file in files[name]):
            state = file.stat()
            text.update(f"{file} {state.st_size} {state.st_mtime_ns}\n".encode())
    return text.hexdigest()


def _known(
    known: Path | None, listed: Iterable[dict[str, list[Path]]]
) -> tuple[set[str], set[str]]:
    """The corrupt and the fine ones of the same files, as far as they were looked at before."""
    try:
        found = json.loads(known.read_text()) if known is not None and known.exists() else {}
    except ValueError:
        found = {}
    if found.get("listing") != _listing(listed):
        return set(), set()
    return set(found["corrupt"]), set(found["fine"])

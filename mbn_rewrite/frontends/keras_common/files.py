"""Model files of either Keras: checking them, and loading their models.

TensorFlow is not imported before a model is actually loaded, so that an error in a path is
reported at once.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mbn_rewrite import file_formats
from mbn_rewrite.errors import RewriteError, cause_of
from mbn_rewrite.frontends import limits
from mbn_rewrite.frontends.keras_common import resolved_names, toolkit_wrappers, trust, wiring


def check(source: Path, trusted: bool) -> None:
    """Checks, without TensorFlow, that a path may hold a model of either Keras.

    Raises:
        RewriteError: it is missing, unreadable, damaged, larger than any model or something
            else, or loading it would do more than create a model, and it is not trusted.
    """
    if not source.exists():
        raise RewriteError(file_formats.not_there(source))
    if not source.is_file():
        raise RewriteError(f"{source} is neither a file nor a directory")
    if not os.access(source, os.R_OK):
        raise RewriteError(f"{source} cannot be read: no permission")
    config, _ = _config_of(source)
    toolkit_wrappers.check(source, config)
    if not trusted:
        trust.check(source, [config])
    if lost := wiring.never_called(config):
        raise RewriteError(
            f"{source} is damaged: what layer '{lost[0]}' is called with is missing, or depends on "
            "the layer itself"
        )


def package_of(source: Path) -> str:
    """Package that wrote a file, "tf_keras" or "keras" (3); to be called after `check`."""
    _, version = _config_of(source)
    return "keras" if version.startswith("3") else "tf_keras"


def _config_of(source: Path) -> tuple[Any, str]:
    """Parsed configuration in a file, and the version of the Keras that wrote it.

    Raises:
        RewriteError: it is damaged, larger than any model, or something else.
    """
    try:
        return _of_archive(source) if zipfile.is_zipfile(source) else _of_hdf5(source)
    except _UNREADABLE as error:
        raise RewriteError(
            f"{source} cannot be read as a model: {cause_of(error)} It may be cut short"
        ) from error


# Errors that h5py, zipfile and json raise for damaged files.
_UNREADABLE = (
    *(OSError, KeyError, ValueError, TypeError, RuntimeError, AttributeError, EOFError),
    *(RecursionError, NotImplementedError, zipfile.BadZipFile, zlib.error),
)


def _of_archive(source: Path) -> tuple[Any, str]:
    with zipfile.ZipFile(source) as archive:
        if source.suffix != ".keras":
            if "config.json" not in archive.namelist():
                raise RewriteError(file_formats.what_else(source))
            raise RewriteError(f"{source} is a .keras file by another name. Rename it to .keras")
        _check_members(source, archive)
        metadata = _parsed(source, archive, "metadata.json", limits.METADATA_BYTES)
        config = _parsed(source, archive, "config.json", limits.CONFIG_BYTES)
        for member in archive.infolist():
            if member.filename.endswith(".h5"):
                with _seekable(archive, member) as weights:
                    _check_hdf5(source, weights, member.compress_size)
        return config, str(metadata["keras_version"])


@contextmanager
def _seekable(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Iterator[Any]:
    """Context manager for a member of an archive as a seekable file, decompressed if need be."""
    with archive.open(member) as content:
        if member.compress_type == zipfile.ZIP_STORED:
            yield content
            return
        with tempfile.TemporaryFile() as copy:
            shutil.copyfileobj(content, copy)
            yield copy


def _check_members(source: Path, archive: zipfile.ZipFile) -> None:
    """Refuses what no archive of Keras has: members elsewhere, and ones that fill the memory."""
    members = archive.infolist()
    if len(members) > limits.ARCHIVE_MEMBERS:
        raise RewriteError(
            f"{source} has {len(members)} members; no model has more than {limits.ARCHIVE_MEMBERS}"
        )
    for member in members:
        parts = member.filename.replace("\\", "/").split("/")
        if ".." in parts or not parts[0] or ":" in parts[0]:
            raise RewriteError(
                f"{source} has a member for a place outside of it ({member.filename!r}), which no "
                "file of Keras has"
            )
    expanded = sum(member.file_size for member in members)
    if limits.is_bomb(source.stat().st_size, expanded):
        raise _bomb(source, expanded)


def _bomb(source: Path, expanded: int) -> RewriteError:
    return RewriteError(
        f"{source} would fill the memory: {source.stat().st_size:,} bytes expand to {expanded:,}, "
        "which no model does"
    )


def _parsed(source: Path, archive: zipfile.ZipFile, name: str, most: int) -> Any:
    size = archive.getinfo(name).file_size
    if size > most:
        raise _too_large(source, name, size, most)
    return json.loads(archive.read(name))


def _too_large(source: Path, name: str, size: int, most: int) -> RewriteError:
    return RewriteError(
        f"{source} holds a configuration ({name}) of {size:,} bytes; no model's is larger than "
        f"{most:,}"
    )


def _of_hdf5(source: Path) -> tuple[Any, str]:
    import h5py

    if not h5py.is_hdf5(source):
        raise RewriteError(file_formats.what_else(source))
    with h5py.File(source) as file:
        if "model_config" not in file.attrs:
            raise RewriteError(
                f"{source} holds weights but no model. Build the model, load the weights "
                "into it and save it whole with model.save()"
            )
        size = file.attrs.get_id("model_config").get_storage_size()
        config = "" if size > limits.CONFIG_BYTES else file.attrs["model_config"]
        if max(size, len(config)) > limits.CONFIG_BYTES:
            raise _too_large(source, "model_config", max(size, len(config)), limits.CONFIG_BYTES)
        version = _text(file.attrs.get("keras_version", ""))
    with open(source, "rb") as content:
        _check_hdf5(source, content, source.stat().st_size)
    return json.loads(config), version


def _check_hdf5(source: Path, content: Any, packed: int) -> None:
    """Refuses what no file of weights has: values in other files, and ones that fill the memory.

    Args:
        source: the model, for messages.
        content: the open file.
        packed: its size in bytes.
    """
    import h5py

    with h5py.File(content, "r") as file:
        expanded, pending, seen = 0, [file], set()
        while pending:
            group = pending.pop()
            for name in group:
                if not isinstance(group.get(name, getlink=True), h5py.HardLink):
                    raise RewriteError(
                        f"{source} has links to elsewhere ({group.name}/{name}), as no model has"
                    )
                item = group[name]
                address = h5py.h5o.get_info(item.id).addr
                if address in seen:
                    continue
                seen.add(address)
                if len(seen) > limits.HDF5_OBJECTS:
                    raise RewriteError(
                        f"{source} holds more than {limits.HDF5_OBJECTS:,} objects; no model does"
                    )
                if isinstance(item, h5py.Group):
                    pending.append(item)
                elif isinstance(item, h5py.Dataset):
                    if item.external or item.is_virtual:
                        raise RewriteError(
                            f"{source} has weights in other files ({item.name}); no model does"
                        )
                    expanded += item.size * item.dtype.itemsize
        if limits.is_bomb(packed, expanded):
            raise _bomb(source, expanded)


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


# --------------------------------------------------------------------- with TensorFlow


# Words in the errors of either Keras for unknown classes.
_UNKNOWN_CLASS = ("nknown", "custom_object", "Could not locate")


def load(source: Path, trusted: bool, keras: Any) -> Any:
    """Loads a model that has passed `check`.

    Args:
        source: the file.
        trusted: whether code in it may be run.
        keras: the package that wrote it.

    Raises:
        RewriteError: it cannot be loaded, or names something that models are not made of, and
            is not trusted.
    """
    if not trusted:
        resolved_names.check_objects(source, [_config_of(source)[0]], keras)
    try:
        model = keras.models.load_model(source, compile=False, safe_mode=not trusted)
    except Exception as error:
        cause = cause_of(error)
        unknown = any(text in str(error) for text in _UNKNOWN_CLASS)
        remedy = "Import the module that defines the class first (--import_modules)"
        if not unknown:
            remedy = "The file may be damaged"
        raise RewriteError(
            f"{source} cannot be loaded by {keras.__name__}: {cause} {remedy}"
        ) from error
    if not isinstance(model, keras.Model):
        raise RewriteError(
            f"{source} cannot be loaded by {keras.__name__}: it holds no model but a "
            f"{type(model).__name__}. The file may be damaged"
        )
    return model


def saving_failed(error: Exception) -> RewriteError:
    """Error for a model that cannot be saved: a full disk, or a custom layer not to be traced."""
    return RewriteError(f"the rewritten model cannot be written: {cause_of(error)}")

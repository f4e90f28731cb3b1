"""Files of either Keras: what a file is, and loading its model.

Nothing here loads TensorFlow before a model is really loaded, so that what is wrong with a
path is said at once.
"""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path
from typing import Any

from mbn_rewrite.errors import RewriteError, cause_of


def check(source: Path, trusted: bool) -> None:
    """Finds out, without TensorFlow, whether a path may hold a model of a Keras.

    Raises:
        RewriteError: it is missing, unreadable, damaged or something else, or it holds code
            and is not trusted.
    """
    try:
        if not source.exists():
            raise RewriteError(
                f"there is no {source}. Give a SavedModel, or a .h5, .hdf5 or .keras file"
            )
        if not source.is_file():
            raise RewriteError(f"{source} is neither a file nor a directory")
        if not os.access(source, os.R_OK):
            raise RewriteError(f"{source} cannot be read: no permission")
        configs, _ = _configs_of(source)
    except (OSError, KeyError, ValueError, TypeError, RuntimeError, zipfile.BadZipFile) as error:
        raise RewriteError(
            f"{source} cannot be read as a model: {cause_of(error)} It may be cut short"
        ) from error
    if not trusted and any(_holds_code(config) for config in configs):
        raise RewriteError(
            f"{source} holds code (Lambda layers or functions), which runs when it is loaded. If "
            "you trust whoever made it, pass --trusted (trusted=True in Python)"
        )


def package_of(source: Path) -> str:
    """Whose file it is that `check` has let pass: that of "tf_keras" or of "keras" (3)."""
    _, version = _configs_of(source)
    return "keras" if version.startswith("3") else "tf_keras"


def _configs_of(source: Path) -> tuple[list[Any], str]:
    """All configurations in a file, parsed, and the version of Keras that wrote it."""
    if zipfile.is_zipfile(source):
        if source.suffix != ".keras":
            raise RewriteError(f"{source} is a .keras file by another name. Rename it to .keras")
        with zipfile.ZipFile(source) as archive:
            metadata = json.loads(archive.read("metadata.json"))
            return [json.loads(archive.read("config.json"))], str(metadata["keras_version"])
    import h5py

    if not h5py.is_hdf5(source):
        raise RewriteError(
            f"{source} is neither an HDF5 file nor a .keras file nor a directory. "
            "Give a model saved by Keras; if it should be one, it may be cut short"
        )
    with h5py.File(source) as file:
        config = file.attrs.get("model_config")
        if config is None:
            raise RewriteError(
                f"{source} holds weights but no model. Build the model, load the weights "
                "into it and save it whole with model.save()"
            )
        return [json.loads(config)], _text(file.attrs.get("keras_version", ""))


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _holds_code(config: Any) -> bool:
    """Whether a parsed configuration names something that carries code.

    A bare {"value": ...} is how Keras writes the byte code of a function.
    """
    if isinstance(config, dict):
        named = config.get("class_name") in ("Lambda", "__lambda__") or set(config) == {"value"}
        typed = any(config.get(k) == "lambda" for k in config if str(k).endswith("function_type"))
        return named or typed or any(map(_holds_code, config.values()))
    if isinstance(config, list):
        return any(map(_holds_code, config))
    return False


# --------------------------------------------------------------------- with TensorFlow


# What either Keras says where it does not know a class.
_UNKNOWN_CLASS = ("nknown", "custom_object", "Could not locate")


def load(source: Path, trusted: bool, keras: Any) -> Any:
    """Loads a model that `check` has let pass.

    Args:
        source: the file.
        trusted: whether code in it may be run.
        keras: the package that wrote it.

    Raises:
        RewriteError: it cannot be loaded.
    """
    try:
        return keras.models.load_model(source, compile=False, safe_mode=not trusted)
    except Exception as error:
        cause = cause_of(error)
        unknown = any(
            text in str(error) for text in ("nknown", "custom_object", "Could not locate")
        )
        remedy = "Import the module that defines the class first (--import_modules)"
        if not unknown:
            remedy = "The file may be damaged"
        raise RewriteError(
            f"{source} cannot be loaded by {keras.__name__}: {cause} {remedy}"
        ) from error


def saving_failed(error: Exception) -> RewriteError:
    """What to raise where the disk is full, or a custom layer cannot be traced."""
    return RewriteError(f"the rewritten model cannot be written: {cause_of(error)}")

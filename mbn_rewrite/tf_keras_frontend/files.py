"""Models of tf_keras on disk: what a file is, loading, saving, and serving signatures.

Nothing here loads TensorFlow before a model is really loaded, so that what is wrong with a
path is said at once.
"""

from __future__ import annotations

import json
import os
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mbn_rewrite.errors import RewriteError, cause_of

# Signatures that Keras and TensorFlow make by themselves.
_OWN_SIGNATURES = {"serving_default", "__saved_model_init_op", "__saved_model_train_op"}


def check(source: Path, trusted: bool) -> None:
    """Finds out, without TensorFlow, whether a path may hold a model of tf_keras.

    Raises:
        RewriteError: it is missing, unreadable, damaged or something else, or it holds code
            and is not trusted.
    """
    try:
        if not source.exists():
            raise RewriteError(
                f"there is no {source}. Give a .h5, .hdf5 or .keras file or a SavedModel"
            )
        if not (source.is_file() or source.is_dir()):
            raise RewriteError(f"{source} is neither a file nor a directory")
        if not os.access(source, os.R_OK):
            raise RewriteError(f"{source} cannot be read: no permission")
        configs, version = _configs_of(source)
    except (OSError, KeyError, ValueError, TypeError, RuntimeError, zipfile.BadZipFile) as error:
        raise RewriteError(
            f"{source} cannot be read as a model: {cause_of(error)} It may be cut short"
        ) from error
    if version.startswith("3"):
        raise RewriteError(
            f"{source} was written by Keras {version}; this release rewrites models of tf_keras "
            "(Keras 2). Rebuild the model with tf_keras and load the weights into it"
        )
    if not trusted and any(_holds_code(config) for config in configs):
        raise RewriteError(
            f"{source} holds code (Lambda layers or functions), which runs when it is loaded. If "
            "you trust whoever made it, pass --trusted (trusted=True in Python)"
        )


def _configs_of(source: Path) -> tuple[list[Any], str]:
    """All configurations in a file, parsed, and the version of Keras that wrote it."""
    if source.is_dir():
        return _saved_model_configs(source), "2"
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
            "Give a model saved by tf_keras; if it should be one, it may be cut short"
        )
    with h5py.File(source) as file:
        config = file.attrs.get("model_config")
        if config is None:
            raise RewriteError(
                f"{source} holds weights but no model. Build the model, load the weights "
                "into it and save it whole with model.save()"
            )
        return [json.loads(config)], _text(file.attrs.get("keras_version", ""))


def _saved_model_configs(source: Path) -> list[Any]:
    if not (source / "saved_model.pb").is_file():
        raise RewriteError(f"{source} is a directory without saved_model.pb, so no SavedModel")
    if not (source / "keras_metadata.pb").is_file():
        raise RewriteError(
            f"{source} is a SavedModel that was not written by tf_keras (it has no "
            "keras_metadata.pb), which this release cannot rewrite. Rewrite the Keras model "
            "with mbn_rewrite.convert and export the result"
        )
    data = (source / "keras_metadata.pb").read_bytes()
    configs = list(_json_objects(data.decode("utf-8", "replace")))
    if not configs:
        raise RewriteError(f"{source / 'keras_metadata.pb'} describes no model")
    return configs


def _json_objects(text: str) -> Iterator[Any]:
    """The JSON objects in a protocol buffer: each layer's metadata is one.

    The message is read by its strings alone, since the classes that parse it come with
    TensorFlow. An object that cannot be parsed is an error, lest code hide in it.
    """
    decoder = json.JSONDecoder()
    start = _next_object(text, 0)
    while start >= 0:
        value, end = decoder.raw_decode(text, start)
        yield value
        start = _next_object(text, end)


def _next_object(text: str, start: int) -> int:
    found = re.compile(r'\{\s*"').search(text, start)
    return found.start() if found else -1


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


def load(source: Path, trusted: bool) -> Any:
    """Loads a model that `check` has let pass.

    Raises:
        RewriteError: it cannot be loaded, or Keras would lose signatures of it.
    """
    import tf_keras

    if source.is_dir():
        _check_signatures(source)
    options = {"safe_mode": not trusted} if source.suffix == ".keras" else {}
    try:
        return tf_keras.models.load_model(source, compile=False, **options)
    except Exception as error:
        cause = cause_of(error)
        unknown = "nknown" in cause or "custom_object" in str(error)
        remedy = "Import the module that defines the class first (--import_modules)"
        if not unknown:
            remedy = "The file may be damaged"
        raise RewriteError(f"{source} cannot be loaded by tf_keras: {cause} {remedy}") from error


def _check_signatures(source: Path) -> None:
    """Raises RewriteError where Keras would lose signatures that it did not make."""
    from tensorflow.core.protobuf.saved_model_pb2 import SavedModel

    proto = SavedModel()
    try:
        proto.ParseFromString((source / "saved_model.pb").read_bytes())
        names = {name for graph in proto.meta_graphs for name in graph.signature_def}
    except Exception as error:
        raise RewriteError(
            f"{source / 'saved_model.pb'} cannot be read; it may be cut short"
        ) from error
    others = sorted(names - _OWN_SIGNATURES)
    if others:
        raise RewriteError(
            f"{source} has signatures that Keras did not make and would lose: "
            f"{', '.join(others)}. This release carries over serving_default alone"
        )


def save(model: Any, directory: Path) -> None:
    """Writes a SavedModel.

    Raises:
        RewriteError: the disk is full, or a custom layer cannot be traced.
    """
    import tf_keras

    try:
        tf_keras.models.save_model(model, directory, save_format="tf", include_optimizer=False)
    except Exception as error:
        raise RewriteError(f"the rewritten model cannot be written: {cause_of(error)}") from error


class Serving:
    """The serving signature of a SavedModel.

    Attributes:
        inputs: name -> tf.TensorSpec.
        outputs: name -> tf.TensorSpec.
    """

    def __init__(self, directory: Path) -> None:
        import tensorflow as tf

        try:
            self._owner = tf.saved_model.load(str(directory))  # holds the variables
            self._function = self._owner.signatures["serving_default"]
        except Exception as error:
            raise RewriteError(f"{directory} cannot be served: {cause_of(error)}") from error
        self.inputs = dict(self._function.structured_input_signature[1])
        self.outputs = dict(self._function.structured_outputs)

    def __call__(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Outputs by name, for inputs by name."""
        return dict(self._function(**inputs))

"""`rewrite_saved_model`: from a model on disk to a rewritten SavedModel on disk.

The output is written beside its destination, loaded again, compared with the original and
only then renamed, so that it appears whole or not at all.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mbn_rewrite.api import check_mode, convert_with_plan
from mbn_rewrite.comparison import (
    Comparison,
    compare_outputs,
    named_inputs,
    random_inputs,
    run_anywhere,
    tolerance_of,
)
from mbn_rewrite.decisions import Plan
from mbn_rewrite.errors import RewriteError
from mbn_rewrite.report import table

Progress = Callable[[str], None]


class VerificationError(RewriteError):
    """The rewritten model does not give the original's outputs; nothing was written.

    Attributes:
        report: what was planned, and the comparison that failed.
    """

    def __init__(self, message: str, report: Report) -> None:
        super().__init__(message)
        self.report = report


@dataclass(frozen=True)
class Report:
    """What was done to a model on disk.

    Attributes:
        source: the path of the original.
        destination: the path of the rewritten SavedModel, or "" where none was written.
        plan: what became of every BatchNormalization.
        comparison: the written SavedModel beside the original; None for a dry run.
        parameters: how many weights the original has.
        new_parameters: how many the rewritten model has; None for a dry run.
    """

    source: str
    destination: str
    plan: Plan
    comparison: Comparison | None
    parameters: int
    new_parameters: int | None

    def to_dict(self) -> dict[str, Any]:
        """The report in types that JSON knows."""
        return {
            "source": self.source,
            "destination": self.destination,
            "parameters": {"before": self.parameters, "after": self.new_parameters},
            "verification": self.comparison.to_dict() if self.comparison else None,
            "plan": self.plan.to_dict(),
        }

    def to_json(self) -> str:
        """The report as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        lines = [str(self.plan)]
        if self.new_parameters is not None:
            left = self.plan.left if self.plan.mode == "fold" else self.plan.counts.get("kept", 0)
            lines.append(
                table(
                    ["", "before", "after"],
                    [
                        ["BatchNormalization", str(len(self.plan.decisions)), str(left)],
                        ["weights", f"{self.parameters:,}", f"{self.new_parameters:,}"],
                    ],
                )
            )
        if self.comparison:
            lines.append(f"verification: {self.comparison}")
        return "\n".join(lines)


def rewrite_saved_model(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    mode: str = "fold",
    overwrite: bool = False,
    *,
    trusted: bool = False,
    dry_run: bool = False,
    inputs: Mapping[str, np.ndarray] | None = None,
    tolerance: float | None = None,
    progress: Progress | None = None,
) -> Report:
    """Rewrites a model on disk and writes it as SavedModel, verified.

    Args:
        source: what tf_keras can load: .h5, .hdf5 or .keras, or a SavedModel written by it.
        destination: the directory to write. Its parent must exist.
        mode: as for `convert`.
        overwrite: whether a destination that exists may be replaced.
        trusted: whether code in the file (Lambda layers) may be run.
        dry_run: plan only; writes nothing.
        inputs: what to verify with, by input name; random values by default.
        tolerance: as for `verify`.
        progress: called with a line when a step begins.

    Returns:
        A Report; it prints as tables.

    Raises:
        VerificationError: the written model's outputs differ from the original's. Nothing
            is left at the destination.
        RewriteError: the source cannot be read or rewritten, or the destination cannot be
            written. Nothing is left at the destination.
    """
    say = progress or (lambda line: None)
    check_mode(mode)
    source, destination = Path(source), Path(destination)
    check_paths(source, None if dry_run else destination, overwrite, trusted)
    say(f"loading {source}")
    model = _load(source)
    say(f"rewriting, mode {mode}")
    new, plan = convert_with_plan(model, mode)
    if dry_run:
        return Report(str(source), "", plan, None, model.count_params(), None)
    with _written_whole(destination, overwrite) as temporary:
        say("writing")
        _save(new, temporary)
        say("verifying what was written")
        comparison = _verify_written(model, temporary, inputs, tolerance)
        report = Report(
            str(source), str(destination), plan, comparison, model.count_params(),
            new.count_params(),
        )  # fmt: skip
        if not comparison.ok:
            raise VerificationError(
                f"the rewritten model does not give the original's outputs ({comparison}); "
                f"nothing was written to {destination}",
                report,
            )
    return report


# ----------------------------------------------------------------------------- the paths


def check_paths(
    source: Path, destination: Path | None, overwrite: bool = False, trusted: bool = False
) -> None:
    """Finds what is wrong with the paths, without loading TensorFlow.

    Raises:
        RewriteError: the source is missing, damaged, of another kind, or holds code and is
            not trusted; or the destination cannot be written.
    """
    if destination is not None:
        _check_destination(source, destination, overwrite)
    _check_source(source, trusted)


def _check_source(source: Path, trusted: bool) -> None:
    """Raises RewriteError for what cannot be loaded here, before TensorFlow is loaded."""
    if not source.exists():
        raise RewriteError(
            f"there is no {source}. Give a .h5, .hdf5 or .keras file or a SavedModel"
        )
    if not os.access(source, os.R_OK):
        raise RewriteError(f"{source} cannot be read: no permission")
    config, version = _saved_config(source)
    if version.startswith("3"):
        raise RewriteError(
            f"{source} was written by Keras {version}; this release rewrites models of tf_keras "
            "(Keras 2). Rebuild the model with tf_keras and load the weights into it"
        )
    if not trusted and _holds_code(config):
        raise RewriteError(
            f"{source} holds Lambda layers, which run code from the file when it is loaded. If "
            "you trust whoever made it, pass --trusted (trusted=True in Python)"
        )


def _saved_config(source: Path) -> tuple[str, str]:
    """A model's configuration as JSON text, and the version of Keras that wrote it."""
    if source.is_dir():
        return _saved_model_config(source), "2"
    try:
        if zipfile.is_zipfile(source):
            with zipfile.ZipFile(source) as archive:
                config = archive.read("config.json").decode()
                metadata = json.loads(archive.read("metadata.json"))
                return config, str(metadata.get("keras_version", ""))
        import h5py

        if not h5py.is_hdf5(source):
            raise RewriteError(
                f"{source} is neither an HDF5 file nor a .keras file nor a directory. "
                "Give a model saved by tf_keras; if it should be one, it may be cut short"
            )
        with h5py.File(source) as file:
            config = file.attrs.get("model_config")
            version = file.attrs.get("keras_version", "")
            if config is None:
                raise RewriteError(
                    f"{source} holds weights but no model. Build the model, load the weights "
                    "into it and save it whole with model.save()"
                )
            return _text(config), _text(version)
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise RewriteError(
            f"{source} cannot be read as a model ({_first_line(error)}); it may be cut short"
        ) from error


def _saved_model_config(source: Path) -> str:
    if not (source / "saved_model.pb").exists():
        raise RewriteError(f"{source} is a directory without saved_model.pb, so no SavedModel")
    if not (source / "keras_metadata.pb").exists():
        raise RewriteError(
            f"{source} is a SavedModel that was not written by tf_keras (it has no "
            "keras_metadata.pb), which this release cannot rewrite. Rewrite the Keras model "
            "with mbn_rewrite.convert and export the result"
        )
    return (source / "keras_metadata.pb").read_bytes().decode("utf-8", "replace")


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _holds_code(config: str) -> bool:
    """Whether a configuration names a layer class that carries code."""
    compact = config.replace(" ", "")
    return '"class_name":"Lambda"' in compact or '"__lambda__"' in compact


def _load(source: Path) -> Any:
    import tensorflow as tf
    import tf_keras

    if source.is_dir():
        _check_signatures(source)
    try:
        # What code there is was accepted by _check_source.
        if source.suffix == ".keras":
            return tf_keras.models.load_model(source, compile=False, safe_mode=False)
        return tf_keras.models.load_model(source, compile=False)
    except (Exception, tf.errors.OpError) as error:
        raise RewriteError(
            f"{source} cannot be loaded by tf_keras: {_first_line(error)} A custom class has to "
            "be imported first (--import_modules), a broken file to be fetched anew"
        ) from error


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
    others = sorted(names - {"serving_default", "__saved_model_init_op", "__saved_model_train_op"})
    if others:
        raise RewriteError(
            f"{source} has signatures that Keras did not make and would lose: "
            f"{', '.join(others)}. This release carries over serving_default alone"
        )


def _first_line(error: BaseException) -> str:
    line = str(error).strip().split("\n")[0][:300] or type(error).__name__
    return line if line.endswith(".") else f"{line}."


def _check_destination(source: Path, destination: Path, overwrite: bool) -> None:
    if destination.exists() or destination.is_symlink():
        if not overwrite:
            raise RewriteError(
                f"{destination} exists. Give another path, or pass --overwrite "
                "(overwrite=True in Python) to replace it"
            )
        if not destination.is_dir() or not (destination / "saved_model.pb").exists():
            raise RewriteError(
                f"{destination} is no SavedModel, so it is not replaced. Give another path"
            )
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
def _written_whole(destination: Path, overwrite: bool) -> Iterator[Path]:
    """Gives a directory to write to, which becomes the destination if all goes well."""
    destination = destination.resolve()
    try:
        work = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=destination.parent))
    except OSError as error:
        raise RewriteError(f"{destination.parent} is not writable ({error.strerror})") from error
    try:
        yield work / "new"
        _give_default_permissions(work / "new")
        if overwrite and destination.exists():
            destination.rename(work / "old")
        try:
            (work / "new").rename(destination)
        except OSError:
            with suppress(OSError):
                (work / "old").rename(destination)
            raise
    except OSError as error:
        raise RewriteError(f"{destination} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _give_default_permissions(directory: Path) -> None:
    """mkdtemp makes directories private; what is inside was made with the usual mask."""
    mask = os.umask(0)
    os.umask(mask)
    directory.chmod(0o777 & ~mask)


def _save(model: Any, directory: Path) -> None:
    import tensorflow as tf
    import tf_keras

    try:
        tf_keras.models.save_model(model, directory, save_format="tf", include_optimizer=False)
    except (tf.errors.OpError, ValueError, TypeError) as error:
        raise RewriteError(
            f"the rewritten model cannot be written: {_first_line(error)}"
        ) from error


def _verify_written(
    model: Any,
    directory: Path,
    inputs: Mapping[str, np.ndarray] | None,
    tolerance: float | None,
) -> Comparison:
    """Compares the serving signature on disk with the original model in memory."""
    import tensorflow as tf

    loaded = tf.saved_model.load(str(directory))
    serve = loaded.signatures["serving_default"]
    specs = serve.structured_input_signature[1]
    if inputs is None:
        structure = random_inputs(model)
    else:
        arrays = named_inputs(inputs, model.input_names)
        tensors = [tf.constant(a, t.dtype) for a, t in zip(arrays, model.inputs, strict=True)]
        structure = tf.nest.pack_sequence_as(model._nested_inputs, tensors)
    flat = tf.nest.flatten(structure)
    names = model.input_names if len(specs) > 1 else list(specs)
    by_name = dict(zip(names, flat, strict=True))
    expected = tf.nest.flatten(run_anywhere(lambda data: model(data, training=False), structure))
    results = run_anywhere(lambda data: serve(**data), by_name)
    return compare_outputs(
        [np.asarray(t) for t in expected],
        [np.asarray(results[name]) for name in _output_names(model, results)],
        tolerance_of(model) if tolerance is None else tolerance,
    )


def _output_names(model: Any, results: Mapping[str, Any]) -> list[str]:
    """The signature's names of the model's outputs, in the order of the model."""
    names = list(model.output_names)
    if set(names) == set(results):
        return names
    if len(results) == len(names) == 1:
        return list(results)
    raise RewriteError(
        f"the written model names its outputs {sorted(results)}, the original {sorted(names)}"
    )

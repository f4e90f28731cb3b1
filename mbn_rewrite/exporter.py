"""`rewrite_saved_model`: from a model on disk to a rewritten SavedModel on disk.

The output is written beside its destination, loaded again, compared with the original and
only then renamed, so that it appears whole or not at all.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mbn_rewrite.api import check_mode, convert_with_plan
from mbn_rewrite.comparison import Comparison, compare_outputs, tolerance_for
from mbn_rewrite.decisions import Plan
from mbn_rewrite.errors import RewriteError, cause_of
from mbn_rewrite.report import table
from mbn_rewrite.tf_keras_frontend import files

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
            lines.append(
                table(
                    ["", "before", "after"],
                    [
                        ["BatchNormalization", str(len(self.plan.decisions)), str(self.plan.left)],
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
    if tolerance is not None and not 0 <= tolerance < np.inf:
        raise RewriteError(f"the tolerance must be a number from 0 up, not {tolerance}")
    source, destination = Path(source), Path(destination)
    check_paths(source, None if dry_run else destination, overwrite, trusted)
    say(f"loading {source}")
    model = files.load(source, trusted)
    say(f"rewriting, mode {mode}")
    new, plan = convert_with_plan(model, mode)
    if dry_run:
        return Report(str(source), "", plan, None, model.count_params(), None)
    with _written_whole(destination, overwrite) as temporary:
        say("writing")
        files.save(new, temporary)
        say("verifying what was written")
        comparison = _verify_written(model, source, temporary, inputs, tolerance)
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
        try:
            _check_destination(source, destination, overwrite)
        except (OSError, RuntimeError) as error:  # names too long, links in a circle
            raise RewriteError(f"{destination} cannot be written: {cause_of(error)}") from error
    files.check(source, trusted)


# What a SavedModel consists of; anything else in its directory is somebody's.
_PARTS = {
    "saved_model.pb", "keras_metadata.pb", "fingerprint.pb", "variables", "assets", "assets.extra",
}  # fmt: skip


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
        others = sorted(path.name for path in destination.iterdir() if path.name not in _PARTS)
        if others:
            raise RewriteError(
                f"{destination} holds more than a SavedModel ({', '.join(others[:3])}), so it is "
                "not replaced. Give another path"
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
    kept = work / "old"
    try:
        yield work / "new"
        _give_default_permissions(work / "new")
        if overwrite and destination.exists():
            destination.rename(kept)
        (work / "new").rename(destination)
        shutil.rmtree(kept, ignore_errors=True)
    except OSError as error:
        raise RewriteError(f"{destination} cannot be written: {error.strerror or error}") from error
    finally:
        # Whatever came in between, Ctrl-C too: what was there comes back, or stays aside.
        if kept.exists() and not destination.exists():
            kept.rename(destination)
        shutil.rmtree(work, ignore_errors=True)


def _give_default_permissions(directory: Path) -> None:
    """mkdtemp makes directories private; what is inside was made with the usual mask."""
    mask = os.umask(0)
    os.umask(mask)
    directory.chmod(0o777 & ~mask)


# -------------------------------------------------------------------------- verification


def _verify_written(
    model: Any,
    source: Path,
    directory: Path,
    inputs: Mapping[str, np.ndarray] | None,
    tolerance: float | None,
) -> Comparison:
    """Compares the serving signature on disk with the original.

    The original is the source's own serving signature where it has one, or else the model in
    memory.
    """
    from mbn_rewrite.tf_keras_frontend import running

    written = files.Serving(directory)
    original = files.Serving(source) if source.is_dir() else None
    if original is not None:
        _check_alike(original, written)
    if inputs is not None:
        given = _checked_inputs(inputs, written)
    else:
        given = _by_name(model, running.random_inputs(model), written)
    results = _named_outputs(written, given, "the rewritten model")
    if original is not None:
        expected = _named_outputs(original, given, "the original")
    else:
        arrays = running.outputs_of(model, _as_structure(model, given), "the original")
        names = list(results) if len(results) == 1 else list(model.output_names)
        expected = dict(zip(names, arrays, strict=True))
    if set(expected) != set(results):
        raise RewriteError(
            f"the written model names its outputs {sorted(results)}, the original "
            f"{sorted(expected)}"
        )
    return compare_outputs(
        list(expected.values()),
        [results[name] for name in expected],
        tolerance_for(running.compute_dtypes(model)) if tolerance is None else tolerance,
    )


def _check_alike(original: files.Serving, written: files.Serving) -> None:
    """Raises RewriteError where a signature would not be carried over as it was."""

    def described(specs: Mapping[str, Any]) -> dict[str, str]:
        return {name: f"{s.dtype.name} {s.shape}" for name, s in sorted(specs.items())}

    for what in ("inputs", "outputs"):
        before, after = described(getattr(original, what)), described(getattr(written, what))
        if before != after:
            raise RewriteError(
                f"the serving signature of the source is not the one that Keras makes: its "
                f"{what} are {before}, they would become {after}. This release cannot carry "
                "it over"
            )


def _by_name(model: Any, structure: Any, written: files.Serving) -> dict[str, Any]:
    """A model's inputs by the names of its serving signature."""
    import tensorflow as tf

    flat = tf.nest.flatten(structure)
    if len(flat) == len(written.inputs) == 1:
        return dict(zip(written.inputs, flat, strict=True))
    names = structure if isinstance(structure, dict) else (model.input_names or ())
    if set(names) != set(written.inputs):
        raise RewriteError(
            f"the serving signature names its inputs {sorted(written.inputs)}, the model "
            f"{sorted(names)}: give inputs by name (--verify_inputs)"
        )
    return dict(zip(sorted(names) if isinstance(structure, dict) else names, flat, strict=True))


def _as_structure(model: Any, given: Mapping[str, Any]) -> Any:
    """Inputs by name in the structure that the model in memory takes."""
    import tensorflow as tf

    names = list(given) if len(given) == 1 else model.input_names
    flat = [given[name] for name in names]
    structure = getattr(model, "_nested_inputs", None)
    return tf.nest.pack_sequence_as(flat if structure is None else structure, flat)


def _checked_inputs(inputs: Mapping[str, np.ndarray], written: files.Serving) -> dict[str, Any]:
    """Arrays of the caller as tensors that the signature takes."""
    import tensorflow as tf

    if set(inputs) != set(written.inputs):
        raise RewriteError(
            f"the inputs are named {sorted(inputs)}; the model's are named {sorted(written.inputs)}"
        )
    tensors = {}
    for name, array in inputs.items():
        spec, array = written.inputs[name], np.asarray(array)
        text, complex_numbers = array.dtype.kind in "SUO", array.dtype.kind == "c"
        if text != (spec.dtype == tf.string) or (complex_numbers and not spec.dtype.is_complex):
            raise RewriteError(f"input '{name}' is of {array.dtype}; {spec.dtype.name} is needed")
        if not spec.shape.is_compatible_with(array.shape):
            raise RewriteError(
                f"input '{name}' has the shape {array.shape}; {spec.shape} is needed"
            )
        tensor = tf.constant(array)
        tensors[name] = tensor if text else tf.cast(tensor, spec.dtype)
    return tensors


def _named_outputs(
    serving: files.Serving, given: dict[str, Any], who: str
) -> dict[str, np.ndarray]:
    from mbn_rewrite.tf_keras_frontend import running

    names = sorted(serving.outputs)
    arrays = running.called(lambda data: [serving(data)[name] for name in names], given, who)
    return dict(zip(names, arrays, strict=True))

"""`rewrite_saved_model`: from a model on disk to a rewritten SavedModel on disk.

The output is written beside its destination, loaded again, compared with the original and
only then put in its place, so that it appears whole or not at all; see `output_dir`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from mbn_rewrite import display, output_dir
from mbn_rewrite.comparison import Comparison, compare_outputs, judged, tolerance_for
from mbn_rewrite.errors import RewriteError, VerificationError, cause_of
from mbn_rewrite.frontends.keras_common import files as keras_files
from mbn_rewrite.frontends.protocols import ModelSource
from mbn_rewrite.frontends.saved_model import files as saved_model_files
from mbn_rewrite.frontends.source import Footprint, ReferenceIO, bytes_on_disk
from mbn_rewrite.options import TRAINING_MODES, Mode, checked_options
from mbn_rewrite.plans import Plan
from mbn_rewrite.tuning.auto import plan_for

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Report:
    """What was done to a model on disk.

    Attributes:
        source: the path of the original.
        destination: the path of the rewritten SavedModel, or "" where none was written.
        plan: what became of every BatchNormalization.
        before: how large the original is.
        after: how large the rewritten model is; None for a dry run.
        comparisons: for each signature the written SavedModel beside the original.
        unverified: signatures whose outputs were not compared, and why.
        by_xla: signatures that only XLA could run on this machine, of those compared. It leaves
            assertions out, and takes the nearest index for one that is out of bounds.
        as_it_was: functions that were carried over as they were, and why.
        left_out: functions that were not carried over, and why.
    """

    source: str
    destination: str
    plan: Plan
    before: Footprint
    after: Footprint | None = None
    comparisons: Mapping[str, Comparison] = field(default_factory=dict)
    unverified: Mapping[str, str] = field(default_factory=dict)
    as_it_was: Mapping[str, str] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)
    by_xla: tuple[str, ...] = ()

    @property
    def comparison(self) -> Comparison | None:
        """The comparison of the signature that differs most; None where none was compared."""
        return max(
            self.comparisons.values(), key=lambda c: (not c.ok, c.max_rel_error), default=None
        )

    @property
    def ok(self) -> bool:
        """Whether all signatures agree within their tolerance."""
        return all(comparison.ok for comparison in self.comparisons.values())

    def to_dict(self) -> dict[str, Any]:
        """The report in types that JSON knows."""
        return {
            "source": self.source,
            "destination": self.destination,
            "before": asdict(self.before),
            "after": asdict(self.after) if self.after else None,
            "verification": {
                "ok": self.ok and bool(self.comparisons),
                "signatures": {name: c.to_dict() for name, c in self.comparisons.items()},
                "unverified": dict(self.unverified),
                "by_xla": list(self.by_xla),
            },
            "carried_over_as_it_was": dict(self.as_it_was),
            "left_out": dict(self.left_out),
            "plan": self.plan.to_dict(),
        }

    def to_json(self) -> str:
        """The report as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def table(self, full: bool = False) -> str:
        """The report as text, as `str` gives it; `full` for a row for every decision of many."""
        return display.report_text(self, full)

    def __str__(self) -> str:
        return self.table()

    def __repr__(self) -> str:
        return display.one_line(self, display.report_summary(self))

    def _repr_html_(self) -> str:
        return display.report_html(self)


@contextmanager
def _outside_strategies() -> Iterator[None]:
    """In which no distribution strategy is in scope, as what is written belongs to none."""
    if "tensorflow" not in sys.modules:
        yield
        return
    from mbn_rewrite.frontends.execution import outside_strategies

    with outside_strategies():
        yield


@_outside_strategies()
def rewrite_saved_model(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    mode: Mode = "auto",
    overwrite: bool = False,
    *,
    tags: Sequence[str] | None = None,
    signatures: Sequence[str] | None = None,
    trusted: bool = False,
    dry_run: bool = False,
    inputs: Mapping[str, Any] | None = None,
    unverified: Sequence[str] = (),
    tolerance: float | None = None,
    batch_size: int | None = None,
    jit_compile: bool | None = None,
    dtype: str | None = None,
    budget: float | None = None,
    progress: Progress | None = None,
) -> Report:
    """Rewrites a model on disk and writes it as SavedModel, verified.

    To verify it is to run it, and a SavedModel is a program. All of that happens in this process,
    so that a model that does not end, or crashes, takes it along. The command-line tool has it
    done by a process of its own, with a time limit.

    Args:
        source: any SavedModel, or a .h5, .hdf5 or .keras file of tf_keras
            or Keras 3.
        destination: the directory to write. Its parent must exist.
        mode: as for `convert`.
        overwrite: whether a destination that exists may be replaced.
        tags: which graph of a SavedModel with several; by default the one tagged "serve".
        signatures: which signatures of a SavedModel to carry over; by default all, and the
            methods that the loaded object has beside them.
        trusted: whether all that the model says may be done. By default only what is known to
            compute is run: files of Keras that hold code, name functions of other kinds or read
            files of this machine are refused, and so are SavedModels that act when they are
            loaded, or have assets outside of their directory. Signatures and methods that act
            when they run (write or read files, run Python code) are rewritten, but not run, so
            that they are not verified; the report says so.
        dry_run: plan only; writes nothing.
        inputs: what to verify with: arrays, or numbers or texts in lists, by input name; by
            "signature/input", or in a mapping for each signature, where those differ. Made up
            by default. Mode "auto" measures with them too.
        unverified: signatures and methods to carry over without comparing what they give.
        tolerance: as for `verify`.
        batch_size: as for `convert`, as are the next three. Of a SavedModel one signature is
            measured: "serving_default", or else the first by name.
        jit_compile: as for `convert`.
        dtype: as for `convert`.
        budget: as for `convert`.
        progress: called with a line when a step begins.

    Returns:
        A Report; it prints as tables, and long ones by groups of rows: see `Report.table`.

    Raises:
        VerificationError: the written model's outputs differ from the original's. Nothing
            is left at the destination.
        RewriteError: the source cannot be read or rewritten, or the destination cannot be
            written. Nothing is left at the destination.
    """
    options = checked_options(
        mode,
        progress=progress,
        batch_size=batch_size,
        jit_compile=jit_compile,
        dtype=dtype,
        budget=budget,
    )
    inputs = None if inputs is None else as_arrays(inputs)
    options, say = replace(options, inputs=inputs), options.progress
    if mode in TRAINING_MODES:
        raise RewriteError(
            f'mode "{mode}" is for training, and a model on disk is there to be served. Use '
            '"auto", "fold" or "depthwise", or mbn_rewrite.convert on a Keras model'
        )
    if tolerance is not None and not 0 <= tolerance < np.inf:
        raise RewriteError(f"the tolerance must be a number from 0 up, not {tolerance}")
    source, destination = Path(source), Path(destination)
    output_dir.clean_up(*([] if dry_run else [destination.absolute().parent]))
    check_paths(source, None if dry_run else destination, overwrite, trusted)
    if not source.is_dir() and (tags is not None or signatures is not None):
        raise RewriteError(f"{source} is a file of Keras, which has no tags and signatures")
    say(f"loading {source}")
    model = _opened(source, trusted, tags, signatures)
    unknown = sorted(set(unverified) - set(model.names))
    if unknown:
        raise RewriteError(
            f"unverified names {', '.join(unknown)}, which {source} does not have. It has "
            f"{', '.join(sorted(model.names))}"
        )
    model.unverifiable.update(dict.fromkeys(unverified, "as it was asked for"))
    say(f"planning, mode {mode}")
    if inputs is not None and mode == "auto":
        model.check_inputs(inputs)  # before measuring, which takes a while
    plan = plan_for(model, options)
    report = Report(
        str(source), "", plan, model.footprint,
        as_it_was=model.as_it_was, left_out=model.left_out,
    )  # fmt: skip
    if dry_run:
        return report
    from mbn_rewrite.frontends.execution import give_back_memory, without_saying_where

    say("running the original")
    give_back_memory()
    exchanges, dtypes = model.exchanges(inputs), model.dtypes
    not_compared = dict(model.unverifiable)
    for name, exchange in exchanges.items():
        if _gives_nothing(exchange, inputs is None):
            not_compared[name] = "it gives not one value to compare"
    by_xla = tuple(name for name, exchange in exchanges.items() if exchange.compiled)
    give_back_memory()
    opened_again = model.opened_again
    with output_dir.working_folder(destination) as folder:
        say("writing")
        with without_saying_where():  # it is not there that it stays
            weights = model.write(plan, folder.new)
        del model  # so that the two are not in memory side by side
        give_back_memory()
        say("verifying what was written")
        comparisons, ops = _verified(
            folder.new, exchanges, tolerance, dtypes, opened_again, report.before.signature,
            inputs is None,
        )  # fmt: skip
        after = Footprint(weights, bytes_on_disk(folder.new), ops, report.before.signature)
        report = Report(
            str(source), str(destination), report.plan, report.before, after, comparisons,
            not_compared, report.as_it_was, report.left_out, by_xla,
        )  # fmt: skip
        if not report.ok:
            worst = next(name for name, c in comparisons.items() if not c.ok)
            raise VerificationError(
                f"the rewritten model does not give the original's outputs ({worst}: "
                f"{comparisons[worst]}); nothing was written to {destination}",
                report.plan,
                comparisons[worst],
                report,
            )
        output_dir.put_in_place(folder, destination, overwrite)
    return report


def as_arrays(inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """What a caller gives for inputs, as arrays by input name or "signature/input".

    Texts and bytes stay what they are: numpy's own arrays of bytes lose zeros at the end.

    Raises:
        RewriteError: something is no array.
    """
    arrays: dict[str, np.ndarray] = {}
    for name, value in inputs.items():
        if isinstance(value, Mapping):
            arrays |= {f"{name}/{key}": array for key, array in as_arrays(value).items()}
            continue
        try:
            arrays[name] = np.asarray(value, object if _holds_text(value) else None)
        except ValueError as error:
            raise RewriteError(f"input '{name}' is no array: {cause_of(error)}") from error
    return arrays


def _holds_text(value: Any) -> bool:
    while isinstance(value, (list, tuple)) and value:
        value = value[0]
    return isinstance(value, (str, bytes))


def _opened(
    source: Path, trusted: bool, tags: Sequence[str] | None, signatures: Sequence[str] | None
) -> ModelSource:
    if source.is_dir():
        from mbn_rewrite.frontends.saved_model.source import SavedModelDirectory

        return SavedModelDirectory(source, tags, signatures, trusted)
    if keras_files.package_of(source) == "keras":
        from mbn_rewrite.frontends.keras3.source import Keras3File

        return Keras3File(source, trusted)
    from mbn_rewrite.frontends.tf_keras.source import TfKerasFile

    return TfKerasFile(source, trusted)


# ----------------------------------------------------------------------------- the paths


def check_paths(
    source: Path, destination: Path | None, overwrite: bool = False, trusted: bool = False
) -> None:
    """Finds what is wrong with the paths, without loading TensorFlow.

    Raises:
        RewriteError: the source is missing, damaged, of another kind, or would do more than
            compute and is not trusted; or the destination cannot be written.
    """
    if destination is not None:
        output_dir.check_destination(source, destination, overwrite)
    if source.is_dir():
        saved_model_files.check(source, trusted)
    else:
        keras_files.check(source, trusted)


# -------------------------------------------------------------------------- verification


def _verified(
    directory: Path,
    exchanges: Mapping[str, ReferenceIO],
    tolerance: float | None,
    dtypes: set[str],
    opened_again: Callable[[Path], Any],
    counted: str,
    made_up: bool,
) -> tuple[dict[str, Comparison], dict[str, int]]:
    """Compares what is on disk with what the original gave.

    Returns:
        A comparison for each signature, and the operations of one of them.
    """
    from mbn_rewrite.frontends.saved_model.execution import Served
    from mbn_rewrite.frontends.saved_model.function_graph import op_counts
    from mbn_rewrite.frontends.saved_model.stretches import look_closer_at_served

    served = Served(directory)
    comparisons = {}

    @cache
    def both() -> tuple[Any, Any]:  # in the states in which they were saved
        return opened_again(directory.with_name("original")), Served(directory)

    def closer_look(name: str, exchange: ReferenceIO, plain: Comparison) -> Comparison | None:
        return look_closer_at_served(*both(), name, exchange, plain, rounding=tolerance is None)

    for name, exchange in exchanges.items():
        results = dict(served(name, exchange))
        expected = dict(exchange.outputs)
        if len(expected) == len(results) == 1:
            expected = dict(zip(results, expected.values(), strict=True))
        if set(expected) != set(results):
            raise RewriteError(
                f"signature '{name}' of the written model names its outputs {sorted(results)}, "
                f"that of the original {sorted(expected)}"
            )
        names = sorted(expected)
        if _gives_nothing(exchange, made_up):
            continue  # that it runs was seen
        allowed = tolerance_for(dtypes) if tolerance is None else tolerance
        comparisons[name] = judged(
            [expected[key] for key in names],
            [results[key] for key in names],
            allowed,
            partial(closer_look, name, exchange),
            [f"'{key}'" for key in names],
        )
        if not comparisons[name].ok:
            loaded = opened_again(directory.with_name("original_again"))
            _check_that_it_can_be_verified(name, exchange, comparisons[name], loaded, allowed)
    return comparisons, op_counts(served.signatures[counted]) if counted else {}


def _check_that_it_can_be_verified(
    name: str, exchange: ReferenceIO, comparison: Comparison, loaded: Any, tolerance: float
) -> None:
    """Raises RewriteError where outputs differ, but not by a mistake of ours.

    Args:
        name: of the signature or method.
        exchange: what the original gave.
        comparison: of that and what the rewritten model gave.
        loaded: the original, loaded again.
        tolerance: that was allowed.
    """
    from mbn_rewrite.frontends.saved_model.execution import repeated

    again = repeated(loaded, name, exchange)
    first, second = list(exchange.outputs.values()), list(again.outputs.values())
    if not comparison.compared:
        why = f"{comparison.note} (give inputs for which the original gives numbers)"
    elif not compare_outputs(first, second, tolerance).ok:
        why = "the original gives other outputs each time that it is called with the same inputs"
    else:
        return
    raise RewriteError(
        f"'{name}' cannot be verified: {why}. To carry it over unverified, pass "
        f"--unverified={name} (unverified=['{name}'] in Python)"
    )


def _gives_nothing(exchange: ReferenceIO, made_up: bool) -> bool:
    """Whether there is nothing to compare, which for inputs of the caller is a mistake."""
    empty = not any(array.size for array in exchange.outputs.values())
    return empty and (made_up or not exchange.outputs)

"""`rewrite_saved_model`: from a model on disk to a rewritten SavedModel on disk.

The output is written beside its destination, loaded again, compared with the original and
only then put in its place, so that it appears whole or not at all; see `output_dir`.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mbn_rewrite import output_dir
from mbn_rewrite.device import give_back_memory, older_objects_spared
from mbn_rewrite.errors import RewriteError, VerificationError
from mbn_rewrite.frontends.footprint import Footprint, bytes_on_disk
from mbn_rewrite.frontends.protocols import ModelSource
from mbn_rewrite.frontends.registry import check_source, open_source
from mbn_rewrite.latency import OnDisk, figure_on_disk, freezing_figure, not_measured
from mbn_rewrite.named_arrays import as_arrays
from mbn_rewrite.options import TRAINING_MODES, Mode, Options, checked_options
from mbn_rewrite.plans import Plan
from mbn_rewrite.report import Report
from mbn_rewrite.tuning.auto import plan_for
from mbn_rewrite.verification_on_disk import Reference, Verification, verified

Progress = Callable[[str], None]


@contextmanager
def _outside_strategies() -> Iterator[None]:
    """Context manager without a distribution strategy: what is written belongs to none."""
    if "tensorflow" not in sys.modules:
        yield
        return
    from mbn_rewrite.frontends.execution import outside_strategies

    with outside_strategies():
        yield


@contextmanager
def _tensorflow_spared() -> Iterator[None]:
    """Has collections of garbage leave the modules of TensorFlow alone, which it imports."""
    import tensorflow  # noqa: F401

    with older_objects_spared():
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
    set_input: Mapping[str, Any] | None = None,
    trusted: bool = False,
    dry_run: bool = False,
    inputs: Mapping[str, Any] | None = None,
    unverified: Sequence[str] = (),
    tolerance: float | None = None,
    batch_size: int | None = None,
    jit_compile: bool | None = None,
    dtype: str | None = None,
    budget: float | None = None,
    measure: bool = False,
    equalize: bool = False,
    freeze: bool = False,
    progress: Progress | None = None,
    keep_shared: bool = False,
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
        set_input: inputs of signatures of a SavedModel to set to a value for good, by name or by
            "signature/input", as {"phase_train": False}: a flag that says whether the model trains
            decides its branches then. Signatures have these inputs no more. What is written is
            compared with the original at that value.
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
        equalize: as for `convert`.
        freeze: whether weights become constants of the graphs. That may be faster, since TensorFlow
            then computes beforehand what depends on them alone. The written model has signatures
            and nothing else: no variables to train or to restore, no methods. Graphs hold less
            than 2 GiB. In mode "auto" they become constants where that measures faster, and the
            report says by how much.
        measure: whether to measure at the end how much faster than the original the written model
            is, for some seconds, run as `batch_size`, `jit_compile` and `dtype` say, in any mode.
            Both are loaded for that.
        progress: called with a line when a step begins.
        keep_shared: as for `convert`.

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
        measure=measure,
        equalize=equalize,
        keep_shared=keep_shared,
    )
    options = replace(options, inputs=None if inputs is None else as_arrays(inputs))
    _check_served(mode, tolerance)
    source, destination = Path(source), Path(destination)
    output_dir.clean_up(*([] if dry_run else [destination.absolute().parent]))
    check_paths(source, None if dry_run else destination, overwrite, trusted)
    options.progress(f"loading {source}")
    with _tensorflow_spared():
        model = open_source(source, trusted, tags, signatures, set_input)
        _leave_unverified(model, unverified, source)
        report = _planned(model, options, source)
        if dry_run:
            return report
        reference = _run(model, options)
        report = replace(
            report,
            destination=str(destination),
            unverified={**model.unverifiable, **reference.not_compared},
            by_xla=reference.by_xla,
        )
        with output_dir.working_folder(destination) as folder:
            weights = _write(model, report.plan, folder.new, options)
            del model  # so that the two are not in memory side by side
            if freeze:
                report, reference = _frozen(report, reference, folder, trusted, options)
            report = _verified(report, weights, folder.new, reference, tolerance, options)
            output_dir.put_in_place(folder, destination, overwrite)
        if measure:
            original = OnDisk(source, trusted, tags, set_input, report.before.signature or None)
            speed = figure_on_disk(
                original, destination, options, report.changed, report.after_operations
            )
            report = replace(report, speed=speed)
        return report


def verify_saved_model(
    source: str | os.PathLike[str],
    rewritten: str | os.PathLike[str],
    *,
    tags: Sequence[str] | None = None,
    signatures: Sequence[str] | None = None,
    set_input: Mapping[str, Any] | None = None,
    trusted: bool = False,
    inputs: Mapping[str, Any] | None = None,
    unverified: Sequence[str] = (),
    tolerance: float | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Compares a SavedModel with the model on disk that it was made from, by whatever tool.

    Args:
        source: the original, as for `rewrite_saved_model`.
        rewritten: the SavedModel.
        tags, signatures, set_input, ...: as for `rewrite_saved_model`.

    Returns:
        A Verification; `ok` says whether they agree.

    Raises:
        RewriteError: one of them cannot be read or run.
    """
    options = Options(inputs=None if inputs is None else as_arrays(inputs))
    options = replace(options, progress=progress or options.progress)
    source, rewritten = Path(source), Path(rewritten)
    for path in (source, rewritten):
        check_paths(path, None, trusted=trusted)
    if not rewritten.is_dir():
        raise RewriteError(f"{rewritten} is no SavedModel, whose signatures could be compared")
    options.progress(f"loading {source}")
    model = open_source(source, trusted, tags, signatures, set_input)
    _leave_unverified(model, unverified, source)
    reference = _run(model, options)
    without = {**model.unverifiable, **reference.not_compared}
    del model  # so that the two are not in memory side by side
    options.progress(f"running {rewritten}")
    with output_dir.temporary_folder() as folder:  # a closer look writes beside the model
        link = folder.path / "rewritten"
        link.symlink_to(rewritten.absolute(), target_is_directory=True)
        comparisons, _ = verified(link, reference, tolerance, "")
    return Verification(comparisons, without)


def _check_served(mode: str, tolerance: float | None) -> None:
    """Raises RewriteError where options make no sense for a model that is to be served."""
    if mode in TRAINING_MODES:
        raise RewriteError(
            f'mode "{mode}" is for training, and a model on disk is there to be served. Use '
            '"auto", "fold" or "depthwise", or mbn_rewrite.convert on a Keras model'
        )
    if tolerance is not None and not 0 <= tolerance < np.inf:
        raise RewriteError(f"the tolerance must be a number from 0 up, not {tolerance}")


def _leave_unverified(model: ModelSource, names: Sequence[str], source: Path) -> None:
    """Has signatures and methods be carried over without a comparison."""
    unknown = sorted(set(names) - set(model.names))
    if unknown:
        raise RewriteError(
            f"unverified names {', '.join(unknown)}, which {source} does not have. It has "
            f"{', '.join(sorted(model.names))}"
        )
    model.unverifiable.update(dict.fromkeys(names, "as it was asked for"))


def _planned(model: ModelSource, options: Options, source: Path) -> Report:
    """The report on a model for which nothing has been written yet."""
    options.progress(f"planning, mode {options.mode}")
    if options.inputs is not None and options.mode == "auto":
        model.check_inputs(options.inputs)  # before measuring, which takes a while
    plan = plan_for(model, options)
    return Report(
        str(source),
        "",
        plan,
        model.footprint,
        as_it_was=model.as_it_was,
        left_out=model.left_out,
    )


def _run(model: ModelSource, options: Options) -> Reference:
    """Outputs of the original, to compare with."""
    options.progress("running the original")
    give_back_memory()
    calls = model.reference_io(options.inputs)
    give_back_memory()
    return Reference(calls, options.inputs is None, model.dtypes, model.opened_again)


def _write(model: ModelSource, plan: Plan, directory: Path, options: Options) -> int:
    """Writes the rewritten model; returns the number of its weights."""
    from mbn_rewrite.frontends.execution import without_saying_where

    options.progress("writing")
    with without_saying_where():  # it is not there that it stays
        return model.write(plan, directory)


def _frozen(
    report: Report,
    reference: Reference,
    folder: output_dir.OwnFolder,
    trusted: bool,
    options: Options,
) -> tuple[Report, Reference]:
    """Freezes what was written; the report on that, and what there is to compare.

    In mode "auto" the frozen model is a candidate: it is taken if it can be had and measures
    faster.
    """
    from mbn_rewrite.frontends.execution import without_saying_where
    from mbn_rewrite.frontends.saved_model.freezing import freeze

    options.progress("freezing")
    frozen = folder.path / "frozen"
    try:
        with without_saying_where():
            signatures = freeze(folder.new, frozen)
    except RewriteError as error:
        if options.mode != "auto":
            raise
        return replace(report, freezing=not_measured(str(error), options)), reference
    if options.mode == "auto":
        with_variables = OnDisk(folder.new, trusted, signature=report.before.signature or None)
        with_constants = replace(with_variables, path=frozen)
        measured = freezing_figure(with_variables, with_constants, options)
        report = replace(report, freezing=measured)
        if not measured.is_faster:
            shutil.rmtree(frozen)
            return report, reference
    shutil.rmtree(folder.new)
    frozen.rename(folder.new)
    # Methods are gone, those that were not to be compared, too.
    methods = [name for name in (*reference.calls, *report.unverified) if name not in signatures]
    left = dict.fromkeys(methods, "a frozen model has signatures and nothing else")
    calls = {name: call for name, call in reference.calls.items() if name not in left}
    unverified = {name: why for name, why in report.unverified.items() if name not in left}
    left_out = {**report.left_out, **left}
    report = replace(report, left_out=left_out, unverified=unverified, frozen=True)
    return report, replace(reference, calls=calls)


def _verified(
    report: Report,
    weights: int,
    directory: Path,
    reference: Reference,
    tolerance: float | None,
    options: Options,
) -> Report:
    """The report with what was written, once that gives the original's outputs."""
    give_back_memory()
    options.progress("verifying what was written")
    counted = report.before.signature
    comparisons, ops = verified(directory, reference, tolerance, counted)
    after = Footprint(weights, bytes_on_disk(directory), ops, counted)
    report = replace(report, after=after, comparisons=comparisons)
    _check_equal(report)
    return report


def _check_equal(report: Report) -> None:
    """Raises VerificationError where a signature differs from the original's."""
    if report.ok:
        return
    worst, comparison = next((name, c) for name, c in report.comparisons.items() if not c.ok)
    raise VerificationError(
        f"the rewritten model does not give the original's outputs ({worst}: {comparison}); "
        f"nothing was written to {report.destination}",
        report.plan,
        comparison,
        report,
    )


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
    check_source(source, trusted)

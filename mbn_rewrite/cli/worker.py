"""The process that works for the command-line tool: all that may hang, crash or act is done here.

It reads a job from its standard input, says how far it is through a socket, and ends with that
socket: when the tool is gone, nobody needs the result.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from mbn_rewrite.cli.job import (
    DIFFERENT,
    DONE,
    FIGURE,
    MEASURE,
    NO_MEMORY,
    REFUSED,
    REWRITE,
    UNEXPECTED,
    VERIFY,
    Ending,
    Job,
    Step,
    ending_to_json,
    step_to_json,
)
from mbn_rewrite.errors import RewriteError, VerificationError, cause_of, is_out_of_memory
from mbn_rewrite.options import DEFAULT_BUDGET
from mbn_rewrite.tables import Page, laid_out_for
from mbn_rewrite.tuning.trial import MEASURING

if TYPE_CHECKING:
    from mbn_rewrite.report import Report

_Inputs = Mapping[str, Any] | None
_Progress = Callable[[str], None]

# It takes seconds, and on busy machines a minute, which says nothing of the model.
_STARTING = Step("starting TensorFlow", planned=300.0)


def main() -> None:
    """Does the job on standard input; the argument is the number of the socket to the tool."""
    channel = socket.socket(fileno=int(sys.argv[1]))
    channel.set_inheritable(False)
    _end_with(channel)
    job = Job.from_json(sys.stdin.read())

    def say(message: str) -> None:
        channel.sendall(f"{message}\n".encode())

    ending = carry_out(job, lambda step: say(step_to_json(step)))
    with suppress(Exception):  # whatever a model has made of it
        sys.stdout.flush()
    say(ending_to_json(ending))


def _end_with(channel: socket.socket) -> None:
    """Has this process end when the tool does."""
    if sys.platform == "linux":
        # The kernel sees to it, even while native code holds the interpreter.
        ctypes.CDLL(None).prctl(ctypes.c_int(1), ctypes.c_ulong(signal.SIGKILL))  # PR_SET_PDEATHSIG

    def watch() -> None:
        channel.recv(1)  # the tool says nothing: this returns when its end is closed
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def carry_out(job: Job, begin: Callable[[Step], None]) -> Ending:
    """Does a job.

    Args:
        job: what to do.
        begin: called when a step begins.
    """
    try:
        with laid_out_for(Page(job.width, job.encoding)):
            return _carried_out(job, begin)
    except RewriteError as error:
        return Ending(REFUSED, _for_the_user(job, error))
    except BaseException as error:  # what a model raises, or what it calls to end the process
        if is_out_of_memory(error):
            return Ending(NO_MEMORY)
        return Ending(UNEXPECTED, _for_the_user(job, f"{type(error).__name__}: {_told(error)}"))


def _carried_out(job: Job, begin: Callable[[Step], None]) -> Ending:
    from mbn_rewrite.cli.quiet import import_tensorflow
    from mbn_rewrite.rewrite import check_paths

    # What is wrong with files is said at once: TensorFlow takes seconds to load.
    for path in (job.source, *job.others):
        check_paths(Path(path), None, trusted=job.options.get("trusted", False))
    inputs = _load_inputs(job.inputs)
    begin(_STARTING)
    import_tensorflow(job.quiet_log, job.threads)
    _import(job.import_modules)
    return _TASKS[job.task](job, inputs, lambda line: begin(Step(line, _planned(job, line))))


def _rewritten(job: Job, inputs: _Inputs, progress: _Progress) -> Ending:
    from mbn_rewrite.rewrite import rewrite_saved_model

    how, message = DONE, ""
    try:
        report = rewrite_saved_model(
            job.source, job.folder, **job.options, inputs=inputs, dry_run=not job.folder,
            progress=progress,
        )  # fmt: skip
    except VerificationError as error:
        how, message, report = DIFFERENT, _for_the_user(job, error), cast("Report", error.report)
    report = replace(report, destination=job.destination)
    return Ending(how, message, report.table(job.full), report.to_dict())


def _compared(job: Job, inputs: _Inputs, progress: _Progress) -> Ending:
    from mbn_rewrite.rewrite import verify_saved_model

    (new,) = job.others
    found = verify_saved_model(job.source, new, **job.options, inputs=inputs, progress=progress)
    message = "" if found.ok else f"{new} does not give the outputs of {job.source}"
    return Ending(DONE if found.ok else DIFFERENT, message, str(found), found.to_dict())


def _measured(job: Job, inputs: _Inputs, progress: _Progress) -> Ending:
    from mbn_rewrite.latency import measure

    paths = (job.source, *job.others)
    found = measure(*paths, **job.options, inputs=inputs, progress=progress)
    found = replace(found, threads=job.threads or None)
    return Ending(DONE, text=str(found), report=found.to_dict())


def _speed(job: Job, inputs: _Inputs, progress: _Progress) -> Ending:
    from mbn_rewrite.latency import OnDisk, figure_on_disk
    from mbn_rewrite.options import Options, RunConfig

    (written,) = map(Path, job.others)
    original = OnDisk(Path(job.source), **job.options["opened"])
    run_config = RunConfig(**job.options["run_config"])
    options = Options(run_config=run_config, inputs=inputs, progress=progress)
    found = figure_on_disk(original, written, options, True, job.options["operations"])
    return Ending(DONE, text=found.figure, report=found.to_dict())


_TASKS: Mapping[str, Callable[[Job, _Inputs, _Progress], Ending]] = {
    REWRITE: _rewritten,
    VERIFY: _compared,
    MEASURE: _measured,
    FIGURE: _speed,
}


def _planned(job: Job, line: str) -> float:
    """Seconds that a step takes whatever the model is: a step that measures takes the budget."""
    if not line.startswith(MEASURING):
        return 0.0
    budget = job.options.get("seconds", job.options.get("budget"))
    return DEFAULT_BUDGET if budget is None else float(budget)


def _for_the_user(job: Job, said: object) -> str:
    """A message that names the output in place of the folder that is written to."""
    return str(said).replace(job.folder, job.destination) if job.folder else str(said)


def _told(error: BaseException) -> str:
    """Message of an unexpected error, and the line of this package that it came from."""
    frames = traceback.extract_tb(error.__traceback__)
    here = str(Path(__file__).parents[1])
    ours = [frame for frame in frames if frame.filename.startswith(here)]
    where = "".join(f" ({Path(f.filename).relative_to(here)}:{f.lineno})" for f in ours[-1:])
    return f"{cause_of(error).rstrip('.')}{where}"


def _load_inputs(path: str | None) -> Mapping[str, Any] | None:
    if path is None:
        return None
    import numpy as np

    try:
        with open(path, "rb") as file, np.load(file) as arrays:
            return dict(arrays)
    except Exception as error:  # zip files, pickles and headers fail in many ways
        raise RewriteError(
            f"--inputs: {path} is no .npz file of plain arrays: {cause_of(error)}"
        ) from error


def _import(modules: tuple[str, ...]) -> None:
    if modules:
        sys.path.append(os.getcwd())
    for module in modules:
        try:
            importlib.import_module(module)
        except (Exception, SystemExit) as error:
            raise RewriteError(f"--import_modules: {module}: {cause_of(error)}") from error

#!/usr/bin/env python3
"""Rewrites the BatchNormalization of a model on disk.

    python tools/rewrite_savedmodel.py [FLAGS] IN OUT

IN is any SavedModel (of TensorFlow 1 or 2, Keras 2 or 3, frozen or not), or a .h5, .hdf5 or
.keras file of tf_keras or Keras 3. OUT is the directory of the SavedModel to write, with the
signatures, methods, assets and tables of IN. IN is never changed; OUT appears only when the
written model was loaded again and every signature gave the outputs of the original.

Examples:
    python tools/rewrite_savedmodel.py saved_model served
    python tools/rewrite_savedmodel.py --dry_run saved_model
    python tools/rewrite_savedmodel.py --batch_size=8 --jit_compile saved_model served
    python tools/rewrite_savedmodel.py --mode=depthwise model.keras served
    python tools/rewrite_savedmodel.py --report=report.json --overwrite model.h5 served
    python tools/rewrite_savedmodel.py --verify_inputs=real_inputs.npz saved_model served
    python tools/rewrite_savedmodel.py --unverified=from_text,sample saved_model served
    python tools/rewrite_savedmodel.py --signatures=serving_default --tags=serve in out

A SavedModel is a program, and so may be what a file of Keras holds; to verify it is to run it,
and so is to measure it (mode auto). It is loaded and run in a process of its own: a model that
crashes, uses up the memory or does not end (--timeout) is one line here, and leaves nothing
behind.

Exit codes:
    0    done
    1    the input cannot be read or rewritten, crashes or takes too long, the output cannot be
         written, or a flag is wrong: one line says why
    3    the rewritten model did not give the original's outputs: the numbers are printed,
         nothing is written
    129  SIGHUP, 130 SIGINT (Ctrl-C), 143 SIGTERM: interrupted; one line says whether anything
         was written
"""

from __future__ import annotations

import os
import signal
import sys

if __name__ == "__main__":  # first of all: importing the rest takes a while

    def _end_at_once(number: int, _: object) -> None:
        how = b"" if number == signal.SIGINT else b" by " + signal.Signals(number).name.encode()
        try:
            os.write(2, b"interrupted%s: nothing was written\n" % how)
        finally:
            os._exit(128 + number)

    for _signal in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(_signal) is not signal.SIG_IGN:
            signal.signal(_signal, _end_at_once)
    for _stream in (0, 1, 2):  # one that is closed must not become a file that is opened later
        try:
            os.fstat(_stream)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = sys.stdout or open(1, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w")  # noqa: SIM115

# The repository's own package comes first, so that the tool runs without installation.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import json
import math
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NoReturn

from absl import app, flags

from mbn_rewrite import output_dir
from mbn_rewrite.cli.interrupts import Interrupted, Interrupts
from mbn_rewrite.cli.job import DIFFERENT, DONE, Ending, Job, Step
from mbn_rewrite.cli.supervisor import Limits, supervised
from mbn_rewrite.errors import RewriteError, cause_of
from mbn_rewrite.options import MODES, TRAINING_MODES
from mbn_rewrite.output_dir import OwnFolder
from mbn_rewrite.tables import WITHOUT_TERMINAL
from mbn_rewrite.tuning.timing import DEFAULT_BUDGET, DTYPES

FLAGS = flags.FLAGS
_SERVING = {mode: what for mode, what in MODES.items() if mode not in TRAINING_MODES}
flags.DEFINE_enum(
    "mode", "auto", list(_SERVING), "; ".join(f"{mode}: {what}" for mode, what in _SERVING.items())
)
flags.DEFINE_integer(
    "batch_size", None, "Mode auto: measure calls of so many examples. 1 by default.", lower_bound=1
)
flags.DEFINE_bool("jit_compile", None, "Mode auto: measure the model compiled by XLA.")
flags.DEFINE_enum(
    "dtype",
    None,
    list(DTYPES),
    "Mode auto: measure with TensorFlow's automatic mixed precision (float16 on GPUs, bfloat16 on "
    "CPUs). By default the model computes in the dtypes that it says.",
)
flags.DEFINE_float(
    "budget",
    None,
    f"Mode auto: the most seconds to take for measuring, about. {DEFAULT_BUDGET:g} by default.",
    lower_bound=0.0,
)
flags.DEFINE_bool("dry_run", False, "Print what would be done; OUT is not needed.")
flags.DEFINE_bool("overwrite", False, "Replace OUT if it is a SavedModel.")
flags.DEFINE_string("report", None, "Write decisions and verification to this file, as JSON.")
flags.DEFINE_string(
    "verify_inputs",
    None,
    "Verify with these inputs: an .npz file with an array for each input, by its name, or by "
    "SIGNATURE/NAME where signatures differ. By default inputs are made up.",
)
flags.DEFINE_list(
    "unverified",
    [],
    "Carry over these signatures and methods without comparing what they give: where no inputs can "
    "be made up and none are at hand, or outputs differ from call to call.",
)
flags.DEFINE_float(
    "tolerance",
    None,
    "The largest error to accept, relative to the largest output. By default what rounding "
    "in the model's dtype explains.",
    lower_bound=0.0,
)
flags.DEFINE_list(
    "signatures",
    None,
    "Carry over these signatures of a SavedModel only. By default all, and the methods that the "
    "loaded object has.",
)
flags.DEFINE_list(
    "tags", None, 'The tags of the graph in a SavedModel that has several. By default "serve".'
)
flags.DEFINE_bool(
    "trusted",
    False,
    "Do all that IN says: run code that a Keras file holds (Lambda layers), and operations that "
    "write or read files or run Python. A model is a program; by default only what is known to "
    "compute is run, and what is not run is not verified.",
)
flags.DEFINE_list(
    "import_modules", [], "Python modules that define the custom layers or operations of IN."
)
flags.DEFINE_float(
    "timeout",
    600.0,
    "The most seconds that one step may take: opening, planning, running the original, writing or "
    "verifying. Measuring may take the budget beside. 0 for no limit.",
    lower_bound=0.0,
)
flags.DEFINE_bool("quiet", False, "Print errors only, and what was not verified.")

EXIT_ERROR, EXIT_DIFFERENT = 1, 3


# What does a job in place of a process of its own; see `worker.carry_out`.
CarryOut = Callable[[Job, Callable[[Step], None]], Ending]


def main(argv: list[str], interrupts: Interrupts, carry_out: CarryOut | None = None) -> int:
    """Rewrites a model as the flags say; returns the exit code."""
    try:
        return _run(argv[1:], interrupts, carry_out)
    except Interrupted as interrupted:
        _say(interrupted.said("nothing was written"))
        return interrupted.exit_code
    except RewriteError as error:
        _say(f"error: {error}")
    except Exception as error:  # a fault of this program, of which a user need not see the insides
        _say(f"error: {type(error).__name__}: {cause_of(error)} Please report this line")
    return EXIT_ERROR


def _run(paths: list[str], interrupts: Interrupts, carry_out: CarryOut | None) -> int:
    wanted = "IN" if FLAGS.dry_run else "IN and OUT"
    if len(paths) not in ((1, 2) if FLAGS.dry_run else (2,)):
        raise RewriteError(f"give {wanted} (got {len(paths)} paths); --help has examples")
    source, destination = Path(paths[0]), None if FLAGS.dry_run else Path(paths[1])
    _check_report(source, destination)
    places = [Path(path).absolute().parent for path in (destination, FLAGS.report) if path]
    for restored in output_dir.clean_up(*places):
        _say(f"put back {restored}, which a run that was killed had moved aside")
    if destination:
        output_dir.check_destination(source, destination, FLAGS.overwrite)
    with ExitStack() as stack:
        # What a run that was killed just now had in use when this one began.
        stack.callback(output_dir.clean_up, *places)
        temporary = stack.enter_context(output_dir.temporary_folder())
        folder = None
        if destination:
            folder = stack.enter_context(output_dir.working_folder(destination))
        job = _job(source, destination, folder)
        if carry_out is None:
            ending = _supervised(job, interrupts, temporary, folder)
        else:
            ending = carry_out(job, lambda step: _begin(step.line) if step.shown else None)
        interrupts.check()
        if folder and destination and ending.how == DONE:
            output_dir.put_in_place(folder, destination, FLAGS.overwrite)
    return _ended(ending, destination, interrupts)


def _job(source: Path, destination: Path | None, folder: OwnFolder | None) -> Job:
    options = {
        "mode": FLAGS.mode,
        "tags": FLAGS.tags,
        "signatures": FLAGS.signatures,
        "trusted": FLAGS.trusted,
        "unverified": FLAGS.unverified,
        "tolerance": FLAGS.tolerance,
        "batch_size": FLAGS.batch_size,
        "jit_compile": FLAGS.jit_compile,
        "dtype": FLAGS.dtype,
        "budget": FLAGS.budget,
    }
    return Job(
        str(source),
        str(destination or ""),
        str(folder.new) if folder else "",
        options,
        FLAGS.verify_inputs,
        tuple(FLAGS.import_modules),
        shutil.get_terminal_size().columns if sys.stdout.isatty() else WITHOUT_TERMINAL,
        quiet_log=not FLAGS["verbosity"].present,
    )


def _supervised(
    job: Job, interrupts: Interrupts, temporary: OwnFolder, folder: OwnFolder | None
) -> Ending:
    limits = Limits(
        FLAGS.timeout or math.inf,
        {
            "TMPDIR": str(temporary.path),
            "TF_CPP_MIN_LOG_LEVEL": os.environ.get("TF_CPP_MIN_LOG_LEVEL", "2"),
        },
        keep_open=[own.fileno() for own in (temporary, folder) if own],
    )
    return supervised(job, _begin, _pass_on, interrupts, limits)


def _ended(ending: Ending, destination: Path | None, interrupts: Interrupts) -> int:
    """Reports how a job ended; returns the exit code."""
    written = destination is not None and ending.how == DONE
    what = f"{destination} was written" if written else "nothing was written"
    # What others read comes first: printing may take as long as its reader likes.
    reported = not ending.report or _write_report(ending.report, what)
    interrupts.end_at_once(what)
    if interrupts.number is not None:
        interrupted = Interrupted(interrupts.number)
        _say(interrupted.said(what))
        return interrupted.exit_code
    if ending.how == DIFFERENT:
        _say(f"error: {ending.message}\n{ending.text}")
        return EXIT_DIFFERENT
    if ending.how != DONE:
        raise RewriteError(ending.message)
    if written:
        _warn_of_what_was_not_verified(ending.report)
    if not FLAGS.quiet:
        last = f"wrote {destination}" if written else "dry run: wrote nothing"
        reported = _print(f"{ending.text}\n{last}\n", what) and reported
    return 0 if reported else EXIT_ERROR


def _warn_of_what_was_not_verified(report: Mapping[str, Any]) -> None:
    for name, why in report["verification"]["unverified"].items():
        _say(f"warning: '{name}' was not verified: {why}")


def _check_report(source: Path, destination: Path | None) -> None:
    """Raises RewriteError where the report would overwrite a model, or cannot be written."""
    if FLAGS.report is None:
        return
    report = Path(FLAGS.report)
    try:
        place = report.resolve()
        for model in filter(None, (source, destination)):
            if model.resolve() in (place, *place.parents):
                raise RewriteError(f"the report {report} would lie in {model}. Give another path")
        if not FLAGS.report or (place.exists() and not place.is_file()):
            raise RewriteError(f"the report {FLAGS.report!r} is no file. Give another path")
        if not place.parent.is_dir():
            raise RewriteError(f"there is no directory for the report {report}")
    except (OSError, RuntimeError) as error:
        raise RewriteError(f"the report cannot be written: {cause_of(error)}") from error


def _write_report(report: Mapping[str, Any], what: str) -> bool:
    """Writes the report whole or not at all; says so where it cannot."""
    if not FLAGS.report:
        return True
    place = Path(FLAGS.report).resolve()
    try:
        with output_dir.working_folder(place) as folder:
            folder.new.write_text(json.dumps(report, indent=2) + "\n")
            folder.new.replace(place)
    except RewriteError as error:
        _say(f"error: {what}, but the report cannot be: {error}")
        return False
    return True


# ------------------------------------------------------------------------ what is printed


def _begin(line: str) -> None:
    if not FLAGS.quiet:
        _say(f"{line} ...")


def _say(line: str) -> None:
    """Prints a line for people; whether somebody reads it makes no difference to what is done."""
    with suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def _pass_on(printed: bytes) -> None:
    """What the process that works has printed."""
    with suppress(OSError):
        sys.stderr.buffer.write(printed)
        sys.stderr.flush()


def _print(text: str, what: str) -> bool:
    """Prints the result; says so where it cannot."""
    try:
        print(text, end="", flush=True)
    except BrokenPipeError:
        pass  # who read it had read enough
    except OSError as error:
        _say(f"error: {what}, but what was done cannot be printed: {cause_of(error)}")
        return False
    return True


def _parse_flags(argv: list[str]) -> list[str]:
    try:
        return FLAGS(argv)
    except flags.Error as error:
        _say(f"error: {error}; --help lists the flags")
        sys.exit(EXIT_ERROR)


def _end(code: int) -> NoReturn:
    """Ends the process, without what Python does at its end, where a signal would be lost."""
    with suppress(OSError):
        sys.stdout.flush()
    os._exit(code)


def _as_process(argv: list[str]) -> NoReturn:
    with Interrupts() as interrupts:
        _end(main(argv, interrupts))


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")
    try:
        app.run(_as_process, flags_parser=_parse_flags)
    except SystemExit as end:  # of --help, and wrong flags
        _end(end.code if isinstance(end.code, int) else EXIT_ERROR)
    except BrokenPipeError:  # who read the help had read enough
        _end(EXIT_ERROR)
    except OSError as error:
        _say(f"error: nothing can be printed: {cause_of(error)}")
        _end(EXIT_ERROR)

"""Work of the command `mbn-rewrite`: from its flags to a job, and from how that ended to files."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from mbn_rewrite import output_dir
from mbn_rewrite.cli import report_file
from mbn_rewrite.cli.console import pass_on, print_result, say
from mbn_rewrite.cli.flags import EXIT_ERROR, FLAGS
from mbn_rewrite.cli.given_values import set_inputs_in
from mbn_rewrite.cli.interrupts import Interrupted, Interrupts
from mbn_rewrite.cli.job import DIFFERENT, DONE, Ending, Job, Step
from mbn_rewrite.cli.supervisor import Limits, supervised
from mbn_rewrite.errors import RewriteError, cause_of
from mbn_rewrite.output_dir import OwnFolder
from mbn_rewrite.tables import standard_output

EXIT_DIFFERENT = 3

# What does a job in place of a process of its own; see `worker.carry_out`.
CarryOut = Callable[[Job, Callable[[Step], None]], Ending]


def run(paths: list[str], interrupts: Interrupts, carry_out: CarryOut | None = None) -> int:
    """Rewrites a model as the flags say.

    Args:
        paths: what was given beside flags: IN and OUT, if all is well.
        interrupts: noted signals.
        carry_out: does the job in this process, for tests; by default a process of its own does.

    Returns:
        The exit code.
    """
    try:
        return _run(paths, interrupts, carry_out)
    except Interrupted as interrupted:
        say(interrupted.said("nothing was written"))
        return interrupted.exit_code
    except RewriteError as error:
        say(f"error: {error}")
    except Exception as error:  # a fault of this program, of which a user need not see the insides
        say(f"error: {type(error).__name__}: {cause_of(error)} Please report this line")
    return EXIT_ERROR


def _run(paths: list[str], interrupts: Interrupts, carry_out: CarryOut | None) -> int:
    wanted = "IN" if FLAGS.dry_run else "IN and OUT"
    if len(paths) not in ((1, 2) if FLAGS.dry_run else (2,)):
        raise RewriteError(f"give {wanted} (got {len(paths)} paths); --help has examples")
    source, destination = Path(paths[0]), None if FLAGS.dry_run else Path(paths[1])
    report_file.check(FLAGS.report, source, destination)
    places = [Path(path).absolute().parent for path in (destination, FLAGS.report) if path]
    for restored in output_dir.clean_up(*places):
        say(f"put back {restored}, which a run that was killed had moved aside")
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
        "set_input": set_inputs_in(FLAGS.set_input),
        "trusted": FLAGS.trusted,
        "unverified": FLAGS.unverified,
        "tolerance": FLAGS.tolerance,
        "batch_size": FLAGS.batch_size,
        "jit_compile": FLAGS.jit_compile,
        "dtype": FLAGS.dtype,
        "budget": FLAGS.budget,
        "keep_shared": FLAGS.keep_shared,
    }
    page = standard_output()
    return Job(
        str(source),
        str(destination or ""),
        str(folder.new) if folder else "",
        options,
        FLAGS.verify_inputs,
        tuple(FLAGS.import_modules),
        page.width,
        page.encoding,
        FLAGS.full,
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
    return supervised(job, _begin, pass_on, interrupts, limits)


def _ended(ending: Ending, destination: Path | None, interrupts: Interrupts) -> int:
    """Reports how a job ended; returns the exit code."""
    written = destination is not None and ending.how == DONE
    what = f"{destination} was written" if written else "nothing was written"
    # What others read comes first: printing may take as long as its reader likes.
    reported = not ending.report or report_file.write(FLAGS.report, ending.report, what)
    interrupts.end_at_once(what)
    if interrupts.number is not None:
        interrupted = Interrupted(interrupts.number)
        say(interrupted.said(what))
        return interrupted.exit_code
    if ending.how == DIFFERENT:
        say(f"error: {ending.message}\n{ending.text}")
        return EXIT_DIFFERENT
    if ending.how != DONE:
        raise RewriteError(ending.message)
    if written:
        _warn_of_what_was_not_verified(ending.report)
    if not FLAGS.quiet:
        last = f"wrote {destination}" if written else "dry run: wrote nothing"
        reported = print_result(f"{ending.text}\n{last}\n", what) and reported
    return 0 if reported else EXIT_ERROR


def _warn_of_what_was_not_verified(report: Mapping[str, Any]) -> None:
    for name, why in report["verification"]["unverified"].items():
        say(f"warning: '{name}' was not verified: {why}")


def _begin(line: str) -> None:
    if not FLAGS.quiet:
        say(f"{line} ...")

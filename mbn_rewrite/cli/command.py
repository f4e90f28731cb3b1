"""Work of the command `mbn-rewrite`: from its flags to a job, and from how that ended to files."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from mbn_rewrite import charts, output_dir
from mbn_rewrite.cli import report_file
from mbn_rewrite.cli.console import pass_on, print_result, say
from mbn_rewrite.cli.flags import EXIT_ERROR, FLAGS
from mbn_rewrite.cli.given_values import set_inputs_in
from mbn_rewrite.cli.interrupts import Interrupted, Interrupts
from mbn_rewrite.cli.job import DIFFERENT, DONE, MEASURE, VERIFY, Ending, Job, Step
from mbn_rewrite.cli.speed import measuring_options, next_steps, running_flags, with_speed
from mbn_rewrite.cli.subcommands import PLAN, check_flags, command_of
from mbn_rewrite.cli.supervisor import Limits, supervised
from mbn_rewrite.errors import RewriteError, cause_of
from mbn_rewrite.output_dir import OwnFolder
from mbn_rewrite.tables import standard_output

EXIT_DIFFERENT = 3

# What does a job in place of a process of its own; see `worker.carry_out`.
CarryOut = Callable[[Job, Callable[[Step], None]], Ending]


def run(arguments: list[str], interrupts: Interrupts, carry_out: CarryOut | None = None) -> int:
    """Does what the arguments and flags say.

    Args:
        arguments: what was given beside flags: a command, or none, and paths.
        interrupts: noted signals.
        carry_out: does the job in this process, for tests; by default a process of its own does.

    Returns:
        The exit code.
    """
    try:
        return _run(arguments, interrupts, carry_out)
    except Interrupted as interrupted:
        say(interrupted.said("nothing was written"))
        return interrupted.exit_code
    except RewriteError as error:
        say(f"error: {error}")
    except Exception as error:  # a fault of this program, of which a user need not see the insides
        say(f"error: {type(error).__name__}: {cause_of(error)} Please report this line")
    return EXIT_ERROR


def _run(arguments: list[str], interrupts: Interrupts, carry_out: CarryOut | None) -> int:
    command, paths = command_of(arguments)
    check_flags(command)
    if command in (VERIFY, MEASURE):
        return _report_on(command, paths, interrupts, carry_out)
    return _rewrite(paths, FLAGS.dry_run or command == PLAN, interrupts, carry_out)


# ------------------------------------------------------------------------------- rewriting


def _rewrite(
    paths: list[str], plan_only: bool, interrupts: Interrupts, carry_out: CarryOut | None
) -> int:
    wanted = "IN" if plan_only else "IN and OUT"
    if len(paths) not in ((1, 2) if plan_only else (2,)):
        raise RewriteError(f"give {wanted} (got {len(paths)} paths); --help has examples")
    source, destination = Path(paths[0]), None if plan_only else Path(paths[1])
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
        job = _rewriting(source, destination, folder)
        ending = _done(job, interrupts, temporary, folder, carry_out)
        interrupts.check()
        if folder and destination and ending.how == DONE:
            output_dir.put_in_place(folder, destination, FLAGS.overwrite)
            if _is_to_be_measured(ending):
                ending = with_speed(
                    ending, job, lambda job: _done(job, interrupts, temporary, None, carry_out)
                )
    return _ended(ending, destination, interrupts)


def _rewriting(source: Path, destination: Path | None, folder: OwnFolder | None) -> Job:
    options = {
        **_verifying_options(),
        "mode": FLAGS.mode,
        "budget": FLAGS.budget,
        "equalize": FLAGS.equalize,
        "freeze": FLAGS.freeze,
        "keep_shared": FLAGS.keep_shared,
    }
    if FLAGS.mode == "auto":
        options |= running_flags()
    elif any(value is not None for value in running_flags().values()) and not FLAGS.measure:
        raise RewriteError(
            f"mode {FLAGS.mode} measures nothing, and --nomeasure leaves out the figure at the "
            "end: so there is nothing that --batch_size, --jit_compile or --dtype could tell"
        )
    written = {"destination": str(destination or ""), "folder": str(folder.new) if folder else ""}
    return _job(source, options, **written, full=FLAGS.full)


def _is_to_be_measured(ending: Ending) -> bool:
    is_seen = not FLAGS.quiet or FLAGS.report
    return bool(FLAGS.measure and is_seen and ending.report)


def _job(source: Path, options: Mapping[str, Any], **given: Any) -> Job:
    page = standard_output()
    return Job(
        str(source),
        options=options,
        inputs=FLAGS.inputs,
        import_modules=tuple(FLAGS.import_modules),
        width=page.width,
        encoding=page.encoding,
        quiet_log=not FLAGS["verbosity"].present,
        **given,
    )


def _done(
    job: Job,
    interrupts: Interrupts,
    temporary: OwnFolder,
    folder: OwnFolder | None,
    carry_out: CarryOut | None,
) -> Ending:
    """How a job has ended, which a process of its own does, or in tests this one."""
    if carry_out is None:
        return _supervised(job, interrupts, temporary, folder)
    return carry_out(job, lambda step: _begin(step.line))


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
        last = next_steps(destination) if destination else "dry run: wrote nothing"
        reported = print_result(f"{ending.text}\n{last}\n", what) and reported
    return 0 if reported else EXIT_ERROR


def _warn_of_what_was_not_verified(report: Mapping[str, Any]) -> None:
    for name, why in report["verification"]["unverified"].items():
        say(f"warning: '{name}' was not verified: {why}")


# ------------------------------------------------------------------ comparing and measuring


def _report_on(
    command: str, paths: list[str], interrupts: Interrupts, carry_out: CarryOut | None
) -> int:
    """Compares or measures models; writes no model."""
    if command == VERIFY and len(paths) != 2:
        raise RewriteError(f"verify takes IN and OUT (got {len(paths)} paths); see --help")
    if not paths:
        raise RewriteError("measure takes the paths of models; see --help")
    for path in paths:
        report_file.check(FLAGS.report, Path(path), None)
    charts.check(FLAGS.chart)
    options = measuring_options() if command == MEASURE else _verifying_options()
    job = _job(
        Path(paths[0]), options, task=command, others=tuple(paths[1:]), threads=FLAGS.threads or 0
    )
    with output_dir.temporary_folder() as temporary:
        ending = _done(job, interrupts, temporary, None, carry_out)
        interrupts.check()
    if ending.how not in (DONE, DIFFERENT):
        raise RewriteError(ending.message)
    what = "that was done"
    done = report_file.write(FLAGS.report, ending.report, what)
    if FLAGS.chart:
        charts.draw_latencies(ending.report, FLAGS.chart)
    if not FLAGS.quiet:
        done = print_result(f"{ending.text}\n", what) and done
    if ending.how == DIFFERENT:
        say(f"error: {ending.message}")
        return EXIT_DIFFERENT
    return 0 if done else EXIT_ERROR


def _verifying_options() -> dict[str, Any]:
    return {
        "tags": FLAGS.tags,
        "signatures": FLAGS.signatures,
        "set_input": set_inputs_in(FLAGS.set_input),
        "trusted": FLAGS.trusted,
        "unverified": FLAGS.unverified,
        "tolerance": FLAGS.tolerance,
    }


def _begin(line: str) -> None:
    if not FLAGS.quiet:
        say(f"{line} ...")

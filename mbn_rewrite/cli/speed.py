"""The figure that a run of the tool ends with, and what can be done next."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from mbn_rewrite.cli.flags import FLAGS
from mbn_rewrite.cli.interrupts import Interrupted
from mbn_rewrite.cli.job import DONE, FIGURE, Ending, Job
from mbn_rewrite.errors import RewriteError
from mbn_rewrite.measurement import UNCHANGED
from mbn_rewrite.options import DEFAULT_SECONDS


def running_flags() -> dict[str, Any]:
    """How models are run, as the flags say; None where they say nothing."""
    return {
        "batch_size": FLAGS.batch_size,
        "jit_compile": FLAGS.jit_compile,
        "dtype": FLAGS.dtype,
    }


def _run_config() -> dict[str, Any]:
    return {name: value for name, value in running_flags().items() if value is not None}


def measuring_options() -> dict[str, Any]:
    """What `measure` takes, as the flags say.

    Raises:
        RewriteError: several signatures were given.
    """
    signatures = FLAGS.signatures or [None]
    if len(signatures) > 1:
        raise RewriteError("measure runs one signature: give one to --signatures")
    return {
        **_run_config(),
        "signature": signatures[0],
        "tags": FLAGS.tags,
        "trusted": FLAGS.trusted,
        "seconds": FLAGS.seconds or DEFAULT_SECONDS,
    }


def with_speed(ending: Ending, job: Job, do: Callable[[Job], Ending]) -> Ending:
    """The ending of a rewrite, with how much faster the result is.

    Args:
        ending: the ending.
        job: the rewrite. What it has written is in its place.
        do: does a job.
    """
    why, measured = "" if ending.report["changed"] else UNCHANGED, None
    if not why:
        try:
            measured = do(_measuring(ending, job))
            why = "" if measured.how == DONE else measured.message
        except RewriteError as error:
            why = str(error)
        except Interrupted:
            why = "it was interrupted"
    if measured is None or why:
        line, report = f"not measured: {why}", {"figure": f"not measured: {why}"}
    else:
        line, report = measured.text, dict(measured.report)
    return replace(
        ending, text=f"{ending.text}\nspeed: {line}", report={**ending.report, "speed": report}
    )


def _measuring(ending: Ending, job: Job) -> Job:
    """The job of measuring what a rewrite has written beside its original."""
    signature = ending.report["before"]["signature"] or None
    opened = {name: job.options[name] for name in ("trusted", "tags", "set_input")}
    options = {
        "opened": {**opened, "signature": signature},
        "run_config": _run_config(),
        "operations": sum(ending.report["after"]["ops"].values()),
        "seconds": _MOST_SECONDS,
        "trusted": job.options["trusted"],
    }
    return replace(
        job, task=FIGURE, others=(job.destination,), destination="", folder="", options=options
    )


_MOST_SECONDS = 60.0  # beside the time limit: models that are called a few times and no more


def next_steps(written: Path) -> str:
    """What was written, and what can be done with it."""
    return (
        f"wrote {written}\n"
        f"to serve it: tf.saved_model.load({str(written)!r}), or a copy as version 1 of a model of "
        "TensorFlow Serving\n"
        f"to convert it: python -m tf2onnx.convert --saved-model {shlex.quote(str(written))} "
        "--output model.onnx"
    )

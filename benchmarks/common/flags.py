"""Checks of flags, before anything long starts; each raises ValueError with what is wrong."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from absl import app

from benchmarks.common import charts, results


def check_no_arguments(arguments: Sequence[str]) -> None:
    """Sees that there are flags alone."""
    if arguments:
        raise ValueError(f"unexpected arguments {list(arguments)}; --help has examples")


def check_known(what: str, names: Iterable[str], known: Sequence[str]) -> None:
    """Sees that all names are known ones; `what` says what they name."""
    for name in names:
        if name not in known:
            raise ValueError(f"unknown {what} '{name}'; known are {', '.join(known)}")


def check_batch_sizes(sizes: Iterable[str]) -> None:
    """Sees that all are whole numbers from 1 up."""
    for size in sizes:
        if not size.isdigit() or int(size) < 1:
            raise ValueError(f"--batch_sizes: '{size}' is no whole number from 1 up")


def check_outputs(json: str | None, chart: str | None = None) -> None:
    """Sees that the files of --json and --chart can be written, and charts drawn."""
    for path in filter(None, (json, chart)):
        results.check_writable(path)
    if chart:
        charts.check_available("--chart")


def check_usage(arguments: Sequence[str], json: str | None) -> None:
    """No arguments, and a file that can be written; raises UsageError, which absl tells."""
    try:
        check_no_arguments(arguments)
        check_outputs(json)
    except ValueError as error:
        raise app.UsageError(str(error)) from error

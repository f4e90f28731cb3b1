"""Checks of flags, before anything long starts; each raises ValueError with what is wrong."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

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


def check_outputs(json: str | None, chart: str | None = None) -> None:
    """Sees that the files of --json and --chart can be written, and charts drawn."""
    for path in filter(None, (json, chart)):
        results.check_writable(path)
    if chart:
        charts.check_available("--chart")

"""Tables for people."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mbn_rewrite.plans import Plan

# How wide tables are where nobody says; None for as wide as the terminal.
_WIDTH: ContextVar[int | None] = ContextVar("_WIDTH", default=None)
WITHOUT_TERMINAL = 100


@contextmanager
def as_wide_as(width: int) -> Iterator[None]:
    """In which tables have so many characters by default: those of a terminal elsewhere."""
    token = _WIDTH.set(width)
    try:
        yield
    finally:
        _WIDTH.reset(token)


def table(
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    title: str = "",
    width: int | None = None,
) -> str:
    """A table as text, as wide as the terminal, or 100 characters where there is none.

    Columns whose cells are all numbers are set to the right. Colours are left out, so that
    the text is the same on a terminal and in a file.
    """
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    cells = [[str(cell) for cell in row] for row in rows]
    result = Table(title=title or None, box=SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for i, column in enumerate(columns):
        numbers = bool(cells) and all(row[i][:1].isdigit() or row[i] in ("", "-") for row in cells)
        # Names are never cut short: they are what a reader looks for elsewhere.
        result.add_column(column, justify="right" if numbers else "left", overflow="fold")
    for row in cells:
        result.add_row(*map(Text, row))
    console = Console(color_system=None, highlight=False)
    if not console.is_terminal:
        console = Console(color_system=None, highlight=False, width=WITHOUT_TERMINAL)
    if wanted := width or _WIDTH.get():
        console.width = wanted
    with console.capture() as capture:
        console.print(result)
    return "\n".join(line.rstrip() for line in capture.get().rstrip().split("\n"))


def decision_table(plan: Plan) -> str:
    """What became of every BatchNormalization, one row each, with a summary below."""
    if not plan.decisions:
        return plan.summary
    reasons = any(decision.reason for decision in plan.decisions)
    columns = ["BatchNormalization", "action", "into"] + ["reason"] * reasons
    rows = [[d.name, d.action, ", ".join(d.into)] + [d.reason] * reasons for d in plan.decisions]
    return f"{table(columns, rows)}\n{plan.summary}"

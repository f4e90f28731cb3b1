"""Tables for people, as text for terminals and files, and as HTML for notebooks."""

from __future__ import annotations

import codecs
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from html import escape
from io import StringIO
from textwrap import wrap

WITHOUT_TERMINAL = 100


@dataclass(frozen=True)
class Page:
    """Page that text is laid out for.

    Attributes:
        width: in characters.
        encoding: what it will be encoded in.
    """

    width: int = WITHOUT_TERMINAL
    encoding: str = "utf-8"


# What to lay out for where nobody says; None for standard output.
_PAGE: ContextVar[Page | None] = ContextVar("_PAGE", default=None)


@contextmanager
def laid_out_for(page: Page) -> Iterator[None]:
    """Context manager in which tables are laid out for another page than standard output."""
    token = _PAGE.set(page)
    try:
        yield
    finally:
        _PAGE.reset(token)


def standard_output() -> Page:
    """The page that standard output is: as wide as the terminal, if it is one."""
    width = shutil.get_terminal_size().columns if _is_terminal() else WITHOUT_TERMINAL
    return Page(width, _encoding())


def _is_terminal() -> bool:
    # There is no output in a program without a console, and one that is captured may be closed, or
    # be able to write and nothing else.
    try:
        return bool(sys.stdout.isatty())
    except (AttributeError, ValueError):
        return False


def _encoding() -> str:
    try:
        return codecs.lookup(sys.stdout.encoding).name
    except (AttributeError, LookupError, TypeError):
        return "utf-8"


def _page() -> Page:
    return _PAGE.get() or standard_output()


def encodable(text: str) -> str:
    """A text with escapes for what the page cannot show, so that printing it never fails."""
    encoding = _page().encoding
    return text.encode(encoding, "backslashreplace").decode(encoding)


def table(
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    title: str = "",
    width: int | None = None,
) -> str:
    """A table as text, as wide as the terminal, or 100 characters where there is none.

    Columns whose cells are all numbers are set to the right. Colours are left out, so that
    the text is the same on a terminal and in a file. Where words would be broken, rows stand below
    each other, each with its cells one a line.
    """
    width = width or _page().width
    cells = [[encodable(str(cell)) for cell in row] for row in rows]
    if _least_width(columns, cells) > width:
        return "\n".join([*([title] if title else []), *_stacked(columns, cells, width)])
    return _side_by_side(columns, cells, title, width)


def _side_by_side(
    columns: Sequence[str], cells: Sequence[Sequence[str]], title: str, width: int
) -> str:
    from rich.box import SIMPLE_HEAD, Box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if encodable(str(SIMPLE_HEAD)) == str(SIMPLE_HEAD):
        box = SIMPLE_HEAD
    else:
        box = Box(str(SIMPLE_HEAD).replace("\N{BOX DRAWINGS LIGHT HORIZONTAL}", "-"), ascii=True)
    result = Table(title=title or None, box=box, title_justify="left", pad_edge=False)
    for i, column in enumerate(columns):
        numbers = bool(cells) and all(row[i][:1].isdigit() or row[i] in ("", "-") for row in cells)
        # Names are never cut short: they are what a reader looks for elsewhere.
        result.add_column(column, justify="right" if numbers else "left", overflow="fold")
    for row in cells:
        result.add_row(*map(Text, row))
    drawn = StringIO()
    # In a notebook rich would show something by itself.
    console = Console(
        file=drawn, width=width, color_system=None, highlight=False, force_jupyter=False
    )
    console.print(result)
    return "\n".join(line.rstrip() for line in drawn.getvalue().rstrip().split("\n"))


def _least_width(columns: Sequence[str], cells: Sequence[Sequence[str]]) -> int:
    """Width of the narrowest table that breaks no word."""
    longest = [
        max(len(word) for cell in column for word in [*cell.split(), ""])
        for column in zip(columns, *cells, strict=True)
    ]
    return sum(longest) + 3 * len(longest)


def _stacked(columns: Sequence[str], cells: Sequence[Sequence[str]], width: int) -> Iterator[str]:
    for first, *others in cells:
        yield from wrap(f"{columns[0]}: {first}" if first.isdigit() else first, width)
        for column, cell in zip(columns[1:], others, strict=True):
            said = f"{column}: {cell}" if column else cell
            if cell not in ("", "-"):
                yield from wrap(said, width, initial_indent="  ", subsequent_indent="    ")


def html_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table as HTML; what its cells hold is text."""
    head = "".join(f'<th style="text-align:left">{escape(column)}</th>' for column in columns)
    body = "".join(
        "<tr>"
        + "".join(f'<td style="text-align:left">{escape(str(cell))}</td>' for cell in row)
        + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"

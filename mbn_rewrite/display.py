"""Plans, reports and comparisons for people: a line, a page of text, or HTML for a notebook.

A plan has a row for each BatchNormalization. Where those are many, it is shown by groups of rows
that say the same but for the names in it; all rows are there on demand.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from itertools import takewhile
from typing import TYPE_CHECKING

from mbn_rewrite.tables import encodable, html_table, table

if TYPE_CHECKING:  # which import this module
    from mbn_rewrite.comparison import Comparison
    from mbn_rewrite.frontends.footprint import Footprint
    from mbn_rewrite.plans import Decision, Plan, Unshared
    from mbn_rewrite.report import Report

MOST_ROWS = 12  # of a plan that is shown row by row
_BATCH_NORM = "BatchNormalization"
_NAMED = 3  # of the names in a group
_HOW_TO_SEE_ALL = "Every row: --full on the command line, table(full=True) in Python"


def one_line(thing: object, said: str) -> str:
    """The representation of an object, which is one line whatever names hold."""
    return f"<{type(thing).__name__}: {' '.join(said.split())}>"


# ---------------------------------------------------------------------------------- rows


def _all_rows(decisions: Sequence[Decision]) -> tuple[list[str], list[list[str]]]:
    """The columns and rows of a table with a row for each decision."""
    reasons = any(decision.reason for decision in decisions)
    prefix = _shared_prefix(decisions)
    columns = [_BATCH_NORM + prefix, "action", "into"] + ["reason"] * reasons
    rows = [
        [_short(d.name, prefix), str(d.action), ", ".join(_short(name, prefix) for name in d.into)]
        + [d.reason] * reasons
        for d in decisions
    ]
    return columns, rows


def _group_rows(decisions: Sequence[Decision]) -> tuple[list[str], list[list[str]]]:
    """The columns and rows of a table with a row for decisions that say the same.

    What stays comes first, then what is most.
    """
    groups: dict[tuple[str, str], list[Decision]] = defaultdict(list)
    for decision in decisions:
        groups[str(decision.action), _without_names(decision.reason)].append(decision)
    reasons = any(reason for _, reason in groups)
    prefix = _shared_prefix(decisions)
    columns = ["count", "action", _BATCH_NORM + prefix] + ["reason"] * reasons
    rows = []
    for (action, reason), alike in sorted(
        groups.items(), key=lambda group: (group[0][0] != "kept", -len(group[1]))
    ):
        said = alike[0].reason if len(alike) == 1 else reason
        names = _first_names([_short(decision.name, prefix) for decision in alike])
        rows.append([str(len(alike)), action, names] + [said] * reasons)
    return columns, rows


def _shared_prefix(decisions: Sequence[Decision]) -> str:
    """The models and layers that all of these are in, as " in backbone/stage_1/", or ""."""
    paths = [decision.name.split("/")[:-1] for decision in decisions]
    levels = takewhile(lambda level: len(set(level)) == 1, zip(*paths, strict=False))
    shared = [level[0] for level in levels] if len(paths) > 1 else []
    return f" in {'/'.join(shared)}/" if shared else ""


def _short(name: str, prefix: str) -> str:
    """A name without a prefix that stands elsewhere."""
    return name.removeprefix(prefix.removeprefix(" in "))


def _without_names(reason: str) -> str:
    """The wording of a reason, without names, which are quoted, and counts in brackets."""
    return re.sub(r" ?(?<!\w)'[^']*'| \(\d[^)]*\)", "", reason)


def _first_names(names: Sequence[str]) -> str:
    said = ", ".join(names[:_NAMED])
    more = len(names) - _NAMED
    return f"{said} and {more} more" if more > 0 else said


def _merge_rows(merged: Mapping[str, Sequence[str]]) -> list[list[str]]:
    """The rows of a table of layers that do the work of parallel branches."""
    return [[layer, ", ".join(others)] for layer, others in merged.items()]


def _unshared_rows(unshared: Mapping[str, Unshared]) -> list[list[str]]:
    """The rows of a table of layers of which calls get weights of their own."""
    return [
        [owner, ", ".join(dict.fromkeys(each.calls)), f"{each.weights:,}"]
        for owner, each in unshared.items()
    ]


def _tables_of_layers(plan: Plan) -> Iterator[tuple[list[str], list[list[str]]]]:
    """The columns and rows of the tables on other layers of a plan than BatchNormalizations."""
    if plan.merged:
        yield _MERGED, _merge_rows(plan.merged)
    if plan.unshared:
        yield _UNSHARED, _unshared_rows(plan.unshared)


def _first_rows(rows: list[list[str]]) -> list[list[str]]:
    more, empty = len(rows) - _NAMED, [""] * (len(rows[0]) - 1)
    return [*rows[:_NAMED], [f"{more} more", *empty]] if len(rows) > MOST_ROWS else rows


def _size_rows(report: Report, after: Footprint) -> list[list[str]]:
    rows = [
        ["BatchNormalization", str(len(report.plan.decisions)), str(report.plan.left)],
        ["weights", f"{report.before.weights:,}", f"{after.weights:,}"],
        ["bytes on disk", f"{report.before.bytes:,}", f"{after.bytes:,}"],
    ]
    if not report.before.ops:
        return rows
    total = [str(sum(counts.values())) for counts in (report.before.ops, after.ops)]
    rows.append([f"operations of {report.before.signature}", *total])
    for name in sorted({*report.before.ops, *after.ops}):
        counts = [ops.get(name, 0) for ops in (report.before.ops, after.ops)]
        if counts[0] != counts[1]:
            rows.append([f"  {name}", *map(str, counts)])
    return rows


_SIZES = ["", "before", "after"]
_MERGED = ["merged into", "also in place of"]
_UNSHARED = ["shared by calls", "which are those of", "weights added"]


# ---------------------------------------------------------------------------------- text


def plan_text(plan: Plan, full: bool = False) -> str:
    """A plan as text.

    Args:
        plan: the plan.
        full: whether every decision has a row, however many there are.
    """
    lines = []
    if plan.decisions:
        grouped = len(plan.decisions) > MOST_ROWS and not full
        lines.append(table(*(_group_rows if grouped else _all_rows)(plan.decisions)))
        lines += [_HOW_TO_SEE_ALL] if grouped else []
    for columns, rows in _tables_of_layers(plan):
        lines.append(table(columns, rows if full else _first_rows(rows)))
    lines += [plan.summary, *_plan_notes(plan)]
    decided = encodable("\n".join(lines))
    return f"{decided}\n\n{plan.measurement}" if plan.measurement else decided


def _plan_notes(plan: Plan) -> Iterator[str]:
    yield from (f"note: {note}" for note in plan.notes)
    if plan.verification:
        yield f"verification: {plan.verification}"
    if plan.unverified:
        yield f"not verified: {plan.unverified}"
    if plan.speed:
        yield f"speed: {plan.speed.figure}"


def report_text(report: Report, full: bool = False) -> str:
    """A report as text; `full` as for `plan_text`."""
    lines = [plan_text(report.plan, full)]
    if report.after is not None:
        lines.append(table(_SIZES, _size_rows(report, report.after)))
    lines += _carried_over(report)
    lines += [f"verification of {name}: {c}" for name, c in report.comparisons.items()]
    lines += _freezing(report)
    lines += _caveats(report)
    lines += [f"speed: {report.speed.figure}"] if report.speed else []
    return encodable("\n".join(lines))


def _freezing(report: Report) -> Iterator[str]:
    measured = f", {report.freezing.figure}" if report.freezing else ""
    if report.frozen:
        yield f"frozen: its weights are constants{measured}"
    elif measured:
        yield f"not frozen: its weights stay variables; with constants{measured}"


def _carried_over(report: Report) -> Iterator[str]:
    for title, named in (
        ("carried over as it was", report.as_it_was),
        ("left out", report.left_out),
        ("not verified", report.unverified),
    ):
        yield from (f"{title}: {name} ({why})" for name, why in named.items())


def _caveats(report: Report) -> Iterator[str]:
    if report.after is not None and not report.comparisons:
        yield "NOTHING WAS VERIFIED: no signature could be run or compared"
    for name in report.by_xla:
        yield (
            f"{name} was run by XLA, which leaves out assertions and takes the nearest index for "
            "one that is out of bounds"
        )


def report_summary(report: Report) -> str:
    """One line on what was done to a model, and on its verification."""
    what = f"{report.source!r}, {report.plan.summary}"
    if report.after is None:
        return f"{what}; nothing was written"
    if not report.comparisons:
        return f"{what}; NOTHING WAS VERIFIED"
    equal = sum(comparison.ok for comparison in report.comparisons.values())
    count = len(report.comparisons)
    return f"{what}; {equal} of {count} signatures equal within tolerance"


# ---------------------------------------------------------------------------------- HTML


def plan_html(plan: Plan) -> str:
    """A plan as HTML: the summary, its rows or groups of them, and what else there is to say."""
    columns, rows = _all_rows(plan.decisions)
    parts = [_paragraph(plan.summary, "b")]
    if len(rows) > MOST_ROWS:
        parts.append(html_table(*_group_rows(plan.decisions)))
        parts.append(_on_demand(f"all {len(rows)}", html_table(columns, rows)))
    elif rows:
        parts.append(html_table(columns, rows))
    for columns, rows in _tables_of_layers(plan):
        parts.append(html_table(columns, _first_rows(rows)))
        if len(rows) > MOST_ROWS:
            parts.append(_on_demand(f"all {len(rows)}", html_table(columns, rows)))
    parts += map(_paragraph, _plan_notes(plan))
    if plan.measurement:
        parts.append(f"<pre>{escape(str(plan.measurement))}</pre>")
    return _block(parts)


def report_html(report: Report) -> str:
    """A report as HTML."""
    parts = [_paragraph(report_summary(report), "b"), plan_html(report.plan)]
    if report.after is not None:
        parts.append(html_table(_SIZES, _size_rows(report, report.after)))
    parts += map(_paragraph, _carried_over(report))
    if report.comparisons:
        columns = ["signature", *_COMPARED]
        rows = [[name, *_compared(c)] for name, c in report.comparisons.items()]
        parts.append(html_table(columns, rows))
    parts += map(_paragraph, _caveats(report))
    parts += [_paragraph(f"speed: {report.speed.figure}")] if report.speed else []
    return _block(parts)


def comparison_html(comparison: Comparison) -> str:
    """A comparison as HTML."""
    return _block([html_table(_COMPARED, [_compared(comparison)])])


_COMPARED = (
    "",
    "max abs error",
    "max rel error",
    "tolerance",
    "top-1 agreement",
    "examples",
    "note",
)


def _compared(comparison: Comparison) -> list[str]:
    return [
        comparison.verdict,
        f"{comparison.max_abs_error:.3g}",
        f"{comparison.max_rel_error:.3g}",
        f"{comparison.tolerance:.3g}",
        f"{comparison.top1_agreement:.2%}",
        str(comparison.examples),
        comparison.note,
    ]


def _block(parts: Sequence[str]) -> str:
    return f"<div>{''.join(parts)}</div>"


def _paragraph(text: str, tag: str = "span") -> str:
    return f"<p><{tag}>{escape(text)}</{tag}></p>"


def _on_demand(title: str, content: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{content}</details>"

"""How plans, reports and comparisons are shown: at a prompt, on terminals, in notebooks."""

import logging
import re
import sys
from html.parser import HTMLParser
from io import StringIO, TextIOWrapper

import numpy as np
import pytest
import tensorflow as tf
import tf_keras

import mbn_rewrite as mbn
from mbn_rewrite.comparison import Comparison
from mbn_rewrite.display import MOST_ROWS
from mbn_rewrite.frontends.footprint import Footprint
from mbn_rewrite.plans import Decision, Plan
from mbn_rewrite.tables import WITHOUT_TERMINAL, Page, laid_out_for, standard_output, table

READ_ELSEWHERE = (
    "Before it, Concatenate 'block{0}_concat' is also read by Add 'add_{0}'; after it, ReLU "
    "'relu_{0}' is an activation, which a negative scale cannot pass ({0} of 999 channels)."
)


def decision(number, action="kept", reason=READ_ELSEWHERE):
    into = (f"conv_{number}",) if action == "folded" else ()
    return Decision(f"bn_{number}", action, into, reason.format(number))


def plan_of(kept, folded=0, **fields):
    decisions = [decision(i) for i in range(kept)]
    decisions += [decision(i, "folded", "") for i in range(kept, kept + folded)]
    return Plan("fold", tuple(decisions), **fields)


EQUAL = Comparison(1e-7, 1e-8, 1.0, 2e-4, 4, compared=40)
DIFFERENT = Comparison(1.0, 0.5, 0.75, 2e-4, 4, "3 of 40 entries of '<y>' differ", compared=40)


def report_of(plan, **comparisons):
    before, after = Footprint(20, 2_000, {"AddV2": 3}, "serve"), Footprint(10, 1_000, {}, "serve")
    return mbn.Report("in", "out", plan, before, after, comparisons, {"<raw>": "it acts"})


# -------------------------------------------------------------------------------- prompts


@pytest.mark.parametrize(
    ("thing", "said"),
    [
        (plan_of(200, 3), "<Plan: mode fold: 203 BatchNormalization: 3 folded, 200 kept>"),
        (
            report_of(plan_of(40), serve=EQUAL, other=DIFFERENT),
            "<Report: 'in', mode fold: 40 BatchNormalization: 40 kept; 1 of 2 signatures equal "
            "within tolerance>",
        ),
        (report_of(plan_of(1)), "NOTHING WAS VERIFIED>"),
        (mbn.Report("in", "", plan_of(1), Footprint(1, 1)), "nothing was written>"),
        (EQUAL, "<Comparison: equal within tolerance: max abs error 1e-07, "),
        (Comparison(0.0, 0.0, 1.0, 0.1, 1, "two\nlines"), "two lines>"),
    ],
)
def test_representation_is_one_line(thing, said):
    assert said in repr(thing)
    assert "\n" not in repr(thing)


# ------------------------------------------------------------------------------ terminals


def test_long_plans_are_grouped_by_what_they_say():
    plan = plan_of(150, 50)
    lines = str(plan).splitlines()
    assert len(lines) < 10
    assert re.search(
        r"150 +kept +bn_0, bn_1, bn_2 and 147 more +Before it, Concatenate is\s", str(plan)
    )
    assert re.search(r"50 +folded +bn_150, bn_151, bn_152 and", str(plan))
    assert "--full" in lines[-2]
    assert lines[-1] == plan.summary


def test_every_row_on_demand():
    full = plan_of(150, 50).table(full=True)
    assert all(f" bn_{i} " in full for i in range(200))
    assert "--full" not in full
    report = report_of(plan_of(150, 50), serve=EQUAL)
    assert full in report.table(full=True)
    assert str(plan_of(150, 50)) in str(report)


def test_short_plans_have_a_row_for_each():
    plan = plan_of(MOST_ROWS)
    assert str(plan) == plan.table(full=True)
    assert str(plan_of(MOST_ROWS + 1)) != plan_of(MOST_ROWS + 1).table(full=True)


def test_a_group_of_one_names_what_is_in_the_way():
    decisions = [*plan_of(40).decisions, decision("odd", reason="Keras's own layer 'x' is odd.")]
    text = str(Plan("fold", tuple(decisions)))
    assert "Keras's own layer 'x' is odd." in text
    assert "'block" not in text


@pytest.mark.parametrize("width", [40, 80, 100])
@pytest.mark.parametrize("full", [False, True])
def test_tables_fit_and_break_no_name(full, width):
    plan = plan_of(35, 5)
    with laid_out_for(Page(width)):
        lines = report_of(plan, serve=EQUAL).table(full).splitlines()
    shown = " ".join(lines).split()
    assert "bn_1" in {word.strip(",") for word in shown}
    tabular = [line for line in lines if not line.startswith(("Every", "mode", "not ", "verif"))]
    assert max(map(len, tabular)) <= width
    if full:
        assert {"bn_39", "'block34_concat'", "conv_39"} <= set(shown)


def test_rows_stand_below_each_other_where_words_would_be_broken():
    rows = [["a_long_name_of_a_layer", "kept", "-", "because of another_long_name"]]
    text = table(["layer", "action", "into", "reason"], rows, width=40)
    assert text == (
        "a_long_name_of_a_layer\n  action: kept\n  reason: because of another_long_name"
    )
    assert table(["count", "reason"], [["12", "a" * 34]], width=40) == (
        f"count: 12\n  reason:\n    {'a' * 34}"
    )


def test_without_a_terminal_tables_are_as_wide_as_ever(monkeypatch):
    monkeypatch.setattr(sys, "stdout", StringIO())
    assert standard_output() == Page(WITHOUT_TERMINAL, "utf-8")
    monkeypatch.setattr(sys, "stdout", None)
    assert standard_output() == Page(WITHOUT_TERMINAL, "utf-8")


class Writer:
    """An output that can write and nothing else."""

    encoding = "no such encoding"

    def write(self, text):
        return len(text)


def closed():
    stream = StringIO()
    stream.close()
    return stream


@pytest.mark.parametrize("stream", [Writer, closed])
def test_what_programs_put_in_place_of_standard_output(stream, monkeypatch):
    monkeypatch.setattr(sys, "stdout", stream())
    assert standard_output() == Page(WITHOUT_TERMINAL, "utf-8")
    assert "equal within tolerance" in str(EQUAL)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_what_a_terminal_cannot_show(encoding, monkeypatch):
    name = "r\u00e9seau_\u2500"
    note = f"the output '{name}' is odd"
    plan = Plan("fold", (Decision(name, "kept"),), notes=(note,), verification=EQUAL)
    stream = TextIOWrapper(open("/dev/null", "wb"), encoding=encoding)  # noqa: SIM115
    with stream:
        monkeypatch.setattr(sys, "stdout", stream)
        report = report_of(plan, serve=EQUAL)
        odd = Comparison(0.0, 0.0, 1.0, 0.1, 1, note)
        shown = f"{plan}\n{report}\n{odd}\n{odd!r}"
        print(shown, flush=True)
        monkeypatch.undo()
    line = "\u2500" if encoding == "utf-8" else "-"
    assert line * 10 in shown
    assert (name in shown) == (encoding == "utf-8")


# ------------------------------------------------------------------------------ notebooks


class Tags(HTMLParser):
    """What a page of HTML holds."""

    def __init__(self, text):
        super().__init__()
        self.open, self.rows, self.text = [], 0, ""
        self.outside_details = 0
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        self.rows += tag == "tr"
        self.outside_details += tag == "tr" and "details" not in self.open

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_notebooks_show_groups_and_all_rows_on_demand():
    tags = Tags(plan_of(190, 10)._repr_html_())
    assert tags.outside_details == 3  # a head, and two groups
    assert tags.rows == 3 + 201
    assert tags.text.startswith("mode fold: 200 BatchNormalization: 10 folded, 190 kept")
    assert Tags(plan_of(3)._repr_html_()).outside_details == 4


def test_what_names_hold_is_text():
    decisions = (Decision("<b>&bn</b>", "kept", (), "Before it, '<script>' is odd."),)
    plan = Plan("fold", decisions, notes=("<i>",))
    shown = report_of(plan, **{"<serve>": DIFFERENT})._repr_html_()
    assert "<script>" not in shown
    tags = Tags(shown)
    for said in ("<b>&bn</b>", "'<script>'", "note: <i>", "<serve>", "'<y>'", "<raw>", "NOT EQUAL"):
        assert said in tags.text


def test_comparisons_in_notebooks():
    tags = Tags(EQUAL._repr_html_())
    assert tags.rows == 2
    assert "equal within tolerance1e-071e-080.0002100.00%4" in tags.text


def test_printing_shows_nothing_else_in_a_notebook(monkeypatch):
    """Where rich takes a program for a notebook, it displays HTML beside what is printed."""
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    displayed = []
    monkeypatch.setattr("rich.jupyter.display", lambda *args: displayed.append(args))
    assert "bn_1" in str(plan_of(3))
    assert displayed == []


def test_where_it_was_written_for_a_while_is_not_logged(tmp_path):
    model = tf_keras.Sequential([tf_keras.layers.Dense(2), tf_keras.layers.BatchNormalization()])
    model(np.ones((1, 3), np.float32))
    model.save(tmp_path / "m.keras")
    said, logger = [], tf.get_logger()
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        mbn.rewrite_saved_model(tmp_path / "m.keras", tmp_path / "out", "fold")
        assert not [line for line in said if "Assets written" in line]
        tf.saved_model.save(tf.Module(), str(tmp_path / "other"))
        assert [line for line in said if "Assets written" in line]
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)


def test_the_prefix_that_names_share_is_said_once():
    decisions = tuple(
        Decision(f"backbone/stage_{i}/bn", "folded", (f"backbone/stage_{i}/conv",))
        for i in range(3)
    )
    text = str(Plan("fold", decisions))
    assert "BatchNormalization in backbone/" in text
    assert "backbone/stage" not in text
    assert re.search(r"stage_1/bn +folded +stage_1/conv", text)
    alone = str(Plan("fold", decisions[:1]))
    assert "backbone/stage_0/bn" in alone


def test_what_stays_comes_first():
    lines = str(plan_of(1, 50)).splitlines()
    rows = [line.split()[:2] for line in lines if re.match(r" +\d+ +\w", line)]
    assert rows == [["1", "kept"], ["50", "folded"]]

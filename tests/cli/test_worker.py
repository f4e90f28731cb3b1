"""How a job ends, whatever a model raises: never with a traceback."""

import keras
import pytest

import mbn_rewrite as mbn
from mbn_rewrite.cli.job import DONE, NO_MEMORY, REFUSED, UNEXPECTED, Job
from mbn_rewrite.cli.worker import carry_out


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("source") / "m.keras"
    keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)]).save(path)
    return str(path)


def failing_with(error, monkeypatch):
    def failing(*_, **__):
        raise error

    monkeypatch.setattr("mbn_rewrite.rewrite.open_source", failing)


@pytest.mark.parametrize(
    "error", [AttributeError("no 'x'\nsecond line"), SystemExit(3), KeyboardInterrupt(), OSError()]
)
def test_an_unexpected_error_is_one_line_that_says_where(error, source, tmp_path, monkeypatch):
    failing_with(error, monkeypatch)
    job = Job(source, str(tmp_path / "out"), str(tmp_path / "new"))
    ending = carry_out(job, lambda step: None)
    assert ending.how == UNEXPECTED
    assert ending.message.startswith(type(error).__name__)
    assert "(rewrite.py:" in ending.message
    assert "\n" not in ending.message
    assert ending.report == {}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("OOM when allocating")])
def test_want_of_memory_is_told_apart(error, source, monkeypatch):
    failing_with(error, monkeypatch)
    assert carry_out(Job(source, "", ""), lambda step: None).how == NO_MEMORY


def test_what_is_said_of_the_folder_is_said_of_the_output(source, tmp_path, monkeypatch):
    new, out = str(tmp_path / "work" / "new"), str(tmp_path / "out")
    failing_with(mbn.RewriteError(f"{new}/variables cannot be written"), monkeypatch)
    (tmp_path / "work").mkdir()
    ending = carry_out(Job(source, out, new), lambda step: None)
    assert (ending.how, ending.message) == (REFUSED, f"{out}/variables cannot be written")


def test_steps_are_said_and_measuring_may_take_its_budget(source, monkeypatch):
    def measuring(*_, progress, **__):
        progress("loading")
        progress("measuring 5 forms: batch 1")
        raise mbn.RewriteError("enough")

    monkeypatch.setattr("mbn_rewrite.rewrite.rewrite_saved_model", measuring)
    steps = []
    carry_out(Job(source, "", "", {"budget": 7.0}), steps.append)
    carry_out(Job(source, "", "", {"budget": None}), steps.append)
    planned = [(step.line.split()[0], step.planned) for step in steps if step.planned != 300]
    assert planned == [("loading", 0.0), ("measuring", 7.0), ("loading", 0.0), ("measuring", 60.0)]


def test_a_job_that_is_done(source, tmp_path):
    out = tmp_path / "out"
    ending = carry_out(
        Job(source, "what the user says", str(out), {"mode": "fold"}, width=60), lambda step: None
    )
    assert ending.how == DONE
    assert ending.report["destination"] == "what the user says"
    assert "equal within tolerance" in ending.text
    assert (out / "saved_model.pb").exists()

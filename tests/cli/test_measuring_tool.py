"""The figure that a run ends with, and the commands plan, verify and measure."""

import json
import re

import keras
import numpy as np
import pytest
import tensorflow as tf

import mbn_rewrite as mbn
from mbn_rewrite import latency
from mbn_rewrite.cli.interrupts import Interrupted
from mbn_rewrite.cli.job import DONE, NO_MEMORY, Ending, Job
from mbn_rewrite.cli.speed import with_speed
from mbn_rewrite.measurement import UNCHANGED
from tests.cli.test_tool import run
from tests.support.random_models import randomise

pytestmark = pytest.mark.slow

FIGURE = r"speed: (\d\.\d\d times as fast|no difference beyond noise) here \(95% [\d.]+-[\d.]+; "


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(latency, "FIGURE_SECONDS", 0.2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Keras file, and the SavedModel that it becomes when it is folded."""
    folder = tmp_path_factory.mktemp("models")
    x = keras.Input((8, 8, 3), name="picture")
    y = keras.layers.BatchNormalization(name="bn")(keras.layers.Conv2D(4, 3)(x))
    model = keras.Model(x, keras.layers.Flatten(name="scores")(y))
    randomise(model, np.random.default_rng(0))
    model.save(folder / "m.keras")
    mbn.rewrite_saved_model(folder / "m.keras", folder / "folded", "fold")
    return folder


def test_a_run_ends_with_a_figure_and_what_to_do_next(folder, tmp_path, capsys):
    report = tmp_path / "report.json"
    out = tmp_path / "out"
    assert run(folder / "m.keras", out, "--mode=fold", "--measure", f"--report={report}") == 0
    printed = capsys.readouterr()
    *_, figure, wrote, serve, convert = printed.out.splitlines()
    assert re.match(FIGURE, figure)
    assert wrote == f"wrote {out}"
    assert f"load('{out}')" in serve
    assert f"--saved-model {out}" in convert
    assert "measuring 2 models" in printed.err
    speed = json.loads(report.read_text())["speed"]
    assert [model["model"] for model in speed["models"]] == ["original", "rewritten"]
    assert speed["figure"] in figure


def test_no_figure_where_it_is_not_asked_for(folder, tmp_path, capsys):
    assert run(folder / "m.keras", tmp_path / "out", "--mode=fold", "--nomeasure") == 0
    assert "speed" not in capsys.readouterr().out
    assert run(folder / "m.keras", tmp_path / "out2", "--mode=fold", "--measure", "--quiet") == 0
    assert "measuring" not in capsys.readouterr().err
    arguments = (folder / "m.keras", tmp_path / "out3", "--mode=fold", "--nomeasure")
    assert run(*arguments, "--batch_size=2") == 1
    assert "nothing that --batch_size" in capsys.readouterr().err


def test_models_are_measured_in_turn(folder, tmp_path, capsys):
    report, chart = tmp_path / "latency.json", tmp_path / "latency.png"
    models = (folder / "m.keras", folder / "folded", folder / "folded")
    flags = ("--seconds=0.3", "--batch-size=3", f"--json={report}", f"--chart={chart}")
    assert run("measure", *models, *flags) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "p50 ms" in lines[1]
    names = [line.split("  ")[0].strip() for line in lines[3:6]]
    assert names == ["m.keras", "folded (1)", "folded (2)"]
    read = json.loads(report.read_text())
    assert read["batch_size"] == 3
    assert {len(model["milliseconds"]) for model in read["models"]} != {0}
    assert read["models"][0]["times_as_fast"] is None
    assert read["models"][2]["times_as_fast"]["median"] > 0
    assert chart.read_bytes().startswith(b"\x89PNG")


def test_given_inputs_are_what_is_measured(folder, tmp_path, capsys):
    np.savez(tmp_path / "good.npz", picture=np.ones((2, 8, 8, 3), np.float32))
    np.savez(tmp_path / "bad.npz", other=np.ones((2, 8, 8, 3), np.float32))
    np.savez(tmp_path / "shape.npz", picture=np.ones((2, 9, 8, 3), np.float32))
    model = folder / "folded"
    assert run("measure", model, "--seconds=0.1", f"--inputs={tmp_path}/good.npz") == 0
    assert run("measure", model, f"--inputs={tmp_path}/bad.npz") == 1
    assert "named ['other']" in capsys.readouterr().err
    assert run("measure", model, f"--inputs={tmp_path}/shape.npz") == 1
    assert "has the shape (1, 9, 8, 3)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("measure",), "takes the paths of models"),
        (("measure", "nowhere"), "there is no nowhere"),
        (("measure", "m.keras", "--overwrite"), "takes no --overwrite"),
        (("measure", "m.keras", "--mode=fold", "--full"), "takes no --mode and no --full"),
        (("measure", "m.keras", "--chart=x.pdf"), "a chart is a .png file"),
        (("measure", "m.keras", "--chart=no/x.png"), "there is no directory for the chart"),
        (("measure", "folded", "--signatures=a,b"), "one signature"),
        (("measure", "folded", "--signatures=other"), "other"),
        (("measure", "m.keras", "--report=folded/x.json", "folded"), "would lie in folded"),
        (("m.keras", "out", "--threads=2"), "command rewrite takes no --threads"),
        (("verify", "m.keras"), "verify takes IN and OUT"),
        (("verify", "m.keras", "m.keras"), "is no SavedModel"),
        (("plan", "m.keras", "--overwrite"), "takes no --overwrite"),
    ],
)
def test_bad_input(arguments, said, folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    assert run(*arguments) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert said in error


def test_a_model_that_counts_its_calls_is_not_measured(tmp_path, capsys):
    class Counting(tf.Module):
        def __init__(self):
            super().__init__()
            self.calls = tf.Variable(0.0)

        @tf.function(input_signature=[tf.TensorSpec((None, 3))])
        def serve(self, x):
            return x + self.calls.assign_add(1.0)

    module = Counting()
    tf.saved_model.save(module, str(tmp_path / "counting"), module.serve)
    assert run("measure", tmp_path / "counting") == 1
    assert "running it changes its state" in capsys.readouterr().err


def test_one_signature_is_measured_whatever_another_one_changes(tmp_path, capsys):
    module = tf.Module()
    module.calls = tf.Variable(0.0)

    @tf.function(input_signature=[tf.TensorSpec((None, 3))])
    def count(x):
        return {"count": tf.reduce_sum(x) + module.calls.assign_add(1.0)}

    @tf.function(input_signature=[tf.TensorSpec((None, 3))])
    def serve(x):
        return {"y": x + module.calls}

    signatures = {"serving_default": serve, "count": count}
    tf.saved_model.save(module, str(tmp_path / "in"), signatures)
    assert run("measure", tmp_path / "in", "--seconds=0.1") == 0
    assert run("measure", tmp_path / "in", "--signatures=count") == 1
    assert "running it changes its state" in capsys.readouterr().err


def of_size(size, folder):
    module = tf.Module()
    spec = tf.TensorSpec((None, size, size, 3), tf.float32, "x")
    serve = tf.function(lambda x: {"y": tf.reduce_mean(x, (1, 2))}, input_signature=[spec])
    path = folder / f"size_{size}"
    tf.saved_model.save(module, str(path), {"serving_default": serve})
    return path


def test_what_one_leaves_open_is_as_the_other_has_it_in_either_order(tmp_path, capsys):
    models = [of_size(size, tmp_path) for size in (None, 20)]
    for order in (models, models[::-1]):
        assert run("measure", *order, "--seconds=0.1") == 0
    other = of_size(30, tmp_path)
    capsys.readouterr()
    assert run("measure", models[1], other, "--seconds=0.1") == 1
    assert "size_30 cannot be measured" in capsys.readouterr().err


class Branching(tf.Module):
    """Control flow around a variable that is only read, for two examples at a time."""

    def __init__(self):
        super().__init__()
        self.kernel = tf.Variable(np.ones((3, 2), np.float32))

    @tf.function(input_signature=[tf.TensorSpec((2, 3), tf.float32, "x")])
    def serve(self, x):
        tf.debugging.assert_less(tf.reduce_max(x), 1e6)
        if tf.reduce_sum(x) > 0.0:
            return {"y": x @ self.kernel}
        return {"y": -x @ self.kernel}


def test_control_flow_and_batches_of_one_size(tmp_path, capsys):
    module = Branching()
    tf.saved_model.save(module, str(tmp_path / "in"), {"serving_default": module.serve})
    assert run("measure", tmp_path / "in", "--seconds=0.1") == 0
    assert "batch 2, " in capsys.readouterr().out
    assert run("measure", tmp_path / "in", "--batch-size=5") == 1
    assert "takes batches of 2 alone, not of 5" in capsys.readouterr().err
    assert run(tmp_path / "in", tmp_path / "out", "--mode=fold", "--freeze", "--measure") == 0
    assert re.search(FIGURE, capsys.readouterr().out)


def test_a_plan_needs_no_flag(folder, capsys):
    assert run("plan", folder / "m.keras", "--mode=fold") == 0
    assert capsys.readouterr().out.endswith("dry run: wrote nothing\n")


def test_verification_of_what_another_tool_has_written(folder, tmp_path, capsys):
    report = tmp_path / "r.json"
    assert run("verify", folder / "m.keras", folder / "folded", f"--report={report}") == 0
    assert "serving_default: equal within tolerance" in capsys.readouterr().out
    assert json.loads(report.read_text())["ok"] is True
    other = keras.saving.load_model(folder / "m.keras")
    other.layers[1].bias.assign(other.layers[1].bias + 0.1)
    other.save(tmp_path / "other.keras")
    assert run("verify", tmp_path / "other.keras", folder / "folded", f"--report={report}") == 3
    printed = capsys.readouterr()
    assert "NOT EQUAL" in printed.out
    assert "does not give the outputs of" in printed.err
    assert json.loads(report.read_text())["ok"] is False
    assert sorted(path.name for path in folder.iterdir()) == ["folded", "m.keras"]


# ------------------------------------------------------------------- what may go wrong then


REWRITE = Job("in", "out", "folder", {"trusted": False, "tags": None, "set_input": {}})


def ending(changed):
    report = {
        "changed": changed,
        "before": {"signature": "serving_default"},
        "after": {"ops": {"AddV2": 3}},
    }
    return Ending(DONE, text="a table", report=report)


def failing_with(error):
    def do(job):
        raise error

    return do


@pytest.mark.parametrize(
    ("do", "why"),
    [
        (
            failing_with(mbn.RewriteError("it crashed")),
            "it crashed",
        ),
        (failing_with(Interrupted(2)), "it was interrupted"),
        (lambda job: Ending(NO_MEMORY, "not enough memory"), "not enough memory"),
    ],
)
def test_what_was_written_is_there_whatever_happens_while_measuring(do, why):
    result = with_speed(ending(True), REWRITE, do)
    assert result.how == DONE
    assert result.text.startswith("a table\nspeed: not measured: ")
    assert why in result.text
    assert why in result.report["speed"]["figure"]


def test_a_model_that_stays_as_it_was_is_not_measured():
    result = with_speed(ending(False), REWRITE, failing_with(AssertionError))
    assert result.text == f"a table\nspeed: not measured: {UNCHANGED}"

"""The command `mbn-rewrite` and `rewrite_saved_model`: files in, files out, exit codes."""

import json
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras

import mbn_rewrite as mbn
from mbn_rewrite.cli import command, flags
from mbn_rewrite.cli.interrupts import Interrupts
from mbn_rewrite.cli.worker import carry_out
from tests.support.random_models import K, randomise

pytestmark = pytest.mark.slow

TOOL = Path(__file__).resolve().parents[2] / "tools" / "rewrite_savedmodel.py"


def small_model(**kwargs):
    x = K.Input((8, 8, 3), name="picture")
    y = K.ReLU()(K.BatchNormalization(name="bn")(K.Conv2D(4, 3)(x)))
    model = tf_keras.Model(x, K.Dense(2, name="scores")(K.GlobalMaxPooling2D()(y)), **kwargs)
    randomise(model, np.random.default_rng(0))
    return model


def lambda_model():
    x = K.Input((4,))
    return tf_keras.Model(x, K.Lambda(lambda t: t * 2.0)(K.BatchNormalization()(K.Dense(3)(x))))


def saved(model, directory, kind):
    """The path of a model saved in one of the formats that Keras has."""
    path = directory / {"h5": "m.h5", "hdf5": "m.hdf5", "keras": "m.keras", "tf": "m"}[kind]
    model.save(path, save_format="h5" if kind == "hdf5" else kind)
    return path


def run(*arguments):
    """The tool, with its work done in this process; returns its exit code."""
    flags.FLAGS.unparse_flags()
    for flag in flags.FLAGS.get_flags_for_module(flags.__name__):
        flag.unparse()
    with Interrupts() as interrupts:
        given = ["mbn-rewrite", *map(str, arguments)]
        measured = {"--measure", "measure", "verify", "plan"} & set(given)
        paths = flags.parse(given if measured else [*given, "--nomeasure"])[1:]
        return command.run(paths, interrupts, carry_out)


def nothing_left(directory, *but):
    """Whether a directory holds nothing else, hidden or not."""
    return sorted(p.name for p in directory.iterdir()) == sorted(p.name for p in but)


@keras.saving.register_keras_serializable("tests")
class Subclassed3(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.norm = keras.layers.BatchNormalization()

    def call(self, x):
        return self.norm(x)


FORMATS = ("h5", "hdf5", "keras", "tf")


@pytest.mark.parametrize("mode", ["fold", "depthwise"])
@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_becomes_a_verified_saved_model(kind, mode, tmp_path, capsys):
    model = small_model()
    source, out = saved(model, tmp_path, kind), tmp_path / "out"
    assert run(f"--mode={mode}", source, out) == 0
    printed = capsys.readouterr().out
    assert "equal within tolerance" in printed
    assert "bn" in printed
    serve = tf.saved_model.load(str(out)).signatures["serving_default"]
    inputs = tf.constant(np.random.default_rng(1).standard_normal((2, 8, 8, 3)), tf.float32)
    np.testing.assert_allclose(serve(picture=inputs)["scores"], model(inputs), rtol=1e-4, atol=1e-5)
    if kind != "tf":  # files of Keras become SavedModels of Keras
        assert tf_keras.models.load_model(out, compile=False).output_names == ["scores"]
    assert nothing_left(tmp_path, source, out)


def keras_3_model():
    left = keras.Input((8, 8, 3), name="left")
    right = keras.Input((8, 8, 3), name="right")
    layers = keras.layers
    y = layers.BatchNormalization(name="bn")(layers.Conv2D(4, 3)(layers.Add()([left, right])))
    outputs = {"z": layers.ReLU(name="last")(y), "a": layers.GlobalMaxPooling2D(name="first")(y)}
    model = keras.Model([left, right], outputs)
    randomise(model, np.random.default_rng(0))
    return model


@pytest.mark.parametrize("mode", ["fold", "depthwise"])
@pytest.mark.parametrize("kind", ["h5", "keras"])
def test_files_of_keras_3(kind, mode, tmp_path):
    model = keras_3_model()
    source, out = tmp_path / f"m.{kind}", tmp_path / "out"
    model.save(source)
    inputs = {t.name: np.ones((2, 8, 8, 3), np.float32) for t in model.inputs}
    for given in (None, inputs) if kind == "keras" else (None,):
        report = mbn.rewrite_saved_model(source, out, mode, inputs=given, overwrite=True)
        assert report.comparison.ok
        assert report.plan.left == 0
    serve = tf.saved_model.load(str(out)).signatures["serving_default"]
    results, expected = serve(**inputs), model(list(inputs.values()))
    for name in ("a", "z"):
        np.testing.assert_allclose(results[name], expected[name], rtol=1e-4, atol=1e-5)
    assert nothing_left(tmp_path, source, out)


@pytest.mark.parametrize("kind", ["h5", "keras"])
def test_trusted_lambda_of_keras_3(kind, tmp_path):
    source = lambda_of_keras_3(tmp_path, kind)
    assert mbn.rewrite_saved_model(source, tmp_path / "out", "fold", trusted=True).ok


def test_sequential_and_subclassed_files_of_keras_3(tmp_path):
    layers = keras.layers
    model = keras.Sequential([layers.Dense(3), layers.BatchNormalization()])
    model(np.ones((2, 4), np.float32))
    model.save(tmp_path / "sequential.keras")
    subclassed = Subclassed3()
    subclassed(np.ones((2, 4), np.float32))
    subclassed.save(tmp_path / "subclassed.keras")
    for name, left in (("sequential", 0), ("subclassed", 1)):
        report = mbn.rewrite_saved_model(tmp_path / f"{name}.keras", tmp_path / name, "fold")
        assert report.comparison.ok
        assert report.plan.left == left


def test_unknown_names_of_inputs_of_keras_3(tmp_path):
    keras_3_model().save(tmp_path / "m.keras")
    with pytest.raises(mbn.RewriteError, match=r"are named \['other'\]; the model's"):
        mbn.rewrite_saved_model(
            tmp_path / "m.keras", tmp_path / "out", "fold", inputs={"other": np.ones((2, 8, 8, 3))}
        )


def test_outputs_by_name_in_order(tmp_path):
    left, right = K.Input((4,), name="left"), K.Input((4,), name="right")
    outputs = {
        "z": K.BatchNormalization(name="z")(K.Dense(3)(left)),
        "a": K.BatchNormalization(name="a")(K.Dense(3)(right)),
    }
    model = tf_keras.Model({"right": right, "left": left}, outputs)
    randomise(model, np.random.default_rng(0))
    report = mbn.rewrite_saved_model(saved(model, tmp_path, "h5"), tmp_path / "out")
    assert report.comparison.ok
    serve = tf.saved_model.load(str(tmp_path / "out")).signatures["serving_default"]
    assert sorted(serve.structured_outputs) == ["a", "z"]
    assert sorted(serve.structured_input_signature[1]) == ["left", "right"]


def test_report_is_written_as_json(tmp_path):
    source, report = saved(small_model(), tmp_path, "h5"), tmp_path / "report.json"
    assert run(f"--report={report}", source, tmp_path / "out") == 0
    read = json.loads(report.read_text())
    assert read["plan"]["counts"] == {"folded": 1}
    assert read["plan"]["decisions"][0]["name"] == "bn"
    assert read["verification"]["ok"] is True
    assert read["after"]["weights"] < read["before"]["weights"]
    assert read["after"]["bytes"] > 0


@pytest.mark.parametrize(("flags", "left"), [((), 0), (("--keep-shared",), 1)])
def test_shared_layers_are_kept_on_demand(flags, left, tmp_path):
    conv, inputs = K.Conv2D(4, 3, name="conv"), [K.Input((8, 8, 3)) for _ in range(2)]
    ends = [K.Activation("tanh")(K.BatchNormalization()(conv(x))) for x in inputs]
    model = tf_keras.Model(inputs, ends)
    randomise(model, np.random.default_rng(0))
    source, report = saved(model, tmp_path, "keras"), tmp_path / "report.json"
    assert run("--mode=fold", *flags, f"--report={report}", source, tmp_path / "out") == 0
    plan = json.loads(report.read_text())["plan"]
    assert plan["counts"].get("kept", 0) == left
    assert [row["layer"] for row in plan["unshared"]] == ["conv"] * (1 - left)


def test_dry_run_writes_nothing(tmp_path, capsys):
    source = saved(small_model(), tmp_path, "h5")
    assert run("--dry_run", source) == 0
    assert "folded" in capsys.readouterr().out
    assert nothing_left(tmp_path, source)


def test_model_without_norm_is_copied_and_said_so(tmp_path, capsys):
    x = K.Input((4,))
    source = saved(tf_keras.Model(x, K.Dense(3)(x)), tmp_path, "h5")
    assert run(source, tmp_path / "out") == 0
    assert "nothing to do" in capsys.readouterr().out
    assert (tmp_path / "out" / "saved_model.pb").exists()


def test_real_inputs_are_used(tmp_path):
    source, inputs = saved(small_model(), tmp_path, "h5"), tmp_path / "inputs.npz"
    np.savez(inputs, picture=np.zeros((3, 8, 8, 3), np.float32))
    assert run(f"--inputs={inputs}", source, tmp_path / "out") == 0


def test_quiet_says_nothing(tmp_path, capfd):
    assert run("--quiet", saved(small_model(), tmp_path, "h5"), tmp_path / "out") == 0
    assert capfd.readouterr() == ("", "")


def test_what_was_not_verified_is_warned_of(tmp_path, capfd):
    source, report = saved(small_model(), tmp_path, "h5"), tmp_path / "report.json"
    arguments = "--quiet", "--unverified=serving_default", f"--report={report}"
    assert run(*arguments, source, tmp_path / "out") == 0
    printed = capfd.readouterr().err
    assert printed == "warning: 'serving_default' was not verified: as it was asked for\n"
    verification = json.loads(report.read_text())["verification"]
    assert verification["ok"] is False
    assert list(verification["unverified"]) == ["serving_default"]
    assert run("--unverified=serve", source, tmp_path / "other") == 1
    assert "unverified names serve" in capfd.readouterr().err


def test_failed_verification_leaves_nothing(tmp_path, capsys):
    source, report = saved(small_model(), tmp_path, "h5"), tmp_path / "report.json"
    assert run("--tolerance=0", f"--report={report}", source, tmp_path / "out") == 3
    printed = capsys.readouterr().err
    assert "NOT EQUAL: max abs error" in printed
    assert nothing_left(tmp_path, source, report)
    assert json.loads(report.read_text())["verification"]["ok"] is False


def test_failed_verification_leaves_what_was_there(tmp_path):
    source, out = saved(small_model(), tmp_path, "h5"), tmp_path / "out"
    assert run(source, out) == 0
    before = (out / "saved_model.pb").read_bytes()
    assert run("--tolerance=0", "--overwrite", source, out) == 3
    assert (out / "saved_model.pb").read_bytes() == before
    assert nothing_left(tmp_path, source, out)


def test_overwrite_replaces_a_saved_model(tmp_path):
    source, out = saved(small_model(), tmp_path, "h5"), tmp_path / "out"
    assert run(source, out) == 0
    assert run("--overwrite", "--mode=depthwise", source, out) == 0
    assert tf_keras.models.load_model(out, compile=False).get_layer("bn").kernel_size == (1, 1)
    assert nothing_left(tmp_path, source, out)


# ------------------------------------------------------------------------------- bad input


def truncated(tmp_path, kind):
    path = saved(small_model(), tmp_path, kind)
    victim = path / "saved_model.pb" if path.is_dir() else path
    victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2])
    return path


def text_file(tmp_path):
    path = tmp_path / "notes.h5"
    path.write_text("no model")
    return path


def empty_file(tmp_path):
    path = tmp_path / "empty.keras"
    path.touch()
    return path


def weights_only(tmp_path):
    small_model().save_weights(tmp_path / "weights.h5")
    return tmp_path / "weights.h5"


def plain_directory(tmp_path):
    (tmp_path / "directory").mkdir()
    return tmp_path / "directory"


def plain_saved_model(tmp_path):
    module = tf.Module()
    module.weight = tf.Variable(1.0)
    tf.saved_model.save(module, str(tmp_path / "module"))
    return tmp_path / "module"


def unknown_class_of_keras_3(tmp_path):
    class Unheard(keras.layers.Layer):
        pass

    keras.Sequential([keras.Input((4,)), Unheard()]).save(tmp_path / "three.keras")
    return tmp_path / "three.keras"


def lambda_of_keras_3(tmp_path, kind):
    keras.Sequential([keras.Input((4,)), keras.layers.Lambda(lambda x: x * 2.0)]).save(
        tmp_path / f"three.{kind}"
    )
    return tmp_path / f"three.{kind}"


def unknown_class(tmp_path):
    class Unheard(K.Layer):
        pass

    x = K.Input((4,))
    return saved(tf_keras.Model(x, Unheard()(x)), tmp_path, "h5")


BAD_SOURCES = {
    "missing": (lambda tmp_path: tmp_path / "nowhere.h5", "there is no"),
    "text": (text_file, "neither an HDF5 file"),
    "empty": (empty_file, "neither an HDF5 file"),
    "weights": (weights_only, "holds weights but no model"),
    "directory": (plain_directory, "without saved_model.pb"),
    "no_signatures": (plain_saved_model, "has no signatures"),
    "unknown_class_of_keras_3": (unknown_class_of_keras_3, "cannot be loaded by keras: "),
    "unknown_class": (unknown_class, "cannot be loaded by tf_keras: "),
    "truncated_h5": (lambda tmp_path: truncated(tmp_path, "h5"), "cut short"),
    "truncated_keras": (lambda tmp_path: truncated(tmp_path, "keras"), "cut short"),
    "truncated_tf": (lambda tmp_path: truncated(tmp_path, "tf"), "cut short"),
    **{
        f"lambda_{kind}": (lambda tmp_path, kind=kind: saved(lambda_model(), tmp_path, kind),
                           "--trusted")
        for kind in ("h5", "keras")
    },
    **{
        f"lambda_of_keras_3_{kind}": (
            lambda tmp_path, kind=kind: lambda_of_keras_3(tmp_path, kind), "--trusted"
        )
        for kind in ("h5", "keras")
    },
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_SOURCES)
def test_bad_source_is_one_line_and_writes_nothing(name, tmp_path, capsys):
    make, message = BAD_SOURCES[name]
    source = make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    assert run("--quiet", source, tmp_path / "out") == 1
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.startswith("error: ")
    assert printed.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def disguised(path, kind, replacement):
    """Writes "Lambda" in another way that JSON reads as the same."""
    old, new = b'"class_name": "Lambda"', replacement
    if kind == "h5":
        with h5py.File(path, "r+") as file:
            config = file.attrs["model_config"]
            config = config.encode() if isinstance(config, str) else config
            assert old in config
            file.attrs["model_config"] = config.replace(old, new)
        return path
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    assert old in members["config.json"]
    members["config.json"] = members["config.json"].replace(old, new)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


@pytest.mark.parametrize("kind", ["h5", "keras"])
@pytest.mark.parametrize(
    "replacement",
    [b'"class_name":\t"Lambda"', b'"class_name" :\n "Lambda"', b'"class_name": "\\u004cambda"'],
    ids=["tab", "newline", "escape"],
)
def test_disguised_code_is_refused(replacement, kind, tmp_path, capsys):
    source = disguised(saved(lambda_model(), tmp_path, kind), kind, replacement)
    assert run("--quiet", source, tmp_path / "out") == 1
    assert "holds code" in capsys.readouterr().err
    assert nothing_left(tmp_path, source)


def test_lambda_function_as_activation_is_code(tmp_path, capsys):
    x = K.Input((4,))
    model = tf_keras.Model(x, K.Dense(3, activation=lambda t: t * 2.0)(x))
    source = saved(model, tmp_path, "keras")
    assert run("--quiet", source, tmp_path / "out") == 1
    assert "holds code" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["h5", "keras", "tf"])
def test_trusted_code_is_run(kind, tmp_path):
    source = saved(lambda_model(), tmp_path, kind)
    assert run("--trusted", source, tmp_path / "out") == 0


def test_custom_layers_are_imported(tmp_path, monkeypatch):
    (tmp_path / "my_layers_for_test.py").write_text(
        "import tf_keras\n"
        "@tf_keras.utils.register_keras_serializable('mine')\n"
        "class Twice(tf_keras.layers.Layer):\n"
        "    def call(self, x):\n"
        "        return 2 * x\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    from my_layers_for_test import Twice

    x = K.Input((4,))
    source = saved(tf_keras.Model(x, K.BatchNormalization()(Twice()(x))), tmp_path, "h5")
    # In a process of its own, where nothing has imported the module yet.
    done = process(source, "without", cwd=tmp_path)
    assert done.returncode == 1
    assert "--import_modules" in done.stderr
    done = process("--import_modules=my_layers_for_test", source, "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("content", [None, "raise ValueError('broken')", "def", "exit(5)"])
def test_module_that_cannot_be_imported(content, tmp_path, monkeypatch, capsys):
    source = saved(small_model(), tmp_path, "h5")
    monkeypatch.syspath_prepend(str(tmp_path))
    name = f"broken_{abs(hash(content))}"
    if content:
        (tmp_path / f"{name}.py").write_text(content)
    assert run("--quiet", f"--import_modules={name}", source, tmp_path / "out") == 1
    assert capsys.readouterr().err.startswith(f"error: --import_modules: {name}: ")


@tf_keras.utils.register_keras_serializable("tests")
class Subclassed(tf_keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense, self.norm = K.Dense(3), K.BatchNormalization(name="own")

    def call(self, x):
        return self.norm(self.dense(x))


@pytest.mark.parametrize("mode", ["fold", "depthwise"])
def test_subclassed_saved_model(mode, tmp_path):
    model = Subclassed()
    model(tf.ones((1, 4)))
    randomise(model, np.random.default_rng(0))
    model.save(tmp_path / "m", save_format="tf")
    report = mbn.rewrite_saved_model(tmp_path / "m", tmp_path / "out", mode)
    assert report.comparison.ok
    assert report.plan.counts == {"folded" if mode == "fold" else "depthwise": 1}


def test_input_is_never_changed(tmp_path):
    source = saved(small_model(), tmp_path, "h5")
    before = source.read_bytes()
    assert run(source, tmp_path / "out") == 0
    assert run("--tolerance=0", source, tmp_path / "out2") == 3
    assert run(f"--report={source}", source, tmp_path / "out3") == 1
    assert source.read_bytes() == before


@pytest.mark.parametrize("place", ["m.h5", "out/report.json", "out", "", "."])
def test_report_in_a_bad_place(place, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = saved(small_model(), tmp_path, "h5")
    assert run("--quiet", f"--report={place}", source, tmp_path / "out") == 1
    assert "report" in capsys.readouterr().err
    assert nothing_left(tmp_path, source)


def test_overwrite_spares_what_is_not_part_of_a_saved_model(tmp_path, capsys):
    source, out = saved(small_model(), tmp_path, "h5"), tmp_path / "out"
    assert run(source, out) == 0
    (out / "notes.txt").write_text("precious")
    assert run("--quiet", "--overwrite", source, out) == 1
    assert "holds more than a SavedModel (notes.txt)" in capsys.readouterr().err
    assert (out / "notes.txt").read_text() == "precious"


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (np.zeros((0, 8, 8, 3)), "not one value"),
        (np.zeros((2, 9, 8, 3)), "shape"),
        (np.zeros((8, 8, 3)), "shape"),
        (np.zeros(()), "shape"),
        (np.array(["a"]), "float32 is needed"),
        (np.zeros((2, 8, 8, 3), complex), "float32 is needed"),
        (np.full((2, 8, 8, 3), np.nan), "NaN or infinite in both, so nothing could be compared"),
    ],
    ids=["empty", "size", "rank", "scalar", "text", "complex", "nan"],
)
def test_inputs_that_do_not_fit(picture, message, tmp_path, capsys):
    source, inputs = saved(small_model(), tmp_path, "h5"), tmp_path / "inputs.npz"
    np.savez(inputs, picture=picture)
    assert run("--quiet", f"--inputs={inputs}", source, tmp_path / "out") in (1, 3)
    assert message in capsys.readouterr().err
    assert nothing_left(tmp_path, source, inputs)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"no zip"])
def test_broken_inputs(content, tmp_path, capsys):
    source, inputs = saved(small_model(), tmp_path, "h5"), tmp_path / "inputs.npz"
    inputs.write_bytes(content)
    assert run("--quiet", f"--inputs={inputs}", source, tmp_path / "out") == 1
    assert "is no .npz file" in capsys.readouterr().err


def test_existing_output_is_left_alone(tmp_path, capsys):
    source, out = saved(small_model(), tmp_path, "h5"), tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("precious")
    assert run(source, out) == 1
    assert "exists" in capsys.readouterr().err
    assert run("--overwrite", source, out) == 1  # it is no SavedModel
    assert "no SavedModel" in capsys.readouterr().err
    assert (out / "precious.txt").read_text() == "precious"


@pytest.mark.parametrize(
    ("out", "message"),
    [("nowhere/out", "there is no directory"), ("m.h5", "exists"), ("m.h5/out", "would lie in")],
)
def test_impossible_outputs(out, message, tmp_path, capsys):
    source = saved(small_model(), tmp_path, "h5")
    assert run(source, tmp_path / out) == 1
    assert message in capsys.readouterr().err
    assert nothing_left(tmp_path, source)


def test_directory_that_is_not_writable(tmp_path, capsys):
    source = saved(small_model(), tmp_path, "h5")
    # /proc takes no directories, not even from the superuser, to whom no mode is a barrier.
    assert run(source, "/proc/out") == 1
    assert "not writable" in capsys.readouterr().err


def test_output_inside_the_input_and_over_it(tmp_path, capsys):
    source = saved(small_model(), tmp_path, "tf")
    assert run(source, source / "out") == 1
    assert "would lie in the input" in capsys.readouterr().err
    assert run("--overwrite", source, source) == 1
    assert (source / "saved_model.pb").exists()


@pytest.mark.parametrize("count", [0, 1, 3])
def test_wrong_number_of_paths(count, capsys):
    assert run(*["path"] * count) == 1
    assert "give IN and OUT" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "message"),
    [("--inputs=nowhere.npz", "no .npz"), ("--report=no/where.json", "no directory")],
)
def test_bad_side_files(flag, message, tmp_path, capsys):
    source = saved(small_model(), tmp_path, "h5")
    assert run(flag, source, tmp_path / "out") == 1
    assert message in capsys.readouterr().err
    assert nothing_left(tmp_path, source)


def test_wrong_names_of_inputs(tmp_path, capsys):
    source, inputs = saved(small_model(), tmp_path, "h5"), tmp_path / "inputs.npz"
    np.savez(inputs, photo=np.zeros((3, 8, 8, 3), np.float32))
    assert run(f"--inputs={inputs}", source, tmp_path / "out") == 1
    assert "['picture']" in capsys.readouterr().err
    assert nothing_left(tmp_path, source, inputs)


# -------------------------------------------------------------------------- as a real process


def process(*arguments, **kwargs):
    return subprocess.run(
        [sys.executable, TOOL, *map(str, arguments)], capture_output=True, text=True, **kwargs
    )


def test_from_a_shell(tmp_path):
    source = saved(small_model(), tmp_path, "h5")
    done = process(source, "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "verification of serving_default: equal within tolerance" in done.stdout
    assert "\nspeed: " in done.stdout
    begun = [line.split()[0].strip(",") for line in done.stderr.splitlines()]  # and no other noise
    rewriting = ["starting", "loading", "planning", "running", "writing", "verifying"]
    assert begun == [*rewriting, "starting", "loading", "loading", "measuring"]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_killed_while_writing_leaves_no_output(how, tmp_path):
    source, out = saved(small_model(), tmp_path, "h5"), tmp_path / "out"
    running = subprocess.Popen(
        [sys.executable, TOOL, source, out],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    for line in running.stderr:
        if line.startswith("writing"):
            break
    os.kill(running.pid, how)
    rest = running.stderr.read()
    running.stderr.close()
    assert running.wait() == {signal.SIGINT: 130, signal.SIGKILL: -signal.SIGKILL}[how]
    assert not out.exists()
    if how is signal.SIGINT:
        assert rest == "interrupted: nothing was written\n"
        assert nothing_left(tmp_path, source)
    assert run(source, out) == 0
    assert nothing_left(tmp_path, source, out)

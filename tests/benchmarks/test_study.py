"""The study: paired, resumable runs, the proof that a variant ran, and what is said of results."""

import dataclasses
import errno
import functools
import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from scipy import stats

from benchmarks.models import training_networks
from benchmarks.training.operations import OpTime
from study import (
    data,
    image_folder,
    models,
    program,
    proof,
    report,
    running,
    standing,
    statistics,
    training,
)
from study.claims import Claims
from study.errors import StudyError, exit_code
from study.pipeline import Pipeline
from study.recipes import RECIPES, learning_rate
from study.results import Results, differences
from study.training import Setting

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
CLASSES = ("cat", "dog")
OF_EACH = 10
RECIPE = RECIPES["resnet9_cifar10"]
SETTING = Setting(RECIPE, "tf_keras", "float32", 0.0625, 1, 8, 1)
VARIANTS = ("original", "strided4")
LARGE = dataclasses.replace(RECIPES["resnet50_imagenette"], size=32, batch=4, mixup=0.2)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A few images of noise, in both formats."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for part in ("train", "test"):
        for name in CLASSES:
            (root / part / name).mkdir(parents=True)
            for number in range(OF_EACH):
                image = tf.constant(rng.integers(0, 256, (32, 32, 3), np.uint8))
                png = number % 2
                encoded = tf.io.encode_png(image) if png else tf.io.encode_jpeg(image)
                file = root / part / name / f"{number}.{'png' if png else 'jpg'}"
                file.write_bytes(encoded.numpy())
    return root


@pytest.fixture(scope="session")
def images(folder):
    return data.load(RECIPE, str(folder), None, None)


def results_in(directory, images, setting=SETTING):
    configuration = running.configuration(setting, images, "made-up images")
    return Results(Path(directory), configuration)


def begin(results):
    """Begins a study, or goes on with it; nobody is at work."""
    with results.joined():
        pass


@pytest.fixture(scope="session")
def finished(tmp_path_factory, images):
    """Two runs of each variant, made once; the second of each is made up of the first."""
    results = results_in(tmp_path_factory.mktemp("finished"), images)
    begin(results)
    assert running.run_missing(SETTING, images, results, VARIANTS, 1) == 2
    for (variant, _), record in results.finished().items():
        record["epochs"][0]["test_accuracy"] += 0.01 * len(variant)
        results.save(variant, 1, record)
    return results


@pytest.fixture
def copied(finished, tmp_path):
    """The finished runs, to do something to."""
    shutil.copytree(finished.directory, tmp_path / "copied")
    return Results.open(tmp_path / "copied")


@pytest.fixture
def quick_runs(monkeypatch, finished):
    """Runs that take no time: the record of a finished one. Gives the list of those started."""
    started = []
    records = finished.finished()

    def run(setting, data, variant, seed, check, after_epoch, strategy):
        started.append((variant, seed))
        record = records[variant, seed % 2]
        check(record["operations"])
        after_epoch(record["epochs"][0])
        return record

    monkeypatch.setattr(training, "run", run)
    return started


# ------------------------------------------------------------------------------------ images


def test_all_images_are_read(images):
    assert (images.train.size, images.test.size) == (20, 20)
    assert images.train.images.shape == (20, 32, 32, 3)
    assert images.classes == CLASSES
    assert np.bincount(images.train.labels).tolist() == [10, 10]


def corrupted(folder, tmp_path, names):
    root = tmp_path / "corrupted"
    shutil.copytree(folder, root)
    for name in names:
        content = (root / name).read_bytes()
        (root / name).write_bytes(content[: len(content) // 2])
    return root


BAD = ("test/dog/3.png", "train/cat/0.jpg")


def test_corrupt_images_are_named_left_out_and_counted(folder, tmp_path):
    said = []
    found = data.load(RECIPE, str(corrupted(folder, tmp_path, BAD)), None, None, say=said.append)
    assert found.corrupt == BAD
    assert (found.train.size, found.test.size) == (19, 19)
    assert said == [*(f"corrupt, left out: {name}" for name in BAD), "2 corrupt images left out"]


def test_others_take_the_place_of_corrupt_images(folder, tmp_path):
    root = str(corrupted(folder, tmp_path, BAD))
    found = data.load(RECIPE, root, 2 * (OF_EACH - 1), 10, say=lambda text: None)
    assert np.bincount(found.train.labels).tolist() == [9, 9]


def test_corrupt_files_are_looked_for_once(folder, tmp_path, monkeypatch):
    root = str(corrupted(folder, tmp_path, BAD))
    known = tmp_path / "images.json"
    first = data.load(LARGE, root, None, None, known, lambda text: None)
    monkeypatch.setattr(image_folder, "decoded", None)  # it would be called
    again = data.load(LARGE, root, None, None, known, lambda text: None)
    assert again.corrupt == first.corrupt == BAD
    assert again.digest == first.digest
    assert again.train.size == 19


def test_after_an_interrupt_no_other_image_is_read():
    read = []

    def reading(pool, number):
        while not pool._shutdown:
            time.sleep(0.001)
        read.append(number)

    def interrupted():
        with image_folder._threads() as pool:
            pool.map(functools.partial(reading, pool), range(1000))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert len(read) < 1000


def test_what_was_not_looked_at_is_looked_at_later(folder, tmp_path):
    root = str(corrupted(folder, tmp_path, ("train/cat/9.png",)))
    known = tmp_path / "images.json"
    assert not data.load(LARGE, root, 2, None, known, lambda text: None).corrupt
    found = data.load(LARGE, root, None, None, known, lambda text: None)
    assert found.corrupt == ("train/cat/9.png",)


def test_a_test_folder_without_classes_is_passed_over(folder, tmp_path):
    shutil.copytree(folder / "train", tmp_path / "i" / "train")
    shutil.copytree(folder / "test", tmp_path / "i" / "val")
    (tmp_path / "i" / "test").mkdir()
    shutil.copy(folder / "test" / "cat" / "0.jpg", tmp_path / "i" / "test")
    assert data.load(RECIPE, str(tmp_path / "i"), None, None).test.size == 20


def test_classes_without_images_are_an_error(folder, tmp_path):
    shutil.copytree(folder / "train", tmp_path / "few")
    for file in sorted((tmp_path / "few" / "cat").iterdir())[4:]:
        file.unlink()
    with pytest.raises(StudyError, match="of class cat there are 0 images for --test_examples"):
        data.load(RECIPE, str(tmp_path / "few"), None, None)
    shutil.rmtree(tmp_path / "few" / "cat")
    with pytest.raises(StudyError, match="has the class dog alone; two are needed"):
        data.load(RECIPE, str(tmp_path / "few"), None, None)


def test_class_folders_alone_are_split(folder):
    found = data.load(RECIPE, str(folder / "train"), None, None)
    assert (found.train.size, found.test.size) == (18, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere", None), "there is no folder"),
        (("", None), "has no images"),
        (("half", None), "has no test folder"),
        (("train", 3), "a multiple of 2 is"),
        (("train", 200), "asks for 100 images of each class; of cat there are 9"),
    ],
)
def test_missing_images_are_an_error(folder, tmp_path, arguments, message):
    shutil.copytree(folder / "train", tmp_path / "half" / "train")
    (tmp_path / "train").symlink_to(folder / "train")
    where = tmp_path / "empty" if not arguments[0] else tmp_path / arguments[0]
    (tmp_path / "empty").mkdir()
    with pytest.raises(StudyError, match=message):
        data.load(RECIPE, str(where), arguments[1], None)


def test_without_tensorflow_datasets_there_is_a_way(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(StudyError, match="not installed: pip install tensorflow-datasets, or give"):
        data.load(RECIPE, None, None, None)


@pytest.mark.parametrize("recipe", [RECIPE, LARGE], ids=["in memory", "from files"])
def test_batches_are_a_function_of_seed_and_epoch(folder, recipe):
    part = data.load(recipe, str(folder), None, None).train
    pipeline = Pipeline(recipe, 2, 4)

    def epoch(seed, number):
        return np.concatenate([x.numpy().ravel() for x, _ in pipeline.training(part, seed, number)])

    first = epoch(0, 0)
    assert first.shape == (20 * 32 * 32 * 3,)
    np.testing.assert_array_equal(first, epoch(0, 0))
    assert np.any(first != epoch(0, 1))
    assert np.any(first != epoch(1, 0))


def test_an_epoch_has_every_image_once(images):
    """Without augmentations, so that images can be told apart."""
    plain = dataclasses.replace(RECIPE, padding=0, hole=0)
    batches = Pipeline(plain, 2, 4).training(images.train, 0, 0)
    seen = sorted(float(np.abs(x).sum()) for xs, _ in batches for x in xs.numpy())
    everything = Pipeline(plain, 2, 4).testing(images.train)
    wanted = sorted(float(np.abs(x).sum()) for xs, _ in everything for x in xs.numpy())
    np.testing.assert_allclose(seen, wanted, rtol=1e-5)


def test_holes_have_their_size(images):
    (batch, _), *_ = Pipeline(RECIPE, 2, 20).training(images.train, 0, 0)
    zeros = np.all(batch.numpy() == 0, axis=-1).sum((1, 2))
    np.testing.assert_array_equal(zeros, RECIPE.hole**2)


@pytest.mark.parametrize("recipe", [RECIPE, LARGE], ids=["in memory", "from files"])
def test_labels_are_shares(folder, recipe):
    part = data.load(recipe, str(folder), None, None).train
    for x, labels in Pipeline(recipe, 2, 4).training(part, 0, 0):
        assert x.dtype == tf.float32
        np.testing.assert_allclose(labels.numpy().sum(1), 1, rtol=1e-6)


# ----------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))
def test_learning_rates_rise_to_the_peak_and_fall_to_zero(recipe):
    rates = [learning_rate(recipe, done, 2 * recipe.batch) for done in np.linspace(0, 1, 1001)]
    peak = int(np.argmax(rates))
    assert rates[0] == 0
    assert rates[-1] == pytest.approx(0, abs=1e-9)
    assert rates[peak] == pytest.approx(2 * recipe.learning_rate, rel=0.01)
    assert peak / 1000 == pytest.approx(recipe.warmup / recipe.epochs, abs=0.002)
    assert np.all(np.diff(rates[:peak]) > 0)
    assert np.all(np.diff(rates[peak + 1 :]) < 0)


def test_what_a_recipe_asks_reaches_the_layers(each_keras):
    recipe = dataclasses.replace(RECIPES["resnet50_imagenet"], size=32)
    model = models.made(each_keras, recipe, "original", 2, 0.03125, 0)
    kernels = [layer for layer in model.layers if hasattr(layer, "kernel_regularizer")]
    norms = models.norms(model)
    assert len(kernels) == 54
    assert [float(layer.kernel_regularizer.l2) for layer in kernels] == pytest.approx([5e-5] * 54)
    assert {layer.momentum for layer in norms} == {recipe.norm_momentum}
    assert norms[-1].moving_mean.shape == (2048 // 32,)
    zero = [layer.name for layer in norms if not np.any(models.statistics(layer)["gamma"])]
    assert len(zero) == 16
    assert all(name.endswith("_3_bn") for name in zero)


# ----------------------------------------------------------------------------------- pairing


def test_variants_start_from_the_same_weights(each_keras):
    made = {
        variant: models.made(each_keras, RECIPE, variant, 2, 0.0625, 7)
        for variant in ("original", "strided2", "mbn1")
    }
    original = [np.ravel(w) for w in made["original"].get_weights()]
    for variant in ("strided2", "mbn1"):
        weights = [np.ravel(w) for w in made[variant].get_weights()]
        np.testing.assert_equal(weights, original)
    assert len({models.digest(model) for model in made.values()}) == 1
    other = models.made(each_keras, RECIPE, "original", 2, 0.0625, 8)
    assert models.digest(other) != models.digest(made["original"])


@pytest.mark.parametrize("key", ["initial_weights", "first_batch"])
def test_runs_of_a_seed_are_paired(finished, key):
    original, strided = (finished.finished()[variant, 0] for variant in VARIANTS)
    assert original[key] == strided[key]


def test_variants_see_the_same_images(images, monkeypatch):
    """All of what they are given, without the training."""
    seen = {}
    monkeypatch.setattr(
        training, "_compiled", lambda keras, setting, classes, variant, seed: variant
    )
    monkeypatch.setattr(training.models, "norms", lambda model: [])
    monkeypatch.setattr(training.models, "parameters", lambda model: {})
    monkeypatch.setattr(training.models, "digest", lambda model: "")

    def epoch(model, batches, testing, watch):
        seen.setdefault(model, []).extend(part.numpy() for batch in batches for part in batch)
        return {}

    monkeypatch.setattr(training, "_epoch", epoch)
    setting = dataclasses.replace(SETTING, epochs=2)
    for variant in VARIANTS:
        training.run(setting, images, variant, 3)
    assert len(seen["original"]) == 2 * 2 * 2
    np.testing.assert_equal(seen["strided4"], seen["original"])


def test_what_is_not_paired_is_refused(copied):
    path = copied.path("strided4", 0)
    content = json.loads(path.read_text())
    content["record"]["first_batch"] = "another"
    path.write_text(json.dumps(content))
    with pytest.raises(StudyError, match=r"strided4, seed 0, is not paired .* first batch differ"):
        report.write(copied, 0.5, 5)


# ------------------------------------------------------------------------------------- proof


def test_runs_record_what_ran(finished):
    original, strided = (finished.finished()[variant, 0] for variant in VARIANTS)
    assert original["operations"] == {"FusedBatchNormGradV3": 8, "FusedBatchNormV3": 8}
    # Five of eight layers have maps that are large enough; gradients are corrected in their sample.
    assert strided["operations"]["InplaceAdd"] == 5
    assert strided["operations"]["FusedBatchNormGradV3"] == 8
    assert [layer["strides"] for layer in strided["layers"]] == [[4, 4]] * 5 + [[1, 1]] * 3
    assert original["parameters"] == strided["parameters"]
    for record in (original, strided):
        assert len(record["milliseconds"]) == 8
        for of_layer in record["milliseconds"].values():
            assert min(of_layer.values()) > 0


def test_the_original_under_a_false_name_is_an_error(images, copied, monkeypatch):
    monkeypatch.setattr(training_networks, "varied", lambda model, variant: model)
    copied.path("strided4", 1).unlink()
    with pytest.raises(StudyError, match=r"strided4 ran just what the original runs .* no result"):
        running.run_missing(SETTING, images, copied, VARIANTS, 2)
    assert ("strided4", 1) not in copied.finished()


def test_a_report_refuses_it_too(copied):
    path = copied.path("strided4", 1)
    content = json.loads(path.read_text())
    content["record"]["operations"] = copied.finished()["original", 1]["operations"]
    path.write_text(json.dumps(content))
    with pytest.raises(StudyError, match="strided4, seed 1, ran just what the original ran"):
        report.write(copied, 0.5, 5)


@pytest.mark.parametrize(
    "ran",
    [
        {"FusedBatchNormGradV3": 8, "FusedBatchNormV3": 8},
        {"FusedBatchNormGradV3": 7, "FusedBatchNormV3": 8},
        {"FusedBatchNormGradV3 (oneDNN)": 8, "FusedBatchNormEx (oneDNN)": 8},
    ],
    ids=["the same", "one not seen", "another's kernels"],
)
def test_what_the_original_runs_is_known_in_any_form(ran):
    original = {"FusedBatchNormGradV3": 8, "FusedBatchNormV3": 8}
    with pytest.raises(StudyError, match="no result"):
        running.check_operations("strided4", ran, original)
    running.check_operations("strided4", ran | {"InplaceAdd": 5}, original)
    running.check_operations("original", ran, original)


def test_strides_that_are_all_lowered_are_no_result(images, monkeypatch):
    monkeypatch.setattr(models, "strides", lambda layer: [1, 1])
    with pytest.raises(StudyError, match="every layer has lowered its stride to 1"):
        training.run(SETTING, images, "strided4", 0)


def test_what_tensorflow_ends_in_is_said(images, monkeypatch):
    def failing(error):
        def trained(*_):
            raise error

        return trained

    full = tf.errors.ResourceExhaustedError(None, None, "No space left on device")
    monkeypatch.setattr(training, "_trained", failing(full))
    with pytest.raises(OSError, match="No space left"):
        training.run(SETTING, images, "original", 0)
    gone = tf.errors.NotFoundError(None, None, "a.jpg; No such file")
    monkeypatch.setattr(training, "_trained", failing(gone))
    with pytest.raises(StudyError, match=r"original, seed 0, stopped: a\.jpg; No such file"):
        training.run(SETTING, images, "original", 0)


def test_gradients_without_names_go_to_their_layers():
    operations = [
        OpTime(name, op, times=(1.0,))
        for name, op in (
            ("net/a/FusedBatchNormV3", "FusedBatchNormV3"),
            ("gradient_tape/net/b/FusedBatchNormGradV3", "FusedBatchNormGradV3"),
            ("FusedBatchNormGradV3", "FusedBatchNormGradV3 (oneDNN)"),
            ("FusedBatchNormGradV3_4", "FusedBatchNormGradV3"),
            ("InplaceAdd", "InplaceAdd"),  # one, as there are layers with strides
            ("FusedBatchNormV3_7", "FusedBatchNormV3"),
            ("FusedBatchNormV3_8", "FusedBatchNormV3"),
            ("replica_1/FusedBatchNormV3_9", "FusedBatchNormV3"),  # one too many
            ("GatherV2", "GatherV2"),  # the pipeline's
            ("net/ab/Conv2D", "Conv2D"),
        )
    ]
    found = list(proof.attributed(operations, {"a": True, "b": False, "c": False}))
    assert [(one.layer, one.backward, one.operation.name) for one in found] == [
        ("a", False, "net/a/FusedBatchNormV3"),
        ("b", True, "gradient_tape/net/b/FusedBatchNormGradV3"),
        ("c", True, "FusedBatchNormGradV3"),
        ("a", True, "FusedBatchNormGradV3_4"),
        *(("", True, f"FusedBatchNormV3_{i}") for i in (7, 8)),
        ("", True, "replica_1/FusedBatchNormV3_9"),
        ("a", True, "InplaceAdd"),
    ]


# ------------------------------------------------------------------------------- resumption


def test_a_study_is_run_seed_by_seed_in_turns():
    assert list(standing.order(("original", "a", "b"), 2)) == [
        *(("original", 0), ("a", 0), ("b", 0)),
        *(("a", 1), ("b", 1), ("original", 1)),
    ]


@pytest.mark.parametrize("when", ["within a run", "between runs"])
def test_an_interrupted_study_goes_on_with_the_first_run_missing(
    images, tmp_path, monkeypatch, quick_runs, when
):
    results = results_in(tmp_path, images)
    begin(results)
    with monkeypatch.context() as patched:

        def interrupt(*_):
            if len(quick_runs) == 3:
                raise KeyboardInterrupt

        step = "epoch" if when == "within a run" else "end"
        patched.setattr(running.Progress, step, interrupt)
        with pytest.raises(KeyboardInterrupt):
            running.run_missing(SETTING, images, results, VARIANTS, 3)
    kept = set(results.finished())
    all_runs = list(standing.order(VARIANTS, 3))
    assert kept == set(all_runs[: 2 if when == "within a run" else 3])

    quick_runs.clear()
    results = results_in(tmp_path, images)
    begin(results)
    running.run_missing(SETTING, images, results, VARIANTS, 3)
    assert quick_runs == all_runs[len(kept) :]
    assert results.finished().keys() == set(all_runs)
    assert sorted(p.name for p in tmp_path.glob("[!.]*")) == ["runs", "study.json"]

    quick_runs.clear()
    assert running.run_missing(SETTING, images, results, VARIANTS, 3) == 0
    assert not quick_runs


def test_an_interrupt_in_the_middle_of_training_leaves_nothing(images, tmp_path):
    results = results_in(tmp_path, images)
    begin(results)

    def interrupted(record):
        raise KeyboardInterrupt

    now = functools.partial(standing.Standing, [("original", 0)], HERE)
    with pytest.raises(KeyboardInterrupt), results.claimed(now):
        training.run(SETTING, images, "original", 0, after_epoch=interrupted)
    assert not results.finished()
    assert [p.name for p in tmp_path.rglob("[!.]*") if p.is_file()] == ["study.json"]


def test_a_run_that_was_being_written_is_not_finished(copied):
    whole = copied.path("strided4", 1)
    half = whole.with_name(f"{whole.name}.part")
    half.write_text(whole.read_text()[:100])
    whole.unlink()
    begin(copied)
    assert len(copied.finished()) == 3
    copied.save("strided4", 1, {"another": "record"})
    assert not half.exists()
    assert copied.finished()["strided4", 1]["another"] == "record"


def test_a_run_that_cannot_be_kept_in_its_place_is_kept_elsewhere(copied, monkeypatch):
    monkeypatch.setattr(copied, "path", lambda variant, seed: Path("/nowhere/strided4-009.json"))
    with pytest.raises(StudyError, match="The run is kept as") as raised:
        copied.save("strided4", 9, {"a": "record"})
    kept = Path(str(raised.value).split(" kept as ")[1].split(";")[0])
    assert json.loads(kept.read_text())["record"] == {"a": "record"}
    shutil.rmtree(kept.parent)


def test_a_configuration_without_runs_binds_nobody(tmp_path, images):
    begin(results_in(tmp_path, images))
    other = results_in(tmp_path, images, dataclasses.replace(SETTING, batch=4))
    begin(other)
    assert Results.open(tmp_path).configuration["batch"] == 4


def test_a_full_disk_loses_nothing_that_is_finished(copied, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    before = copied.finished()
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    monkeypatch.setattr("os.fsync", full)
    now = functools.partial(standing.Standing, [("strided4", 9)], running.device())
    with pytest.raises(OSError, match="No space left"), copied.claimed(now):
        pytest.fail("there was no room, and the run was begun")
    with pytest.raises(OSError, match="No space left"):
        copied.save("strided4", 1, {"another": "record"})
    assert copied.finished() == before
    assert not list(copied.directory.glob("**/*.part"))
    assert not list(temporary.iterdir())


# ------------------------------------------------------------------------ several processes

HERE, THERE = "CPU, here", "1 x a GPU"


@pytest.fixture
def on(monkeypatch):
    """A function that has this process train on another device."""

    def use(name):
        monkeypatch.setattr(running, "device", lambda: name)

    use(HERE)
    return use


@pytest.fixture
def begun(images, tmp_path, quick_runs, on):
    """No runs, of a study that has begun."""
    results = results_in(tmp_path, images)
    with results.joined():
        yield results


@contextmanager
def claiming(results, run, device=HERE):
    """Has another process train a run."""
    claims = Claims(results.directory)
    with claims.lock():
        claim = claims.take(run, device)
    yield
    with claims.lock():
        claims.end(run, claim)


def test_a_run_is_trained_by_one_process(begun, images, quick_runs):
    with claiming(begun, ("strided4", 1)):
        assert running.run_missing(SETTING, images, begun, VARIANTS, 2) == 3
        assert begun.training() == {("strided4", 1): HERE}
    assert quick_runs == [("original", 0), ("strided4", 0), ("original", 1)]
    assert running.run_missing(SETTING, images, begun, VARIANTS, 2) == 1, "it was given up"
    assert not list(begun.directory.rglob("*.claim"))


def test_what_another_process_gives_up_is_taken(begun, images, quick_runs, monkeypatch):
    """While this one is still at work."""
    other = ExitStack()
    other.enter_context(claiming(begun, ("strided4", 0)))
    end = running.Progress.end

    def ended(progress, record):
        other.close()
        end(progress, record)

    monkeypatch.setattr(running.Progress, "end", ended)
    assert running.run_missing(SETTING, images, begun, VARIANTS, 2) == 4
    assert quick_runs[:2] == [("original", 0), ("strided4", 0)]


def test_another_original_goes_first_where_one_is_being_trained(begun, images, quick_runs):
    """A variant is compared with an original, whose runs compare with none."""
    with claiming(begun, ("original", 0)):
        running.run_missing(SETTING, images, begun, VARIANTS, 2)
    assert quick_runs == [("original", 1), ("strided4", 0), ("strided4", 1)]


def test_the_original_is_waited_for(begun, finished, images, quick_runs, monkeypatch, capsys):
    other = ExitStack()
    other.enter_context(claiming(begun, ("original", 0)))

    def sleep(_):
        assert not quick_runs
        begun.save("original", 0, finished.finished()["original", 0] | {"device": HERE})
        other.close()

    monkeypatch.setattr(time, "sleep", sleep)
    assert running.run_missing(SETTING, images, begun, VARIANTS, 1) == 1
    assert quick_runs == [("strided4", 0)]
    assert capsys.readouterr().err.startswith("waiting for the original, which another process")


def test_a_killed_process_has_no_claim(begun):
    program = (
        "import os, sys; from pathlib import Path; from study.claims import Claims\n"
        "held = Claims(Path(sys.argv[1])).take(('original', 0), 'a device')\n"
        "os.kill(os.getpid(), 9)"
    )
    killed = subprocess.run([sys.executable, "-c", program, begun.directory], cwd=ROOT, check=False)
    assert killed.returncode == -9
    claim = begun.path("original", 0).with_suffix(".claim")
    assert claim.stat().st_size == 1 << 20
    assert begun.training() == {}
    assert not claim.exists()


def test_progress_counts_the_runs_of_all_processes(begun, images, quick_runs, capsys):
    with claiming(begun, ("original", 0)):
        for run in (("original", 1), ("strided4", 1)):
            begun.save(*run, {"device": THERE, "epochs": []})
        running.run_missing(SETTING, images, begun, VARIANTS, 3)
    lines = [line.split(" in ")[0] for line in capsys.readouterr().err.splitlines()]
    assert [line.rsplit(": ", 1)[0] for line in lines] == [
        "run 3/6: original, seed 2",
        "run 4/6: strided4, seed 0",
        "run 5/6: strided4, seed 2",
    ]


def test_time_left_is_that_of_runs_on_this_device(begun, images, quick_runs, monkeypatch):
    totals = []
    update = running.rich.progress.Progress.update

    def updated(bar, task, **what):
        totals.append((what["completed"], what["total"]))
        update(bar, task, **what)

    monkeypatch.setattr(running.rich.progress.Progress, "update", updated)
    begun.save("original", 1, {"device": THERE, "epochs": []})
    running.run_missing(SETTING, images, begun, VARIANTS, 3)
    assert totals == [(0, 4), (1, 4), (2, 4), (3, 4)]


def test_a_configuration_binds_while_a_process_is_at_work(begun, images):
    """Before its first run, too."""
    other = results_in(begun.directory, images, dataclasses.replace(SETTING, batch=4))
    with pytest.raises(StudyError, match="batch: there 8, here 4"):
        begin(other)
    begin(results_in(begun.directory, images))


# --------------------------------------------------------------------------- several devices


def test_a_seed_is_trained_on_one_device(begun, images, quick_runs, on):
    on(THERE)
    assert running.run_missing(SETTING, images, begun, VARIANTS, 1) == 2
    assert running.run_missing(SETTING, images, begun, ["original"], 2) == 1
    quick_runs.clear()
    on(HERE)
    assert running.run_missing(SETTING, images, begun, VARIANTS, 3) == 2
    assert quick_runs == [("original", 2), ("strided4", 2)]
    assert running.run_missing(SETTING, images, begun, VARIANTS, 3) == 0
    now = standing.Standing(all_runs(3), HERE, begun.finished(), {("strided4", 1): THERE})
    assert str(now) == "5 of 6 runs are finished; other processes train 1"
    now = dataclasses.replace(now, training={})
    assert str(now) == f"5 of 6 runs are finished; seeds begun on {THERE} are left to that"
    on(THERE)
    assert running.run_missing(SETTING, images, begun, VARIANTS, 3) == 1
    assert quick_runs[-1] == ("strided4", 1)


def all_runs(seeds):
    return list(standing.order(VARIANTS, seeds))


def test_a_seed_in_training_is_not_begun_on_another_device(begun, images, quick_runs):
    with claiming(begun, ("original", 0), THERE):
        assert running.run_missing(SETTING, images, begun, VARIANTS, 2) == 2
    assert quick_runs == [("original", 1), ("strided4", 1)]


def test_the_original_goes_first_on_every_device(begun, images, quick_runs, on):
    """Whose turn it is on the other does not count."""
    assert all_runs(2)[2:] == [("strided4", 1), ("original", 1)]
    on(THERE)
    running.run_missing(SETTING, images, begun, VARIANTS, 1)
    quick_runs.clear()
    on(HERE)
    running.run_missing(SETTING, images, begun, VARIANTS, 2)
    assert quick_runs == [("original", 1), ("strided4", 1)]


def test_a_report_pairs_runs_of_one_device_and_times_one(begun, images, quick_runs, on):
    on(THERE)
    running.run_missing(SETTING, images, begun, VARIANTS, 1)
    running.run_missing(SETTING, images, begun, ["original"], 4)
    on(HERE)
    running.run_missing(SETTING, images, begun, VARIANTS, 7)
    lone = begun.finished()["strided4", 5] | {"device": "another device"}
    begun.save("strided4", 1, lone)
    begun.save("mbn1", 0, lone | {"device": THERE, "operations": {"Mul": 1}})
    page = report.write(begun, 0.5, 5).read_text()
    lines = page.splitlines()
    assert "; 4 pairs." in page
    assert "on the same device; not reported: strided4, seed 1." in page
    assert f"| runs by device | {HERE}: 6, {THERE}: 6 |" in page
    assert page.count(f" All of the runs on {HERE}.") == 2
    for title, count in (
        ("| variant | runs | mean sec", 3),
        ("| variant | pairs | mean difference, %", 3),
    ):
        ((first, *_), *_) = [lines[i + 2 :] for i, x in enumerate(lines) if x.startswith(title)]
        assert first.split(" | ")[1] == str(count)
    (mbn1,) = [line for line in lines if line.startswith("- **mbn1**")]
    assert f"time not compared, since times are those of {HERE}; 1 pairs." in mbn1


# ---------------------------------------------------------------------- other configurations


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 0.5}, r"width: there 0\.0625, here 0\.5"),
        ({"dtype": "mixed_float16"}, 'dtype: there "float32", here "mixed_float16"'),
        (
            {"recipe": dataclasses.replace(RECIPE, momentum=0.8)},
            r"recipe\.momentum: there 0\.9, here 0\.8",
        ),
    ],
)
def test_results_of_another_configuration_are_refused(copied, images, change, message):
    other = results_in(copied.directory, images, dataclasses.replace(SETTING, **change))
    before = copied.finished()
    with pytest.raises(StudyError, match=message):
        begin(other)
    assert copied.finished() == before


def test_results_of_another_version_are_refused(copied, images, monkeypatch):
    monkeypatch.setattr("mbn_rewrite.__version__", "99")
    with pytest.raises(StudyError, match=r'versions\.mbn_rewrite: there ".*", here "99"'):
        begin(results_in(copied.directory, images))


def test_another_format_is_refused(copied):
    (copied.directory / "study.json").write_text('{"format": 0}')
    with pytest.raises(StudyError, match="another version of this program: its format is 0"):
        Results.open(copied.directory)


def test_a_run_of_another_configuration_is_refused(copied):
    path = copied.path("strided4", 0)
    path.write_text(path.read_text().replace(copied.digest, "0" * 16))
    with pytest.raises(StudyError, match="no run of the configuration"):
        copied.finished()


def test_a_copied_run_does_not_count_twice(copied):
    shutil.copy(copied.path("strided4", 0), copied.path("strided4", 2))
    with pytest.raises(StudyError, match="is a copy of the run strided4, seed 0"):
        copied.finished()


def test_differences_name_every_field():
    before, now = {"a": 1, "b": {"c": [1], "d": 0}}, {"b": {"c": [2], "d": 0}, "e": 3}
    assert list(differences(before, now)) == [
        "a: there 1, here null",
        "b.c: there [1], here [2]",
        "e: there null, here 3",
    ]


# ------------------------------------------------------------------------- earlier programs


@pytest.fixture
def earlier(tmp_path):
    """A study of two pairs begun with the version before, when this program was elsewhere."""
    shutil.copytree(ROOT / "tests" / "data" / "0.1.0" / "study", tmp_path / "earlier")
    return Results.open(tmp_path / "earlier")


def as_begun_now(earlier, **changed):
    """The same study, as this program describes it: runs name their device."""
    versions = earlier.configuration["versions"] | {"program": program.digest()}
    configuration = earlier.configuration | {"versions": versions} | changed
    del configuration["device"]
    return Results(earlier.directory, configuration)


def test_a_study_begun_with_the_version_before_is_reported(earlier):
    text = report.write(earlier, 0.5, 5).read_text()
    assert "- **strided4**: accuracy " in text
    assert "; 2 pairs." in text
    assert earlier.configuration["versions"]["program"] in text


def test_a_study_begun_with_the_version_before_goes_on(earlier, images, quick_runs):
    """Where this fails, code that trains was changed; see `study.program.TRAIN_ALIKE`."""
    results = as_begun_now(earlier)
    assert results.digest != earlier.digest
    begin(results)
    assert running.run_missing(SETTING, images, results, VARIANTS, 3) == 2
    assert quick_runs == [("original", 2), ("strided4", 2)]
    finished = Results.open(earlier.directory).finished()
    assert len(finished) == 6
    assert finished["original", 1]["device"] == "CPU, a processor, 2 cores"
    assert finished["original", 2]["device"] == running.device()


def test_it_goes_on_with_its_own_flags_alone(earlier):
    with pytest.raises(StudyError, match=r"width: there 0\.0625, here 1") as raised:
        begin(as_begun_now(earlier, width=1))
    assert "program" not in str(raised.value)


@pytest.mark.parametrize("alike", [(), ("fa8880dd70377ef1",), (program.digest(),)])
def test_another_program_is_refused(earlier, monkeypatch, alike):
    monkeypatch.setattr(program, "TRAIN_ALIKE", alike)
    with pytest.raises(StudyError, match=r'versions\.program: there "fa8880dd70377ef1", here'):
        begin(as_begun_now(earlier))


CODE = '''"""Module."""
from a import b

LIMIT = 1  # of all

def f(x):
    """Docstring."""
    import c
    # Comment.
    return c.g(x) + """text"""

class C:
    pass
'''
MOVED = '''"""Another."""
import d
if TYPE_CHECKING:
    import e

class C:
    """New docstring."""

    pass

LIMIT = 1  # of all

def f(x):

    return c.g(x) + """text"""
'''


def test_a_program_is_its_code_wherever_it_stands():
    code = set(program._definitions(CODE))
    assert code == set(program._definitions(MOVED))
    for old, new in (("g(x)", "g(y)"), ('"""text"""', '"""test"""'), ("= 1", "= 2")):
        assert code != set(program._definitions(CODE.replace(old, new)))


def test_code_that_runs_in_training_is_in_the_digest():
    names = {"/".join(file.parts[-2:]) for file in program._files()}
    assert names >= {
        *("study/models.py", "study/pipeline.py", "study/recipes.py", "study/training.py"),
        *("training/layers.py", "tensorflow/sampled_batch_norm.py", "training/strides.py"),
        *("keras3/training_layers.py", "tf_keras/training_layers.py"),
        "models/training_networks.py",
    }


@pytest.mark.parametrize(
    ("variants", "message"),
    [
        (["strided4"], "have to have original"),
        (["original", "striped4"], "there is no variant 'striped4'"),
        (["original", "none"], "normalises nothing"),
    ],
)
def test_variants_are_checked(variants, message):
    with pytest.raises(StudyError, match=message):
        running.checked_variants(variants)


# -------------------------------------------------------------------------------- statistics

SOME = [0.3, -0.1, 0.4, 0.2, -0.2, 0.5, 0.05, 0.15]


def test_tests_are_those_of_scipy():
    found = statistics.compare(SOME, 0.5)
    of_scipy = stats.ttest_1samp(SOME, 0)
    assert found.t_test == pytest.approx(of_scipy.pvalue)
    assert found.interval == pytest.approx(tuple(of_scipy.confidence_interval(0.95)))
    assert found.wilcoxon == pytest.approx(stats.wilcoxon(SOME).pvalue)
    one_sided = [
        stats.ttest_1samp(SOME, -0.5, alternative="greater").pvalue,
        stats.ttest_1samp(SOME, 0.5, alternative="less").pvalue,
    ]
    assert found.equivalence == pytest.approx(max(one_sided))


def test_equivalence_is_an_interval_within_the_margin():
    low, high = stats.ttest_1samp(SOME, 0).confidence_interval(0.9)
    edge = max(-low, high)
    assert statistics.compare(SOME, edge * 1.001).equivalence < 0.05
    assert statistics.compare(SOME, edge * 0.999).equivalence > 0.05


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ([0.1, -0.1, 0.05, -0.05, 0.02], "equivalent within the margin"),
        ([0.2, 0.21, 0.19, 0.2, 0.22], "different, within the margin"),
        ([3.0, 3.1, 2.9, 3.2, 2.8], "different"),
        ([3.0, -3.0, 2.0, -2.0, 1.0], "undecided"),
        ([0.0, 0.0, 0.0], "all pairs are the same to the last digit, which says nothing"),
        ([2.0, 2.0, 2.0], "different"),
        ([0.1], "one pair says nothing"),
    ],
)
def test_verdicts(differences, verdict):
    assert statistics.compare(differences, 1.0).verdict == verdict


def test_holm_counts_the_variants():
    rng = np.random.default_rng(0)
    several = {name: rng.normal(0.3, 1, 10) for name in "abc"}
    compared = statistics.compare_all(several, 1.0)
    ps = sorted(c.t_test for c in compared.values())
    first, second = 3 * ps[0], max(3 * ps[0], 2 * ps[1])
    expected = [min(1, p) for p in (first, second, max(second, ps[2]))]
    assert sorted(c.holm for c in compared.values()) == pytest.approx(expected)
    assert statistics.compare_all({"a": several["a"]}, 1.0)["a"].holm == compared["a"].t_test


@pytest.mark.parametrize(("count", "margin"), [(2, 4.0), (5, 1.5), (10, 1.0), (30, 0.5)])
def test_power_is_how_often_equivalence_is_shown(count, margin):
    rng = np.random.default_rng(0)
    pairs = rng.standard_normal((20_000, count))
    error = pairs.std(1, ddof=1) / np.sqrt(count)
    shown = np.abs(pairs.mean(1)) < margin - stats.t.ppf(0.95, count - 1) * error
    assert statistics.power(1, count, margin) == pytest.approx(shown.mean(), abs=0.015)


def test_power_grows_with_runs():
    powers = [statistics.power(1.0, count, 0.7) for count in (2, 5, 10, 20, 40, 60)]
    assert np.all(np.diff(powers) > 0)
    assert powers[0] < 0.1
    assert powers[-1] > 0.99


@pytest.mark.parametrize("deviation", [0.1, 0.5, 2.0])
def test_needed_is_the_least_that_is_enough(deviation):
    count = statistics.needed(deviation, 0.5)
    assert statistics.power(deviation, count, 0.5) >= 0.8
    assert count == 2 or statistics.power(deviation, count - 1, 0.5) < 0.8


def test_needed_gives_up():
    assert statistics.needed(1000.0, 0.5) is None


# ------------------------------------------------------------------------------------ report


@pytest.fixture(scope="session")
def page(finished):
    """The text of the page, written once."""
    return report.write(finished, 0.5, 5).read_text()


def test_a_report_has_all_parts(finished, page):
    for heading in ("Accuracy", "Time per epoch", "What ran", "What was run", "What was not run"):
        assert f"## {heading}\n" in page
    pictures = sorted(path.name for path in finished.directory.glob("*.png"))
    assert pictures == [
        *("accuracy.png", "accuracy_differences.png", "layer_times.png", "norms_first.png"),
        *("norms_last.png", "norms_middle.png", "time_differences.png"),
    ]
    assert all(f"({name})" in page for name in pictures)
    assert "| prep_bn, 32x32x4 | - | 4,4 |" in page
    assert "| layer3_res2_bn, 4x4x16 | - | 1,1\\* |" in page


@pytest.mark.parametrize(
    "line",
    [
        "ResNet9 in full width: this has 0.0625 of its channels.",
        "All 24 epochs: these are 1.",
        "The recipe's batch of 512: this one is 8.",
        "30 runs of each variant: these are 2 of original, 2 of strided4.",
        "These variants: strided2, strided8, mbn1, mbn2, mbn4, mbn8.",
        "These recipes: resnet50_imagenette, resnet50_imagenet, resnet50_imagenet_scripts.",
        "The same in Keras 3.",
        "Mixed precision.",
        "Several devices at a time.",
    ],
)
def test_a_report_names_what_was_not_run(page, line):
    assert f"- {line}\n" in page[page.index("## What was not run") :]


def test_runs_that_diverged_and_chance_are_warned_of(copied):
    for (variant, seed), record in copied.finished().items():
        record["epochs"][0] |= {"loss": float("nan"), "test_accuracy": 0.5}
        copied.save(variant, seed, record)
    text = report.write(copied, 0.5, 5).read_text()
    assert "- **Warning**: diverged, the loss is not finite: original, seed 0; " in text
    assert "- **Warning**: the original has learnt little: 50.0%" in text
    assert "all pairs are the same to the last digit" in text


def test_what_is_in_no_pair_is_named(copied):
    copied.path("original", 1).unlink()
    text = report.write(copied, 0.5, 5).read_text()
    assert (
        "- The other half of a pair, on the same device; not reported: strided4, seed 1.\n" in text
    )


def test_one_epoch_gives_no_times(page):
    assert "time not compared, since the one epoch has tracing" in page


def test_only_pairs_are_reported(copied):
    copied.path("original", 1).unlink()
    pairs = report.paired(copied.finished())
    assert {variant: list(of_variant) for variant, of_variant in pairs.items()} == {
        "original": [0],
        "strided4": [0],
    }


def test_without_a_pair_there_is_no_report(copied):
    for seed in (0, 1):
        copied.path("original", seed).unlink()
    with pytest.raises(StudyError, match="no run of a variant has one of the original"):
        report.write(copied, 0.5, 5)


# ----------------------------------------------------------------------------- the other Keras


def test_keras_3_and_mixed_precision(images):
    setting = dataclasses.replace(SETTING, keras="keras_3", dtype="mixed_bfloat16")
    record = training.run(setting, images, "mbn2", 0)
    assert np.isfinite(record["epochs"][0]["loss"])
    assert record["operations"]["FusedBatchNormGradV3"] == 8
    assert record["layers"][0]["strides"] == [2, 2]


# -------------------------------------------------------------------------------- the program


def raising(error):
    def command():
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (StudyError("why"), 1, "error: why\n"),
        (KeyboardInterrupt(), 130, "interrupted. Finished runs are kept, 4 in "),
        (
            OSError(errno.ENOSPC, "full"),
            1,
            "error: the disk is full. Finished runs are kept, 4 in ",
        ),
    ],
)
def test_what_goes_wrong_is_said_in_one_message(finished, capsys, error, code, message):
    assert exit_code(raising(error), finished.directory) == code
    said = capsys.readouterr().err
    assert said.startswith(message)
    assert ("goes on from there" in said) == (not isinstance(error, StudyError))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "one command is needed, run or report"),
        (["run"], "--results is missing"),
        (["run", "--results=nowhere", "--recipe=resnet9"], "resnet50_imagenet_scripts"),
    ],
)
def test_wrong_command_lines_are_errors(tmp_path, arguments, message):
    command = [sys.executable, "-m", "study", *arguments]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=env, check=False
    )
    assert done.returncode == 1
    assert message in done.stderr + done.stdout
    assert not list(tmp_path.iterdir())

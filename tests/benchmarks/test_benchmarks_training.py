"""The benchmark of training steps: what it compares, what it refuses, and how it reads profiles."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import tensorflow as tf
from tensorflow.tsl.profiler.protobuf import xplane_pb2

from benchmarks.common import charts, devices, results
from benchmarks.models.training_networks import KERAS, NETWORKS
from benchmarks.training import candidates, checks, measuring, operations
from benchmarks.training import rows as training_rows
from benchmarks.training.backends import in_use
from benchmarks.training.rows import Row, Settings
from benchmarks.training.steps import Batch
from benchmarks.training.tensorflow import attribution, profiles
from mbn_rewrite.errors import RewriteError

pytestmark = pytest.mark.slow

SETTINGS = Settings(
    batch=4, size=32, width=0.0625, classes=4, repeats=2, memory=False, profiled_steps=3
)
BATCH = Batch.random(SETTINGS.batch, SETTINGS.size, SETTINGS.classes)
LAYERS = [
    *("prep_bn", "layer1_bn", "layer1_res1_bn", "layer1_res2_bn"),
    *("layer2_bn", "layer3_bn", "layer3_res1_bn", "layer3_res2_bn"),
]
VARIANTS = ("original", "strided1", "strided2", "mbn1", "none")
WITH_LAYERS = VARIANTS[:-1]


@pytest.fixture(autouse=True)
def _fresh_keras():
    """In place of that of all tests: here every layer has a name, and clearing takes long."""


@pytest.fixture(autouse=True, scope="module")
def _fresh_keras_afterwards():
    yield
    for package in in_use().kerases.values():
        package.backend.clear_session()


def rows_of(keras, *variants):
    return [Row("ResNet9", keras, variant) for variant in variants]


@pytest.fixture(scope="module", params=KERAS)
def measured(request, tmp_path_factory):
    """Rows by variant, and what ran by layer."""
    rows = rows_of(request.param, *VARIANTS)
    layers = {}
    measuring.measure(rows, SETTINGS, layers, str(tmp_path_factory.mktemp("profiles")))
    return {row.variant: row for row in rows}, layers


# ----------------------------------------------------------------------------- what is compared


@pytest.mark.parametrize(
    ("variant", "kind", "strides"),
    [
        ("original", "BatchNormalization", None),
        ("strided1", "StridedBatchNormalization", (1, 1)),
        ("strided4", "StridedBatchNormalization", (4, 4)),
        ("mbn2", "ModifiedBatchNormalization", (2, 2)),
    ],
)
@pytest.mark.parametrize("keras", KERAS)
def test_variants_have_their_layers(keras, variant, kind, strides):
    model = candidates.build(Row("ResNet9", keras, variant), SETTINGS).model
    norms = operations.norms_of(model)
    assert [norm.name for norm in norms] == LAYERS
    assert {type(norm).__name__ for norm in norms} == {kind}
    assert getattr(norms[0], "strides", None) == strides


@pytest.mark.parametrize("keras", KERAS)
def test_without_batch_norm_there_is_none(keras):
    model = candidates.build(Row("ResNet9", keras, "none"), SETTINGS).model
    assert operations.norms_of(model) == []


def test_all_is_measured(measured):
    rows, _ = measured
    assert [row.failure for row in rows.values()] == [""] * len(VARIANTS)
    assert {len(row.seconds) for row in rows.values()} == {SETTINGS.repeats}
    assert len({rows[variant].parameters for variant in WITH_LAYERS}) == 1
    assert [rows[variant].lowered for variant in WITH_LAYERS] == [0, 0, 2, 0]


def test_losses_at_stride_1_are_the_originals(measured):
    rows, _ = measured
    for variant in ("strided1", "mbn1"):
        assert rows[variant].loss_tolerances == pytest.approx([1e-3] * 5, abs=1e-3)
        assert len(rows[variant].loss_errors) == 5
        assert rows[variant].losses == pytest.approx(rows["original"].losses, rel=1e-3)
    # It is trained, so that a wrong gradient would show.
    assert rows["original"].losses[-1] < 0.9 * rows["original"].losses[0]


def test_other_losses_are_refused(measured):
    rows, _ = measured
    row = Row("ResNet9", "tf_keras", "strided1", losses=rows["strided2"].losses)
    checks.compare_losses(row, rows["original"], rows["strided1"].loss_tolerances)
    assert row.failure.startswith("WRONG: at stride 1")


@pytest.mark.parametrize(
    ("losses", "tolerances", "failure", "notes"),
    [
        ([1.0005, 2.0], [1e-3, 1e-3], "", 0),
        ([1.0, 2.1], [1e-3, 1e-3], "WRONG: at stride 1 a loss is 5e-02 off", 0),
        ([math.nan, 2.0], [1e-3, 1e-3], "WRONG: at stride 1 a loss is nan off", 0),
        ([1.0, 2.1], [1e-3], "", 1),
    ],
    ids=["right", "wrong", "nan", "not_compared"],
)
def test_what_is_said_of_losses(losses, tolerances, failure, notes):
    row = Row("ResNet9", "tf_keras", "strided1", losses=losses)
    original = Row("ResNet9", "tf_keras", "original", losses=[1.0, 2.0])
    checks.compare_losses(row, original, tolerances)
    assert row.failure.startswith(failure)
    assert bool(row.failure) == bool(failure)
    assert len(row.notes) == notes


# ------------------------------------------------------------------------------------ operations


def test_other_operations_run_where_there_is_a_sample(measured):
    rows, _ = measured
    original, strided = rows["original"].ops, rows["strided2"]
    sampled = [name for name, used in strided.strides.items() if max(used) > 1]
    assert len(sampled) == 6
    for name in sampled:
        assert "GatherV2" in strided.ops[name]["forward"]
        assert "InplaceAdd" in strided.ops[name]["backward"]
        assert strided.ops[name] != original[name]


def test_stride_1_runs_the_fused_operation(measured):
    rows, _ = measured
    kinds = rows["strided1"].ops["prep_bn"]
    assert [kind.startswith("FusedBatchNorm") for kind in kinds["forward"]] == [True]
    assert [kind.startswith("FusedBatchNormGradV3") for kind in kinds["backward"]] == [True]
    same = rows["original"].ops == rows["strided1"].ops
    assert same == (rows["original"].keras == "tf_keras")
    assert same == bool(rows["strided1"].notes)


def test_the_original_under_another_name_is_refused(monkeypatch):
    real = NETWORKS["ResNet9"]
    monkeypatch.setitem(
        NETWORKS,
        "ResNet9",
        lambda keras, variant, **options: real(keras, "original", **options),
    )
    original, *others = rows_of("tf_keras", "original", "strided4", "mbn1")
    measuring.measure([original, *others], SETTINGS, {})
    assert original.measured
    for row in others:
        assert row.failure == "RUNS WHAT THE ORIGINAL RUNS in prep_bn and 7 more"
        assert not row.seconds


def _row(variant, forward, strides=(2, 2), keras="tf_keras"):
    ops = {"bn": {"forward": forward, "backward": ["Grad"]}}
    return Row("ResNet9", keras, variant, ops=ops, strides={"bn": list(strides)})


@pytest.mark.parametrize(
    ("row", "failure"),
    [
        (_row("original", ["Fused"]), ""),
        (_row("strided2", ["Fused", "GatherV2"]), ""),
        (_row("strided2", ["Fused"]), "RUNS WHAT THE ORIGINAL RUNS in bn"),
        (_row("strided1", ["Fused"], (1, 1)), ""),
        (_row("strided1", ["Fused"], (1, 1), "keras_3"), "RUNS WHAT THE ORIGINAL RUNS in bn"),
        (_row("mbn1", ["Fused"], (1, 1)), "RUNS WHAT THE ORIGINAL RUNS in bn"),
        (_row("mbn1", []), "NOTHING RAN forward or backward in bn"),
        (
            _row("strided4", ["Fused"], (1, 1)),
            "EVERY STRIDE IS LOWERED to 1: the images are too small to sample",
        ),
        (_row("none", ["Fused"]), "RUNS BatchNormalization in bn"),
        (
            Row("ResNet9", "tf_keras", "strided2"),
            "HAS 0 BatchNormalization layers; the original has 1",
        ),
    ],
    ids=lambda value: value.variant if isinstance(value, Row) else value[:12],
)
def test_what_is_said_of_operations(row, failure):
    original = _row("original", ["Fused"], (1, 1), row.keras)
    assert checks.check_operations(row, original) == failure


# -------------------------------------------------------------------------------------- profiles


@pytest.mark.parametrize("variant", WITH_LAYERS)
def test_every_layer_has_time_forward_and_backward(measured, variant):
    layers = measured[1][variant]
    assert list(layers.layers) == LAYERS
    assert all(layer.forward_milliseconds > 0 for layer in layers.layers.values())
    assert all(layer.backward_milliseconds > 0 for layer in layers.layers.values())


@pytest.mark.parametrize("variant", VARIANTS)
def test_all_time_is_attributed(measured, variant):
    layers = measured[1][variant]
    assert layers.unattributed == ()
    assert not [op for op in layers.elsewhere if "BatchNorm" in op.op or "_bn" in op.name]
    # What has a scope is in that of its layer.
    for layer in layers.layers.values():
        scoped = [op.name for op in (*layer.forward, *layer.backward) if "/" in op.name]
        assert scoped
        assert all(f"/{layer.name}" in name for name in scoped)
    shares = [layers.bn_milliseconds, operations.total(layers.elsewhere)]
    assert sum(shares) == pytest.approx(layers.milliseconds)


def test_gradients_of_several_uses_belong_to_their_layer(measured):
    """Keras 3's BatchNormalization reads its input three times: their sum is its own."""
    rows, layers = measured
    sums = [op.op for op in layers["original"]["layer2_bn"].backward if "/" not in op.name]
    assert set(sums) == ({"AddN"} if rows["original"].keras == "keras_3" else set())


@pytest.mark.parametrize("keras", KERAS)
def test_names_that_count_up_are_told_apart(keras):
    """As Keras names layers, "bn_1" may be the scope of "bn", and is that of "bn_1" in tf_keras."""
    package = in_use().kerases[keras]
    layers = package.layers
    x = package.Input((4, 4, 3))
    y = x
    for name in ("bn", "bn_1", "bn_1_1"):
        y = layers.BatchNormalization(name=name)(layers.ReLU()(y))
    model = package.Model(x, y)
    step = tf.function(lambda x: model(x, training=True))
    images = tf.random.normal((2, 4, 4, 3))
    step(images)
    ran = profiles.profiled(lambda: step(images), 2)
    found = attribution.by_layer(ran, model, step.get_concrete_function(images))
    assert all(layer.forward for layer in found.layers.values())
    scopes = [
        {op.name.split("/")[1] for op in layer.forward if "/" in op.name}
        for layer in found.layers.values()
    ]
    assert [len(names) for names in scopes] == [1, 1, 1]
    assert len(set.union(*scopes)) == 3


def test_a_model_that_is_not_called_is_refused():
    model = candidates.build(Row("ResNet9", "tf_keras", "original"), SETTINGS).model
    other = tf.function(lambda x: x + 1).get_concrete_function(tf.zeros([2]))
    with pytest.raises(ValueError, match="does not call the layer 'prep_bn'"):
        attribution.by_layer([], model, other)


@pytest.mark.parametrize("keras", KERAS)
def test_operations_that_xla_compiles(keras):
    settings = Settings(batch=4, size=32, width=0.0625, classes=4, xla=True)
    step = candidates.build(Row("ResNet9", keras, "strided4"), settings)
    kinds = operations.bn_ops_of(
        in_use().ran_in_step(step.step, step.model, BATCH, 1, xla=True, directory=None)
    )
    assert list(kinds) == LAYERS
    assert "StridedSlice" in kinds["prep_bn"]["forward"]
    assert "StridedSliceGrad" in kinds["prep_bn"]["backward"]
    whole = kinds["layer3_res2_bn"]["backward"]  # too small for a stride
    assert "Sum" in whole
    assert "StridedSliceGrad" not in whole


def test_kernels_of_a_gpu():
    """In place of what the host does, with the operation that each is for."""
    space = xplane_pb2.XSpace()
    host = space.planes.add(name="/host:CPU")
    host.event_metadata[1].name = "net/bn/FusedBatchNormV3:FusedBatchNormV3"
    host.lines.add().events.add(metadata_id=1, duration_ps=10**9)
    device = space.planes.add(name="/device:GPU:0")
    device.stat_metadata[1].name = "tf_op"
    device.stat_metadata[2].name = "net/bn/FusedBatchNormV3:FusedBatchNormV3"
    device.event_metadata[1].name = "bn_fw_tr_1C11"
    device.event_metadata[2].name = "memset"
    stream = device.lines.add(name="Stream #7(Compute)")
    for milliseconds in (1, 3, 2):
        event = stream.events.add(metadata_id=1, duration_ps=milliseconds * 10**9)
        event.stats.add(metadata_id=1, ref_value=2)
    stream.events.add(metadata_id=2, duration_ps=10**9)
    device.lines.add(name="Steps").events.add(metadata_id=2, duration_ps=10**12)
    kernel, memset = profiles.read(space, calls=3)
    assert kernel.name == "net/bn/FusedBatchNormV3"
    assert (kernel.op, kernel.kernel) == ("FusedBatchNormV3", "bn_fw_tr_1C11")
    assert (kernel.count, kernel.milliseconds) == (1, 2)
    assert (memset.name, memset.kernel, memset.count) == ("", "memset", 0)


# -------------------------------------------------------------------------------- what goes wrong


def test_the_others_go_on_where_one_runs_out_of_memory(monkeypatch, tmp_path):
    real = NETWORKS["ResNet9"]

    def network(keras, variant, **options):
        if variant == "strided2":
            raise MemoryError
        return real(keras, variant, **options)

    monkeypatch.setitem(NETWORKS, "ResNet9", network)
    rows = rows_of("tf_keras", "original", "strided2", "none")
    path = tmp_path / "rows.json"

    def keep():
        results.save(path, [training_rows.as_dict(row, rows[0], SETTINGS) for row in rows])

    measuring.measure(rows, SETTINGS, {}, keep=keep)
    original, failed, none = json.loads(path.read_text())
    assert failed["failure"] == "OUT OF MEMORY"
    assert failed["images_per_second"] is failed["step_ratio"] is None
    assert original["step_ratio"] == 1
    assert none["step_ratio"] > 0
    assert none["images_per_second"]["lower"] <= none["images_per_second"]["upper"]
    assert [p.name for p in tmp_path.iterdir()] == ["rows.json"]


def test_what_is_finished_is_kept_when_it_is_interrupted(monkeypatch):
    real, rounds = measuring.time_rounds, []

    def interleaved(variants, repeats, warmup):
        rounds.append(repeats)
        if sum(rounds) > 1:
            raise KeyboardInterrupt
        return real(variants, repeats, warmup)

    monkeypatch.setattr(measuring, "time_rounds", interleaved)
    rows = rows_of("tf_keras", "original")
    kept = []
    with pytest.raises(KeyboardInterrupt):
        measuring.measure(rows, SETTINGS, {}, keep=lambda: kept.append(len(rows[0].seconds)))
    assert kept[-1] == 1
    assert rows[0].losses


def test_what_is_not_finite_is_null(tmp_path):
    results.save(tmp_path / "a.json", {"a": [math.nan, 1.5, math.inf], "b": ("x", None)})
    assert json.loads((tmp_path / "a.json").read_text()) == {
        "a": [None, 1.5, None],
        "b": ["x", None],
    }


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((["ResNet8"], ["tf_keras"], [], "float32"), "unknown model 'ResNet8'; known are ResNet9"),
        ((["ResNet9"], ["keras"], [], "float32"), "unknown Keras 'keras'"),
        ((["ResNet9"], ["tf_keras"], ["strided"], "float32"), "there is no variant 'strided'"),
        ((["ResNet9"], ["tf_keras"], [], "float16"), "unknown dtype 'float16'"),
        (([], ["tf_keras"], [], "float32"), "no model is given"),
    ],
)
def test_unknown_names(names, message):
    with pytest.raises((ValueError, RewriteError), match=message):
        training_rows.check_names(*names)


@pytest.mark.parametrize("device", ["TPU", "GPU"])
def test_devices_that_are_not_there(device, monkeypatch):
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: [])
    with pytest.raises(ValueError, match=f"unknown device '{device}'|sees no {device}"):
        devices.chosen(device)


def test_charts_are_drawn(tmp_path):
    bars = [charts.Bar("original", 1, 0.9, 1.1), charts.Bar("strided4", 1.2, 1.1, 1.3)]
    charts.speeds({"ResNet9, tf_keras": bars}, "images per second", "title", tmp_path / "a.png")
    times = {"original": ([1.0, 2.0], [3.0, 4.0]), "strided4": ([0.5, 1.0], [2.0, 3.0])}
    charts.layers(["a_bn", "b_bn"], times, "title", tmp_path / "b.png")
    starts = [path.read_bytes()[:4] for path in sorted(tmp_path.iterdir())]
    assert starts == [b"\x89PNG"] * 2


PROGRAM = Path(measuring.PROGRAM)


def test_an_unknown_name_is_one_line():
    run = subprocess.run(
        [sys.executable, PROGRAM, "--variants=fast", "--device=CPU"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1
    assert run.stdout == ""
    assert run.stderr.startswith("error: there is no variant 'fast'")
    assert run.stderr.count("\n") == 1


def test_the_program(tmp_path):
    flags = [
        *("--models=ResNet9", "--keras=tf_keras", "--variants=strided4", "--size=16"),
        *("--width=0.0625", "--batch=2", "--repeats=2", "--profiled_steps=2", "--nomemory"),
        *(f"--json={tmp_path}/a.json", f"--chart={tmp_path}/a.png", f"--profile={tmp_path}/p"),
        "--device=CPU",
    ]
    run = subprocess.run(
        [sys.executable, PROGRAM, *flags], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert "not attributed" in run.stdout
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert [row["variant"] for row in rows] == ["original", "strided4"]
    assert all(row["step_ratio"] for row in rows)
    assert (tmp_path / "a.png").exists()
    assert (tmp_path / "p/ResNet9_tf_keras.png").exists()
    written = json.loads((tmp_path / "p/ResNet9_tf_keras.json").read_text())["variants"]
    assert [layer["layer"] for layer in written["strided4"]["layers"]] == LAYERS
    assert list((tmp_path / "p/ResNet9_tf_keras_strided4").rglob("*.xplane.pb"))

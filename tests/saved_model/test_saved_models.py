"""SavedModels of all kinds: rewritten, verified, and otherwise as they were."""

import hashlib
import math
import shutil
import subprocess
import sys
from contextlib import contextmanager

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from tensorflow.core.protobuf import saved_model_pb2

import mbn_rewrite as mbn
from mbn_rewrite.frontends.saved_model.function_graph import op_counts
from tests.cli.test_tool import nothing_left, run
from tests.support.random_models import randomise
from tests.support.saved_models import (
    COUNTED,
    EPSILON,
    IMAGE,
    KINDS,
    WORDS,
    Network,
    fused_norm,
    image_spec,
    randomise_keras_3,
    save_tf1,
    save_with_one_signature,
)

pytestmark = pytest.mark.slow

MODES = ("fold", "depthwise")


@pytest.fixture(scope="session")
def stored(tmp_path_factory):
    """Gives the directory of a SavedModel of some kind, which is not to be changed."""
    directories = {}

    def directory(kind):
        if kind not in directories:
            directories[kind] = tmp_path_factory.mktemp("stored") / kind
            KINDS[kind].build(directories[kind])
        return directories[kind]

    return directory


@pytest.fixture
def copied(stored, tmp_path):
    """Gives a copy of a SavedModel of some kind."""
    return lambda kind: shutil.copytree(stored(kind), tmp_path / "in")


@pytest.fixture
def rng():
    return np.random.default_rng(11)


def specs(signature):
    return signature.structured_input_signature[1]


def described_outputs(signature):
    outputs = signature.structured_outputs.items()
    return {name: (tensor.dtype, tensor.shape.as_list()) for name, tensor in outputs}


def fresh(spec, batch, rng):
    shape = [batch if size is None else size for size in spec.shape]
    if spec.dtype == tf.string:
        return tf.constant(rng.choice([*WORDS, "never", "heard"], shape))
    return tf.constant(rng.standard_normal(shape), spec.dtype)


def fresh_inputs(signature, batch, rng):
    return {name: fresh(spec, batch, rng) for name, spec in sorted(specs(signature).items())}


def images(rng, batch=3):
    return fresh(image_spec(), batch, rng)


def assert_close(actual, expected):
    """Equal up to 1e-4 of the largest value; what is no float, equal."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.dtype == expected.dtype
    if expected.dtype.kind == "f":
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    else:
        np.testing.assert_array_equal(actual, expected)


def assert_same_answers(model, new, rng):
    """Calls all signatures of two loaded SavedModels with the same inputs."""
    for key, signature in model.signatures.items():
        for batch in (1, 5):
            inputs = fresh_inputs(signature, batch, rng)
            expected, actual = signature(**inputs), new.signatures[key](**inputs)
            assert sorted(actual) == sorted(expected)
            for name in expected:
                assert_close(actual[name], expected[name])


def assert_same_interfaces(model, new):
    """All signatures of two loaded SavedModels have the same names and structures."""
    assert sorted(new.signatures) == sorted(model.signatures)
    for key, signature in model.signatures.items():
        structure = signature.structured_input_signature
        assert new.signatures[key].structured_input_signature == structure
        assert described_outputs(new.signatures[key]) == described_outputs(signature)


def norms_in(signature):
    """How many BatchNormalizations a function runs."""
    counts = op_counts(signature)
    return sum(n for op, n in counts.items() if op.startswith("FusedBatchNorm") or op == "Rsqrt")


def contents(directory):
    return {
        path.relative_to(directory): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.rglob("*")
        if path.is_file()
    }


def stored_shapes(directory):
    """The shapes of all variables in a SavedModel."""
    found = tf.train.list_variables(str(directory / "variables" / "variables"))
    return sorted(tuple(shape) for name, shape in found if not name.startswith("_CHECKPOINTABLE"))


def read_proto(directory):
    proto = saved_model_pb2.SavedModel()
    proto.ParseFromString((directory / "saved_model.pb").read_bytes())
    return proto


@contextmanager
def patched(directory):
    """Gives the MetaGraphDef of a SavedModel to be changed."""
    proto = read_proto(directory)
    yield proto.meta_graphs[0]
    (directory / "saved_model.pb").write_bytes(proto.SerializeToString())


def rewritten(tmp_path, mode="fold", **kwargs):
    """Rewrites tmp_path/in; gives the report, and both as loaded."""
    report = mbn.rewrite_saved_model(tmp_path / "in", tmp_path / "out", mode, **kwargs)
    return report, *(tf.saved_model.load(str(tmp_path / name)) for name in ("in", "out"))


# ------------------------------------------------------------------------------ all kinds


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_rewritten_and_gives_what_it_gave(kind, mode, copied, tmp_path, rng):
    source = copied(kind)
    before = contents(source)
    report, model, new = rewritten(tmp_path, mode)
    left = KINDS[kind].left if mode == "fold" else 0
    assert report.ok
    assert set(report.comparisons) >= set(model.signatures)
    assert report.as_it_was == {}
    assert len(report.plan.decisions) == KINDS[kind].norms
    assert report.plan.left == left
    assert all(bool(d.reason) == (d.action == "kept") for d in report.plan.decisions)
    assert {norms_in(signature) for signature in new.signatures.values()} == {left}
    assert_same_interfaces(model, new)
    assert_same_answers(model, new, rng)
    assert contents(source) == before
    assert nothing_left(tmp_path, source, tmp_path / "out")


# ------------------------------------------------------------------- what the result needs

LOADER = """
import sys
import numpy as np
import tensorflow as tf

for path in sys.argv[1:]:
    served = tf.saved_model.load(path)
    scores = served.signatures["serving_default"](image=tf.ones((2, 6, 6, 3)))
    assert all(np.all(np.isfinite(array)) for array in scores.values())
found = {"mbn_rewrite", "tf_keras"} & set(sys.modules)
assert not found, found
"""


def test_results_need_tensorflow_only(stored, tmp_path):
    kinds = ("tf_keras", "keras_3_exported", "tf1_reference_variables")
    for kind in kinds:
        mbn.rewrite_saved_model(stored(kind), tmp_path / kind, "depthwise")
    paths = [str(tmp_path / kind) for kind in kinds]
    done = subprocess.run(
        [sys.executable, "-I", "-c", LOADER, *paths], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("kind", "mode", "shapes"),
    [
        ("two_signatures", "fold", [(2,), (3, 3, 3, 4), (4,), (4, 2)]),
        ("two_signatures", "depthwise", [(1, 1, 4, 1), (2,), (3, 3, 3, 4), (4,), (4, 2)]),
        ("tf_keras", "fold", [(2,), (3, 3, 3, 4), (4,), (4, 2)]),
        ("tf1_resource_variables", "fold", [(3, 3, 3, 4), (4,), (4, 2)]),
    ],
)
def test_only_variables_that_are_needed_are_stored_and_once(kind, mode, shapes, stored, tmp_path):
    report = mbn.rewrite_saved_model(stored(kind), tmp_path / "out", mode)
    assert stored_shapes(tmp_path / "out") == shapes
    assert report.after.weights == sum(math.prod(shape) for shape in shapes)


def test_variables_that_nobody_reads_are_gone(copied, tmp_path):
    source = copied("two_signatures")
    assert (5, 5) in stored_shapes(source)
    mbn.rewrite_saved_model(source, tmp_path / "out", "depthwise")
    assert (5, 5) not in stored_shapes(tmp_path / "out")


@pytest.mark.parametrize("kind", ["vocabulary", "tf1_vocabulary"])
def test_table_and_asset_move_with_the_result(kind, copied, tmp_path, rng):
    source, moved = copied(kind), tmp_path / "moved"
    signature = tf.saved_model.load(str(source)).signatures["serving_default"]
    inputs = fresh_inputs(signature, 6, rng)
    expected = signature(**inputs)
    mbn.rewrite_saved_model(source, tmp_path / "out", "fold")
    shutil.rmtree(source)
    (tmp_path / "out").rename(moved)
    actual = tf.saved_model.load(str(moved)).signatures["serving_default"](**inputs)
    assert (moved / "assets" / "words.txt").read_text().split() == list(WORDS)
    assert sorted(actual) == sorted(expected)
    assert_close(actual["chances"], expected["chances"])


def test_states_are_stored_as_they_were_and_counted_on(copied, tmp_path, rng):
    copied("counter")
    _, model, new = rewritten(tmp_path)
    assert new.calls.numpy() == model.calls.numpy() == COUNTED
    calls = [new.signatures["serving_default"](image=images(rng))["calls"] for _ in range(2)]
    assert [int(count) for count in calls] == [COUNTED + 1, COUNTED + 2]


# --------------------------------------------------------------------- what is carried over


def test_function_for_training_is_left_out_and_said_so(copied, tmp_path, rng):
    copied("hub_module")
    report, model, new = rewritten(tmp_path)
    ((name, why),) = report.left_out.items()
    assert name.startswith("__call__(")
    assert "True" in name
    assert "training" in why
    x = images(rng)
    expected = model(x)
    assert_close(new(x), expected)
    assert_close(new(x, training=False), expected)
    assert_close(new(x, False), expected)
    with pytest.raises(ValueError, match="Could not find matching concrete function"):
        new(x, training=True)


@pytest.mark.parametrize("kind", ["nested_functions", "body_called_twice"])
def test_one_norm_in_several_functions_or_calls_is_one_decision(kind, stored):
    report = mbn.rewrite_saved_model(stored(kind), "", dry_run=True)
    (decision,) = report.plan.decisions
    assert decision.action == "folded"
    assert len(decision.into) == 1


def test_only_the_signatures_asked_for_are_carried_over(copied, tmp_path, rng):
    source, out = copied("two_signatures"), tmp_path / "out"
    assert run("--quiet", "--signatures=chances", source, out) == 0
    new = tf.saved_model.load(str(out))
    assert list(new.signatures) == ["chances"]
    model = tf.saved_model.load(str(source))
    picture = images(rng)
    expected = model.signatures["chances"](picture=picture)["chances"]
    assert_close(new.signatures["chances"](picture=picture)["chances"], expected)


def test_signature_that_was_not_asked_for_is_listed(copied, tmp_path):
    copied("two_signatures")
    report, _, _ = rewritten(tmp_path, signatures=["chances"])
    assert report.left_out == {"signature serving_default": "not asked for"}


@pytest.mark.parametrize(
    ("flag", "listed"),
    [
        ("--signatures=scores", ["scores", "serving_default", "chances"]),
        ("--signatures=chances,scores", ["no signature scores", "serving_default"]),
        ("--tags=train", ["train", "{serve}"]),
        ("--tags=serve,gpu", ["serve, gpu", "{serve}"]),
    ],
)
def test_wrong_signatures_and_tags_list_what_there_is(flag, listed, copied, tmp_path, capsys):
    source = copied("two_signatures")
    assert run("--quiet", flag, source, tmp_path / "out") == 1
    printed = capsys.readouterr().err
    assert [text for text in listed if text not in printed] == []
    assert printed.count("\n") == 1
    assert nothing_left(tmp_path, source)


def test_what_saving_has_no_argument_for_survives(copied, tmp_path):
    source = copied("two_signatures")
    with patched(source) as meta_graph:
        meta_graph.meta_info_def.tags[:] = ["serve", "special"]
        signature = meta_graph.signature_def["chances"]
        signature.method_name = "tensorflow/serving/classify"
        default = tf.make_tensor_proto(np.zeros((1, *IMAGE), np.float32))
        signature.defaults["picture"].CopyFrom(default)
    (source / "assets.extra").mkdir()
    (source / "assets.extra" / "notes.txt").write_text("precious")
    assert mbn.rewrite_saved_model(source, tmp_path / "out", "fold").ok
    (new,) = read_proto(tmp_path / "out").meta_graphs
    assert sorted(new.meta_info_def.tags) == ["serve", "special"]
    assert new.signature_def["chances"].method_name == "tensorflow/serving/classify"
    assert new.signature_def["chances"].defaults["picture"] == default
    assert new.signature_def["serving_default"].method_name == "tensorflow/serving/predict"
    assert not new.signature_def["serving_default"].defaults
    assert (tmp_path / "out" / "assets.extra" / "notes.txt").read_text() == "precious"


def test_tags_and_method_name_of_tensorflow_1_survive(tmp_path):
    method = "tensorflow/serving/regress"
    save_tf1(tmp_path / "in", fused_norm, tags=("serve", "gpu"), method_name=method)
    assert mbn.rewrite_saved_model(
        tmp_path / "in", tmp_path / "out", "fold", tags=["gpu", "serve"]
    ).ok
    (new,) = read_proto(tmp_path / "out").meta_graphs
    assert sorted(new.meta_info_def.tags) == ["gpu", "serve"]
    assert new.signature_def["serving_default"].method_name == method


# --------------------------------------------------------------------------------- damage


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGE = {
    "cut_graph": (lambda source: cut(source / "saved_model.pb"), "saved_model.pb"),
    "empty_graph": (lambda source: (source / "saved_model.pb").write_bytes(b""), "is empty"),
    "no_index": (lambda source: (source / "variables" / "variables.index").unlink(), "damaged"),
    "cut_data": (
        lambda source: cut(source / "variables" / "variables.data-00000-of-00001"),
        "damaged",
    ),
}


@pytest.mark.parametrize("kind", ["module", "tf1_resource_variables"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_one_line_and_writes_nothing(damage, kind, copied, tmp_path, capfd):
    source = copied(kind)
    do_damage, message = DAMAGE[damage]
    do_damage(source)
    before = contents(source)
    assert run("--quiet", source, tmp_path / "out") == 1
    printed = capfd.readouterr().err
    assert printed.startswith("error: ")
    assert printed.count("\n") == 1
    assert message in printed
    assert contents(source) == before
    assert nothing_left(tmp_path, source)


def test_unknown_operation_is_named(copied, tmp_path, capsys):
    source = copied("module")
    with patched(source) as meta_graph:
        for function in meta_graph.graph_def.library.function:
            for node in function.node_def:
                node.op = "Unheard" if node.op == "Relu" else node.op
    assert run("--quiet", source, tmp_path / "out") == 1
    printed = capsys.readouterr().err
    assert "Unheard" in printed
    assert "--import_modules" in printed
    assert printed.count("\n") == 1
    assert nothing_left(tmp_path, source)


# ------------------------------------------------------------------------------- what stays


def features_given(network, image):
    x = network.convolved(image)
    return {"scores": network.scored(tf.nn.relu(network.fused(x))), "features": x}


def in_a_loop(network, image, norm="fused"):
    def body(i, x):
        return i + 1, getattr(network, norm)(network.convolved(x))

    x = tf.while_loop(lambda i, x: i < 2, body, (0, image))[1]
    return {"scores": network.scored(x)}


def arithmetic_in_a_loop(network, image):
    return in_a_loop(network, image, "arithmetic")


def in_a_branch(network, image):
    x = tf.cond(
        tf.reduce_sum(image) > 0,
        lambda: network.fused(network.convolved(image)),
        lambda: network.convolved(image),
    )
    return {"scores": network.scored(x)}


def scores(network, image):
    return {"scores": network.scores(image)}


def kernel_given(network, image):
    return {"kernel": network.kernel}


def kernel_used(network, image):
    return {"features": tf.nn.conv2d(image, tf.square(network.kernel), 1, "SAME")}


def statistics_assigned(network, image):
    mean = tf.reduce_mean(network.convolved(image), [0, 1, 2])
    return {"mean": network.mean.assign(0.9 * network.mean + 0.1 * mean)}


# What is saved: one function for each signature, and what the reason says.
STAYS = {
    "output_of_the_convolution": ([features_given], "output"),
    "kernel_returned_by_another": ([scores, kernel_given], "kernel_given"),
    "kernel_used_by_another": ([scores, kernel_used], "Square"),
    "statistics_assigned_by_another": ([scores, statistics_assigned], "statistics_assigned"),
    "in_a_loop": ([in_a_loop], "body of"),
    "arithmetic_in_a_loop": ([arithmetic_in_a_loop], "body of"),
    "in_a_branch": ([in_a_branch], "body of"),
}
STAYS_IN_EVERY_MODE = (
    "statistics_assigned_by_another",
    "in_a_loop",
    "arithmetic_in_a_loop",
    "in_a_branch",
)


def save_functions(directory, functions):
    """Saves functions of a network and images, each as a signature of its name."""
    network = Network(channels=IMAGE[-1])
    signatures = {
        function.__name__: tf.function(
            lambda image, function=function: function(network, image),
            input_signature=[image_spec()],
        ).get_concrete_function()
        for function in functions
    }
    tf.saved_model.save(network, str(directory), signatures)


@pytest.mark.parametrize(
    ("case", "mode"),
    [*((case, "fold") for case in STAYS), *((case, "depthwise") for case in STAYS_IN_EVERY_MODE)],
)
def test_norm_that_cannot_go_stays_with_a_reason(case, mode, tmp_path, rng):
    functions, words = STAYS[case]
    save_functions(tmp_path / "in", functions)
    report, model, new = rewritten(tmp_path, mode)
    assert report.ok
    assert report.as_it_was == {}
    assert [d.action for d in report.plan.decisions] == ["kept"]
    assert words in report.plan.decisions[0].reason
    assert_same_answers(model, new, rng)


# -------------------------------------------------------------------- what is none of them


def tf_keras_layer_norm(directory):
    layers = tf_keras.layers
    model = tf_keras.Sequential(
        [layers.Input(IMAGE, name="image"), layers.Conv2D(4, 3), layers.LayerNormalization()]
    )
    randomise(model, np.random.default_rng(12))
    model.save(directory, save_format="tf")


def keras_3_layer_norm(directory):
    layers = keras.layers
    model = keras.Sequential(
        [keras.Input(IMAGE, name="image"), layers.Conv2D(4, 3), layers.LayerNormalization()]
    )
    randomise_keras_3(model, np.random.default_rng(13))
    model.export(directory, verbose=False)


def instance_norm(directory):
    network = Network()

    def serve(image):
        x = network.convolved(image)
        mean, variance = tf.nn.moments(x, [1, 2], keepdims=True)
        x = tf.nn.batch_normalization(x, mean, variance, network.beta, network.gamma, EPSILON)
        return {"scores": network.scored(tf.nn.relu(x))}

    save_with_one_signature(directory, network, serve)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("build", [tf_keras_layer_norm, keras_3_layer_norm, instance_norm])
def test_other_normalisations_are_left_alone(build, mode, tmp_path, rng):
    build(tmp_path / "in")
    report, model, new = rewritten(tmp_path, mode)
    assert report.plan.decisions == ()
    assert_same_answers(model, new, rng)


# ---------------------------------------------------------------------------- other runtimes


@pytest.mark.parametrize("mode", MODES)
def test_xla_and_tflite_take_the_result(mode, copied, tmp_path, rng):
    copied("tf_keras")
    _, model, new = rewritten(tmp_path, mode)
    image = images(rng)
    expected = model.signatures["serving_default"](image=image)["scores"]
    compiled = tf.function(new.signatures["serving_default"], jit_compile=True, autograph=False)
    assert_close(compiled(image=image)["scores"], expected)
    converter = tf.lite.TFLiteConverter.from_saved_model(str(tmp_path / "out"))
    runner = tf.lite.Interpreter(model_content=converter.convert()).get_signature_runner()
    assert_close(runner(image=image.numpy())["scores"], expected)


def test_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    """As TensorFlow says it, with the cause behind much else."""
    KINDS["module"].build(tmp_path / "in")

    def full(*_, **__):
        raise tf.errors.ResourceExhaustedError(
            None, None, "{{function_node __wrapped__SaveV2}} /x/part.data; No space left on device"
        )

    monkeypatch.setattr(tf.saved_model, "save", full)
    assert run("--quiet", tmp_path / "in", tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert "No space left on device." in error
    assert error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]

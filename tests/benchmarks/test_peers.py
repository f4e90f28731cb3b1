"""`benchmarks/peers.py`: what counts as left, what a wrong answer looks like, what is kept."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import tensorflow as tf
import tf_keras
from absl import flags
from onnx import TensorProto, helper, numpy_helper

from benchmarks import peers
from benchmarks.common.failures import Declined
from benchmarks.common.timing import time_rounds
from benchmarks.peer_tools import converters, runtimes, steps, tables
from benchmarks.peer_tools import tools as peer_tools
from benchmarks.peer_tools.bn_count import Left, Node, count, count_nodes, one_channel
from benchmarks.peer_tools.nodes import (
    litert_nodes,
    onnx_nodes,
    openvino_left,
    openvino_nodes,
    tensorflow_nodes,
)
from benchmarks.peer_tools.tools import Tool
from benchmarks.peer_tools.work import Work
from tests.support.saved_models import arithmetic_norm, fused_norm, statistics

pytestmark = pytest.mark.slow

SHAPE = (2, 6, 6, 4)
RNG = np.random.default_rng(0)
NORMS = [statistics(RNG, 4) for _ in range(3)]
KERNEL = RNG.standard_normal((3, 3, 4, 4)).astype(np.float32)
VECTOR = np.float32([1, 2, 3, 4])


def depthwise(x):
    kernel = VECTOR.reshape(1, 1, 4, 1)
    return tf.nn.depthwise_conv2d(x, kernel, [1, 1, 1, 1], "VALID") + VECTOR


def conv(x):
    return tf.nn.conv2d(x, KERNEL, 1, "SAME")


def biased(x):
    return tf.nn.bias_add(conv(x), VECTOR)


def by_the_batch(x):
    return tf.compat.v1.nn.fused_batch_norm(x, VECTOR, VECTOR)[0]


def read_twice(x):
    y = x * VECTOR
    return y * VECTOR + tf.nn.relu(y)


# name -> (function, what is left of it)
GRAPHS = {
    "fused": (lambda x: fused_norm(x, *NORMS[0]), Left(fused=1)),
    "arithmetic": (lambda x: arithmetic_norm(x, *NORMS[0]), Left(arithmetic=1)),
    "computed beforehand": (lambda x: x * VECTOR + VECTOR, Left(arithmetic=1)),
    "in steps": (lambda x: (x - VECTOR) * VECTOR * VECTOR + VECTOR, Left(arithmetic=1)),
    "divided": (lambda x: (x - VECTOR) / VECTOR, Left(arithmetic=1)),
    "two, an activation between": (
        lambda x: tf.nn.relu(x * VECTOR + VECTOR) * VECTOR,
        Left(arithmetic=2),
    ),
    "two, since the first is read twice": (read_twice, Left(arithmetic=2)),
    "both forms": (
        lambda x: arithmetic_norm(conv(fused_norm(x, *NORMS[0])), *NORMS[1]),
        Left(fused=1, arithmetic=1),
    ),
    "depthwise": (depthwise, Left(depthwise=1)),
    "a bias": (biased, Left()),
    "an addition": (lambda x: conv(x) + VECTOR, Left()),
    "one number": (lambda x: x * 3.0, Left()),
    "a mask of positions": (lambda x: x * np.ones((6, 6, 1), np.float32), Left()),
    "data by data": (lambda x: x * tf.reduce_mean(x, [1, 2], keepdims=True), Left()),
    "a number by the data": (lambda x: VECTOR / x, Left()),
    "by the batch": (by_the_batch, Left()),
}


def concrete(function):
    return tf.function(function).get_concrete_function(tf.TensorSpec(SHAPE, name="x"))


@pytest.mark.parametrize("name", GRAPHS)
def test_tensorflow_graph(name):
    function, expected = GRAPHS[name]
    assert count(tensorflow_nodes(concrete(function).graph.as_graph_def(), 1)) == expected


class Variables(tf.Module):
    """A network whose statistics are variables: arithmetic, then fused, then folded."""

    def __init__(self):
        super().__init__()
        self.norms = [[tf.Variable(array) for array in norm] for norm in NORMS]
        self.kernel = tf.Variable(KERNEL)

    @tf.function(input_signature=[tf.TensorSpec([None, *SHAPE[1:]], name="x")])
    def serve(self, x):
        y = tf.nn.relu(tf.nn.conv2d(x, self.kernel, 1, "SAME"))
        y = tf.nn.relu(arithmetic_norm(y, *self.norms[0]))
        return {"y": tf.nn.relu(fused_norm(tf.nn.relu(y), *self.norms[1]))}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A model with an arithmetic and a fused BatchNormalization that no one folds."""
    work = Work(tmp_path_factory.mktemp("work"))
    module = Variables()
    tf.saved_model.save(module, str(work.original), {"serving_default": module.serve})
    x = np.random.default_rng(1).standard_normal(SHAPE).astype(np.float32)
    np.savez(work.inputs, x=x)
    np.savez(work.outputs, y=module.serve(x)["y"].numpy())
    return work


def test_tensorflow_in_file_and_at_run(work):
    model = runtimes.TensorFlow(work.original, dict(np.load(work.inputs)), ["y"], 1)
    assert model.in_file == Left(fused=1, arithmetic=1)
    assert model.at_run == Left(fused=1, arithmetic=1)


@pytest.mark.parametrize("biased", [False, True])
def test_what_grappler_does_within_a_convolution_is_not_left(biased, tmp_path):
    def serve(x):
        y = conv(x) + VECTOR if biased else conv(x)
        return {"y": tf.nn.relu(fused_norm(y, *NORMS[0]))}

    module = tf.Module()
    module.serve = tf.function(serve, input_signature=[tf.TensorSpec(SHAPE, name="x")])
    tf.saved_model.save(module, str(tmp_path), {"serving_default": module.serve})
    model = runtimes.TensorFlow(tmp_path, {"x": np.ones(SHAPE, np.float32)}, ["y"], 1)
    assert model.in_file == Left(fused=1)
    # Grappler writes a fused operation with constants as arithmetic.
    assert model.at_run == (Left(arithmetic=1) if biased else Left(within=1))


@pytest.mark.parametrize(("channels", "expected"), [(1, 1), (4, 0)])
def test_one_channel(channels, expected):
    function = tf.function(lambda x: fused_norm(x, *statistics(RNG, channels)))
    graph = function.get_concrete_function(tf.TensorSpec((1, 6, 6, channels))).graph
    assert one_channel(tensorflow_nodes(graph.as_graph_def(), 1)) == expected


def test_a_call_is_said():
    nodes = [Node("x", "input"), Node("y", "call", ("x",))]
    assert count(nodes) == Left(unseen=1)


def test_nodes_that_run_are_those_that_depend_on_the_inputs():
    constants = [Node("c", "constant"), Node("d", "other", ("c",))]
    data = [Node("x", "input"), Node("y", "other", ("x", "d")), Node("z", "output", ("y",))]
    assert count_nodes([*constants, *data]) == 1


def test_an_activation_ends_a_run():
    def scalings(activated):
        return count(
            [
                *(Node("x", "input"), Node("c", "constant", (), (4,))),
                Node("y", "multiply", ("x", "c"), (), activated),
                Node("z", "multiply", ("y", "c")),
            ]
        )

    assert scalings(activated=False) == Left(arithmetic=1)
    assert scalings(activated=True) == Left(arithmetic=2)


def test_other_scalings_are_taken_off():
    assert Left(1, 2, 3, 4, 5).without(1) == Left(1, 1, 3, 4, 5)
    assert Left(1, 0).without(2) == Left(1, 0)
    assert Left(1, 2, 3).total == 3
    assert Left(1, 2, 3).operations == 6


# ------------------------------------------------------------------------------------ ONNX


def onnx_model(steps, constants, path=None):
    """Operations after one another; each reads what the one before gives, then constants."""
    nodes, before = [], "x"
    for i, (op, names, attributes) in enumerate(steps):
        nodes.append(helper.make_node(op, [before, *names], [f"y{i}"], **attributes))
        before = f"y{i}"
    image = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4, 6, 6])]
    result = [helper.make_tensor_value_info(before, TensorProto.FLOAT, [1, 4, None, None])]
    stored = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "g", image, result, stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    if path is not None:
        onnx.save(model, path)
    return model


PER_CHANNEL = VECTOR.reshape(1, 4, 1, 1)
CONSTANTS = {
    **dict(zip(("g", "b", "m", "v"), NORMS[0], strict=True)),
    "w": KERNEL.transpose(3, 2, 0, 1).copy(),
    "s": PER_CHANNEL,
    "dw": VECTOR.reshape(4, 1, 1, 1),
    "dw3": np.ones((4, 1, 3, 3), np.float32),
    "one": np.float32([2]),
}
NORM = ("BatchNormalization", ("g", "b", "m", "v"), {})
CONV = ("Conv", ("w",), {"pads": [1, 1, 1, 1]})
MUL, ADD, RELU = ("Mul", ("s",), {}), ("Add", ("s",), {}), ("Relu", (), {})


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([CONV, NORM, RELU], Left(fused=1)),
        ([CONV, RELU, NORM, CONV], Left(fused=1)),
        ([CONV, RELU, MUL, ADD, CONV], Left(arithmetic=1)),
        ([CONV, MUL, ADD, RELU, MUL, ADD], Left(arithmetic=2)),
        ([("Sub", ("s",), {}), ("Div", ("s",), {}), MUL, ADD], Left(arithmetic=1)),
        ([MUL, ("Transpose", (), {"perm": [0, 1, 2, 3]}), MUL], Left(arithmetic=1)),
        ([CONV, ADD], Left()),
        ([("Mul", ("one",), {})], Left()),
        ([("Conv", ("dw", "b"), {"group": 4})], Left(depthwise=1)),
        ([("Conv", ("dw3", "b"), {"group": 4})], Left()),
    ],
)
def test_onnx_graph(steps, expected):
    assert count(onnx_nodes(onnx_model(steps, CONSTANTS))) == expected


def test_nodes_of_an_onnx_graph():
    assert count_nodes(onnx_nodes(onnx_model([CONV, NORM, RELU], CONSTANTS))) == 3


@pytest.mark.parametrize(
    ("steps", "in_file", "at_run"),
    [
        ([CONV, NORM, RELU], Left(fused=1), Left()),
        ([CONV, MUL, ADD, RELU], Left(arithmetic=1), Left()),
        ([NORM, RELU], Left(fused=1), None),
    ],
)
def test_onnx_runtime_in_file_and_at_run(steps, in_file, at_run, tmp_path):
    onnx_model(steps, CONSTANTS, tmp_path / "m.onnx")
    image = np.ones((1, 4, 6, 6), np.float32)
    model = runtimes.OnnxRuntime(tmp_path / "m.onnx", {"x": image}, ["y"], 1)
    assert model.in_file == in_file
    # What it cannot fold becomes a 1x1 depthwise convolution, where it has blocked kernels.
    assert model.at_run.operations == 1 if at_run is None else model.at_run == at_run
    assert model.nodes > 0
    assert model()[0].shape == (1, 4, 6, 6)


# -------------------------------------------------------------------------------- OpenVINO


@pytest.fixture
def ov():
    return pytest.importorskip("openvino", reason="OpenVINO is no dependency of the suite")


OPENVINO = {
    # name -> (function, left in the converted model, left at run)
    "folded when converted": (lambda x: fused_norm(conv(x), *NORMS[0]), Left(), Left()),
    "arithmetic, folded when converted": (
        lambda x: tf.nn.relu(arithmetic_norm(conv(x), *NORMS[0])),
        Left(),
        Left(),
    ),
    "behind an activation": (
        lambda x: tf.nn.relu(fused_norm(tf.nn.relu(conv(x)), *NORMS[0])),
        Left(arithmetic=1),
        Left(within=1),
    ),
    "behind what takes nothing on": (
        lambda x: tf.nn.relu(fused_norm(tf.cumsum(x, 1), *NORMS[0])),
        Left(arithmetic=1),
        Left(arithmetic=1),
    ),
    "depthwise": (lambda x: depthwise(tf.cumsum(x, 1)), Left(depthwise=1), Left(depthwise=1)),
    "a bias": (biased, Left(), Left()),
}


@pytest.mark.parametrize("name", OPENVINO)
def test_openvino(name, ov):
    function, converted, run = OPENVINO[name]
    model = ov.convert_model(concrete(function), input=list(SHAPE))
    compiled = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    assert count(openvino_nodes(model)) == converted
    assert openvino_left(model, compiled.get_runtime_model()) == run
    assert count_nodes(openvino_nodes(compiled.get_runtime_model())) > 0


# ---------------------------------------------------------------------------------- LiteRT


LITERT = {
    # name -> (function, what is left of it, nodes)
    "folded when converted": (lambda x: fused_norm(conv(x), *NORMS[0]), Left(), 1),
    "behind an activation": (
        lambda x: tf.nn.relu(fused_norm(tf.nn.relu(conv(x)), *NORMS[0])),
        Left(arithmetic=1),
        3,
    ),
    "two, an activation between": (
        lambda x: tf.nn.relu(x * VECTOR + VECTOR) * VECTOR,
        Left(arithmetic=2),
        3,
    ),
    "depthwise": (lambda x: depthwise(tf.cumsum(x, 1)), Left(depthwise=1), 2),
    "a bias": (biased, Left(), 1),
    "data by data": (
        lambda x: x * tf.reduce_mean(x, [1, 2], keepdims=True),
        Left(),
        2,
    ),
}


@pytest.mark.parametrize("name", LITERT)
def test_litert_graph(name):
    function, expected, nodes = LITERT[name]
    converter = tf.lite.TFLiteConverter.from_concrete_functions([concrete(function)])
    graph = litert_nodes(converter.convert())
    assert count(graph) == expected
    assert count_nodes(graph) == nodes


def test_litert_gives_the_outputs(work):
    pytest.importorskip("ai_edge_litert", reason="LiteRT is no dependency of the suite")
    tool = next(tool for tool in peer_tools.tools(["fold"], 1) if tool.key == "litert")
    result = steps.examined(tool, work, 1)
    assert result["status"] == "ok"
    assert Left(**result["at_run"]).total == 2
    assert result["nodes"] == 5  # the convolution, and two multiplications and additions


# --------------------------------------------------------------------- tools of tf_keras


@pytest.fixture
def keras_work(tmp_path):
    work = Work(tmp_path)
    layers = [tf_keras.Input((4,)), tf_keras.layers.BatchNormalization(), tf_keras.layers.ReLU()]
    tf_keras.Sequential(layers).save(work.keras_file, save_format="h5")
    return work


def folding_by(monkeypatch, function):
    """Has the package fold as a function does."""
    module = SimpleNamespace(fold_batchnormalization_layers=function)
    monkeypatch.setitem(sys.modules, "batch_normalization_folding", SimpleNamespace(folder=module))
    monkeypatch.setitem(sys.modules, "batch_normalization_folding.folder", module)


def test_batchnorm_folding_saves_what_it_gives(keras_work, monkeypatch):
    folding_by(monkeypatch, lambda model: (model, "1/0"))
    path = converters.batchnorm_folding(keras_work)
    assert tf.saved_model.contains_saved_model(str(path))


def test_batchnorm_folding_that_ends_the_process_declines(keras_work, monkeypatch):
    def fold(model):
        print("a line\nit is not supported yet")
        sys.exit()

    folding_by(monkeypatch, fold)
    with pytest.raises(Declined, match=r"^it is not supported yet$"):
        converters.batchnorm_folding(keras_work)


@pytest.mark.parametrize("tool", ["batchnorm_folding", "keras_cv_attention_models"])
def test_tools_of_tf_keras_decline_others(tool, tmp_path):
    with pytest.raises(Declined, match="tf_keras only"):
        getattr(converters, tool)(Work(tmp_path))


# ------------------------------------------------------------------------------ the program


class Wrong(runtimes.TensorFlow):
    def __call__(self):
        return [array + 0.01 for array in super().__call__()]


@pytest.mark.parametrize(("runtime", "status"), [(runtimes.TensorFlow, "ok"), (Wrong, "WRONG")])
def test_wrong_answers_are_marked(runtime, status, work):
    tool = Tool("t", "a tool", converters.original, runtime)
    result = steps.examined(tool, work, 1)
    assert result["status"] == status
    assert result["at_run"] == vars(Left(fused=1, arithmetic=1))
    assert result["nodes"] > 0


def test_optimize_for_inference_gives_the_outputs(work):
    tool = next(tool for tool in peer_tools.tools(["fold"], 1) if tool.key == "optimize")
    result = steps.examined(tool, work, 1)
    assert result["status"] == "ok"
    assert Left(**result["in_file"]).total == 2


def row(key, left, speed, ours=False, status="ok", **more):
    ms = {"median": 10 / speed, "lower": 9.9 / speed, "upper": 10.1 / speed}
    timed = {"milliseconds": ms, "times_as_fast": speed} if status == "ok" else {}
    counts = {"in_file": vars(left), "at_run": vars(left)}
    return {"tool": key, "ours": ours, "status": status, "error": 0.0, **counts, **timed, **more}


def test_a_wrong_row_shows_no_latency():
    wrong = row("kecam", Left(), 3.0, status="WRONG") | {"error": "inf"}
    cells = tables.as_cells(wrong, {"rows": [wrong]}, "a tool")
    assert cells[5:7] == ["WRONG", "-"]


@pytest.mark.parametrize(
    ("peer", "expected"),
    [
        (row("onnx", Left(2), 3.0), ["FASTER than ours"]),
        (row("onnx", Left(2), 1.5), ["FASTER than ours in TensorFlow"]),
        (row("onnx", Left(2), 1.201), ["FASTER than ours in TensorFlow, within scatter"]),
        (row("onnx", Left(2), 1.0), []),
        (row("onnx", Left(1), 1.0), ["FEWER LEFT than ours"]),
        (row("onnx", Left(depthwise=2), 1.0), ["2 as 1x1 depthwise"]),
        (
            row("onnx", Left(1, within=1), 1.0),
            ["1 within other operations", "FEWER LEFT than ours"],
        ),
        (row("onnx", Left(0), 9.0, status="WRONG"), []),
    ],
)
def test_where_a_peer_is_better_the_note_says_so(peer, expected):
    ours = [row("ours_fold", Left(2), 1.2, ours=True), row("ours_onnx", Left(2), 2.0, ours=True)]
    assert tables.notes(peer, [*ours, peer]) == expected


@pytest.mark.parametrize(
    ("key", "nodes", "expected"),
    [
        ("ours_fold", 20, []),
        ("ours_fold", 21, ["MORE NODES than the original"]),
        ("ours_onnx", 10, []),
        ("ours_onnx", 11, ["MORE NODES than the original"]),
        ("ours_litert", 99, []),  # LiteRT did not run the original
    ],
)
def test_more_nodes_than_the_original_in_the_same_runtime(key, nodes, expected):
    rows = [row("original", Left(), 1.0, nodes=20), row("onnx", Left(), 2.0, nodes=10)]
    rows.append(row("litert", Left(), 1.0, status="failed"))
    ours = row(key, Left(), 3.0, ours=True, nodes=nodes)
    assert tables.notes(ours, [*rows, ours]) == expected


def test_nodes_of_all_models():
    names = {"original": "original", "ours_fold": "ours", "onnx": "ONNX", "ours_onnx": "ours, ONNX"}
    rows = [row(key, Left(), 1.0, nodes=n) for key, n in zip(names, (9, 5, 4), strict=False)]
    printed = tables.nodes_table([{"model": "m", "keras": "k", "rows": rows}], names)
    assert printed.strip().split("\n")[-1].split() == ["m,", "k", "9", "->", "5", "4", "->", "-"]


def test_one_channel_that_is_not_seen_is_not_fewer():
    ours, peer = row("ours_fold", Left(1), 1.2, ours=True), row("openvino", Left(), 1.0)
    assert tables.notes(peer, [ours, peer], one_channel=1) == []
    assert tables.notes(peer, [ours, peer]) == ["FEWER LEFT than ours"]


def run_main(*arguments):
    flags.FLAGS.unparse_flags()
    for flag in flags.FLAGS.flags_by_module_dict()[peers.__name__]:
        flag.unparse()
    return peers.main(flags.FLAGS(["peers", *map(str, arguments)]))


ANSWERS = {
    "original": {"status": "ok", "error": 0.0, "path": "o"},
    "ours_fold": {"status": "ok", "error": 1e-6, "path": "f"},
}


def answering(monkeypatch, answers, broken=""):
    """Has steps answer at once; an exception is raised in place of an answer.

    What is broken cannot be timed.
    """

    def step(function, *arguments, environment=None):
        if function is peers.make:
            return {"norms": 2, "fewest": 0, "one_channel": 0}
        if function is peers.latency:
            keys = [pair.partition("=")[0] for pair in arguments[1:]]
            failed = {key: "it crashed" for key in keys if key == broken}
            times = {key: [2.0, 3.0, 4.0] for key in keys if key != broken}
            return {"milliseconds": times, "not timed": failed}
        answer = answers[arguments[0]]
        if isinstance(answer, BaseException):
            raise answer
        counts = {"in_file": vars(Left(2)), "at_run": vars(Left(2))}
        return counts | answer

    monkeypatch.setattr(peers, "step", step)
    monkeypatch.setattr(peer_tools.importlib.util, "find_spec", lambda name: object())


SMALL = ("--models=MobileNetV2", "--keras=tf_keras", "--modes=fold")


@pytest.mark.parametrize(
    ("key", "answer", "code"),
    [
        ("onnx", peers.StepFailed("it crashed", "log"), 0),
        ("onnx", {"status": "WRONG", "error": 1.0, "path": "w"}, 0),
        ("ours_fold", peers.StepFailed("it crashed", "log"), 1),
        ("ours_fold", {"status": "WRONG", "error": 1.0, "path": "w"}, 1),
    ],
)
def test_the_others_still_run(key, answer, code, monkeypatch, tmp_path, capsys):
    answering(monkeypatch, ANSWERS | {"onnx": ANSWERS["original"], key: answer})
    out = tmp_path / "r.json"
    assert run_main(*SMALL, "--tools=ours_fold,onnx", f"--json={out}") == code
    (model,) = json.loads(out.read_text())["models"]
    rows = {r["tool"]: r for r in model["rows"]}
    assert list(rows) == ["original", "ours_fold", "onnx"]
    assert "milliseconds" not in rows.pop(key)
    assert all(r["milliseconds"]["median"] == 3.0 for r in rows.values())
    printed = capsys.readouterr().out
    assert ("WRONG" if isinstance(answer, dict) else "it crashed") in printed


def test_one_that_cannot_be_timed_costs_no_others_their_times(monkeypatch, tmp_path):
    answering(monkeypatch, ANSWERS | {"onnx": ANSWERS["original"]}, broken="onnx")
    out = tmp_path / "r.json"
    assert run_main(*SMALL, "--tools=ours_fold,onnx", f"--json={out}") == 0
    (model,) = json.loads(out.read_text())["models"]
    rows = {r["tool"]: r for r in model["rows"]}
    assert rows["onnx"]["reason"] == "not timed: it crashed"
    assert rows["ours_fold"]["times_as_fast"] == 1


@pytest.mark.thorough
def test_steps_of_a_model_in_earnest(tmp_path):
    """What `answering` leaves out: writing, converting and timing, as they are for a small one."""
    run_flags = ["--batch=3", "--repeats=2", "--models=MobileNet", "--image_size=32"]
    flags.FLAGS.unparse_flags()
    flags.FLAGS(["peers", *run_flags])
    (tmp_path / "work").mkdir()
    made = peers.step(peers.make, "MobileNet", "tf_keras", str(tmp_path / "work"))
    assert (made["norms"], made["fewest"]) == (27, 0)
    rows = {
        key: peers.step(peers.convert, key, str(tmp_path / "work"))
        for key in ("original", "ours_fold")
    }
    assert [row["status"] for row in rows.values()] == ["ok", "ok"]
    paths = [f"{key}={row['path']}" for key, row in rows.items()]
    times = peers.step(peers.latency, str(tmp_path / "work"), *paths, "ours_auto=nowhere")
    assert {key: len(each) for key, each in times["milliseconds"].items()} == {
        "original": 2,
        "ours_fold": 2,
    }
    assert list(times["not timed"]) == ["ours_auto"]


def test_rows_survive_an_interruption(monkeypatch, tmp_path):
    answering(monkeypatch, ANSWERS | {"onnx": KeyboardInterrupt()})
    out = tmp_path / "r.json"
    assert run_main(*SMALL, "--tools=ours_fold,onnx", f"--json={out}") == 130
    (model,) = json.loads(out.read_text())["models"]
    assert [r["tool"] for r in model["rows"]] == ["original", "ours_fold"]
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


def test_what_is_not_installed_is_one_line(monkeypatch, tmp_path, capsys):
    answering(monkeypatch, ANSWERS)
    monkeypatch.setattr(
        peer_tools.importlib.util,
        "find_spec",
        lambda name: None if name == "openvino" else object(),
    )
    out = tmp_path / "r.json"
    assert run_main(*SMALL, "--tools=ours_fold,openvino", f"--json={out}") == 0
    lines = [x for x in capsys.readouterr().err.split("\n") if "installed" in x]
    assert lines == ["OpenVINO: openvino not installed, skipped; pip install .[peers]"]
    assert json.loads(out.read_text())["skipped"] == lines


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--models=ResNet500", "unknown model ResNet500; there are MobileNetV2, "),
        ("--keras=keras_4", "unknown Keras keras_4; there are tf_keras, keras_3"),
        ("--modes=strided", "unknown mode strided; there are auto, fold, depthwise"),
        ("--tools=tvm", "unknown tool tvm; there are original, "),
        ("more", "unknown ['more']"),
        (f"--models={__file__}", f"{__file__} is "),
        ("--json=/nowhere/r.json", "there is no directory for /nowhere/r.json"),
    ],
)
def test_mistakes_are_one_line(argument, message, capsys):
    assert run_main(argument) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1


def test_a_chart_is_drawn(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is no dependency of the suite")
    model = {"model": "m", "keras": "k", "rows": [row("original", Left(2), 1.0)]}
    model["rows"].append(row("onnx", Left(), 3.0, status="WRONG"))
    peers.draw([model], {"original": "original", "onnx": "ONNX Runtime"}, tmp_path / "c.png")
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


def test_untimed_calls_are_not_timed():
    called = []
    seconds = time_rounds({"a": lambda: called.append(1)}, 3, 2, untimed=4)
    assert len(seconds["a"]) == 3
    assert len(called) == 2 + 3 * (4 + 1)

"""Errors of int8 in LiteRT, of rewritten models beside their originals.

Networks have random weights, and statistics of the images that they are calibrated with.
"""

import numpy as np
import pytest
import tensorflow as tf

from benchmarks.deployment import forms, models, relus
from benchmarks.peer_tools.work import Work

pytestmark = pytest.mark.slow
Interpreter = pytest.importorskip(
    "ai_edge_litert.interpreter", reason="ai-edge-litert is not installed: pip install '.[deploy]'"
).Interpreter

GAIN, NO_LOSS = 0.9, 1.02  # of the original's error


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A function that gives a network's files, which are made once."""
    known = {}

    def of(name):
        if name not in known:
            known[name] = Work(tmp_path_factory.mktemp("network"))
            models.write(name, known[name], None, calibrating=64, testing=32)
        return known[name]

    return of


@pytest.mark.parametrize("form", forms.INT8)
def test_what_stays_for_its_shift_only_adds(form, written):
    work = written("Conv-ReLU-BN padded")
    before, after = (forms.examined(form, v, work, 1) for v in ("original", "equalize"))
    assert (before["mul"], before["add"]) == (4, 4)
    assert (after["mul"], after["add"]) == (0, 3)
    assert after["error"] <= GAIN * before["error"]


@pytest.mark.parametrize("form", forms.INT8)
def test_uneven_channels_are_equalised(form, written):
    work = written("MobileNetV2-like")
    plain, equalised = (forms.examined(form, v, work, 1) for v in ("fold", "equalize"))
    assert equalised["error"] <= 0.5 * plain["error"]
    original = forms.examined(form, "original", work, 1)
    assert equalised["error"] <= NO_LOSS * original["error"]


def test_relus_in_products_keep_the_network_in_one_part(written):
    """XNNPACK's int8 kernels take the original whole, and not a ReLU that folding leaves alone."""
    work = written("WideResNet-16-4")
    rows = {v: forms.examined("litert_int8", v, work, 1) for v in ("original", "fold", "products")}
    operators = {variant: operators_of(row["path"]) for variant, row in rows.items()}
    parts = {variant: names.count("DELEGATE") for variant, names in operators.items()}
    assert (parts["original"], parts["products"]) == (1, 1)
    assert parts["fold"] > 1
    assert (operators["fold"].count("RELU"), operators["products"].count("RELU")) == (3, 0)
    assert rows["products"]["error"] <= NO_LOSS * rows["original"]["error"]


def test_relus_in_products_compute_the_same(tmp_path):
    class Model(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec([None, 4])])
        def serve(self, x):
            return tf.nn.relu6(2 * tf.nn.relu(x)), tf.nn.relu(tf.cast(x, tf.float64))

    model, x = Model(), tf.random.stateless_normal([64, 4], (0, 0), stddev=3)
    tf.saved_model.save(model, str(tmp_path))
    relus.put_relus_in_products(tmp_path)
    serve = tf.saved_model.load(str(tmp_path)).serve
    for given, expected in zip(serve(x), model.serve(x), strict=True):
        np.testing.assert_allclose(given, expected, rtol=5e-7)
    nodes = serve.get_concrete_function().graph.as_graph_def().library.function[0].node_def
    read = {node.op: node.input[0].split(":")[0] for node in nodes if node.op.startswith("Relu")}
    assert read["Relu6"] == "Relu6/product"
    assert [node.op for node in nodes].count("Mul") == 3  # no product for the one of float64


def test_relus_in_loops_of_tensorflow_1_read_products(tmp_path):
    """A loop made of nodes takes no constant from outside of it."""
    with tf.Graph().as_default() as graph, tf.compat.v1.Session(graph=graph) as session:
        tf.compat.v1.disable_control_flow_v2()
        x = tf.compat.v1.placeholder(tf.float32, [None, 4], "x")
        tripled = tf.while_loop(lambda y: tf.reduce_max(y) < 8, lambda y: 3 * tf.nn.relu(y), [x])
        out = tf.nn.relu6(tripled)
        given = np.array([[1, -2, 0, 0.5]], np.float32)
        expected = session.run(out, {x: given})
        tf.compat.v1.saved_model.simple_save(session, str(tmp_path / "v1"), {"x": x}, {"out": out})
    for _ in range(2):  # once more changes nothing
        relus.put_relus_in_products(tmp_path / "v1")
    serve = tf.saved_model.load(str(tmp_path / "v1")).signatures["serving_default"]
    np.testing.assert_allclose(serve(x=tf.constant(given))["out"], expected, rtol=5e-7)
    assert [node.type for node in serve.graph.get_operations()].count("Mul") == 3


def operators_of(path):
    """What a model consists of as it runs: its operators, and the parts that kernels take whole."""
    interpreter = Interpreter(str(path), num_threads=1)
    interpreter.allocate_tensors()
    return [each["op_name"] for each in interpreter._get_ops_details()]

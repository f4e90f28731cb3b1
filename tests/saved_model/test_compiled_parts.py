"""Functions that XLA compiles in the midst of others: read like the rest, written compiled."""

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras

import mbn_rewrite as mbn
from mbn_rewrite.frontends.saved_model.function_graph import op_counts
from tests.saved_model.test_saved_model_forms import (
    CHANNELS,
    IMAGE,
    Case,
    Weights,
    assert_all_gone,
    conv,
    normalised,
    rewritten,
)
from tests.saved_model.test_saved_model_hard_cases import compiled_among
from tests.support.random_models import randomise
from tests.support.saved_models import randomise_keras_3

pytestmark = pytest.mark.slow


def held(case, constant=False):
    """Weights of a case, whose variables compiled functions could not make."""
    weights = Weights(constant)
    tf.config.run_functions_eagerly(True)
    try:
        case.function(tf.zeros((1, *case.shape)), weights)
    finally:
        tf.config.run_functions_eagerly(False)
    return weights


def compiled(function):
    """A function of a tensor and weights in whose midst XLA compiles."""

    def in_the_midst(x, w):
        inner = tf.function(lambda data: function(data, w), jit_compile=True, autograph=False)
        return tf.nn.relu(inner(tf.abs(x)))

    return in_the_midst


def grouped(x, w):
    return tf.nn.conv2d(x, w.kernel(3, 3, x.shape[-1] // 2, 6), 1, "VALID")


def called_twice(x, w):
    kernel = w.kernel(4, 4)
    inner = tf.function(lambda data: data @ kernel, jit_compile=True, autograph=False)
    return normalised(inner(tf.nn.relu(inner(x))), w)


def nested(x, w):
    inner = tf.function(lambda data: conv(data, w, 3), autograph=False)
    return normalised(tf.nn.relu(inner(x)) * 2.0, w)


def two_results(x, w):
    y = conv(x, w, 3)
    return normalised(y, w) + tf.reduce_mean(y, [1, 2], keepdims=True)


INSIDE = {
    "conv_and_norm": (compiled(lambda x, w: normalised(conv(x, w, 3), w)), IMAGE),
    "grouped": (compiled(lambda x, w: normalised(grouped(x, w), w)), (6, 6, 4)),
    "conv_alone": (lambda x, w: normalised(compiled_alone(conv)(x, w), w), IMAGE),
    "grouped_alone": (lambda x, w: normalised(compiled_alone(grouped)(x, w), w), (6, 6, 4)),
    "norm_alone": (lambda x, w: compiled_alone(normalised)(conv(x, w), w), IMAGE),
}


def compiled_alone(function):
    def part(x, w):
        inner = tf.function(lambda data: function(data, w), jit_compile=True, autograph=False)
        return inner(x)

    return part


@pytest.mark.parametrize("constant", [True, False], ids=["constants", "variables"])
@pytest.mark.parametrize("name", INSIDE)
def test_compiled_part_is_read_and_stays_compiled(name, constant, tmp_path):
    function, shape = INSIDE[name]
    case = Case(lambda x, w: function(tf.abs(x), w), shape)
    decisions, result = rewritten(tmp_path, case, weights=held(case, constant))
    assert_all_gone(decisions, result)
    if name != "norm_alone":
        assert all(compiled_among(tmp_path / "out", "Conv2D"))


def test_function_that_is_called_twice_uses_its_weights_twice(tmp_path):
    """So one of the calls gets weights of its own."""
    case = Case(lambda x, w: called_twice(tf.abs(x), w), (4,))
    (decision,), _ = rewritten(tmp_path, case, weights=held(case))
    assert decision.action == "folded"


def test_functions_within_a_compiled_one_are_compiled_with_it(tmp_path):
    case = Case(compiled(nested), IMAGE)
    (decision,), result = rewritten(tmp_path, case, "depthwise", held(case))
    assert decision.action == "depthwise"
    assert all(compiled_among(tmp_path / "out", "Conv2D"))
    assert all(compiled_among(tmp_path / "out", "DepthwiseConv2dNative"))
    assert "Conv2D" in op_counts(result)


def test_compiled_part_whose_norm_stays(tmp_path):
    case = Case(compiled(two_results), IMAGE)
    (decision,), _ = rewritten(tmp_path, case, weights=held(case))
    assert decision.action == "kept"
    assert "PartitionedCall" not in decision.reason
    assert all(compiled_among(tmp_path / "out", "Conv2D"))


def test_compiled_part_that_writes_stays_a_call(tmp_path):
    root = held(Case(lambda x, w: normalised(conv(x, w, 3), w)))
    root.count = tf.Variable(0.0)

    @tf.function(jit_compile=True, autograph=False)
    def inner(x):
        root.count.assign_add(1.0)
        return normalised(conv(x, root, 3), root)

    @tf.function(input_signature=[tf.TensorSpec([None, *IMAGE])], autograph=False)
    def serve(x):
        root.given = 0
        return {"y": inner(tf.abs(x)) + tf.cast(tf.strings.length("one"), tf.float32)}

    tf.saved_model.save(root, str(tmp_path / "in"), {"serving_default": serve})
    report = mbn.rewrite_saved_model(tmp_path / "in", tmp_path / "out", "fold")
    assert [d.action for d in report.plan.decisions] == ["kept"]
    assert "PartitionedCall" in report.plan.decisions[0].reason


def test_norm_behind_a_call_that_stays_does_not_blame_itself(tmp_path):
    """Nothing tells the shape of what the call gives."""
    root = held(Case(lambda x, w: normalised(conv(x, w, 3), w)))
    root.count = tf.Variable(0.0)

    @tf.function(jit_compile=True, autograph=False)
    def inner(x):
        root.count.assign_add(1.0)
        return conv(x, root, 3)

    @tf.function(input_signature=[tf.TensorSpec([None, *IMAGE])], autograph=False)
    def serve(x):
        root.given = 0
        words = tf.cast(tf.strings.length("one"), tf.float32)
        return {"y": normalised(inner(x * words), root)}

    tf.saved_model.save(root, str(tmp_path / "in"), {"serving_default": serve})
    report = mbn.rewrite_saved_model(tmp_path / "in", tmp_path / "out", "fold")
    (decision,) = report.plan.decisions
    assert decision.action == "kept"
    assert "batchnorm" not in decision.reason


# ------------------------------------------------------------------------------- Keras

LAYERS = {
    "grouped": ("Conv2D", {"groups": 2}, (8, 8, 4)),
    "each_channel_a_group": ("Conv2D", {"groups": 4}, (8, 8, 4)),
    "grouped_same": ("Conv2D", {"groups": 2, "padding": "same", "strides": 2}, (8, 8, 4)),
    "grouped_dilated_open": ("Conv2D", {"groups": 2, "dilation_rate": 2}, (None, None, 4)),
    "grouped_1d": ("Conv1D", {"groups": 2}, (8, 4)),
    "grouped_causal": ("Conv1D", {"groups": 2, "padding": "causal", "dilation_rate": 2}, (8, 4)),
    "grouped_3d": ("Conv3D", {"groups": 2}, (6, 6, 6, 4)),
    "dilated_open": ("Conv2D", {"dilation_rate": 2}, (None, None, 4)),
    "dilated_transposed": ("Conv2DTranspose", {"dilation_rate": 2}, (8, 8, 4)),
    "dilated_transposed_open": ("Conv2DTranspose", {"dilation_rate": 2}, (None, None, 4)),
}


def network(package, name):
    """A BatchNormalization in front of a layer, and one behind it."""
    kind, options, shape = LAYERS[name]
    layers = package.layers
    x = layers.Input(shape)
    y = layers.BatchNormalization(name="before")(x)
    y = getattr(layers, kind)(CHANNELS, 3, use_bias=False, name="layer", **options)(y)
    y = layers.ReLU()(layers.BatchNormalization(name="after")(y))
    model = package.Model(x, y)
    (randomise if package is tf_keras else randomise_keras_3)(model, np.random.default_rng(4))
    return model


@pytest.mark.parametrize("package", [keras, tf_keras], ids=["keras_3", "tf_keras"])
@pytest.mark.parametrize("name", LAYERS)
def test_saved_layer_folds_as_it_does_in_memory(name, package, tmp_path):
    model = network(package, name)
    wanted = [d.action for d in mbn.plan(model, mode="fold").decisions]
    assert wanted[1] == "folded"
    model.save(tmp_path / "in", save_format="tf") if package is tf_keras else model.export(
        tmp_path / "in", verbose=False
    )
    report = mbn.rewrite_saved_model(tmp_path / "in", tmp_path / "out", "fold")
    assert report.ok
    assert [d.action for d in report.plan.decisions] == wanted
    assert report.plan.decisions[1].into[0].startswith("layer")

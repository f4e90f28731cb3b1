"""Parallel branches in the graphs of SavedModels, as one operation."""

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras

import mbn_rewrite as mbn
from mbn_rewrite.frontends.saved_model.function_graph import op_counts
from tests.saved_model.test_saved_model_forms import (
    CHANNELS,
    SEQUENCE,
    Case,
    Weights,
    _little_to_collect,  # noqa: F401 - a fixture
    assert_same_answers,
    conv,
    norm_operations,
    normalised,
    save,
)
from tests.support.kerases import K, Model, package, set_policy
from tests.support.random_models import randomise
from tests.support.saved_models import kernel, randomise_keras_3

pytestmark = pytest.mark.slow

IMAGE = (6, 6, CHANNELS)
FLAT = (CHANNELS,)
SUMS = ("Add", "AddV2", "AddN", "Sub")


def strided(x, w, size, stride=2):
    kernel = w.kernel(size, size, CHANNELS, CHANNELS)
    return normalised(tf.nn.conv2d(x, kernel, stride, "SAME"), w)


def conv1d(x, w, size):
    return tf.nn.conv1d(x, w.kernel(size, CHANNELS, CHANNELS), 1, "SAME")


def conv3d(x, w, size):
    return tf.nn.conv3d(x, w.kernel(size, size, size, CHANNELS, CHANNELS), [1] * 5, "SAME")


def depthwise(x, w, size):
    return tf.nn.depthwise_conv2d(x, w.kernel(size, size, CHANNELS, 1), [1] * 4, "SAME")


def biased(x, w):
    return tf.nn.bias_add(x, w.kernel(CHANNELS))


def block(x, w):
    """A block of RepVGG."""
    return (
        normalised(conv(x, w, 3, padding="SAME"), w)
        + normalised(conv(x, w), w)
        + normalised(x, w)
    )  # fmt: skip


def widest_last(x, w):
    return normalised(x, w) + biased(conv(x, w), w) + conv(x, w, 3, padding="SAME")


def beside_zeros(x, w, stride=2):
    """A block of RepVGG with strides: zeros are put around what one branch reads."""
    kernels = w.kernel(3, 3, CHANNELS, CHANNELS), w.kernel(1, 1, CHANNELS, CHANNELS)
    zeros = tf.pad(x, [[0, 0], [1, 1], [1, 1], [0, 0]])
    wide = tf.nn.conv2d(zeros, kernels[0], stride, "VALID")
    return normalised(wide, w) + normalised(tf.nn.conv2d(x, kernels[1], stride, "VALID"), w)


MERGES = {
    "beside_zeros": (beside_zeros, IMAGE, "Conv2D"),
    "block": (block, IMAGE, "Conv2D"),
    "widest_last": (widest_last, IMAGE, "Conv2D"),
    "python_sum": (lambda x, w: sum([x, conv(x, w), conv(x, w, 3, padding="SAME")]),
                   IMAGE, "Conv2D"),
    "sum_begins_widest": (lambda x, w: sum([conv(x, w, 3, padding="SAME"), x]), IMAGE, "Conv2D"),
    "itself": (lambda x, w: x + conv(x, w, 3, padding="SAME"), IMAGE, "Conv2D"),
    "strided": (lambda x, w: strided(x, w, 3) + strided(x, w, 1), IMAGE, "Conv2D"),
    "add_n": (lambda x, w: tf.add_n([x, conv(x, w), normalised(x, w)]), IMAGE, "Conv2D"),
    "subtract": (lambda x, w: normalised(conv(x, w), w) - conv(x, w, 3, padding="SAME"),
                 IMAGE, "Conv2D"),
    "norm_between": (lambda x, w: x + normalised(conv(x, w) + conv(x, w), w), IMAGE, "Conv2D"),
    "norm_after": (lambda x, w: normalised(biased(conv(x, w), w) + x, w), IMAGE, "Conv2D"),
    "conv1d": (lambda x, w: x + normalised(conv1d(x, w, 3), w) + conv1d(x, w, 1),
               SEQUENCE, "Conv2D"),
    "conv1d_biased": (lambda x, w: biased(conv1d(x, w, 3), w) + normalised(x, w),
                      SEQUENCE, "Conv2D"),
    "conv3d": (lambda x, w: conv3d(x, w, 3) + conv3d(x, w, 1) + x, (4, 4, 4, CHANNELS), "Conv3D"),
    "depthwise": (lambda x, w: depthwise(x, w, 3) + normalised(depthwise(x, w, 1), w) + x,
                  IMAGE, "DepthwiseConv2dNative"),
    "matmul": (lambda x, w: x @ w.kernel(CHANNELS, CHANNELS) + normalised(x, w), FLAT, "MatMul"),
    "matmul_turned": (lambda x, w: tf.matmul(x, w.kernel(CHANNELS, CHANNELS), transpose_b=True)
                      + biased(x @ w.kernel(CHANNELS, CHANNELS), w), FLAT, "MatMul"),
    "stored_otherwise": (
        lambda x, w: tf.nn.conv2d(
            x, tf.transpose(w.kernel(CHANNELS, CHANNELS, 3, 3), [2, 3, 1, 0]), 1, "SAME") + x,
        IMAGE, "Conv2D"),
}  # fmt: skip


def rewritten(tmp_path, function, shape, constant=False):
    """Saves and rewrites a function between two ReLU; gives the plan and the new signature."""
    weights = Weights(constant)
    case = Case(lambda x, w: tf.nn.relu(function(tf.nn.relu(x), w)), shape)
    signature = save(tmp_path / "in", case, weights)
    report = mbn.rewrite_saved_model(tmp_path / "in", tmp_path / "out", "fold")
    assert report.ok
    new = tf.saved_model.load(str(tmp_path / "out"))
    result = new.signatures["serving_default"]
    result.holder = new  # of the variables
    assert_same_answers(signature, result, case)
    return report.plan, result


@pytest.mark.parametrize("constant", [False, True], ids=["variables", "constants"])
@pytest.mark.parametrize("name", MERGES)
def test_merges(name, constant, tmp_path):
    function, shape, operation = MERGES[name]
    plan, new = rewritten(tmp_path, function, shape, constant)
    counts = op_counts(new)
    assert plan.left == 0
    assert len(plan.merged) == 1
    assert norm_operations(new) == []
    assert counts[operation] == 1
    assert not set(counts) & set(SUMS)


KEEPS = {
    "window_stored_otherwise": (
        lambda x, w: tf.nn.conv2d(
            x, tf.transpose(w.kernel(3, 3, CHANNELS, CHANNELS), [1, 0, 2, 3]), 1, "SAME") + x,
        IMAGE),
    "plus_one": (lambda x, w: x + (conv(x, w) + 1.0), IMAGE),
    "plus_zeros": (lambda x, w: x + tf.zeros([2, 1, 1, 1, 1]) * 0.0 + conv(x, w)[None], IMAGE),
    "computed_kernel": (
        lambda x, w: x + tf.nn.conv2d(
            x, w.kernel(1, 1, CHANNELS, CHANNELS) * tf.reduce_mean(x), 1, "SAME"),
        IMAGE),
    "broadcast": (lambda x, w: conv(x, w) + x[:, :1, :1], IMAGE),
    "strides": (lambda x, w: conv(x, w)[:, ::2, ::2] + strided(x, w, 1), IMAGE),
    "activation": (lambda x, w: conv(x, w) + tf.nn.relu(conv(x, w)), IMAGE),
}  # fmt: skip


@pytest.mark.parametrize("name", KEEPS)
def test_keeps(name, tmp_path):
    plan, _ = rewritten(tmp_path, *KEEPS[name])
    assert not plan.merged


# ------------------------------------------------------------------------- several signatures


class Blocks(tf.Module):
    """A block of two convolutions, and functions that use it."""

    def __init__(self):
        super().__init__()
        rng = np.random.default_rng(5)
        self.wide = tf.Variable(kernel(rng, 3, 3, CHANNELS, CHANNELS))
        self.narrow = tf.Variable(kernel(rng, 1, 1, CHANNELS, CHANNELS))

    def branch(self, x):
        return tf.nn.relu(tf.nn.conv2d(x, self.narrow, 1, "SAME"))

    def block(self, x):
        branches = [tf.nn.conv2d(x, k, 1, "SAME") for k in (self.narrow, self.wide)]
        return tf.nn.relu(branches[0] + branches[1] + x)

    def twice(self, x):
        return self.block(self.block(x))


def save_functions(directory, module, **functions):
    spec = tf.TensorSpec([None, *IMAGE], tf.float32, "x")
    signatures = {
        name: tf.function(lambda x, f=f: {"y": f(x)}, autograph=False).get_concrete_function(spec)
        for name, f in functions.items()
    }
    tf.saved_model.save(module, str(directory), signatures)


def test_functions_that_share_a_block(tmp_path):
    module = Blocks()
    save_functions(tmp_path / "in", module, one=module.block, two=module.twice)
    report = mbn.rewrite_saved_model(tmp_path / "in", tmp_path / "out", "fold")
    assert report.ok
    assert len(report.comparisons) == 2
    assert len(report.plan.merged) == 1
    new = tf.saved_model.load(str(tmp_path / "out"))
    assert op_counts(new.signatures["two"])["Conv2D"] == 2


def test_a_branch_that_another_function_uses_alone(tmp_path):
    module = Blocks()
    save_functions(tmp_path / "in", module, block=module.block, branch=module.branch)
    report = mbn.rewrite_saved_model(tmp_path / "in", tmp_path / "out", "fold")
    assert report.ok
    assert not report.plan.merged


# ------------------------------------------------------------------------------- networks


def repvgg():
    """A small network of RepVGG's blocks, one with a stride."""

    def branch(x, size, stride, channels):
        y = K.Conv2D(channels, size, stride, padding="same", use_bias=False)(x)
        return K.BatchNormalization()(y)

    x = y = K.Input((8, 8, 3))
    for channels, stride in ((4, 2), (4, 1), (4, 1)):
        branches = [branch(y, 3, stride, channels), branch(y, 1, stride, channels)]
        branches += [K.BatchNormalization()(y)] if stride == 1 else []
        y = K.ReLU()(K.Add()(branches))
    model = Model(x, K.Dense(3)(K.GlobalAveragePooling2D()(y)))
    rng = np.random.default_rng(4)
    if package() is keras:
        randomise_keras_3(model, rng)
    else:
        randomise(model, rng)
    return model


@pytest.mark.parametrize("dtypes", ["float32", "mixed_float16", "mixed_bfloat16"])
def test_repvgg_in_memory(dtypes, each_keras):
    set_policy(dtypes)
    model = repvgg()
    plan = mbn.plan(model, mode="fold")
    assert plan.left == 0
    assert len(plan.merged) == 3
    new = mbn.convert(model, mode="fold")
    assert mbn.verify(model, new).ok
    assert [type(layer).__name__ for layer in new.layers].count("Conv2D") == 3
    assert not any(isinstance(layer, K.Add) for layer in new.layers)
    again = new.__class__.from_config(new.get_config())
    again.set_weights(new.get_weights())
    assert mbn.verify(model, again).ok


def test_repvgg_as_saved_model(each_keras, tmp_path):
    model = repvgg()
    if each_keras is tf_keras:
        model.save(tmp_path / "in")
    else:
        model.export(tmp_path / "in", verbose=False)
    report = mbn.rewrite_saved_model(tmp_path / "in", tmp_path / "out", mode="fold")
    assert report.ok
    assert report.plan.left == 0
    assert len(report.plan.merged) == 3
    assert report.after.ops["Conv2D"] == 3
    assert not set(report.after.ops) & set(SUMS)

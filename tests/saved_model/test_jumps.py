"""Outputs that jump: rounding that decides them is told from mistakes.

The original's values lie on the very edge of a jump in some entries, so that a right model differs
from it there. The two are functions of TensorFlow, so that nothing has to be saved.
"""

from functools import cache

import numpy as np
import pytest
import tensorflow as tf

import mbn_rewrite as mbn
from mbn_rewrite import comparison
from mbn_rewrite.comparison import TOLERANCES, compare_outputs, judged
from mbn_rewrite.frontends.saved_model.closer_look import look_closer_at_calls
from mbn_rewrite.frontends.saved_model.discontinuities import cuts_between
from mbn_rewrite.frontends.saved_model.function_graph import function_graph_of
from mbn_rewrite.ir.algebra import fold
from mbn_rewrite.rewrite import VerificationError
from tests.support import saved_models
from tests.support.kerases import K, Model

_RNG = np.random.default_rng(0)
IMAGES = tf.constant(_RNG.standard_normal((2, 8, 8, 2)), tf.float32)
KERNEL = _RNG.standard_normal((3, 3, 2, 4)).astype(np.float32) / 3
BIAS, SHIFT = _RNG.normal(0, 0.5, (2, 4)).astype(np.float32)
SCALE = _RNG.uniform(0.3, 1.5, 4).astype(np.float32)
STEP = 12 / 255  # of 8 bits from -6 to 6


def convolved(x, kernel, bias):
    return tf.nn.conv2d(x, kernel, 1, "VALID") + bias


def original(x):
    """A convolution, and a scale and a shift."""
    return convolved(x, KERNEL, BIAS) * SCALE + SHIFT


def folded(kernel=KERNEL * SCALE, bias=BIAS * SCALE + SHIFT):
    return lambda x: convolved(x, kernel, bias)


MODELS = {
    "right": folded(),
    "a bias of one channel": folded(bias=BIAS * SCALE + SHIFT + np.float32([0.02, 0, 0, 0])),
    "a shift forgotten": folded(bias=BIAS * SCALE),
    "scales swapped": folded(kernel=KERNEL * SCALE[[1, 0, 2, 3]]),
}
WRONG = [name for name in MODELS if name != "right"]


@cache
def edge(entries):
    """What to subtract so that some entries become 0, but for rounding of both signs."""
    y, new = original(IMAGES).numpy().ravel(), folded()(IMAGES).numpy().ravel()
    above, below = np.flatnonzero(new > y), np.flatnonzero(new < y)
    on_edge = [*above[: entries // 2], *below[: entries // 2]]
    subtracted = np.zeros_like(y)
    subtracted[on_edge] = y[on_edge]
    return subtracted.reshape(2, 6, 6, 4)


def with_post(body, post, entries=30):
    return lambda x: tf.nest.flatten(post(body(x) - edge(entries)))


def as_image(y):
    return tf.cast(tf.clip_by_value(tf.round(y * 40 + 127.5), 0, 255), tf.uint8)


def best_boxes(y):
    corners = tf.reshape(tf.range(y.shape.num_elements(), dtype=tf.float32), [-1, 1])
    boxes = tf.concat([corners, corners, corners + 1, corners + 1], 1)
    scores = tf.reshape(y, [-1])
    keep = tf.image.non_max_suppression(boxes, scores, 200, 0.5)
    return tf.gather(boxes, keep), tf.gather(scores, keep)


def in_a_loop(y):
    return tf.map_fn(lambda image: tf.where(image > 0, 1, 0), y, tf.int32)


def in_a_branch(y):
    return tf.cond(tf.reduce_max(y) > 0, lambda: tf.cast(y > 0, tf.int32), lambda: tf.range(3))


def layered(y):
    """A jump behind a jump, and a value that passes both by."""
    mask = tf.cast(y > 0, tf.float32)
    mean = tf.reduce_mean(mask, -1)
    return tf.cast(tf.round(mean * 3 + y[..., 0]), tf.int32), tf.reduce_sum(y, -1)


JUMPS = {
    "class map": lambda y: tf.argmax(tf.stack([y, 0 * y], -1), -1),
    "masked class map": lambda y: tf.argmax(tf.stack([y, 0 * y, 0 * y - 1e9], -1), -1),
    "truth values": lambda y: y > 0,
    "truth values as floats": lambda y: tf.cast(y > 0, tf.float32) * 0.5,
    "picture": as_image,
    "fake quantised": lambda y: tf.quantization.fake_quant_with_min_max_args(
        y * 8 + STEP / 2, -6, 6
    ),
    "sign": tf.sign,
    "floor division": lambda y: y // 0.5,
    "best": lambda y: tuple(tf.math.top_k(tf.reshape(y, [-1]), 250)),
    "sorted": lambda y: tf.argsort(tf.reshape(y, [2, -1])),
    "boxes": best_boxes,
    "how many": lambda y: tf.where(y > 0),
    "texts": lambda y: tf.strings.as_string(y > 0),
    "loop": in_a_loop,
    "branch": in_a_branch,
    "layered": layered,
}
# Where a part of the outputs depends on almost nothing.
STEEP = {
    "log of a relu": lambda y: tf.math.log(tf.nn.relu(y)),
    "square root": tf.sqrt,
    "reciprocal": lambda y: tf.tanh(tf.math.reciprocal(y)),
    "direction": lambda y: tf.atan2(y, -tf.ones_like(y)),
    "scores where there are any": lambda y: tf.math.log(tf.where(y > 0, y, 0.0)),
}


def looked_at(first, second, inputs=IMAGES, tolerance=TOLERANCES["float32"]):
    """How two functions compare as they are, and when looked at more closely."""
    expected, actual = ([t.numpy() for t in f(inputs)] for f in (first, second))
    plain = compare_outputs(expected, actual, tolerance)
    return plain, judged(
        expected,
        actual,
        tolerance,
        lambda found: look_closer_at_calls(first, second, inputs, found, rounding=True),
    )


@pytest.mark.parametrize("name", JUMPS)
def test_a_jump_lets_a_right_model_pass(name):
    post = JUMPS[name]
    plain, found = looked_at(with_post(original, post), with_post(MODELS["right"], post))
    assert not plain.ok  # or nothing is shown
    assert found.ok, found
    assert found.max_rel_error < 1e-5
    assert "rounding decides" in found.note
    assert found.differing == found.may_differ == plain.differing


# A small mistake is the hardest to see, so it is tried on all; others on one of each kind.
MISTAKEN = [(name, "a bias of one channel") for name in (*JUMPS, *STEEP)] + [
    (name, model)
    for name in ("class map", "truth values as floats", "picture", "boxes")
    for model in MODELS
    if model not in ("right", "a bias of one channel")
]


@pytest.mark.parametrize(("name", "model"), MISTAKEN)
def test_nothing_that_jumps_lets_a_wrong_model_pass(name, model):
    post, entries = (JUMPS[name], 30) if name in JUMPS else (STEEP[name], 2)
    plain, found = looked_at(
        with_post(original, post, entries), with_post(MODELS[model], post, entries)
    )
    assert not plain.ok
    assert not found.ok, found


@pytest.mark.parametrize("name", STEEP)
def test_what_is_steep_lets_a_right_model_pass(name):
    post = STEEP[name]
    plain, found = looked_at(with_post(original, post, 2), with_post(MODELS["right"], post, 2))
    assert not plain.ok
    assert found.ok, found


def test_what_is_steep_excuses_few_entries():
    """A channel that is small everywhere hides behind others that are not, before a logarithm."""
    small = np.float32([1e-6, 1, 1, 1])

    def body(wrong):
        return lambda x: [tf.math.log(tf.abs(original(x)) * small * wrong + 1e-9)]

    plain, found = looked_at(body(np.float32(1)), body(np.float32([2, 1, 1, 1])))
    assert not plain.ok
    assert not found.ok


BEHIND = {
    "a threshold": (lambda y: tf.cast(y > 0, tf.float32), lambda y: tf.cast(y > 0.1, tf.float32)),
    "levels": (tf.round, lambda y: tf.round(y) * 1.01),
    "classes": (lambda y: tf.argmax(y, -1), lambda y: tf.argmax(y, -1) + 1),
    "beside": (
        lambda y: (y > 0, tf.nn.relu(y)),
        lambda y: (y > 0, tf.nn.relu(y) * [1, 1, 1, 1.001]),
    ),
    "before the last of two": (
        lambda y: tf.round(tf.cast(y > 0, tf.float32) * 0.4),
        lambda y: tf.round(tf.cast(y > 0, tf.float32) * 0.6),
    ),
}


@pytest.mark.parametrize("name", BEHIND)
def test_a_mistake_behind_or_beside_a_jump_is_seen(name):
    right, wrong = BEHIND[name]
    plain, found = looked_at(with_post(original, right), with_post(folded(), wrong))
    assert not plain.ok
    assert not found.ok, found


def test_a_mistake_between_two_jumps_is_seen():
    def body(factor):
        def call(x):
            levels = tf.round(original(x) - edge(30))
            return [tf.cast(levels * factor + original(x) > 1.5, tf.int32)]

        return call

    plain, found = looked_at(body(1.0), body(0.5))
    assert not plain.ok
    assert not found.ok


# Far from every jump, so that right and wrong models give the same.
AGREEING = {
    "class map": lambda y: tf.argmax(tf.stack([y, y + 50], -1), -1),
    "truth values": lambda y: y > 50,
    "whole numbers": lambda y: tf.cast(tf.round(y * 1e-3), tf.int32),
    "texts": lambda y: tf.strings.as_string(y > 50),
    "loop": lambda y: in_a_loop(y - 50),
    "beside what is right": lambda y: (tf.zeros(3), y > 50),
}


@pytest.mark.parametrize("name", AGREEING)
def test_outputs_that_agree_by_chance_let_no_wrong_model_pass(name):
    post = AGREEING[name]
    plain, found = looked_at(with_post(original, post), with_post(MODELS["right"], post))
    assert plain.ok
    assert found.ok, found
    assert found.max_rel_error < 1e-5
    for model in WRONG:
        plain, found = looked_at(with_post(original, post), with_post(MODELS[model], post))
        assert plain.ok
        assert not found.ok, found
        assert "agree, but by chance" in found.note


def test_whole_numbers_that_depend_on_no_real_ones_are_compared_as_they_are():
    def sizes(body):
        return lambda x: [tf.shape(body(x))]

    plain, found = looked_at(sizes(original), sizes(MODELS[WRONG[0]]))
    assert found == plain


def test_operations_of_other_names_are_found_by_their_order():
    def named(body, prefix):
        def call(x):
            y = body(x) - edge(30)
            with tf.name_scope(prefix):
                return [tf.cast(tf.round(y) + tf.sign(y), tf.int32)]

        return call

    plain, found = looked_at(named(original, "one"), named(folded(), "another/way"))
    assert not plain.ok
    assert found.ok, found


def test_comparisons_of_integers_are_no_jumps():
    def count(x):
        return [tf.while_loop(lambda i, y: i < 3, lambda i, y: (i + 1, y * 2.0), (0, x))[1]]

    graph = function_graph_of(
        "it", tf.function(count).get_concrete_function(IMAGES), lambda name: None
    )
    assert not cuts_between(graph, graph).cuts


# ------------------------------------------------------------- where it cannot be looked inside


@pytest.mark.parametrize(("entries", "ok"), [(9, True), (11, False)])
def test_where_nothing_can_be_seen_one_in_a_thousand_may_differ(entries, ok):
    classes = np.zeros(10_000, np.int64)
    others = classes.copy()
    others[:entries] = 3
    found = judged([classes], [others], TOLERANCES["float32"], lambda plain: None)
    assert found.ok == ok
    assert f"{entries} of 10,000 entries of output 0 differ" in found.note


def test_where_nothing_can_be_seen_real_numbers_may_not_differ():
    classes, scores = np.zeros(10_000, np.int64), np.ones(10_000, np.float32)
    others, worse = classes.copy(), scores.copy()
    others[0], worse[0] = 1, 1.1
    assert not judged([classes, scores], [others, worse], 2e-4, lambda plain: None).ok


def test_a_function_of_python_is_not_looked_inside():
    """Few flips are let pass, as where there is no graph; many are not."""

    def mask(body):
        def call(x):
            y = body(x) - edge(2)
            return [tf.reshape(tf.numpy_function(lambda a: a > 0, [y], tf.bool), y.shape)]

        return call

    plain, found = looked_at(mask(original), mask(folded()))
    assert plain.differing == 1
    assert not found.ok  # one in 288


def test_a_tolerance_scales_what_may_differ():
    classes, others = np.zeros(10, np.int64), np.ones(10, np.int64)
    assert judged([classes], [others], 1.0, lambda plain: None).ok
    assert comparison.FLIPS * 0.01 < 0.1
    assert not judged([classes], [others], 0.01, lambda plain: None).ok


# ---------------------------------------------------------------------------- narrow dtypes

HIDDEN = tf.constant(_RNG.standard_normal((16, 8)), tf.float32)
WEIGHTS = _RNG.standard_normal((8, 6)).astype(np.float32)
WEIGHTS[:, 3:] = WEIGHTS[:, :3] + _RNG.normal(0, 0.01, (8, 3))  # so that little is left of much
FACTORS, ONES = _RNG.uniform(0.5, 1.5, 6).astype(np.float32), np.ones(6, np.float32)


def cancelling(dtype, kept, factors, weights, bias=0.0):
    """Differences of values that are almost equal, which rounding moves by a lot."""
    weights = tf.cast(weights, kept)

    def call(x):
        y = tf.matmul(tf.cast(x, dtype), tf.cast(weights, dtype)) * tf.cast(factors, dtype)
        y = y + tf.cast(bias, dtype)
        y = tf.nn.relu(y[:, :3] - y[:, 3:])
        return [y, tf.argmax(y, -1)]

    return call


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("kept", ["float32", "narrow"])
def test_what_a_narrow_dtype_rounds_is_no_mistake(dtype, kept):
    kept = dtype if kept == "narrow" else kept
    first = cancelling(dtype, kept, FACTORS, WEIGHTS / FACTORS)
    second = cancelling(dtype, kept, ONES, WEIGHTS)
    plain, found = looked_at(first, second, HIDDEN, TOLERANCES[dtype])
    assert not plain.ok
    assert found.ok, found
    assert "rounding explains" in found.note
    bias = np.float32([0.02 if kept == "float32" else 1.0, 0, 0, 0, 0, 0])
    wrong = cancelling(dtype, kept, ONES, WEIGHTS, bias)
    assert not looked_at(first, wrong, HIDDEN, TOLERANCES[dtype])[1].ok


def test_a_tolerance_that_is_given_is_not_exceeded():
    first = cancelling("float16", "float32", FACTORS, WEIGHTS / FACTORS)
    second = cancelling("float16", "float32", ONES, WEIGHTS)
    expected, actual = ([t.numpy() for t in f(HIDDEN)] for f in (first, second))
    plain = compare_outputs(expected, actual, 1e-2)
    found = look_closer_at_calls(first, second, HIDDEN, plain, rounding=False)
    assert found is None or not found.ok


# ------------------------------------------------------------------- models, and files of them


def jumping_model():
    """A model whose classes depend on values that are on the edge of them, and its inputs."""
    rng = np.random.default_rng(3)
    x = K.Input((8, 8, 2), name="picture")
    y = K.BatchNormalization()(K.Conv2D(4, 3)(x))
    model = Model(x, y)
    model.set_weights([rng.uniform(0.3, 1.3, w.shape) for w in model.get_weights()])
    images = rng.standard_normal((2, 8, 8, 2)).astype(np.float32)
    before = np.asarray(model(images)).ravel()
    after = np.asarray(mbn.convert(model, "fold")(images)).ravel()
    edges = np.sort(before[before != after][:20]).tolist()
    return Model(x, [K.Discretization(edges, name="classes")(y), K.ReLU(name="scores")(y)]), images


def spoiled(model):
    """The same model, with a wrong bias of one channel."""
    conv = next(layer for layer in model.layers if isinstance(layer, K.Conv2D))
    kernel, bias = conv.get_weights()
    conv.set_weights([kernel, bias + np.float32([0, 0, 0.01, 0])])
    return model


def test_models_in_memory(each_keras):
    model, images = jumping_model()
    new = mbn.convert(model, "fold")
    found = mbn.verify(model, new, images)
    assert found.differing > 0
    assert found.ok, found
    assert not mbn.verify(model, spoiled(new), images).ok


def test_a_mistake_that_only_classes_show(each_keras):
    model, images = jumping_model()
    model = Model(model.inputs, model.outputs[0])
    new = mbn.convert(model, "fold")
    assert mbn.verify(model, new, images).ok
    found = mbn.verify(model, spoiled(new), images)
    assert not found.ok
    assert "entries of output 0 differ" in str(found)


@pytest.mark.parametrize(
    ("each_keras", "file"),
    [("tf_keras", "model.h5"), ("tf_keras", "saved"), ("keras", "model.keras")],
    indirect=["each_keras"],
)
@pytest.mark.parametrize("right", [True, False])
def test_models_on_disk(each_keras, file, right, tmp_path, monkeypatch):
    model, images = jumping_model()
    options = {"save_format": "tf"} if file == "saved" else {}
    model.save(tmp_path / file, **options)
    if not right:
        for module in ("keras_common.folded_layers", "saved_model.writer"):
            monkeypatch.setattr(f"mbn_rewrite.frontends.{module}.fold", _fold_wrongly)
    arguments = (tmp_path / file, tmp_path / "out", "fold")
    if not right:
        with pytest.raises(VerificationError, match=r"entries of '\w+' differ"):
            mbn.rewrite_saved_model(*arguments, inputs={"picture": images})
        return
    report = mbn.rewrite_saved_model(*arguments, inputs={"picture": images})
    assert report.comparison.differing > 0
    assert "differ; what they are computed from agrees" in str(report)


def _fold_wrongly(*args, **kwargs):
    kernels, bias = fold(*args, **kwargs)
    return kernels, bias + np.resize([0.01, 0, 0, 0], bias.shape)


def in_a_graph(network, edges, directory):
    """With reference variables of TensorFlow 1, which are nodes of the graph."""
    values = {name: getattr(network, name).numpy() for name in ("kernel", *saved_models.NORM)}
    v1 = tf.compat.v1
    with tf.Graph().as_default():
        image = v1.placeholder(tf.float32, [None, *saved_models.IMAGE], "image")
        read = {
            name: v1.get_variable(name, initializer=value, use_resource=False)
            for name, value in values.items()
        }
        x = tf.nn.conv2d(image, read["kernel"], 1, "SAME")
        x = saved_models.fused_norm(x, *(read[name] for name in saved_models.NORM))
        classes = tf.raw_ops.Bucketize(input=x, boundaries=edges)
        saved_models.save_graph(directory, {"image": image}, {"classes": classes})


def counting_calls(network, edges, directory):
    """Every call changes the state, which is an output."""
    network.calls = tf.Variable(5)

    def serve(image):
        y = network.fused(network.convolved(image))
        classes = tf.raw_ops.Bucketize(input=y, boundaries=edges)
        return {"classes": classes, "calls": network.calls.assign_add(1)}

    saved_models.save_with_one_signature(directory, network, serve)


@pytest.mark.parametrize("save", [in_a_graph, counting_calls])
def test_saved_models_with_states(save, tmp_path):
    network = saved_models.Network()
    images = _RNG.standard_normal((3, *saved_models.IMAGE)).astype(np.float32)
    values = network.fused(network.convolved(images)).numpy().ravel()
    save(network, np.sort(values[:40]).tolist(), tmp_path / "in")
    report = mbn.rewrite_saved_model(
        tmp_path / "in", tmp_path / "out", "fold", inputs={"image": images}
    )
    found = report.comparisons["serving_default"]
    assert found.differing > 0
    assert found.ok

"""The comparison accepts rounding and rejects mistakes; so do the tests that rely on it."""

from dataclasses import replace

import numpy as np
import pytest
import tensorflow as tf
import tf_keras

import mbn_rewrite as mbn
from mbn_rewrite.comparison import TOLERANCES, compare_outputs
from mbn_rewrite.ir.graph import (
    Affine,
    Clip,
    Linear,
    Merge,
    Monotone,
    PositivelyHomogeneous,
    ZeroPadding,
)
from mbn_rewrite.rules.relations import RELATIONS, Ends, Gated, Origins, Tied
from tests.support.checks import check_rewrite
from tests.support.random_models import K, randomise


def arrays(*values):
    return [np.asarray(v) for v in values]


def test_equal_outputs_are_equal():
    a = arrays([[1.0, 2.0], [4.0, 3.0]])
    comparison = compare_outputs(a, a, 1e-6)
    assert comparison.ok
    assert comparison.max_abs_error == comparison.max_rel_error == 0.0
    assert comparison.top1_agreement == 1.0
    assert comparison.examples == 2


def test_errors_are_measured_against_each_output():
    comparison = compare_outputs(
        arrays([[100.0, 0.0]], [[1.0, 0.0]]), arrays([[101.0, 0.0]], [[1.0, 0.02]]), 1e-2
    )
    assert comparison.max_abs_error == pytest.approx(1.0)
    assert comparison.max_rel_error == pytest.approx(0.02)
    assert not comparison.ok


def test_top1_agreement_counts_positions():
    a = arrays([[1.0, 2.0], [2.0, 1.0], [2.0, 1.0], [2.0, 1.0]])
    b = arrays([[2.0, 1.0], [2.0, 1.0], [2.0, 1.0], [2.0, 1.0]])
    assert compare_outputs(a, b, 1.0).top1_agreement == 0.75


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", ["original", "rewritten model"])
def test_values_that_are_not_finite_in_one_never_pass(side, value):
    good, bad = arrays([[1.0, 2.0]]), arrays([[1.0, value]])
    pair = (bad, good) if side == "original" else (good, bad)
    comparison = compare_outputs(*pair, 1e9, ["scores"])
    assert not comparison.ok
    assert f"NaN or infinity from the {side} in 1 of 2 entries of scores" in str(comparison)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_alike_are_equal(value):
    a, b = arrays([[1.0, value, 3.0]]), arrays([[1.1, value, 3.0]])
    comparison = compare_outputs(a, b, 0.1)
    assert comparison.ok
    assert comparison.max_abs_error == pytest.approx(0.1)
    assert comparison.compared == 2
    assert "alike" in comparison.note
    assert not compare_outputs(a, b, 0.01).ok  # the others are compared all the same


@pytest.mark.parametrize(("one", "other"), [(np.inf, -np.inf), (np.nan, np.inf), (np.nan, -1.0)])
def test_values_that_are_not_finite_otherwise_never_pass(one, other):
    assert not compare_outputs(arrays([1.0, one]), arrays([1.0, other]), 1e9).ok
    assert not compare_outputs(arrays([1.0, other]), arrays([1.0, one]), 1e9).ok


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_where_nothing_is_finite_nothing_is_proved(value):
    comparison = compare_outputs(arrays([value, value]), arrays([value, value]), 1e9)
    assert not comparison.ok
    assert comparison.compared == 0
    assert "nothing could be compared" in str(comparison)


def test_one_output_that_is_never_finite_leaves_the_others_to_compare():
    nothing, a, b = np.full(3, np.nan), np.ones(2), np.full(2, 1.1)
    assert compare_outputs([nothing, a], [nothing, a], 1e-3).ok
    assert not compare_outputs([nothing, a], [nothing, b], 1e-3).ok


@pytest.mark.parametrize(
    ("a", "b", "differing"),
    [
        (np.arange(1000), np.arange(1000) + (np.arange(1000) == 999), 1),
        (np.uint8([1, 2, 255]), np.uint8([1, 2, 254]), 1),
        (np.array([True, False]), np.array([False, False]), 1),
        (np.array([b"a", b"b"], object), np.array([b"b", b"a"], object), 2),
        (np.array([2**60]), np.array([2**60 + 1]), 1),
    ],
)
def test_integers_truth_values_and_texts_are_counted(a, b, differing):
    comparison = compare_outputs([a], [b], 0.1, ["'class'"])
    assert not comparison.ok
    assert comparison.differing == differing
    assert f"{differing} of {a.size:,} entries of 'class' differ" in str(comparison)
    assert comparison.to_dict()["differing"] == differing
    assert compare_outputs([a], [a], 0.0).ok


def test_what_marks_an_entry_is_no_size_to_measure_by():
    scores = np.random.default_rng(0).standard_normal((20, 5)).astype(np.float32)
    wrong = scores * np.float32(1.01)
    for mark in (-1e9, 1e6):
        a, b = (
            np.concatenate([scores, 0 * scores + mark]),
            np.concatenate([wrong, 0 * wrong + mark]),
        )
        assert compare_outputs([a], [a], 2e-4).ok
        assert not compare_outputs([a], [b], 2e-4).ok
    large = np.concatenate([scores * 1e6, scores])  # these are sizes, though
    assert compare_outputs([large], [np.concatenate([scores * 1e6, wrong])], 2e-4).ok


def test_other_shapes_never_pass():
    comparison = compare_outputs(arrays([[1.0, 2.0]]), arrays([[1.0]]), 1e9)
    assert not comparison.ok
    assert "shapes" in comparison.note


def test_zero_outputs():
    zero, small = arrays([[0.0]]), arrays([[1e-30]])
    assert compare_outputs(zero, zero, 0.0).ok
    assert not compare_outputs(zero, small, 0.5).ok


def test_text_outputs_are_compared():
    assert compare_outputs(arrays([b"a"]), arrays([b"a"]), 0.1).ok
    assert not compare_outputs(arrays([b"a"]), arrays([b"b"]), 0.1).ok


def test_comparison_serialises_what_is_not_finite():
    comparison = compare_outputs(arrays([np.nan]), arrays([1.0]), 1e-3)
    assert comparison.to_dict()["max_rel_error"] == "inf"
    assert comparison.to_dict()["ok"] is False


# -------------------------------------------------------------------- a wrong model is rejected


def conv_model():
    x = K.Input((8, 8, 3))
    y = K.ReLU()(K.BatchNormalization()(K.Conv2D(8, 3)(x)))
    y = K.ReLU()(K.BatchNormalization()(K.Conv2D(8, 3)(y)))
    model = tf_keras.Model(x, K.Dense(5)(K.GlobalAveragePooling2D()(y)))
    rng = np.random.default_rng(5)
    randomise(model, rng)
    for layer in model.layers:
        if isinstance(layer, K.BatchNormalization):  # with no channel that does not matter
            layer.gamma.assign(rng.uniform(0.5, 1.5, 8))
            layer.beta.assign(rng.uniform(0.1, 0.5, 8))
    return model


@pytest.mark.parametrize("policy", ["float64", "float32", "mixed_bfloat16", "mixed_float16"])
def test_right_model_is_accepted_and_wrong_ones_are_not(policy):
    tf_keras.mixed_precision.set_global_policy(policy)
    model = conv_model()
    new = mbn.convert(model, "fold")
    comparison = mbn.verify(model, new)
    assert comparison.ok
    assert comparison.tolerance == TOLERANCES[policy.removeprefix("mixed_")]
    conv = next(layer for layer in new.layers if isinstance(layer, K.Conv2D))
    kernel, bias = conv.get_weights()
    # One channel of one kernel a tenth too large (twice, where rounding is coarse), and
    # one bias forgotten.
    kernel[..., 0] *= 2.0 if "16" in policy else 1.1
    conv.set_weights([kernel, bias])
    assert not mbn.verify(model, new).ok
    conv.set_weights([mbn.convert(model, "fold").get_layer(conv.name).get_weights()[0], 0 * bias])
    assert not mbn.verify(model, new).ok


# Each of these is a mistake that other tools have shipped. A rewrite that makes it has to
# fail the very checks that the suite and the fuzzer use.


def without_demands(row):
    """A row that ties what it tied, and demands nothing."""

    def wrong(op, shapes, slot, axis):
        relation = row(op, shapes, slot, axis)
        return Tied(relation.spread) if isinstance(relation, (Tied, Gated)) else Ends()

    return wrong


MISTAKES = {
    "shift_through_padding": (ZeroPadding, lambda x: K.ZeroPadding2D(1)(K.Conv2D(4, 1)(x))),
    "negative_through_max": (Monotone, lambda x: K.MaxPooling2D(2)(K.Conv2D(4, 1)(x))),
    "anything_through_relu": (Clip, lambda x: K.ReLU()(K.Conv2D(4, 1)(x))),
    "anything_through_leaky_relu": (
        PositivelyHomogeneous,
        lambda x: K.LeakyReLU()(K.Conv2D(4, 1)(x)),
    ),
    "anything_through_gate": (
        Merge,
        lambda x: K.Multiply()([K.Conv2D(4, 1)(x), K.Conv2D(4, 1)(x)]),
    ),
    "into_fused_activation": (Linear, lambda x: K.Conv2D(4, 1, activation="relu")(x)),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_wrong_rule_is_caught(name, monkeypatch):
    op, wire = MISTAKES[name]
    x = K.Input((8, 8, 4))
    model = tf_keras.Model(x, K.Activation("tanh")(K.BatchNormalization()(wire(x))))
    randomise(model, np.random.default_rng(1))
    norm = next(layer for layer in model.layers if isinstance(layer, K.BatchNormalization))
    norm.gamma.assign([1.0, -1.0, -0.5, 0.7])
    norm.moving_mean.assign([0.3, 0.2, -0.1, 0.4])
    inputs = tf.constant(np.random.default_rng(2).standard_normal((2, 8, 8, 4)), tf.float32)
    check_rewrite(model, inputs, "fold")
    monkeypatch.setitem(RELATIONS, op, without_demands(RELATIONS[op]))
    with pytest.raises(AssertionError, match="NOT EQUAL"):
        check_rewrite(model, inputs, "fold")


def test_a_lost_shift_is_caught(monkeypatch):
    def half_lost(op, shapes, slot, axis):
        """What it gives has twice the origin of what it reads."""
        return replace(row(op, shapes, slot, axis), origins=Origins.SUM, weights=(2.0,))

    row = RELATIONS[Affine]
    dropout = K.Dropout(0.5)
    x = K.Input((8, 8, 3))
    y = K.BatchNormalization()(dropout(K.Conv2D(8, 3)(x)))
    model = tf_keras.Model(x, K.ReLU()(y))
    randomise(model, np.random.default_rng(7))
    model.layers[-2].beta.assign([1.0] * 8)
    inputs = tf.constant(np.random.default_rng(2).standard_normal((2, 8, 8, 3)), tf.float32)
    check_rewrite(model, inputs, "fold")
    monkeypatch.setitem(RELATIONS, Affine, half_lost)
    with pytest.raises(AssertionError, match="NOT EQUAL"):
        check_rewrite(model, inputs, "fold")


# ------------------------------------------------------------------------------ verify itself


def test_verify_takes_real_inputs():
    model = conv_model()
    comparison = mbn.verify(model, mbn.convert(model, "fold"), np.ones((7, 8, 8, 3), np.float32))
    assert comparison.ok
    assert comparison.examples == 7


def test_verify_makes_up_inputs_of_open_sizes_and_whole_numbers():
    words, image = K.Input((None,), dtype="int32"), K.Input((None, None, 3))
    y = K.GlobalAveragePooling1D()(K.Embedding(5, 4)(words))
    z = K.GlobalMaxPooling2D()(K.BatchNormalization()(K.Conv2D(4, 3)(image)))
    model = tf_keras.Model([words, image], K.Concatenate()([y, z]))
    assert mbn.verify(model, mbn.convert(model, "fold")).ok


def test_verify_cannot_make_up_text():
    x = K.Input((), dtype="string")
    model = tf_keras.Model(x, K.StringLookup(vocabulary=["a"])(x))
    with pytest.raises(mbn.RewriteError, match=r"dtype string.*inputs="):
        mbn.verify(model, model)


def test_verify_says_which_inputs_do_not_fit():
    model = conv_model()
    with pytest.raises(mbn.RewriteError, match="the original cannot be called"):
        mbn.verify(model, mbn.convert(model, "fold"), np.ones((2, 8, 8, 5), np.float32))


def test_verify_leaves_statistics_alone():
    x = K.Input((8, 8, 3))
    model = tf_keras.Model(x, K.BatchNormalization()(K.Conv2D(4, 3)(x), training=True))
    before = model.get_weights()
    assert mbn.verify(model, mbn.convert(model, "fold")).ok
    for old, now in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, now)

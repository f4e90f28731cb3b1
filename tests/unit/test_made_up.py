"""Made-up inputs hold what real ones do, and a model that is wrong only there is found out."""

import numpy as np
import pytest
import tensorflow as tf

import mbn_rewrite as mbn
from mbn_rewrite.frontends import sample_inputs
from mbn_rewrite.frontends.sample_inputs import (
    MANNERS,
    PLAIN,
    POSITIVE,
    WITH_EDGES,
    WITH_EMPTY,
    InputRecipe,
    at_open_sizes,
    nans,
    random_array,
    tried,
    with_batch,
)
from tests.support.kerases import K, Model, package


def recipe(shape, dtype, manner=WITH_EDGES, **how):
    return random_array(shape, dtype, np.random.default_rng(0), InputRecipe(manner=manner, **how))


@pytest.mark.parametrize("shape", [(None,), (None, 7), (1, 5), (None, 6, 6, 3), (2, 40, 2)])
def test_floats_hold_zeros_and_both_ends(shape):
    array = recipe(shape, "float32")
    assert {-5.0, 0.0, 5.0} <= set(array.ravel())
    assert np.abs(array).max() == 5


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("top", [None, 255.0])
@pytest.mark.parametrize("manner", MANNERS)
def test_floats_are_made_in_their_own_dtype(dtype, top, manner):
    array = recipe((None, 5, 3), dtype, manner, top=top, padding=0.0)
    assert array.dtype == dtype
    if top:
        assert np.all((array >= 0) & (array <= top))


def test_pixels_are_black_and_white_too():
    array = recipe((None, 8, 8, 3), "float32", top=255.0)
    assert (array.min(), array.max()) == (0, 255)
    assert set(recipe((None, 8, 8, 3), "uint8", top=255.0).ravel()) >= {0, 255}


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "int64", "uint16"])
def test_integers_are_the_first_and_the_last_too(dtype):
    array = recipe((None, 9), dtype, words=100)
    assert array.dtype == dtype
    assert (array.min(), array.max()) == (0, 99)


def test_integers_fit_their_dtype():
    assert recipe((None, 9), "int8", words=1000).max() <= 127


def test_booleans_are_both():
    assert set(recipe((None, 2), "bool").ravel()) == {False, True}


def test_one_string_is_empty():
    strings = recipe((None,), "string", text=lambda rng: b"word")
    assert list(strings) == [b"word", b"word", b"word", b""]
    assert b"" not in recipe((None,), "string", PLAIN, text=lambda rng: b"word")


def lengths_of(array, padding):
    return [int(np.any((row != padding).reshape(len(row), -1), 1).sum()) for row in array]


@pytest.mark.parametrize(
    ("shape", "dtype", "how"),
    [
        ((None, 10, 3), "float32", {"padding": -7.0}),
        ((None, 10), "int32", {"pad_id": 0, "words": 1000}),
    ],
)
def test_sequences_end_at_several_steps(shape, dtype, how):
    padding = how.get("padding", how.get("pad_id"))
    lengths = lengths_of(recipe(shape, dtype, **how), padding)
    assert lengths[0] > lengths[1] > lengths[2] > lengths[3] > 0
    assert np.all(recipe(shape, dtype, WITH_EMPTY, **how)[-1] == padding)
    assert np.all(recipe((1, *shape[1:]), dtype, **how)[0, -1] == padding)


def test_positive_inputs_have_no_zeros():
    assert recipe((None, 50), "float32", POSITIVE).min() > 0
    assert recipe((None, 50), "float32", POSITIVE).max() <= 1
    assert recipe((None, 50), "int32", POSITIVE, words=9).min() == 1


@pytest.mark.parametrize("manner", MANNERS)
@pytest.mark.parametrize("dtype", ["float32", "int32", "bool"])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (0, 3), (2, 0, 3), (None, 1, 1)])
def test_small_shapes_are_what_they_are(shape, dtype, manner):
    array = recipe(shape, dtype, manner, padding=0.0, pad_id=0)
    assert array.shape == tuple(4 if size is None else size for size in shape)


def test_the_same_seed_gives_the_same():
    np.testing.assert_array_equal(recipe((None, 9), "float32"), recipe((None, 9), "float32"))


def test_all_inputs_have_as_many_examples():
    way = with_batch(InputRecipe(), [(None, 224, 224, 3), (None, 5)])
    assert recipe((None, 5), "float32", batch=way.batch).shape == (2, 5)


# ------------------------------------------------------------------------------- the manners


def numbers_for(manners):
    """A call that gives NaN for all but some manners."""

    def call(way):
        return way.manner, np.array([0.0 if way.manner in manners else np.nan])

    return call


@pytest.mark.parametrize("manner", MANNERS)
def test_the_first_manner_without_nan_is_taken(manner):
    found = tried([InputRecipe(padding=0.0)], numbers_for({manner, POSITIVE}), lambda x: [x[1]])
    assert found[0] == manner


def test_nan_in_every_manner_is_given_as_it_is():
    found = tried([InputRecipe()], numbers_for(()), lambda x: [x[1]])
    assert (found[0], nans([found[1]])) == (WITH_EDGES, 1)


def test_what_fails_with_edges_is_tried_without():
    def call(way):
        if way.manner != PLAIN or way.open_size != 16:
            raise mbn.RewriteError(way.manner)
        return np.zeros(1)

    assert tried([InputRecipe(64), InputRecipe(16)], call, lambda x: [x]).shape == (1,)
    with pytest.raises(mbn.RewriteError, match=WITH_EDGES):
        tried([InputRecipe(1)], call, lambda x: [x])


# ---------------------------------------------------------------------------------- sizes


def test_sizes_for_which_a_model_gives_nothing_are_passed_over():
    calls = []

    def call(way):
        calls.append(way.open_size)
        return np.zeros(max(0, way.open_size - 1000))

    found = tried(at_open_sizes(InputRecipe(), [(None, None, 4)]), call, lambda x: [x])
    assert found.shape == (24,)
    assert calls == [64, 224, 16, 1, 1024]
    calls.clear()
    found = tried(at_open_sizes(InputRecipe(), [(None, None, None, 4)]), call, lambda x: [x])
    assert found.size == 0
    assert calls == [64, 224, 16, 1]
    assert at_open_sizes(InputRecipe(), [(None, 3), ()]) == [InputRecipe()]


def test_a_model_of_long_sequences_is_compared(each_keras):
    x = K.Input((None, 4))
    y = K.BatchNormalization()(K.Conv1D(4, 3, padding="same")(x))
    model = Model(x, K.Cropping1D(100)(y))
    _, plan = mbn.convert_with_plan(model, "fold")
    assert plan.verification.ok
    assert not plan.unverified


def test_inputs_that_would_fill_the_memory_are_not_made(monkeypatch):
    monkeypatch.setattr(sample_inputs, "memory", lambda: 2**30)
    assert recipe((1, 4000, 4000), "float32").nbytes < 2**27
    with pytest.raises(mbn.RewriteError, match=r"1\.5 GiB.*0\.1 GiB.*inputs=.*--inputs"):
        recipe((1, 20_000, 20_000), "float32")
    with pytest.raises(mbn.RewriteError, match="what the model computes"):
        recipe((None, 3), "float32", largest=2**26)


def test_no_tensor_has_more_numbers_than_kernels_count(monkeypatch):
    monkeypatch.setattr(sample_inputs, "memory", lambda: 2**50)
    with pytest.raises(mbn.RewriteError, match="an input of the shape"):
        recipe((1, 40_000, 40_000, 3), "uint8")


def test_fewer_examples_are_made_where_many_would_fill_the_memory(monkeypatch):
    monkeypatch.setattr(sample_inputs, "memory", lambda: 2**30)
    assert with_batch(InputRecipe(largest=2**25), [(None, 3)]).batch == 1
    assert with_batch(InputRecipe(largest=2**22), [(None, 3)]).batch == 4


def test_a_layer_whose_output_would_fill_the_memory(each_keras, monkeypatch):
    x = K.Input((10, 10, 1))
    model = Model(x, K.BatchNormalization()(K.UpSampling2D(1000)(x)))
    monkeypatch.setattr(sample_inputs, "memory", lambda: 2**30)
    with pytest.raises(mbn.RewriteError, match="what the model computes would take"):
        mbn.verify(model, model)


# ------------------------------------------------- models that are wrong in one place only


def pair(right, wrong, shape, **kinds):
    """Two models of one input that differ in a function of it."""
    models = []
    for function in (right, wrong):
        x = K.Input(shape, **kinds)
        models.append(Model(x, function(x)))
    return models


def layer(function):
    """A layer that does what a function of tensors does."""

    class Does(package().layers.Layer):
        def call(self, x):
            return function(x)

    return Does()


WRONG = {
    "extremes": (lambda x: x, lambda x: tf.clip_by_value(x, -4.6, 4.6), (3,)),
    "zeros": (lambda x: x, lambda x: tf.where(x == 0, 1.0, x), (3,)),
    "rows of zeros": (
        lambda x: x,
        lambda x: x + tf.cast(tf.reduce_all(x == 0, -1, keepdims=True), x.dtype),
        (5, 5, 3),
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_model_that_is_wrong_there_only(each_keras, what):
    right, wrong, shape = WRONG[what]
    model, new = pair(layer(right), layer(wrong), shape)
    assert mbn.verify(model, model).ok
    assert not mbn.verify(model, new).ok


@pytest.mark.parametrize("value", [0.0, 255.0])
def test_a_model_that_is_wrong_for_a_pixel_only(each_keras, value):
    def brighter(x):
        return tf.where(x == value, x + 9, x)

    scaled = K.Rescaling(1 / 255)
    model, new = pair(scaled, lambda x: scaled(layer(brighter)(x)), (6, 6, 3))
    assert mbn.verify(model, model).ok
    assert not mbn.verify(model, new).ok


@pytest.mark.parametrize("identity", [0, 96])
def test_a_model_that_is_wrong_for_one_row_of_its_table(each_keras, identity):
    x = K.Input((6,), dtype="int32")
    model = Model(x, K.Embedding(97, 3)(x))
    new = package().models.clone_model(model)
    (table,) = model.get_weights()
    table[identity] += 1
    new.set_weights([table])
    assert not mbn.verify(model, new).ok


def recurrent(mask_value=None, **options):
    """A model of sequences with a Masking of this value, or an Embedding(mask_zero=True)."""
    if mask_value is None:
        x = K.Input((8,), dtype="int32")
        y = K.Embedding(30, 4, mask_zero=True)(x)
    else:
        x = K.Input((8, 4))
        y = K.Masking(mask_value)(x)
    return Model(x, K.LSTM(3, **options)(y))


@pytest.mark.parametrize("mask_value", [None, 0.0, -1.5])
def test_a_model_that_forgets_its_mask(each_keras, mask_value):
    model = recurrent(mask_value)
    x = K.Input((8, 4)) if mask_value is not None else K.Input((8,), dtype="int32")
    y = x if mask_value is not None else K.Embedding(30, 4)(x)
    new = Model(x, K.LSTM(3)(y))
    new.set_weights(model.get_weights())
    assert mbn.verify(model, model).ok
    assert not mbn.verify(model, new).ok


def test_a_model_that_pools_without_its_mask(each_keras):
    x = K.Input((8,), dtype="int32")
    y = K.Embedding(30, 4, mask_zero=True)(x)
    model = Model(x, K.GlobalAveragePooling1D()(y))
    again = K.Input((8,), dtype="int32")
    new = Model(again, K.GlobalAveragePooling1D()(K.Embedding(30, 4)(again)))
    new.set_weights(model.get_weights())
    assert mbn.verify(model, model).ok
    assert not mbn.verify(model, new).ok


def test_an_original_that_takes_positive_numbers_only(each_keras):
    model, wrong = pair(layer(tf.sqrt), layer(lambda x: 1.01 * tf.sqrt(x)), (3,))
    assert mbn.verify(model, model).ok
    assert not mbn.verify(model, wrong).ok

"""A file of a Keras becomes a SavedModel that holds each weight once."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import mbn_rewrite as mbn
from tests.support.kerases import K, Model


@pytest.fixture
def written(each_keras, tmp_path):
    """A model with a random generator, and the SavedModel that was written of its file."""
    x = K.Input((8,))
    y = K.Dropout(0.5)(K.Activation("tanh")(K.BatchNormalization()(K.Dense(512)(x))))
    model = Model(x, K.Dense(128)(y))
    model.save(tmp_path / "model.keras")
    mbn.rewrite_saved_model(tmp_path / "model.keras", tmp_path / "out", "fold")
    return model, tmp_path / "out"


def test_each_weight_is_in_the_checkpoint_once(written):
    model, directory = written
    prefix = str(directory / "variables" / "variables")
    stored = [shape for name, shape in tf.train.list_variables(prefix) if "VARIABLE_VALUE" in name]
    folded = mbn.convert(model, "fold")
    states = [[2]] if isinstance(model, keras.Model) else []  # of the random generator
    assert sorted(stored) == sorted([list(w.shape) for w in folded.get_weights()] + states)
    data = directory / "variables" / "variables.data-00000-of-00001"
    assert data.stat().st_size < 1.1 * sum(w.nbytes for w in folded.get_weights())


@pytest.mark.parametrize("each_keras", ["keras"], indirect=True)  # tf_keras writes them itself
def test_what_an_exported_model_offers_is_there(written):
    model, directory = written
    loaded = tf.saved_model.load(str(directory))
    assert set(loaded.signatures) == {"serve", "serving_default"}
    assert [len(loaded.trainable_variables), len(loaded.non_trainable_variables)] == [4, 1]
    assert len(loaded.variables) == 5
    given = tf.ones((3, 8))
    expected = model(given, training=False)
    np.testing.assert_allclose(loaded.serve(given), expected, atol=1e-5)
    before = loaded.serve(given)
    for variable in loaded.trainable_variables:
        variable.assign(tf.zeros_like(variable))
    assert np.any(before != loaded.serve(given))  # they are the variables that it reads
    np.testing.assert_array_equal(loaded.serve(given), np.zeros((3, 128)))

"""Trained models of others: everything that can be folded is, and outputs stay."""

import numpy as np
import pytest
import tensorflow as tf
import tf_keras

import mbn_rewrite as mbn
from tests.checks import check_rewrite
from tools.real_models import MODELS, fetch

# (BatchNormalizations, left after fold). Those of spliceai1 that stay normalise a value that
# is read elsewhere too, and a ReLU follows.
EXPECTED = {
    "fer": (14, 0),
    "ina_male_female": (9, 0),
    "ina_speech_music": (8, 0),
    "ina_speech_music_noise": (8, 0),
    "spliceai1": (32, 16),
}


@pytest.fixture(params=sorted(EXPECTED))
def case(request):
    model = tf_keras.models.load_model(fetch(request.param), compile=False)
    return request.param, model


def inputs_for(name, model, kind):
    rng = np.random.default_rng(0)
    shape = (2, *(size or 10_050 for size in model.input_shape[1:]))
    if kind == "normal":
        values = rng.standard_normal(shape)
    elif name == "spliceai1":  # one of four bases at each position
        values = np.eye(4)[rng.integers(0, 4, shape[:-1])]
    else:
        values = rng.uniform(MODELS[name].low, MODELS[name].high, shape)
    return tf.constant(values, tf.float32)


@pytest.mark.parametrize("kind", ["normal", "real"])
@pytest.mark.parametrize("mode", ["fold", "depthwise"])
def test_real_model(case, mode, kind):
    name, model = case
    check_rewrite(model, inputs_for(name, model, kind), mode)
    norms, left = EXPECTED[name]
    plan = mbn.plan(model, mode)
    assert len(plan.decisions) == norms
    assert plan.left == (left if mode == "fold" else 0)


def test_reasons_of_spliceai():
    model = tf_keras.models.load_model(fetch("spliceai1"), compile=False)
    kept = [d for d in mbn.plan(model).decisions if d.action == "kept"]
    assert all("is also read by" in d.reason for d in kept)
    assert all("is an activation, which a shift cannot pass" in d.reason for d in kept)


def test_every_model_is_tested():
    assert set(EXPECTED) == set(MODELS)

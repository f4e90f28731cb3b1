"""Trained models of others: everything that can be folded is, and outputs stay."""

import pytest
import tf_keras

import mbn_rewrite as mbn
from benchmarks.models.networks import real_inputs
from tests.support.checks import check_rewrite
from tools.real_models import MODELS, fetch

pytestmark = [pytest.mark.slow, pytest.mark.network]

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


@pytest.mark.parametrize("kind", ["normal", "real"])
@pytest.mark.parametrize("mode", ["fold", "depthwise"])
def test_real_model(case, mode, kind):
    name, model = case
    check_rewrite(model, real_inputs(name, model, seed=0)[kind], mode)
    norms, left = EXPECTED[name]
    plan = mbn.plan(model, mode)
    assert len(plan.decisions) == norms
    assert plan.left == (left if mode == "fold" else 0)


def test_reasons_of_spliceai():
    model = tf_keras.models.load_model(fetch("spliceai1"), compile=False)
    kept = [d for d in mbn.plan(model, "fold").decisions if d.action == "kept"]
    assert all("is also read by" in d.reason for d in kept)
    assert all("is an activation, which a shift cannot pass" in d.reason for d in kept)


def test_every_model_is_tested():
    assert set(EXPECTED) == set(MODELS)

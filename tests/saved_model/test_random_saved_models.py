"""Random models through SavedModels, as functions without the Keras code that made them."""

import pytest

from tests.support.checks import check_saved_rewrites
from tests.support.random_models import random_model
from tests.support.thorough import thorough_but_for

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("seed", thorough_but_for(range(24), range(10)))
def test_random_saved_model(seed, tmp_path):
    case = random_model(seed)
    plans = check_saved_rewrites(case.model, case.inputs, tmp_path, ("fold", "depthwise"))
    if plans:
        assert plans["depthwise"].left == 0

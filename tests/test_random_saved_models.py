"""Random models through SavedModels, as functions without the Keras code that made them."""

import pytest

from tests.checks import check_saved_rewrites
from tests.random_models import random_model


@pytest.mark.parametrize("seed", range(40))
def test_random_saved_model(seed, tmp_path):
    case = random_model(seed)
    plans = check_saved_rewrites(case.model, case.inputs, tmp_path, ("fold", "depthwise"))
    if plans:
        assert plans["depthwise"].left == 0

"""Random models through SavedModels, as functions without the Keras code that made them."""

import pytest

from tests.checks import check_saved_rewrite
from tests.random_models import random_model


@pytest.mark.parametrize("mode", ["fold", "depthwise"])
@pytest.mark.parametrize("seed", range(40))
def test_random_saved_model(seed, mode, tmp_path):
    case = random_model(seed)
    plan = check_saved_rewrite(case.model, case.inputs, tmp_path, mode)
    if plan is not None and mode == "depthwise":
        assert plan.left == 0

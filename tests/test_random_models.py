"""Random models against their rewrites, in both modes. `make fuzz` goes on with this."""

import pytest

from tests.checks import check_rewrite
from tests.random_models import random_model


@pytest.mark.parametrize("seed", range(240))
def test_random_model(seed):
    case = random_model(seed)
    for mode in ("fold", "depthwise"):
        check_rewrite(case.model, case.inputs, mode, compiled=case.needs_xla)

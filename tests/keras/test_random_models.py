"""Random models against their rewrites, in both modes. `make fuzz` goes on with this."""

import pytest

from tests.support import kerases
from tests.support.checks import check_rewrites
from tests.support.random_models import random_model
from tests.support.thorough import thorough_but_for

pytestmark = pytest.mark.slow


def check(seed):
    case = random_model(seed)
    check_rewrites(case.model, case.inputs, ("fold", "depthwise"), compiled=case.needs_xla)


@pytest.mark.parametrize("seed", thorough_but_for(range(120), range(50)))
def test_random_model(seed):
    check(seed)


@pytest.fixture
def _keras_3():
    kerases.use("keras")
    yield
    kerases.use("tf_keras")


@pytest.mark.usefixtures("_keras_3")
@pytest.mark.parametrize("seed", thorough_but_for(range(1000, 1030), range(1000, 1020)))
def test_random_keras_3_model(seed):
    check(seed)

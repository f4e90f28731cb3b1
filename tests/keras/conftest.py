"""Fixtures of tests of Keras models."""

import pytest

from tests.support.holders import holders


@pytest.fixture
def own(each_keras):
    """Classes of holders of one Keras; see `support.holders`."""
    return holders(each_keras.__name__)

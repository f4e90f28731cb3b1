"""Parameters of tests that are thorough: `make test` leaves them out, `make thorough` runs them."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def thorough_but_for(values: Iterable[Any], others: Collection[Any]) -> list[Any]:
    """Values as parameters of a test, which is thorough with all but some of them."""
    return [
        value if value in others else pytest.param(value, marks=pytest.mark.thorough)
        for value in values
    ]

"""Errors of int8 in LiteRT, of rewritten models beside their originals.

Networks have random weights, and statistics of the images that they are calibrated with.
"""

import pytest

from benchmarks.deployment import forms, models
from benchmarks.peer_tools.work import Work

pytestmark = pytest.mark.slow
pytest.importorskip(
    "ai_edge_litert", reason="ai-edge-litert is not installed: pip install '.[deploy]'"
)

GAIN, NO_LOSS = 0.9, 1.02  # of the original's error


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A function that gives a network's files, which are made once."""
    known = {}

    def of(name):
        if name not in known:
            known[name] = Work(tmp_path_factory.mktemp("network"))
            models.write(name, known[name], None, calibrating=64, testing=32)
        return known[name]

    return of


@pytest.mark.parametrize("form", forms.INT8)
def test_what_stays_for_its_shift_only_adds(form, written):
    work = written("Conv-ReLU-BN padded")
    before, after = (forms.examined(form, v, work, 1) for v in ("original", "equalize"))
    assert (before["mul"], before["add"]) == (4, 4)
    assert (after["mul"], after["add"]) == (0, 3)
    assert after["error"] <= GAIN * before["error"]


@pytest.mark.parametrize("form", forms.INT8)
def test_uneven_channels_are_equalised(form, written):
    work = written("MobileNetV2-like")
    plain, equalised = (forms.examined(form, v, work, 1) for v in ("fold", "equalize"))
    assert equalised["error"] <= 0.5 * plain["error"]
    original = forms.examined(form, "original", work, 1)
    assert equalised["error"] <= NO_LOSS * original["error"]

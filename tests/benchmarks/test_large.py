"""The models of unusual size in benchmarks/saved_model.py, made small."""

import pytest

import mbn_rewrite as mbn
from benchmarks.models import large

pytestmark = pytest.mark.slow


def test_all_of_a_chain_folds(tmp_path, monkeypatch):
    monkeypatch.setitem(large.LARGE, "small", lambda: large.Chain((3, 4, 4, 4, 2), 5))
    large.write("small", str(tmp_path / "in"))
    report = mbn.rewrite_saved_model(tmp_path / "in", tmp_path / "out", "fold")
    assert report.ok
    assert (len(report.plan.decisions), report.plan.left) == (4, 0)

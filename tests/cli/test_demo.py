"""The demo, on a small model in place of one that is fetched."""

import re

import pytest
import tf_keras

from tools import demo


@pytest.mark.slow
def test_demo_shows_decisions_verification_and_latency(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "TIMING", 0.1)
    layers = [
        tf_keras.layers.Input((6, 6, 2)),
        tf_keras.layers.Conv2D(3, 3),
        tf_keras.layers.BatchNormalization(),
        tf_keras.layers.ReLU(),
    ]
    tf_keras.Sequential(layers).save(tmp_path / "small.h5")
    (tmp_path / "out").mkdir()
    demo.show(tmp_path / "small.h5", tmp_path / "out", -1.0, 1.0)
    printed = capsys.readouterr()
    assert "mode fold: 1 BatchNormalization: 1 folded" in printed.out
    assert "mode depthwise: 1 BatchNormalization: 1 depthwise" in printed.out
    assert printed.out.count("equal within tolerance") == 2
    assert re.search(r"^ depthwise +[\d.]+ .* [\d.]+ +[\d.]+-[\d.]+$", printed.out, re.MULTILINE)
    assert re.search(r"^\[ *\d+ s\] measuring", printed.err, re.MULTILINE)


@pytest.mark.parametrize("name", ["nothing", ""])
def test_unknown_model_lists_the_models(name, capsys):
    assert demo.main([name]) == 1
    assert "there are fer, " in capsys.readouterr().err

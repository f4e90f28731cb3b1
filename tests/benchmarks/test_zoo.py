"""The zoo: what a row says of a network, and of one that cannot be built."""

import keras
import pytest

from benchmarks.models import zoo_rows as zoo
from mbn_rewrite.errors import RewriteError


class Block(keras.layers.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.conv = keras.layers.Conv2D(4, 3)
        self.norm = keras.layers.BatchNormalization()

    def call(self, x):
        return self.norm(self.conv(x))

    def get_config(self):
        return super().get_config()


def network():
    x = keras.Input((8, 8, 3))
    return keras.Model(x, keras.layers.BatchNormalization()(keras.layers.ReLU()(Block()(x))))


def test_a_row_says_what_is_left_and_how_long_it_takes():
    row = zoo.measured(network)
    assert (row["norms"], row["left"]) == (2, 1)
    assert row["error"] <= zoo.TOLERANCE
    assert row["tracing"] > 0
    assert row["copies"] > 0
    (reason,) = row["reasons"]
    assert zoo.cells("package", "network", row)[-1] == reason
    assert zoo.is_right(row)


def test_a_network_that_cannot_be_built_is_named_with_its_error():
    def build():
        raise ValueError("no name for a block")

    row = zoo.measured(build)
    assert "no name for a block" in zoo.cells("package", "network", row)[-1]
    assert zoo.is_right(row)


@pytest.mark.parametrize("error", [RewriteError("refused"), ValueError("odd")])
def test_a_network_that_is_not_converted_is_wrong(error, monkeypatch):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr(zoo.mbn, "convert", fails)
    row = zoo.measured(network)
    assert not zoo.is_right(row)
    assert zoo.cells("package", "network", row)[-1].startswith("WRONG")


def test_other_outputs_are_wrong(monkeypatch):
    def wrong(model, **_):
        new = network()
        new.layers[-1].set_weights([2 * w for w in model.layers[-1].get_weights()])
        return new

    monkeypatch.setattr(zoo.mbn, "convert", wrong)
    assert not zoo.is_right(zoo.measured(network))


def test_what_cannot_be_exported_is_named(monkeypatch):
    def fails(*_):
        raise ValueError("no such export")

    model = network()
    monkeypatch.setattr(type(model), "export", fails)
    row = {"norms": 2, "left": 0, "error": 0.0, "reasons": {}, **zoo.of_saved_model(model)}
    assert "no such export" in zoo.cells("package", "network", row)[-1]
    assert zoo.is_right(row)

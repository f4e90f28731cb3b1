"""A small network as SavedModel, before and after, for the recipes of docs/guide/deploy.md."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import keras
import numpy as np
import pytest

import mbn_rewrite as mbn
from mbn_rewrite.comparison import compare_outputs, tolerance_for


@dataclass(frozen=True)
class Deployed:
    """The folder with `saved_model` and `served`, images, and what the original gives for them."""

    folder: Path
    images: np.ndarray
    expected: np.ndarray

    def check(self, outputs, tolerance=tolerance_for({"float32"})):  # noqa: B008 - a number
        comparison = compare_outputs([self.expected], [np.asarray(outputs)], tolerance)
        assert comparison.ok, comparison


def images_of(count):
    return np.random.default_rng(1).normal(size=(count, 12, 12, 3)).astype("float32")


def network():
    """Pre-activation blocks, with the statistics that their inputs have."""
    keras.utils.set_random_seed(0)
    layers = keras.layers
    image = keras.Input((12, 12, 3), name="image")

    def conv(x):
        return layers.Conv2D(8, 3, padding="same", use_bias=False)(x)

    def activated(x):
        return layers.ReLU()(layers.BatchNormalization()(x))

    x = conv(image)
    for _ in range(2):
        x = layers.Add()([x, conv(activated(conv(activated(x))))])
    x = layers.GlobalAveragePooling2D()(activated(x))
    model = keras.Model(image, layers.Dense(5)(x))
    rng = np.random.default_rng(0)
    for layer in model.layers:
        if isinstance(layer, layers.BatchNormalization):
            reads = np.asarray(keras.Model(image, layer.input)(images_of(64)))
            mean, variance = reads.mean((0, 1, 2)), reads.var((0, 1, 2))
            layer.set_weights([rng.uniform(0.5, 1.5, 8), 0.1 * rng.normal(size=8), mean, variance])
    return model


@pytest.fixture(scope="session")
def deployed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deployed")
    model = network()
    model.export(folder / "saved_model", verbose=False)
    report = mbn.rewrite_saved_model(folder / "saved_model", folder / "served", mode="fold")
    assert report.ok
    assert report.plan.left == 0
    images = images_of(64)
    return Deployed(folder, images, np.asarray(model(images, training=False)))


@pytest.fixture
def here(deployed, tmp_path, monkeypatch):
    """A folder of one's own with `saved_model` and `served`, as the page's commands expect."""
    for name in ("saved_model", "served"):
        (tmp_path / name).symlink_to(deployed.folder / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def on_path(monkeypatch):
    """Commands of this Python's environment are found by their names, as those of the page are."""
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")

"""Files that a former release wrote, see tests/data/write.py: they load, and compute the same."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mbn_rewrite as mbn

pytestmark = pytest.mark.slow

DATA = Path(__file__).parents[1] / "data" / "0.1.0"

# Loads the files of both Kerases, with no layer of ours imported by name.
LOAD = """
import importlib, sys
import numpy as np

for package in sys.argv[2:]:
    importlib.import_module(package)
kept = np.load(f"{sys.argv[1]}/outputs.npz")
for package in ("keras", "tf_keras"):
    for kind in ("keras", "h5"):
        path = f"{sys.argv[1]}/{package}.{kind}"
        model = importlib.import_module(package).models.load_model(path, compile=False)
        np.testing.assert_allclose(model(kept["inputs"]), kept[package], rtol=1e-5, err_msg=path)
"""


@pytest.mark.parametrize(
    "order",
    [("tf_keras", "mbn_rewrite"), ("mbn_rewrite", "keras", "mbn_rewrite.tf_keras_frontend.layers")],
    ids=["tf_keras_first", "mbn_rewrite_first"],
)
def test_models_load_in_whatever_order_packages_are_imported(order):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LOAD, DATA, *order],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


CLASSES = {
    "layers": ("ScaleAndShift", "ChannelClip", "BorderedConvolution", "BiasedConvolution"),
    "training_layers": ("StridedBatchNormalization", "ModifiedBatchNormalization"),
}
NEW_HOMES = {"layers": "inference_layers", "training_layers": "training_layers"}
FRONT_ENDS = {"tf_keras_frontend": "tf_keras", "keras_frontend": "keras3"}


@pytest.mark.parametrize("old", FRONT_ENDS)
@pytest.mark.parametrize("kind", CLASSES)
def test_old_paths_give_the_same_classes(kind, old):
    there = importlib.import_module(f"mbn_rewrite.{old}.{kind}")
    here = importlib.import_module(f"mbn_rewrite.frontends.{FRONT_ENDS[old]}.{NEW_HOMES[kind]}")
    names = [name for name in CLASSES[kind] if hasattr(here, name)]
    assert len(names) >= 2
    for name in names:
        assert getattr(there, name) is getattr(here, name)


def shape_of(value):
    """The fields of JSON, without what they hold."""
    if isinstance(value, dict):
        return {key: shape_of(item) for key, item in value.items()}
    return [shape_of(item) for item in value] if isinstance(value, list) else None


def holds(new, old):
    """Whether all fields of one shape are in another."""
    if isinstance(old, dict):
        return all(key in new and holds(new[key], item) for key, item in old.items())
    if isinstance(old, list):
        return all(map(holds, new, old))
    return True


def test_reports_have_the_fields_that_they_had(tmp_path):
    shutil.copy(DATA / "keras.keras", tmp_path / "keras.keras")
    old = json.loads((DATA / "report.json").read_text())
    new = mbn.rewrite_saved_model(tmp_path / "keras.keras", tmp_path / "out", "fold").to_dict()
    assert holds(shape_of(new), shape_of(old))
    for same in ("decisions", "counts", "summary", "edits"):
        assert new["plan"][same] == old["plan"][same]
    for same in ("weights", "bytes"):
        assert new["before"][same] == old["before"][same]
    assert not holds(shape_of(new), {"plan": {"no such field": None}})

#!/usr/bin/env python3
"""BatchNormalization left in the networks of other packages, most of them of composite layers.

    python benchmarks/zoo.py [FLAGS]

Networks of keras-hub, kimm, keras_cv_attention_models and segmentation_models are built small, with
random weights and BatchNormalization statistics, and converted in mode fold. Packages that are not
installed are skipped (pip install '.[zoo]'). The columns:

    BN          BatchNormalizations of the network
    left        after convert(model, mode="fold")
    saved       likewise of its SavedModel, after rewrite_saved_model (with --saved_model); "-" if
                none can be written
    error       largest difference from the original's outputs, relative to the largest of them
    copies      time of convert without its check, in times of keras.models.clone_model with a copy
                of the weights; "-" where Keras cannot clone the network
    tracing     time of tracing alone, which is part of convert, likewise
    note        the commonest reason of what stays, or what failed

Examples:
    python benchmarks/zoo.py
    python benchmarks/zoo.py --packages=keras_hub --saved_model --json=zoo.json
    python benchmarks/zoo.py --models=HGNetV2,RepVGGA0

Exit codes:
    0  every network that could be built was converted, and gave the original's outputs
    1  one was not, or did not
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

# The repository's own package comes first, so that the tool runs without installation.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")
if "tensorflow" not in sys.modules:  # which looks at it once
    os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")  # what keras_cv_attention_models needs

import keras
import tf_keras
from absl import app, flags

from benchmarks.common import results
from benchmarks.common.console import progress
from benchmarks.common.flags import check_known, check_usage
from benchmarks.models.zoo_rows import cells, is_right, measured
from benchmarks.models.zoos import ZOOS
from mbn_rewrite.tables import table

FLAGS = flags.FLAGS
flags.DEFINE_list("packages", list(ZOOS), "Packages whose networks are tried.")
flags.DEFINE_list("models", [], "Networks to try, by name; all by default.")
flags.DEFINE_bool("saved_model", False, "Rewrite each network's SavedModel, too.")
flags.DEFINE_string("json", None, "Write the results to this file, as JSON.")


def main(arguments: list[str]) -> int:
    check_usage(arguments[1:], FLAGS.json)
    try:
        check_known("package", FLAGS.packages, list(ZOOS))
        check_known("network", FLAGS.models, [name for zoo in ZOOS.values() for name in zoo])
    except ValueError as error:
        raise app.UsageError(str(error)) from error
    found: dict[str, dict[str, Any]] = {}
    for package in FLAGS.packages:
        for name, build in ZOOS[package].items():
            if not FLAGS.models or name in FLAGS.models:
                progress(f"{package}, {name} ...")
                found.setdefault(package, {})[name] = measured(build, FLAGS.saved_model)
                results.keep(FLAGS.json, found)
                keras.backend.clear_session()
                tf_keras.backend.clear_session()
    rows = [
        cells(package, name, row) for package, zoo in found.items() for name, row in zoo.items()
    ]
    titles = ["package", "network", "BN", "left", "saved", "error", "copies", "tracing", "note"]
    print(table(titles, rows, width=200))
    return int(not all(is_right(row) for zoo in found.values() for row in zoo.values()))


if __name__ == "__main__":
    app.run(main)

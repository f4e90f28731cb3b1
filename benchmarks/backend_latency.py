#!/usr/bin/env python3
"""Latency of networks of Keras 3 on each of its backends, as they were and rewritten, in turn.

    KERAS_BACKEND=jax python benchmarks/backend_latency.py [FLAGS]
    KERAS_BACKEND=torch python benchmarks/backend_latency.py [FLAGS]

Each network of `keras.applications` runs compiled as a whole on jax (`jax.jit`), as one tf.function
on tensorflow, and operation by operation on torch. On tensorflow, latency.py says more. Weights are
random; statistics are those of random images, by a call in training. Images lie on the device, and
a call is timed until its outputs are there. Variants:

    original    the model as it is; always there
    fold, depthwise    rewritten in that mode; on jax and torch, "auto" measures
                uncompiled calls, so it is not here
    floor       the network without any BatchNormalization, as in latency.py

Before they are timed, the outputs of all variants but the floor are compared with the original's,
as they are timed; what is wrong is not timed. The tolerance is that of the dtype. GPUs may round
float32 factors to as few bits as float16 has, so there it is that of float16. In narrow dtypes it
is three times the original's own distance from itself in float32 if that is more.

Columns are those of latency.py.

Examples:
    KERAS_BACKEND=jax python benchmarks/backend_latency.py --models=MobileNetV2 --batch_sizes=1
    KERAS_BACKEND=torch python benchmarks/backend_latency.py --device=GPU --dtype=mixed_bfloat16

Exit codes:
    0  every row was measured, whatever it shows
    1  a row gave wrong outputs, ran out of memory or failed otherwise; the program was interrupted
       (what is finished is printed and kept); or a flag is wrong
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

# The repository's own package comes first, so that the program runs without installation.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from absl import app, flags

from benchmarks.training.backends import in_use

try:
    in_use()  # before Keras, so that it finds the backend chosen
except ValueError as error:
    sys.exit(f"error: {error}")

import keras
import numpy as np

import mbn_rewrite as mbn
from benchmarks.common import results
from benchmarks.common.console import progress
from benchmarks.common.failures import noted
from benchmarks.common.flags import (
    check_batch_sizes,
    check_known,
    check_no_arguments,
    check_outputs,
)
from benchmarks.common.latencies import Row, latency_table, measured
from benchmarks.models import applications
from benchmarks.models.floor import without_batch_norm
from benchmarks.models.own_networks import OWN_NETWORKS
from mbn_rewrite.comparison import compare_outputs, rounding_tolerance, tolerance_for

MODELS = ("ResNet50", "MobileNetV2", "DenseNet121", "EfficientNetB0")
MODES = ("fold", "depthwise")
VARIANTS = ("original", *MODES, "floor")
DTYPES = ("float32", "mixed_float16", "mixed_bfloat16")
_STATISTICS_BATCH = 8

FLAGS = flags.FLAGS
flags.DEFINE_list("models", list(MODELS), "Networks of `keras.applications`.")
flags.DEFINE_list("variants", list(VARIANTS), f"Of {', '.join(VARIANTS)}.")
flags.DEFINE_list("batch_sizes", ["1", "8"], "Examples in a call.")
flags.DEFINE_string("dtype", "float32", f"The dtype policy: {', '.join(DTYPES)}.")
flags.DEFINE_string("device", None, "CPU or GPU. By default a GPU if there is one.")
flags.DEFINE_integer("size", None, "Pixels of images, if not those of the network.", lower_bound=32)
flags.DEFINE_integer("repeats", 30, "Timed calls of each variant, at least.", lower_bound=1)
flags.DEFINE_float(
    "seconds", 4.0, "Short calls are repeated for so long, up to 200 times.", lower_bound=0.0
)
flags.DEFINE_string("json", None, "Write the results to this file, row by row.")


# ---------------------------------------------------------------------------------- models


class Network:
    """A network with its variants, each made when it is first asked for.

    Attributes:
        wide: in float32.
        original: in the dtype policy that is asked for.
    """

    def __init__(self, name: str) -> None:
        self.wide = wide_network(name)
        self.original = self.wide
        if FLAGS.dtype != "float32":
            keras.mixed_precision.set_dtype_policy(FLAGS.dtype)
            try:
                self.original = applications.build(keras, name, 0, FLAGS.size)
            finally:
                keras.mixed_precision.set_dtype_policy("float32")
            self.original.set_weights(self.wide.get_weights())

    @cache  # noqa: B019 - both are gone with the network
    def varied(self, variant: str) -> tuple[Any, int]:
        """A variant, and how many BatchNormalizations are left in it."""
        if variant == "original":
            return self.original, len(norms_of(self.original))
        if variant == "floor":
            return without_batch_norm(self.original), 0
        # It is compared as it is timed; without a compiler that would take far longer.
        new, plan = mbn.convert_with_plan(self.original, variant, check=False)
        return new, plan.left


def wide_network(name: str) -> Any:
    """A network in float32 with random weights, and statistics that suit its activations."""
    model = applications.build(keras, name, 0, FLAGS.size)
    rng = np.random.default_rng(0)
    norms = norms_of(model)
    momentum = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0  # so that statistics become those of the batch
        if norm.scale:
            norm.gamma.assign(rng.uniform(0.5, 1.5, norm.gamma.shape))
        if norm.center:
            norm.beta.assign(0.1 * rng.standard_normal(norm.beta.shape))
    in_use().train_statistics(model, images_for(model, _STATISTICS_BATCH, rng))
    for norm, value in zip(norms, momentum, strict=True):
        norm.momentum = value
    return model


def norms_of(model: Any) -> list[Any]:
    """The BatchNormalization layers of a network."""
    return [one for one in model.layers if isinstance(one, keras.layers.BatchNormalization)]


def images_for(model: Any, count: int, rng: np.random.Generator) -> Any:
    """Images of random patches, in the range of pixels, on the device."""
    patches = applications.patches(model.input_shape[1:], rng, count)
    return in_use().tensor(np.clip(127.5 + 60 * patches, 0, 255), "float32")


# ------------------------------------------------------------------------------ the program


def rows(device: str) -> Iterator[Row]:
    """A row for each model and batch size, as it is measured."""
    for name in FLAGS.models:
        network: Network | None = None
        for batch in map(int, FLAGS.batch_sizes):
            variants: dict[str, Row] = {}
            with noted(variants, "original"), in_use().on(device):
                progress(f"{name}, batch {batch} ...")
                network = network or Network(name)
                calls = compared(network, batch, device, variants)
                measured(calls, variants, FLAGS.seconds, FLAGS.repeats)
            row = {"model": name, "keras": "keras_3", "batch": batch, "dtype": FLAGS.dtype}
            yield row | {"variants": variants}
        keras.backend.clear_session()


def compared(
    network: Network, batch: int, device: str, known: dict[str, Row]
) -> dict[str, Callable[[], object]]:
    """Calls of the variants that gave the original's outputs; notes what is known of each."""
    images = images_for(network.wide, batch, np.random.default_rng(1))
    calls: dict[str, Callable[[], object]] = {}
    expected: list[np.ndarray] = []
    for variant in FLAGS.variants:
        with noted(known, variant):
            model, left = network.varied(variant)
            known[variant] = {"left": left}
            call = in_use().inference(model, images)
            outputs = outputs_of(call)
            if variant == "original":
                expected, tolerance = outputs, tolerance_of(network, images, outputs, device)
            elif variant != "floor":
                comparison = compare_outputs(expected, outputs, tolerance)
                known[variant]["error"] = comparison.max_rel_error
                if not comparison.ok:
                    known[variant]["note"] = f"WRONG (tolerance {tolerance:.0e})"
                    continue
            calls[variant] = partial(finished, call)
    return calls


def tolerance_of(network: Network, images: Any, outputs: list[np.ndarray], device: str) -> float:
    """The tolerance for rounding of an original that gives these outputs."""
    tolerance = tolerance_for({FLAGS.dtype.removeprefix("mixed_")})
    if FLAGS.dtype == "float32":
        return max(tolerance, tolerance_for({"float16"})) if device == "GPU" else tolerance
    exact = outputs_of(in_use().inference(network.wide, images))
    return rounding_tolerance(exact, outputs, tolerance)


def outputs_of(call: Callable[[], Any]) -> list[np.ndarray]:
    return [np.asarray(in_use().array(call()), np.float32)]


def finished(call: Callable[[], Any]) -> None:
    """Calls, and waits for the outputs."""
    in_use().synchronize(call())


def check_flags(arguments: list[str]) -> None:
    """Raises ValueError for what is not known, before anything long starts."""
    check_no_arguments(arguments)
    check_known("variant", FLAGS.variants, VARIANTS)
    check_known("dtype", [FLAGS.dtype], DTYPES)
    for name in FLAGS.models:
        if name not in OWN_NETWORKS and not hasattr(keras.applications, name):
            raise ValueError(f"--models: unknown network '{name}'; some are {', '.join(MODELS)}")
    FLAGS.variants = list(dict.fromkeys(["original", *FLAGS.variants]))  # others are compared to it
    check_batch_sizes(FLAGS.batch_sizes)
    check_outputs(FLAGS.json)


def main(argv: list[str]) -> int:
    try:
        check_flags(argv[1:])
        device = in_use().chosen(FLAGS.device)
    except ValueError as error:
        progress(f"error: {error}")
        return 1
    name = in_use().name_of(device)
    if device == "CPU" and FLAGS.device is None:
        progress(f"no GPU: running on the CPU, {name}")
    about = {"device": name, "backend": in_use().name} | in_use().versions()
    done: list[Row] = []
    interrupted = False
    try:
        for row in rows(device):
            done.append(row)
            results.keep(FLAGS.json, about | {"rows": done})
    except KeyboardInterrupt:
        interrupted = True
        progress("interrupted: what is finished follows")
    versions = ", ".join(f"{key} {value}" for key, value in in_use().versions().items())
    print(latency_table(done, f"Latency on {name}, {FLAGS.dtype}, {versions}"))
    failed = any("note" in facts for row in done for facts in row["variants"].values())
    return int(interrupted or failed)


if __name__ == "__main__":
    app.run(main)

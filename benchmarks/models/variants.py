"""A model as it was, rewritten, and without BatchNormalization, ready to be called and compared."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
import tf_keras
from absl import flags
from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

import mbn_rewrite as mbn
from benchmarks.common.failures import noted
from benchmarks.models import networks
from benchmarks.models.floor import without_batch_norm
from benchmarks.models.signatures import made_up, signature_of
from mbn_rewrite.api import convert_with_plan
from mbn_rewrite.comparison import compare_outputs, rounding_tolerance, tolerance_for
from mbn_rewrite.frontends.execution import runner
from mbn_rewrite.options import RunConfig

FLAGS = flags.FLAGS  # those of the program, latency.py

KERAS = {"tf_keras": tf_keras, "keras_3": keras}
MODES = ("fold", "depthwise", "auto")
FROZEN = "frozen"  # folded, with constants for weights
Variant = dict[str, Any]  # what a row says of a variant
Calls = dict[str, Callable[[], object]]


@cache
def wide_network(name: str, size: int | None, statistics: str = "typical") -> Any:
    """A network of tf_keras in float32, with statistics of a kind of `networks.STATISTICS`.

    Args:
        name: as `networks.build` knows it.
        size: pixels of images, or None for those of the network.
        statistics: "typical" or "hard".
    """
    model = networks.build(name, 0, size)
    networks.set_statistics(model, networks.STATISTICS[statistics], np.random.default_rng(0))
    return model


@cache
def network(
    name: str, keras_name: str, dtype: str, size: int | None, statistics: str = "typical"
) -> Any:
    """The same network, of any Keras, in a dtype policy."""
    model = wide_network(name, size, statistics)
    package = KERAS[keras_name]
    if package is tf_keras and dtype == "float32":
        return model
    package.mixed_precision.set_global_policy(dtype)
    try:
        other = networks.build(name, 0, size, package)
    finally:
        package.mixed_precision.set_global_policy("float32")
    other.set_weights(model.get_weights())
    return other


def of_network(model: Any, wide: Any, batch: int) -> tuple[Calls, dict[str, Variant]]:
    """Calls of each variant of a network, and what is known of them before they are timed.

    Args:
        model: the network.
        wide: the same in float32.
        batch: how many examples.
    """
    images = networks.random_images(wide, np.random.default_rng(1), batch)
    images = tf.cast(images, tf.as_dtype(model.inputs[0].dtype))
    run_config = RunConfig(batch, FLAGS.xla)
    calls: Calls = {}
    known: dict[str, Variant] = {}
    expected: Any = None
    tolerance = 0.0
    for variant in FLAGS.variants:
        with noted(known, variant):
            new, facts = _varied(model, variant, run_config)
            known[variant] = facts
            call = runner(function_of(new, images, variant), images, run_config)
            outputs = call()
            if variant in (*MODES, FROZEN):
                comparison = mbn.verify(model, new, inputs=images, tolerance=tolerance)
                facts["error"] = comparison.max_rel_error
                timed = compare_outputs(expected, outputs, _as_timed(tolerance))
                if not (comparison.ok and timed.ok):
                    facts["note"] = f"WRONG (tolerance {tolerance:.0e})"
            if variant == "original":
                expected, tolerance = outputs, _tolerance(wide, images, outputs)
            if "note" not in facts:
                calls[variant] = call
    return calls, known


def function_of(model: Any, images: Any, variant: str) -> Callable[[Any], Any]:
    """A function of images that calls a model at inference."""
    if variant != FROZEN:
        return lambda data: model(data, training=False)
    traced = tf.function(lambda data: model(data, training=False), autograph=False)
    return convert_variables_to_constants_v2(traced.get_concrete_function(images))


def _tolerance(wide: Any, images: Any, outputs: Any) -> float:
    """Tolerance for rounding.

    In narrow dtypes the original itself is far from what it is in float32, and a rewritten model
    may be as far to another side.
    """
    dtype = FLAGS.dtype.removeprefix("mixed_")
    tolerance = tolerance_for({dtype})
    if dtype == "float32":
        return tolerance
    exact = [wide(tf.cast(images, tf.float32), training=False).numpy()]
    return rounding_tolerance(exact, outputs, tolerance)


def _as_timed(tolerance: float) -> float:
    """The tolerance for what is timed: GPUs may round float32 factors to as few bits as float16."""
    rounded = FLAGS.tf32 and bool(tf.config.get_visible_devices("GPU"))
    return max(tolerance, tolerance_for({"float16"})) if rounded else tolerance


def _varied(model: Any, variant: str, run_config: RunConfig) -> tuple[Any, Variant]:
    if variant == "original":
        return model, {"left": len(mbn.plan(model, "fold").decisions)}
    if variant == "floor":
        return without_batch_norm(model), {"left": 0}
    mode = "fold" if variant == FROZEN else variant
    new, plan = convert_with_plan(model, mode, **_measuring(mode, run_config))
    return new, _planned(plan)


def _measuring(variant: str, run_config: RunConfig) -> dict[str, Any]:
    """Arguments of a mode that say how the model is run."""
    if variant != "auto":
        return {}
    return {
        "batch_size": run_config.batch_size,
        "jit_compile": run_config.jit_compile,
        "budget": FLAGS.budget,
    }


def _planned(plan: Any) -> Variant:
    facts: Variant = {"left": plan.left}
    if plan.mode == "auto":
        facts["form"] = plan.measurement.chosen if plan.measurement else "all folded"
    return facts


def on_disk(path: str, batch: int, work: str) -> tuple[Calls, dict[str, Variant]]:
    """As `of_network`, for the served signature of a model on disk."""
    run_config = RunConfig(batch, FLAGS.xla)
    calls: Calls = {}
    known: dict[str, Variant] = {}
    inputs: dict[str, Any] = {}
    for variant in FLAGS.variants:
        if variant == "floor":
            known[variant] = {"note": "no floor of a model on disk"}
            continue
        with noted(known, variant):
            place, known[variant] = _written(path, variant, f"{work}/{variant}-{batch}", run_config)
            owner = tf.saved_model.load(place)
            serve = signature_of(owner)
            inputs = inputs or _made_up(serve, batch)

            def call(data: Any, owner: Any = owner, serve: Any = serve) -> Any:
                return serve(**data)  # the owner is kept with it: it holds the variables

            run = runner(call, inputs, run_config)
            run()
            calls[variant] = run
    return calls, known


def _written(path: str, variant: str, place: str, run_config: RunConfig) -> tuple[str, Variant]:
    """Path of the SavedModel of a variant, and what is known of it."""
    if variant == "original":
        if Path(path).is_dir():
            return path, {}
        _as_saved_model(path, place)  # a file of Keras, so that all run alike
        return place, {}
    mode, freeze = ("fold", True) if variant == FROZEN else (variant, False)
    how = _measuring(mode, run_config)
    report = mbn.rewrite_saved_model(path, place, mode, freeze=freeze, **how)
    errors = (comparison.max_rel_error for comparison in report.comparisons.values())
    return place, _planned(report.plan) | {"error": max(errors, default=None)}


def _as_saved_model(path: str, place: str) -> None:
    from mbn_rewrite.frontends.keras_common.files import package_of

    if package_of(Path(path)) == "keras":
        keras.models.load_model(path, compile=False).export(place, verbose=False)
    else:
        tf_keras.models.load_model(path, compile=False).save(place, save_format="tf")


def _made_up(serve: Any, batch: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    specs = serve.structured_input_signature[1]
    return {name: tf.constant(made_up(spec, batch, rng)) for name, spec in specs.items()}

#!/usr/bin/env python3
"""BatchNormalization left in well-known networks, and how exact the rewritten ones are.

    python benchmarks/coverage.py [FLAGS]

Every model is converted in both modes; what is left is counted in the new model, and its
outputs are compared with the original's. Trained models of others (tools/real_models.py)
are compared on two kinds of inputs:

    normal      normally distributed
    real        in the range, or of the form, that the model is trained to read

The networks of tf_keras.applications have random weights, and two sets of random
BatchNormalization statistics:

    typical     gamma in [0.5, 1.5], mean and variance near those of the activations
    hard        gamma of both signs or 0, some variances 0 or 1e-36

A softmax at the end is taken off before anything is compared: it would bring the outputs
together whatever went wrong before it.

The column "spread" is the largest difference between outputs for different examples,
relative to the largest output: an error far below it was not hidden by outputs that are
the same whatever the input.

Examples:
    python benchmarks/coverage.py
    python benchmarks/coverage.py --models=fer,ResNet50 --json=coverage.json
    python benchmarks/coverage.py --models=NASNetMobile --image_size=96 --seed=7

Exit codes:
    0  every rewritten model gave the original's outputs
    1  one did not, or something failed
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# The repository's own package comes first, so that the tool runs without installation.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import real_models
import tensorflow as tf
import tf_keras
from absl import app, flags

import mbn_rewrite as mbn
from mbn_rewrite.comparison import Comparison
from mbn_rewrite.report import table

APPLICATIONS = (
    "ResNet50",
    "MobileNet",
    "MobileNetV2",
    "MobileNetV3Small",
    "InceptionV3",
    "InceptionResNetV2",
    "EfficientNetB0",
    "EfficientNetV2B0",
    "Xception",
    "NASNetMobile",
    "ResNet50V2",
    "DenseNet121",
)
NAMES = (*real_models.MODELS, *APPLICATIONS)
MODES = ("fold", "depthwise")

_BATCH = 2
# Images that statistics are drawn from. Late layers see few positions of each: with less to
# go by, channels that hardly vary in these images are amplified in others.
_STATISTICS_BATCH = 8
# What stands for a length that a model leaves open: spliceai crops 5000 from either end.
_OPEN_LENGTH = 10_100
# Networks not named here are 224 x 224 by default.
_DEFAULT_SIZE = {"InceptionV3": 299, "InceptionResNetV2": 299, "Xception": 299}

FLAGS = flags.FLAGS
flags.DEFINE_list("models", list(NAMES), f"Which models, of {', '.join(NAMES)}.")
flags.DEFINE_integer("seed", 0, "Of all random weights, statistics and inputs.", lower_bound=0)
flags.DEFINE_string("json", None, "Write the results to this file, as JSON.")
flags.DEFINE_integer(
    "image_size",
    None,
    "Height and width of the images for the networks of tf_keras.applications. By default "
    "each network's own; 75 is the least that all of them take.",
    lower_bound=32,
)


@dataclass(frozen=True)
class Outcome:
    """A rewritten model beside the original.

    Attributes:
        left: how many BatchNormalizations the new model has.
        comparison: of its outputs with the original's.
        not_finite: how many outputs are NaN or infinite though the original's are not.
    """

    left: int
    comparison: Comparison
    not_finite: int

    @property
    def ok(self) -> bool:
        return self.comparison.ok and self.not_finite == 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"comparison": self.comparison.to_dict(), "ok": self.ok}


@dataclass(frozen=True)
class Row:
    """One model with one set of statistics or inputs, in both modes."""

    model: str
    values: str
    batch_norms: int
    outcomes: dict[str, Outcome]
    spread: float

    @property
    def ok(self) -> bool:
        return all(outcome.ok for outcome in self.outcomes.values())

    def cells(self) -> list[object]:
        results: list[object] = []
        for outcome in self.outcomes.values():
            results += [outcome.left, f"{outcome.comparison.max_rel_error:.1e}"]
        tolerance = max(o.comparison.tolerance for o in self.outcomes.values())
        verdict = "ok" if self.ok else "NOT OK"
        return [
            *(self.model, self.values, self.batch_norms, *results),
            *(f"{self.spread:.1e}", f"{tolerance:.0e}", verdict),
        ]

    def to_dict(self) -> dict[str, Any]:
        outcomes = {mode: outcome.to_dict() for mode, outcome in self.outcomes.items()}
        spread = self.spread if np.isfinite(self.spread) else str(self.spread)  # as JSON knows
        return asdict(self) | {"outcomes": outcomes, "spread": spread, "ok": self.ok}


# ------------------------------------------------------------------------- what is measured


def rows_for(name: str, seed: int, image_size: int | None) -> Iterator[Row]:
    """The rows of one model, which is loaded or built here and dropped at the end."""
    if name in real_models.MODELS:
        model = load(name)
        converted = {mode: mbn.convert(model, mode) for mode in MODES}
        for kind, inputs in real_inputs(name, model, seed).items():
            yield compared(name, kind, model, converted, inputs)
        return
    model = build(name, seed, image_size)
    for kind, statistics in STATISTICS.items():
        rng = np.random.default_rng(seed)
        set_statistics(model, statistics, rng)
        converted = {mode: mbn.convert(model, mode) for mode in MODES}
        yield compared(name, kind, model, converted, random_images(model, rng))


def compared(name: str, values: str, model: Any, converted: dict[str, Any], inputs: Any) -> Row:
    expected = outputs_of(model, inputs)
    outcomes = {
        mode: Outcome(
            left=len(batch_norms(new)),
            comparison=mbn.verify(model, new, inputs),
            not_finite=count_not_finite(expected, outputs_of(new, inputs)),
        )
        for mode, new in converted.items()
    }
    return Row(name, values, len(batch_norms(model)), outcomes, spread_of(expected))


def batch_norms(model: Any) -> list[Any]:
    """The BatchNormalization layers of a model, those of nested models too."""
    layers = model._flatten_layers(include_self=False)
    return [layer for layer in layers if isinstance(layer, tf_keras.layers.BatchNormalization)]


def outputs_of(model: Any, inputs: Any) -> list[np.ndarray]:
    return [np.asarray(output) for output in tf.nest.flatten(model(inputs, training=False))]


def count_not_finite(expected: list[np.ndarray], actual: list[np.ndarray]) -> int:
    pairs = zip(expected, actual, strict=True)
    return sum(int(np.sum(np.isfinite(a) & ~np.isfinite(b))) for a, b in pairs)


def spread_of(outputs: list[np.ndarray]) -> float:
    """See the module; of several outputs the least."""
    return min(float(np.ptp(array, axis=0).max() / np.abs(array).max()) for array in outputs)


# -------------------------------------------------------------------------- trained models


def load(name: str) -> Any:
    """A trained model without the softmax at its end."""
    model = tf_keras.models.load_model(real_models.fetch(name), compile=False)
    last = model.layers[-1]
    if last.activation is tf_keras.activations.softmax:
        last.activation = tf_keras.activations.linear
    return model


def real_inputs(name: str, model: Any, seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    shape = (_BATCH, *(size or _OPEN_LENGTH for size in model.input_shape[1:]))
    real = real_models.MODELS[name]
    if name == "spliceai1":  # DNA: one of four bases at each position
        values = np.eye(4)[rng.integers(0, 4, shape[:-1])]
    else:
        values = rng.uniform(real.low, real.high, shape)
    both = {"normal": rng.standard_normal(shape), "real": values}
    return {kind: tf.constant(values, tf.float32) for kind, values in both.items()}


# ------------------------------------------------------------------- networks to be trained


def build(name: str, seed: int, image_size: int | None) -> Any:
    """A network of tf_keras.applications with random weights, without its softmax."""
    tf_keras.utils.set_random_seed(seed)
    size = image_size or _DEFAULT_SIZE.get(name, 224)
    return getattr(tf_keras.applications, name)(
        include_top=True,
        weights=None,
        input_shape=(size, size, 3),
        classifier_activation=None,
    )


def random_images(model: Any, rng: np.random.Generator, count: int = _BATCH) -> Any:
    """Images of random patches with noise on them, in the range that the model reads.

    With noise alone all examples look alike behind the network's global average.
    """
    _, height, width, channels = model.input_shape
    patches = rng.standard_normal((count, 8, 8, channels))
    images = tf.image.resize(patches, (height, width), "nearest")
    images = np.asarray(images) + 0.5 * rng.standard_normal(images.shape)
    if any(isinstance(layer, tf_keras.layers.Rescaling) for layer in model.layers):
        images = np.clip(127.5 + 60 * images, 0, 255)
    return tf.constant(images, tf.float32)


@dataclass(frozen=True)
class Statistics:
    """The weights of one BatchNormalization, and what suits them before it.

    Attributes:
        gamma, beta, mean, variance: its weights.
        quieter: a factor per channel for the layer's own gamma or, where it has none, for
            the kernel before it.
    """

    gamma: np.ndarray
    beta: np.ndarray
    mean: np.ndarray
    variance: np.ndarray
    quieter: np.ndarray


def typical_statistics(
    mean: np.ndarray, variance: np.ndarray, epsilon: float, rng: np.random.Generator
) -> Statistics:
    """gamma in [0.5, 1.5], beta about 0.1, statistics near those of what comes in.

    Args:
        mean, variance: of the layer's input, per channel. The moving mean is off by about
            0.1 standard deviations, the moving variance by a factor in [0.5, 1.5].
        epsilon: the layer's.
        rng: what to draw from.
    """
    size = len(mean)
    return Statistics(
        gamma=rng.uniform(0.5, 1.5, size),
        beta=0.1 * rng.standard_normal(size),
        mean=mean + 0.1 * np.sqrt(variance) * rng.standard_normal(size),
        variance=variance * rng.uniform(0.5, 1.5, size),
        quieter=np.ones(size),
    )


def hard_statistics(
    mean: np.ndarray, variance: np.ndarray, epsilon: float, rng: np.random.Generator
) -> Statistics:
    """As `typical_statistics`, with what is exact only if it is treated with care.

    Half of all gammas are negative and 5% are 0; 5% of all variances are 0 and 5% 1e-36.
    In trained networks such channels hardly vary. Here they do, and would be amplified by
    up to 1 / sqrt(epsilon) = 300 in every layer after the other, until nothing is finite.
    So their gamma, or the kernel before them, is made smaller by what epsilon amplifies.
    """
    typical, size = typical_statistics(mean, variance, epsilon, rng), len(mean)
    sign = rng.choice([-1.0, 1.0], size) * (rng.random(size) >= 0.05)
    zero, tiny = (rng.random(size) < 0.05 for _ in range(2))
    quieter = np.sqrt(epsilon / (variance + epsilon))
    return Statistics(
        gamma=typical.gamma * sign,
        beta=typical.beta,
        mean=typical.mean,
        variance=np.select([zero, tiny], [0.0, 1e-36], typical.variance),
        quieter=np.where(zero | tiny, quieter, 1.0),
    )


STATISTICS: dict[str, Callable[..., Statistics]] = {
    "typical": typical_statistics,
    "hard": hard_statistics,
}


def set_statistics(
    model: Any, statistics: Callable[..., Statistics], rng: np.random.Generator
) -> None:
    """Gives every BatchNormalization random weights that suit what comes into it.

    Values drawn without regard to the activations let a deep network with random kernels
    explode, or shrink its activations to nothing, so that its outputs are the last
    layer's bias and no error in the layers before can be seen. So each layer's values are
    drawn when data reaches it, in one pass through the network, and used from there on.
    """
    layers = batch_norms(model)
    for layer in layers:
        layer.call = _setting(layer, statistics, rng)
    try:
        model(random_images(model, rng, _STATISTICS_BATCH), training=False)
    finally:
        for layer in layers:
            del layer.call


def _setting(
    layer: Any, statistics: Callable[..., Statistics], rng: np.random.Generator
) -> Callable[..., Any]:
    """The layer's `call`, with its weights set from its first input."""
    original = layer.call

    def call(inputs: Any, training: Any = None) -> Any:
        data = np.asarray(inputs, np.float64).reshape(-1, inputs.shape[-1])
        drawn = statistics(data.mean(axis=0), data.var(axis=0), layer.epsilon, rng)
        mean = drawn.mean
        if layer.scale:
            layer.gamma.assign(drawn.gamma * drawn.quieter)
        else:
            before = layer.input._keras_history.layer
            before.kernel.assign(before.kernel * drawn.quieter)  # output channels come last
            inputs, mean = inputs * drawn.quieter, mean * drawn.quieter
        if layer.center:
            layer.beta.assign(drawn.beta)
        layer.moving_mean.assign(mean)
        layer.moving_variance.assign(drawn.variance)
        return original(inputs, training=training)

    return call


# ----------------------------------------------------------------------------- the program


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; --help has examples")
    unknown = sorted(set(FLAGS.models) - set(NAMES))
    if unknown:
        raise app.UsageError(f"--models: unknown {unknown}; there are {', '.join(NAMES)}")
    rows = []
    for number, name in enumerate(FLAGS.models, 1):
        print(f"{number}/{len(FLAGS.models)} {name} ...", file=sys.stderr, flush=True)
        rows += list(rows_for(name, FLAGS.seed, FLAGS.image_size))
        tf_keras.backend.clear_session()
        gc.collect()
    columns = ["model", "values", "BN", "fold: left", "error", "depthwise: left", "error"]
    print(table([*columns, "spread", "tolerance", "ok"], [row.cells() for row in rows], width=125))
    if FLAGS.json:
        report = {"seed": FLAGS.seed, "rows": [row.to_dict() for row in rows]}
        Path(FLAGS.json).write_text(json.dumps(report, indent=2) + "\n")
    return 0 if all(row.ok for row in rows) else 1


if __name__ == "__main__":
    app.run(main)

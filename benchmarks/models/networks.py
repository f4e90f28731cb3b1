"""Networks and inputs for benchmarks and tests: architectures, statistics, images.

The networks are those of `applications`, and some of our own, with random weights, and
BatchNormalization statistics that suit their activations: "typical" ones, and "hard" ones with
gammas of both signs or 0 and variances of 0 or 1e-36.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras

from benchmarks.models import applications
from tools import real_models

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

_BATCH = 2
# Images that statistics are drawn from. Late layers see few positions of each: with less to
# go by, channels that hardly vary in these images are amplified in others.
_STATISTICS_BATCH = 8
# What stands for a length that a model leaves open: spliceai crops 5000 from either end.
_OPEN_LENGTH = 10_100


def batch_norms(model: Any) -> list[Any]:
    """The BatchNormalization layers of a model, those of nested models too."""
    layers = model._flatten_layers(include_self=False)
    return [layer for layer in layers if isinstance(layer, tf_keras.layers.BatchNormalization)]


def build(name: str, seed: int, image_size: int | None, keras: Any = tf_keras) -> Any:
    """See `applications.build`."""
    return applications.build(keras, name, seed, image_size)


def random_images(model: Any, rng: np.random.Generator, count: int = _BATCH) -> Any:
    """Images of random patches with noise on them, in the range that the model reads.

    With noise alone all examples look alike behind the network's global average.
    """
    images = applications.patches(model.input_shape[1:], rng, count)
    if any(type(layer).__name__ == "Rescaling" for layer in model.layers):  # of either Keras
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
    model: Any,
    statistics: Callable[..., Statistics],
    rng: np.random.Generator,
    images: Any = None,
) -> None:
    """Gives every BatchNormalization random weights that suit what comes into it.

    Values drawn without regard to the activations let a deep network with random kernels
    explode, or shrink its activations to nothing, so that its outputs are the last
    layer's bias and no error in the layers before can be seen. So each layer's values are
    drawn when data reaches it, in one pass through the network, and used from there on.
    The data are `images`; random ones by default.
    """
    if images is None:
        images = random_images(model, rng, _STATISTICS_BATCH)
    layers = batch_norms(model)
    for layer in layers:
        layer.call = _setting(layer, statistics, rng)
    try:
        model(images, training=False)
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


# -------------------------------------------------------------------------- trained models


def real_model(name: str) -> Any:
    """A trained model without the softmax at its end, which would hide what goes wrong."""
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

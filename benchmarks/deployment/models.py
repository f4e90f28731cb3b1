"""The models that `deploy.py` gives to runtimes, and images for them, as files of a `Work`.

Networks with random weights get the BatchNormalization statistics that training would have given
them: mean and variance of the calibration images, where these reach each layer.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras

from benchmarks.common.failures import Declined
from benchmarks.deployment import images
from benchmarks.models import networks
from benchmarks.models.networks import Statistics
from benchmarks.models.signatures import signature_of
from benchmarks.peer_tools.work import Work
from tools import real_models

TRAINED = ("fer", "ina_male_female", "ina_speech_music")
_MOBILE = "MobileNetV2-like"
_DENSE = "DenseNet-like"
_PRE_ACTIVATION = "Pre-activation"
# With their rows and columns: small, so that hundreds of images go through them on a CPU.
NETWORKS = {
    "WideResNet-16-4": 32,
    "ResNet50V2": 64,
    "DenseNet121": 64,
    _DENSE: 32,
    _PRE_ACTIVATION: 32,
    "Conv-ReLU-BN": 32,
    "Conv-ReLU-BN padded": 32,
    _MOBILE: 32,
}
CONV_RELU_NORM = {"Conv-ReLU-BN": "valid", "Conv-ReLU-BN padded": "same"}
MODELS = (*TRAINED, *NETWORKS)
_STANDARD = (-2.1, 2.1)  # range of pixels less 127.5, divided by 60
_OPEN_SIZE = 224
_FOR_STATISTICS, _BATCH = 64, 32  # images


def write(name: str, work: Work, folder: str | None, calibrating: int, testing: int) -> None:
    """Writes a model, images to calibrate and to test with, and its outputs for the latter.

    Args:
        name: of `MODELS`, or the path of a SavedModel with one input, of images from 0 to 1.
        work: where to.
        folder: of images; None to make some up.
        calibrating, testing: how many.

    Raises:
        Declined: a SavedModel takes something else.
    """
    if Path(name).is_dir():
        shutil.copytree(name, work.original)
    else:
        _model(name, folder, calibrating).save(work.original, save_format="tf")
    owner = tf.saved_model.load(str(work.original))  # it holds the variables
    serve = signature_of(owner)
    specs = serve.structured_input_signature[1]
    key, spec = next(iter(specs.items()))
    if len(specs) > 1 or spec.shape.rank not in (3, 4) or not spec.dtype.is_floating:
        raise Declined(f"it takes {list(specs.values())}, not images")
    shape = tuple(size or _OPEN_SIZE for size in spec.shape[1:])
    data = _scaled(images.load(folder, shape, calibrating + testing), _range(name))
    tested = data[calibrating:]
    parts = [serve(**{key: tf.constant(part)}) for part in _batches(tested)]
    outputs = {name: np.concatenate([p[name].numpy() for p in parts]) for name in sorted(parts[0])}
    for path, array in (
        (work.calibration, data[:calibrating]),
        (work.inputs, tested),
        (work.timed, tested[:1]),
    ):
        np.savez(path, **{key: array})
    np.savez(work.outputs, **outputs)


def _model(name: str, folder: str | None, calibrating: int) -> Any:
    if name in TRAINED:
        return networks.real_model(name)
    size = NETWORKS[name]
    tf_keras.utils.set_random_seed(0)
    if name in CONV_RELU_NORM:
        model = conv_relu_norm(size, CONV_RELU_NORM[name])
    elif name == _MOBILE:
        model = mobile(size)
    elif name == _DENSE:
        model = dense(size)
    elif name == _PRE_ACTIVATION:
        model = pre_activation(size)
    else:
        model = networks.build(name, 0, size)
    data = _scaled(images.load(folder, model.input_shape[1:], calibrating), _range(name))
    rng = np.random.default_rng(0)
    networks.set_statistics(model, calibrated, rng, tf.constant(data[:_FOR_STATISTICS]))
    if name == _MOBILE:
        spread_scales(model, rng)
    return model


def _range(name: str) -> tuple[float, float]:
    """The range of the values that a model reads, black to white."""
    if name in TRAINED:
        return real_models.MODELS[name].low, real_models.MODELS[name].high
    return _STANDARD if name in NETWORKS else (0.0, 1.0)


def _scaled(data: np.ndarray, ends: tuple[float, float]) -> np.ndarray:
    low, high = ends
    return (low + data * ((high - low) / 255)).astype(np.float32)


def _batches(data: np.ndarray) -> Iterator[np.ndarray]:
    for first in range(0, len(data), _BATCH):
        yield data[first : first + _BATCH]


def conv_relu_norm(size: int, padding: str) -> Any:
    """A network whose BatchNormalization follows the activation, as in many trained models.

    What its convolutions pad with zeros, a shift cannot pass.
    """
    layers = tf_keras.layers
    x = image = tf_keras.Input((size, size, 3))
    for width in (32, 64):
        for _ in range(2):
            x = layers.Conv2D(width, 3, padding=padding, activation="relu")(x)
            x = layers.BatchNormalization()(x)
        x = layers.MaxPooling2D(padding=padding)(x)
    x = layers.GlobalAveragePooling2D()(x)
    return tf_keras.Model(image, layers.Dense(10)(x))


def dense(size: int) -> Any:
    """Blocks of DenseNet, whose trunks are read by all that follows in the block."""
    layers = tf_keras.layers
    x = image = tf_keras.Input((size, size, 3))
    x = layers.Conv2D(16, 3, padding="same", use_bias=False)(x)
    for block in range(3):
        if block:
            x = layers.AveragePooling2D()(_conv(_activated(x), x.shape[-1] // 2, 1))
        for _ in range(4):
            y = _conv(_activated(_conv(_activated(x), 32, 1)), 8)
            x = layers.Concatenate()([x, y])
    x = layers.GlobalAveragePooling2D()(_activated(x))
    return tf_keras.Model(image, layers.Dense(10)(x))


def pre_activation(size: int) -> Any:
    """Residual blocks whose BatchNormalizations and ReLUs come before their convolutions."""
    layers = tf_keras.layers
    x = image = tf_keras.Input((size, size, 3))
    x = layers.Conv2D(16, 3, 2, padding="same", use_bias=False)(x)
    for _ in range(4):
        x = layers.Add()([x, _conv(_activated(_conv(_activated(x), 16)), 16)])
    x = layers.GlobalAveragePooling2D()(_activated(x))
    return tf_keras.Model(image, layers.Dense(10)(x))


def _activated(x: Any) -> Any:
    return tf_keras.layers.ReLU()(tf_keras.layers.BatchNormalization()(x))


def _conv(x: Any, width: int, window: int = 3) -> Any:
    return tf_keras.layers.Conv2D(width, window, padding="same", use_bias=False)(x)


def calibrated(
    mean: np.ndarray, variance: np.ndarray, epsilon: float, rng: np.random.Generator
) -> Statistics:
    """The statistics of what comes in, and gamma and beta as in `networks.typical_statistics`."""
    return Statistics(
        gamma=rng.uniform(0.5, 1.5, len(mean)),
        beta=0.1 * rng.standard_normal(len(mean)),
        mean=mean,
        variance=variance,
        quieter=np.ones(len(mean)),
    )


def mobile(size: int) -> Any:
    """Inverted residual blocks as in MobileNetV2, with ReLUs: `spread_scales` is for these."""
    layers = tf_keras.layers

    def norm(x: Any) -> Any:
        return layers.BatchNormalization()(x)

    x = image = tf_keras.Input((size, size, 3))
    x = layers.ReLU()(norm(layers.Conv2D(16, 3, 2, padding="same", use_bias=False)(x)))
    for width in (16, 16, 24, 24):
        y = layers.ReLU()(norm(layers.Conv2D(96, 1, use_bias=False)(x)))
        y = layers.ReLU()(norm(layers.DepthwiseConv2D(3, padding="same", use_bias=False)(y)))
        y = norm(layers.Conv2D(width, 1, use_bias=False)(y))
        x = layers.Add()([x, y]) if x.shape[-1] == width else y
    x = layers.GlobalAveragePooling2D()(x)
    return tf_keras.Model(image, layers.Dense(10)(x))


def spread_scales(model: Any, rng: np.random.Generator) -> None:
    """Has each channel between two convolutions of a block at a scale of its own.

    The function stays what it was: what gamma and beta give is divided out again by the kernel that
    reads it, behind a ReLU. In trained MobileNets channels are as far apart, so that one step for a
    whole kernel loses the narrow ones (Nagel et al., "Data-Free Quantization Through Weight
    Equalization and Bias Correction", 2019, figure 2).
    """
    for layer in networks.batch_norms(model):
        (after,) = layer.outbound_nodes[:1]
        readers = [node.outbound_layer for node in after.outbound_layer.outbound_nodes]
        if isinstance(after.outbound_layer, tf_keras.layers.ReLU) and len(readers) == 1:
            (reader,) = readers
            factors = np.exp(rng.standard_normal(layer.gamma.shape[0]))
            layer.gamma.assign(layer.gamma * factors)
            layer.beta.assign(layer.beta * factors)
            reader.set_weights([reader.get_weights()[0] / factors[:, None]])

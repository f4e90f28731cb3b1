"""The networks of a Keras's `applications`, and some of our own, with random weights."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.models.own_networks import OWN_NETWORKS

# Networks not named here are 224 x 224 by default.
_DEFAULT_SIZE = {
    "InceptionV3": 299,
    "InceptionResNetV2": 299,
    "Xception": 299,
    "WideResNet-16-4": 32,
}

_PATCHES = 8  # in a row or column of an image


def build(keras: Any, name: str, seed: int, image_size: int | None) -> Any:
    """A network of a Keras's applications, or of `OWN_NETWORKS`, without its softmax.

    Args:
        keras: the package, tf_keras or keras.
        name: as in `keras.applications`, or of `OWN_NETWORKS`.
        seed: of its random weights.
        image_size: pixels of images, or None for those of the network.
    """
    keras.utils.set_random_seed(seed)
    size = image_size or _DEFAULT_SIZE.get(name, 224)
    if name in OWN_NETWORKS:
        return OWN_NETWORKS[name](keras, size)
    return getattr(keras.applications, name)(
        include_top=True,
        weights=None,
        input_shape=(size, size, 3),
        classifier_activation=None,
    )


def patches(shape: tuple[int, int, int], rng: np.random.Generator, count: int) -> np.ndarray:
    """Normal patches with normal noise on them; `shape` is rows, columns and channels.

    With noise alone all examples look alike behind a network's global average.
    """
    height, width, channels = shape
    coarse = rng.standard_normal((count, _PATCHES, _PATCHES, channels))
    row, column = ((2 * np.arange(size) + 1) * _PATCHES // (2 * size) for size in (height, width))
    images = coarse[:, row[:, None], column]
    return images + 0.5 * rng.standard_normal(images.shape)

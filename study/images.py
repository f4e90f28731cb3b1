"""Images of a study: those that it trains with, and those that it tests with."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import tensorflow as tf


@dataclass(frozen=True)
class Part:
    """Training or test images.

    Attributes:
        images: decoded images, uint8 of shape [N, size, size, 3]; or files, strings of shape [N];
            or a dataset of encoded images and labels.
        labels: classes, int32 of shape [N]; None where `images` has them.
        size: N.
    """

    images: tf.Tensor | tf.data.Dataset
    labels: tf.Tensor | None
    size: int

    @classmethod
    def of_arrays(cls, images: np.ndarray, labels: np.ndarray) -> Part:
        """Arrays, made tensors once: a pipeline would copy them for each epoch."""
        with tf.device("CPU:0"):
            return cls(tf.constant(images), tf.constant(labels, tf.int32), len(labels))


@dataclass(frozen=True)
class Data:
    """All images of a study.

    Attributes:
        train, test: the two parts.
        classes: names.
        source: where they are from, for people.
        corrupt: files that were left out.
        available: how many images there are for training and for testing.
        digest: changes with the images that are used.
    """

    train: Part
    test: Part
    classes: tuple[str, ...]
    source: str
    corrupt: tuple[str, ...]
    available: tuple[int, int]
    digest: str


def decoded(data: tf.Tensor) -> tf.Tensor:
    """An image, uint8 of shape [height, width, 3]."""
    return tf.io.decode_image(data, channels=3, expand_animations=False)

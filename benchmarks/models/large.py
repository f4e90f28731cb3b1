"""SavedModels of unusual size: very many BatchNormalizations, and very many weights.

They are plain modules: Keras needs minutes to build and save so many layers.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf

EPSILON = 1e-3


class Chain(tf.Module):  # type: ignore[misc]
    """Convolutions of 1x1, each with a BatchNormalization and a ReLU behind it.

    Args:
        channels: of the input, and of what each convolution gives.
        size: height and width of the input.
    """

    def __init__(self, channels: tuple[int, ...], size: int) -> None:
        super().__init__()
        rng = np.random.default_rng(0)
        self.blocks = [
            tuple(map(tf.Variable, _weights(rng, *sizes))) for sizes in itertools.pairwise(channels)
        ]
        spec = tf.TensorSpec((None, size, size, channels[0]), name="image")
        self.serve = tf.function(self._serve, input_signature=[spec], autograph=False)

    def _serve(self, x: Any) -> dict[str, Any]:
        for kernel, *norm in self.blocks:
            x = tf.nn.conv2d(x, kernel, 1, "SAME")
            x = tf.compat.v1.nn.fused_batch_norm(x, *norm, epsilon=EPSILON, is_training=False)[0]
            x = tf.nn.relu(x)
        return {"features": x}


def _weights(rng: np.random.Generator, inputs: int, outputs: int) -> Iterator[np.ndarray]:
    """Kernel, gamma, beta, mean and variance, by which values keep their size."""
    yield rng.standard_normal((1, 1, inputs, outputs), np.float32) * np.float32((2 / inputs) ** 0.5)
    yield from (rng.uniform(*bounds, outputs).astype(np.float32) for bounds in _NORM)


_NORM = ((0.8, 1.2), (-0.1, 0.1), (-0.1, 0.1), (0.8, 1.2))

# A chain of many BatchNormalizations; and four kernels of 256 MiB, 1 GiB in all.
LARGE: dict[str, Callable[[], tf.Module]] = {
    "Chain-5000": lambda: Chain((8,) * 5001, 8),
    "Wide-1GB": lambda: Chain((8192,) * 5, 1),
}


def write(name: str, directory: str) -> None:
    """Writes one of them as SavedModel."""
    module: Any = LARGE[name]()
    tf.saved_model.save(module, directory, signatures={"serving_default": module.serve})

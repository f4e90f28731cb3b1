"""Images to calibrate and to test with: of a folder, or made up."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tensorflow as tf

from benchmarks.models.applications import patches

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif")


def load(folder: str | None, shape: tuple[int, ...], count: int) -> np.ndarray:
    """Images of so many rows, columns and channels, with values from 0 to 255.

    Args:
        folder: where images are, in folders of it, too. Without one, images are made up of random
            patches with noise.
        shape: rows, columns and, unless they are grey, channels.
        count: how many. Which of the folder's is random, and the same in every run.

    Raises:
        ValueError: the folder has too few.
    """
    height, width, channels = (*shape, 1)[:3]
    if folder is None:
        rng = np.random.default_rng(1)
        images = np.clip(127.5 + 60 * patches((height, width, channels), rng, count), 0, 255)
    else:
        images = np.stack(
            [
                tf.image.resize(_decoded(file, channels), (height, width)).numpy()
                for file in _chosen(Path(folder), count)
            ]
        )
    return images.reshape(count, *shape).astype(np.float32)


def check(folder: str, count: int) -> None:
    """Sees that a folder has so many images; raises ValueError otherwise."""
    _chosen(Path(folder), count)


def _chosen(folder: Path, count: int) -> list[Path]:
    files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in SUFFIXES)
    if len(files) < count:
        raise ValueError(f"{count} images are needed, and {folder} has {len(files)}")
    places = np.random.default_rng(0).permutation(len(files))[:count]
    return [files[place] for place in places]


def _decoded(file: Path, channels: int) -> tf.Tensor:
    content = tf.io.read_file(str(file))
    return tf.io.decode_image(content, channels, expand_animations=False)

"""Batches of images, augmented on tf.data.

All that is random is a function of the seed of the run and the number of the epoch, the batch or
the image: two runs with the same seed see the same images in the same order, with the same
augmentations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from study.images import Part, decoded
from study.recipes import Recipe

_AUTO = tf.data.AUTOTUNE
_SHUFFLED = 10_000  # images at a time, where they are in no array


@dataclass(frozen=True)
class Pipeline:
    """Batches for one recipe.

    Attributes:
        recipe: whose augmentations.
        classes: how many.
        batch: images of a step.
    """

    recipe: Recipe
    classes: int
    batch: int

    def training(self, part: Part, seed: int, epoch: int) -> tf.data.Dataset:
        """One epoch: images, float32 of shape [batch, size, size, 3], and the shares of classes.

        What is left of the images after the last whole batch is left out.
        """
        if self.recipe.decoded:
            batches = self._shifted_batches(part, seed, epoch)
        else:
            batches = self._cropped_batches(part, seed, epoch)
        if self.recipe.mixup:
            batches = batches.map(self._mixed, num_parallel_calls=_AUTO)
        return batches.map(lambda images, labels, _: (images, labels)).prefetch(_AUTO)

    def steps(self, part: Part) -> int:
        """Number of steps in an epoch of training."""
        return part.size // self.batch

    def testing(self, part: Part) -> tf.data.Dataset:
        """All images in their order, without augmentations."""
        if self.recipe.decoded:
            indices = tf.data.Dataset.range(part.size).batch(self.batch)
            images, labels = part.images, part.labels
            batches = indices.map(lambda i: (tf.gather(images, i), tf.gather(labels, i)))
        else:
            batches = self._encoded(part).map(self._central, _AUTO).batch(self.batch)
        return batches.map(
            lambda images, labels: (self._normalized(images), tf.one_hot(labels, self.classes)),
            _AUTO,
        ).prefetch(_AUTO)

    def _normalized(self, images: tf.Tensor) -> tf.Tensor:
        return (tf.cast(images, tf.float32) - self.recipe.mean) / self.recipe.std

    # ------------------------------------------------------------ small images, held in memory

    def _shifted_batches(self, part: Part, seed: int, epoch: int) -> tf.data.Dataset:
        order = _order(part.size, seed, epoch)
        images, labels = part.images, part.labels
        first = epoch * self.steps(part)

        def made(step: tf.Tensor, indices: tf.Tensor) -> tuple[tf.Tensor, ...]:
            key = _key(seed, first + step)
            shifted = self._shifted(tf.gather(images, indices), key)
            return shifted, tf.one_hot(tf.gather(labels, indices), self.classes), key

        batches = tf.data.Dataset.from_tensor_slices(order).batch(self.batch, drop_remainder=True)
        return batches.enumerate().map(made, num_parallel_calls=_AUTO)

    def _shifted(self, images: tf.Tensor, key: tf.Tensor) -> tf.Tensor:
        """Padded and cropped, which is a shift; flipped; with a hole."""
        size, padding, hole = self.recipe.size, self.recipe.padding, self.recipe.hole
        count = tf.shape(images)[0]
        keys = tf.unstack(tf.random.experimental.stateless_split(key, 3), 3)
        margins = [[0, 0], [padding, padding], [padding, padding], [0, 0]]
        padded = tf.pad(images, margins, "REFLECT")
        shifts = tf.random.stateless_uniform([2, count, 1], keys[0], 0, 2 * padding + 1, tf.int32)
        rows, columns = shifts[0] + tf.range(size), shifts[1] + tf.range(size)
        flipped = tf.random.stateless_uniform([count, 1], keys[1]) < 0.5
        columns = tf.where(flipped, tf.reverse(columns, [1]), columns)
        cropped = tf.gather(
            tf.gather(padded, rows, axis=1, batch_dims=1), columns, axis=2, batch_dims=1
        )
        result = self._normalized(tf.ensure_shape(cropped, [None, size, size, 3]))
        if not hole:
            return result
        corners = tf.random.stateless_uniform([2, count, 1], keys[2], 0, size - hole + 1, tf.int32)
        inside = (tf.range(size) >= corners) & (tf.range(size) < corners + hole)
        cut = inside[0][:, :, None, None] & inside[1][:, None, :, None]
        return tf.where(cut, 0.0, result)

    # ---------------------------------------------------------------- large images, from files

    def _encoded(self, part: Part, seed: int | None = None, epoch: int = 0) -> tf.data.Dataset:
        """Encoded images and labels, in their order or in that of an epoch."""
        files, labels = part.images, part.labels
        if labels is None:
            if seed is None:
                return files
            return files.shuffle(_SHUFFLED, seed=seed * 1_000_000 + epoch)
        indices = tf.range(part.size) if seed is None else _order(part.size, seed, epoch)
        return tf.data.Dataset.from_tensor_slices(indices).map(
            lambda i: (tf.io.read_file(files[i]), labels[i]), num_parallel_calls=_AUTO
        )

    def _cropped_batches(self, part: Part, seed: int, epoch: int) -> tf.data.Dataset:
        first = epoch * part.size

        def made(number: tf.Tensor, pair: tuple[tf.Tensor, tf.Tensor]) -> tuple[tf.Tensor, ...]:
            key = _key(seed, first + number)
            return self._cropped(pair[0], key), tf.one_hot(pair[1], self.classes), key

        batches = self._encoded(part, seed, epoch).enumerate().map(made, num_parallel_calls=_AUTO)
        batches = batches.batch(self.batch, drop_remainder=True)
        return batches.map(lambda images, labels, keys: (images, labels, keys[0]))

    def _cropped(self, data: tf.Tensor, key: tf.Tensor) -> tf.Tensor:
        """A random part, resized and flipped."""
        keys = tf.unstack(tf.random.experimental.stateless_split(key, 2), 2)
        image, size = decoded(data), self.recipe.size
        begin, extent, _ = tf.image.stateless_sample_distorted_bounding_box(
            tf.shape(image),
            tf.zeros([1, 0, 4]),
            keys[0],
            min_object_covered=0.1,
            aspect_ratio_range=(3 / 4, 4 / 3),
            area_range=(0.08, 1.0),
            max_attempts=100,
            use_image_if_no_bounding_boxes=True,
        )
        image = tf.image.resize(tf.slice(image, begin, extent), (size, size))
        image = tf.image.stateless_random_flip_left_right(image, keys[1])
        return self._normalized(tf.ensure_shape(image, [size, size, 3]))

    def _central(self, data: tf.Tensor, label: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """The shorter side resized, and the middle cut out."""
        image, size = decoded(data), self.recipe.size
        shape = tf.cast(tf.shape(image)[:2], tf.float32)
        scale = size / self.recipe.kept_at_test / tf.reduce_min(shape)
        image = tf.image.resize(image, tf.cast(tf.round(shape * scale), tf.int32))
        return tf.image.resize_with_crop_or_pad(image, size, size), label

    # ------------------------------------------------------------------------------- mixing

    def _mixed(self, images: tf.Tensor, labels: tf.Tensor, key: tf.Tensor) -> tuple[tf.Tensor, ...]:
        """Each image with one other, by shares of a Beta distribution (Zhang et al., 2018)."""
        keys = tf.unstack(tf.random.experimental.stateless_split(tf.bitwise.invert(key), 2), 2)
        alpha = tf.fill([1], self.recipe.mixup)
        # x / (x + y) of two Gamma variables is Beta.
        x, y = (tf.random.stateless_gamma([1], k, alpha) for k in keys)
        share = x / tf.maximum(x + y, 1e-12)
        images = share * images + (1 - share) * tf.reverse(images, [0])
        return images, share * labels + (1 - share) * tf.reverse(labels, [0]), key


def _key(seed: int, number: Any) -> tf.Tensor:
    return tf.stack([tf.constant(seed, tf.int64), tf.cast(number, tf.int64)])


def _order(size: int, seed: int, epoch: int) -> tf.Tensor:
    # The second half of a key is small for batches and images, so no key is used twice.
    return tf.random.experimental.stateless_shuffle(tf.range(size), [seed, 2**40 + epoch])

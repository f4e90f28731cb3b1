"""Tensors of any rank as images of rank 4, which the fused operations take, and back."""

from __future__ import annotations

from typing import Any

import tensorflow as tf


def as_images(x: tf.Tensor, axis: int) -> tf.Tensor:
    """x in rank 4, with its channels where they were: last or at 1."""
    rank = x.shape.rank
    if rank == 4:
        return x
    sizes = sizes_of(x)
    if axis == rank - 1:
        shape = [-1, *sizes[2:]] if rank == 5 else [-1, *sizes[1:-1], *[1] * (4 - rank), sizes[-1]]
    else:
        shape = [-1, sizes[1], product(sizes[2:]), 1]
    return tf.reshape(x, tf.stack(shape))


def shaped_like(y: tf.Tensor, x: tf.Tensor) -> tf.Tensor:
    """y in the shape of x."""
    if y.shape.rank != x.shape.rank or not x.shape.is_fully_defined():
        y = tf.reshape(y, tf.shape(x))
    y.set_shape(x.shape)
    return y


def sizes_of(x: tf.Tensor) -> list[Any]:
    """Sizes as ints where they are known, as scalars where they are not."""
    dynamic = tf.shape(x)
    return [dynamic[i] if size is None else size for i, size in enumerate(x.shape.as_list())]


def product(sizes: list[Any]) -> Any:
    """The product of sizes, of which some may be scalar tensors."""
    product: Any = 1
    for size in sizes:
        product = product * size
    return product

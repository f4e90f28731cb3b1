"""Layers that take the place of a BatchNormalization, under its name.

Each function that makes such a layer also returns a function that sets its weights. It is to be
called once the layer is built, and itself builds a sublayer, which no call has built.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from mbn_rewrite.frontends.keras_common import weights
from mbn_rewrite.frontends.keras_common.adapter import KerasAdapter
from mbn_rewrite.frontends.keras_common.batch_norm import affine_weights, known_class
from mbn_rewrite.frontends.keras_common.cloning import (
    config_of,
    from_config,
    share_initializers,
)
from mbn_rewrite.frontends.keras_common.folded_layers import drop_regularizers
from mbn_rewrite.ir.channel_map import ChannelMap
from mbn_rewrite.plans import Form, Remap, Replace, Sample


def replacement(
    keras: KerasAdapter, old: Any, planned: Replace, rank: int, masked: bool
) -> tuple[Any, Callable[[], None]]:
    """The layer that computes a BatchNormalization's map in its place.

    Args:
        keras: the adapter of its Keras.
        old: the BatchNormalization.
        planned: the map, and the form it takes.
        rank: the number of dimensions of its input.
        masked: whether its input may come with a mask, which convolutions do not pass on.
    """
    if planned.form is Form.FUSED:
        new, finish = _fused(keras, old, planned.map)
    else:
        convolved = planned.form is Form.DEPTHWISE and not masked
        new, finish = _scale_and_shift(keras, old, planned.map, rank, convolved)
    drop_regularizers(new)
    return new, finish


def _scale_and_shift(
    keras: KerasAdapter, old: Any, m: ChannelMap, rank: int, convolved: bool
) -> tuple[Any, Callable[[], None]]:
    """A depthwise convolution, or a layer of ours, that scales and shifts each channel."""
    common: dict[str, Any] = {
        "name": old.name,
        "dtype": old.dtype_policy,
        "trainable": old.trainable,
    }
    if convolved:
        kind = keras.layers.DepthwiseConv2D if rank == 4 else keras.layers.DepthwiseConv1D
        layout = "channels_last" if m.axis == rank - 1 else "channels_first"
        new = kind(1, data_format=layout, **common)
    else:
        new = keras.scale_and_shift(m.axis, **common)

    def finish() -> None:
        if not new.built:
            new.build(tuple(m.channels if i == m.axis else None for i in range(rank)))
        if isinstance(new, keras.scale_and_shift):
            weights.write(new, "scale", m.scale)
            weights.write(new, "shift", m.shift)
            return
        kernel = m.scale.reshape((1,) * (rank - 2) + (-1, 1))
        weights.write(new, keras.depthwise_kernel, kernel)
        weights.write(new, "bias", m.shift)

    return new, finish


def _fused(keras: KerasAdapter, old: Any, m: ChannelMap) -> tuple[Any, Callable[[], None]]:
    """A BatchNormalization that runs the fused operation: the strided layer, with stride 1."""
    own = {"stride": 1, "scale": True, "center": True}
    new = from_config(old, _plain_config(old, keras) | own, keras, keras.training_layers[0])

    def finish() -> None:
        build_like(keras, old, new)
        new.trainable = old.trainable
        share_initializers(old, new, keras)
        _set_map(keras, old, new, m)

    return new, finish


def remapped_layer(keras: KerasAdapter, old: Any, remap: Remap) -> tuple[Any, Callable[[], None]]:
    """A BatchNormalization that computes another map, by way of its gamma and beta."""
    config = config_of(old, keras) | {"scale": True, "center": True}
    new = from_config(old, config, keras)
    drop_regularizers(new)
    return new, lambda: _set_map(keras, old, new, remap.map)


def _set_map(keras: KerasAdapter, old: Any, new: Any, m: ChannelMap) -> None:
    """Makes a BatchNormalization compute a map by its gamma and beta, with another's statistics.

    A map that only shifts has statistics with which the scale is 1 to the last digit.
    """
    gamma, beta = affine_weights(new, keras)
    if np.all(m.scale == 1):
        weights.write(new, "moving_mean", np.zeros(m.channels))
        weights.write(new, "moving_variance", np.full(m.channels, 1 - keras.epsilon_of(old)))
        _set_affine(new, gamma, m.scale)
        _set_affine(new, beta, m.shift)
        return
    mean, variance = (
        weights.read(old, f"moving_{name}").astype(np.float64).reshape(-1)
        for name in ("mean", "variance")
    )
    keras.assign(new.moving_mean, old.moving_mean)
    keras.assign(new.moving_variance, old.moving_variance)
    _set_affine(new, gamma, m.scale * np.sqrt(variance + keras.epsilon_of(old)))
    _set_affine(new, beta, m.shift + mean * m.scale)


def training_layer(
    keras: KerasAdapter, old: Any, sampled: Sample
) -> tuple[Any, Callable[[], None]]:
    """The layer that trains in the place of a BatchNormalization, with its weights.

    Args:
        keras: the adapter of its Keras.
        old: the BatchNormalization, which is built.
        sampled: the layer to put there, and its stride.
    """
    own = {"stride": sampled.stride, "synchronized": bool(getattr(old, "synchronized", False))}
    kind = keras.training_layers[sampled.depthwise]
    new = from_config(old, _plain_config(old, keras) | own, keras, kind)

    def finish() -> None:
        build_like(keras, old, new)
        for name in ("moving_mean", "moving_variance"):
            weights.write(new, name, weights.read(old, name))
        names = zip(affine_weights(old, keras), affine_weights(new, keras), strict=True)
        for old_name, new_name in names:
            if new_name:
                _set_affine(new, new_name, weights.read(old, old_name))
        share_initializers(old, new, keras)
        new.trainable = old.trainable

    return new, finish


def _plain_config(old: Any, keras: KerasAdapter) -> dict[str, Any]:
    """Configuration of a BatchNormalization without what a class of one's own adds."""
    kind = known_class(old, keras)
    return config_of(old, keras) if kind is type(old) else dict(kind.get_config(old))


def build_like(keras: KerasAdapter, old: Any, new: Any) -> None:
    """Builds a BatchNormalization for the inputs of another, unless a call has built it."""
    if not new.built:
        channels, axis = old.moving_mean.shape[0], keras.axis_of(old)
        new.build(tuple(channels if i == axis else None for i in range(old.input_spec.ndim)))


def _set_affine(layer: Any, name: str, array: np.ndarray) -> None:
    """Sets the weight that scales or shifts the channels, whatever its rank in the layer."""
    weights.write(layer, name, array.reshape(tuple(getattr(layer, name).shape)))

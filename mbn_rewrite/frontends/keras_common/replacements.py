"""What takes the place of a layer, under its name.

What makes the layer that takes the place of a BatchNormalization also gives a function that
sets its weights. That is to be called once the layer is built, and builds a layer that no call
has built because another holds it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from mbn_rewrite.frontends.keras_common import weights
from mbn_rewrite.frontends.keras_common.adapter import KerasAdapter
from mbn_rewrite.frontends.keras_common.cloning import (
    config_of,
    from_config,
    take_over_initializers,
)
from mbn_rewrite.frontends.keras_common.op_table import affine_weights
from mbn_rewrite.ir.algebra import ChannelMap
from mbn_rewrite.plans import Form, Replace, Sample


def replacement(
    keras: KerasAdapter, old: Any, planned: Replace, rank: int, masked: bool
) -> tuple[Any, Callable[[], None]]:
    """The layer that does a BatchNormalization's map in its place.

    Args:
        keras: its Keras.
        old: the BatchNormalization.
        planned: the map, and in what form.
        rank: the number of dimensions of its input.
        masked: whether a mask may come with its input, which convolutions stop.
    """
    m = planned.map
    if planned.form is Form.FUSED:
        return _fused(keras, old, m)
    convolved = planned.form is Form.DEPTHWISE and not masked
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
    """A BatchNormalization that runs the fused operation: with stride 1 it is no other."""
    own = {"stride": 1, "scale": True, "center": True}
    new = from_config(old, config_of(old, keras) | own, keras, keras.training_layers[0])

    def finish() -> None:
        build_like(keras, old, new)
        new.trainable = old.trainable
        take_over_initializers(old, new, keras)
        set_map(keras, old, new, m)

    return new, finish


def standing_for(keras: KerasAdapter, kind: type, old: Any) -> Any:
    """What takes the place of a convolution and adds a border map, or its bias, for it.

    What it adds comes before the activation, which therefore moves out of the convolution.

    Args:
        keras: its Keras.
        kind: the class of what takes its place.
        old: the convolution.
    """
    inner = from_config(old, config_of(old, keras) | {"use_bias": False}, keras)
    activation, inner.activation = inner.activation, keras.linear
    inner.activity_regularizer = None  # of what the convolution gives no longer
    return kind(
        inner, activation=activation, name=old.name, dtype=old.dtype_policy, trainable=old.trainable
    )


def set_map(keras: KerasAdapter, old: Any, new: Any, m: ChannelMap) -> None:
    """Has a BatchNormalization do a map: by its gamma and beta, with another's statistics."""
    mean, variance = (
        weights.read(old, f"moving_{name}").astype(np.float64) for name in ("mean", "variance")
    )
    new.moving_mean.assign(old.moving_mean)
    new.moving_variance.assign(old.moving_variance)
    gamma, beta = affine_weights(new, keras)
    set_affine(new, gamma, m.scale * np.sqrt(variance + keras.epsilon_of(old)))
    set_affine(new, beta, m.shift + mean * m.scale)


def training_layer(
    keras: KerasAdapter, old: Any, sampled: Sample
) -> tuple[Any, Callable[[], None]]:
    """The layer that trains in the place of a BatchNormalization, with the weights that it had.

    Args:
        keras: its Keras.
        old: the BatchNormalization, which is built.
        sampled: which layer, and its stride.
    """
    own = {"stride": sampled.stride, "synchronized": bool(getattr(old, "synchronized", False))}
    kind = keras.training_layers[sampled.depthwise]
    new = from_config(old, config_of(old, keras) | own, keras, kind)

    def finish() -> None:
        build_like(keras, old, new)
        for name in ("moving_mean", "moving_variance"):
            weights.write(new, name, weights.read(old, name))
        names = zip(affine_weights(old, keras), affine_weights(new, keras), strict=True)
        for old_name, new_name in names:
            if new_name:
                set_affine(new, new_name, weights.read(old, old_name))
        take_over_initializers(old, new, keras)
        new.trainable = old.trainable

    return new, finish


def build_like(keras: KerasAdapter, old: Any, new: Any) -> None:
    """Builds a BatchNormalization for what another takes, if no call has built it."""
    if not new.built:
        channels, axis = old.moving_mean.shape[0], keras.axis_of(old)
        new.build(tuple(channels if i == axis else None for i in range(old.input_spec.ndim)))


def set_affine(layer: Any, name: str, array: np.ndarray) -> None:
    """Sets what scales or shifts the channels, whatever rank the layer keeps it in."""
    weights.write(layer, name, array.reshape(tuple(getattr(layer, name).shape)))

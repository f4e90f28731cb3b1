"""What takes the place of a BatchNormalization, under its name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mbn_rewrite.algebra import ChannelMap
from mbn_rewrite.keras_layers import weights
from mbn_rewrite.keras_layers.dialect import Dialect


def replacement(
    keras: Dialect, old: Any, m: ChannelMap, rank: int, masked: bool
) -> tuple[Any, Callable[[], None]]:
    """The layer that does a BatchNormalization's map in its place.

    Args:
        keras: its Keras.
        old: the BatchNormalization.
        m: the map.
        rank: the number of dimensions of its input.
        masked: whether a mask may come with its input, which convolutions stop.

    Returns:
        The layer, and what sets its weights. That is to be called once the layer is built,
        and builds a layer that no call has built because another holds it.
    """
    common: dict[str, Any] = {
        "name": old.name,
        "dtype": old.dtype_policy,
        "trainable": old.trainable,
    }
    last = m.axis == rank - 1
    if rank == 4 and m.axis in (1, 3) and not masked:
        layout = "channels_last" if last else "channels_first"
        new = keras.layers.DepthwiseConv2D(1, data_format=layout, **common)
    elif rank == 3 and last and not masked:
        new = keras.layers.DepthwiseConv1D(1, data_format="channels_last", **common)
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

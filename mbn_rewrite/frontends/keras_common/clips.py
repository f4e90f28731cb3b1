"""Layers that take the place of a clip, under its name, with bounds per channel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mbn_rewrite.frontends.keras_common import weights
from mbn_rewrite.frontends.keras_common.adapter import KerasAdapter
from mbn_rewrite.frontends.keras_common.cloning import label
from mbn_rewrite.passes.precision import check_bounds
from mbn_rewrite.plans import Reclip


def clip_layer(keras: KerasAdapter, old: Any, planned: Reclip) -> tuple[Any, Callable[[], None]]:
    """The layer that clips each channel between its own bounds, and what sets its weights.

    Args:
        keras: the adapter of its Keras.
        old: the layer or function that clips all alike.
        planned: the bounds.
    """
    is_layer = isinstance(old, keras.layers.Layer) and not keras.assigns_its_own_call(old)
    new: Any = keras.channel_clip(  # a function drops masks
        planned.axis,
        use_lower=planned.lower is not None,
        use_upper=planned.upper is not None,
        pass_mask=is_layer,
        name=old.name,
        dtype=old.dtype_policy if is_layer else _given_dtype(keras, old),
        trainable=getattr(old, "trainable", True),
    )
    check_bounds(planned, new.compute_dtype, label(old))

    def finish() -> None:
        for side, bounds in planned.bounds.items():
            weights.write(new, side, bounds)

    return new, finish


def _given_dtype(keras: KerasAdapter, function: Any) -> str:
    """Dtype in which a function computes, which is that of what it is given."""
    return keras.dtype_of(keras.all_calls_of(function)[0].outputs[0])

"""Layers with scales and shifts folded into their weights, under the names of the originals.

Each function that makes such a layer also returns a function that sets its weights, which is to be
called once the layer is built.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from mbn_rewrite.errors import RewriteError
from mbn_rewrite.frontends.keras_common import weights
from mbn_rewrite.frontends.keras_common.adapter import KerasAdapter
from mbn_rewrite.frontends.keras_common.cloning import (
    config_of,
    copy_weights,
    from_config,
    label,
    parts,
    share_initializers,
)
from mbn_rewrite.ir.algebra import fold
from mbn_rewrite.ir.graph import Linear
from mbn_rewrite.ir.layouts import einsum_channels
from mbn_rewrite.plans import Fold

# They were chosen for the original weights, and would spoil the folded ones.
_REGULARIZERS = {
    f"{weight}_{kind}"
    for weight in ("kernel", "bias", "depthwise", "pointwise", "embeddings", "gamma", "beta")
    for kind in ("regularizer", "constraint")
}


Read = Callable[[str], np.ndarray]  # gives a weight by name, as maps are folded into it


def folded_layer(
    keras: KerasAdapter, old: Any, action: Fold, read: Read
) -> tuple[Any, Callable[[], None]]:
    """A layer that has absorbed maps.

    Args:
        keras: the adapter of its Keras.
        old: the original.
        action: the maps, and whether the layer needs a bias or a border map for them.
        read: gives the weights that absorb them.
    """
    if action.border is not None or action.outer_bias:
        return _wrapped_convolution(keras, old, action, read)
    needs_bias = action.has_shift
    config = config_of(old, keras)
    for part in _configs_within(config):
        if needs_bias and "use_bias" in part:
            part["use_bias"] = True
    if needs_bias and isinstance(old, keras.layers.EinsumDense) and not config["bias_axes"]:
        config["bias_axes"] = einsum_channels(old.equation)
    new = from_config(old, config, keras)
    drop_regularizers(new)
    return new, lambda: _set_folded(keras, old, new, action, read)


def drop_regularizers(layer: Any) -> None:
    """Removes regularizers and constraints that were chosen for the original weights."""
    for part in parts(layer):
        for name in _REGULARIZERS & set(vars(part)):
            setattr(part, name, None)


def _configs_within(config: dict[str, Any]) -> list[dict[str, Any]]:
    """Configuration of a layer, and those of the layers that it wraps."""
    inner = [config[key]["config"] for key in ("layer", "backward_layer") if key in config]
    return [config, *(part for within in inner for part in _configs_within(within))]


def _set_folded(keras: KerasAdapter, old: Any, new: Any, action: Fold, read: Read) -> None:
    """Sets a new layer's weights to those of the original with the maps folded in."""
    copy_weights(old, new, keras)
    drop_regularizers(new)
    for part in parts(new):
        keras.sync_config(part)
    for place, (kernels, bias) in enumerate(action.op.chains):
        prefix = kernels[0].name.rpartition(".")[0]
        path = f"{prefix}." if prefix else ""
        new_bias = _fold_kernels(old, new, action, read, place)
        if bias or action.has_shift:
            name = bias or path + "bias"
            weights.write(new, name, new_bias)
            _check_range(old, new_bias, weights.read(new, name))


# ------------------------------------------------------------------- wrapped convolutions


def _wrapped_convolution(
    keras: KerasAdapter, old: Any, action: Fold, read: Read
) -> tuple[Any, Callable[[], None]]:
    """A convolution in a layer of ours that adds its border map, or its bias, for it.

    The addition comes before the activation, which therefore moves out of the convolution.
    """
    kind = keras.biased_convolution if action.border is None else keras.bordered_convolution
    inner = from_config(old, config_of(old, keras) | {"use_bias": False}, keras)
    activation, inner.activation = inner.activation, keras.linear
    inner.activity_regularizer = None  # meant for an output that the convolution no longer gives
    new = kind(
        inner, activation=activation, name=old.name, dtype=old.dtype_policy, trainable=old.trainable
    )
    drop_regularizers(new)
    return new, lambda: _set_wrapped(keras, old, new, action, read)


def _set_wrapped(keras: KerasAdapter, old: Any, new: Any, action: Fold, read: Read) -> None:
    """Sets the kernels of a wrapped convolution, and the bias or border map of its wrapper."""
    assert isinstance(action.op, Linear)
    added = _fold_kernels(old, new.layer, action, read)
    if action.border is not None and action.op.out_axis == 1:  # channels first
        added = np.moveaxis(added, -1, 0)
    name = "bias" if action.border is None else "border"
    weights.write(new, name, added)
    _check_range(old, added, weights.read(new, name))
    new.layer.trainable = new.trainable = old.trainable
    share_initializers(old, new.layer, keras)


# -------------------------------------------------------------------------------- helpers


def _fold_kernels(old: Any, new: Any, action: Fold, read: Read, place: int = 0) -> np.ndarray:
    """Sets the kernels of a chain of `new`, with maps folded into what `read` gives.

    Returns:
        The bias.
    """
    kernels, bias = action.op.chains[place]
    before, after = action.maps(place)
    stored = [read(kernel.name) for kernel in kernels]
    arrays, new_bias = fold(
        list(zip(kernels, stored, strict=True)),
        read(bias) if bias else None,
        before=before,
        after=after,
        border=action.border,
    )
    for kernel, old_array, array in zip(kernels, stored, arrays, strict=True):
        weights.write(new, kernel.name, array)
        _check_range(old, old_array, weights.read(new, kernel.name))
    return new_bias


def _check_range(layer: Any, before: np.ndarray, after: np.ndarray) -> None:
    """Raises RewriteError if folding took finite weights out of their dtype's range."""
    if np.all(np.isfinite(before)) and not np.all(np.isfinite(after)):
        raise RewriteError(
            f"{label(layer)} cannot absorb a BatchNormalization: weights would leave the range "
            f'of {after.dtype}. Use mode="depthwise" for this model'
        )

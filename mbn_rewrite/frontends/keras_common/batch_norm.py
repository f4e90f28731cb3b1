"""BatchNormalization layers as operations of the neutral graph."""

from __future__ import annotations

import inspect
import types
from collections.abc import Collection
from typing import Any

import numpy as np

from mbn_rewrite.frontends.keras_common import weights
from mbn_rewrite.frontends.keras_common.adapter import KerasAdapter
from mbn_rewrite.ir.channel_map import ChannelMap
from mbn_rewrite.ir.graph import BatchNorm, Shape, fused_operation_takes
from mbn_rewrite.ir.reasons import Obstacle, Reason


def is_batch_norm(layer: Any, keras: KerasAdapter) -> bool:
    """Whether a layer is a BatchNormalization or derived from one."""
    return isinstance(layer, keras.batch_norm_base)


def batch_norm(
    layer: Any, training: bool | None, keras: KerasAdapter, shape: Shape | None = None
) -> BatchNorm:
    """A BatchNormalization as an operation, with the reason if it must stay as it is.

    Args:
        layer: the layer.
        training: how it is called; see `Call`.
        keras: the adapter of its Keras.
        shape: the shape of its output; None if its calls cannot be seen.
    """
    reason = _irreplaceable(layer, keras)
    if reason:
        return BatchNorm(None, reason)
    axis = keras.axis_of(layer)
    # Frozen layers use their moving statistics however they are called.
    if training is not False and layer.trainable:
        obstacle = Obstacle.TRAINING_CALL if training else Obstacle.TRAINING_UNDECIDED
        return BatchNorm(None, Reason(obstacle), axis)
    parameters = _parameters(layer, keras)
    if not all(np.all(np.isfinite(array.astype(np.float64))) for array in parameters):
        return BatchNorm(None, Reason(Obstacle.NOT_FINITE), axis)
    channel_map = ChannelMap.of_batch_norm(*parameters, keras.epsilon_of(layer), axis)
    if not channel_map.is_finite:
        reason = Reason(Obstacle.NO_FINITE_SCALE, "its moving variance and epsilon")
        return BatchNorm(None, reason, axis)
    return BatchNorm(
        channel_map,
        axis=axis,
        fusible=_fusible(layer, axis, keras),
        convolvable=_convolvable(axis, shape or (None,) * layer.input_spec.ndim, keras),
        trains_otherwise=keras.trains_otherwise(layer),
    )


def affine_weights(layer: Any, keras: KerasAdapter) -> tuple[str, str]:
    """Names of the weights that scale and shift; "" for one that the layer does not have."""
    _, modified = keras.training_layers
    names = ("depthwise_kernel", "bias") if type(layer) is modified else ("gamma", "beta")
    return names[0] if layer.scale else "", names[1] if layer.center else ""


def _parameters(
    layer: Any, keras: KerasAdapter
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Gamma, beta, moving mean and moving variance, each of shape [channels]."""
    mean, variance = (weights.read(layer, f"moving_{name}") for name in ("mean", "variance"))
    gamma, beta = affine_weights(layer, keras)
    return (
        weights.read(layer, gamma).reshape(-1) if gamma else np.ones(mean.size),
        weights.read(layer, beta).reshape(-1) if beta else np.zeros(mean.size),
        mean.reshape(-1),
        variance.reshape(-1),
    )


def _irreplaceable(layer: Any, keras: KerasAdapter) -> Reason | None:
    """Reason why no other layer can do a BatchNormalization's work, even in training, or None."""
    if not layer.built:
        return Reason(Obstacle.NEVER_CALLED)
    known = (*keras.batch_norms, *keras.training_layers)
    if type(layer) not in known and not _passes_on(layer, keras):
        return Reason(Obstacle.OWN_CLASS, type(layer).__name__)
    return keras.reason_to_stay(layer)


def known_class(layer: Any, keras: KerasAdapter) -> Any:
    """The class of Keras that a BatchNormalization is of or derives from; None if there is none."""
    known = (*keras.batch_norms, *keras.training_layers)
    return next((kind for kind in type(layer).__mro__ if kind in known), None)


def _passes_on(layer: Any, keras: KerasAdapter) -> bool:
    """Whether a class of one's own does at inference what the class of Keras's does.

    Its `call` is run on an object with the layer's attributes, where a class comes between it and
    Keras's: that notes what it is called with, and what the `call` makes of what it returns.
    """
    base, kind = known_class(layer, keras), type(layer)
    if base is None or not _overrides_no_more(kind, base):
        return False
    given, returned = _Untouched(), _Untouched()
    calls: list[tuple[Any, Any]] = []

    def noted(self: Any, inputs: Any, training: Any = None, mask: Any = None) -> Any:
        calls.append((inputs, training))
        return returned

    between = type(base.__name__, (base,), {"call": noted})
    arguments = {"training": False} if "training" in _arguments(kind.call) else {}
    try:
        made = types.new_class(kind.__name__, (kind, between))
        probe: Any = object.__new__(made)
        vars(probe).update(vars(layer))
        result = kind.call(probe, given, **arguments)
        ((inputs, training),) = calls
        return result is returned and inputs is given and (training is None or not bool(training))
    except Exception:  # the user's code may raise anything on an object that is no tensor
        return False


class _Untouched:
    """An object that code can do nothing with, or ask of, but hand it on."""

    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError(f"code asks for its {name}")


# What a class may have of its own beside a `call` that passes on.
_HARMLESS = {"__init__", "call", "build", "get_config", "from_config", "__doc__", "__module__"}


def _overrides_no_more(kind: type, base: type) -> bool:
    """Whether a class overrides nothing of another that its inference may use, but `call`."""
    own = {name for cls in kind.__mro__[: kind.__mro__.index(base)] for name in vars(cls)}
    return not any(name in dir(base) and name not in dir(object) for name in own - _HARMLESS)


def _arguments(function: Any) -> Collection[str]:
    return inspect.signature(function).parameters


def _fusible(layer: Any, axis: int, keras: KerasAdapter) -> bool:
    """Whether the fused operation could replace the separate arithmetic that runs now."""
    return (
        keras.has_fused_operation()
        and not keras.fuses(layer)
        and type(layer) not in keras.training_layers  # which run it themselves
        and fused_operation_takes(layer.compute_dtype, axis, layer.input_spec.ndim)
    )


def _convolvable(axis: int, shape: Shape, keras: KerasAdapter) -> bool:
    """Whether there is a depthwise convolution for inputs of this rank and layout."""
    if (len(shape), axis) not in ((4, 1), (4, 3), (3, 2)):
        return False
    return not keras.may_misplace_bias(axis, shape)

"""`convert` and `plan`: from a model to a rewritten model, by way of its front end."""

from __future__ import annotations

import os
from typing import Any

from mbn_rewrite.decisions import Plan
from mbn_rewrite.errors import RewriteError
from mbn_rewrite.planner import make_plan

MODES = {
    "fold": "every BatchNormalization is absorbed by its neighbours where that is exact",
    "depthwise": "every BatchNormalization becomes a depthwise 1x1 convolution",
}
# Modes that take `stride`: none as long as no mode samples its statistics.
STRIDED_MODES: tuple[str, ...] = ()


def convert(model: Any, mode: str = "fold", stride: Any = None) -> Any:
    """Rewrites the BatchNormalization layers of a trained model for inference.

    Args:
        model: a built tf_keras model. It is not changed.
        mode: "fold" lets neighbouring layers absorb each BatchNormalization wherever that
            is exact, and leaves the others; `print(plan(model))` says why. "depthwise"
            puts a depthwise 1x1 convolution in the place of each.
        stride: for modes with sampled statistics only.

    Returns:
        A new model of the same kind with the same inputs, outputs, names and, but for
        rounding, results at inference. Layers that absorbed nothing have bitwise equal
        weights. Layers that did lose their kernel and bias regularizers and constraints,
        which were meant for the weights as they were. The new model is not compiled, and
        losses and metrics added by `add_loss` and `add_metric` are left out.

    Raises:
        RewriteError: the model is of a kind that cannot be rewritten, or holds a layer
            that cannot be copied; or the mode is unknown or takes no stride.
    """
    new, _ = convert_with_plan(model, mode, stride)
    return new


def plan(model: Any, mode: str = "fold", stride: Any = None) -> Plan:
    """What `convert` would do to a model, without doing it.

    Args:
        model, mode, stride: as for `convert`.

    Returns:
        A Plan. It prints as a table; `plan.decisions` has an entry for every
        BatchNormalization; `plan.to_json()` is for programs.

    Raises:
        RewriteError: as for `convert`.
    """
    check_mode(mode, stride)
    return make_plan(_front_end(model).read(model).graph, mode)


def convert_with_plan(model: Any, mode: str, stride: Any = None) -> tuple[Any, Plan]:
    """`convert` and `plan` in one, reading the model once."""
    check_mode(mode, stride)
    front_end = _front_end(model)
    reading = front_end.read(model)
    made = make_plan(reading.graph, mode)
    return front_end.write(model, reading, made), made


def check_mode(mode: str, stride: Any = None) -> None:
    """Raises RewriteError where there is no such mode, or it takes no stride."""
    if mode not in MODES:
        listed = "; ".join(f'"{name}": {what}' for name, what in MODES.items())
        raise RewriteError(f"there is no mode {mode!r}. The modes are {listed}")
    if stride is not None and mode not in STRIDED_MODES:
        which = " and ".join(STRIDED_MODES) or "none in this release"
        raise RewriteError(
            f'mode "{mode}" takes no stride (it was given {stride!r}): it does not compute '
            f"statistics. Modes that take one: {which}"
        )


def _front_end(model: Any) -> Any:
    """The front end for a model, chosen by where its class comes from."""
    if isinstance(model, (str, os.PathLike)):
        raise RewriteError(
            f"a model is needed, not the path {os.fspath(model)!r}. Load it first with "
            "tf_keras.models.load_model, or use rewrite_saved_model or "
            "tools/rewrite_savedmodel.py, which take paths"
        )
    packages = {cls.__module__.partition(".")[0] for cls in type(model).__mro__}
    if "tf_keras" in packages:
        return _tf_keras_front_end(model)
    if "keras" in packages:
        raise RewriteError(
            f"{type(model).__name__} is of Keras 3, which this release cannot rewrite; it "
            "rewrites models of tf_keras (Keras 2). Rebuild the model with tf_keras (or with "
            "tf.keras where TF_USE_LEGACY_KERAS=1 is set before TensorFlow is imported) and "
            "copy its weights"
        )
    raise RewriteError(
        f"a tf_keras model is needed, not {type(model).__name__}. "
        "Give a tf_keras.Model, Functional, Sequential or subclassed"
    )


def _tf_keras_front_end(model: Any) -> Any:
    import tf_keras

    from mbn_rewrite import tf_keras_frontend

    if not isinstance(model, tf_keras.Model):
        raise RewriteError(
            f"a model is needed, not the {type(model).__name__} '{getattr(model, 'name', model)}'. "
            "Put layers in a tf_keras.Sequential with an input shape"
        )
    if not model.built or not (model.weights or model.inputs):
        raise RewriteError(
            f"{type(model).__name__} '{model.name}' has not been built, so it has no weights. "
            "Call it once on data, or give it an input shape"
        )
    return tf_keras_frontend

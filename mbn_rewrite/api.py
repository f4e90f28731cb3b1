"""`convert` and `plan`: from a model to a rewritten model, by way of its front end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mbn_rewrite import strides
from mbn_rewrite.decisions import Plan
from mbn_rewrite.errors import RewriteError
from mbn_rewrite.front_ends import front_end_of
from mbn_rewrite.planner import TRAINING_MODES, make_plan
from mbn_rewrite.training_layers import DEFAULT_STRIDE

MODES = {
    "fold": "every BatchNormalization is absorbed by its neighbours where that is exact",
    "depthwise": "every BatchNormalization becomes a depthwise 1x1 convolution",
    "strided": "for training: BatchNormalization with statistics of a sample",
    "mbn": "for training: statistics of a sample, and a trainable depthwise 1x1 convolution",
}


def convert(model: Any, mode: str = "fold", stride: Any = None) -> Any:
    """Rewrites the BatchNormalization layers of a model, for inference or for training.

    Args:
        model: a built model of tf_keras or Keras 3. It is not changed.
        mode: for inference, "fold" lets neighbouring layers absorb each BatchNormalization
            wherever that is exact, and leaves the others; `print(plan(model))` says why.
            "depthwise" puts a depthwise 1x1 convolution in the place of each. For training,
            "strided" puts a `StridedBatchNormalization` in the place of each, and "mbn" a
            `ModifiedBatchNormalization`, with the weights that it had.
        stride: for training modes: a positive int, a pair (rows, columns), or a mapping (1 for
            layers that it does not name) or function from layer names, as the plan shows
            them, to either. 4 by default.

    Returns:
        A new model of the same kind with the same inputs, outputs, names and, but for
        rounding, results at inference. Layers that absorbed nothing have bitwise equal
        weights. Layers that did lose their kernel and bias regularizers and constraints,
        which were meant for the weights as they were; a model for training keeps all of them,
        and its trainable weights are in the order of the original's, so that the state of an
        optimizer fits. The new model is not compiled, and losses and metrics added by
        `add_loss` and `add_metric` are left out.

    Raises:
        RewriteError: the model is of a kind that cannot be rewritten, or holds a layer
            that cannot be copied; the mode is unknown or takes no stride; or what was given
            is no stride.
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
    stride = check_mode(mode, stride)
    return make_plan(front_end_of(model).read(model).graph, mode, stride)


def convert_with_plan(model: Any, mode: str, stride: Any = None) -> tuple[Any, Plan]:
    """`convert` and `plan` in one, reading the model once."""
    stride = check_mode(mode, stride)
    front_end = front_end_of(model)
    reading = front_end.read(model)
    made = make_plan(reading.graph, mode, stride)
    return front_end.write(model, reading, made), made


def check_mode(mode: str, stride: Any = None) -> Any:
    """The stride to use.

    Raises:
        RewriteError: there is no such mode, it takes no stride, or what was given is none.
    """
    if mode not in MODES:
        listed = "; ".join(f'"{name}": {what}' for name, what in MODES.items())
        raise RewriteError(f"there is no mode {mode!r}. The modes are {listed}")
    if mode not in TRAINING_MODES:
        if stride is None:
            return None
        raise RewriteError(
            f'mode "{mode}" takes no stride (it was given {stride!r}): it does not compute '
            f"statistics. Modes that take one: {' and '.join(TRAINING_MODES)}"
        )
    if stride is None:
        return DEFAULT_STRIDE
    # What mappings and functions give is checked layer by layer.
    return stride if isinstance(stride, Mapping) or callable(stride) else strides.checked(stride)

"""`convert` and `plan`: from a model to a rewritten model, by way of its front end."""

from __future__ import annotations

from typing import Any

from mbn_rewrite.decisions import Plan
from mbn_rewrite.errors import RewriteError
from mbn_rewrite.front_ends import front_end_of
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
        model: a built model of tf_keras or Keras 3. It is not changed.
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
    return make_plan(front_end_of(model).read(model).graph, mode)


def convert_with_plan(model: Any, mode: str, stride: Any = None) -> tuple[Any, Plan]:
    """`convert` and `plan` in one, reading the model once."""
    check_mode(mode, stride)
    front_end = front_end_of(model)
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

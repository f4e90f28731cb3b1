#!/usr/bin/env python3
"""Draws the pictures of the documentation anew, by the library's own code.

    python tools/pictures.py

A page has a picture between two comments, and its name in the first of them:

    <!-- picture: rules -->
    <!-- end of picture -->
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np

import mbn_rewrite as mbn
from mbn_rewrite.cli.quiet import import_tensorflow
from mbn_rewrite.drawing import mermaid
from mbn_rewrite.ir.channel_map import ChannelMap
from mbn_rewrite.ir.graph import (
    Activation,
    Affine,
    BatchNorm,
    Clip,
    Concat,
    Linear,
    Merge,
    MergeKind,
    Monotone,
    Op,
    Opaque,
    Permute,
    PositivelyHomogeneous,
    Recurrent,
    Reshape,
    ZeroPadding,
)
from mbn_rewrite.ir.kernels import Window
from mbn_rewrite.rules.motion import RULES, Absorb, Blocked, Outcome, Shapes

_PICTURE = re.compile(r"(<!-- picture: (\w+) -->\n).*?(<!-- end of picture -->)", re.DOTALL)


def drawn(text: str) -> str:
    """A page with its pictures as the code draws them."""
    return _PICTURE.sub(lambda found: f"{found[1]}\n{PICTURES[found[2]]()}\n\n{found[3]}", text)


def main() -> None:
    import_tensorflow()
    for page in sorted((ROOT / "docs").rglob("*.md")):
        text = page.read_text()
        if drawn(text) != text:
            page.write_text(drawn(text))
            print(f"drew the pictures of {page.relative_to(ROOT)}")


# ------------------------------------------------------------------------------- a model


def decisions() -> str:
    """A small network, and what mode "fold" decides on it."""
    model = small_network()
    return _fenced(mermaid(model, mbn.plan(model, mode="fold")))


def rewritten() -> str:
    """The same network, rewritten."""
    return _fenced(mermaid(mbn.convert(small_network(), mode="fold")))


def reasons() -> str:
    """Reasons that the plan gives for it."""
    said = mbn.plan(small_network(), mode="fold").decisions
    rows = [[f"`{d.name}`", d.action, ", ".join(f"`{i}`" for i in d.into), d.reason] for d in said]
    return _table(["BatchNormalization", "action", "into", "reason"], rows)


def small_network() -> Any:
    """A network in which a BatchNormalization goes backward, one forward, and one stays."""
    import keras

    layers = keras.layers
    image = keras.Input((16, 16, 3), name="image")
    trunk = layers.Conv2D(8, 3, name="conv_1")(image)
    x = layers.BatchNormalization(name="norm_1")(trunk)
    x = layers.ReLU(name="relu_1")(x)
    x = layers.Conv2D(8, 3, padding="same", name="conv_2")(x)
    x = layers.BatchNormalization(name="norm_2")(x)
    x = layers.Add(name="add")([trunk, x])
    x = layers.ReLU(name="relu_2")(x)
    x = layers.BatchNormalization(name="norm_3")(x)
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    model = keras.Model(image, layers.Dense(10, name="dense")(x), name="small")
    for norm in ("norm_1", "norm_2", "norm_3"):  # as if trained: a map that is not the identity
        model.get_layer(norm).moving_mean.assign(np.linspace(-1, 1, 8))
    return model


# ----------------------------------------------------------------------------- the rules

_CHANNELS = 4
_IMAGE = (None, 6, 6, _CHANNELS)
_WINDOWS = (Window(3, 1, 1, "same"),) * 2

# An operation of each kind, with the shapes of its inputs and of its output.
_linear = partial(Linear, (), None, in_axis=3, out_axis=3)
PROBES: dict[str, tuple[Op, Shapes]] = {
    "convolution, Dense": (_linear(), Shapes((_IMAGE,), _IMAGE)),
    "… that pads with zeros": (_linear(pads=True, windows=_WINDOWS), Shapes((_IMAGE,), _IMAGE)),
    "… with a fused ReLU": (_linear(activation=Activation.HOMOGENEOUS), Shapes((_IMAGE,), _IMAGE)),
    "… with another fused activation": (
        _linear(activation=Activation.OTHER),
        Shapes((_IMAGE,), _IMAGE),
    ),
    "GRU, LSTM, SimpleRNN": (Recurrent((), 2), Shapes(((None, 6, _CHANNELS),), (None, 5))),
    "another BatchNormalization": (
        BatchNorm(ChannelMap(np.ones(_CHANNELS), np.zeros(_CHANNELS), 3)),
        Shapes((_IMAGE,), _IMAGE),
    ),
    "average pooling, cropping, upsampling": (Affine(3, 3), Shapes((_IMAGE,), _IMAGE)),
    "max pooling": (Monotone(3, 3), Shapes((_IMAGE,), _IMAGE)),
    "zero padding": (ZeroPadding(3, 3), Shapes((_IMAGE,), _IMAGE)),
    "ReLU": (Clip(), Shapes((_IMAGE,), _IMAGE)),
    "LeakyReLU, PReLU": (PositivelyHomogeneous(), Shapes((_IMAGE,), _IMAGE)),
    "ReLU6 and other clips": (Clip(0.0, 6.0), Shapes((_IMAGE,), _IMAGE)),
    "reshape that keeps channels apart": (
        Reshape(),
        Shapes((_IMAGE,), (None, 36, _CHANNELS)),
    ),
    "transposition": (Permute((0, 2, 1, 3)), Shapes((_IMAGE,), _IMAGE)),
    "Add": (Merge(MergeKind.ADD), Shapes((_IMAGE,) * 2, _IMAGE)),
    "Subtract": (Merge(MergeKind.SUBTRACT), Shapes((_IMAGE,) * 2, _IMAGE)),
    "Average": (Merge(MergeKind.AVERAGE), Shapes((_IMAGE,) * 2, _IMAGE)),
    "Maximum, Minimum": (Merge(MergeKind.MAXIMUM), Shapes((_IMAGE,) * 2, _IMAGE)),
    "Concatenate": (
        Concat(3),
        Shapes(((None, 6, 6, 1), (None, 6, 6, _CHANNELS - 1)), _IMAGE),
    ),
    "anything else": (Opaque(), Shapes((_IMAGE,), _IMAGE)),
}
# What each is asked with, scale and shift; and what is said where only the first can move.
_PLAIN = (2.0, 0.0)
_OTHERS = {"no scale is negative": (-2.0, 0.0), "there is no shift": (2.0, 1.0)}


def rules() -> str:
    """Answers of the table of motion, for each kind of operation."""
    rows = [
        [name, _answer(partial(_backward, *probe)), _answer(partial(_forward, *probe))]
        for name, probe in PROBES.items()
    ]
    return _table(["", "backward", "forward"], rows)


def _backward(op: Op, shapes: Shapes, scale: float, shift: float) -> Outcome:
    return RULES[type(op)].backward(op, _map_of(shapes.output, scale, shift), shapes)


def _forward(op: Op, shapes: Shapes, scale: float, shift: float) -> Outcome:
    return RULES[type(op)].forward(op, _map_of(shapes.inputs[0], scale, shift), shapes, 0)


def _answer(rule: Callable[[float, float], Outcome]) -> str:
    """Fate of a map, and its condition."""
    plain = rule(*_PLAIN)
    if isinstance(plain, Blocked):
        return "blocks"
    others = {said: rule(*asked) for said, asked in _OTHERS.items()}
    blocked = {said: other for said, other in others.items() if isinstance(other, Blocked)}
    answer = "**absorbs**" if isinstance(plain, Absorb) else "passes"
    if blocked:
        answer += f" if {' and '.join(blocked)}"
    if any(other.border for other in blocked.values()):
        answer += ", or with a border map"
    return answer


def _map_of(shape: tuple[int | None, ...], scale: float, shift: float) -> ChannelMap:
    """A map of the last axis."""
    channels = shape[-1] or 1
    return ChannelMap(np.full(channels, scale), np.full(channels, shift), len(shape) - 1)


# ------------------------------------------------------------------------------- helpers


def _fenced(text: str) -> str:
    return f"```mermaid\n{text}\n```"


def _table(columns: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    columns = list(columns)
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


PICTURES: dict[str, Callable[[], str]] = {
    "decisions": decisions,
    "rewritten": rewritten,
    "reasons": reasons,
    "rules": rules,
}


if __name__ == "__main__":
    main()

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
from string import ascii_lowercase
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np

import mbn_rewrite as mbn
from mbn_rewrite.cli.quiet import import_tensorflow
from mbn_rewrite.drawing import mermaid
from mbn_rewrite.ir.channel_map import Array, ChannelMap
from mbn_rewrite.ir.graph import (
    Activation,
    Affine,
    Attention,
    BatchNorm,
    Clip,
    Concat,
    ConstantMap,
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
    Selection,
    Stack,
    Total,
    ZeroPadding,
)
from mbn_rewrite.ir.kernels import Window
from mbn_rewrite.rules.relations import (
    OUT,
    RELATIONS,
    Ends,
    Gated,
    Origins,
    Relation,
    Row,
    Shapes,
    Tied,
    clipped,
)

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


def printed() -> str:
    """The plan of it as it is printed."""
    table = str(mbn.plan(small_network(), mode="fold")).strip("\n")
    return _fenced("\n".join(line.rstrip() for line in table.splitlines()), "text")


def reasons() -> str:
    """Reasons that the plan gives for it."""
    said = mbn.plan(small_network(), mode="fold").decisions
    rows = [[f"`{d.name}`", d.action, ", ".join(f"`{i}`" for i in d.into), d.reason] for d in said]
    return _table(["BatchNormalization", "action", "into", "reason"], rows)


def small_network() -> Any:
    """A network with a shared trunk: one BatchNormalization stays, the others go."""
    import keras

    layers = keras.layers
    image = keras.Input((16, 16, 3), name="image")
    x = layers.BatchNormalization(name="norm_1")(image)
    trunk = layers.Conv2D(8, 3, padding="same", name="conv_1")(x)
    x = layers.BatchNormalization(name="norm_2")(trunk)
    x = layers.ReLU(name="relu_1")(x)
    x = layers.Conv2D(8, 3, padding="same", name="conv_2")(x)
    x = layers.Add(name="add")([trunk, x])
    x = layers.BatchNormalization(name="norm_3")(x)
    x = layers.ReLU(name="relu_2")(x)
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    model = keras.Model(image, layers.Dense(10, name="dense")(x), name="small")
    for number in (1, 2, 3):  # as if trained: maps that are not the identity
        norm = model.get_layer(f"norm_{number}")
        channels = norm.gamma.shape[0]
        norm.gamma.assign(np.linspace(0.5, 2, channels))
        norm.moving_mean.assign(np.linspace(-1, 1, channels))
    return model


# ----------------------------------------------------------------------------- the rules

_CHANNELS = 4
_IMAGE = (None, 6, 6, _CHANNELS)
_UNARY = Shapes((_IMAGE,), _IMAGE)
_WINDOWS = (Window(3, 1, 1, "same"),) * 2

# An operation of each kind, with the shapes of its inputs and of its output.
_linear = partial(Linear, (), None, in_axis=3, out_axis=3)
PROBES: dict[str, tuple[Op, Shapes]] = {
    "convolution, Dense": (_linear(), _UNARY),
    "… that pads with zeros": (_linear(pads=True, windows=_WINDOWS), _UNARY),
    "… with a fused ReLU": (_linear(activation=Activation.HOMOGENEOUS), _UNARY),
    "… with another fused activation": (_linear(activation=Activation.OTHER), _UNARY),
    "GRU, LSTM, SimpleRNN": (Recurrent((), 2), Shapes(((None, 6, _CHANNELS),), (None, 5))),
    "ConvLSTM that pads with zeros": (
        Recurrent((), 3, uneven="pads its input with zeros"),
        Shapes((_IMAGE,), (None, 5)),
    ),
    "MultiHeadAttention": (
        Attention((((), None),), ((), None), 2),
        Shapes(((None, 6, _CHANNELS),) * 2, (None, 6, _CHANNELS)),
    ),
    "BatchNormalization that stays": (
        BatchNorm(ChannelMap(np.ones(_CHANNELS), np.zeros(_CHANNELS), 3)),
        _UNARY,
    ),
    "average pooling, cropping, upsampling": (Affine(3, 3), _UNARY),
    "sum over 6 positions": (Total(3, 2, count=6), Shapes((_IMAGE,), (None, 6, _CHANNELS))),
    "sum over an unknown number": (Total(3, 2), Shapes((_IMAGE,), (None, 6, _CHANNELS))),
    "multiplication by 2, in code": (ConstantMap(scale=np.array(2.0)), _UNARY),
    "multiplication by 2 and addition of 3, in code": (
        ConstantMap(scale=np.array(2.0), shift=np.array(3.0)),
        _UNARY,
    ),
    "some of the channels": (
        Selection(((3, 3, (0, 1)),)),
        Shapes((_IMAGE,), (None, 6, 6, 2)),
    ),
    "max pooling": (Monotone(3, 3), _UNARY),
    "zero padding": (ZeroPadding(3, 3), _UNARY),
    "ReLU": (Clip(), _UNARY),
    "LeakyReLU, PReLU": (PositivelyHomogeneous(), _UNARY),
    "ReLU6 and other clips": (Clip(0.0, 6.0), _UNARY),
    "reshape that keeps channels apart": (Reshape(), Shapes((_IMAGE,), (None, 36, _CHANNELS))),
    "transposition": (Permute((0, 2, 1, 3)), _UNARY),
    "Add": (Merge(MergeKind.ADD), Shapes((_IMAGE,) * 2, _IMAGE)),
    "Subtract": (Merge(MergeKind.SUBTRACT), Shapes((_IMAGE,) * 2, _IMAGE)),
    "Average": (Merge(MergeKind.AVERAGE), Shapes((_IMAGE,) * 2, _IMAGE)),
    "Multiply": (Merge(MergeKind.MULTIPLY), Shapes((_IMAGE, (None, 1, 1, _CHANNELS)), _IMAGE)),
    "Maximum, Minimum": (Merge(MergeKind.MAXIMUM), Shapes((_IMAGE,) * 2, _IMAGE)),
    "Concatenate": (Concat(3), Shapes(((None, 6, 6, 1), (None, 6, 6, _CHANNELS - 1)), _IMAGE)),
    "stacking along a new axis": (
        Stack(1),
        Shapes((_IMAGE,) * 2, (None, 2, *_IMAGE[1:])),
    ),
    "anything else": (Opaque(), _UNARY),
}


def rules() -> str:
    """What the table of units says, for each kind of operation."""
    units = {name: _units(RELATIONS[type(op)], op, shapes) for name, (op, shapes) in PROBES.items()}
    bounded = "a clip that is given bounds for each channel"
    units[bounded] = _units(partial(clipped, positive=False), Clip(), _UNARY)
    return _table(["", "scales", "origins"], ([name, *said] for name, said in units.items()))


def _units(row: Row, op: Op, shapes: Shapes) -> tuple[str, str]:
    """What an operation demands of scales, and of origins."""
    reads, gives = (row(op, shapes, slot, len(shapes.of(slot)) - 1) for slot in (0, OUT))
    if isinstance(reads, Tied):
        return _tied(reads)
    if isinstance(reads, Gated):
        return "p = p_a p_b", "0"
    (scale_in, origin_in), (scale_out, origin_out) = _end(reads), _end(gives)
    return _both(scale_in, scale_out), _both(origin_in, origin_out)


def _tied(tied: Tied) -> tuple[str, str]:
    same = "the same" if tied.spread[OUT].theirs is None else "the same, each input its slice"
    scales = f"{same}, positive" if tied.positive else same
    match tied.origins:
        case Origins.SAME:
            return scales, same
        case Origins.ZERO:
            return scales, "0"
        case Origins.SUM:
            added = "" if tied.added is None else f" + {tied.added.flat[0]:g} (1 - 1 / p)"
            return scales, f"o = {_sum(tied.weights)}{added}"


def _sum(weights: Iterable[float | Array]) -> str:
    """A weighted sum of the origins of inputs a, b, ..."""
    terms = (f"{float(w):+g} o_{name}" for w, name in zip(weights, ascii_lowercase, strict=False))
    return " ".join(terms).replace("+", "+ ").replace("-", "- ").replace(" 1 ", " ").lstrip("+ ")


def _end(relation: Relation) -> tuple[str, str]:
    """The scales and the origins that one side of a layer takes."""
    if not isinstance(relation, Ends):
        return "1", "0"
    origin = "any" if not relation.zero else "0, or a border map" if relation.border else "0"
    return "positive" if relation.positive else "any", origin


def _both(reads: str, gives: str) -> str:
    return reads if reads == gives else f"it reads: {reads}; it gives: {gives}"


# ------------------------------------------------------------------------------- helpers


def _fenced(text: str, language: str = "mermaid") -> str:
    return f"```{language}\n{text}\n```"


def _table(columns: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    columns = list(columns)
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


PICTURES: dict[str, Callable[[], str]] = {
    "decisions": decisions,
    "rewritten": rewritten,
    "printed": printed,
    "reasons": reasons,
    "rules": rules,
}


if __name__ == "__main__":
    main()

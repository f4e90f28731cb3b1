"""Single layers in training: variants for one shape of activations, and functions that run them."""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from absl import flags

import mbn_rewrite as mbn
from benchmarks.training.backends import Function, Tensor, in_use
from mbn_rewrite.training import strides

FLAGS = flags.FLAGS  # those of the program, layer.py

MODIFIED_STRIDE = 4
EPSILON = 1e-3  # that of both Kerases


@dataclass(frozen=True)
class Variant:
    """A layer of one Keras.

    Attributes:
        keras: whose it is, or "" for no layer at all.
        layer: the name of its class.
        stride: its stride, or None for what has none.
        compiled: whether XLA compiles it, because it was asked to.
    """

    keras: str = ""
    layer: str = "no BN"
    stride: strides.Stride | None = None
    compiled: bool = False

    @property
    def label(self) -> str:
        """Its name in tables."""
        name = f"{self.keras} {self.layer.replace('BatchNormalization', '') or 'BN'}".strip()
        if self.stride is not None:
            name += f" {_text_of(self.stride)}"
        return name if self.compiled == FLAGS.xla else f"{name}, fused op"


@dataclass
class Candidate:
    """A variant for one shape.

    Attributes:
        variant: which.
        strides: those in use, (1, 1) for all positions, () for no layer.
        lowered: whether they are less than what was asked for.
        functions: "forward" and "both", of x and dy; see `backends.Backend.functions`.
        ops: how often each operation ran forward and backward.
        op_milliseconds: how long all operations ran, by kind, in a call under the profiler.
        error: of the outputs.
        failure: what went wrong, or "".
    """

    variant: Variant
    strides: tuple[int, ...]
    lowered: bool
    functions: dict[str, Function]
    ops: dict[str, int] = field(default_factory=dict)
    op_milliseconds: dict[str, float] = field(default_factory=dict)
    error: float | None = None
    failure: str = ""


@dataclass(frozen=True)
class Data:
    """Inputs and weights of one shape, the same for all variants."""

    x: Tensor
    dy: Tensor
    gamma: np.ndarray
    beta: np.ndarray

    @classmethod
    def of(cls, shape: Sequence[int]) -> Data:
        """Made-up activations.

        The gradient of the output goes with the input, so that what is to be taken off in the
        sample is as large as the rest, and cannot be missing unseen.
        """
        rng = np.random.default_rng(0)
        channels = shape[-1]
        size = (FLAGS.batch, *shape)
        noise = rng.standard_normal(size, np.float32)
        scale = rng.uniform(0.5, 2, channels).astype(np.float32)
        x = noise * scale + rng.standard_normal(channels, np.float32)
        dy = rng.standard_normal(size, np.float32) + 0.25 + 0.25 * noise
        gamma = rng.uniform(0.5, 1.5, channels).astype(np.float32)
        beta = rng.standard_normal(channels, np.float32)
        tensor = in_use().tensor
        return cls(tensor(x, FLAGS.dtype), tensor(dy, FLAGS.dtype), gamma, beta)


def variants() -> list[Variant]:
    """All that is compared; the first is what the others are compared with."""
    result = []
    if in_use().has_fused_operation:
        result.append(Variant("tf_keras", "BatchNormalization"))
    for name in FLAGS.keras:
        result.append(Variant(name, "BatchNormalization", None, FLAGS.xla))
        result += [
            Variant(name, "StridedBatchNormalization", stride_of(text), FLAGS.xla)
            for text in FLAGS.strides
        ]
        result.append(Variant(name, "ModifiedBatchNormalization", MODIFIED_STRIDE, FLAGS.xla))
    return list(dict.fromkeys([*result, Variant(compiled=FLAGS.xla)]))


def candidate(variant: Variant, data: Data) -> Candidate:
    """The variant's functions, with weights of their own."""
    if not variant.keras:
        return Candidate(variant, (), False, in_use().functions(None, variant.compiled))
    stock = in_use().kerases[variant.keras]
    # Weights stay in float32, as in training.
    options: dict[str, Any] = {"epsilon": EPSILON, "dtype": FLAGS.dtype}
    if FLAGS.dtype != "float32":
        options["dtype"] = f"mixed_{FLAGS.dtype}"
    if variant.stride is None:
        layer, asked, used = stock.layers.BatchNormalization(**options), (1, 1), (1, 1)
        layer.build(data.x.shape)
    else:
        layer = own_layers(variant.keras)[variant.layer](variant.stride, **options)
        layer.build(data.x.shape)
        asked, used = strides.along_axes(variant.stride, 2), layer.strides
    for weight, value in zip(layer.trainable_weights, (data.gamma, data.beta), strict=True):
        weight.assign(np.reshape(value, weight.shape))
    functions = in_use().functions(layer, variant.compiled)
    return Candidate(variant, used, used != asked, functions)


def own_layers(keras: str) -> dict[str, Any]:
    """The layer classes of this library for a Keras, by their names."""
    home = {"tf_keras": "tf_keras", "keras_3": "keras3"}[keras]
    module = importlib.import_module(f"mbn_rewrite.frontends.{home}.training_layers")
    names = (mbn.StridedBatchNormalization.__name__, mbn.ModifiedBatchNormalization.__name__)
    return {name: getattr(module, name) for name in names}


def shape_of(text: str) -> tuple[int, int, int]:
    """Height, width and channels.

    Raises:
        ValueError: it is no shape.
    """
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){2}", text):
        raise ValueError(f"unknown shape '{text}'; a shape is HEIGHTxWIDTHxCHANNELS, as 56x56x64")
    height, width, channels = map(int, text.split("x"))
    return height, width, channels


def stride_of(text: str) -> strides.Stride:
    """One stride, or rows and columns.

    Raises:
        ValueError: it is no stride.
    """
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)?", text):
        raise ValueError(f"unknown stride '{text}'; a stride is a number, or ROWSxCOLUMNS as 16x1")
    numbers = tuple(map(int, text.split("x")))
    return numbers[0] if len(numbers) == 1 else (numbers[0], numbers[1])


def _text_of(stride: strides.Stride) -> str:
    return str(stride) if isinstance(stride, int) else "x".join(map(str, stride))

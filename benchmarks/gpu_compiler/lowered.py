"""Networks as what XLA is given of them: HLO, as TensorFlow lowers a function with jit_compile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

import mbn_rewrite as mbn
from benchmarks.models import networks
from benchmarks.models.floor import without_batch_norm
from benchmarks.models.training_networks import NETWORKS, varied
from benchmarks.models.variants import FROZEN, KERAS, function_of
from benchmarks.training.steps import Batch, trainer
from mbn_rewrite.errors import VerificationError
from mbn_rewrite.frontends.in_memory import ModelInMemory
from mbn_rewrite.frontends.registry import front_end_of
from mbn_rewrite.passes.planner import EXACT_AT_A_COST, FOLDED, candidates
from mbn_rewrite.passes.substitute import TAKES

# Forms of mode "auto", which differ from "fold" where something does not fold.
FORMS = tuple(str(form) for form in (*TAKES, *EXACT_AT_A_COST) if form != "depthwise")
INFERENCE = ("original", "fold", "depthwise", *FORMS, FROZEN, "floor")
TRAINING = (*NETWORKS, "blocks")


@dataclass(frozen=True)
class Lowered:
    """A program for XLA.

    Attributes:
        program: a serialised `HloModuleProto`.
        inputs: how many of its parameters, from the first on, are data; the others are variables.
        left: BatchNormalizations in it, as layers, or None where that is not asked.
    """

    program: bytes
    inputs: int
    left: int | None = None


class NothingLeft(Exception):  # noqa: N818 - it is an answer, not an error
    """Everything folds, or nothing more does in this form: there is no such variant."""


def lowered(function: Any, *data: Any) -> Lowered:
    """What XLA is given of a function.

    Args:
        function: of tensors, which may use variables.
        data: its arguments.
    """

    def call(*data: Any) -> Any:
        return function(*data)

    compiled = tf.function(call, jit_compile=True, autograph=False)
    program = compiled.experimental_get_compiler_ir(*data)(stage="hlo_serialized")
    return Lowered(program, len(data))


# ------------------------------------------------------------------------------- inference


def inference(model: Any, variant: str, batch: int) -> Lowered:
    """A variant of a network at inference; see `INFERENCE`.

    Args:
        model: the network as it was.
        variant: which.
        batch: examples in a call.

    Raises:
        NothingLeft: it is a form of what does not fold, and everything folds or none differs.
    """
    new, left = _rewritten(model, variant)
    shape = (batch, *model.inputs[0].shape[1:])
    images = tf.zeros(shape, tf.as_dtype(model.inputs[0].dtype))
    one = lowered(function_of(new, images, variant), images)
    return Lowered(one.program, one.inputs, left)


def _rewritten(model: Any, variant: str) -> tuple[Any, int]:
    """A variant, and how many BatchNormalizations it has."""
    if variant == "original":
        return model, len(mbn.plan(model, "fold").decisions)
    if variant == "floor":
        return without_batch_norm(model), 0
    if variant in FORMS:
        return _in_form(model, variant)
    mode = "fold" if variant == FROZEN else variant
    new, plan = mbn.convert_with_plan(model, mode, inputs=_images(model))
    return new, plan.left


def _images(model: Any) -> Any:
    """Images in the range for which statistics were drawn: others may magnify rounding."""
    images = networks.random_images(model, np.random.default_rng(1))
    return tf.cast(images, tf.as_dtype(model.inputs[0].dtype))


def _in_form(model: Any, form: str) -> tuple[Any, int]:
    opened = ModelInMemory(front_end_of(model), model)
    plans = candidates(opened.graph)
    if form not in plans:
        left = plans[FOLDED].left
        raise NothingLeft("everything folds" if not left else "the same as another form")
    new = opened.write(plans[form])
    comparison = mbn.verify(model, new, inputs=_images(model))
    if not comparison.ok:
        raise VerificationError(f"WRONG: {comparison.max_rel_error:.0e} from the original")
    return new, plans[form].left


# -------------------------------------------------------------------------------- training


def training(name: str, keras_name: str, variant: str, dtype: str, batch: int) -> Lowered:
    """A training step with a kind of BatchNormalization, of a network or of `blocks`.

    A step of a network is forward, loss, backward and update. That of the blocks is forward and
    backward, to the gradients of all weights.

    Args:
        name: of `TRAINING`.
        keras_name: of `KERAS`.
        variant: see `training_networks`.
        dtype: a policy of dtypes.
        batch: images.
    """
    keras = KERAS[keras_name]
    keras.utils.set_random_seed(0)
    keras.mixed_precision.set_global_policy(dtype)
    try:
        model = (
            varied(blocks(keras), variant) if name == "blocks" else NETWORKS[name](keras, variant)
        )
    finally:
        keras.mixed_precision.set_global_policy("float32")
    if name == "blocks":
        return _gradients(model, batch)
    _, *size, _ = model.inputs[0].shape
    data = Batch.random(batch, size[0], model.outputs[0].shape[-1])
    step = trainer(keras, model).step.function.python_function
    return lowered(step, data.images, data.labels)


BLOCKS, SIDE, CHANNELS = 3, 56, 256


def blocks(keras: Any) -> Any:
    """Three 3x3 convolutions of 56 x 56 x 256, each with BatchNormalization and ReLU behind it."""
    layers = keras.layers
    x = inputs = keras.Input((SIDE, SIDE, CHANNELS))
    for _ in range(BLOCKS):
        x = layers.Conv2D(CHANNELS, 3, padding="same", use_bias=False)(x)
        x = layers.ReLU()(layers.BatchNormalization()(x))
    return keras.Model(inputs, x)


def _gradients(model: Any, batch: int) -> Lowered:
    """Forward and backward, from the gradient of the output to those of all weights."""
    dtype = tf.as_dtype(model.layers[-1].compute_dtype)
    x = tf.zeros((batch, SIDE, SIDE, CHANNELS), dtype)

    def step(x: tf.Tensor, dy: tf.Tensor) -> list[tf.Tensor]:
        with tf.GradientTape() as tape:
            y = model(x, training=True)
        return tape.gradient(y, model.trainable_variables, dy)

    return lowered(step, x, x)

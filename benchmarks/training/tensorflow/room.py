"""TensorFlow's room: layers and steps run as concrete tf.functions; see `backends.Backend`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from mbn_rewrite.cli.quiet import import_tensorflow

import_tensorflow()

import keras
import numpy as np
import tensorflow as tf
import tf_keras

from benchmarks.common import devices
from benchmarks.training.operations import ByLayer
from benchmarks.training.tensorflow import attribution, profiles

name = "tensorflow"
kerases = {"tf_keras": tf_keras, "keras_3": keras}
errors: tuple[type[Exception], ...] = (tf.errors.OpError,)
has_fused_operation = True
compiles_always = False

PROFILED_CALLS = 5  # the profiler now and then misses an event


def versions() -> dict[str, str]:
    return {
        "tensorflow": tf.__version__,
        "tf_keras": tf_keras.__version__,
        "keras": keras.__version__,
    }


# ------------------------------------------------------------------------ devices and tensors


def chosen(asked: str | None) -> str:
    device = devices.chosen(asked)
    if device == "GPU":
        # Otherwise one process takes all memory, and none is left for those that measure it.
        tf.config.experimental.set_memory_growth(tf.config.list_physical_devices("GPU")[0], True)
    return device


name_of = devices.name_of


def on(device: str) -> AbstractContextManager[Any]:
    return tf.device(f"/{device}:0")


def synchronize(result: Any = None) -> None:
    devices.synchronize()


def tensor(array: np.ndarray, dtype: str) -> tf.Tensor:
    return tf.cast(array, dtype)


def array(tensor: tf.Tensor) -> np.ndarray:
    return tensor.numpy()


# ------------------------------------------------------------------------------ single layers


class _Traced:
    """A function of x and dy that is traced once, for the first arguments."""

    def __init__(self, function: Callable[..., list[tf.Tensor]], compiled: bool) -> None:
        self.function = tf.function(function, **({"jit_compile": True} if compiled else {}))
        self._concrete: Any = None

    def __call__(self, x: tf.Tensor, dy: tf.Tensor) -> list[tf.Tensor]:
        if self._concrete is None:
            self._concrete = self.function.get_concrete_function(x, dy)
        return list(self._concrete(x, dy))


def functions(layer: Any | None, compiled: bool) -> dict[str, Any]:
    # A tape does not know the variables of Keras 3.
    found = layer.trainable_weights if layer else []
    weights = [w.value if isinstance(w, keras.Variable) else w for w in found]

    def call(x: tf.Tensor) -> tf.Tensor:
        return layer(x, training=True) if layer else tf.identity(x)

    def forward(x: tf.Tensor, dy: tf.Tensor) -> list[tf.Tensor]:
        return [call(x)]

    def both(x: tf.Tensor, dy: tf.Tensor) -> list[tf.Tensor]:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = call(x)
        # y is given too: the next layer needs it, so no forward pass may be pruned.
        return [y, *tape.gradient(y, [x, *weights], dy)]

    return {f.__name__: _Traced(f, compiled) for f in (forward, both)}


def copying(compiled: bool) -> Callable[[tf.Tensor], tf.Tensor]:
    # By 1 it would be optimised away.
    return tf.function(lambda x: x * 1.5, **({"jit_compile": True} if compiled else {}))


def ran(
    function: Any, x: tf.Tensor, dy: tf.Tensor, compiled: bool
) -> tuple[dict[str, int], dict[str, float]]:
    if compiled:
        from benchmarks.training.hlo import instructions

        module = function.function.experimental_get_compiler_ir(x, dy)(stage="optimized_hlo")
        return instructions(module), {}
    found = profiles.profiled(lambda: function(x, dy), PROFILED_CALLS, device=False)
    times: dict[str, list[float]] = {}
    for op in found:
        times.setdefault(op.op, []).extend(op.times)
    kinds = sorted(times)
    return (
        {k: round(len(times[k]) / PROFILED_CALLS) for k in kinds if k not in profiles.UNLISTED},
        {k: sum(times[k]) / PROFILED_CALLS for k in kinds},
    )


# ------------------------------------------------------------------------------------ models


def inference(model: Any, images: tf.Tensor) -> Callable[[], tf.Tensor]:
    call = tf.function(lambda data: model(data, training=False), autograph=False)
    concrete = call.get_concrete_function(images)
    return lambda: concrete(images)


def train_statistics(model: Any, images: tf.Tensor) -> None:
    model(images, training=True)


# ----------------------------------------------------------------------------- training steps


def check_settings(xla: bool, profile: str | None) -> None:
    if profile and xla:
        raise ValueError("no --profile with --xla: it fuses operations of several layers into one")


class _Step:
    """A tf.function of images and labels, which changes the variables themselves."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def __call__(self, images: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
        return self.function(images, labels)

    def take_variables(self) -> None:
        """They are what it works on."""

    def give_variables(self) -> None:
        """They are what it works on."""


def step(keras: Any, model: Any, optimizer: Any, loss_of: Any, xla: bool) -> _Step:
    # tf_keras would compile the update by itself on a GPU, and only there.
    getattr(optimizer, "inner_optimizer", optimizer).jit_compile = False

    @tf.function(jit_compile=xla or None)
    def train(images: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            logits = model(images, training=True)
            # A loss in 16 bits would overflow once it is scaled.
            loss = loss_of(labels, tf.cast(logits, tf.float32))
            scaled = _scaled(optimizer, loss)
        gradients = tape.gradient(scaled, model.trainable_variables)
        # A scope tells the update from gradients without one in profiles.
        with tf.name_scope("update"):
            _update(optimizer, gradients, model.trainable_variables)
        return loss

    return _Step(train)


def _scaled(optimizer: Any, loss: tf.Tensor) -> tf.Tensor:
    """The loss times the loss scale, where an optimizer has one."""
    for method in ("get_scaled_loss", "scale_loss"):  # of tf_keras, of Keras 3
        if hasattr(optimizer, method):
            return getattr(optimizer, method)(loss)
    return loss


def _update(optimizer: Any, gradients: list[Any], variables: list[Any]) -> None:
    if hasattr(optimizer, "get_unscaled_gradients"):  # Keras 3 does it itself
        gradients = optimizer.get_unscaled_gradients(gradients)
    optimizer.apply_gradients(zip(gradients, variables, strict=True))


def ran_in_step(
    step: _Step, model: Any, batch: Any, calls: int, xla: bool, directory: Any
) -> ByLayer:
    images, labels = batch.images, batch.labels
    if xla:
        found = profiles.compiled(step.function, images, labels)
    else:
        found = profiles.profiled(lambda: step(images, labels), calls, directory)
    concrete = step.function.get_concrete_function(images, labels)
    return attribution.by_layer(found, model, concrete)


def begin_memory(device: str) -> None:
    tf.function(lambda x: tf.reduce_sum(x * x))(tf.ones([8, 8]))  # what TensorFlow sets up once
    if device == "GPU":
        tf.config.experimental.reset_memory_stats("GPU:0")


def gpu_memory(key: str) -> int:
    return int(tf.config.experimental.get_memory_info("GPU:0")[key])

"""JAX's room: layers and steps are functions of their state, under `jit`; see `backends.Backend`.

XLA compiles all that runs, so that what ran are the instructions of compiled modules. Those of a
training step name the layer that they come from; an instruction of several has the name of one.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import keras
import ml_dtypes
import numpy as np

from benchmarks.common.devices import chosen_of
from benchmarks.training import keras_devices
from benchmarks.training.hlo import instructions
from benchmarks.training.operations import ByLayer, LayerTime, OpTime, norms_of
from mbn_rewrite.device import cpu_name

name = "jax"
kerases = {"keras_3": keras}
errors: tuple[type[Exception], ...] = (jax.errors.JaxRuntimeError,)
has_fused_operation = False
compiles_always = True

# Primitives that are not listed: plain arithmetic, and what moves nothing.
_UNLISTED = {
    *("add", "sub", "mul", "div", "neg", "rsqrt", "sqrt", "square", "integer_pow", "max", "min"),
    *("broadcast_in_dim", "reshape", "squeeze", "convert_element_type", "expand_dims", "select_n"),
    *("eq", "ne", "gt", "lt", "ge", "le", "and", "or", "add_any", "stop_gradient", "transpose"),
    *("jit", "pjit", "closed_call", "custom_vjp_call", "copy", "copy_p"),
}


def versions() -> dict[str, str]:
    return {"jax": jax.__version__, "keras": keras.__version__}


# ------------------------------------------------------------------------ devices and tensors


def chosen(asked: str | None) -> str:
    return chosen_of(asked, jax.default_backend() in ("gpu", "cuda", "rocm"), "JAX")


def name_of(device: str) -> str:
    return cpu_name() if device == "CPU" else str(jax.devices("gpu")[0].device_kind)


on = keras_devices.on


def synchronize(result: Any = None) -> None:
    jax.block_until_ready(result)


def tensor(array: np.ndarray, dtype: str) -> jax.Array:
    return jax.numpy.asarray(array, ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


def array(tensor: jax.Array) -> np.ndarray:
    return np.asarray(tensor)


# ------------------------------------------------------------------------------ single layers


class _Jitted:
    """A function of x and dy, with the state of a layer."""

    def __init__(self, function: Callable[..., Any], layer: Any | None) -> None:
        self._function = jax.jit(function)
        self._weights = [v.value for v in layer.trainable_variables] if layer else []
        self._state = [v.value for v in layer.non_trainable_variables] if layer else []

    def __call__(self, x: jax.Array, dy: jax.Array) -> list[jax.Array]:
        outputs, self._state = self._function(self._weights, self._state, x, dy)
        return list(outputs)

    def module(self, x: jax.Array, dy: jax.Array) -> str:
        """The text of the compiled module."""
        return str(self._function.lower(self._weights, self._state, x, dy).compile().as_text())


def functions(layer: Any | None, compiled: bool) -> dict[str, Any]:
    def call(weights: Any, state: Any, x: jax.Array) -> Any:
        return layer.stateless_call(weights, state, x, training=True) if layer else (x, state)

    def forward(weights: Any, state: Any, x: jax.Array, dy: jax.Array) -> Any:
        y, state = call(weights, state, x)
        return [y], state

    def both(weights: Any, state: Any, x: jax.Array, dy: jax.Array) -> Any:
        def run(weights: Any, x: jax.Array) -> Any:
            return call(weights, state, x)

        y, pull, new_state = jax.vjp(run, weights, x, has_aux=True)
        of_weights, of_x = pull(dy)
        # y is given too: the next layer needs it, so no forward pass may be pruned.
        return [y, of_x, *of_weights], new_state

    return {f.__name__: _Jitted(f, layer) for f in (forward, both)}


def copying(compiled: bool) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda x: x * 1.5)  # by 1 it would be optimised away


def ran(
    function: _Jitted, x: jax.Array, dy: jax.Array, compiled: bool
) -> tuple[dict[str, int], dict[str, float]]:
    return instructions(function.module(x, dy)), {}


# ------------------------------------------------------------------------------------ models


def inference(model: Any, images: jax.Array) -> Callable[[], jax.Array]:
    call = jax.jit(lambda *arguments: model.stateless_call(*arguments, training=False)[0])
    state = _state_of(model)
    return lambda: call(*state, images)


def train_statistics(model: Any, images: jax.Array) -> None:
    call = jax.jit(lambda *arguments: model.stateless_call(*arguments, training=True)[1])
    for variable, value in zip(
        model.non_trainable_variables, call(*_state_of(model), images), strict=True
    ):
        variable.assign(value)


def _state_of(model: Any) -> tuple[list[jax.Array], list[jax.Array]]:
    both = model.trainable_variables, model.non_trainable_variables
    trained, others = ([variable.value for variable in variables] for variables in both)
    return trained, others


# ----------------------------------------------------------------------------- training steps


def check_settings(xla: bool, profile: str | None) -> None:
    if profile:
        raise ValueError("no --profile on JAX: XLA fuses operations of several layers into one")


class _Step:
    """A function of state, images and labels, and the state that it has come to."""

    def __init__(self, function: Callable[..., Any], model: Any, optimizer: Any) -> None:
        self._function = function
        self._model, self._optimizer = model, optimizer
        self.take_variables()

    def __call__(self, images: jax.Array, labels: jax.Array) -> jax.Array:
        loss, self._state = self._function(self._state, images, labels)
        return loss

    def take_variables(self) -> None:
        # Copies, since the function writes into what it is given.
        self._state = tuple(
            [jax.numpy.array(v.value) for v in variables] for variables in self._variables
        )

    def give_variables(self) -> None:
        for variables, values in zip(self._variables, self._state, strict=True):
            for variable, value in zip(variables, values, strict=True):
                variable.assign(jax.numpy.array(value))

    def module(self, images: jax.Array, labels: jax.Array) -> str:
        """The text of the compiled module."""
        return str(self._function.lower(self._state, images, labels).compile().as_text())

    @property
    def _variables(self) -> tuple[list[Any], ...]:
        model = self._model
        trained, others = model.trainable_variables, model.non_trainable_variables
        return trained, others, self._optimizer.variables


def step(keras: Any, model: Any, optimizer: Any, loss_of: Any, xla: bool) -> _Step:
    def loss_and_state(trained: Any, others: Any, of_optimizer: Any, images: Any, labels: Any):
        logits, others = model.stateless_call(trained, others, images, training=True)
        # A loss in 16 bits would overflow once it is scaled.
        loss = loss_of(labels, logits.astype("float32"))
        mapping = list(zip(optimizer.variables, of_optimizer, strict=True))
        with keras.StatelessScope(state_mapping=mapping):
            scaled = optimizer.scale_loss(loss)
        return scaled, (loss, others)

    def train(state: Any, images: jax.Array, labels: jax.Array) -> Any:
        trained, others, of_optimizer = state
        gradient = jax.value_and_grad(loss_and_state, has_aux=True)
        (_, (loss, others)), gradients = gradient(trained, others, of_optimizer, images, labels)
        trained, of_optimizer = optimizer.stateless_apply(of_optimizer, gradients, trained)
        return loss, (trained, others, of_optimizer)

    return _Step(jax.jit(train, donate_argnums=0), model, optimizer)


def ran_in_step(
    step: _Step, model: Any, batch: Any, calls: int, xla: bool, directory: Any
) -> ByLayer:
    return by_layer(step.module(batch.images, batch.labels), [n.name for n in norms_of(model)])


def by_layer(module: str, names: list[str]) -> ByLayer:
    """The operations in the text of a compiled module, by the layers of these names.

    An instruction says what it was made of: "jit(train)/transpose(jvp(net))/bn/reduce_sum" is a
    sum in the gradient of "bn".
    """
    forward: dict[str, list[OpTime]] = {name: [] for name in names}
    backward: dict[str, list[OpTime]] = {name: [] for name in names}
    elsewhere: list[OpTime] = []
    known = re.compile(rf"(?:^|[/(])({'|'.join(map(re.escape, names))})(?=[/)])") if names else None
    for path in re.findall(r'op_name="([^"]+)"', module):
        kind = re.sub(r"[\[(].*", "", path.rpartition("/")[2])
        op = OpTime(path, kind, listed=kind not in _UNLISTED)
        found = known.search(path) if known else None
        if not found:
            elsewhere.append(op)
        else:
            (backward if "transpose(" in path else forward)[found[1]].append(op)
    layers = {name: LayerTime(name, tuple(forward[name]), tuple(backward[name])) for name in names}
    return ByLayer(layers, tuple(elsewhere), ())


def begin_memory(device: str) -> None:
    """The peak of JAX's allocator cannot be forgotten: each variant has a process of its own."""


def gpu_memory(key: str) -> int:
    counted = jax.devices("gpu")[0].memory_stats() or {}
    field = {"current": "bytes_in_use", "peak": "peak_bytes_in_use"}[key]
    if field not in counted:
        raise RuntimeError("JAX does not count the memory of this device")
    return int(counted[field])

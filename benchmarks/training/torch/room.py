"""Torch's room: layers and steps run operation by operation; see `backends.Backend`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import keras
import numpy as np
import torch

from benchmarks.common.devices import chosen_of
from benchmarks.training import keras_devices
from benchmarks.training.operations import ByLayer, norms_of
from benchmarks.training.torch import profiles
from mbn_rewrite.device import cpu_name

name = "torch"
kerases = {"keras_3": keras}
errors: tuple[type[Exception], ...] = (RuntimeError,)
has_fused_operation = False
compiles_always = False

PROFILED_CALLS = 5


def versions() -> dict[str, str]:
    return {"torch": torch.__version__, "keras": keras.__version__}


# ------------------------------------------------------------------------ devices and tensors


def chosen(asked: str | None) -> str:
    return chosen_of(asked, torch.cuda.is_available(), "torch")


def name_of(device: str) -> str:
    return cpu_name() if device == "CPU" else torch.cuda.get_device_name(0)


def on(device: str) -> AbstractContextManager[Any]:
    # With a number, the weights that Keras makes on a CPU would be copies, which are no leaves.
    return keras_devices.on(device) if device == "GPU" else keras.device("cpu")


def synchronize(result: Any = None) -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def tensor(array: np.ndarray, dtype: str) -> torch.Tensor:
    return keras.ops.convert_to_tensor(array).to(getattr(torch, dtype))


def array(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


# ------------------------------------------------------------------------------ single layers


def functions(layer: Any | None, compiled: bool) -> dict[str, Any]:
    weights = [v.value for v in layer.trainable_weights] if layer else []

    def call(x: torch.Tensor) -> torch.Tensor:
        return layer(x, training=True) if layer else x.view_as(x)

    def forward(x: torch.Tensor, dy: torch.Tensor) -> list[torch.Tensor]:
        with torch.no_grad():
            return [call(x)]

    def both(x: torch.Tensor, dy: torch.Tensor) -> list[torch.Tensor]:
        x = x.detach().requires_grad_()
        y = call(x)
        return [y, *torch.autograd.grad(y, [x, *weights], dy)]

    return {f.__name__: f for f in (forward, both)}


def copying(compiled: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: x * 1.5


def ran(
    function: Any, x: torch.Tensor, dy: torch.Tensor, compiled: bool
) -> tuple[dict[str, int], dict[str, float]]:
    events = profiles.profiled(lambda: function(x, dy), PROFILED_CALLS)
    found = profiles.operations(events, PROFILED_CALLS)
    counts: dict[str, int] = {}
    milliseconds: dict[str, float] = {}
    for op in found:
        milliseconds[op.op] = milliseconds.get(op.op, 0.0) + sum(op.times) / PROFILED_CALLS
        if op.listed:
            counts[op.op] = counts.get(op.op, 0) + op.count
    return counts, milliseconds


# ------------------------------------------------------------------------------------ models


def inference(model: Any, images: torch.Tensor) -> Callable[[], torch.Tensor]:
    def run() -> torch.Tensor:
        with torch.inference_mode():
            return model(images, training=False)

    return run


def train_statistics(model: Any, images: torch.Tensor) -> None:
    with torch.no_grad():
        model(images, training=True)


# ----------------------------------------------------------------------------- training steps


def check_settings(xla: bool, profile: str | None) -> None:
    if xla:
        raise ValueError("no --xla on torch, which runs operation by operation here")


class _Step:
    """Trains as `fit` does; changes the variables themselves."""

    def __init__(self, model: Any, optimizer: Any, loss_of: Any) -> None:
        self._model, self._optimizer, self._loss_of = model, optimizer, loss_of

    def __call__(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        model, optimizer = self._model, self._optimizer
        logits = model(images, training=True)
        model.zero_grad()
        # A loss in 16 bits would overflow once it is scaled.
        loss = self._loss_of(labels, logits.float())
        optimizer.scale_loss(loss).backward()
        weights = model.trainable_variables
        with torch.no_grad():
            optimizer.apply([weight.value.grad for weight in weights], weights)
        return loss.detach()

    def take_variables(self) -> None:
        """They are what it works on."""

    def give_variables(self) -> None:
        """They are what it works on."""


def step(keras: Any, model: Any, optimizer: Any, loss_of: Any, xla: bool) -> _Step:
    return _Step(model, optimizer, loss_of)


def ran_in_step(
    step: _Step, model: Any, batch: Any, calls: int, xla: bool, directory: Any
) -> ByLayer:
    norms = norms_of(model)
    path = None
    if directory is not None:
        Path(directory).mkdir(parents=True, exist_ok=True)
        path = str(Path(directory) / "step.pt.trace.json")
    with profiles.named(norms):
        events = profiles.profiled(lambda: step(batch.images, batch.labels), calls, path)
    return profiles.by_layer(events, [norm.name for norm in norms], calls)


def begin_memory(device: str) -> None:
    if device == "GPU":
        torch.cuda.reset_peak_memory_stats()


def gpu_memory(key: str) -> int:
    of = {"current": torch.cuda.memory_allocated, "peak": torch.cuda.max_memory_allocated}
    return int(of[key]())

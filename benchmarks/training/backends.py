"""What a backend of Keras has to offer to the benchmarks of training, and which one is in use.

Each has a room, which alone imports it: how functions of tensors are made and timed, on which
device, and what really ran. Tables, checks and summaries are shared.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import cache
from typing import Any, Protocol, cast

import numpy as np

from benchmarks.training.operations import ByLayer

Tensor = Any
Function = Callable[[Tensor, Tensor], list[Tensor]]  # of x and dy

NAMES = ("tensorflow", "jax", "torch")


class Step(Protocol):
    """A training step of a model, bound to its variables."""

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """Trains once; the loss before, a scalar in float32."""

    def take_variables(self) -> None:
        """Has the next step begin from the variables of the model and the optimizer."""

    def give_variables(self) -> None:
        """Has the variables of the model and the optimizer be those after the last step."""


class Backend(Protocol):
    """A backend's room.

    Attributes:
        name: as Keras has it.
        kerases: the Kerases that run on it: name -> package.
        errors: what its operations raise.
        has_fused_operation: whether tf_keras's fused operation is there to compare with.
        compiles_always: whether XLA compiles all that runs, asked or not.
    """

    name: str
    kerases: Mapping[str, Any]
    errors: tuple[type[Exception], ...]
    has_fused_operation: bool
    compiles_always: bool

    def versions(self) -> dict[str, str]:
        """Packages that take part, with their versions."""

    # -- devices and tensors

    def chosen(self, asked: str | None) -> str:
        """CPU or GPU: what is asked for; if nothing is, a GPU if there is one.

        Raises:
            ValueError: a GPU is asked for, and there is none; or there is no such kind of device.
        """

    def name_of(self, device: str) -> str:
        """Name of the device, as its maker calls it."""

    def on(self, device: str) -> AbstractContextManager[Any]:
        """Context manager in which tensors, weights and operations are on a device."""

    def synchronize(self, result: Any = None) -> None:
        """Waits until a result is computed, or where that is all the device can tell, all."""

    def tensor(self, array: np.ndarray, dtype: str) -> Tensor:
        """An array as a tensor of a dtype."""

    def array(self, tensor: Tensor) -> np.ndarray:
        """A tensor as an array, of float32 where numpy lacks its dtype."""

    # -- single layers

    def functions(self, layer: Any | None, compiled: bool) -> dict[str, Function]:
        """Functions that run a layer in training, and update its moving statistics.

        "forward" gives y alone; "both" y, and the gradients of x and of the trainable weights.
        None stands for the identity.
        """

    def copying(self, compiled: bool) -> Callable[[Tensor], Any]:
        """A function that reads a tensor and writes one."""

    def ran(
        self, function: Function, x: Tensor, dy: Tensor, compiled: bool
    ) -> tuple[dict[str, int], dict[str, float]]:
        """What runs in a call: how often each kind of operation, and milliseconds of every kind.

        Plain arithmetic and what moves nothing is in the latter alone. What is compiled is listed
        by the instructions of the compiled module, which have no times.
        """

    # -- models

    def inference(self, model: Any, images: Tensor) -> Callable[[], Tensor]:
        """A function that calls a model at inference: compiled as a whole, but on torch.

        Args:
            model: of Keras 3, with one input and one output.
            images: what it is called with.
        """

    def train_statistics(self, model: Any, images: Tensor) -> None:
        """Calls a model in training once, which moves its statistics and trains no weight."""

    # -- training steps

    def check_settings(self, xla: bool, profile: str | None) -> None:
        """Raises ValueError where it has no such compilation, or no such profile."""

    def step(self, keras: Any, model: Any, optimizer: Any, loss_of: Any, xla: bool) -> Step:
        """A training step: forward, loss, backward and update.

        Args:
            keras: the package of the model.
            model: built; gives logits.
            optimizer: built for its trainable variables.
            loss_of: a loss of labels and logits.
            xla: compile the whole step with XLA.
        """

    def ran_in_step(
        self, step: Any, model: Any, batch: Any, calls: int, xla: bool, directory: Any
    ) -> ByLayer:
        """What ran for each BatchNormalization in a step, by some calls under a profiler.

        Args:
            step: of `step`.
            model: its model.
            batch: the images and labels to train with.
            calls: how many steps are profiled, where steps are.
            xla: whether the step is compiled with XLA.
            directory: where the profile is kept; None keeps it nowhere.
        """

    def begin_memory(self, device: str) -> None:
        """Sets up whatever takes memory once, and forgets peaks; of a GPU's allocator alone."""

    def gpu_memory(self, key: str) -> int:
        """Bytes that the GPU's allocator has given, "current" or "peak".

        Raises:
            RuntimeError: it does not count them.
        """


@cache
def in_use() -> Backend:
    """The room of the backend that KERAS_BACKEND names; TensorFlow's by default.

    Raises:
        ValueError: there is none for it, or its package is not installed.
    """
    name = os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    if name not in NAMES:
        raise ValueError(f"KERAS_BACKEND is {name}; these benchmarks run on {', '.join(NAMES)}")
    try:
        module = importlib.import_module(f"benchmarks.training.{name}.room")
    except ModuleNotFoundError as error:
        raise ValueError(f"KERAS_BACKEND is {name}, which cannot be imported: {error}") from error
    return cast(Backend, module)

"""A model with its optimizer, trained step by step as people write it; see `backends.Step`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from benchmarks.training.backends import Step, Tensor, in_use

MOMENTUM = 0.9
MOST_SKIPPED = 30  # steps that a loss scale of 2**15 may take to fall to what a network can bear


@dataclass(frozen=True)
class Batch:
    """Input of a step.

    Attributes:
        images: float32, [N, size, size, 3].
        labels: int32, [N].
    """

    images: Tensor
    labels: Tensor

    @classmethod
    def random(cls, examples: int, size: int, classes: int) -> Batch:
        """Noise, with labels at random; always the same."""
        rng = np.random.default_rng(0)
        images = rng.standard_normal((examples, size, size, 3), np.float32)
        labels = rng.integers(0, classes, examples, np.int32)
        return cls(in_use().tensor(images, "float32"), in_use().tensor(labels, "int32"))

    def rounded_otherwise(self, dtype: str) -> Batch:
        """The same batch, but for a unit in the last place of a dtype, up or down at random."""
        rng = np.random.default_rng(1)
        unit = float(ml_dtypes.finfo(dtype).eps)
        images = in_use().array(self.images)
        signs = rng.choice(np.array([-1, 1], np.float32), images.shape)
        return Batch(in_use().tensor(images * (1 + unit * signs), "float32"), self.labels)


@dataclass(frozen=True)
class Trainer:
    """A model with its optimizer.

    Attributes:
        model: of either Keras; gives logits.
        optimizer: built for it.
        step: trains once and returns the loss before.
        start: the values of the model's variables to begin from.
    """

    model: Any
    optimizer: Any
    step: Step
    start: tuple[np.ndarray, ...]

    def __call__(self, batch: Batch) -> Tensor:
        """One step; returns the loss before it, a scalar in float32."""
        return self.step(batch.images, batch.labels)

    def restart(self) -> None:
        """Gives the model its first weights again, and has the optimizer forget its steps.

        The scale of losses in float16 stays as it is.
        """
        for variable, value in zip(self.model.variables, self.start, strict=True):
            variable.assign(value)
        for variable in self._momenta:
            variable.assign(np.zeros(variable.shape, np.float32))
        self.step.take_variables()

    def losses(self, batch: Batch, steps: int) -> list[float]:
        """Losses of some steps from the first weights on."""
        self.restart()
        return [float(self(batch)) for _ in range(steps)]

    def settle(self, batch: Batch, change: float) -> float:
        """A learning rate at which a step begins to change the loss by a part of it.

        A new network can be so steep that at a usual rate rounding alone leads elsewhere within
        few steps. At this rate a gradient that is wrong shows, and one that is rounded does not.
        In float16, steps are taken until the loss scale lets one pass. Restarts.

        Raises:
            ValueError: it lets none pass, or the loss or its gradient is not finite.
        """
        self.restart()
        rate = float(self.optimizer.learning_rate.numpy())
        for _ in range(MOST_SKIPPED):
            loss = float(self(batch))
            self.step.give_variables()
            momenta = (v.numpy().astype(np.float64) for v in self._momenta)
            squares = sum(float(np.sum(np.square(momentum))) for momentum in momenta)
            if squares > 0:
                break
        self.restart()
        if not math.isfinite(loss + squares):
            raise ValueError(f"the first loss is {loss}, the square of its gradient {squares}")
        if squares == 0:
            raise ValueError(f"the loss scale let no gradient pass in {MOST_SKIPPED} steps")
        # The first momentum is the rate times the gradient; Nesterov's step is 1.9 times that.
        return change * loss * rate**2 / squares / (1 + MOMENTUM)

    def set_learning_rate(self, rate: float) -> None:
        """Has the steps to come take this learning rate."""
        self.step.give_variables()
        self.optimizer.learning_rate = rate
        self.step.take_variables()

    @property
    def updates(self) -> int:
        """Number of updates of the weights; less than there were steps if a loss overflowed."""
        self.step.give_variables()
        inner = getattr(self.optimizer, "inner_optimizer", self.optimizer)
        return int(inner.iterations.numpy())

    @property
    def _momenta(self) -> list[Any]:
        variables = self.optimizer.variables
        variables = variables() if callable(variables) else variables
        return [variable for variable in variables if len(variable.shape) > 0]


def trainer(keras: Any, model: Any, learning_rate: float = 1e-3, xla: bool = False) -> Trainer:
    """SGD with Nesterov momentum, on the cross-entropy of logits.

    Args:
        keras: the package of the model, tf_keras or keras.
        model: built; gives logits, of shape [N, classes].
        learning_rate: of SGD; may be set later.
        xla: compile the whole step with XLA.
    """
    optimizer = keras.optimizers.SGD(learning_rate, momentum=MOMENTUM, nesterov=True)
    if any(layer.compute_dtype == "float16" for layer in model.layers):
        optimizer = keras.mixed_precision.LossScaleOptimizer(optimizer)
    optimizer.build(model.trainable_variables)
    loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    step = in_use().step(keras, model, optimizer, loss_of, xla)
    start = tuple(variable.numpy() for variable in model.variables)
    return Trainer(model, optimizer, step, start)

"""One run: a variant, trained with one seed."""

from __future__ import annotations

import errno
import gc
import hashlib
import importlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from benchmarks.models.training_networks import check_variant
from mbn_rewrite.errors import cause_of, is_out_of_memory
from study import models
from study.errors import StudyError
from study.images import Data
from study.pipeline import Pipeline
from study.proof import Profiler, Steps
from study.recipes import KERAS, Recipe, learning_rate

_WARM = 2  # steps before those that are profiled: the first traces
_PROFILED = 10  # the profiler now and then misses an event, and times scatter
_QUANTILES = (0.1, 0.9)


@dataclass(frozen=True)
class Setting:
    """Setting that all runs of a study have in common.

    Attributes:
        recipe: what is trained.
        keras: "tf_keras" or "keras_3".
        dtype: a policy of Keras.
        width: what the channels of convolutions are multiplied by.
        epochs: passes over the training images.
        batch: images of a step on one device.
        replicas: devices.
    """

    recipe: Recipe
    keras: str
    dtype: str
    width: float
    epochs: int
    batch: int
    replicas: int

    @property
    def images(self) -> int:
        """Images of a step, on all devices together."""
        return self.batch * self.replicas


def run(
    setting: Setting,
    data: Data,
    variant: str,
    seed: int,
    check: Callable[[dict[str, int]], None] = lambda ops: None,
    after_epoch: Callable[[dict[str, Any]], None] = lambda record: None,
    strategy: Any = None,
) -> dict[str, Any]:
    """Trains a variant.

    Args:
        setting: what all runs have in common.
        data: the images.
        variant: see `training_networks`.
        seed: of the initial weights, the order of images and their augmentations.
        check: is given the operations of BatchNormalization as soon as they are known.
        after_epoch: is given what is recorded of each epoch.
        strategy: of tf.distribute.

    Returns:
        What is recorded of the run, for JSON.

    Raises:
        StudyError: the profiler saw no operation, no layer has the stride, a batch has more images
            than there are, or TensorFlow stops.
        Exception: what `check` and `after_epoch` raise.
    """
    keras = importlib.import_module(KERAS[setting.keras])
    pipeline = Pipeline(setting.recipe, len(data.classes), setting.images)
    if not pipeline.steps(data.train):
        raise StudyError(
            f"a step takes {setting.images} images, and there are {data.train.size} for training. "
            "--batch makes it smaller"
        )
    keras.mixed_precision.set_global_policy(setting.dtype)
    try:
        with (strategy or tf.distribute.get_strategy()).scope():
            made = [_compiled(keras, setting, len(data.classes), variant, seed)]
        _check_strides(made[0], variant)
        # Popped, so that nothing here keeps the model when it is trained.
        return _trained(
            made.pop(), setting, pipeline, data, seed, _watch(keras), check, after_epoch
        )
    except (MemoryError, tf.errors.OpError) as error:
        if "No space left on device" in str(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        if is_out_of_memory(error):
            raise StudyError(f"{variant} is out of memory; --batch makes a step smaller") from error
        raise StudyError(
            f"{variant}, seed {seed}, stopped: {cause_of(error)} Finished runs are kept, and the "
            "same command goes on from there"
        ) from error
    finally:
        keras.mixed_precision.set_global_policy("float32")
        keras.backend.clear_session()
        gc.collect()


def _check_strides(model: Any, variant: str) -> None:
    """Raises StudyError where a stride was asked for and no layer has one."""
    _, asked = check_variant(variant)
    used = [s for s in map(models.strides, models.norms(model)) if s is not None]
    if asked not in (None, 1) and used and all(max(strides) == 1 for strides in used):
        raise StudyError(
            f"{variant} is no result: every layer has lowered its stride to 1, since its input is "
            "small. Larger images are needed"
        )


def _compiled(keras: Any, setting: Setting, classes: int, variant: str, seed: int) -> Any:
    recipe = setting.recipe
    model = models.made(keras, recipe, variant, classes, setting.width, seed)
    model.compile(
        optimizer=keras.optimizers.SGD(0.0, momentum=recipe.momentum, nesterov=True),
        loss=keras.losses.CategoricalCrossentropy(
            from_logits=True, label_smoothing=recipe.label_smoothing
        ),
        metrics=["accuracy"],
        jit_compile=False,
    )
    return model


def _trained(
    model: Any,
    setting: Setting,
    pipeline: Pipeline,
    data: Data,
    seed: int,
    watch_class: type,
    check: Callable[[dict[str, int]], None],
    after_epoch: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    norms = models.norms(model)
    started = time.perf_counter()
    record: dict[str, Any] = {
        "parameters": models.parameters(model),
        "initial_weights": models.digest(model),
        "first_batch": _digest_of_first(pipeline.training(data.train, seed, 0)),
        "layers": [
            {
                "name": layer.name,
                "kind": type(layer).__name__,
                "shape": list(layer.input.shape[1:]),
                "strides": models.strides(layer),
            }
            for layer in norms
        ],
        "epochs": [],
    }
    testing = pipeline.testing(data.test)
    layers = {norm.name: max(models.strides(norm) or [1]) > 1 for norm in norms}
    watch = watch_class(setting, pipeline.steps(data.train), layers, check)
    try:
        for epoch in range(setting.epochs):
            training = pipeline.training(data.train, seed, epoch)
            record["epochs"].append(_epoch(model, training, testing, watch) | _norms(norms))
            after_epoch(record["epochs"][-1])
    finally:
        watch.profiler.abort()
    record["operations"] = watch.steps.operations()
    record["milliseconds"] = watch.steps.milliseconds()
    record["seconds"] = time.perf_counter() - started
    return record


def _epoch(model: Any, training: Any, testing: Any, watch: Any) -> dict[str, Any]:
    start = time.perf_counter()
    history = model.fit(training, epochs=1, shuffle=False, verbose=0, callbacks=[watch]).history
    trained = time.perf_counter()
    test_loss, test_accuracy = model.evaluate(testing, verbose=0)
    return {
        "loss": float(history["loss"][0]),
        "accuracy": float(history["accuracy"][0]),
        "test_loss": float(test_loss),
        "test_accuracy": float(test_accuracy),
        "seconds": trained - start,
        "test_seconds": time.perf_counter() - trained,
    }


def _norms(norms: list[Any]) -> dict[str, Any]:
    """The statistics of the first, the middle and the last: mean and quantiles over channels."""
    if not norms:
        return {"norms": {}}
    chosen = {"first": norms[0], "middle": norms[len(norms) // 2], "last": norms[-1]}
    return {
        "norms": {
            place: {
                name: [float(np.mean(values)), *map(float, np.quantile(values, _QUANTILES))]
                for name, values in models.statistics(layer).items()
            }
            for place, layer in chosen.items()
        }
    }


def _digest_of_first(training: Any) -> str:
    """Changes with what the first step sees."""
    images, labels = next(iter(training))
    return hashlib.sha256(images.numpy().tobytes() + labels.numpy().tobytes()).hexdigest()[:16]


def _watch(keras: Any) -> type:
    """The class of what is called between steps, for one Keras."""

    class Watch(keras.callbacks.Callback):
        """Sets the learning rate, and has some steps of the first epoch profiled."""

        def __init__(
            self,
            setting: Setting,
            steps_per_epoch: int,
            layers: dict[str, bool],
            check: Callable[[dict[str, int]], None],
        ) -> None:
            super().__init__()
            self.profiler = Profiler(layers)
            self.steps = Steps(())
            self._setting = setting
            self._layers = layers
            self._check = check
            self._all = steps_per_epoch * setting.epochs
            self._first = min(_WARM, steps_per_epoch - 1)
            self._last = min(self._first + _PROFILED, steps_per_epoch) - 1
            self._step = 0

        def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
            done = (self._step + 0.5) / self._all
            setting = self._setting
            rate = learning_rate(setting.recipe, done, setting.images)
            self.model.optimizer.learning_rate = rate
            if self._step == self._first:
                self.profiler.start()

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            if self._step == self._last:
                if tf.config.list_logical_devices("GPU"):
                    tf.test.experimental.sync_devices()
                self.steps = self.profiler.stop(self._last - self._first + 1)
                if self._layers and not self.steps.operations():
                    raise StudyError("the profiler saw no operation of BatchNormalization")
                self._check(self.steps.operations())
            self._step += 1

    return Watch

"""Calls of TensorFlow functions and models of any kind, and random tensors for them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from logging import LogRecord
from typing import Any, cast

import numpy as np
import tensorflow as tf
from tensorflow.python.eager.context import eager_mode

from mbn_rewrite.device import processor
from mbn_rewrite.errors import RewriteError
from mbn_rewrite.frontends.sample_inputs import (
    GIVE_REAL_ONES,
    InputRecipe,
    random_array,
    uncallable,
)
from mbn_rewrite.options import RunConfig


@contextmanager
def without_saying_where() -> Iterator[None]:
    """Context manager that keeps TensorFlow from logging where it writes a SavedModel."""

    def says_more(record: LogRecord) -> bool:
        return not str(record.msg).startswith("Assets written to")

    logger = tf.get_logger()
    logger.addFilter(says_more)
    try:
        yield
    finally:
        logger.removeFilter(says_more)


def random_tensor(spec: Any, rng: np.random.Generator, recipe: InputRecipe) -> Any:
    """A tensor of a spec's shape and dtype.

    Raises:
        RewriteError: it cannot be made up.
    """
    dtype = tf.as_dtype(spec.dtype)
    kind = getattr(spec, "type_spec", spec)
    if isinstance(kind, (tf.SparseTensorSpec, tf.RaggedTensorSpec)) or spec.shape.rank is None:
        what = " of unknown rank" if spec.shape.rank is None else ", not dense"
        raise RewriteError(f"cannot make up inputs of dtype {dtype.name}{what}. {GIVE_REAL_ONES}")
    array = random_array(tuple(spec.shape), dtype.name, rng, recipe)
    return tf.constant(array, tf.string) if dtype == tf.string else tf.cast(array, dtype)


def called(function: Callable[[Any], Any], inputs: Any, who: str) -> list[np.ndarray]:
    """The outputs of a function of tensors, as a flat list; run by XLA where nothing else can.

    TensorFlow's own kernels take channels-first layouts on GPUs only; XLA takes them
    everywhere, so it is tried where they fail.

    Raises:
        RewriteError: the function cannot be called with these inputs.
    """
    try:
        with _full_products():
            return _run(function, inputs)
    except Exception as error:
        failed = uncallable(who, error)
        failed.__cause__ = error
        if xla_may_run(failed):
            with suppress(RewriteError):
                return compiled(function, inputs, who)
        raise failed from error


def xla_may_run(error: RewriteError) -> bool:
    """Whether XLA might run a function that failed because no kernel takes its layout.

    If the inputs were refused it must not: XLA does not check them.
    """
    cause = error.__cause__
    lacking = isinstance(cause, tf.errors.UnimplementedError) or (
        isinstance(cause, tf.errors.InvalidArgumentError)
        and re.search(r"support|implement|N[CDHW]{3,4}\b", str(cause))
    )
    return bool(lacking) and not tf.config.get_visible_devices("GPU")


def compiled(function: Callable[[Any], Any], inputs: Any, who: str) -> list[np.ndarray]:
    """The outputs of a function as in `called`, run by XLA alone."""
    try:
        with _full_products():
            return _run(tf.function(function, jit_compile=True, autograph=False), inputs)
    except Exception as error:
        raise uncallable(who, error) from error


def plain(function: Callable[[Any], Any], inputs: Any, who: str) -> list[np.ndarray]:
    """The outputs of a function as in `called`, run without XLA."""
    try:
        with _full_products():
            return _run(function, inputs)
    except Exception as error:
        raise uncallable(who, error) from error


@contextmanager
def _full_products() -> Iterator[None]:
    """Context manager that has GPUs multiply float32 in full precision.

    By default they round factors to 11 bits (TensorFloat-32), so that a correct model may differ
    from its original as much as a wrong one.
    """
    before = tf.config.experimental.tensor_float_32_execution_enabled()
    tf.config.experimental.enable_tensor_float_32_execution(False)
    try:
        yield
    finally:
        tf.config.experimental.enable_tensor_float_32_execution(before)


def _run(function: Callable[[Any], Any], inputs: Any) -> list[np.ndarray]:
    outputs = tf.nest.flatten(function(inputs), expand_composites=True)
    return [np.asarray(output) for output in outputs if output is not None]


def runner(
    function: Callable[[Any], Any], inputs: Any, run_config: RunConfig
) -> Callable[[], list[np.ndarray]]:
    """A callable that runs a function of tensors as configured and returns its flat outputs.

    If the function cannot be run, the first call raises RewriteError.
    """
    # A function of one argument, whatever defaults the given one has.
    traced = tf.function(
        lambda data: function(data), jit_compile=run_config.jit_compile or None, autograph=False
    )

    @cache
    def concrete() -> Callable[[Any], Any]:  # so that TensorFlow sees no retracing
        return cast("Callable[[Any], Any]", traced.get_concrete_function(inputs))

    def run() -> list[np.ndarray]:
        try:
            return _run(concrete(), inputs)
        except Exception as error:
            raise uncallable("it", error) from error

    return run


@contextmanager
def set_up(run_config: RunConfig) -> Iterator[None]:
    """Context manager that has functions run with the configured mixed precision.

    Raises:
        RewriteError: TensorFlow has none of that dtype on this machine.
    """
    if run_config.dtype is None:
        yield
        return
    on_gpu = bool(tf.config.get_visible_devices("GPU"))
    if on_gpu != (run_config.dtype == "float16"):
        where, other = ("GPUs", "float16") if on_gpu else ("CPUs", "bfloat16")
        raise RewriteError(
            f"TensorFlow's automatic mixed precision takes {other} on {where}, not "
            f"{run_config.dtype}. Build the model with the dtype policy that it will have, "
            "and give no dtype here"
        )
    option = "auto_mixed_precision" if on_gpu else "auto_mixed_precision_onednn_bfloat16"
    before = tf.config.optimizer.get_experimental_options().get(option, False)
    tf.config.optimizer.set_experimental_options({option: True})
    try:
        yield
    finally:
        tf.config.optimizer.set_experimental_options({option: before})


@contextmanager
def outside_strategies() -> Iterator[None]:
    """Context manager that leaves the scope of any distribution strategy of the caller.

    Within one, variables that are created or loaded are mirrored on several devices, and functions
    cannot be saved with those.
    """
    if not tf.distribute.has_strategy():
        yield
        return
    # The scope belongs to the default graph, even where nothing is built in that.
    with tf.Graph().as_default(), eager_mode(), tf.device(None):
        yield


def device() -> str:
    """Name of the device that functions run on by default."""
    gpus = tf.config.get_visible_devices("GPU")
    if not gpus:
        return processor()
    name = tf.config.experimental.get_device_details(gpus[0]).get("device_name", "GPU")
    return f"{name}" if len(gpus) == 1 else f"{name} (1 of {len(gpus)})"


def as_specified(name: str, array: Any, spec: Any) -> Any:
    """An array of the caller as a tensor of the dtype that an input takes.

    Raises:
        RewriteError: it has another shape, or is of another kind.
    """
    array = np.asarray(array)
    text, complex_numbers = array.dtype.kind in "SUO", array.dtype.kind == "c"
    if text != (spec.dtype == tf.string) or (complex_numbers and not spec.dtype.is_complex):
        raise RewriteError(f"input '{name}' is of {array.dtype}; {spec.dtype.name} is needed")
    if not spec.shape.is_compatible_with(array.shape):
        raise RewriteError(f"input '{name}' has the shape {array.shape}; {spec.shape} is needed")
    tensor = tf.constant(array)
    return tensor if text else tf.cast(tensor, spec.dtype)

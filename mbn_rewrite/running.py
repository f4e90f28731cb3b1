"""Calling models of any kind, and making up inputs for them."""

from __future__ import annotations

import ctypes
import gc
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from mbn_rewrite.errors import RewriteError, cause_of

# How many examples are made up: fewer where one is as large as a picture.
_BATCH, _LARGE_BATCH, _LARGE = 4, 2, 50_000
GIVE_REAL_ONES = "Give real ones (inputs=... in Python, --verify_inputs on the command line)"


@dataclass(frozen=True)
class Made:
    """How inputs are made up.

    Attributes:
        open_size: what stands for a size that the model leaves open.
        top: floats are uniform from 0 to this (pixels), or normally distributed if None.
        words: integers are less than this.
        text: makes strings, or None where they cannot be made up.
    """

    open_size: int = 64
    top: float | None = None
    words: int = 2
    text: Callable[[np.random.Generator], bytes] | None = None


def give_back_memory() -> None:
    """Gives freed memory back to the system, which the allocator otherwise keeps."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, others do not
    if trim is not None:
        trim(0)


def random_tensor(spec: Any, rng: np.random.Generator, made: Made) -> Any:
    """A tensor of a spec's shape and dtype.

    Raises:
        RewriteError: it cannot be made up.
    """
    dtype = tf.as_dtype(spec.dtype)
    kind = getattr(spec, "type_spec", spec)
    dense = not isinstance(kind, (tf.SparseTensorSpec, tf.RaggedTensorSpec))
    texts = made.text is not None and dtype == tf.string
    known = dtype.is_floating or dtype.is_integer or dtype.is_bool or texts
    if not dense or not known or spec.shape.rank is None:
        what = "" if not dense else " of unknown rank" if spec.shape.rank is None else ""
        raise RewriteError(
            f"cannot make up inputs of dtype {dtype.name}{what}{'' if dense else ', not dense'}. "
            f"{GIVE_REAL_ONES}"
        )
    shape = [made.open_size if size is None else size for size in spec.shape]
    if shape and spec.shape[0] is None:
        shape[0] = _BATCH if math.prod(shape[1:]) < _LARGE else _LARGE_BATCH
    if made.text is not None and texts:
        strings = [made.text(rng) for _ in range(int(np.prod(shape)))]
        return tf.reshape(tf.constant(strings, tf.string), shape)
    if not dtype.is_floating:
        limit = 2 if dtype.is_bool else made.words
        return tf.cast(rng.integers(0, limit, shape), dtype)
    top = made.top
    values = rng.standard_normal(shape) if top is None else rng.uniform(0, top, shape)
    return tf.cast(values, dtype)


def called(function: Callable[[Any], Any], inputs: Any, who: str) -> list[np.ndarray]:
    """What a function of tensors gives, as a flat list; by XLA where nothing else can.

    TensorFlow's own kernels take channels-first layouts on GPUs only; XLA takes them
    everywhere, so it is tried where they fail.

    Raises:
        RewriteError: the function cannot be called with these inputs.
    """
    try:
        return _run(function, inputs)
    except (tf.errors.UnimplementedError, tf.errors.InvalidArgumentError) as error:
        if tf.config.list_physical_devices("GPU"):
            raise uncallable(who, error) from error
        try:
            return compiled(function, inputs, who)
        except RewriteError:
            raise uncallable(who, error) from error
    except Exception as error:
        raise uncallable(who, error) from error


def compiled(function: Callable[[Any], Any], inputs: Any, who: str) -> list[np.ndarray]:
    """As `called`, by XLA alone."""
    try:
        return _run(tf.function(function, jit_compile=True, autograph=False), inputs)
    except Exception as error:
        raise uncallable(who, error) from error


def plain(function: Callable[[Any], Any], inputs: Any, who: str) -> list[np.ndarray]:
    """As `called`, without XLA."""
    try:
        return _run(function, inputs)
    except Exception as error:
        raise uncallable(who, error) from error


def _run(function: Callable[[Any], Any], inputs: Any) -> list[np.ndarray]:
    outputs = tf.nest.flatten(function(inputs), expand_composites=True)
    return [np.asarray(output) for output in outputs if output is not None]


def uncallable(who: str, error: Exception) -> RewriteError:
    """What to raise where a model cannot be called."""
    return RewriteError(
        f"{who} cannot be called with these inputs: {cause_of(error)} Give inputs that it "
        "takes (inputs=... in Python, --verify_inputs on the command line)"
    )


def as_specified(name: str, array: Any, spec: Any) -> Any:
    """An array of the caller as a tensor that an input takes.

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

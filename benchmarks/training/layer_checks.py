"""Checks of single layers before they are timed: all outputs, and the operations that ran."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import tensorflow as tf
from absl import flags

from benchmarks.common.console import progress
from benchmarks.common.failures import described
from benchmarks.training.layer_variants import EPSILON, Candidate, Data
from benchmarks.training.profiles import UNLISTED, profiled
from mbn_rewrite.comparison import TOLERANCES
from mbn_rewrite.errors import RewriteError

FLAGS = flags.FLAGS  # those of the program, layer.py

PROFILED_CALLS = 5  # the profiler now and then misses an event
# Instructions of XLA that compute nothing.
FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast")


def reference(data: Data, used: tuple[int, ...]) -> list[np.ndarray]:
    """y, dx, dgamma and dbeta in float64 by a sample with these strides; y and dx of no layer."""
    x, dy = (tensor.numpy().astype(np.float64) for tensor in (data.x, data.dy))
    if not used:
        return [x, dy]
    gamma, beta = (vector.astype(np.float64) for vector in (data.gamma, data.beta))
    places = np.s_[:, :: used[0], :: used[1]]
    sample = x[places]
    count = sample.size // sample.shape[-1]
    mean, variance = sample.mean((0, 1, 2)), sample.var((0, 1, 2))
    inverse = 1 / np.sqrt(variance + EPSILON)
    xhat = np.subtract(x, mean, out=x)
    xhat *= inverse
    dbeta, dgamma = dy.sum((0, 1, 2)), np.einsum("nhwc,nhwc->c", dy, xhat)
    dx = np.multiply(dy, gamma * inverse, out=dy)
    dx[places] -= gamma * inverse / count * (dbeta + xhat[places] * dgamma)
    return [xhat * gamma + beta, dx, dgamma, dbeta]


def check(candidates: Iterable[Candidate], data: Data) -> None:
    """Compares all outputs with references; of these one at a time is held."""
    ordered = sorted(candidates, key=lambda one: one.strides)
    for used, group in itertools.groupby(ordered, key=lambda one: one.strides):
        wanted = reference(data, used)
        for one in group:
            guarded(one, lambda one=one, wanted=wanted: _check(one, data, wanted))


def _check(one: Candidate, data: Data, wanted: Sequence[np.ndarray]) -> None:
    for name, function in one.functions.items():
        one.concrete[name] = function.get_concrete_function(data.x, data.dy)
    (y,), (*outputs,) = (one.concrete[name](data.x, data.dy) for name in ("forward", "both"))
    pairs = [(y, wanted[0]), *zip(outputs, wanted, strict=True)]
    one.error = max(relative_error(got.numpy(), want) for got, want in pairs)
    if not one.error <= TOLERANCES[FLAGS.dtype]:  # true for NaN
        one.failure = f"WRONG {one.error:.1e}"


def relative_error(got: np.ndarray, want: np.ndarray) -> float:
    """The largest of an element, by its size plus the root mean square of all."""
    typical = math.sqrt(np.vdot(want, want) / want.size)
    difference = np.abs(got.astype(np.float64).reshape(want.shape) - want)
    scale = np.abs(want)
    scale += typical
    return float(np.max(np.divide(difference, scale, out=difference)))


def guarded(one: Candidate, call: Callable[[], object]) -> None:
    """Calls, unless something has failed before; what fails is noted."""
    if one.failure:
        return
    try:
        call()
    except (MemoryError, tf.errors.OpError, RewriteError) as error:
        one.failure = described(error)
        progress(f"  {one.variant.label}: {one.failure}")


def note_operations(candidates: Sequence[Candidate], data: Data) -> None:
    """Notes what really runs, and which strided layer runs just what BatchNormalization does."""
    for one in candidates:
        find = _note_compiled if one.variant.compiled else _note_profiled
        guarded(one, lambda one=one, find=find: find(one, data))
    stock = [one.ops for one in candidates if one.variant.layer == "BatchNormalization"]
    for one in candidates:
        sampled = one.variant.stride is not None and max(one.strides) > 1
        if sampled and not one.failure and one.ops in stock:
            one.failure = "RUNS WHAT BN RUNS"


def _note_profiled(one: Candidate, data: Data) -> None:
    """Operations by TensorFlow's profiler; on a GPU, too, those that the host starts."""
    ran = profiled(lambda: one.concrete["both"](data.x, data.dy), PROFILED_CALLS, device=False)
    milliseconds: dict[str, list[float]] = {}
    for op in ran:
        milliseconds.setdefault(op.op, []).extend(op.times)
    for name, times in sorted(milliseconds.items()):
        one.op_milliseconds[name] = sum(times) / PROFILED_CALLS
        if name not in UNLISTED:
            one.ops[name] = round(len(times) / PROFILED_CALLS)


def _note_compiled(one: Candidate, data: Data) -> None:
    """Instructions that XLA made, by their names, which say what is fused."""
    module = one.functions["both"].experimental_get_compiler_ir(data.x, data.dy)(
        stage="optimized_hlo"
    )
    entry = module[module.index("\nENTRY") :]
    # %name.1 = f32[64]{0} fusion(..., where a type may be a tuple of types.
    lines = re.findall(r"^\s+(?:ROOT )?%?([\w.-]+) = .*?[\])}] ([\w-]+)\(", entry, re.MULTILINE)
    names = [re.sub(r"[.\d]+$", "", name) for name, kind in lines if kind not in FREE]
    one.ops = dict(sorted(Counter(names).items()))

"""Checks of single layers before they are timed: all outputs, and the operations that ran."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from absl import flags

from benchmarks.common.console import progress
from benchmarks.common.failures import described
from benchmarks.training.backends import in_use
from benchmarks.training.layer_variants import EPSILON, Candidate, Data
from mbn_rewrite.comparison import TOLERANCES
from mbn_rewrite.errors import RewriteError

FLAGS = flags.FLAGS  # those of the program, layer.py


def reference(data: Data, used: tuple[int, ...]) -> list[np.ndarray]:
    """y, dx, dgamma and dbeta in float64 by a sample with these strides; y and dx of no layer."""
    x, dy = (in_use().array(tensor).astype(np.float64) for tensor in (data.x, data.dy))
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
    (y,), (*outputs,) = (one.functions[name](data.x, data.dy) for name in ("forward", "both"))
    pairs = [(y, wanted[0]), *zip(outputs, wanted, strict=True)]
    one.error = max(relative_error(in_use().array(got), want) for got, want in pairs)
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
    except (MemoryError, RewriteError, *in_use().errors) as error:
        one.failure = described(error)
        progress(f"  {one.variant.label}: {one.failure}")


def note_operations(candidates: Sequence[Candidate], data: Data) -> None:
    """Notes what really runs, and which strided layer runs just what BatchNormalization does."""
    for one in candidates:
        guarded(one, lambda one=one: _note(one, data))
    stock = [one.ops for one in candidates if one.variant.layer == "BatchNormalization"]
    for one in candidates:
        sampled = one.variant.stride is not None and max(one.strides) > 1
        if sampled and not one.failure and one.ops in stock:
            one.failure = "RUNS WHAT BN RUNS"


def _note(one: Candidate, data: Data) -> None:
    both = one.functions["both"]
    one.ops, one.op_milliseconds = in_use().ran(both, data.x, data.dy, one.variant.compiled)

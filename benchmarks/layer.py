#!/usr/bin/env python3
"""BatchNormalization layers in training, timed in turn: forward, and forward and backward.

    python benchmarks/layer.py [FLAGS]

Every layer runs as a concrete tf.function of x and dy with training=True. Forward gives y;
forward and backward gives y and the gradients of x and of the trainable weights. Both update the
moving statistics, as a training step does. For each shape of activations there are:

    tf_keras, keras_3 BatchNormalization    those of the two Kerases; not compiled by XLA, that of
                                            tf_keras runs the fused operation
    Strided, Modified                       this library's layers, for each of the two
    no BN                                   an identity in their place: what the harness costs

With --xla all are compiled by XLA, and tf_keras' fused operation is there not compiled as well.

Before it is timed, every y, dx, dgamma and dbeta is compared with the formulas in float64, by
the layer's own sample.

Columns:
    strides     (rows, columns) in use: a stride is lowered where a shape is too small for it
    ms          median time of a call
    GB/s        bytes that ideal kernels would move, by that time: 3 passes over x forward and 5
                backward, 2 + q and 4 + q by a sample of the fraction q. Above each table is that
                of a copy in the same run, 2 passes. A tensor that fits the caches beats memory
    x fused     times as fast as tf_keras' fused operation, not compiled
    x own       times as fast as the BatchNormalization of the same Keras, compiled if this is
    bound       what x fused would be if all kernels were ideal: 8 / (6 + 2q)
    error       the largest error of an output element, by that element's size plus the root mean
                square of its tensor, or what went wrong

"Operations" lists what really ran forward and backward: without XLA, the kernels seen by
TensorFlow's profiler, less plain arithmetic and what moves no data (the JSON file has the times of
all); with XLA, the instructions of the compiled module.

"Summary" is over shapes: geometric means are of those whose strides were not lowered, the worst
of all. None of its figures is enforced.

Examples:
    python benchmarks/layer.py
    python benchmarks/layer.py --shapes=56x56x64,56x56x256 --strides=4,16x1 --keras=tf_keras
    python benchmarks/layer.py --xla --repeats=10 --json=layer.json
    python benchmarks/layer.py --device=GPU --dtype=float16 --batch=256 --calls=10

Exit codes:
    0  all outputs are right, whatever the times are
    1  an output is wrong; a layer with a stride runs just what BatchNormalization does; a row ran
       out of memory or failed; or a flag is wrong
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# The repository's own package comes first, so that the tool runs without installation.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["KERAS_BACKEND"] = "tensorflow"

from absl import app, flags

from mbn_rewrite.cli.quiet import import_tensorflow

import_tensorflow()

import keras
import numpy as np
import tensorflow as tf
import tf_keras

from benchmarks import devices
from benchmarks.failures import described
from benchmarks.profiles import UNLISTED, profiled
from benchmarks.timing import interleaved, median_ratio, synchronize
from mbn_rewrite.comparison import TOLERANCES
from mbn_rewrite.errors import RewriteError
from mbn_rewrite.frontends.keras3 import training_layers as keras_layers
from mbn_rewrite.frontends.tf_keras import training_layers as tf_keras_layers
from mbn_rewrite.tables import table
from mbn_rewrite.training import strides

# The activations of ResNet-50 at 224 pixels that are normalised, but for the first.
SHAPES = (
    *("56x56x64", "56x56x256", "28x28x128", "28x28x512"),
    *("14x14x256", "14x14x1024", "7x7x512", "7x7x2048"),
)
STRIDES = ("1", "2", "4", "8", "8x1", "16x1")
MODIFIED_STRIDE = 4
KERAS = {"tf_keras": (tf_keras, tf_keras_layers), "keras_3": (keras, keras_layers)}
DTYPES = ("float32", "float16", "bfloat16")
EPSILON = 1e-3  # that of both Kerases
COPY = "copy"

PROFILED_CALLS = 5  # the profiler now and then misses an event
# Instructions of XLA that compute nothing.
FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast")

FLAGS = flags.FLAGS
flags.DEFINE_list("shapes", list(SHAPES), "Of activations, as HEIGHTxWIDTHxCHANNELS.")
flags.DEFINE_integer("batch", 32, "Examples in a batch.", lower_bound=1)
flags.DEFINE_string("dtype", "float32", f"Of x, y and dy: {', '.join(DTYPES)}.")
flags.DEFINE_list("strides", list(STRIDES), "Of the strided layers, such as 4, or 16x1 for rows.")
flags.DEFINE_list("keras", list(KERAS), f"Whose layers: {', '.join(KERAS)}.")
flags.DEFINE_bool("xla", False, "Compile with XLA.")
flags.DEFINE_string("device", None, "CPU or GPU; by default a GPU if there is one.")
flags.DEFINE_integer("repeats", 30, "How often each is timed.", lower_bound=1)
flags.DEFINE_integer(
    "calls", 1, "Calls in a row that are timed as one; on a GPU, several hide the launch.", 1
)
flags.DEFINE_string("json", None, "Write the results to this file, as JSON, after each shape.")


# ------------------------------------------------------------------------- what is compared


@dataclass(frozen=True)
class Variant:
    """A layer of one Keras.

    Attributes:
        keras: whose it is, or "" for no layer at all.
        layer: the name of its class.
        stride: its stride, or None for what has none.
        compiled: whether XLA compiles it.
    """

    keras: str = ""
    layer: str = "no BN"
    stride: strides.Stride | None = None
    compiled: bool = False

    @property
    def label(self) -> str:
        """Its name in tables."""
        name = f"{self.keras} {self.layer.replace('BatchNormalization', '') or 'BN'}".strip()
        if self.stride is not None:
            name += f" {_stride_text(self.stride)}"
        return name if self.compiled == FLAGS.xla else f"{name}, fused op"


@dataclass
class Candidate:
    """A variant for one shape.

    Attributes:
        variant: which.
        strides: those in use, (1, 1) for all positions, () for no layer.
        lowered: whether they are less than what was asked for.
        functions: "forward" and "both", as tf.functions.
        concrete: the same for x and dy, once traced.
        ops: how often each operation ran forward and backward.
        op_milliseconds: how long all operations ran, by kind, in a call under the profiler.
        error: of the outputs.
        failure: what went wrong, or "".
    """

    variant: Variant
    strides: tuple[int, ...]
    lowered: bool
    functions: dict[str, Any]
    concrete: dict[str, Any] = field(default_factory=dict)
    ops: dict[str, int] = field(default_factory=dict)
    op_milliseconds: dict[str, float] = field(default_factory=dict)
    error: float | None = None
    failure: str = ""


@dataclass(frozen=True)
class Data:
    """What all variants of a shape are given."""

    x: tf.Tensor
    dy: tf.Tensor
    gamma: np.ndarray
    beta: np.ndarray

    @classmethod
    def of(cls, shape: Sequence[int]) -> Data:
        """Made-up activations.

        The gradient of the output goes with the input, so that what is to be taken off in the
        sample is as large as the rest, and cannot be missing unseen.
        """
        rng = np.random.default_rng(0)
        channels = shape[-1]
        size = (FLAGS.batch, *shape)
        noise = rng.standard_normal(size, np.float32)
        scale = rng.uniform(0.5, 2, channels).astype(np.float32)
        x = noise * scale + rng.standard_normal(channels, np.float32)
        dy = rng.standard_normal(size, np.float32) + 0.25 + 0.25 * noise
        gamma = rng.uniform(0.5, 1.5, channels).astype(np.float32)
        beta = rng.standard_normal(channels, np.float32)
        return cls(tf.cast(x, FLAGS.dtype), tf.cast(dy, FLAGS.dtype), gamma, beta)


def variants() -> list[Variant]:
    """All that is compared; the first is what the others are compared with."""
    fused = Variant("tf_keras", "BatchNormalization")
    result = [fused]
    for name in FLAGS.keras:
        result.append(Variant(name, "BatchNormalization", None, FLAGS.xla))
        result += [
            Variant(name, "StridedBatchNormalization", _stride(text), FLAGS.xla)
            for text in FLAGS.strides
        ]
        result.append(Variant(name, "ModifiedBatchNormalization", MODIFIED_STRIDE, FLAGS.xla))
    return list(dict.fromkeys([*result, Variant(compiled=FLAGS.xla)]))


def candidate(variant: Variant, data: Data) -> Candidate:
    """The variant's functions, with weights of their own."""
    if not variant.keras:
        return Candidate(variant, (), False, _functions(tf.identity, [], variant.compiled))
    stock, own = KERAS[variant.keras]
    # Weights stay in float32, as in training.
    options: dict[str, Any] = {"epsilon": EPSILON, "dtype": FLAGS.dtype}
    if FLAGS.dtype != "float32":
        options["dtype"] = f"mixed_{FLAGS.dtype}"
    if variant.stride is None:
        layer, asked, used = stock.layers.BatchNormalization(**options), (1, 1), (1, 1)
        layer.build(data.x.shape)
    else:
        layer = getattr(own, variant.layer)(variant.stride, **options)
        layer.build(data.x.shape)
        asked, used = strides.along_axes(variant.stride, 2), layer.strides
    for weight, value in zip(layer.trainable_weights, (data.gamma, data.beta), strict=True):
        weight.assign(np.reshape(value, weight.shape))
    # A tape does not know the variables of Keras 3.
    keras_3 = variant.keras == "keras_3"
    weights = [weight.value if keras_3 else weight for weight in layer.trainable_weights]

    def call(x: tf.Tensor) -> tf.Tensor:
        return layer(x, training=True)

    return Candidate(variant, used, used != asked, _functions(call, weights, variant.compiled))


def _functions(call: Callable[[tf.Tensor], tf.Tensor], weights: list[Any], compiled: bool) -> Any:
    def forward(x: tf.Tensor, dy: tf.Tensor) -> list[tf.Tensor]:
        return [call(x)]

    def both(x: tf.Tensor, dy: tf.Tensor) -> list[tf.Tensor]:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = call(x)
        # y is given too: the next layer needs it, so no forward pass may be pruned.
        return [y, *tape.gradient(y, [x, *weights], dy)]

    options = {"jit_compile": True} if compiled else {}
    return {f.__name__: tf.function(f, **options) for f in (forward, both)}


# --------------------------------------------------------------------------------- outputs


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


# ------------------------------------------------------------------------------ operations


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


# ------------------------------------------------------------------------------------ time


def measure(shape_text: str) -> list[dict[str, Any]]:
    """The rows of one shape."""
    shape = _shape(shape_text)
    progress(f"{shape_text}: checking")
    data = Data.of(shape)
    candidates = [candidate(variant, data) for variant in variants()]
    check(candidates, data)
    note_operations(candidates, data)
    progress(f"{shape_text}: timing")
    copy = _copying()
    calls = {COPY: _repeated(lambda: copy(data.x))}
    for one in candidates:
        for name in one.functions:
            call = _repeated(lambda one=one, name=name: one.concrete[name](data.x, data.dy))
            calls[f"{one.variant.label} {name}"] = lambda one=one, call=call: guarded(one, call)
    seconds = interleaved(calls, FLAGS.repeats)
    return [as_row(one, candidates, shape_text, seconds) for one in candidates]


def _copying() -> Callable[[tf.Tensor], tf.Tensor]:
    """Reads a tensor and writes one. By 1 it would be optimised away."""
    return tf.function(lambda x: x * 1.5, **({"jit_compile": True} if FLAGS.xla else {}))


def _repeated(call: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        for _ in range(FLAGS.calls):
            call()
        synchronize()

    return run


def as_row(
    one: Candidate,
    candidates: Sequence[Candidate],
    shape: str,
    seconds: Mapping[str, list[float]],
) -> dict[str, Any]:
    """A row for JSON; what could not be measured is None."""
    fraction = sampled_fraction(one, _shape(shape))
    row = {
        "shape": shape,
        "label": one.variant.label,
        "keras": one.variant.keras,
        "layer": one.variant.layer,
        "stride": one.variant.stride,
        "compiled": one.variant.compiled,
        "strides": one.strides,
        "lowered": one.lowered,
        "sampled": fraction,
        "bound": None if fraction is None else 8 / (6 + 2 * fraction),
        "error": one.error,
        "failure": one.failure,
        "ops": one.ops,
        "op_milliseconds": one.op_milliseconds,
        "copy_gb_per_second": 2 * _bytes(shape) / _median(seconds[COPY]) / 1e9,
    }
    own = [
        other
        for other in candidates
        if other.variant.layer == "BatchNormalization"
        and (other.variant.keras, other.variant.compiled)
        == (one.variant.keras, one.variant.compiled)
    ]
    for kind, passes in (("forward", (2, 1)), ("both", (6, 2))):
        measured = not one.failure  # what failed was not called
        time = _median(seconds[f"{one.variant.label} {kind}"]) if measured else None
        row[f"{kind}_milliseconds"] = 1e3 * time if time else None
        moved = None if fraction is None else (passes[0] + passes[1] * fraction) * _bytes(shape)
        row[f"{kind}_gb_per_second"] = moved / time / 1e9 if moved and time else None
        for name, bases in (("fused", candidates[:1]), ("own", own)):
            row[f"{kind}_times_{name}"] = _times_as_fast(one, bases, kind, seconds)
    return row


def sampled_fraction(one: Candidate, shape: tuple[int, int, int]) -> float | None:
    """How much of the input statistics are taken of."""
    if not one.strides:
        return None
    return strides.positions(one.strides, shape[:2]) / (shape[0] * shape[1])


def _times_as_fast(
    one: Candidate, bases: Sequence[Candidate], kind: str, seconds: Mapping[str, list[float]]
) -> float | None:
    # What is wrong is not fast.
    if not bases or one.failure or bases[0].failure:
        return None
    names = (f"{which.variant.label} {kind}" for which in (one, bases[0]))
    return 1 / median_ratio(seconds, *names)


def _median(seconds: list[float]) -> float:
    return statistics.median(seconds) / FLAGS.calls


def _bytes(shape: str) -> int:
    return FLAGS.batch * math.prod(_shape(shape)) * tf.as_dtype(FLAGS.dtype).size


# -------------------------------------------------------------------------------- in tables


def shape_table(rows: Sequence[Mapping[str, Any]]) -> str:
    first = rows[0]
    kinds = ("milliseconds", "gb_per_second", "times_fused", "times_own")
    cells = [
        [
            row["label"],
            ",".join(map(str, row["strides"])) + (" lowered" if row["lowered"] else ""),
            *(_text(row[f"forward_{kind}"]) for kind in kinds),
            *(_text(row[f"both_{kind}"]) for kind in kinds),
            _text(row["bound"]),
            row["failure"] or f"{row['error']:.0e}",
        ]
        for row in rows
    ]
    names = ("ms", "GB/s", "x fused", "x own")
    columns = ["layer", "strides", *names, *names, "bound", "error"]
    title = (
        f"{FLAGS.batch}x{first['shape']} {FLAGS.dtype}: forward, then forward and backward; "
        f"copy {_text(first['copy_gb_per_second'])} GB/s"
    )
    return table(columns, cells, title, width=140)


def operations_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """What ran, once for all shapes where it was the same."""
    shapes: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        ops = ", ".join(f"{op} x{count}" for op, count in row["ops"].items())
        shapes.setdefault((row["label"], ops), []).append(row["shape"])
    all_shapes = len({row["shape"] for row in rows})
    cells = [
        [label, "all" if len(where) == all_shapes else ", ".join(where), ops or "none"]
        for (label, ops), where in sorted(shapes.items(), key=lambda item: _rank(rows, item[0][0]))
    ]
    return table(["layer", "shapes", "ran"], cells, "Operations, forward and backward", width=140)


def _rank(rows: Sequence[Mapping[str, Any]], label: str) -> int:
    return [row["label"] for row in rows].index(label)


def summary(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Means and the worst over shapes, of every layer."""
    labels = dict.fromkeys(row["label"] for row in rows if row["keras"])
    return [_summary_row(label, [r for r in rows if r["label"] == label]) for label in labels]


def _summary_row(label: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    large = [row for row in rows if not row["lowered"]]
    result: dict[str, Any] = {"label": label, "not_lowered": len(large), "shapes": len(rows)}
    for key in (f"{k}_times_{base}" for base in ("fused", "own") for k in ("forward", "both")):
        known = [row[key] for row in rows if row[key]]
        result[f"{key}_mean"] = _geometric_mean([row[key] for row in large if row[key]])
        result[f"{key}_worst"] = min(known, default=None)
    result["bound_mean"] = _geometric_mean([row["bound"] for row in large])
    return result


def summary_table(rows: Sequence[Mapping[str, Any]]) -> str:
    keys = [f"both_times_{base}_{what}" for base in ("fused", "own") for what in ("mean", "worst")]
    keys += ["bound_mean", "forward_times_fused_mean", "forward_times_fused_worst"]
    cells = [
        [row["label"], f"{row['not_lowered']}/{row['shapes']}", *(_text(row[key]) for key in keys)]
        for row in rows
    ]
    columns = [
        *("layer", "not lowered", "x fused", "worst", "x own", "worst", "bound"),
        *("x fused, forward alone", "worst"),
    ]
    return table(columns, cells, "Summary, forward and backward", width=140)


def _geometric_mean(values: Sequence[float]) -> float | None:
    return statistics.geometric_mean(values) if values else None


def _text(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}" if value < 0.1 else f"{value:.2f}"


# ----------------------------------------------------------------------------------- flags


def _shape(text: str) -> tuple[int, int, int]:
    """Height, width and channels.

    Raises:
        ValueError: it is no shape.
    """
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){2}", text):
        raise ValueError(f"unknown shape '{text}'; a shape is HEIGHTxWIDTHxCHANNELS, as 56x56x64")
    height, width, channels = map(int, text.split("x"))
    return height, width, channels


def _stride(text: str) -> strides.Stride:
    """One stride, or rows and columns.

    Raises:
        ValueError: it is no stride.
    """
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)?", text):
        raise ValueError(f"unknown stride '{text}'; a stride is a number, or ROWSxCOLUMNS as 16x1")
    numbers = tuple(map(int, text.split("x")))
    return numbers[0] if len(numbers) == 1 else (numbers[0], numbers[1])


def _stride_text(stride: strides.Stride) -> str:
    return str(stride) if isinstance(stride, int) else "x".join(map(str, stride))


def check_flags(arguments: Sequence[str]) -> None:
    """Looks at all flags before anything long starts.

    Raises:
        ValueError: one is wrong.
    """
    if arguments:
        raise ValueError(f"unexpected arguments {list(arguments)}; --help has examples")
    for name, parse in (("shapes", _shape), ("strides", _stride)):
        for text in FLAGS[name].value:
            parse(text)
    if not FLAGS.shapes:
        raise ValueError("no shapes; --help has examples")
    for name, value, known in (
        *(("Keras", name, tuple(KERAS)) for name in FLAGS.keras),
        ("dtype", FLAGS.dtype, DTYPES),
        ("device", FLAGS.device or "CPU", ("CPU", "GPU")),
    ):
        if value not in known:
            raise ValueError(f"unknown {name} '{value}'; known are {', '.join(known)}")
    if FLAGS.json and not Path(FLAGS.json).resolve().parent.is_dir():
        raise ValueError(f"there is no directory for {FLAGS.json}")


def chosen_device() -> str:
    """CPU or GPU; without a flag, a GPU if there is one.

    Raises:
        ValueError: a GPU is asked for, and there is none.
    """
    if FLAGS.device != "GPU" and not tf.config.list_physical_devices("GPU"):
        progress("TensorFlow sees no GPU: all runs on the CPU")
    return devices.chosen(FLAGS.device)


def machine(device: str) -> str:
    """What all ran on."""
    if device == "CPU":
        return f"CPU, {os.cpu_count()} cores"
    return devices.name_of(device)


def progress(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def main(argv: list[str]) -> int:
    try:
        check_flags(argv[1:])
        device = chosen_device()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    options = {name: FLAGS[name].value for name in ("batch", "dtype", "xla", "repeats", "calls")}
    report = {"device": machine(device), "tensorflow": tf.__version__} | options
    print(", ".join(f"{name}: {value}" for name, value in report.items()))
    rows: list[dict[str, Any]] = []
    failed = False
    for shape in FLAGS.shapes:
        try:
            with tf.device(f"/{device}:0"):
                measured = measure(shape)
        except (MemoryError, tf.errors.ResourceExhaustedError):
            print(f"error: {shape}: out of memory; --batch makes it smaller", file=sys.stderr)
            failed = True
            continue
        rows += measured
        print(f"\n{shape_table(measured)}", flush=True)
        if FLAGS.json:
            text = json.dumps(report | {"rows": rows, "summary": summary(rows)}, indent=2)
            Path(FLAGS.json).write_text(text + "\n")
    if rows:
        print(f"\n{operations_table(rows)}\n\n{summary_table(summary(rows))}")
    return int(failed or any(row["failure"] for row in rows))


if __name__ == "__main__":
    app.run(main)

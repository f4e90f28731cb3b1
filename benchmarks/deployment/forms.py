"""Variants of a model, and the forms in which runtimes take them: what is left, size, error."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.deployment.relus import folded_with_products
from benchmarks.peer_tools.bn_count import per_channel
from benchmarks.peer_tools.converters import litert, openvino, original, ours, tf2onnx
from benchmarks.peer_tools.nodes import litert_nodes
from benchmarks.peer_tools.runtimes import LiteRt, OnnxRuntime, OpenVino
from benchmarks.peer_tools.tools import Tool
from benchmarks.peer_tools.work import Work
from mbn_rewrite.comparison import compare_outputs, tolerance_for

VARIANTS: dict[str, Callable[[Work], Path]] = {
    "original": original,
    "fold": ours("fold", 1),
    "equalize": ours("fold", 1, equalize=True),
    "products": folded_with_products,
}
_LITERT = ("ai_edge_litert",)
# key -> (name, converter of what another converter makes, runtime, packages)
_FORMS: dict[str, tuple[str, Callable[..., Any], Any, tuple[str, ...]]] = {
    "litert": ("LiteRT", litert, LiteRt, _LITERT),
    "litert_float16": ("LiteRT float16", partial(litert, numbers="float16"), LiteRt, _LITERT),
    "litert_int8": ("LiteRT int8", partial(litert, numbers="int8"), LiteRt, _LITERT),
    "litert_int8_per_tensor": (
        "LiteRT int8 per tensor",
        partial(litert, numbers="int8_per_tensor"),
        LiteRt,
        _LITERT,
    ),
    "onnx": ("ONNX Runtime", tf2onnx, OnnxRuntime, ("tf2onnx", "onnx", "onnxruntime")),
    "openvino": ("OpenVINO", openvino, OpenVino, ("openvino",)),
}
FORMS = tuple(_FORMS)
INT8 = tuple(form for form in FORMS if "int8" in form)
_ROUNDED = ("litert_float16", *INT8)  # forms that are no float32 any more


def tool(form: str, variant: str) -> Tool:
    """Converter and runtime of a form of a variant."""
    name, converter, runtime, needs = _FORMS[form]
    convert = converter(VARIANTS[variant])
    return Tool(form, name, convert, runtime, needs, is_ours=variant != "original")


def examined(form: str, variant: str, work: Work, threads: int) -> dict[str, Any]:
    """Has a variant converted to a form: what is left of BatchNormalization in it, size and error.

    Raises:
        Exception: of any kind; the converter or the runtime fails.
    """
    taken = tool(form, variant)
    path = taken.convert(work)
    inputs, expected = (dict(np.load(file)) for file in (work.inputs, work.outputs))
    model = taken.runtime(path, inputs, list(expected), threads)
    outputs = model()
    tolerance = tolerance_for({array.dtype.name for array in expected.values()})
    comparison = compare_outputs(list(expected.values()), outputs, tolerance)
    facts = {
        "path": str(path),
        "left": model.at_run.total,
        "nodes": model.nodes,
        "bytes": sum(p.stat().st_size for p in (path, path.with_suffix(".bin")) if p.exists()),
        "error": max(map(relative_error, expected.values(), outputs)),
        "agreement": comparison.top1_agreement,
        "WRONG": not comparison.ok and form not in _ROUNDED,
    }
    if path.suffix == ".tflite":
        facts |= _steps(path)
    return facts


def _steps(path: Path) -> dict[str, int]:
    steps = per_channel(litert_nodes(path.read_bytes()))
    return {"mul": steps["multiply"] + steps["divide"], "add": steps["add"]}


def relative_error(expected: np.ndarray, given: np.ndarray) -> float:
    """Root mean square of an image's error, relative to how far outputs differ between images.

    That of the median image: a few beyond the calibrated ranges, which saturate, would outweigh all
    others in a mean.
    """
    expected = expected.astype(np.float64).reshape(len(expected), -1)
    spread = np.sqrt(np.mean((expected - expected.mean(axis=0)) ** 2))
    errors = np.sqrt(np.mean((given.reshape(expected.shape) - expected) ** 2, axis=1))
    return float(np.median(errors) / spread)


def ready(form: str, variant: str, path: str, work: Work, threads: int) -> Callable[[], object]:
    """A function that calls a converted model on what is timed."""
    inputs: Mapping[str, np.ndarray] = dict(np.load(work.timed))
    return tool(form, variant).runtime(Path(path), inputs, list(np.load(work.outputs)), threads)

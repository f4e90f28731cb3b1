"""The tools that `peers.py` compares: each is a converter and a runtime.

The converter turns the original, a SavedModel, into a model on disk; the runtime loads that,
answers calls, and knows how much BatchNormalization is left in the file and in what it runs
(bn_count.py).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.peer_tools.converters import (
    batchnorm_folding,
    keras_cv_attention_models,
    litert,
    openvino,
    optimize_for_inference,
    original,
    ours,
    tf2onnx,
)
from benchmarks.peer_tools.runtimes import Arrays, LiteRt, OnnxRuntime, OpenVino, TensorFlow
from benchmarks.peer_tools.work import Work


@dataclass(frozen=True)
class Tool:
    """A converter and a runtime.

    Attributes:
        key: for flags and files.
        name: for tables.
        convert: makes a model of the original; gives its path.
        runtime: what runs it.
        needs: the packages that it imports, beside TensorFlow, by their names in Python.
        environment: what has to be set when the process that converts starts.
        is_ours: whether a wrong answer is our fault.
    """

    key: str
    name: str
    convert: Callable[[Work], Path]
    runtime: Callable[[Path, Arrays, Sequence[str], int], Any]
    needs: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    is_ours: bool = False

    @property
    def missing(self) -> list[str]:
        """Packages that it needs and that are not installed."""
        return [name for name in self.needs if importlib.util.find_spec(name) is None]


_ONNX = ("tf2onnx", "onnx", "onnxruntime")
_OPENVINO, _LITERT = ("openvino",), ("ai_edge_litert",)
_LEGACY = {"TF_USE_LEGACY_KERAS": "1"}


def tools(modes: Sequence[str], batch: int) -> list[Tool]:
    """All tools, in the order of the tables: the original comes first.

    Args:
        batch: how many examples will be timed.
        modes: of ours. Other runtimes get the result of "fold", or of the first if it is not
            among them.
    """
    through = "fold" if "fold" in modes else modes[0]
    folded = ours(through, batch)
    return [
        Tool("original", "original", original, TensorFlow),
        *(Tool(f"ours_{m}", f"ours: {m}", ours(m, batch), TensorFlow, is_ours=True) for m in modes),
        Tool("optimize", "optimize_for_inference", optimize_for_inference, TensorFlow),
        Tool(
            "kecam",
            "keras_cv_attention_models",
            keras_cv_attention_models,
            TensorFlow,
            needs=("keras_cv_attention_models",),
            environment=_LEGACY,
        ),
        Tool(
            "batchnorm_folding",
            "tensorflow-batchnorm-folding",
            batchnorm_folding,
            TensorFlow,
            needs=("batch_normalization_folding",),
            environment=_LEGACY,
        ),
        Tool("onnx", "ONNX Runtime", tf2onnx(original), OnnxRuntime, needs=_ONNX),
        Tool("openvino", "OpenVINO", openvino(original), OpenVino, needs=_OPENVINO),
        Tool("litert", "LiteRT", litert(original), LiteRt, needs=_LITERT),
        Tool(
            "ours_onnx",
            f"ours: {through}, ONNX Runtime",
            tf2onnx(folded),
            OnnxRuntime,
            needs=_ONNX,
            is_ours=True,
        ),
        Tool(
            "ours_openvino",
            f"ours: {through}, OpenVINO",
            openvino(folded),
            OpenVino,
            needs=_OPENVINO,
            is_ours=True,
        ),
        Tool(
            "ours_litert",
            f"ours: {through}, LiteRT",
            litert(folded),
            LiteRt,
            needs=_LITERT,
            is_ours=True,
        ),
    ]

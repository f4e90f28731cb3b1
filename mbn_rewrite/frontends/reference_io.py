"""Reference inputs and outputs of models on disk, for the verification of rewritten ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class ReferenceIO:
    """Reference inputs of a signature or method of the original, and its outputs for them.

    Attributes:
        inputs: tensors by name; for a method all its arguments, as (args, kwargs).
        outputs: arrays by name; those of sparse and ragged tensors by name and number.
        compiled: whether only XLA could run it on this machine.
        method: the path of the method, or "" for a signature.
        interface: what a signature declares, by name, as tf.TensorSpec; {} if not known.
    """

    inputs: Any
    outputs: Mapping[str, np.ndarray]
    compiled: bool = False
    method: str = ""
    interface: Mapping[str, Any] = field(default_factory=dict)

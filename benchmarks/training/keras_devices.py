"""Devices by way of Keras 3, which has them alike on JAX and torch."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import keras


def on(device: str) -> AbstractContextManager[Any]:
    """Context manager in which tensors and weights are on a device."""
    return keras.device(f"{device.lower()}:0")

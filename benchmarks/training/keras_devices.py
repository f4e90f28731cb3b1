"""Devices by way of Keras 3, which has them alike on JAX and torch."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import keras

from benchmarks.common.flags import check_known
from benchmarks.training.backends import DEVICES


def chosen(asked: str | None, gpu: bool, backend: str) -> str:
    """CPU or GPU: what is asked for; if nothing is, a GPU if there is one.

    Args:
        asked: the device, or None.
        gpu: whether there is a GPU.
        backend: who sees it, or does not.

    Raises:
        ValueError: a GPU is asked for, and there is none; or there is no such kind of device.
    """
    check_known("device", [asked] if asked is not None else [], DEVICES)
    if asked == "GPU" and not gpu:
        raise ValueError(f"{backend} sees no GPU; --device=CPU runs without")
    return asked or ("GPU" if gpu else "CPU")


def on(device: str) -> AbstractContextManager[Any]:
    """Context manager in which tensors and weights are on a device."""
    return keras.device(f"{device.lower()}:0")

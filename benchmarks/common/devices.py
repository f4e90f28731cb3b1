"""The device that a program runs on, and its name."""

from __future__ import annotations

from benchmarks.common.flags import check_known
from mbn_rewrite.device import cpu_name

DEVICES = ("CPU", "GPU")


def chosen_of(asked: str | None, gpu: bool, backend: str) -> str:
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


def chosen(asked: str | None) -> str:
    """`chosen_of` what TensorFlow sees; where it is the CPU, it sees no GPU from then on."""
    import tensorflow as tf

    device = chosen_of(asked, bool(tf.config.list_physical_devices("GPU")), "TensorFlow")
    if device == "CPU":
        tf.config.set_visible_devices([], "GPU")
    return device


def name_of(device: str) -> str:
    """Name of the device, as its maker calls it."""
    import tensorflow as tf

    if device == "CPU":
        return cpu_name()
    gpu = tf.config.list_physical_devices("GPU")[0]
    return str(tf.config.experimental.get_device_details(gpu).get("device_name", "GPU"))


def synchronize() -> None:
    """Waits for the GPU, where TensorFlow uses one."""
    import tensorflow as tf

    if tf.config.list_logical_devices("GPU"):
        tf.test.experimental.sync_devices()

"""The processor that models run on: its name, and its memory."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_FROZEN_BY_PYTHON = 10_000  # objects at most; 3.12 has 375 when it starts


def processor() -> str:
    """The name of the CPU, and how many of its cores there are for this process."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # where processes are not bound to cores
        cores = os.cpu_count() or 1
    return f"{cpu_name()}, {cores} {'core' if cores == 1 else 'cores'}"


def cpu_name() -> str:
    """Product name of the CPU, as far as the system tells."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def give_back_memory() -> None:
    """Gives freed memory back to the system, which the allocator otherwise keeps."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, others do not
    if trim is not None:
        trim(0)


@contextmanager
def older_objects_spared() -> Iterator[None]:
    """Has collections of garbage look at new objects alone.

    TensorFlow's modules are a million objects, and looking at all of them takes 0.3 seconds. Where
    objects are spared already, by this or by the caller's own `gc.freeze`, nothing is done. What is
    frozen within, by other threads, is no longer afterwards.
    """
    if gc.get_freeze_count() > _FROZEN_BY_PYTHON:
        yield
        return
    gc.collect()  # what is garbage already would be spared too
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()

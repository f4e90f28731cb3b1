"""Resident memory of this process, by the counters of Linux."""

from __future__ import annotations

import re
from pathlib import Path


def resident(key: str) -> int:
    """Bytes of resident memory: now ("VmRSS") or at most ("VmHWM"); see proc(5).

    Raises:
        RuntimeError: the system has no such counter.
    """
    status = Path("/proc/self/status")
    found = re.search(rf"{key}:\s+(\d+) kB", status.read_text()) if status.exists() else None
    if not found:
        raise RuntimeError(f"/proc/self/status has no {key}")
    return int(found[1]) * 1024


def forget_peak() -> None:
    """Has "VmHWM" start again from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")

"""Ways to rename in one step that Python does not offer."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from pathlib import Path

KEEP, EXCHANGE = "keep what is there", "exchange"

# The flags of renameat2 (Linux) and renamex_np (macOS).
_LINUX = {KEEP: 1, EXCHANGE: 2}
_MACOS = {KEEP: 4, EXCHANGE: 2}
_CANNOT = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)


def renamed(source: Path, destination: Path, how: str) -> bool:
    """Renames atomically in a way that not all systems know; whether this one does.

    Raises:
        OSError: it knows it, and it cannot be done.
    """
    names = os.fsencode(source), os.fsencode(destination)
    library = ctypes.CDLL(None, use_errno=True)
    if sys.platform == "darwin":
        failed = library.renamex_np(*names, ctypes.c_uint(_MACOS[how]))
    elif hasattr(library, "renameat2"):
        here = ctypes.c_int(-100)  # AT_FDCWD; the names are absolute
        failed = library.renameat2(here, names[0], here, names[1], ctypes.c_uint(_LINUX[how]))
    else:
        return False
    if failed and ctypes.get_errno() in _CANNOT:
        return False
    if failed:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(destination))
    return True

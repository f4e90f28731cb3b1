"""What is said of a row that could not be measured."""

from __future__ import annotations

import re

OUT_OF_MEMORY = "OUT OF MEMORY"


def described(error: BaseException) -> str:
    """A failure in a few words: that memory was short, or how the error's message begins."""
    import tensorflow as tf

    short = isinstance(error, (MemoryError, tf.errors.ResourceExhaustedError))
    if short or re.search("out of memory|RESOURCE_EXH", str(error)):
        return OUT_OF_MEMORY
    lines = str(error).splitlines() or [type(error).__name__]
    return f"FAILED: {lines[0][:100]}"

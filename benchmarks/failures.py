"""What is said of a row that could not be measured."""

from __future__ import annotations

from mbn_rewrite.errors import cause_of, is_out_of_memory

OUT_OF_MEMORY = "OUT OF MEMORY"


def described(error: BaseException) -> str:
    """A failure in a few words: that memory was short, or how the error's message begins."""
    if is_out_of_memory(error):
        return OUT_OF_MEMORY
    return f"FAILED: {cause_of(error)[:100]}"

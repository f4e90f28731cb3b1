"""Rows that could not be measured: what is said of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mbn_rewrite.errors import cause_of, is_out_of_memory

OUT_OF_MEMORY = "OUT OF MEMORY"


class Declined(Exception):  # noqa: N818 - it is an answer, not an error
    """A model is not taken; the message says why."""


def described(error: BaseException) -> str:
    """A failure in a few words: that memory was short, or how the error's message begins."""
    if is_out_of_memory(error):
        return OUT_OF_MEMORY
    return f"FAILED: {cause_of(error)[:100]}"


@contextmanager
def noted(known: dict[str, dict[str, Any]], variant: str) -> Iterator[None]:
    """Context manager that notes how a variant fails; the others still run."""
    try:
        yield
    except Exception as error:
        known.setdefault(variant, {})["note"] = described(error)

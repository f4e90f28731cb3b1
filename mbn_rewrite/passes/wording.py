"""Sentences about layers, for the reasons that decisions give."""

from __future__ import annotations

from collections.abc import Sequence

from mbn_rewrite.training.strides import Stride


def listed(labels: Sequence[str], most: int = 3) -> str:
    """Labels as an enumeration; beyond `most` they are counted."""
    if len(labels) > most:
        labels = [*labels[:most], f"{len(labels) - most} more"]
    return " and ".join([", ".join(labels[:-1]), labels[-1]]) if len(labels) > 1 else labels[0]


def sentence(phrase: str) -> str:
    """A phrase with a capital letter and a full stop."""
    return f"{phrase[:1].upper()}{phrase[1:]}."


def stride_in_words(stride: Stride | tuple[int, ...]) -> str:
    """A stride such as "4" or "16 x 1"."""
    parts = (stride,) if isinstance(stride, int) else stride
    return str(parts[0]) if len(set(parts)) == 1 else " x ".join(map(str, parts))


def bias_beside(label: str, doubt: str) -> str:
    """Note on a layer that another stands for, since its own bias is in doubt."""
    return f"{label} {doubt}: a layer that stands for it adds the bias."

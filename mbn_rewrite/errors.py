"""The one family of errors that this library raises on purpose."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # which import this module
    from mbn_rewrite.comparison import Comparison
    from mbn_rewrite.plans import Plan
    from mbn_rewrite.report import Report

# What `cause_of` makes of every error about a full disk.
NO_SPACE = "No space left on device."
_ESCAPE_CODE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
# Where in a graph something was, which tells a user nothing.
_NODES = re.compile(
    r"\{\{function_node [^}]*\}\}\s*|\s*\[\[\{\{node [^}]*\}\}\]\]|\s*\[Op:[^\]]*\](\s*name:)?"
)
_NODE_NAME = re.compile(r"\{\{node ([^}]*)\}\}")
_PREAMBLES = (
    "Exception encountered when calling",
    "Graph execution error",
    "Detected at node",
    "<stack traces unavailable>",
    "Traceback (most recent call last)",
    "in user code:",
    "Node: ",
)
# What comes after these is not what went wrong.
_APPENDICES = (
    "Arguments received by",
    "Call arguments received by",
    "List of objects that could not be loaded",
    "Original stack trace for",
    "The op is created at",
)
# What comes before these is not what went wrong, but where.
_INTRODUCING = ("Exception encountered: ", "Error encountered during deserialization: ")
_LONG_GROUP, _LONG_TEXT = 400, 2000  # characters of a group in brackets, and of a whole message


class RewriteError(Exception):
    """Base class of errors for requests that cannot be carried out.

    The message says what was found, what was expected, and how to get on.
    """


class CopyError(RewriteError):
    """A layer of a model cannot be copied."""


class VerificationError(RewriteError):
    """The rewritten model does not give the original's outputs.

    It was not returned, or not written.

    Attributes:
        plan: what was planned.
        comparison: the two models' outputs compared; None where the rewritten one gave none.
        report: of a model on disk, all that is known of it; None for a model in memory.
    """

    def __init__(
        self, message: str, plan: Plan, comparison: Comparison | None, report: Report | None = None
    ) -> None:
        super().__init__(message)
        self.plan = plan
        self.comparison = comparison
        self.report = report


class UnverifiedWarning(UserWarning):
    """A rewritten model could not be compared with the original; the message says why."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or what it was raised from, is for want of memory."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError) or type(cause).__name__ == "ResourceExhaustedError":
            return True
        if re.search(r"out of memory|\boom\b|resource_exhausted", str(cause), re.IGNORECASE):
            return True
        cause = cause.__cause__
    return False


def cause_of(error: BaseException) -> str:
    """Message of a framework's error, as one paragraph that ends with a full stop.

    Where in which code or graph it came up is left out, and so are escape codes of terminals.
    Configurations and lists that are very long lose their middle.
    """
    text = _ESCAPE_CODE.sub("", str(error))
    if NO_SPACE.rstrip(".") in text:  # TensorFlow says it behind its own names
        return NO_SPACE
    for marker in _INTRODUCING:
        text = text.rpartition(marker)[2] or text
    told = " ".join(_telling_lines(text)) or " ".join(text.split()) or type(error).__name__
    told = _NODE_NAME.sub(r"\1", _NODES.sub("", told)).strip().rstrip(".")
    return f"{_shortened(_with_short_groups(told), _LONG_TEXT)}."


def _telling_lines(text: str) -> Iterator[str]:
    """The lines of a message that say what went wrong.

    Keras puts the name of the layer first and what it was called with last, TensorFlow where in
    a graph it was; both quote lines of code, below those that begin with "File".
    """
    quoting = 0  # how far the line that quotes code is indented; 0 where none came before
    for line in text.split("\n"):
        stripped = line.strip()
        indentation = len(line) - len(line.lstrip())
        if stripped.startswith(_APPENDICES):
            return
        is_code = bool(quoting and stripped and indentation >= quoting)
        is_place = stripped.startswith('File "')
        quoting = indentation + 1 if is_place else 0
        if stripped and not (is_code or is_place or stripped.startswith(_PREAMBLES)):
            yield stripped


def _with_short_groups(text: str) -> str:
    """A text in which what is in brackets loses its middle where that is long."""
    pieces: list[str] = []
    depth = start = 0
    for position, character in enumerate(text):
        if character in "([{":
            if depth == 0:
                pieces.append(text[start:position])
                start = position
            depth += 1
        elif character in ")]}" and depth:
            depth -= 1
            if depth == 0:
                pieces.append(_shortened(text[start : position + 1], _LONG_GROUP))
                start = position + 1
    return "".join([*pieces, text[start:]])


def _shortened(text: str, most: int) -> str:
    """A text without its middle if it is long; what matters may stand at either end."""
    half = most // 2
    return text if len(text) <= most else f"{text[:half]} ... {text[-half:]}"

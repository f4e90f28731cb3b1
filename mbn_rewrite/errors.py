"""The one family of errors that this library raises on purpose."""

import re

_PREAMBLES = (
    "Exception encountered when calling",
    "Graph execution error",
    "Detected at node",
    "<stack traces unavailable>",
    "File ",
    "Node: ",
)


class RewriteError(Exception):
    """What was asked cannot be done.

    The message says what was found, what was expected, and how to get on.
    """


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
    """What an error of a framework says, as one sentence of at most 200 characters."""
    if "No space left on device" in str(error):  # TensorFlow says it behind its own names
        return "No space left on device."
    lines = [line.strip() for line in str(error).strip().split("\n") if line.strip()]
    # Keras puts the name of the layer first, TensorFlow where in a graph it was; what went wrong
    # comes below.
    told = [line for line in lines if not line.startswith(_PREAMBLES)]
    text = (told or lines or [type(error).__name__])[0].rstrip(".")
    return f"{text[:200]}." if len(text) <= 200 else f"{text[:200]} ..."

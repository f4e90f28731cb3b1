"""The one family of errors that this library raises on purpose."""


class RewriteError(Exception):
    """What was asked cannot be done.

    The message says what was found, what was expected, and how to get on.
    """


def cause_of(error: BaseException) -> str:
    """What an error of a framework says, as one sentence of at most 200 characters."""
    if "No space left on device" in str(error):  # TensorFlow says it behind its own names
        return "No space left on device."
    lines = [line.strip() for line in str(error).strip().split("\n") if line.strip()]
    # Keras puts the name of the layer first, and what went wrong with it below.
    told = [line for line in lines if not line.startswith("Exception encountered when calling")]
    text = (told or lines or [type(error).__name__])[0].rstrip(".")
    return f"{text[:200]}." if len(text) <= 200 else f"{text[:200]} ..."

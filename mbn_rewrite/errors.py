"""The one family of errors that this library raises on purpose."""


class RewriteError(Exception):
    """What was asked cannot be done.

    The message says what was found, what was expected, and how to get on.
    """

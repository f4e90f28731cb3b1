"""The one error of the study that people are meant to read."""


class StudyError(Exception):
    """The study cannot go on.

    The message says what was found, what was expected, and how to get on.
    """

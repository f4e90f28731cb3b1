"""Reasons why a BatchNormalization stays, as values: an obstacle, and the changes it rules out.

Front ends give them, passes ask whether one rules out the change that they make, and users read
them as text.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, IntEnum, unique


class Change(IntEnum):
    """Change of a BatchNormalization. Whatever rules one out rules out those before it too."""

    MOVE = 1  # other layers do its map
    REPLACE = 2  # another layer does its map in its place
    SAMPLE = 3  # in training, a layer with statistics of a sample does its work


@unique
class Obstacle(Enum):
    """Obstacle to changes: the last one that it rules out, and its phrase, with {} for a detail."""

    CASTS = (Change.MOVE, "it turns {}")
    MASKED = (Change.MOVE, "it is given a mask, which others read from it")
    HELD_TWICE = (Change.MOVE, "{} holds it too")
    READ_BY_CODE = (Change.REPLACE, "code of {} reads its parameters or statistics")
    NOT_CALLED = (Change.REPLACE, "{} does not call it at inference")

    TRAINING_UNDECIDED = (Change.REPLACE, "whether it trains is decided when the model is called")
    TRAINING_OPERATION = (
        Change.REPLACE,
        "it is in training mode, so it normalises by the batch it is given",
    )
    NOT_FINITE = (Change.REPLACE, "its weights or moving statistics hold NaN or infinity")
    NO_FINITE_SCALE = (Change.REPLACE, "{} give no finite scale")
    WRITTEN = (Change.REPLACE, "{} its parameters or statistics")
    COMPUTED = (Change.REPLACE, "its parameters or statistics are computed while the model runs")
    STATISTICS_READ = (Change.REPLACE, "its statistics are read as outputs")
    AXES_DIFFER = (Change.REPLACE, "it scales along one axis and shifts along another")
    AXIS_UNKNOWN = (Change.REPLACE, "its channel axis is not known")
    STRIPPABLE = (Change.REPLACE, "{} takes that away, and what it gives folds")
    BRANCH = (Change.REPLACE, "it is in a branch that {}")
    IN_BODY = (Change.REPLACE, "it is in the body of {}, which stays as it is")

    TRAINING_CALL = (
        Change.SAMPLE,
        "it is called with training=True, so it normalises by the batch it is given",
    )
    OWN_CLASS = (Change.SAMPLE, "{} is a class of its own, which may compute something else")
    NEVER_CALLED = (Change.SAMPLE, "it was never called, so it has no weights")
    RENORM = (Change.SAMPLE, "it uses batch renormalisation")
    VIRTUAL_BATCHES = (Change.SAMPLE, "it uses virtual batches")
    ADJUSTMENT = (Change.SAMPLE, "it adjusts its output by a function of its own")
    SEVERAL_AXES = (Change.SAMPLE, "it normalises over several axes {}")
    QUANTISED = (
        Change.SAMPLE,
        "{} trains it for quantisation, and weights that absorbed it would not be on the grid that "
        "they were trained for. Fold the model as it was before, then quantise what that gives "
        "(quantize_model)",
    )
    CALLED_UNSEEN = (Change.SAMPLE, "{} calls it in a function that it hands to another")
    ASKED = (Change.SAMPLE, "code of {} does something else where it has another layer")
    TRIED = (Change.SAMPLE, "{} gave something else when it had other layers")
    OUT_OF_REACH = (
        Change.SAMPLE,
        "{} holds it where it cannot be exchanged; held in an attribute of its own, or in a list, "
        "tuple or dictionary in one, and called from there, it could",
    )

    def __init__(self, last: Change, phrase: str) -> None:
        self.last = last
        self.phrase = phrase


@dataclass(frozen=True)
class Reason:
    """Reason why a BatchNormalization stays; as a string, the phrase that users read.

    Attributes:
        obstacle: what it is.
        detail: the detail that its phrase names, or "".
    """

    obstacle: Obstacle
    detail: str = ""

    def __str__(self) -> str:
        return self.obstacle.phrase.format(self.detail)

    def rules_out(self, change: Change) -> bool:
        return change <= self.obstacle.last

    @property
    def in_training(self) -> str:
        """The phrase where a layer for training was asked for."""
        if self.obstacle is Obstacle.TRAINING_CALL:
            return (
                f"{self}, at inference too, where statistics of a sample would give other outputs"
            )
        return str(self)

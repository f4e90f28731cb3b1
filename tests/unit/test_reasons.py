"""Reasons why a BatchNormalization stays: what they rule out, and how they read."""

import numpy as np
import pytest

from mbn_rewrite.ir.channel_map import ChannelMap
from mbn_rewrite.ir.graph import BatchNorm
from mbn_rewrite.ir.reasons import Change, Obstacle, Reason

MAP = ChannelMap(np.ones(3), np.zeros(3), 1)


@pytest.mark.parametrize(
    ("obstacle", "ruled_out"),
    [
        (Obstacle.MASKED, [Change.MOVE]),
        (Obstacle.COMPUTED, [Change.MOVE, Change.REPLACE]),
        (Obstacle.RENORM, [Change.MOVE, Change.REPLACE, Change.SAMPLE]),
    ],
    ids=str,
)
def test_what_a_reason_rules_out(obstacle, ruled_out):
    reason = Reason(obstacle)
    op = BatchNorm(MAP if ruled_out == [Change.MOVE] else None, reason)
    assert [change for change in Change if op.why_not(change) is reason] == ruled_out
    assert BatchNorm(MAP).why_not(ruled_out[-1]) is None


@pytest.mark.parametrize("obstacle", Obstacle)
def test_details_stand_where_the_phrase_names_them(obstacle):
    detail = "Block '{weird}'"
    said = str(Reason(obstacle, detail))
    assert said == obstacle.phrase.replace("{}", detail)
    assert said == said.strip().removesuffix(".")


def test_only_a_call_in_training_reads_otherwise_in_training():
    other = [o for o in Obstacle if Reason(o).in_training != str(Reason(o))]
    assert other == [Obstacle.TRAINING_CALL]
    reason = Reason(Obstacle.TRAINING_CALL)
    assert reason.in_training.startswith(f"{reason}, at inference too")


@pytest.mark.parametrize(
    ("channel_map", "reason"),
    [(None, None), (None, Reason(Obstacle.MASKED)), (MAP, Reason(Obstacle.COMPUTED))],
    ids=["nothing", "map that stays in place", "map that there is not"],
)
def test_a_map_and_a_reason_that_there_is_none_exclude_each_other(channel_map, reason):
    with pytest.raises(ValueError, match="a map or"):
        BatchNorm(channel_map, reason)

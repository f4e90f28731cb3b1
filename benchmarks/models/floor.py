"""Networks without their BatchNormalization: the floor of what a network can cost."""

from __future__ import annotations

from typing import Any


def without_batch_norm(model: Any) -> Any:
    """A copy of a model in which every BatchNormalization is left out, with nothing in its place.

    It computes something else: it shows what a network costs in which BatchNormalization is free.
    """
    from mbn_rewrite.frontends.registry import front_end_of
    from mbn_rewrite.ir.graph import BatchNorm
    from mbn_rewrite.plans import Decision, Fate, Plan, Remove

    front_end = front_end_of(model)
    reading = front_end.read(model)
    owners = dict.fromkeys(n.owner for n in reading.graph.nodes if isinstance(n.op, BatchNorm))
    decisions = tuple(Decision(owner, Fate.FOLDED) for owner in owners)
    return front_end.write(model, reading, Plan("none", decisions, dict.fromkeys(owners, Remove())))

"""A plan, made by hand, that gives a clip bounds per channel."""

from __future__ import annotations

import numpy as np

from mbn_rewrite.ir.graph import BatchNorm, Clip, Graph, Linear
from mbn_rewrite.plans import Decision, Fate, Fold, Plan, Reclip, Remove


def moved_into_clip(graph: Graph) -> Plan:
    """Moves the map of a BatchNormalization past the ReLU behind it, into what follows.

    Its scales, of both signs, are not 0, and what follows reads no padding.
    """
    norm, clip, linear = (
        next(node for node in graph.nodes if isinstance(node.op, kind))
        for kind in (BatchNorm, Clip, Linear)
    )
    m = norm.op.map
    bounds, rising = -m.shift / m.scale, m.scale > 0
    reclip = Reclip(np.where(rising, bounds, -np.inf), np.where(rising, np.inf, bounds), m.axis)
    actions = {
        norm.owner: Remove(),
        clip.owner: reclip,
        linear.owner: Fold(linear.op, before=m),
    }
    return Plan("fold", (Decision(norm.owner, Fate.FOLDED, (linear.owner,)),), actions)

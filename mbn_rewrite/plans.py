"""The plan: what becomes of every BatchNormalization, as data.

A plan holds no framework object. It prints as a table, serialises to JSON, and two plans
of one model can be compared by their JSON: edits are listed with a checksum.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mbn_rewrite import display
from mbn_rewrite.ir.algebra import Border, ChannelMap
from mbn_rewrite.ir.graph import Op
from mbn_rewrite.training.strides import Stride
from mbn_rewrite.tuning.timing import Measurement

if TYPE_CHECKING:  # which imports this module
    from mbn_rewrite.verification import Comparison


@dataclass(frozen=True)
class Decision:
    """What becomes of one BatchNormalization.

    Attributes:
        name: the layer's name; inside nested models with their names before it, as in
            "backbone/bn_1".
        action: "folded", one of `FORMS`, "strided", "mbn" or "kept".
        into: the layers that absorbed it, or that stand in its place.
        reason: for "kept", and in mode "auto" for all that did not fold: what is in the way, in
            one sentence. For "strided" and "mbn": the stride, and why it was lowered. For
            "folded" where a layer of another class stands for one that absorbed it: why; with
            border maps, of what size.
    """

    name: str
    action: str
    into: tuple[str, ...] = ()
    reason: str = ""


@dataclass(frozen=True, eq=False)
class Edit:
    """New weights for one layer, as maps that its weights absorb.

    Attributes:
        op: the operation, which says how the weights are laid out.
        before: a map of the layer's input, or None.
        after: a map of its output, or None.
        border: where the layer reads padding, if it has to add a border map; then in place
            of the bias.
        outer_bias: whether a layer that stands for it has to add the bias.
    """

    op: Op
    before: ChannelMap | None = None
    after: ChannelMap | None = None
    border: Border | None = None
    outer_bias: bool = False

    @property
    def has_shift(self) -> bool:
        """Whether what is absorbed takes a bias."""
        return any(m is not None and m.has_shift for m in (self.before, self.after))


# What can stand in the place of a BatchNormalization and do its map: a depthwise 1x1 convolution
# with a bias, a multiplication and an addition, or TensorFlow's fused operation.
FORMS = ("depthwise", "scale_and_shift", "fused")


@dataclass(frozen=True, eq=False)
class Replacement:
    """What does a BatchNormalization's map in its place.

    Attributes:
        form: one of `FORMS`. A depthwise convolution that there is none of (for a rank, a
            layout, or where a mask has to flow on) is a multiplication and an addition.
        map: the map.
    """

    form: str
    map: ChannelMap


@dataclass(frozen=True)
class Sampled:
    """A training layer for a BatchNormalization.

    Attributes:
        stride: an int, or (rows, columns); before it is lowered for small inputs.
        depthwise: whether a depthwise convolution does the scale and shift.
    """

    stride: Stride
    depthwise: bool


@dataclass(frozen=True, eq=False)
class Plan:
    """What to do to a model. Layers are named by owner, as in `graph.Node`.

    Attributes:
        mode: "auto", "fold", "depthwise", "strided" or "mbn".
        decisions: one for each BatchNormalization, in the order of the model.
        removed: BatchNormalizations that vanish.
        edits: layers whose weights absorb maps.
        remapped: BatchNormalizations that stay and take on another map (their own, and
            those of others).
        replaced: BatchNormalizations whose map is done by another layer in their place.
        sampled: BatchNormalizations that training layers replace.
        measurement: in mode "auto" what was measured; None where there was nothing to choose.
        notes: what else the user should know of the result, in sentences.
        verification: what `convert` gave beside the original; None where they were not compared.
        unverified: why they could not be compared, in a sentence, or "".
    """

    mode: str
    decisions: tuple[Decision, ...]
    removed: frozenset[str] = frozenset()
    edits: Mapping[str, Edit] = field(default_factory=dict)
    remapped: Mapping[str, ChannelMap] = field(default_factory=dict)
    replaced: Mapping[str, Replacement] = field(default_factory=dict)
    sampled: Mapping[str, Sampled] = field(default_factory=dict)
    measurement: Measurement | None = None
    notes: tuple[str, ...] = ()
    verification: Comparison | None = None
    unverified: str = ""

    @property
    def touched(self) -> frozenset[str]:
        """The owners of all layers for which something is planned."""
        return frozenset().union(
            self.removed, self.edits, self.remapped, self.replaced, self.sampled
        )

    @property
    def counts(self) -> dict[str, int]:
        """How many BatchNormalizations each action befalls."""
        return dict(Counter(decision.action for decision in self.decisions))

    @property
    def left(self) -> int:
        """How many BatchNormalizations stay, as they are or as fused operations."""
        return self.counts.get("kept", 0) + self.counts.get("fused", 0)

    @property
    def summary(self) -> str:
        """One line, such as "mode fold: 53 BatchNormalization: 53 folded"."""
        if not self.decisions:
            # A note may be on what cannot be seen into.
            none = (
                "no BatchNormalization can be seen"
                if self.notes
                else ("the model has no BatchNormalization")
            )
            return f"mode {self.mode}: nothing to do: {none}"
        counts = ", ".join(f"{count} {action}" for action, count in sorted(self.counts.items()))
        return f"mode {self.mode}: {len(self.decisions)} BatchNormalization: {counts}"

    def to_dict(self) -> dict[str, Any]:
        """The plan in types that JSON knows."""
        maps = {
            **{(name, "input"): edit.before for name, edit in self.edits.items()},
            **{(name, "output"): edit.after for name, edit in self.edits.items()},
            **{(name, "own map"): m for name, m in self.remapped.items()},
            **{(name, "replacement"): new.map for name, new in self.replaced.items()},
        }
        return {
            "mode": self.mode,
            "summary": self.summary,
            "counts": self.counts,
            "decisions": [
                {"name": d.name, "action": d.action, "into": list(d.into), "reason": d.reason}
                for d in self.decisions
            ],
            "edits": [
                {"layer": name, "side": side, "channels": m.channels, "sha256": _checksum(m)}
                | (self._border_of(name) if side == "input" else {})
                for (name, side), m in sorted(maps.items(), key=lambda item: item[0])
                if m is not None
            ],
            "measurement": self.measurement and self.measurement.to_dict(),
            "strides": {name: sampled.stride for name, sampled in self.sampled.items()},
            "notes": list(self.notes),
            "verification": self.verification and self.verification.to_dict(),
            "unverified": self.unverified,
        }

    def _border_of(self, name: str) -> dict[str, Any]:
        border = self.edits[name].border
        return {} if border is None else {"border": list(border.outputs)}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def table(self, full: bool = False) -> str:
        """The plan as text, as `str` gives it; `full` for a row for every decision of many."""
        return display.plan_text(self, full)

    def __str__(self) -> str:
        return self.table()

    def __repr__(self) -> str:
        return display.one_line(self, self.summary)

    def _repr_html_(self) -> str:
        return display.plan_html(self)


def _checksum(m: ChannelMap) -> str:
    return hashlib.sha256(m.scale.tobytes() + m.shift.tobytes()).hexdigest()

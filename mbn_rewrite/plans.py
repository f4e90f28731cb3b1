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
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from mbn_rewrite import display
from mbn_rewrite.enums import Name
from mbn_rewrite.ir.algebra import Border
from mbn_rewrite.ir.branches import Branches
from mbn_rewrite.ir.channel_map import Array, ChannelMap
from mbn_rewrite.ir.graph import Linear, Op
from mbn_rewrite.measurement import Latencies, Measurement
from mbn_rewrite.training.strides import Stride

if TYPE_CHECKING:  # which imports this module
    from mbn_rewrite.comparison import Comparison


class Form(Name):
    """Form of a layer that stands in the place of a BatchNormalization and does its map."""

    DEPTHWISE = "depthwise"  # a depthwise 1x1 convolution with a bias
    SCALE_AND_SHIFT = "scale_and_shift"  # a multiplication and an addition
    FUSED = "fused"  # TensorFlow's fused operation


class Fate(Name):
    """Fate of a BatchNormalization."""

    KEPT = "kept"
    FOLDED = "folded"
    DEPTHWISE = "depthwise"
    SCALE_AND_SHIFT = "scale_and_shift"
    FUSED = "fused"
    STRIDED = "strided"
    MBN = "mbn"


@dataclass(frozen=True)
class Decision:
    """Decision on one BatchNormalization.

    Attributes:
        name: the layer's name; inside nested models with their names before it, as in
            "backbone/bn_1".
        action: its `Fate`, which equals the word for it.
        into: the layers that absorbed it, or that stand in its place.
        reason: for "kept", and in mode "auto" for all that did not fold: what is in the way, in
            one sentence. For "strided" and "mbn": the stride, and why it was lowered. For
            "folded" where a layer of another class stands for one that absorbed it: why; with
            border maps, of what size.
    """

    name: str
    action: Fate
    into: tuple[str, ...] = ()
    reason: str = ""


# -------------------------------------------------------------------------------- actions


@dataclass(frozen=True)
class Remove:
    """A layer vanishes; its readers read one of its inputs.

    Attributes:
        keeps: which of them.
    """

    keeps: int = 0


@dataclass(frozen=True, eq=False)
class Fold:
    """A layer's weights absorb maps, or parallel branches.

    Attributes:
        op: the operation, which says how the weights are laid out, and which branches it sums.
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

    def maps(self, place: int) -> tuple[ChannelMap | None, ChannelMap | None]:
        """The maps before and after a chain of the operation's, by its place among them."""
        return (
            self.before if self.op.reads(place) else None,
            self.after if self.op.gives(place) else None,
        )

    @property
    def has_shift(self) -> bool:
        """Whether what is absorbed takes a bias."""
        if any(kernel.is_table for kernels, _ in self.op.chains for kernel in kernels):
            return False
        if any(m is not None and m.has_shift for m in (self.before, self.after)):
            return True
        return self.sums is not None and any(bias for _, bias in self.op.chains)

    @property
    def sums(self) -> Branches | None:
        """The parallel branches whose sum the layer is, if they were merged."""
        return self.op.sums if isinstance(self.op, Linear) else None


@dataclass(frozen=True, eq=False)
class Remap:
    """A BatchNormalization stays and takes on another map: its own, and those of others.

    Attributes:
        map: the map.
    """

    map: ChannelMap


@dataclass(frozen=True, eq=False)
class Replace:
    """Another layer does a BatchNormalization's map in its place.

    Attributes:
        form: what does it. A depthwise convolution that there is none of (for a rank, a
            layout, or where a mask has to flow on) is a multiplication and an addition.
        map: the map.
    """

    form: Form
    map: ChannelMap


@dataclass(frozen=True, eq=False)
class Reclip:
    """A clip, such as a ReLU, takes on bounds per channel: y = min(max(x, lower), upper).

    Attributes:
        lower: the lower bounds, float64, shape (channels,), -inf for a channel without one; None
            where no channel has one.
        upper: the upper bounds, likewise, with inf; not less than the lower ones. One of the two
            is there.
        axis: which axis of the tensor the channels lie on, counted from 0 (the batch).
    """

    lower: Array | None
    upper: Array | None
    axis: int

    @property
    def bounds(self) -> dict[str, Array]:
        """The bounds that there are, by side, in the order in which they are applied."""
        sides = {"lower": self.lower, "upper": self.upper}
        return {side: array for side, array in sides.items() if array is not None}

    @property
    def channels(self) -> int:
        return max(map(len, self.bounds.values()))


@dataclass(frozen=True)
class Sample:
    """A training layer takes a BatchNormalization's place.

    Attributes:
        stride: an int, or (rows, columns); before it is lowered for small inputs.
        depthwise: whether a depthwise convolution does the scale and shift.
    """

    stride: Stride
    depthwise: bool


Action = Remove | Fold | Remap | Replace | Reclip | Sample
Kind = TypeVar("Kind", Remove, Fold, Remap, Replace, Reclip, Sample)


# ----------------------------------------------------------------------------------- plan


@dataclass(frozen=True)
class Unshared:
    """A layer that is called several times, of which some calls get weights of their own.

    Attributes:
        calls: the owner of each call then, in the order of the graph: the layer itself, or one that
            is made for it.
        weights: how many weights that adds.
        part: that number as a part of the weights that the model has.
    """

    calls: tuple[str, ...]
    weights: int
    part: float


@dataclass(frozen=True, eq=False)
class Plan:
    """Plan for a model.

    Attributes:
        mode: "auto", "fold", "depthwise", "strided" or "mbn".
        decisions: one for each BatchNormalization, in the order of the model.
        actions: what is done to layers, by owner as in `graph.Node`; all others are copied.
        unshared: layers of which some calls get weights of their own, by owner. Actions, and `into`
            of decisions, name the layers that are made for these calls.
        measurement: in mode "auto" what was measured; None where there was nothing to choose.
        notes: what else the user should know of the result, in sentences.
        verification: what `convert` gave beside the original; None where they were not compared.
        unverified: why they could not be compared, in a sentence, or "".
        speed: the latencies of the original and of the result, where `convert` measured them.
    """

    mode: str
    decisions: tuple[Decision, ...]
    actions: Mapping[str, Action] = field(default_factory=dict)
    unshared: Mapping[str, Unshared] = field(default_factory=dict)
    measurement: Measurement | None = None
    notes: tuple[str, ...] = ()
    verification: Comparison | None = None
    unverified: str = ""
    speed: Latencies | None = None

    def of(self, kind: type[Kind]) -> dict[str, Kind]:
        """The actions of one kind, by owner."""
        return {owner: act for owner, act in self.actions.items() if isinstance(act, kind)}

    @property
    def counts(self) -> dict[str, int]:
        """Number of BatchNormalizations by fate."""
        return dict(Counter(str(decision.action) for decision in self.decisions))

    @property
    def left(self) -> int:
        """Number of BatchNormalizations that stay, as they are or as fused operations."""
        return self.counts.get(Fate.KEPT, 0) + self.counts.get(Fate.FUSED, 0)

    @property
    def changes_something(self) -> bool:
        """Whether the model becomes another one by it."""
        return bool(self.actions)

    @property
    def merged(self) -> dict[str, tuple[str, ...]]:
        """For each layer that does the work of parallel branches, the others that go for it."""
        folds = self.of(Fold).items()
        return {owner: fold.sums.stands_for for owner, fold in folds if fold.sums is not None}

    @property
    def growth(self) -> str:
        """By how much weights of their own for calls make the model grow, in words, or ""."""
        if not self.unshared:
            return ""
        layers = len(self.unshared)
        weights = sum(unshared.weights for unshared in self.unshared.values())
        part = sum(unshared.part for unshared in self.unshared.values())
        which = "a shared layer" if layers == 1 else f"{layers} shared layers"
        return f"calls of {which} get weights of their own: {weights:,} more ({part:.1%})"

    def maker(self, owner: str, number: int) -> str:
        """The layer that makes a call: the owner, or one that is made for that call.

        Args:
            owner: of the call.
            number: which of the owner's calls it is, in the order of the graph.
        """
        unshared = self.unshared.get(owner)
        return owner if unshared is None else unshared.calls[number]

    @property
    def summary(self) -> str:
        """One line, such as "mode fold: 53 BatchNormalization: 53 folded"."""
        sums = len(self.merged)
        merged = f"; {sums} sum{'s' * (sums > 1)} of parallel branches merged" if sums else ""
        grown = f"; {self.growth}" if self.unshared else ""
        if not self.decisions:
            # A note may be on what cannot be seen into.
            none = (
                "no BatchNormalization can be seen"
                if self.notes
                else ("the model has no BatchNormalization")
            )
            return f"mode {self.mode}: {'' if sums else 'nothing to do: '}{none}{merged}"
        counts = ", ".join(f"{count} {action}" for action, count in sorted(self.counts.items()))
        return (
            f"mode {self.mode}: {len(self.decisions)} BatchNormalization: {counts}{merged}{grown}"
        )

    def to_dict(self) -> dict[str, Any]:
        """The plan in types that JSON knows."""
        return {
            "mode": self.mode,
            "summary": self.summary,
            "counts": self.counts,
            "decisions": [
                {"name": d.name, "action": str(d.action), "into": list(d.into), "reason": d.reason}
                for d in self.decisions
            ],
            "edits": [
                edit
                for owner, action in sorted(self.actions.items())
                for edit in _described(owner, action)
            ],
            "unshared": [
                {"layer": owner, "calls": list(u.calls), "weights": u.weights, "part": u.part}
                for owner, u in sorted(self.unshared.items())
            ],
            "measurement": self.measurement and self.measurement.to_dict(),
            "strides": {owner: sample.stride for owner, sample in self.of(Sample).items()},
            "notes": list(self.notes),
            "verification": self.verification and self.verification.to_dict(),
            "unverified": self.unverified,
            "speed": self.speed and self.speed.to_dict(),
        }

    def to_json(self) -> str:
        """The plan as JSON."""
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


def _described(owner: str, action: Action) -> list[dict[str, Any]]:
    """The maps, branches or bounds that an action brings to a layer, in types that JSON knows."""
    merged = []
    match action:
        case Fold(before=before, after=after, border=border):
            sides = {"input": before, "output": after}
            bordered = {} if border is None else {"input": {"border": list(border.outputs)}}
            merged = [] if action.sums is None else [_merged(owner, action.sums)]
        case Remap(map=m):
            sides, bordered = {"own map": m}, {}
        case Replace(map=m):
            sides, bordered = {"replacement": m}, {}
        case Reclip(channels=channels):
            return [_edit(owner, "bounds", channels, *_bounds(action))]
        case _:
            return []
    return merged + [
        _edit(owner, side, m.channels, m.scale, m.shift) | bordered.get(side, {})
        for side, m in sides.items()
        if m is not None
    ]


def _bounds(action: Reclip) -> tuple[Array, Array]:
    """Both bounds of each channel, infinite where there is none."""
    none = np.full(action.channels, np.inf)
    return (
        -none if action.lower is None else action.lower,
        none if action.upper is None else action.upper,
    )


def _edit(owner: str, side: str, channels: int, *arrays: Array) -> dict[str, Any]:
    checksum = hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()
    return {"layer": owner, "side": side, "channels": channels, "sha256": checksum}


def _merged(owner: str, sums: Branches) -> dict[str, Any]:
    """The branches that a layer sums, in types that JSON knows."""
    arrays = []
    for branch in sums.branches:
        arrays += [np.concatenate([np.zeros(0, int), *map(np.asarray, branch.places)])]
        for m in filter(None, (branch.before, branch.after)):
            arrays += [m.scale, m.shift]
    channels = sums.branches[0].after.channels
    edit = _edit(owner, "merged", channels, *arrays)
    return {**edit, "stands_for": list(sums.stands_for)}

"""The report on a rewritten model on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from mbn_rewrite import display
from mbn_rewrite.comparison import Comparison
from mbn_rewrite.frontends.footprint import Footprint
from mbn_rewrite.measurement import Latencies
from mbn_rewrite.plans import Plan
from mbn_rewrite.verification_on_disk import Verification


@dataclass(frozen=True)
class Report:
    """Result of rewriting a model on disk.

    Attributes:
        source: the path of the original.
        destination: the path of the rewritten SavedModel, or "" where none was written.
        plan: what became of every BatchNormalization.
        before: the size of the original.
        after: the size of the rewritten model; None for a dry run.
        comparisons: the written SavedModel beside the original, for each signature.
        unverified: signatures whose outputs were not compared, and why.
        by_xla: signatures that only XLA could run on this machine, of those compared. It leaves
            assertions out, and takes the nearest index for one that is out of bounds.
        as_it_was: functions that were carried over as they were, and why.
        left_out: functions that were not carried over, and why.
        speed: the latencies of the original and of what was written, where they were measured.
        frozen: whether its weights are constants.
        freezing: the latencies with variables and with constants for weights, where mode "auto"
            chose between them.
    """

    source: str
    destination: str
    plan: Plan
    before: Footprint
    after: Footprint | None = None
    comparisons: Mapping[str, Comparison] = field(default_factory=dict)
    unverified: Mapping[str, str] = field(default_factory=dict)
    as_it_was: Mapping[str, str] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)
    by_xla: tuple[str, ...] = ()
    speed: Latencies | None = None
    frozen: bool = False
    freezing: Latencies | None = None

    @property
    def comparison(self) -> Comparison | None:
        """The comparison of the signature that differs most; None where none was compared."""
        return max(
            self.comparisons.values(), key=lambda c: (not c.ok, c.max_rel_error), default=None
        )

    @property
    def ok(self) -> bool:
        """Whether all signatures agree within their tolerance."""
        return all(comparison.ok for comparison in self.comparisons.values())

    @property
    def changed(self) -> bool:
        """Whether the written model is another one than the original."""
        return self.plan.changes_something or self.frozen

    @property
    def after_operations(self) -> int:
        """How many operations the rewritten model has, in the signature that is counted."""
        return sum(self.after.ops.values()) if self.after else 0

    def to_dict(self) -> dict[str, Any]:
        """The report in types that JSON knows."""
        return {
            "source": self.source,
            "destination": self.destination,
            "before": asdict(self.before),
            "after": asdict(self.after) if self.after else None,
            "verification": {
                **Verification(self.comparisons, self.unverified).to_dict(),
                "by_xla": list(self.by_xla),
            },
            "carried_over_as_it_was": dict(self.as_it_was),
            "left_out": dict(self.left_out),
            "plan": self.plan.to_dict(),
            "frozen": self.frozen,
            "freezing": self.freezing and self.freezing.to_dict(),
            "changed": self.changed,
            "speed": self.speed and self.speed.to_dict(),
        }

    def to_json(self) -> str:
        """The report as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def table(self, full: bool = False) -> str:
        """The report as text, as `str` gives it; `full` for a row for every decision of many."""
        return display.report_text(self, full)

    def __str__(self) -> str:
        return self.table()

    def __repr__(self) -> str:
        return display.one_line(self, display.report_summary(self))

    def _repr_html_(self) -> str:
        return display.report_html(self)

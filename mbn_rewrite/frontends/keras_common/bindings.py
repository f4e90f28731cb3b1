"""What binds layers to be as they are, although calls of them can be seen."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from mbn_rewrite.frontends.keras_common.adapter import KerasAdapter
from mbn_rewrite.ir.graph import BatchNorm, Clip, Node, Opaque
from mbn_rewrite.ir.reasons import Change, Obstacle, Reason


@dataclass
class Bindings:
    """What binds the layers of a model.

    Attributes:
        parents: id of a sublayer -> label of its parent, whose calls were not seen.
        held: ids of layers in attributes of others.
        reads: id of a variable -> label of the layer whose code reads it.
        strangers: id of a layer -> label of the one whose code calls it, though it is kept where it
            cannot be exchanged, or where that cannot be seen.
        asked: id of a layer -> label of the one whose code asks what it is.
        in_code: ids of Functional and Sequential models whose layers code may have by number.
        reasons: id of a BatchNormalization -> why a call of it that is not a node has it stay.
    """

    parents: dict[int, str] = field(default_factory=dict)
    held: set[int] = field(default_factory=set)
    reads: dict[int, str] = field(default_factory=dict)
    strangers: dict[int, str] = field(default_factory=dict)
    asked: dict[int, str] = field(default_factory=dict)
    in_code: set[int] = field(default_factory=set)
    reasons: dict[int, Reason] = field(default_factory=dict)

    def applied(self, node: Node, layer: Any, keras: KerasAdapter) -> Node:
        """A node as it is by what binds its layer."""
        op, who = node.op, self._reader_of(layer, keras)
        if isinstance(op, BatchNorm) and not op.why_not(Change.REPLACE):
            reason = self._reason(layer, who)
            if reason:
                has_map = not reason.rules_out(Change.REPLACE)
                op = replace(op, reason=reason, map=op.map if has_map else None)
        elif op.chains or isinstance(op, Clip):
            if who:
                op = Opaque(f"has weights that code of {who} reads")
            elif id(layer) in self.strangers:
                op = Opaque(f"is kept where {self.strangers[id(layer)]} cannot have another layer")
            elif id(layer) in self.asked:
                op = Opaque(f"is asked by code of {self.asked[id(layer)]} what it is")
            elif id(layer) in self.parents:
                op = Opaque(
                    f"is held by {self.parents[id(layer)]}, whose calls cannot be seen, too"
                )
        return replace(node, op=op, held=id(layer) in self.held)

    def _reason(self, layer: Any, reader: str) -> Reason | None:
        """Why a BatchNormalization has to stay as it is, or None."""
        if id(layer) in self.reasons:
            return self.reasons[id(layer)]
        if reader:
            return Reason(Obstacle.READ_BY_CODE, reader)
        if id(layer) in self.strangers:
            return Reason(Obstacle.OUT_OF_REACH, self.strangers[id(layer)])
        if id(layer) in self.asked:
            return Reason(Obstacle.ASKED, self.asked[id(layer)])
        who = self.parents.get(id(layer), "")
        return Reason(Obstacle.HELD_TWICE, who) if who else None

    def _reader_of(self, layer: Any, keras: KerasAdapter) -> str:
        """Whose code reads weights of a layer itself, or ""."""
        if not self.reads or not isinstance(layer, keras.layers.Layer):
            return ""
        read = [self.reads.get(id(variable), "") for variable in layer.variables]
        return next(filter(None, read), "")

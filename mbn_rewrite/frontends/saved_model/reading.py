"""The functions of a SavedModel as passes see them, and the way back to their graphs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mbn_rewrite.frontends.saved_model.function_graph import FunctionGraph
from mbn_rewrite.frontends.saved_model.match_batchnorm import Norm
from mbn_rewrite.frontends.saved_model.op_site import Described
from mbn_rewrite.frontends.saved_model.stored_arrays import Stored
from mbn_rewrite.ir.graph import Graph


@dataclass(frozen=True)
class LinearCall:
    """One use of weights: the operation, and its description for passes."""

    function: FunctionGraph
    op: Any
    described: Described


@dataclass(frozen=True)
class NormCall:
    """One BatchNormalization in one function."""

    function: FunctionGraph
    norm: Norm


@dataclass(frozen=True)
class ClipCall:
    """One clip in one function: the operation, and its description for the planner."""

    function: FunctionGraph
    op: Any
    described: Described


@dataclass(frozen=True)
class PlainCall:
    """One operation without weights in one function, and its description for the planner."""

    function: FunctionGraph
    described: Described


@dataclass(frozen=True)
class Reading:
    """The neutral graph of some functions, with the calls behind each owner of weights.

    Attributes:
        graph: the neutral graph.
        linears: owner -> its calls.
        norms: owner -> its calls.
        clips: owner -> its call, the only one.
        plain: owner -> the operations of that name that merge values or do nothing to them.
        dtypes: the names of the dtypes in which weights are used.
    """

    graph: Graph
    linears: dict[str, list[LinearCall]]
    norms: dict[str, list[NormCall]]
    clips: dict[str, list[ClipCall]]
    plain: dict[str, list[PlainCall]]
    dtypes: frozenset[str]

    @property
    def variables(self) -> set[int]:
        """The variables, by id, that linear operations and BatchNormalizations read."""
        keys = {key for calls in self.norms.values() for call in calls for key in call.norm.keys}
        for calls in self.linears.values():
            keys |= {w.stored.key for call in calls for w in call.described.weights.values()}
        keys |= {inner for key in keys if key[0] == "computed" for inner in key[1]}
        return {key[1] for key in keys if key[0] == "variable"}

    def weight(self, owner: str, name: str) -> Stored:
        """The stored array that an owner calls by a name."""
        return self.linears[owner][0].described.weights[name].stored

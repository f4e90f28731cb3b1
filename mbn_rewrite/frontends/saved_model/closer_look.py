"""A closer look at outputs that differ: two graphs compared segment by segment.

Both are cut at discontinuous operations (see `discontinuities`). The original is run once. The
rewritten graph is run with the original's values in place of all real numbers that such operations
read, and must give, within the tolerance,

    before each of them  the values that the original has there,
    after the last       the outputs of the original.

By induction from one cut to the next, the rewritten graph as it is then differs from the original
by rounding, and by jumps whose side rounding decides. A mistake before a discontinuous operation,
after it or beside it lies in one of the segments.

In narrow dtypes each segment may differ from the original by a few times as much as the original
differs from itself in float32. Both are then computed in float32 too, where they have to agree
within the tolerance of float32 if their weights are kept in it. Likewise in float32, where nothing
else explains a difference: a network may be so sensitive that it is as far from itself in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import tensorflow as tf

from mbn_rewrite.comparison import (
    FLIPS,
    ROUNDINGS,
    SINGULAR,
    Comparison,
    rounding_tolerance,
    tolerance_for,
)
from mbn_rewrite.errors import RewriteError
from mbn_rewrite.frontends.reference_io import ReferenceIO
from mbn_rewrite.frontends.saved_model.discontinuities import Cuts, can_be_cut, cuts_between
from mbn_rewrite.frontends.saved_model.function_graph import FunctionGraph, function_graph_of
from mbn_rewrite.frontends.saved_model.loaded_model import Loaded
from mbn_rewrite.frontends.saved_model.runnable_graph import RunnableGraph, runnable_graph_of
from mbn_rewrite.frontends.saved_model.served import Call, loaded_call
from mbn_rewrite.frontends.saved_model.widening import (
    TO_FLOAT32,
    TO_FLOAT64,
    Widening,
    is_narrow,
    weight_dtypes,
)
from mbn_rewrite.output_pairs import Pair, compare_pair


@dataclass(frozen=True)
class Side:
    """One of two models.

    Attributes:
        graph: the graph of its function.
        inputs: tensors for its arguments, in order.
    """

    graph: FunctionGraph
    inputs: Sequence[Any]


@dataclass(frozen=True)
class _Run:
    """Arrays of both models for each tensor that is compared, computed between the same cuts."""

    original: list[np.ndarray]
    new: list[np.ndarray]


def look_closer(
    original: Side,
    new: Side,
    names: Sequence[str],
    plain: Comparison,
    rounding: bool,
    by_xla: bool = False,
) -> Comparison | None:
    """Finds out whether rounding explains a difference of outputs, or chance their agreement.

    Args:
        original: the model as it was.
        new: the rewritten one, with the same results in the same order.
        names: the names of the results.
        plain: the comparison of the results as they are.
        rounding: whether the rounding of a narrow dtype may explain more than the tolerance.
        by_xla: whether nothing but XLA can run them.

    Returns:
        The comparison between the cuts; the plain one where that is no better; where the outputs
        agree by chance, the difference before a cut; None where the graphs cannot be cut or run
        in part.
    """
    if not can_be_cut(original.graph) or not can_be_cut(new.graph):
        return None
    for xla in dict.fromkeys((by_xla, True)):
        with suppress(RewriteError):
            return _compared_by_segments(original, new, names, plain, rounding, xla)
    return None


def _compared_by_segments(
    original: Side, new: Side, names: Sequence[str], plain: Comparison, rounding: bool, xla: bool
) -> Comparison | None:
    runnable = runnable_graph_of(original.graph, xla), runnable_graph_of(new.graph, xla)
    narrow = rounding and is_narrow(runnable[0])
    cuts = cuts_between(original.graph, new.graph)
    compared = _SegmentComparison(original, new, runnable, cuts, names, plain)
    at_cuts = compared.result(narrow)
    if at_cuts.ok:
        return at_cuts
    deeper = cuts_between(original.graph, new.graph, steep=True)
    if len(deeper.cuts) > len(cuts.cuts) and compared.differs_in_few_places:
        found = _SegmentComparison(original, new, runnable, deeper, names, plain).result(narrow)
        if found.ok:
            return found
    if rounding and not narrow and not plain.ok:
        with suppress(RewriteError):  # of a graph that cannot be computed in float64
            found = compared.by_rounding(TO_FLOAT64)
            if found.ok:
                return found
    return None if cuts.missed else at_cuts


def look_closer_at_calls(
    original: Callable[[Any], Any],
    new: Callable[[Any], Any],
    inputs: Any,
    plain: Comparison,
    rounding: bool,
) -> Comparison | None:
    """`look_closer` at models in memory, by functions that call them.

    Args:
        original, new: functions of `inputs`, in whatever structure.
        plain, rounding: as for `look_closer`.
    """
    tensors = tf.nest.map_structure(tf.convert_to_tensor, inputs)
    flat = tf.nest.flatten(tensors, expand_composites=True)
    try:
        sides = [Side(_traced(function, tensors), flat) for function in (original, new)]
    except Exception:  # of a model that can only be called eagerly
        return None
    names = [f"output {i}" for i in range(len(sides[0].graph.results))]
    return look_closer(sides[0], sides[1], names, plain, rounding)


def look_closer_at_served(
    original: Loaded,
    new: Call,
    name: str,
    reference: ReferenceIO,
    plain: Comparison,
    rounding: bool,
) -> Comparison | None:
    """`look_closer` at a signature or method on disk.

    Args:
        original: the original, loaded again.
        new: the call of what was written.
        name: of the signature or method.
        reference: the inputs that the original was given, and its outputs.
        plain, rounding: as for `look_closer`.
    """
    sides = []
    for each in (loaded_call(original, name, reference), new):
        try:
            graph = function_graph_of(name, each.function, original.variable_in_graph)
        except Exception:  # of a graph that cannot be read, which was carried over as it was
            return None
        sides.append(Side(graph, each.inputs))
    names = [f"'{output}'" for output in reference.outputs]
    return look_closer(sides[0], sides[1], names, plain, rounding, reference.compiled)


def _traced(function: Callable[[Any], Any], inputs: Any) -> FunctionGraph:
    traced = tf.function(lambda data: function(data), autograph=False)
    return function_graph_of("model", traced.get_concrete_function(inputs), lambda name: None)


class _SegmentComparison:
    """Comparison of two graphs between some cuts."""

    def __init__(
        self,
        original: Side,
        new: Side,
        runnable: tuple[RunnableGraph, RunnableGraph],
        cuts: Cuts,
        names: Sequence[str],
        plain: Comparison,
    ) -> None:
        self._sides = original, new
        self._runnable = runnable
        self._cuts = cuts
        self._plain = plain
        self._names = [*(f"what '{cut.node}' reads" for cut in cuts.cuts), *names]
        self._fetched = (
            [*(cut.original_read for cut in cuts.cuts), *original.graph.results],
            [*(cut.read for cut in cuts.cuts), *new.graph.results],
        )
        ours = runnable[0].run(original.inputs, self._fetched[0])
        self._given = [tf.constant(array) for array in ours[: len(cuts.cuts)]]
        self._run = _Run(ours, self._rewritten(runnable[1], new.inputs, self._given))
        self._pairs = self._compared(self._run, [plain.tolerance] * len(ours))

    def _rewritten(self, graph: RunnableGraph, inputs: Sequence[Any], given: list[Any]) -> Any:
        places = [(cut.node, cut.index) for cut in self._cuts.cuts]
        return graph.run(inputs, self._fetched[1], dict(zip(places, given, strict=True)))

    def _compared(self, run: _Run, tolerances: Sequence[float]) -> list[Pair] | None:
        """The comparison of each tensor; None where shapes differ."""
        arrays = list(zip(run.original, run.new, strict=True))
        if any(a.shape != b.shape for a, b in arrays):
            return None
        return [
            compare_pair(name, a, b, tolerance)
            for name, (a, b), tolerance in zip(self._names, arrays, tolerances, strict=True)
        ]

    @property
    def differs_in_few_places(self) -> bool:
        """Whether only a few entries of each tensor differ."""
        pairs = self._pairs
        return pairs is not None and all(p.differing <= SINGULAR * p.size for p in pairs)

    def result(self, narrow: bool) -> Comparison:
        """The comparison that explains the difference, or else the plain one."""
        pairs = self._pairs
        if pairs is None:
            return self._plain
        if narrow:
            with suppress(RewriteError):  # of a graph that cannot be computed in float32
                return self.by_rounding(TO_FLOAT32)
        tolerances = [self._plain.tolerance] * len(pairs)
        if not self._cuts.cuts:
            return self._plain
        if not self._hold(pairs, tolerances):
            return self._unexplained(pairs, tolerances)
        decides = "" if self._plain.ok else ", so that rounding decides"
        return self._explained(pairs, tolerances, f"what they are computed from agrees{decides}")

    def by_rounding(self, widening: Widening) -> Comparison:
        """The comparison where the original may be far from itself in a wider dtype."""
        pairs = self._pairs
        if pairs is None:
            return self._plain
        cuts, wide = self._cuts.cuts, [widening.tensor(tensor) for tensor in self._given]
        inputs = [[widening.tensor(tensor) for tensor in side.inputs] for side in self._sides]
        original, new = map(widening.applied, self._runnable)
        places = [(cut.original_node, cut.index) for cut in cuts]
        exact = original.run(inputs[0], self._fetched[0], dict(zip(places, wide, strict=True)))
        run = _Run(exact, self._rewritten(new, inputs[1], wide))
        arrays = list(zip(exact, self._run.original, strict=True))
        if any(a.shape != b.shape for a, b in arrays):
            return self._plain
        allowed = [rounding_tolerance([a], [b], self._plain.tolerance) for a, b in arrays]
        if max(allowed) > ROUNDINGS * widening.most:
            return self._plain
        kept = set().union(*map(weight_dtypes, self._runnable))
        # Weights that are kept in a narrow dtype are rounded as often as values are.
        narrow, name = bool(kept & widening.narrow), widening.wide.name
        in_wide = allowed if narrow else [tolerance_for({name})] * len(allowed)
        exact_pairs = self._compared(run, in_wide)
        if exact_pairs is None:
            return self._plain
        for each, tolerances in ((exact_pairs, in_wide), (pairs, allowed)):
            if not self._hold(each, tolerances):
                return self._unexplained(each, tolerances)
        error = max((pair.rel_error for pair in exact_pairs if not pair.discrete), default=0.0)
        why = f"the original's own rounding explains it: in {name} max rel error {error:.3g}"
        return self._explained(pairs, allowed, why)

    def _hold(self, pairs: list[Pair], tolerances: Sequence[float]) -> bool:
        """Whether all is within the tolerances, apart from flips after cuts that were missed."""
        flips = min(1.0, FLIPS * self._plain.tolerance) if self._cuts.missed else 0.0
        return all(
            pair.differing <= flips * pair.size if pair.discrete else pair.rel_error <= tolerance
            for pair, tolerance in zip(pairs, tolerances, strict=True)
        )

    def _unexplained(self, pairs: list[Pair], tolerances: Sequence[float]) -> Comparison:
        """The plain comparison; where outputs agree by chance, the difference before them."""
        compared = [
            (pair, tolerance)
            for pair, tolerance in zip(pairs, tolerances, strict=True)
            if not pair.discrete and not pair.rel_error <= tolerance
        ]
        if not self._plain.ok or self._cuts.missed or not compared:
            return self._plain
        worst, tolerance = max(compared, key=lambda each: each[0].rel_error)
        return replace(
            self._plain,
            max_abs_error=worst.abs_error,
            max_rel_error=worst.rel_error,
            tolerance=tolerance,
            note=f"the outputs agree, but by chance: {worst.note}",
        )

    def _explained(self, pairs: list[Pair], tolerances: Sequence[float], why: str) -> Comparison:
        if self._cuts.missed:
            why = "no more than rounding explains"
        real = [(p, t) for p, t in zip(pairs, tolerances, strict=True) if not p.discrete]
        worst = max(
            real, key=lambda pair: pair[0].rel_error / pair[1] if pair[1] else 0.0, default=None
        )
        return replace(
            self._plain,
            max_abs_error=max((pair.abs_error for pair, _ in real), default=0.0),
            max_rel_error=worst[0].rel_error if worst else 0.0,
            tolerance=worst[1] if worst else self._plain.tolerance,
            compared=sum(pair.size - pair.alike for pair in pairs),
            may_differ=self._plain.differing,
            note="; ".join(filter(None, (self._plain.note, why))),
        )

"""Discontinuous operations, which turn almost equal inputs into wholly different outputs.

An argmax, a threshold or a rounding turns the last bit of its input into another class, another
truth value, another level; a logarithm or a division does so near zero. Two graphs that differ by
rounding alone agree up to the next such operation, and after it once it is given the same input.
So graphs are compared segment by segment, cut at the inputs of such operations; see `closer_look`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from mbn_rewrite.frontends.saved_model.function_graph import FunctionGraph, source_of
from mbn_rewrite.frontends.saved_model.inlining import bodies_called, called_by

# Operations that are discontinuous in the real numbers that they read.
_DISCONTINUOUS = frozenset({
    *("ArgMax", "ArgMin", "MaxPoolWithArgmax", "TopK", "TopKV2", "ApproxTopK", "NthElement"),
    *("InTopK", "InTopKV2", "Where", "Sign", "Round", "Rint", "Floor", "Ceil", "FloorDiv"),
    *("FloorMod", "Mod", "TruncateDiv", "TruncateMod", "Bucketize", "LowerBound", "UpperBound"),
    *("Greater", "GreaterEqual", "Less", "LessEqual", "Equal", "NotEqual", "ApproximateEqual"),
    *("IsNan", "IsInf", "IsFinite", "CropAndResize", "ImageProjectiveTransformV2"),
    *("ImageProjectiveTransformV3", "CombinedNonMaxSuppression", "GenerateBoundingBoxProposals"),
    *("CTCGreedyDecoder", "CTCBeamSearchDecoder", "HistogramFixedWidth", "AsString"),
    *("XlaSort", "XlaVariadicSort", "XlaKeyValueSort", "XlaArgMax", "StringFormat"),
})  # fmt: skip
_DISCONTINUOUS_FAMILIES = ("NonMaxSuppression", "FakeQuant", "Quantize", "Unique")
# Operations whose slope is unbounded somewhere.
_STEEP = frozenset({
    *("Log", "Log1p", "Reciprocal", "Inv", "RealDiv", "Div", "DivNoNan", "Xdivy", "Xlogy"),
    *("Xlog1py", "Rsqrt", "Sqrt", "Pow", "Atan2", "Acos", "Asin", "Acosh", "Atanh", "Tan"),
    *("Erfinv", "Ndtri", "Lgamma", "Digamma", "Angle", "MatrixInverse", "MatrixSolve"),
    *("Cholesky", "Svd", "Qr", "SelfAdjointEigV2", "Eig", "LogMatrixDeterminant"),
})  # fmt: skip
_DIVISIONS = frozenset(
    {"RealDiv", "Div", "DivNoNan", "Xdivy"}
)  # only where the divisor is computed
_GIVEN = frozenset({"Const", "ReadVariableOp", "Placeholder"})  # operations that compute nothing
# Operations that hide what they compute.
_OPAQUE = frozenset({"XlaCallModule", "XlaLaunch", "PyFunc", "PyFuncStateless", "EagerPyFunc"})
_FRAMES = frozenset({"Switch", "Merge", "Enter", "Exit", "NextIteration"})
_MOST_CALLS = 4  # levels of calls that a written function may lie deeper than the original


@dataclass(frozen=True)
class Cut:
    """An input of an operation, in two graphs.

    Attributes:
        node: the name of the operation in the new graph.
        index: which of its inputs.
        read: the tensor that it reads in the new graph.
        original_node: the name of the same operation in the original graph.
        original_read: the tensor that it reads there.
    """

    node: str
    index: int
    read: str
    original_node: str
    original_read: str


@dataclass(frozen=True)
class Cuts:
    """Places at which two graphs are cut.

    Attributes:
        cuts: the inputs at which they are cut.
        missed: the names of operations at which they should be cut, but cannot be.
    """

    cuts: tuple[Cut, ...]
    missed: tuple[str, ...]


def cuts_between(original: FunctionGraph, new: FunctionGraph, steep: bool = False) -> Cuts:
    """The places to cut two graphs, one of which was rewritten from the other.

    Args:
        steep: whether to cut in front of operations that are steep, too.
    """
    ops = _cut_ops(new, steep)
    theirs = {op.name: op for op in _cut_ops(original, steep)}
    pairs = _paired(ops, theirs)
    cuts = []
    missed = [op.name for op in _upstream(new) if _hides_discontinuity(new, op, steep)]
    for op in ops:
        other = pairs.get(op.name)
        if other is None or [t.dtype for t in other.inputs] != [t.dtype for t in op.inputs]:
            missed.append(op.name)
            continue
        for i in _real_inputs(op):
            cuts.append(Cut(op.name, i, op.inputs[i].name, other.name, other.inputs[i].name))
    return Cuts(tuple(cuts), tuple(missed))


def can_be_cut(graph: FunctionGraph) -> bool:
    """Whether a graph can be cut: not if it has control flow of TensorFlow 1."""
    return not any(op.type in _FRAMES for op in graph.operations)


def _cut_ops(graph: FunctionGraph, steep: bool) -> list[Any]:
    """The operations of a graph in front of which it is cut, in the order of `_upstream`."""
    ops = list(_upstream(graph))
    cut = [op for op in ops if _is_discontinuous(op.node_def) or (steep and _is_steep(op))]
    calls = [op for op in ops if _is_discontinuous_inside(graph, op, steep)]
    names = {op.name for op in [*cut, *calls, *(filler for op in calls for filler in _fillers(op))]}
    return [op for op in ops if op.name in names and _real_inputs(op)]


def _hides_discontinuity(graph: FunctionGraph, op: Any, steep: bool) -> bool:
    """Whether an operation may be discontinuous in values that are computed inside it alone."""
    reads_variables = any(tensor.dtype == tf.resource for tensor in op.inputs)
    return op.type in _OPAQUE or (reads_variables and _is_discontinuous_inside(graph, op, steep))


def _fillers(op: Any) -> Iterator[Any]:
    """The operations that fill the lists of tensors that an operation is given."""
    pending = [tensor.op for tensor in op.inputs if tensor.dtype == tf.variant]
    seen: set[str] = set()
    while pending:
        filler = pending.pop()
        if filler.name not in seen:
            seen.add(filler.name)
            yield filler
            pending += [tensor.op for tensor in filler.inputs if tensor.dtype == tf.variant]


def _real_inputs(op: Any) -> list[int]:
    """The numbers of the inputs that are real or complex and computed."""
    return [
        i
        for i, tensor in enumerate(op.inputs)
        if _is_real(tensor.dtype) and source_of(tensor).op.type not in _GIVEN
    ]


def _is_real(dtype: Any) -> bool:
    return bool(dtype.is_floating or dtype.is_complex)


def _is_discontinuous(node: Any) -> bool:
    """Whether a node is discontinuous in real numbers that it reads."""
    if node.op == "Cast":
        return _reads_real(node, "SrcT") and not _reads_real(node, "DstT")
    # Comparisons of integers, by which loops count, do not matter.
    known = node.op in _DISCONTINUOUS or node.op.startswith(_DISCONTINUOUS_FAMILIES)
    return known and _reads_real(node, "T")


def _reads_real(node: Any, attribute: str) -> bool:
    """Whether a dtype of a node is real or complex, or not known."""
    if attribute not in node.attr or not node.attr[attribute].HasField("type"):
        return True
    return _is_real(tf.as_dtype(node.attr[attribute].type))


def _is_steep(op: Any) -> bool:
    return op.type in _STEEP and (op.type not in _DIVISIONS or 1 in _real_inputs(op))


def _is_discontinuous_inside(graph: FunctionGraph, op: Any, steep: bool) -> bool:
    """Whether a loop, a branch or a call that stays one is discontinuous; it is cut as a whole."""
    if all(name == op.type for name in called_by(op.node_def)):
        return False
    return any(
        _is_discontinuous(node) or (steep and node.op in _STEEP)
        for body in bodies_called(graph.graph_def, op.node_def)
        for node in body.node_def
    )


def _upstream(graph: FunctionGraph) -> Iterator[Any]:
    """The operations that outputs are computed from, each after what it reads.

    The order is that of the computation, so that it is the same in two graphs of one model.
    """
    seen: set[str] = set()
    pending = [(tensor.op, False) for tensor in reversed(graph.outputs)]
    while pending:
        op, is_read = pending.pop()
        if is_read:
            yield op
        elif op.name not in seen:
            seen.add(op.name)
            pending.append((op, True))
            pending += [(tensor.op, False) for tensor in reversed(op.inputs)]


def _paired(ops: list[Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """The counterparts in the original of operations of the new graph, by name.

    Names stay as they were, except that written functions are called by others. Where no operation
    has that name, those of one type are paired in order. A wrong pair can make a correct model
    fail, but never a wrong one pass: the proof is the same for any pairs.
    """

    def counterpart(op: Any, depth: int) -> Any:
        found = theirs.get("/".join(op.name.split("/")[depth:]))
        return found if found is not None and found.type == op.type else None

    depth = max(range(_MOST_CALLS), key=lambda n: sum(counterpart(op, n) is not None for op in ops))
    pairs = {op.name: found for op in ops if (found := counterpart(op, depth)) is not None}
    taken = {op.name for op in pairs.values()}
    left: dict[str, tuple[list[Any], list[Any]]] = defaultdict(lambda: ([], []))
    for op in ops:
        if op.name not in pairs:
            left[op.type][0].append(op)
    for op in theirs.values():
        if op.name not in taken:
            left[op.type][1].append(op)
    for mine, their in left.values():
        if len(mine) == len(their):
            pairs |= {op.name: other for op, other in zip(mine, their, strict=True)}
    return pairs

"""Reads the functions of a SavedModel into one neutral graph. Decides nothing, changes nothing.

All functions that will be carried over are read together, since they share weights: what one
of them needs as it is, another cannot fold into. Operations that use the same stored arrays
are calls of one owner, as the calls of one Keras layer are.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import tensorflow as tf

from mbn_rewrite.frontends.saved_model import flags, hidden_batchnorm
from mbn_rewrite.frontends.saved_model.function_graph import (
    SHAPE_ONLY,
    FunctionGraph,
    Writes,
    source_of,
)
from mbn_rewrite.frontends.saved_model.inlining import display_name
from mbn_rewrite.frontends.saved_model.match_arithmetic import arithmetic_norms
from mbn_rewrite.frontends.saved_model.match_batchnorm import FUSED, Norm, fused_norm
from mbn_rewrite.frontends.saved_model.normalizations import scale_and_shift
from mbn_rewrite.frontends.saved_model.op_site import Described, Site, shape_of
from mbn_rewrite.frontends.saved_model.op_table import describe
from mbn_rewrite.frontends.saved_model.quantisation import is_quantised, wrapper_of
from mbn_rewrite.frontends.saved_model.reading import (
    ClipCall,
    LinearCall,
    NormCall,
    PlainCall,
    Reading,
)
from mbn_rewrite.frontends.saved_model.scopes import common_scope, shared_scope, without_leaf
from mbn_rewrite.frontends.saved_model.stored_arrays import Weight
from mbn_rewrite.frontends.saved_model.variable_writes import ALIASES
from mbn_rewrite.frontends.saved_model.weight_uses import WeightUses
from mbn_rewrite.frontends.saved_model.weights import Constants
from mbn_rewrite.ir.graph import (
    Affine,
    BatchNorm,
    Clip,
    Graph,
    HiddenBatchNorm,
    Linear,
    Merge,
    Node,
    Op,
    Opaque,
    Recurrent,
    Several,
    Value,
    fused_operation_takes,
)
from mbn_rewrite.ir.reasons import Obstacle, Reason


def read(functions: Iterable[FunctionGraph], writes: Writes, pinned: Iterable[Any] = ()) -> Reading:
    """Reads functions.

    Args:
        functions: the functions.
        writes: variables that they, and functions carried over unread, write to.
        pinned: variables that functions carried over unread use.
    """
    keys = {("variable", id(variable)) for variable in pinned}
    reader = _Reader(writes, WeightUses(writes, keys))
    for function in functions:
        reader.read(function)
    return reader.finish()


@dataclass
class _Reader:
    writes: Writes
    uses: WeightUses
    values: list[Value] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    outputs: set[int] = field(default_factory=set)
    hidden: dict[Any, HiddenBatchNorm] = field(default_factory=dict)
    linears: dict[str, list[LinearCall]] = field(default_factory=dict)
    norms: dict[str, list[NormCall]] = field(default_factory=dict)
    clips: dict[int, ClipCall] = field(default_factory=dict)  # by the number of their node
    plain: dict[int, PlainCall] = field(default_factory=dict)  # by the value it gives
    otherwise: dict[int, Op] = field(default_factory=dict)  # likewise, see `Described`
    dtypes: set[str] = field(default_factory=set)
    owners: dict[Any, str] = field(default_factory=dict)
    taken: set[str] = field(default_factory=set)
    seen: set[Any] = field(default_factory=set)  # keys of `hidden` that are listed anyway
    functions: int = 0  # number of the function at hand
    quantised: bool = False  # whether it is of a model that was trained for quantisation
    scope: str = ""  # what all names of the function at hand begin with

    # -- one function --------------------------------------------------------------------

    def read(self, function: FunctionGraph) -> None:
        self.functions += 1
        self.quantised = is_quantised(function)
        constants = Constants(function, self.writes)
        described, norms = self._recognised(function, constants)
        linear = [name for name, d in described.items() if d.weights]
        self.scope = shared_scope([*linear, *norms])
        self.seen |= {
            ("hidden", key[1])
            for norm in norms.values()
            for key in norm.keys
            if key[0] == "variable"
        }
        known: dict[str, int] = {}  # tensor name -> value
        inside = {op.name for d in described.values() for op in d.absorbed}
        inside |= {op.name for norm in norms.values() for op in norm.ops}
        for op in function.valued:
            if op.name in norms:
                self._add_norm(function, norms[op.name], known)
            elif (
                op.name in described
                and (op.name not in inside or described[op.name].absorbed)
                and not self._is_constant(constants, op)
            ):
                self._add(function, op, described[op.name], known)
            self.uses.note(constants, op, f"{op.type} '{self._shown(op.name)}'")
            self._add_written(function, constants, op)
            self._add_hidden(function, op)
            self._add_switched(function, constants, op)
            self._add_of_several_axes(function, constants, op)
        self._add_constants(function, known)
        for tensor in function.outputs:
            self.outputs.add(self._value(source_of(tensor), known))
            self.uses.note_output(constants, tensor)

    def _add_constants(self, function: FunctionGraph, known: dict[str, int]) -> None:
        """Adds nodes for values that operations read but that were taken for weights."""
        given = {value for node in self.nodes for value in node.outputs}
        for name, value in known.items():
            if value not in given:
                op = function.graph.get_tensor_by_name(name).op
                why = Opaque("is a constant")
                self.nodes.append(Node(self._shown(op.name), op.type, why, (), (value,)))

    def _recognised(
        self, function: FunctionGraph, constants: Constants
    ) -> tuple[dict[str, Described], dict[str, Norm]]:
        """Descriptions of operations, and the BatchNormalizations, by the operation they end in."""
        described: dict[str, Described] = {}
        norms: dict[str, Norm] = {}
        absorbed: set[str] = set()
        for op in function.valued:
            norm = fused_norm(constants, op) if op.type in FUSED else None
            if norm is not None:
                norms[norm.sink.op.name] = norm
            elif op.type not in ALIASES | SHAPE_ONLY and op.type != "IdentityN":
                found = describe(Site(op, constants))
                described[op.name] = found
                absorbed.update(o.name for o in found.absorbed)
        for norm in arithmetic_norms(constants, absorbed):
            norms[norm.sink.op.name] = norm
        absorbed |= {op.name for norm in norms.values() for op in norm.ops}
        for op in function.valued:
            scaled = scale_and_shift(Site(op, constants)) if op.type == "Mul" else None
            if scaled and not absorbed & {o.name for o in (op, *scaled.absorbed)}:
                described[op.name] = scaled
        return described, norms

    def _is_constant(self, constants: Constants, op: Any) -> bool:
        """Whether an operation only serves to compute constants."""
        if not op.outputs or op.type == "Placeholder":
            return op.name in constants.function.captures
        return constants.is_fixed(op.outputs[0])

    def _add(
        self, function: FunctionGraph, op: Any, described: Described, known: dict[str, int]
    ) -> None:
        neutral = described.op
        dtype, otherwise = "float32", None
        owner = self._shown(op.name)
        if isinstance(neutral, (Linear, Recurrent)):
            keys = tuple(weight.stored.key for weight in described.weights.values())
            owner = self._owner(keys, without_leaf(owner))
            is_loop = isinstance(neutral, Recurrent)  # whose first results count steps
            result = described.data[0] if is_loop else op.outputs[0]
            dtype = _narrowest(described.weights.values(), result)
            self.dtypes.add(result.dtype.name)
            self.linears.setdefault(owner, []).append(LinearCall(function, op, described))
            otherwise = described.otherwise
        elif isinstance(neutral, Clip):
            dtype = _dtype_name(op.outputs[0].dtype.name)
            self.clips[len(self.nodes)] = ClipCall(function, op, described)
        inputs = tuple(self._value(source_of(tensor), known) for tensor in described.data)
        outputs = [described.result] if described.result is not None else []
        if len(op.outputs) > 1:
            outputs = list(op.outputs)
        results = tuple(self._value(tensor, known) for tensor in outputs)
        if isinstance(neutral, Several):
            for each, value in zip(neutral.ops, results, strict=True):
                node = Node(owner, op.type, each, inputs, (value,), dtype, function=self.functions)
                self.nodes.append(node)
        elif results:
            # Within loops, no calls are told apart.
            why = "a loop reads its weights" if isinstance(neutral, Recurrent) else ""
            node = Node(
                *(owner, op.type, neutral, inputs, results, dtype),
                function=self.functions,
                why_shared=why,
            )
            self.nodes.append(node)
        if otherwise is not None:
            self.otherwise[results[0]] = otherwise
        if isinstance(neutral, (Affine, Merge)):
            self.plain[results[0]] = PlainCall(function, described)

    def _add_norm(self, function: FunctionGraph, norm: Norm, known: dict[str, int]) -> None:
        stored = tuple(key for key in norm.keys if key[0] != "constant")
        key = (stored, _digest(norm)) if stored else (function.name, norm.sink.op.name)
        owner = self._owner(key, common_scope([self._shown(op.name) for op in norm.ops]))
        before, after = norm.source.dtype.name, norm.sink.dtype.name
        op = BatchNorm(norm.map, norm.reason, fusible=_fusible(norm), convolvable=convolvable(norm))
        wrapper = wrapper_of(norm.sink.op.name) if self.quantised else ""
        if wrapper:
            op = BatchNorm(None, Reason(Obstacle.QUANTISED, f"wrapper '{wrapper}'"))
        elif before != after and not norm.reason:
            op = replace(op, reason=Reason(Obstacle.CASTS, f"{before} into {after}"), fusible=False)
        self.dtypes.add(after)
        self.norms.setdefault(owner, []).append(NormCall(function, norm))
        source = self._value(source_of(norm.source), known)
        result = self._value(norm.sink, known)
        self.nodes.append(
            Node(owner, "BatchNormalization", op, (source,), (result,), _dtype_name(after))
        )

    def _shown(self, name: str) -> str:
        return display_name(name).removeprefix(self.scope)

    def _value(self, tensor: Any, known: dict[str, int]) -> int:
        if tensor.name not in known:
            known[tensor.name] = len(self.values)
            self.values.append(Value(shape_of(tensor), tensor.dtype.base_dtype.name))
        return known[tensor.name]

    def _owner(self, key: Any, name: str) -> str:
        """The owner of stored arrays: one name, with a number if that is taken."""
        if key not in self.owners:
            owner = _numbered(name, self.taken)
            self.owners[key] = owner
            self.taken.add(owner)
        return self.owners[key]

    def _add_written(self, function: FunctionGraph, constants: Constants, op: Any) -> None:
        """Lists a BatchNormalization written out as arithmetic whose variance is no constant."""
        for variable, writer in hidden_batchnorm.written_variances(constants, op):
            name, reason = common_scope([self._shown(op.name)]), Reason(Obstacle.WRITTEN, writer)
            self._hide(("written", id(variable)), name, function.name, reason)

    def _add_hidden(self, function: FunctionGraph, op: Any) -> None:
        """Lists the BatchNormalizations in the functions that an operation calls."""
        place = self._shown(op.name)
        label = f"{op.type} '{place}'"
        for found in hidden_batchnorm.in_functions_called(function, op):
            name, condition = f"{place}/{without_leaf(found.node)}", found.condition
            advice = "" if condition is None else flags.advice(function, op, condition)
            reason = Reason(Obstacle.IN_BODY, label)
            if advice:
                reason = Reason(Obstacle.BRANCH, advice)
            if found.variable is None:
                self._hide((function.name, found.body, found.node), name, label, reason)
            else:
                self._hide(("hidden", id(found.variable)), name, label, reason)

    def _add_switched(self, function: FunctionGraph, constants: Constants, op: Any) -> None:
        """Lists a BatchNormalization behind a switch of TensorFlow 1."""
        switch = hidden_batchnorm.switched_variance(constants, op)
        if switch is not None:
            reason = Reason(Obstacle.BRANCH, flags.advice_on_switch(function, switch))
            variable = function.variable(switch.op.inputs[0])
            key = ("hidden", function.name if variable is None else id(variable))
            self._hide(key, common_scope([self._shown(op.name)]), function.name, reason)

    def _add_of_several_axes(self, function: FunctionGraph, constants: Constants, op: Any) -> None:
        """Lists a BatchNormalization over several axes."""
        found = hidden_batchnorm.over_several_axes(constants, op)
        if found is not None:
            stored, axes = found
            name = common_scope([self._shown(op.name)])
            reason = Reason(Obstacle.SEVERAL_AXES, axes)
            self._hide(("axes", stored.key), name, function.name, reason)

    def _hide(self, key: Any, name: str, holder: str, reason: Reason) -> None:
        """Lists a BatchNormalization that stays, once."""
        if key not in self.owners:
            owner, norm = self._owner(key, name), BatchNorm(None, reason)
            self.hidden[key] = HiddenBatchNorm(owner, holder, norm, None, "float32")

    # -- all functions -------------------------------------------------------------------

    def finish(self) -> Reading:
        fixed = {owner: self.uses.why_fixed(calls) for owner, calls in self.linears.items()}
        nodes = []
        plain: dict[str, list[PlainCall]] = {}
        for node in self.nodes:
            if isinstance(node.op, (Linear, Recurrent)):
                if fixed[node.owner]:
                    op = self.otherwise.get(node.outputs[0], Opaque(fixed[node.owner]))
                    node = replace(node, op=op)
            elif not isinstance(node.op, BatchNorm) and node.owner in self.taken:
                # It is called as the scope of an operation that has weights.
                node = replace(node, owner=f"{node.owner}:0")
            if isinstance(node.op, (Affine, Merge)):
                plain.setdefault(node.owner, []).append(self.plain[node.outputs[0]])
            nodes.append(node)
        clips = self._named_clips(nodes)
        linears = self.linears
        graph = Graph(
            tuple(self.values),
            tuple(nodes),
            frozenset(self.outputs),
            tuple(hidden for key, hidden in self.hidden.items() if key not in self.seen),
            lambda owner, name: linears[owner][0].described.weights[name].stored.read(),
        )
        return Reading(graph, linears, self.norms, clips, plain, frozenset(self.dtypes))

    def _named_clips(self, nodes: list[Node]) -> dict[str, list[ClipCall]]:
        """The clips by owner; in `nodes`, those called as another node gets a number."""
        taken = self.taken | {node.owner for node in nodes if not isinstance(node.op, Clip)}
        clips: dict[str, list[ClipCall]] = {}
        for index, call in self.clips.items():
            owner = _numbered(nodes[index].owner, taken)
            nodes[index] = replace(nodes[index], owner=owner)
            clips[owner] = [call]
            taken.add(owner)
        return clips


def _numbered(name: str, taken: Container[str]) -> str:
    """A name, with a number if it is taken."""
    free, number = name, 2
    while free in taken:
        free, number = f"{name}#{number}", number + 1
    return free


def convolvable(norm: Norm) -> bool:
    """Whether there is a depthwise convolution for its layout."""
    return norm.rank == 4 and norm.axis == 3


def _fusible(norm: Norm) -> bool:
    """Whether the fused operation could do what arithmetic does now."""
    return (
        norm.map is not None
        and norm.ops[0].type not in FUSED
        and fused_operation_takes(norm.source.dtype.name, norm.axis, norm.rank)
    )


def _digest(norm: Norm) -> Any:
    """Tells maps apart: one set of variables may be used with two epsilons."""
    m = norm.map
    return norm.reason if m is None else (m.axis, m.scale.tobytes(), m.shift.tobytes())


def _narrowest(weights: Iterable[Weight], result: Any) -> str:
    names = [weight.dtype for weight in weights] + [result.dtype.name]
    return _dtype_name(min(names, key=lambda name: tf.as_dtype(name).size))


def _dtype_name(name: str) -> str:
    return name if name in ("float16", "bfloat16", "float32", "float64") else "float32"

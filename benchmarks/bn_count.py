"""Counts the BatchNormalization that is left in a graph, alike for all formats of graphs.

A reader for each format (TensorFlow, ONNX, OpenVINO) gives `Node`s, which say no more of an
operation than counting needs. What does not depend on the graph's inputs is constant, whether it
is stored as constant, is a variable, or is computed from either as the model runs. Then

    fused        operations that are a BatchNormalization at inference
    arithmetic   runs of elementwise operations on the data, each with one constant operand, of
                 which at least one multiplies or divides by a constant per channel (more than
                 one element, all along one axis). This is what BatchNormalization written as
                 arithmetic is, with its square root or after it was computed beforehand.
                 Scalings directly after one another are one. Additions alone are biases.
    depthwise    1x1 depthwise convolutions with one filter per channel: the same work in the
                 form of a convolution
    within       those that a convolution, or another operation that is not elementwise, does
                 on its way out: no operation of their own, but not gone either

`fused` and `arithmetic` are what is left. A per-channel scaling need not come from a
BatchNormalization (EfficientNet scales its input by channel): who counts subtracts those that the
original has. A BatchNormalization of one channel, once it is arithmetic, looks like any scaling by
a number, and is not counted; `one_channel` says how many there are. Bodies of loops and calls are
not looked into; `unseen` says how many there are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

SCALES, STEPS = ("multiply", "divide"), ("multiply", "divide", "add")


@dataclass(frozen=True)
class Node:
    """An operation, or what a graph starts from.

    Attributes:
        name: of the operation; others read it by this name.
        kind: "input", "constant", "multiply", "divide", "add" (or subtract), "fused" (a
            BatchNormalization), "depthwise" (a depthwise convolution), "within" (a convolution that
            does a BatchNormalization), "handed on" (its values are those of its first input),
            "call" (of what is not looked into) or "other".
        inputs: names of what it reads, in order.
        shape: of constants of floating-point numbers; () for others.
    """

    name: str
    kind: str
    inputs: tuple[str, ...] = ()
    shape: tuple[int, ...] = ()


@dataclass(frozen=True)
class Left:
    """How much BatchNormalization is left, and in what form; see the module."""

    fused: int = 0
    arithmetic: int = 0
    depthwise: int = 0
    within: int = 0
    unseen: int = 0

    @property
    def total(self) -> int:
        """What is left as BatchNormalization."""
        return self.fused + self.arithmetic

    @property
    def operations(self) -> int:
        """The operations of their own that do the work of a BatchNormalization."""
        return self.total + self.depthwise

    def without(self, others: int) -> Left:
        """Less the per-channel scalings that come from no BatchNormalization."""
        return replace(self, arithmetic=max(0, self.arithmetic - others))

    def __add__(self, other: Left) -> Left:
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Left(*(a + b for a, b in pairs))


def count(nodes: Iterable[Node]) -> Left:
    """What is left in a graph."""
    graph = _Graph(nodes)
    kinds = Counter(node.kind for node in graph.nodes.values() if node.name in graph.data)
    return Left(
        fused=kinds["fused"],
        arithmetic=len(graph.scalings()),
        depthwise=len(graph.depthwise()),
        within=kinds["within"],
        unseen=kinds["call"],
    )


def one_channel(nodes: Iterable[Node]) -> int:
    """How many fused operations normalise a single channel."""
    graph = _Graph(nodes)
    fused = [node for node in graph.nodes.values() if node.kind == "fused"]
    return sum(graph.size(node.inputs[1]) == 1 for node in fused)


class _Graph:
    """Nodes by name, and which of them depend on the inputs."""

    def __init__(self, nodes: Iterable[Node]) -> None:
        self.nodes = {node.name: node for node in nodes}
        self.readers: dict[str, list[Node]] = {}
        for node in self.nodes.values():
            for name in node.inputs:
                self.readers.setdefault(name, []).append(node)
        self.data: set[str] = set()
        pending = [node for node in self.nodes.values() if node.kind == "input"]
        while pending:
            node = pending.pop()
            if node.name not in self.data:
                self.data.add(node.name)
                pending += self.readers.get(node.name, [])

    def scalings(self) -> list[str]:
        """The names of the first per-channel scaling of each run."""
        return [node.name for node in self.nodes.values() if self._begins(node)]

    def depthwise(self) -> list[str]:
        """The names of the depthwise convolutions with one number per channel."""
        return [
            node.name
            for node in self.nodes.values()
            if node.kind == "depthwise" and self.size(node.inputs[1]) > 1
        ]

    def _begins(self, node: Node) -> bool:
        if not self._is_scaling(node):
            return False
        before = self._step_before(node)
        while before is not None and not self._is_scaling(before):
            before = self._step_before(before)
        return before is None

    def _is_scaling(self, node: Node) -> bool:
        if node.kind not in SCALES or self._operand(node) is None:
            return False
        return self.size(self._constant(node)) > 1

    def _step_before(self, node: Node) -> Node | None:
        """What comes before in the same run: nothing else reads it."""
        name = node.inputs[0] if node.kind == "handed on" else self._operand(node)
        if name is None or len(self.readers[name]) > 1:
            return None
        before = self.nodes.get(name)
        if before is None or before.kind not in (*STEPS, "handed on"):
            return None
        return before

    def _operand(self, node: Node) -> str | None:
        """What a step reads of the data, if its other operand is constant."""
        data = [name for name in node.inputs if name in self.data]
        if len(node.inputs) != 2 or len(data) != 1:
            return None
        return data[0] if node.kind != "divide" or data[0] == node.inputs[0] else None

    def _constant(self, node: Node) -> str:
        return next(name for name in node.inputs if name not in self.data)

    def size(self, name: str) -> int:
        """How many numbers a constant has, if they lie along one axis; else 0."""
        if name in self.data or name not in self.nodes:
            return 0
        node = self.nodes[name]
        if node.kind == "constant":
            return int(np.prod(node.shape)) if sum(n > 1 for n in node.shape) <= 1 else 0
        sizes = {self.size(name) for name in node.inputs} - {1}
        return sizes.pop() if len(sizes) == 1 else int(not sizes)


# ------------------------------------------------------------------------------ TensorFlow

_TF_KINDS = {
    "Mul": "multiply",
    "RealDiv": "divide",
    "Div": "divide",
    **dict.fromkeys(("Add", "AddV2", "Sub", "BiasAdd"), "add"),
    **dict.fromkeys(("Identity", "Snapshot", "StopGradient", "Cast", "Transpose"), "handed on"),
    "DepthwiseConv2dNative": "depthwise",
    "FusedDepthwiseConv2dNative": "depthwise",
    "BatchNormWithGlobalNormalization": "fused",
    **dict.fromkeys(("PartitionedCall", "StatefulPartitionedCall", "XlaLaunch"), "call"),
    **dict.fromkeys(("While", "StatelessWhile", "If", "StatelessIf"), "call"),
}


def tensorflow_nodes(
    graph_def: Any, arguments: int, variables: Mapping[str, Sequence[int]] | None = None
) -> list[Node]:
    """The nodes of a GraphDef without calls: as written, or as TensorFlow runs it.

    Args:
        graph_def: the graph. Operations that oneDNN's kernels run count as those that they are.
        arguments: how many of its `_Arg`s, by index, are inputs; the others are captures.
        variables: the shapes of captured variables by the name of their Placeholder. For
            `_Arg`s they are in the graph.
    """
    shapes = {name: tuple(shape) for name, shape in (variables or {}).items()}
    nodes = []
    for node in graph_def.node:
        kind, shape = _tensorflow_kind(node), ()
        if node.op in ("_Arg", "Placeholder"):
            captured = node.name in shapes or (
                node.op == "_Arg" and node.attr["index"].i >= arguments
            )
            kind = "constant" if captured else "input"
            shape = shapes.get(node.name) or (_shape_of_capture(node) if captured else ())
        elif node.op == "Const" and node.attr["value"].tensor.dtype in _FLOATING:
            shape = _sizes(node.attr["value"].tensor.tensor_shape)
        inputs = (name.split(":")[0] for name in node.input if not name.startswith("^"))
        nodes.append(Node(node.name, kind, tuple(inputs), shape))
    return nodes


def _shape_of_capture(node: Any) -> tuple[int, ...]:
    """Of a variable, whose handle it is, or of a tensor."""
    for attribute in ("_handle_shapes", "_output_shapes"):
        if attribute in node.attr and node.attr[attribute].list.shape:
            return _sizes(node.attr[attribute].list.shape[0])
    return ()


def _sizes(shape: Any) -> tuple[int, ...]:
    return tuple(dim.size for dim in shape.dim)


# Of types_pb2.DataType: float32, float64, bfloat16, float16.
_FLOATING = {1, 2, 14, 19}


def _tensorflow_kind(node: Any) -> str:
    op = node.op.removeprefix("_MklNative").removeprefix("_Mkl").removeprefix("_")
    if op == "Const":
        return "constant"
    if op.startswith("FusedBatchNorm") and "Grad" not in op:
        return "other" if node.attr["is_training"].b else "fused"
    if "fused_ops" in node.attr and b"FusedBatchNorm" in node.attr["fused_ops"].list.s:
        return "within"
    return _TF_KINDS.get(op, "other")


# ------------------------------------------------------------------------------------ ONNX

_ONNX_KINDS = {
    "Mul": "multiply",
    "Div": "divide",
    **dict.fromkeys(("Add", "Sub"), "add"),
    **dict.fromkeys(("Identity", "Cast", "Transpose"), "handed on"),
    # What ONNX Runtime puts around its convolutions of blocked layout.
    **dict.fromkeys(("ReorderInput", "ReorderOutput"), "handed on"),
    **dict.fromkeys(("Loop", "If", "Scan"), "call"),
}


def onnx_nodes(model: Any) -> list[Node]:
    """The nodes of an ONNX model, named by the first tensor that they give."""
    import onnx

    graph = model.graph
    nodes = [_onnx_constant(tensor.name, tensor) for tensor in graph.initializer]
    stored = {node.name for node in nodes}
    nodes += [Node(x.name, "input") for x in graph.input if x.name not in stored]
    producers: dict[str, str] = {}
    for node in graph.node:
        producers |= dict.fromkeys(node.output, node.output[0])
    for node in graph.node:
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type == "Constant":
            value = attributes.get("value")
            nodes.append(
                Node(node.output[0], "constant")
                if value is None
                else _onnx_constant(node.output[0], value)
            )
            continue
        inputs = tuple(producers.get(name, name) for name in node.input if name)
        nodes.append(Node(node.output[0], _onnx_kind(node, attributes), inputs))
    return nodes


def _onnx_constant(name: str, tensor: Any) -> Node:
    from onnx import TensorProto as T

    floating = tensor.data_type in (T.FLOAT, T.DOUBLE, T.FLOAT16, T.BFLOAT16)
    return Node(name, "constant", (), tuple(tensor.dims) if floating else ())


def _onnx_kind(node: Any, attributes: Mapping[str, Any]) -> str:
    if node.op_type == "BatchNormalization":
        return "other" if attributes.get("training_mode") else "fused"
    if node.op_type in ("Conv", "FusedConv") and attributes.get("group", 1) > 1:
        return "depthwise"
    return _ONNX_KINDS.get(node.op_type, "other")


# -------------------------------------------------------------------------------- OpenVINO

_OPENVINO_KINDS = {
    "Parameter": "input",
    "Constant": "constant",
    "Multiply": "multiply",
    "Divide": "divide",
    **dict.fromkeys(("Add", "Subtract"), "add"),
    **dict.fromkeys(("Convert", "Transpose"), "handed on"),
    "GroupConvolution": "depthwise",
    "BatchNormInference": "fused",
    **dict.fromkeys(("Loop", "If", "TensorIterator"), "call"),
}
# Operations of the runtime that go through a tensor only to do elementwise work on it.
_ELEMENTWISE = {"Eltwise", "Subgraph", "Multiply", "Add", "Math", "ScaleShift", "Power"}


def openvino_nodes(model: Any) -> list[Node]:
    """The nodes of an OpenVINO model, as converted."""
    nodes = []
    for op in model.get_ordered_ops():
        inputs = [x.get_source_output().get_node().get_friendly_name() for x in op.inputs()]
        kind = _OPENVINO_KINDS.get(op.get_type_name(), "other")
        shape: tuple[int, ...] = ()
        if kind == "constant" and op.get_element_type().is_real():
            shape = tuple(op.get_output_shape(0))
        nodes.append(Node(op.get_friendly_name(), kind, tuple(inputs), shape))
    return nodes


def openvino_left(model: Any, runtime_model: Any) -> Left:
    """What is left of a model when OpenVINO runs it.

    The operations of the runtime name those that they came from. What folds a scaling into the
    weights of a convolution has the scaling's name first; what does it on the way out has it
    later.

    Args:
        model: as converted.
        runtime_model: `get_runtime_model()` of the compiled model.
    """
    nodes = openvino_nodes(model)
    graph, written = _Graph(nodes), count(nodes)
    scalings, depthwise = set(graph.scalings()), set(graph.depthwise())
    found: Counter[str] = Counter()
    for op in runtime_model.get_ordered_ops():
        info = op.get_rt_info()
        layer = info["layerType"].astype(str)
        names = info["originalLayersNames"].astype(str).split(",")
        found["fused"] += layer == "BatchNormInference"
        for place, name in enumerate(names):
            if name in depthwise:
                found["within" if place else "depthwise"] += 1
            elif name in scalings and layer in _ELEMENTWISE:
                found["arithmetic"] += 1
            elif name in scalings and place:
                found["within"] += 1
    return Left(**found, unseen=written.unseen)

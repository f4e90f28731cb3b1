"""Readers of graphs: those of TensorFlow, ONNX, OpenVINO and LiteRT as nodes that are counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.peer_tools.bn_count import Graph, Left, Node, count

# ----------------------------------------------------------------------------- TensorFlow

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
    "Retval": "output",
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


def nodes_of(function: Any) -> list[Node]:
    """The graph of a concrete function as it was written, with its calls inlined."""
    from mbn_rewrite.frontends.saved_model.inlining import inlined

    graph_def = inlined(function).graph_def
    shapes = {id(variable.handle): variable.shape for variable in function.graph.variables}
    captures = function.captured_inputs
    placeholders = function.inputs[len(function.inputs) - len(captures) :]
    variables = {
        placeholder.op.name: tuple(shapes.get(id(capture), placeholder.shape))
        for placeholder, capture in zip(placeholders, captures, strict=True)
    }
    return tensorflow_nodes(graph_def, len(function.inputs), variables)


def _shape_of_capture(node: Any) -> tuple[int, ...]:
    """Shape of the variable whose handle it is, or of a tensor."""
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


# ----------------------------------------------------------------------------------- ONNX

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


# ------------------------------------------------------------------------------- OpenVINO

_OPENVINO_KINDS = {
    "Parameter": "input",
    "Result": "output",
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
    """The nodes of an OpenVINO model, as converted; of a runtime model only how they are tied."""
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
    """BatchNormalization that is left of a model when OpenVINO runs it.

    The operations of the runtime name those that they came from. What folds a scaling into the
    weights of a convolution has the scaling's name first; what does it on the way out has it
    later.

    Args:
        model: as converted.
        runtime_model: `get_runtime_model()` of the compiled model.
    """
    nodes = openvino_nodes(model)
    graph, written = Graph(nodes), count(nodes)
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


# --------------------------------------------------------------------------------- LiteRT

_LITERT_KINDS = {
    "MUL": "multiply",
    "DIV": "divide",
    **dict.fromkeys(("ADD", "SUB"), "add"),
    **dict.fromkeys(("CAST", "TRANSPOSE"), "handed on"),
    "DEPTHWISE_CONV_2D": "depthwise",
    **dict.fromkeys(("WHILE", "IF", "CALL"), "call"),
}


def litert_nodes(content: bytes) -> list[Node]:
    """The nodes of the main graph in a .tflite file, named by the first tensor that they give."""
    from tensorflow.lite.python import schema_py_generated as schema

    model = schema.ModelT.InitFromPackedBuf(content)
    graph = model.subgraphs[0]
    ops = {code: name for name, code in vars(schema.BuiltinOperator).items()}
    types = schema.TensorType
    # Of what was quantised, what scales a channel is a number of int8.
    numbers = (types.FLOAT32, types.FLOAT64, types.FLOAT16, types.BFLOAT16, types.INT8)
    nodes = [Node(str(i), "input") for i in graph.inputs]
    for i, tensor in enumerate(graph.tensors):
        if model.buffers[tensor.buffer].data is not None:
            shape = tuple(tensor.shape) if tensor.type in numbers else ()
            nodes.append(Node(str(i), "constant", (), shape))
    producers: dict[int, str] = {}
    for op in graph.operators:
        producers |= dict.fromkeys(op.outputs, str(op.outputs[0]))
    for op in graph.operators:
        code = model.operatorCodes[op.opcodeIndex]
        # Operators that are older than the second field have their number in the first alone.
        kind = _LITERT_KINDS.get(ops[max(code.builtinCode, code.deprecatedBuiltinCode)], "other")
        inputs = tuple(producers.get(i, str(i)) for i in op.inputs if i >= 0)
        activated = bool(getattr(op.builtinOptions, "fusedActivationFunction", 0))
        nodes.append(Node(str(op.outputs[0]), kind, inputs, (), activated))
    return nodes

"""ReLUs as the int8 kernels of LiteRT take them.

XNNPACK, which LiteRT runs on CPUs, has int8 kernels for a ReLU within a sum, a product or a
convolution, and none for one by itself. Where a ReLU reads a value that others read too, as in
pre-activation networks, the converter cannot put it into what gives the value. An original has a
BatchNormalization between them, in whose addition the ReLU is; folded, it is by itself, runs in
LiteRT's reference kernel, and breaks the network into parts. A product takes it in again.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import tensorflow as tf
from tensorflow.core.protobuf.saved_model_pb2 import SavedModel

from benchmarks.peer_tools.converters import ours
from benchmarks.peer_tools.work import Work


def put_relus_in_products(directory: Path) -> None:
    """Has each ReLU of float32 in a saved_model.pb read a product, with the number next to 1."""
    path = directory / "saved_model.pb"
    model = SavedModel.FromString(path.read_bytes())
    for graph in (meta_graph.graph_def for meta_graph in model.meta_graphs):
        _put_in_products(graph.node)
        for function in graph.library.function:
            _put_in_products(function.node_def, ":output:0", ":z:0")
    path.write_bytes(model.SerializeToString())
    (directory / "fingerprint.pb").unlink(missing_ok=True)  # of what it was


def _put_in_products(nodes: Any, of_constant: str = "", of_product: str = "") -> None:
    kind, there = tf.float32.as_datatype_enum, {node.name for node in nodes}
    for relu in [n for n in nodes if n.op in ("Relu", "Relu6") and n.attr["T"].type == kind]:
        if f"{relu.name}/product" in there:
            continue
        number = nodes.add(name=f"{relu.name}/number", op="Const", device=relu.device)
        if not of_constant:  # in a graph, loops are made of nodes, and a constant is within one
            number.input.append("^" + relu.input[0].split(":")[0])
        number.attr["dtype"].type = kind
        number.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(1 + 2**-23, tf.float32))
        product = nodes.add(name=f"{relu.name}/product", op="Mul", device=relu.device)
        product.attr["T"].type = kind
        product.input[:] = [relu.input[0], number.name + of_constant]
        relu.input[0] = product.name + of_product


def folded_with_products(work: Work) -> Path:
    """Folded, and its ReLUs put into products."""
    out, unfinished = work.output("ours_fold_products"), work.output("unfinished")
    if not out.exists():
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.copytree(ours("fold", 1)(work), unfinished)
        put_relus_in_products(unfinished)
        unfinished.rename(out)
    return out

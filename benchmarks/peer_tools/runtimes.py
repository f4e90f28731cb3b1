"""Runtimes: each loads a model from disk, answers calls, and knows what is left in what it runs.

TensorFlow and the other runtimes are imported where they are used, so that what is not installed
is missed by its own tool alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common.failures import Declined
from benchmarks.models.signatures import signature_of
from benchmarks.peer_tools.bn_count import Left, count, count_nodes
from benchmarks.peer_tools.nodes import (
    litert_nodes,
    nodes_of,
    onnx_nodes,
    openvino_left,
    openvino_nodes,
    tensorflow_nodes,
)

Arrays = Mapping[str, np.ndarray]


class TensorFlow:
    """Serves `serving_default` of a SavedModel as TensorFlow does.

    What it runs is in the graphs that the runtime reports (`RunMetadata.partition_graphs` of the
    functions called): after Grappler, and after operations were exchanged for those of oneDNN.
    """

    def __init__(self, path: Path, inputs: Arrays, outputs: Sequence[str], threads: int) -> None:
        import tensorflow as tf

        self._owner = tf.saved_model.load(str(path))  # it holds the variables
        self._serve = signature_of(self._owner)
        specs = self._serve.structured_input_signature[1]
        names = _matched(inputs, [{name} for name in specs])
        self._inputs = {
            name: tf.constant(inputs[given], specs[name].dtype)
            for given, name in zip(inputs, names_of(specs, names), strict=True)
        }
        given = list(self._serve.structured_outputs)
        self._outputs = names_of(given, _matched(outputs, [{name} for name in given]))
        graphs = [tensorflow_nodes(graph, self._arguments) for graph in self._graphs_of_a_call()]
        self.at_run = sum(map(count, graphs), Left())
        self.nodes = sum(map(count_nodes, graphs))

    def __call__(self) -> list[np.ndarray]:
        results = self._serve(**self._inputs)
        return [results[name].numpy() for name in self._outputs]

    @property
    def in_file(self) -> Left:
        return count(nodes_of(self._serve))

    @property
    def _arguments(self) -> int:
        return len(self._serve.inputs) - len(self._serve.captured_inputs)

    def _graphs_of_a_call(self) -> list[Any]:
        from tensorflow.python.eager import context

        runtime = context.context()
        runtime.enable_graph_collection()
        try:
            self()
            metadata = runtime.export_run_metadata()
        finally:
            runtime.disable_graph_collection()
        graphs = [g for called in metadata.function_graphs for g in called.partition_graphs]
        if not graphs:
            raise RuntimeError("TensorFlow reports no graph of what it ran")
        return graphs


class OnnxRuntime:
    """Runs an .onnx file with every graph optimisation.

    What it runs is the optimised model that it can save.
    """

    def __init__(self, path: Path, inputs: Arrays, outputs: Sequence[str], threads: int) -> None:
        import onnx
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # Its threads go on spinning after a call, in the time of whoever's turn is next.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        optimised = path.with_suffix(".optimised.onnx")
        options.optimized_model_filepath = str(optimised)
        self._session = ort.InferenceSession(str(path), options, ["CPUExecutionProvider"])
        self.in_file = count(onnx_nodes(onnx.load(path)))
        runs = onnx_nodes(onnx.load(optimised))
        self.at_run, self.nodes = count(runs), count_nodes(runs)
        names = [x.name for x in self._session.get_inputs()]
        wanted = names_of(names, _matched(inputs, [{name} for name in names]))
        self._inputs = dict(zip(wanted, inputs.values(), strict=True))
        names = [x.name for x in self._session.get_outputs()]
        self._outputs = names_of(names, _matched(outputs, [{name} for name in names]))

    def __call__(self) -> list[np.ndarray]:
        return list(self._session.run(self._outputs, self._inputs))


class OpenVino:
    """Runs an OpenVINO model, compiled for the shapes of the inputs, in float32.

    Without saying so it would compute in bfloat16 where the CPU can, which the others do not.
    """

    def __init__(self, path: Path, inputs: Arrays, outputs: Sequence[str], threads: int) -> None:
        import openvino as ov

        core = ov.Core()
        model = core.read_model(path)
        self.in_file = count(openvino_nodes(model))
        places = _matched(inputs, [x.get_names() for x in model.inputs])
        given = dict(zip(places, inputs.values(), strict=True))
        model.reshape({model.inputs[i]: list(array.shape) for i, array in given.items()})
        settings = {
            "INFERENCE_PRECISION_HINT": "f32",
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
        }
        compiled = core.compile_model(model, "CPU", settings)
        runs = compiled.get_runtime_model()
        self.at_run, self.nodes = openvino_left(model, runs), count_nodes(openvino_nodes(runs))
        self._request = compiled.create_infer_request()
        self._inputs = given
        self._outputs = _matched(outputs, [x.get_names() for x in model.outputs])

    def __call__(self) -> list[np.ndarray]:
        results = self._request.infer(self._inputs, share_inputs=True, share_outputs=True)
        return [results[i] for i in self._outputs]


class LiteRt:
    """Runs a .tflite file by XNNPACK, which takes operators over from LiteRT by default.

    What it runs is the operators of the file. XNNPACK does not tell what it makes of them.
    """

    def __init__(self, path: Path, inputs: Arrays, outputs: Sequence[str], threads: int) -> None:
        from ai_edge_litert.interpreter import Interpreter

        runs = litert_nodes(path.read_bytes())
        self.in_file = self.at_run = count(runs)
        self.nodes = count_nodes(runs)
        self._model = Interpreter(model_path=str(path), num_threads=threads)
        given, gives = self._details()
        names = names_of(given, _matched(inputs, [{name} for name in given]))
        self._inputs = [
            (given[name]["index"], array)
            for name, array in zip(names, inputs.values(), strict=True)
        ]
        names = names_of(gives, _matched(outputs, [{name} for name in gives]))
        self._outputs = [gives[name]["index"] for name in names]
        for index, array in self._inputs:
            self._model.resize_tensor_input(index, array.shape)
        self._model.allocate_tensors()

    def __call__(self) -> list[np.ndarray]:
        for index, array in self._inputs:  # whose memory it uses for other tensors later
            self._model.set_tensor(index, array)
        self._model.invoke()
        return [self._model.get_tensor(index) for index in self._outputs]

    def _details(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Inputs and outputs of the signature by name; it may not be held while shapes change."""
        signature = self._model.get_signature_runner()
        return signature.get_input_details(), signature.get_output_details()


def _matched(wanted: Iterable[str], offered: Sequence[set[str]]) -> list[int]:
    """For each wanted input or output its place among those offered, by name.

    A lone one may have another name.
    """
    wanted = list(wanted)
    if len(wanted) == len(offered) == 1:
        return [0]
    places = [[i for i, names in enumerate(offered) if name in names] for name in wanted]
    if any(len(found) != 1 for found in places):
        raise Declined(f"names are {sorted(map(sorted, offered))}, not {sorted(wanted)}")
    return [found[0] for found in places]


def names_of(offered: Iterable[str], places: Iterable[int]) -> list[str]:
    """The names at these places."""
    offered = list(offered)
    return [offered[i] for i in places]

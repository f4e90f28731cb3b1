"""Runtimes: each loads a model from disk, answers calls, and knows what is left in what it runs.

TensorFlow and the other runtimes are imported where they are used, so that what is not installed
is missed by its own tool alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from benchmarks.common.failures import Declined
from benchmarks.models.signatures import signature_of
from benchmarks.peer_tools.bn_count import Left, count
from benchmarks.peer_tools.nodes import (
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
        self.at_run = self._first_call()

    def __call__(self) -> list[np.ndarray]:
        results = self._serve(**self._inputs)
        return [results[name].numpy() for name in self._outputs]

    @property
    def in_file(self) -> Left:
        return count(nodes_of(self._serve))

    def _first_call(self) -> Left:
        from tensorflow.python.eager import context

        runtime = context.context()
        runtime.enable_graph_collection()
        try:
            self()
            metadata = runtime.export_run_metadata()
        finally:
            runtime.disable_graph_collection()
        arguments = len(self._serve.inputs) - len(self._serve.captured_inputs)
        graphs = [g for called in metadata.function_graphs for g in called.partition_graphs]
        if not graphs:
            raise RuntimeError("TensorFlow reports no graph of what it ran")
        return sum((count(tensorflow_nodes(graph, arguments)) for graph in graphs), Left())


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
        self.at_run = count(onnx_nodes(onnx.load(optimised)))
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
        self.at_run = openvino_left(model, compiled.get_runtime_model())
        self._request = compiled.create_infer_request()
        self._inputs = given
        self._outputs = _matched(outputs, [x.get_names() for x in model.outputs])

    def __call__(self) -> list[np.ndarray]:
        results = self._request.infer(self._inputs, share_inputs=True, share_outputs=True)
        return [results[i] for i in self._outputs]


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

"""The tools that `peers.py` compares: what each makes of a model, and what runs that.

A tool is a converter and a runtime. The converter turns the original, a SavedModel, into a model on
disk; the runtime loads that, answers calls, and knows how much BatchNormalization is left in the
file and in what it runs (bn_count.py). A tool that cannot do its work raises `Declined`, or
whatever it raises.

TensorFlow and the tools are imported where they are used, so that what is not installed is missed
by its own tool alone.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.bn_count import (
    Left,
    Node,
    count,
    onnx_nodes,
    openvino_left,
    openvino_nodes,
    tensorflow_nodes,
)

Arrays = Mapping[str, np.ndarray]


class Declined(Exception):  # noqa: N818 - it is an answer, not an error
    """A tool does not take this model; the message says why."""


# What stands for a size that a signature leaves open: pixels of an image, and positions.
_OPEN_PIXELS, _OPEN_LENGTH = 224, 11_000


@dataclass(frozen=True)
class Work:
    """The files of one model.

    Attributes:
        directory: where they are.
    """

    directory: Path

    @property
    def original(self) -> Path:
        """The SavedModel that all start from."""
        return self.directory / "original"

    @property
    def keras_file(self) -> Path:
        """The same as a file of tf_keras, where there is one."""
        return self.directory / "original.h5"

    @property
    def inputs(self) -> Path:
        """Arrays by the names of the signature's inputs (.npz)."""
        return self.directory / "inputs.npz"

    @property
    def timed(self) -> Path:
        """The same, of the batch that is timed."""
        return self.directory / "timed.npz"

    @property
    def outputs(self) -> Path:
        """What the original gives for them, by name."""
        return self.directory / "outputs.npz"

    def output(self, key: str) -> Path:
        """Where a tool puts what it makes."""
        return self.directory / key


# ------------------------------------------------------------------------------- runtimes


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


def nodes_of(function: Any) -> list[Node]:
    """The graph of a concrete function as it was written, with its calls inlined."""
    from mbn_rewrite.frontends.saved_model.inlining import inlined

    graph_def, _ = inlined(function)
    shapes = {id(variable.handle): variable.shape for variable in function.graph.variables}
    captures = function.captured_inputs
    placeholders = function.inputs[len(function.inputs) - len(captures) :]
    variables = {
        placeholder.op.name: tuple(shapes.get(id(capture), placeholder.shape))
        for placeholder, capture in zip(placeholders, captures, strict=True)
    }
    return tensorflow_nodes(graph_def, len(function.inputs), variables)


def signature_of(model: Any) -> Any:
    """The signature that a loaded SavedModel serves by default."""
    if "serving_default" not in model.signatures:
        raise Declined(f"it has no signature serving_default, but {sorted(model.signatures)}")
    return model.signatures["serving_default"]


def made_up(
    spec: Any, batch: int, rng: np.random.Generator, low: float = 0.0, high: float = 1.0
) -> np.ndarray:
    """Uniform values for an input of a signature.

    Args:
        spec: its shape and dtype.
        batch: how many examples, where that is left open.
        rng: what to draw from.
        low, high: the range.

    Raises:
        Declined: it takes no floating-point numbers.
    """
    if not spec.dtype.is_floating:
        raise Declined(f"inputs of dtype {spec.dtype.name} are not made up here")
    open_size = _OPEN_PIXELS if spec.shape.rank == 4 else _OPEN_LENGTH
    shape = [spec.shape[0] or batch, *(size or open_size for size in spec.shape[1:])]
    return rng.uniform(low, high, shape).astype(spec.dtype.as_numpy_dtype)


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


# ------------------------------------------------------------------------------ converters


def original(work: Work) -> Path:
    """Nothing is done to it."""
    return work.original


def ours(mode: str, batch: int) -> Callable[[Work], Path]:
    """This package, in one of its modes; "auto" measures with so many examples."""
    size = batch if mode == "auto" else None

    def convert(work: Work) -> Path:
        import mbn_rewrite as mbn

        out = work.output(f"ours_{mode}")
        if out.exists():  # it was verified before it appeared
            return out
        with np.load(work.inputs) as inputs:
            mbn.rewrite_saved_model(work.original, out, mode, inputs=dict(inputs), batch_size=size)
        return out

    return convert


def optimize_for_inference(work: Work) -> Path:
    """TensorFlow's own tool, on the frozen graph; saved so that it is served like the others."""
    import tensorflow as tf
    from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2
    from tensorflow.python.tools import optimize_for_inference_lib

    owner = tf.saved_model.load(str(work.original))
    serve = signature_of(owner)
    frozen = convert_variables_to_constants_v2(serve)
    names, results = list(serve.structured_outputs), [t.name for t in frozen.outputs]
    inputs = {tensor.op.name: tensor for tensor in frozen.inputs}
    graph_def = optimize_for_inference_lib.optimize_for_inference(
        frozen.graph.as_graph_def(),
        list(inputs),
        [name.split(":")[0] for name in results],
        [tensor.dtype.as_datatype_enum for tensor in inputs.values()],
    )

    def imported(**tensors: Any) -> Any:
        tensors = {f"{name}:0": tensors[key] for key, name in by_key.items()}
        found = tf.graph_util.import_graph_def(graph_def, tensors, results, name="")
        return dict(zip(sorted(names), found, strict=True))

    keys = list(serve.structured_input_signature[1])
    by_key = {key: next(n for n in inputs if n == key or len(keys) == 1) for key in keys}
    specs = {
        key: tf.TensorSpec(inputs[name].shape, inputs[name].dtype, key)
        for key, name in by_key.items()
    }
    module = tf.Module()
    module.serve = tf.function(imported)
    out = work.output("optimize_for_inference")
    signature = module.serve.get_concrete_function(**specs)
    # What the operations say of their gradients is of no use without the functions for them.
    options = tf.saved_model.SaveOptions(experimental_custom_gradients=False)
    tf.saved_model.save(module, str(out), {"serving_default": signature}, options)
    return out


def keras_cv_attention_models(work: Work) -> Path:
    """The folding of keras_cv_attention_models, on the file of tf_keras."""
    if not work.keras_file.exists():
        raise Declined("it takes models of tf_keras only")
    import tf_keras
    from keras_cv_attention_models.model_surgery import convert_to_fused_conv_bn_model

    model = tf_keras.models.load_model(work.keras_file, compile=False)
    out = work.output("keras_cv_attention_models")
    convert_to_fused_conv_bn_model(model).save(out, save_format="tf")
    return out


def tf2onnx(make: Callable[[Work], Path]) -> Callable[[Work], Path]:
    """tf2onnx's command line, on what another converter makes."""

    def convert(work: Work) -> Path:
        source = make(work)
        out = source.with_name(f"{source.name}.onnx")
        command = [
            *(sys.executable, "-m", "tf2onnx.convert", "--opset", "18", "--tag", "serve"),
            *("--signature_def", "serving_default"),
            *("--saved-model", str(source), "--output", str(out)),
        ]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode or not out.exists():
            raise Declined(f"tf2onnx: {last_line(result.stderr)}")
        return out

    return convert


def openvino(make: Callable[[Work], Path]) -> Callable[[Work], Path]:
    """OpenVINO's converter, on what another converter makes."""

    def convert(work: Work) -> Path:
        import openvino as ov

        source = make(work)
        out = source.with_name(f"{source.name}.xml")
        # It would write weights in float16 by default.
        ov.save_model(ov.convert_model(source), out, compress_to_fp16=False)
        return out

    return convert


def last_line(text: str) -> str:
    """The last line of what a program wrote, which mostly is its reason."""
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    return lines[-1] if lines else "it gave no reason"


# ------------------------------------------------------------------------------- the tools


@dataclass(frozen=True)
class Tool:
    """A converter and a runtime.

    Attributes:
        key: for flags and files.
        name: for tables.
        convert: makes a model of the original; gives its path.
        runtime: what runs it.
        needs: the packages that it imports, beside TensorFlow, by their names in Python.
        environment: what has to be set when the process that converts starts.
        is_ours: whether a wrong answer is our fault.
    """

    key: str
    name: str
    convert: Callable[[Work], Path]
    runtime: Callable[[Path, Arrays, Sequence[str], int], Any]
    needs: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    is_ours: bool = False

    @property
    def missing(self) -> list[str]:
        """Which of the packages that it needs are not installed."""
        return [name for name in self.needs if importlib.util.find_spec(name) is None]


_ONNX, _OPENVINO = ("tf2onnx", "onnx", "onnxruntime"), ("openvino",)


def tools(modes: Sequence[str], batch: int) -> list[Tool]:
    """All tools, in the order of the tables: the original comes first.

    Args:
        batch: how many examples will be timed.
        modes: of ours. Other runtimes get the result of "fold", or of the first if it is not
            among them.
    """
    through = "fold" if "fold" in modes else modes[0]
    folded = ours(through, batch)
    return [
        Tool("original", "original", original, TensorFlow),
        *(Tool(f"ours_{m}", f"ours: {m}", ours(m, batch), TensorFlow, is_ours=True) for m in modes),
        Tool("optimize", "optimize_for_inference", optimize_for_inference, TensorFlow),
        Tool(
            "kecam",
            "keras_cv_attention_models",
            keras_cv_attention_models,
            TensorFlow,
            needs=("keras_cv_attention_models",),
            environment={"TF_USE_LEGACY_KERAS": "1"},
        ),
        Tool("onnx", "ONNX Runtime", tf2onnx(original), OnnxRuntime, needs=_ONNX),
        Tool("openvino", "OpenVINO", openvino(original), OpenVino, needs=_OPENVINO),
        Tool(
            "ours_onnx",
            f"ours: {through}, ONNX Runtime",
            tf2onnx(folded),
            OnnxRuntime,
            needs=_ONNX,
            is_ours=True,
        ),
        Tool(
            "ours_openvino",
            f"ours: {through}, OpenVINO",
            openvino(folded),
            OpenVino,
            needs=_OPENVINO,
            is_ours=True,
        ),
    ]

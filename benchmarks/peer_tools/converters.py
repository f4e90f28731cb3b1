"""Converters: each makes a model of the original, a SavedModel, and gives its path.

One that cannot do its work raises `Declined`, or whatever it raises. What it needs is imported
where it is used, so that what is not installed is missed by its own tool alone.
"""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common.failures import Declined
from benchmarks.models.signatures import signature_of
from benchmarks.peer_tools.work import Work


def original(work: Work) -> Path:
    """Nothing is done to it."""
    return work.original


def ours(mode: str, batch: int, **options: Any) -> Callable[[Work], Path]:
    """This package, in one of its modes; "auto" measures with so many examples.

    Options are those of `rewrite_saved_model`, beside.
    """
    if mode == "auto":
        options["batch_size"] = batch
    name = "_".join(["ours", mode, *(name for name in options if name != "batch_size")])

    def convert(work: Work) -> Path:
        import mbn_rewrite as mbn

        out = work.output(name)
        if out.exists():  # it was verified before it appeared
            return out
        with np.load(work.inputs) as inputs:
            mbn.rewrite_saved_model(work.original, out, mode, inputs=dict(inputs), **options)
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


def batchnorm_folding(work: Work) -> Path:
    """The folding of tensorflow-batchnorm-folding, on the file of tf_keras.

    Models of Keras 3 have configurations in which it misses what it looks for.
    """
    if not work.keras_file.exists():
        raise Declined("it takes models of tf_keras only")
    import tf_keras
    from batch_normalization_folding.folder import fold_batchnormalization_layers

    model = tf_keras.models.load_model(work.keras_file, compile=False)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            folded, _ = fold_batchnormalization_layers(model)
    except SystemExit:  # so it ends where it knows no way on, after saying why
        raise Declined(last_line(printed.getvalue())) from None
    out = work.output("batchnorm_folding")
    folded.save(out, save_format="tf")
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


# Formats of numbers that LiteRT's converter writes. In the last one scale serves all channels of a
# kernel, as on hardware that knows no others; both take activations as int8, too.
LITERT_FORMATS = ("float32", "float16", "int8", "int8_per_tensor")


def litert(make: Callable[[Work], Path], numbers: str = "float32") -> Callable[[Work], Path]:
    """LiteRT's converter, which TensorFlow has, on what another converter makes.

    Args:
        make: the other converter.
        numbers: of `LITERT_FORMATS`. Inputs and outputs stay float32.
    """

    def convert(work: Work) -> Path:
        import tensorflow as tf

        source = make(work)
        out = source.with_name(f"{source.name}.{numbers}.tflite")
        converter = tf.lite.TFLiteConverter.from_saved_model(str(source), ["serving_default"])
        if numbers != "float32":
            converter.optimizations = [tf.lite.Optimize.DEFAULT]
        if numbers == "float16":
            converter.target_spec.supported_types = [tf.float16]
        if numbers.startswith("int8"):
            converter.representative_dataset = lambda: _examples(work.calibration)
            converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
            converter._experimental_disable_per_channel = numbers == "int8_per_tensor"
        out.write_bytes(converter.convert())
        return out

    return convert


def _examples(path: Path) -> Iterator[dict[str, np.ndarray]]:
    """Examples of a file one by one, in batches of 1."""
    with np.load(path) as arrays:
        inputs = dict(arrays)
    for number in range(min(map(len, inputs.values()))):
        yield {name: array[number : number + 1] for name, array in inputs.items()}


def last_line(text: str) -> str:
    """The last line of what a program wrote, which mostly is its reason."""
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    return lines[-1] if lines else "it gave no reason"

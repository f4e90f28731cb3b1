"""The recipes for LiteRT, and what its converter leaves of BatchNormalization."""

import numpy as np
import pytest
import tensorflow as tf

from benchmarks.peer_tools.bn_count import per_channel
from benchmarks.peer_tools.nodes import litert_nodes

litert = pytest.importorskip(
    "ai_edge_litert.interpreter", reason="ai-edge-litert is not installed: pip install '.[deploy]'"
)
Interpreter = litert.Interpreter


def to_float32(saved_model):
    return tf.lite.TFLiteConverter.from_saved_model(saved_model).convert()


def to_float16(saved_model):
    converter = tf.lite.TFLiteConverter.from_saved_model(saved_model)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.target_spec.supported_types = [tf.float16]
    return converter.convert()


def to_int8(saved_model, images):
    converter = tf.lite.TFLiteConverter.from_saved_model(saved_model)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = lambda: ([image[None]] for image in images)
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    return converter.convert()


def run(content, images):
    serve = Interpreter(model_content=content).get_signature_runner()
    (name,) = serve.get_input_details()
    (outputs,) = serve(**{name: images}).values()
    return outputs


def steps(content):
    counted = per_channel(litert_nodes(content))
    return counted["multiply"], counted["add"]


def test_float32(deployed):
    before, after = (to_float32(str(deployed.folder / x)) for x in ("saved_model", "served"))
    assert steps(before) == (3, 3)  # the converter folds what is behind a convolution
    assert steps(after) == (0, 0)
    deployed.check(run(after, deployed.images))


def test_float16(deployed):
    outputs = run(to_float16(str(deployed.folder / "served")), deployed.images)
    deployed.check(outputs, 1e-2)
    assert np.abs(outputs - deployed.expected).max() > 1e-4  # its weights are rounded


def test_int8(deployed):
    content = to_int8(str(deployed.folder / "served"), deployed.images[:32])
    error = run(content, deployed.images[32:]) - deployed.expected[32:]
    spread = deployed.expected.std(axis=0)
    assert 0 < np.sqrt(np.mean(error**2)) < 0.2 * spread.mean()


def test_calibration_of_a_wrong_shape_is_an_error(deployed):
    images = deployed.images[:4, :, :, :2]
    with pytest.raises((ValueError, RuntimeError)):
        to_int8(str(deployed.folder / "served"), images)
    assert tf.saved_model.load(str(deployed.folder / "served")).signatures

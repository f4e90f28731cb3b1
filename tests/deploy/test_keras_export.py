"""`export` of Keras 3 in every format that it has, of models with each layer that we put in."""

import re

import keras
import numpy as np
import pytest
import tensorflow as tf

from mbn_rewrite.comparison import compare_outputs, tolerance_for
from mbn_rewrite.frontends.registry import front_end_of
from mbn_rewrite.passes.planner import candidates

pytestmark = pytest.mark.slow
layers = keras.layers
IMAGES = np.random.default_rng(1).normal(size=(3, 8, 8, 3)).astype("float32")


@keras.saving.register_keras_serializable(package="tests")
class Block(layers.Layer):
    """A convolution and a BatchNormalization that code calls."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.conv, self.norm = layers.Conv2D(4, 3), layers.BatchNormalization()

    def build(self, shape):
        self.conv.build(shape)
        self.norm.build(self.conv.compute_output_shape(shape))

    def call(self, x):
        return keras.ops.relu(self.norm(self.conv(x)))


def network():
    """BatchNormalizations that fold, that leave clips, and that stay, the last one of rank 2."""
    image = keras.Input((8, 8, 3))
    x = layers.Conv2D(4, 3, padding="same")(Block()(image))
    y = layers.Conv2D(4, 1)(layers.ReLU()(layers.BatchNormalization()(x)))
    x = layers.Concatenate()([x, y])
    x = layers.ReLU()(layers.BatchNormalization()(x))  # other bounds than those before
    x = layers.ReLU()(layers.Conv2D(4, 1)(x))
    x = layers.Conv2D(4, 3, padding="same", activation="tanh")(layers.BatchNormalization()(x))
    x = layers.GlobalAveragePooling2D()(layers.BatchNormalization()(x))
    x = layers.Activation("tanh")(layers.BatchNormalization()(layers.Activation("tanh")(x)))
    return keras.Model(image, x)


# Those of mode auto, and the layers of ours, or of theirs, that are in them.
FORMS = {
    "folded": {"ChannelClip", "PassThrough", "BatchNormalization"},
    "fused": {"StridedBatchNormalization"},
    "depthwise": {"DepthwiseConv2D", "ScaleAndShift"},
    "border": {"BorderedConvolution"},
}


@pytest.fixture(scope="module")
def original():
    model, rng = network(), np.random.default_rng(0)
    for variable in model.weights:
        variable.assign(rng.uniform(0.5, 1.5, variable.shape))
    return model


@pytest.fixture(scope="module")
def rewritten(original):
    """The model in every form that mode auto has for it."""
    front_end = front_end_of(original)
    reading = front_end.read(original)
    plans = candidates(reading.graph)
    forms = {name: front_end.write(original, reading, plans[name]) for name in FORMS}
    for form in forms.values():
        form(IMAGES)  # as the check of convert does: Keras exports to ONNX only what was called
    return forms


def from_saved_model(path):
    owner = tf.saved_model.load(path)
    return owner.serve(IMAGES).numpy()


def from_onnx(path):
    ort = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: IMAGES})[0]


def from_openvino(path):
    ov = pytest.importorskip("openvino", reason="openvino is not installed")
    compiled = ov.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return compiled(IMAGES)[0]


def from_litert(path):
    reason = "ai-edge-litert is not installed"
    litert = pytest.importorskip("ai_edge_litert.interpreter", reason=reason)
    serve = litert.Interpreter(path).get_signature_runner()
    (outputs,) = serve(**dict.fromkeys(serve.get_input_details(), IMAGES)).values()
    return outputs


FORMATS = {
    "tf_saved_model": ("exported", from_saved_model),
    "onnx": ("exported.onnx", from_onnx),
    "openvino": ("exported.xml", from_openvino),
    "litert": ("exported.tflite", from_litert),
}
REFUSED = ("torch",)  # by Keras, where its backend is another


def formats_of_keras(model):
    with pytest.raises(ValueError, match="format") as told:
        model.export("nowhere", format="none of them")
    return set(re.findall(r"[a-z_]+", str(told.value).partition(":")[2]))


def test_every_format_is_tried(original):
    assert formats_of_keras(original) <= {*FORMATS, *REFUSED}


@pytest.mark.parametrize("form", FORMS)
def test_forms_have_their_layers(form, rewritten):
    parts = {type(part).__name__ for part in rewritten[form]._flatten_layers()}
    assert parts >= FORMS[form]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("form", FORMS)
def test_export(form, format, original, rewritten, tmp_path):
    if format not in formats_of_keras(original):
        pytest.skip(f"Keras {keras.__version__} has no format {format}")
    name, run = FORMATS[format]
    path = str(tmp_path / name)
    if format == "openvino":
        pytest.importorskip("openvino", reason="openvino is not installed")
    rewritten[form].export(path, format=format, verbose=False)
    expected = [np.asarray(original(IMAGES, training=False))]
    comparison = compare_outputs(expected, [run(path)], tolerance_for({"float32"}))
    assert comparison.ok, comparison


@pytest.mark.parametrize("format", REFUSED)
def test_what_is_refused_is_refused_for_the_original_too(format, original, rewritten, tmp_path):
    told = []
    for model in (original, rewritten["folded"]):
        with pytest.raises(ValueError, match=r"PyTorch|Unrecognized format") as error:
            model.export(str(tmp_path / "exported.pt2"), format=format)
        told.append(str(error.value))
    assert told[0] == told[1]

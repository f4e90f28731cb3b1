"""What people have beside SavedModels and files of Keras is told apart, and what to do is said."""

import json
import pickle
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from google.protobuf import text_format

import mbn_rewrite as mbn
from mbn_rewrite.errors import RewriteError
from mbn_rewrite.rewrite import check_paths
from tests.support.saved_models import fused_norm, kernel, statistics

v1 = tf.compat.v1


@pytest.fixture(scope="module")
def formats(tmp_path_factory):
    """A directory with a file of each format, and one for each kind of directory."""
    directory = tmp_path_factory.mktemp("formats")
    rng = np.random.default_rng(0)
    with tf.Graph().as_default(), v1.Session() as session:
        image = v1.placeholder(tf.float32, [None, 8, 8, 3], "images/in-put")
        weights = v1.get_variable("kernel", initializer=kernel(rng, 3, 3, 3, 4))
        norm = [v1.get_variable(f"n{i}", initializer=x) for i, x in enumerate(statistics(rng, 4))]
        tf.nn.relu(fused_norm(tf.nn.conv2d(image, weights, 1, "SAME"), *norm), "scores")
        session.run(v1.global_variables_initializer())
        v1.train.Saver().save(session, str(directory / "model.ckpt"))
        frozen = v1.graph_util.convert_variables_to_constants(
            session, session.graph.as_graph_def(), ["scores"]
        )
    (directory / "frozen.pb").write_bytes(frozen.SerializeToString())
    (directory / "frozen.pbtxt").write_text(text_format.MessageToString(frozen))
    for name, file in {"a": "graph.pb", "b": "saved_model.pb"}.items():
        (directory / name).mkdir()
        (directory / name / file).write_bytes(frozen.SerializeToString())
    (directory / "c").mkdir()
    (directory / "c" / "weights.index").write_bytes(b"x")
    (directory / "d").mkdir()
    (directory / "d" / "model.keras").write_bytes(b"x")
    (directory / "model.tflite").write_bytes(b"\x1c\x00\x00\x00TFL3\x00\x00")
    (directory / "model.onnx").write_bytes(b"\x08\x08\x12\x07pytorch\x1a\x03")
    (directory / "arch.json").write_text(json.dumps({"class_name": "Sequential", "config": {}}))
    with zipfile.ZipFile(directory / "model.pt", "w") as archive:
        archive.writestr("archive/data.pkl", "x")
    (directory / "old.pth").write_bytes(pickle.dumps({}, 2))
    return directory


TOLD = {
    "frozen.pb": r"a GraphDef \(a frozen graph\).*simple_save",
    "frozen.pbtxt": "a GraphDef as text",
    "a": r"graph.pb is a GraphDef \(a frozen graph\).*simple_save",
    "b": "though its name is that of a SavedModel's",
    "c": "weights is a checkpoint",
    "d": "model.keras is the model, give that file",
    "model.ckpt": "graph of a checkpoint of TensorFlow 1.*import_meta_graph",
    "model.ckpt.meta": "graph of a checkpoint of TensorFlow 1.*import_meta_graph",
    "model.ckpt.index": "graph of a checkpoint of TensorFlow 1",
    "model.ckpt.data-00000-of-00001": "graph of a checkpoint of TensorFlow 1",
    "checkpoint": "is a checkpoint: weights without a model",
    "model.tflite": "is a TFLite model",
    "model.onnx": "is an ONNX model",
    "arch.json": "architecture of a Keras model without weights",
    "model.pt": "a file of PyTorch",
    "old.pth": "a pickle",
    "none": "there is no",
}


@pytest.mark.parametrize("name", TOLD)
def test_formats_are_told_apart(name, formats):
    with pytest.raises(RewriteError, match=f"(?s){TOLD[name]}"):
        check_paths(formats / name, None)


@pytest.mark.parametrize("name", ["frozen.pb", "model.ckpt.meta"])
def test_the_lines_that_are_told_make_a_saved_model(name, formats, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RewriteError) as told:
        check_paths(formats / name, None)
    lines = [line for line in str(told.value).split("\n") if line.startswith("  ")]
    exec("\n".join(line.strip() for line in lines if not line.startswith("  (")))
    (made,) = Path(".").glob("*_saved_model")
    report = mbn.rewrite_saved_model(made, "out", "fold")
    assert report.ok
    assert report.plan.left == 0


@pytest.mark.parametrize("content", [b"", b"\x00", b"\x0a\xff\xff\xff\xff\x0f", b"\x0a\x02\x0a\x00",
                                     b"text", bytes(range(256)), b"\x0a" * 99])  # fmt: skip
def test_other_files_are_not_taken_for_graphs(content, tmp_path):
    (tmp_path / "x.bin").write_bytes(content)
    with pytest.raises(RewriteError, match="neither an HDF5 file"):
        check_paths(tmp_path / "x.bin", None)


NAMED = {
    ("in.keras", "out.keras"): r"convert\(.*in.keras'\)\)\.save\('.*out.keras'\)",
    ("in", "out.h5"): "cannot become a file of Keras",
    ("in", "out.TFLITE"): r"from_saved_model\('.*out'\)",
    ("in.h5", "out.pb"): "write_graph",
    ("in", "out.onnx"): "tf2onnx.convert --saved-model .*out --output",
}  # fmt: skip


@pytest.mark.parametrize(("source", "destination"), NAMED)
def test_an_output_named_like_a_file_is_refused(source, destination, tmp_path):
    told = NAMED[source, destination]
    with pytest.raises(RewriteError, match=rf"Give a name without.*{told}"):
        check_paths(tmp_path / source, tmp_path / destination)
    assert not list(tmp_path.iterdir())


def test_dots_in_names_of_directories_are_no_formats(formats, tmp_path):
    with pytest.raises(RewriteError, match=re.escape("a GraphDef")):
        check_paths(formats / "frozen.pb", tmp_path / "model.v1.0")

"""Tells apart by their content the files of other formats that people have, and says what to do.

Nothing here loads TensorFlow: of protocol buffers the outer fields are read, which is enough to
tell a frozen graph from a checkpoint's and to name its inputs and outputs.
"""

from __future__ import annotations

import json
import mmap
import re
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from mbn_rewrite.errors import RewriteError

_TEXT_BYTES = 2**20  # what is read of a file to see whether it is text of a known kind
_OP = re.compile(rb"[A-Za-z_][A-Za-z0-9_.>]{0,99}")
_ONNX = re.compile(rb"\x08[\x01-\x20]\x12.(pytorch|keras|tf2onnx|onnx)", re.DOTALL)
_LISTED = 4  # inputs and outputs that a message names


def what_else(source: Path) -> str:
    """Error message that says what a file is that cannot be rewritten."""
    known = _known(source)
    return known or (
        f"{source} is neither an HDF5 file nor a .keras file nor a directory. "
        "Give a model saved by Keras; if it should be one, it may be cut short"
    )


def not_there(source: Path) -> str:
    """Error message for a path at which nothing is: checkpoints are named by a prefix."""
    if Path(f"{source}.index").is_file():
        return _of_checkpoint(source)
    return f"there is no {source}. Give a SavedModel, or a .h5, .hdf5 or .keras file"


def in_directory(source: Path) -> str:
    """Error message that says what a directory holds that is no SavedModel."""
    start = f"{source} is a directory without saved_model.pb, so no SavedModel"
    inside = sorted(path.parent for path in source.glob("*/saved_model.pb"))
    if inside:
        return f"{start} ({inside[0]} is one)"
    files = sorted(path for path in source.iterdir() if path.is_file())
    for path in files:
        if path.suffix in (".keras", ".h5", ".hdf5"):
            return f"{start}. If {path} is the model, give that file"
        if path.suffix in (".pb", ".meta", ".tflite", ".onnx", ".pt", ".pth"):
            known = _known(path)
            if known:
                return f"{start}. {known}"
        if path.suffix == ".index":
            return f"{start}. {_of_checkpoint(path.with_suffix(''))}"
    return start


def check_output_name(source: Path, destination: Path) -> None:
    """Finds out whether an output is named like a file of another format.

    Raises:
        RewriteError: it is; what is written is the directory of a SavedModel.
    """
    kind, written = destination.suffix.lower(), str(destination)
    stem = str(destination.with_suffix("")) if destination.name else ""
    if kind in (".keras", ".h5", ".hdf5"):
        if source.suffix.lower() in (".keras", ".h5", ".hdf5"):
            how = (
                "To have a file of Keras, in Python: import keras, mbn_rewrite (tf_keras for files "
                f"of Keras 2); mbn_rewrite.convert(keras.models.load_model({str(source)!r}))"
                f".save({written!r})"
            )
        else:
            how = "A SavedModel cannot become a file of Keras"
    elif kind == ".tflite":
        how = (
            f"Then, in Python: import tensorflow as tf; open({written!r}, 'wb').write("
            f"tf.lite.TFLiteConverter.from_saved_model({stem!r}).convert())"
        )
    elif kind == ".pb":
        how = (
            "Then, in Python: import tensorflow as tf; from tensorflow.python.framework."
            "convert_to_constants import convert_variables_to_constants_v2 as frozen; "
            f"tf.io.write_graph(frozen(tf.saved_model.load({stem!r}).signatures["
            f"'serving_default']).graph, '.', {written!r}, as_text=False)"
        )
    elif kind == ".onnx":
        how = f"Then: python -m tf2onnx.convert --saved-model {stem} --output {written}"
    else:
        return
    raise RewriteError(
        f"{destination} is the name of a file, and what is written is the directory of a "
        f"SavedModel. Give a name without {destination.suffix}, such as {stem}. {how}"
    )


def check_saved_model(file: Path) -> None:
    """Finds out whether a saved_model.pb holds something else.

    Raises:
        RewriteError: it is a frozen graph, or that of a checkpoint.
    """
    known = _of_protocol_buffer(file)
    if known:
        raise RewriteError(known)


def _known(source: Path) -> str:
    """Name of a known format, and what to do with such a file; "" for others."""
    with open(source, "rb") as content:
        head = content.read(_TEXT_BYTES)
    other = "Give the model that it was made from, saved by Keras or as a SavedModel"
    if head[4:8] == b"TFL3":
        return f"{source} is a TFLite model, whose converter has folded what it could. {other}"
    if source.suffix == ".onnx" or _ONNX.match(head):
        return f"{source} is an ONNX model. {other}"
    if zipfile.is_zipfile(source):
        with zipfile.ZipFile(source) as archive:
            if any(name.endswith("data.pkl") for name in archive.namelist()):
                return f"{source} is a file of PyTorch. This tool takes models of TensorFlow"
    elif source.suffix in (".pt", ".pth") or head[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04"):
        return f"{source} is a pickle, of PyTorch it seems. This tool takes models of TensorFlow"
    if re.fullmatch(r".*\.(index|data-\d+-of-\d+)", source.name):
        return _of_checkpoint(Path(re.sub(r"\.(index|data-\d+-of-\d+)$", "", str(source))))
    if source.name == "checkpoint" and head.startswith(b"model_checkpoint_path"):
        return _of_checkpoint(source.parent)
    return _of_text(source, head) or _of_protocol_buffer(source)


def _of_text(source: Path, head: bytes) -> str:
    text = head.lstrip()
    if text.startswith(b"node {"):
        return (
            f"{source} is a GraphDef as text. Write it as a binary file first (import tensorflow "
            "as tf; from google.protobuf import text_format; graph = text_format.Parse("
            f"open({str(source)!r}).read(), tf.compat.v1.GraphDef()); open('graph.pb', 'wb')"
            ".write(graph.SerializeToString())) and give graph.pb"
        )
    if text.startswith(b"{") and len(head) < _TEXT_BYTES:
        with suppress(ValueError, RecursionError):
            config = json.loads(text)
            if isinstance(config, dict) and "class_name" in config:
                return (
                    f"{source} is the architecture of a Keras model without weights. Make the "
                    "model of it (model_from_json), load its weights, and save it whole with "
                    "model.save('model.keras')"
                )
    return ""


def _of_checkpoint(prefix: Path) -> str:
    meta = Path(f"{prefix}.meta")
    if meta.is_file() and (found := _of_protocol_buffer(meta)):
        return found
    return (
        f"{prefix} is a checkpoint: weights without a model. Build the model, load the weights "
        f"into it (model.load_weights({str(prefix)!r})), and save it whole with "
        "model.save('model.keras') or tf.saved_model.save"
    )


# ---------------------------------------------------------------------- protocol buffers


@dataclass
class _Graph:
    """Facts about a GraphDef.

    Attributes:
        inputs: the names of its Placeholders.
        outputs: the names of nodes that nothing reads.
    """

    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)


def _of_protocol_buffer(source: Path) -> str:
    """Name of a file of graphs that is not a SavedModel; "" where it holds no graph."""
    if not source.stat().st_size:
        return ""
    with open(source, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            first = next(_fields(data, 0, len(data)))
            if first[0] == 1 and isinstance(first[1], int):
                if source.name != "saved_model.pb" and _is_saved_model(data):
                    return (
                        f"{source} is the graph of a SavedModel. Give the directory it belongs to"
                    )
                return ""
            graph = _graph_in(data, 0, len(data))
            if graph is not None:
                return _frozen(source, graph)
            for number, place in _fields(data, 0, len(data)):
                if number == 2 and isinstance(place, tuple):
                    graph = _graph_in(data, *place)
                    return "" if graph is None else _of_meta(source, graph)
        except (ValueError, IndexError, StopIteration):
            return ""
    return ""


def _is_saved_model(data: mmap.mmap) -> bool:
    fields = list(_fields(data, 0, len(data)))
    return fields[0][1] == 1 and all(number in (1, 2) for number, _ in fields)


def _frozen(source: Path, graph: _Graph) -> str:
    load = f"graph = v1.GraphDef.FromString(tf.io.read_file({str(source)!r}).numpy())"
    named = "" if source.name != "saved_model.pb" else ", though its name is that of a SavedModel's"
    lines = _lines(source, graph, load, "tf.import_graph_def(graph, name='')")
    return (
        f"{source} is a GraphDef (a frozen graph){named}. Make a SavedModel of it with these two "
        f"lines of Python, and give that:{lines}"
    )


def _of_meta(source: Path, graph: _Graph) -> str:
    prefix = str(source).removesuffix(".meta")
    restore = f"v1.train.import_meta_graph({str(source)!r}).restore(s, name)"
    lines = _lines(source, graph, f"name = {prefix!r}", restore)
    return (
        f"{source} is the graph of a checkpoint of TensorFlow 1. Make a SavedModel of the two with "
        f"these two lines of Python, and give that:{lines}"
    )


def _lines(source: Path, graph: _Graph, load: str, fill: str) -> str:
    """Two lines of Python that write a SavedModel."""

    def tensors(names: list[str]) -> str:
        pairs = (f"{re.sub('[^0-9a-zA-Z_]', '_', name)!r}: t({name + ':0'!r})" for name in names)
        return f"{{{', '.join([*pairs][:_LISTED]) or '...'}}}"

    stem = source.parent.name if source.name == "saved_model.pb" else source.name.partition(".")[0]
    counts = (len(graph.inputs), len(graph.outputs))
    which = "" if counts == (1, 1) else (
        f"\n  (it may have {counts[0]} inputs and {counts[1]} outputs: name those that you need)"
    )  # fmt: skip
    return (
        f"\n  import tensorflow as tf; v1 = tf.compat.v1; {load}"
        f"\n  with v1.Session(graph=tf.Graph()) as s: {fill}; t = s.graph.get_tensor_by_name; "
        f"v1.saved_model.simple_save(s, '{stem}_saved_model', {tensors(graph.inputs)}, "
        f"{tensors(graph.outputs)}){which}"
    )


def _graph_in(data: mmap.mmap, start: int, end: int) -> _Graph | None:
    """The GraphDef that bytes hold, or None where they hold none."""
    graph, read, names = _Graph(), set[str](), list[str]()
    known = False
    for number, place in _fields(data, start, end):
        if number != 1:
            if number not in (2, 3, 4, 5):
                return None
            continue
        if not isinstance(place, tuple):
            return None
        name, op, inputs = _node(data, *place)
        if not name or not _OP.fullmatch(op):
            return None
        known = True
        text = name.decode()
        read.update(inputs)
        if op in (b"Placeholder", b"PlaceholderV2"):
            graph.inputs.append(text)
        elif op not in (b"Const", b"NoOp", b"Assert", b"SaveV2", b"VarHandleOp", b"VariableV2"):
            names.append(text)
    graph.outputs = [name for name in names if name not in read and not name.startswith("save/")]
    return graph if known else None


def _node(data: mmap.mmap, start: int, end: int) -> tuple[bytes, bytes, list[str]]:
    name = op = b""
    inputs = []
    for number, place in _fields(data, start, end):
        if number in (1, 2, 3) and isinstance(place, tuple):
            value = data[place[0] : place[1]]
            if number == 1:
                name = value
            elif number == 2:
                op = value
            else:
                inputs.append(value.decode().lstrip("^").partition(":")[0])
    return name, op, inputs


def _fields(data: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int | tuple[int, int]]]:
    """The fields of a message: each number with a value, or with where its bytes lie.

    Raises:
        ValueError: the bytes are no message.
    """
    while start < end:
        key, start = _varint(data, start, end)
        kind = key & 7
        if kind == 0:
            value, start = _varint(data, start, end)
            yield key >> 3, value
            continue
        if kind == 2:
            size, start = _varint(data, start, end)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError("no message")
        if not key >> 3 or start + size > end:
            raise ValueError("no message")
        yield key >> 3, (start, start + size)
        start += size


def _varint(data: mmap.mmap, start: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while start < end and shift < 64:
        byte = data[start]
        value |= (byte & 127) << shift
        start, shift = start + 1, shift + 7
        if byte < 128:
            return value, start
    raise ValueError("no message")

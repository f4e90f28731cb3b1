"""What serves a SavedModel as it is: the loader of TensorFlow Serving, the command line, XLA."""

import ctypes
import subprocess
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2

import mbn_rewrite as mbn
from tests.deploy.conftest import network

RUN = r"""
saved_model_cli run --dir served --tag_set serve --signature_def serving_default \
    --inputs 'image=images.npy' --outdir outputs
"""
COMPILE = r"""
saved_model_cli aot_compile_cpu --dir fixed --tag_set serve --signature_def_key serving_default \
    --output_prefix network --cpp_class Network
"""


def compiled(saved_model):
    owner = tf.saved_model.load(saved_model)
    serve = tf.function(owner.signatures["serving_default"], jit_compile=True)
    return owner, serve  # the owner holds the variables


def test_xla(deployed):
    _, serve = compiled(str(deployed.folder / "served"))
    (outputs,) = serve(image=tf.constant(deployed.images)).values()
    deployed.check(outputs)


@pytest.mark.slow
def test_ahead_of_time(here, on_path):
    fixed = [keras.InputSpec(shape=(1, 12, 12, 3), dtype="float32")]
    network().export("original", input_signature=fixed, verbose=False)
    mbn.rewrite_saved_model("original", "fixed", mode="fold")
    subprocess.run(COMPILE, shell=True, check=True, capture_output=True)
    assert Path("network.o").stat().st_size
    assert "class Network" in Path("network.h").read_text()


@pytest.mark.slow
def test_command_line(deployed, here, on_path):
    np.save("images.npy", deployed.images)
    subprocess.run(RUN, shell=True, check=True, capture_output=True)
    (file,) = Path("outputs").iterdir()
    deployed.check(np.load(file))


# ------------------------------------------------------- the loader of TensorFlow Serving


class _Output(ctypes.Structure):
    _fields_ = (("operation", ctypes.c_void_p), ("index", ctypes.c_int))


_GIVING_POINTERS = (
    *("NewStatus", "NewGraph", "NewSessionOptions", "LoadSessionFromSavedModel"),
    *("GraphOperationByName", "AllocateTensor", "TensorData", "Message"),
)


class Server:
    """`serve` of a SavedModel, loaded and run by TensorFlow's C API without any of its Python.

    TensorFlow Serving loads models by the same function of C++, `tensorflow::LoadSavedModel`.
    """

    def __init__(self, folder):
        (library,) = Path(tf.__file__).parent.glob("libtensorflow_cc.so*")
        self._api = api = ctypes.CDLL(str(library))
        for name in _GIVING_POINTERS:
            getattr(api, f"TF_{name}").restype = ctypes.c_void_p
        self._status = ctypes.c_void_p(api.TF_NewStatus())
        self._graph = ctypes.c_void_p(api.TF_NewGraph())
        tags = (ctypes.c_char_p * 1)(b"serve")
        options = ctypes.c_void_p(api.TF_NewSessionOptions())
        session = api.TF_LoadSessionFromSavedModel(
            options, None, str(folder).encode(), tags, 1, self._graph, None, self._status
        )
        self._check()
        self._session = ctypes.c_void_p(session)

    def __call__(self, array, gives, given, taken):
        """The output named `taken`, of so many numbers as `gives` has, for the input `given`."""
        api, dims = self._api, (ctypes.c_int64 * array.ndim)(*array.shape)
        tensor = ctypes.c_void_p(
            api.TF_AllocateTensor(1, dims, array.ndim, ctypes.c_size_t(array.nbytes))
        )
        ctypes.memmove(api.TF_TensorData(tensor), array.ctypes.data, array.nbytes)
        values, result = (ctypes.c_void_p * 1)(tensor), (ctypes.c_void_p * 1)()
        api.TF_SessionRun(
            self._session, None, self._output(given), values, 1,
            self._output(taken), result, 1, None, 0, None, self._status,
        )  # fmt: skip
        self._check()
        outputs = np.empty_like(gives)
        data = api.TF_TensorData(ctypes.c_void_p(result[0]))
        ctypes.memmove(outputs.ctypes.data, data, outputs.nbytes)
        return outputs

    def _output(self, name):
        operation, _, index = name.partition(":")
        found = self._api.TF_GraphOperationByName(self._graph, operation.encode())
        return (_Output * 1)(_Output(found, int(index)))

    def _check(self):
        if self._api.TF_GetCode(self._status):
            raise RuntimeError(ctypes.string_at(self._api.TF_Message(self._status)).decode())


def served(folder, images, gives):
    """The outputs of a model that `Server` serves."""
    content = (Path(folder) / "saved_model.pb").read_bytes()
    (meta_graph,) = saved_model_pb2.SavedModel.FromString(content).meta_graphs
    signature = meta_graph.signature_def["serving_default"]
    (given,), (taken,) = signature.inputs.values(), signature.outputs.values()
    return Server(folder)(images, gives, given.name, taken.name)


def test_loader_of_tensorflow_serving(deployed):
    deployed.check(served(deployed.folder / "served", deployed.images, deployed.expected))


def test_that_loader_says_what_it_misses(tmp_path):
    with pytest.raises(RuntimeError, match="Could not find SavedModel"):
        Server(tmp_path)

"""Files of either Keras that would do more than make a model, and such as only seem to."""

import json
import zipfile

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras

import mbn_rewrite.rewrite  # noqa: F401  (which files name as what must not be called)
from mbn_rewrite.errors import RewriteError
from mbn_rewrite.frontends import limits
from mbn_rewrite.frontends.keras_common import files, pure_functions, resolved_names

KERASES = {"tf_keras": tf_keras, "keras": keras}


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """A small file of each Keras in each format."""
    directory = tmp_path_factory.mktemp("originals")
    made = {}
    for name, package in KERASES.items():
        layers = package.layers
        x = layers.Input((4,), name="x")
        y = layers.BatchNormalization(name="bn")(layers.Dense(3, name="dense")(x))
        model = package.Model(x, y)
        for kind in ("keras", "h5"):
            made[name, kind] = directory / f"{name}.{kind}"
            model.save(made[name, kind])
    return made


def edited(source, edit, directory):
    """A copy of a file with its configuration edited in place."""
    path = directory / source.name
    if source.suffix == ".h5":
        path.write_bytes(source.read_bytes())
        with h5py.File(path, "r+") as file:
            config = json.loads(file.attrs["model_config"])
            edit(config)
            file.attrs["model_config"] = json.dumps(config)
        return path
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name == "config.json":
                config = json.loads(content)
                edit(config)
                content = json.dumps(config)
            new.writestr(name, content)
    return path


def opened(path, package, trusted=False):
    files.check(path, trusted)
    return files.load(path, trusted, KERASES[package])


def the_dense(config):
    return next(x for x in config["config"]["layers"] if x["class_name"] == "Dense")["config"]


def layer(class_name, label="evil", nodes=(), **config):
    module = {"TFOpLambda": "tf_keras.src.layers.core.tf_op_layer"}.get(class_name, "keras.layers")
    return {
        "class_name": class_name, "module": module, "registered_name": None, "name": label,
        "config": {"name": label, "trainable": True, "dtype": "float32", **config},
        "inbound_nodes": list(nodes),
    }  # fmt: skip


def adding(*args, **kwargs):
    return lambda config: config["config"]["layers"].append(layer(*args, **kwargs))


def of_dense(**values):
    return lambda config: the_dense(config).update(values)


def function(module, name, registered=None):
    return {"module": module, "class_name": "function", "config": name,
            "registered_name": registered or "function"}  # fmt: skip


def made_by(module, name, **config):
    return {"module": module, "class_name": name, "config": config, "registered_name": None}


def inside(class_name, **config):
    """A layer in a wrapper."""
    return adding("TimeDistributed", "wrapper", layer=layer(class_name, **config))


def in_a_model(class_name, **config):
    inner = {"name": "inner", "layers": [layer("InputLayer", "i", batch_input_shape=[None, 4]),
                                         layer(class_name, **config)]}  # fmt: skip
    return adding("Sequential", "inner", **inner)


ACTING_IN_TF_KERAS = {
    "rmtree": adding("TFOpLambda", function="io.gfile.rmtree"),
    "copy": adding("TFOpLambda", function="io.gfile.copy"),
    "write_file": adding("SlicingOpLambda", function="io.write_file"),
    "of version 1": adding("TFOpLambda", function="compat.v1.gfile.MakeDirs"),
    "python": adding("TFOpLambda", function="numpy_function"),
    "library": adding("TFOpLambda", function="load_op_library"),
    "dump": adding("TFOpLambda", function="debugging.experimental.enable_dump_debug_info"),
    "vocabulary": adding("TFOpLambda", function="random.fixed_unigram_candidate_sampler"),
    "dataset": adding("TFOpLambda", function="data.Dataset.save"),
    "no name": adding("TFOpLambda", function=["io.gfile.rmtree"]),
    "in a wrapper": inside("TFOpLambda", function="io.gfile.makedirs"),
    "in a model": in_a_model("TFOpLambda", function="io.gfile.makedirs"),
    "in an argument": of_dense(bias_constraint={"a": [layer("TFOpLambda", function="print")]}),
    "class method": adding("ClassMethod", cls_symbol="io.gfile.GFile", method_name="write"),
    "method": adding("InstanceMethod", attr_name="__reduce__"),
    "byte code": of_dense(activation={"class_name": "__lambda__", "config": {"value": ["4wA="]}}),
    "cell": adding("RNN", cell=layer("ResidualWrapper", residual_fn=["4wA=", None, None],
                                     residual_fn_type="lambda")),
    "mask": adding("Lambda", function="relu", function_type="function", mask=["4wA=", None, None],
                   mask_type="lambda"),
    "lookup": adding("StringLookup", vocabulary="/etc/passwd"),
    "lookup in a model": in_a_model("IntegerLookup", vocabulary="/etc/passwd"),
    "text": adding("TextVectorization", vocabulary="/etc/passwd"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["keras", "h5"])
@pytest.mark.parametrize("name", ACTING_IN_TF_KERAS)
def test_acting_files_of_tf_keras_are_refused_without_loading(name, kind, originals, tmp_path):
    path = edited(originals["tf_keras", kind], ACTING_IN_TF_KERAS[name], tmp_path)
    with pytest.raises(RewriteError, match=r"(?s)(evil|dense|inner|wrapper).*pass --trusted"):
        files.check(path, trusted=False)
    files.check(path, trusted=True)


NAMED = {
    "activation": of_dense(activation=function("os", "system")),
    "builtin": of_dense(activation=function("builtins", "exec", "exec")),
    "initializer": of_dense(kernel_initializer=made_by("subprocess", "Popen", args="true")),
    "saving": of_dense(activation=function("keras.src.saving.saving_lib", "save_model")),
    "library": of_dense(activation=function("tensorflow.python.lib.io.file_io", "create_dir")),
    "path": of_dense(kernel_initializer=made_by("shutil", "rmtree")),
    "not a model's": of_dense(kernel_initializer=made_by("keras.callbacks", "BackupAndRestore")),
    "of this library": of_dense(activation=function("mbn_rewrite.rewrite", "rewrite_saved_model")),
    "type": of_dense(bias_constraint={"class_name": "__typespec__", "spec_name": "system",
                                      "module": "os", "registered_name": None, "config": []}),
}  # fmt: skip


@pytest.mark.parametrize("package", KERASES)
@pytest.mark.parametrize("name", NAMED)
def test_names_of_what_no_model_consists_of_are_refused(name, package, originals, tmp_path):
    path = edited(originals[package, "keras"], NAMED[name], tmp_path)
    with pytest.raises(RewriteError, match=r"(?s)Dense 'dense' > .*pass --trusted"):
        opened(path, package)


IN_TF_KERAS = {
    "module of Keras": of_dense(activation=function("tf_keras.src.utils.data_utils", "get_file")),
    "raw operation": adding("TFOpLambda", function="raw_ops.WriteFile"),
    "operation": adding("TensorFlowOpLayer", node_def={"name": "w", "op": "WriteFile"}),
    "operation as text": adding("TensorFlowOpLayer", node_def='{"name": "w", "op": "Relu"}'),
    "operation behind another": adding(
        "TensorFlowOpLayer", node_def={"name": '"op": "Relu"', "op": "WriteFile"}
    ),
    "lambda by name": adding("Lambda", function=function("os", "system"),
                             function_type="function", module="os"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["keras", "h5"])
@pytest.mark.parametrize("name", IN_TF_KERAS)
def test_what_only_tf_keras_calls_is_refused(name, kind, originals, tmp_path):
    path = edited(originals["tf_keras", kind], IN_TF_KERAS[name], tmp_path)
    with pytest.raises(RewriteError, match=r"(evil|dense).*pass --trusted"):
        opened(path, "tf_keras")


IN_KERAS_3 = {
    "served model": adding("TFSMLayer", filepath="/tmp/model"),
    "torch": adding("TorchModuleWrapper", module="gAJj"),
    "download": of_dense(activation=function("keras.utils", "get_file")),
    "plot": of_dense(activation=function("keras.utils", "plot_model")),
    "lookup": adding("StringLookup", vocabulary="/etc/passwd"),
    "lambda": adding("Lambda", function={"class_name": "__lambda__", "config": {"code": "4wA="}}),
}


@pytest.mark.parametrize("name", IN_KERAS_3)
def test_acting_files_of_keras_3_are_refused(name, originals, tmp_path):
    path = edited(originals["keras", "keras"], IN_KERAS_3[name], tmp_path)
    with pytest.raises(RewriteError, match=r"(evil|dense).*pass --trusted"):
        opened(path, "keras")


def test_what_is_refused_would_have_run(originals, tmp_path):
    """So that these tests can fail: with trust, loading makes the directory."""
    made = tmp_path / "made"
    nodes = [["_CONSTANT_VALUE", -1, str(made), {}]]
    edit = adding("TFOpLambda", nodes=nodes, function="io.gfile.makedirs")
    path = edited(originals["tf_keras", "h5"], edit, tmp_path)
    with pytest.raises(RewriteError, match=r"tf.io.gfile.makedirs.*TFOpLambda 'evil'"):
        opened(path, "tf_keras")
    assert not made.exists()
    with pytest.raises(RewriteError, match="cannot be loaded"):  # it gives no tensor
        opened(path, "tf_keras", trusted=True)
    assert made.exists()


def test_a_registered_name_hides_nothing(originals, tmp_path):
    tf_keras.utils.register_keras_serializable("hostile", "Harmless")(lambda x: x)
    edit = of_dense(activation=function("os", "system", "hostile>Harmless"))
    with pytest.raises(RewriteError, match=r"models are not made of.*pass --trusted"):
        opened(edited(originals["tf_keras", "keras"], edit, tmp_path), "tf_keras")


def test_modules_are_not_imported_by_what_a_file_says(originals, tmp_path, monkeypatch):
    (tmp_path / "acts_when_imported.py").write_text("open('imported', 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    edit = of_dense(activation=function("acts_when_imported", "f"))
    for package in KERASES:
        path = edited(originals[package, "keras"], edit, tmp_path)
        with pytest.raises(RewriteError, match="--import_modules=acts_when_imported"):
            opened(path, package)
    assert not (tmp_path / "imported").exists()


# ------------------------------------------------------------------------ what is no code


def attention(layers, x):
    return layers.MultiHeadAttention(2, 3)(x, value=layers.MultiHeadAttention(2, 3)(x, x))


def constants(layers, x):
    package = tf_keras if layers is tf_keras.layers else keras
    x = layers.Dense(4, bias_initializer=package.initializers.Constant(0.5))(x)
    return layers.PReLU(alpha_initializer=package.initializers.Constant(0.25))(x)


def called_with_value(layers, x):
    package = tf_keras if layers is tf_keras.layers else keras

    @package.utils.register_keras_serializable("hostile_tests", "Gate")
    class Gate(layers.Layer):
        def __init__(self, value="lambda", kind_type="lambda", kinds=None, **kwargs):
            super().__init__(**kwargs)
            self.values = {"value": value, "kind_type": kind_type, "kinds": {"value": ["a", 1, 2]}}

        def call(self, inputs, value=1.0):
            return inputs * value

        def get_config(self):
            return super().get_config() | self.values

    return Gate()(x, value=2.0)


def stock(layers, x):
    package = tf_keras if layers is tf_keras.layers else keras
    regularized = package.regularizers.L2(0.1)
    x = layers.Dense(4, "gelu", kernel_regularizer=regularized, dtype="mixed_bfloat16")(x)
    x = layers.Bidirectional(layers.LSTM(2, return_sequences=True))(x)
    x = layers.TimeDistributed(layers.Dense(2, kernel_constraint="max_norm"))(x)
    inner = package.Sequential([layers.Input((4,)), layers.Dense(4)])
    inner.compile(package.optimizers.Adam(), package.losses.Huber(), [package.metrics.AUC()])
    x = layers.RNN(layers.GRUCell(4))(layers.LayerNormalization()(x))
    return inner(x) + x[:, :1]


@pytest.mark.parametrize("kind", ["keras", "h5"])
@pytest.mark.parametrize("package", KERASES)
@pytest.mark.parametrize("build", [attention, constants, called_with_value, stock])
def test_data_is_not_taken_for_code(build, package, kind, tmp_path):
    if package == "keras" and kind == "h5" and build is stock:
        pytest.skip("Keras 3 does not load its own operations from HDF5 files")
    layers = KERASES[package].layers
    x = layers.Input((5, 4))
    path = tmp_path / f"m.{kind}"
    KERASES[package].Model(x, build(layers, x)).save(path)
    assert opened(path, package).count_params() >= 0


@pytest.mark.parametrize("kind", ["keras", "h5"])
def test_operations_that_compute_are_taken(kind, originals, tmp_path):
    node = {"name": "relu", "op": "Relu", "input": ["dense"], "attr": {"T": {"type": "DT_FLOAT"}}}
    edit = adding("TensorFlowOpLayer", node_def=node)
    path = edited(originals["tf_keras", kind], edit, tmp_path)
    resolved_names.check_objects(path, [files._config_of(path)[0]], tf_keras)


@pytest.mark.parametrize("kind", ["keras", "h5"])
@pytest.mark.parametrize("package", KERASES)
def test_initializers_may_be_named_as_old_files_do(package, kind, originals, tmp_path):
    edit = of_dense(bias_initializer={"class_name": "Constant", "config": {"value": 0.5}})
    assert opened(edited(originals[package, kind], edit, tmp_path), package).built


def test_functions_of_tensorflow_that_compute_are_called(tmp_path):
    x = tf_keras.layers.Input((4, 4))
    y = tf.nn.relu(tf.concat([x, tf.abs(x)], -1))[:, 1:]
    y = tf.compat.v1.squeeze(tf_keras.backend.mean(y, axis=1, keepdims=True), 1)
    y = tf_keras.layers.Activation(tf.nn.silu)(
        tf.image.per_image_standardization(y[:, None, :, None])
    )
    y = tf.RaggedTensor.from_tensor(y).to_tensor()
    for kind in ("keras", "h5"):
        tf_keras.Model(x, y).save(tmp_path / f"m.{kind}")
        assert opened(tmp_path / f"m.{kind}", "tf_keras").count_params() == 0


@pytest.mark.parametrize(
    "symbol",
    ["nn.relu", "math.add", "concat", "compat.v1.nn.softmax", "__operators__.getitem",
     "linalg.matmul", "image.resize", "keras.backend.mean", "compat.v1.transpose", "cast",
     "strings.lower", "signal.stft", "io.decode_jpeg", "random.normal", "tensor_scatter_nd_add"],
)  # fmt: skip
def test_symbols_that_compute(symbol):
    assert pure_functions.computes(symbol)


@pytest.mark.parametrize(
    "symbol",
    ["io.write_file", "io.read_file", "io.gfile.remove", "compat.v1.write_file", "py_function",
     "compat.v1.py_func", "print", "data.Dataset.from_generator", "summary.create_file_writer",
     "saved_model.save", "saved_model.load", "train.Checkpoint", "import_graph_def",
     "quantization.experimental.quantize_saved_model", "keras.backend.clear_session",
     "keras.utils.get_file", "lookup.TextFileInitializer", "rpc_call", "nn", "",
     "compat.v1.nn.fixed_unigram_candidate_sampler", "random.set_seed", "compat.v1.read_file"],
)  # fmt: skip
def test_symbols_that_are_not_known_to_compute(symbol):
    assert not pure_functions.computes(symbol)


def test_how_the_whole_model_was_compiled_is_not_loaded(originals, tmp_path):
    def edit(config):
        config["compile_config"] = {"loss": function("os", "system"), "optimizer": "adam"}

    for package in KERASES:
        assert opened(edited(originals[package, "keras"], edit, tmp_path), package).built


# --------------------------------------------------------------------------- wiring


def lost_call(config):
    config["config"]["layers"][1]["inbound_nodes"] = []


def circle(config):
    text = json.dumps(config["config"]["layers"][2]["inbound_nodes"])
    nodes = json.loads(text.replace('"dense"', '"bn"'))
    config["config"]["layers"][2]["inbound_nodes"] = nodes


@pytest.mark.parametrize("kind", ["keras", "h5"])
@pytest.mark.parametrize("package", KERASES)
@pytest.mark.parametrize("edit", [lost_call, circle])
def test_layers_that_wait_for_ever_are_told(edit, package, kind, originals, tmp_path):
    path = edited(originals[package, kind], edit, tmp_path)
    with pytest.raises(RewriteError, match="what layer 'bn' is called with is missing"):
        files.check(path, trusted=True)


@pytest.mark.parametrize("package", KERASES)
def test_any_order_of_layers_is_taken(package, originals, tmp_path):
    path = edited(
        originals[package, "keras"], lambda config: config["config"]["layers"].reverse(), tmp_path
    )
    assert opened(path, package).built


@pytest.mark.parametrize("package", KERASES)
def test_shared_layers_and_models_are_wired(package, tmp_path):
    layers, model = KERASES[package].layers, KERASES[package].Model
    x = layers.Input((4,))
    dense, other, inner = layers.Dense(4), layers.Dense(4), layers.Input((4,))
    block = model(inner, layers.Add()([dense(inner), dense(dense(inner))]))
    y = layers.Concatenate()([block(other(x)), block(block(x))])
    model(x, [y, other(other(x))]).save(tmp_path / "m.keras")
    assert opened(tmp_path / "m.keras", package).count_params() == 40


# ---------------------------------------------------------------------------- bombs


def rezipped(source, path, **members):
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            if name not in members:
                new.writestr(name, old.read(name))
        for name, content in members.items():
            new.writestr(name, content)
    return path


@pytest.mark.parametrize("kind", ["keras", "h5"])
def test_a_huge_configuration_is_not_parsed(kind, originals, tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "CONFIG_BYTES", 500)
    path = edited(originals["tf_keras", kind], lambda config: None, tmp_path)
    with pytest.raises(RewriteError, match="no model's is larger"):
        files.check(path, trusted=True)


def test_members_that_expand_without_end(originals, tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "EXPANDED_BYTES", 10**6)
    path = rezipped(originals["keras", "keras"], tmp_path / "m.keras", more=bytes(2 * 10**6))
    with pytest.raises(RewriteError, match="would fill the memory"):
        files.check(path, trusted=True)


def test_weights_that_expand_without_end(originals, tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "EXPANDED_BYTES", 10**6)
    path = tmp_path / "m.h5"
    path.write_bytes(originals["keras", "h5"].read_bytes())
    with h5py.File(path, "r+") as file:
        file.create_dataset("w", (10**9,), "f4", chunks=(10**4,), compression="gzip")
    with pytest.raises(RewriteError, match="would fill the memory"):
        files.check(path, trusted=True)


def test_weights_in_other_files(originals, tmp_path):
    path = tmp_path / "m.h5"
    for number, add in enumerate((
        lambda file: file.create_dataset("w", (1,), "f4", external=[("/etc/passwd", 0, 4)]),
        lambda file: file.__setitem__("w", h5py.ExternalLink("other.h5", "/w")),
    )):  # fmt: skip
        path.write_bytes(originals["keras", "h5"].read_bytes())
        with h5py.File(path, "r+") as file:
            add(file)
        with pytest.raises(RewriteError, match=["other files", "links to elsewhere"][number]):
            files.check(path, trusted=True)


@pytest.mark.parametrize("name", ["../evil", "/evil", "a/../../evil", "C:\\evil", "..\\evil"])
def test_members_for_elsewhere(name, originals, tmp_path):
    path = rezipped(originals["tf_keras", "keras"], tmp_path / "m.keras", **{name: b"x"})
    with pytest.raises(RewriteError, match="a place outside of it"):
        files.check(path, trusted=True)


def test_too_many_members(originals, tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "ARCHIVE_MEMBERS", 2)
    with pytest.raises(RewriteError, match="no model has more than 2"):
        files.check(originals["tf_keras", "keras"], trusted=True)


@pytest.mark.parametrize("depth", [limits.CONFIG_DEPTH + 10, 100_000])
def test_configurations_nested_without_end(depth, originals, tmp_path):
    nested = "[" * depth + "]" * depth
    path = rezipped(originals["keras", "keras"], tmp_path / "m.keras", **{"config.json": nested})
    with pytest.raises(RewriteError, match=r"levels deep|recursion"):
        files.check(path, trusted=False)


@pytest.mark.parametrize("config", ["[]", "3", "null", '"x"', "{}", '{"config": {"layers": 3}}'])
@pytest.mark.parametrize("package", KERASES)
def test_configurations_of_no_model(package, config, originals, tmp_path):
    members = {"config.json": config}
    path = rezipped(originals[package, "keras"], tmp_path / "m.keras", **members)
    with pytest.raises(RewriteError, match="cannot be"):
        opened(path, package)


def test_unusual_but_honest_files_are_taken(originals, tmp_path):
    for package in KERASES:
        path = rezipped(originals[package, "keras"], tmp_path / "m.keras", **{"assets/a": b"x"})
        assert np.isfinite(opened(path, package).get_weights()[0]).all()

"""SavedModels that do more than compute, when they are run or when they are loaded."""

import os
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2

import mbn_rewrite as mbn
from mbn_rewrite.errors import RewriteError
from mbn_rewrite.frontends import effects, limits
from mbn_rewrite.frontends.saved_model import files, load_checks
from mbn_rewrite.frontends.saved_model.source import SavedModelDirectory
from mbn_rewrite.options import Options
from tests.support.saved_models import KINDS, Network, image_spec

v1 = tf.compat.v1


def acting(directory):
    """What functions do beside computing scores: name -> a function of scores."""
    file = str(directory / "written")

    @tf.function
    def writes(scores):
        tf.io.write_file(file, "x")
        return scores

    def loops(scores):
        for _ in tf.range(tf.shape(scores)[0]):
            tf.io.write_file(file, "x")
        return scores

    def branches(scores):
        if tf.reduce_sum(scores) > 1e9:
            tf.io.write_file(file, "x")
        return scores

    def from_dataset(scores):
        dataset = tf.data.Dataset.range(2).map(lambda i: (writes(scores), i)[1])
        return scores + tf.cast(dataset.reduce(tf.constant(0, tf.int64), tf.add), tf.float32)

    def cached(scores):
        dataset = tf.data.Dataset.range(2).cache(file)
        return scores + tf.cast(dataset.reduce(tf.constant(0, tf.int64), tf.add), tf.float32)

    def reads(scores):
        return scores + tf.strings.to_number(tf.io.read_file(file))

    def lists(scores):
        return scores + tf.cast(tf.size(tf.io.matching_files(f"{directory}/*")), tf.float32)

    def prints(scores):
        tf.print(scores, output_stream=f"file://{file}")
        return scores

    def python(scores):
        return tf.ensure_shape(tf.numpy_function(lambda x: x, [scores], tf.float32), scores.shape)

    def saves(scores):
        tf.raw_ops.SaveV2(prefix=file, tensor_names=["x"], shape_and_slices=[""], tensors=[scores])
        return scores

    def restores(scores):
        slices = {"tensor_names": ["x"], "shape_and_slices": [""], "dtypes": [tf.float32]}
        return scores + tf.raw_ops.RestoreV2(prefix=file, **slices)[0]

    return [writes, loops, branches, from_dataset, cached, reads, lists, prints, python, saves,
            restores]  # fmt: skip


def harmless(scores):
    tf.print("scores", tf.shape(scores))
    tf.debugging.assert_all_finite(scores, "finite")
    data = tf.data.Dataset.range(3).map(lambda i: i + 1).shuffle(2).batch(2).cache()
    total = data.reduce(tf.constant(0, tf.int64), lambda all, some: all + tf.reduce_sum(some))
    table = tf.TensorArray(tf.float32, 2).unstack(tf.stack([scores, scores])).stack()
    return table[0] + tf.cast(total, tf.float32)


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A SavedModel with a signature for each way to act, and where it writes."""
    directory = tmp_path_factory.mktemp("acting")
    network = Network()
    signatures = {}
    for tail in [*acting(directory), harmless]:
        python = getattr(tail, "python_function", tail)
        function = tf.function(lambda image, tail=tail: tail(network.scores(image)))
        signatures[python.__name__] = function.get_concrete_function(image_spec())
    tf.saved_model.save(network, str(directory / "in"), signatures)
    return directory


def test_only_what_computes_is_run_and_the_others_are_named(many, tmp_path):
    report = mbn.rewrite_saved_model(many / "in", tmp_path / "out", "fold")
    assert not (many / "written").exists()
    assert set(report.comparisons) == {"harmless"}
    assert report.ok
    assert report.plan.left == 0
    told = {name: why for name, why in report.unverified.items() if "--trusted" in why}
    assert set(told) == {getattr(f, "python_function", f).__name__ for f in acting(many)}
    assert "writes files (WriteFile" in told["writes"]
    assert "runs Python code" in told["python"]
    assert "reads files (ReadFile" in told["reads"]
    for name in told:
        assert any(f"'{name}'" in note for note in report.plan.notes)
    assert set(tf.saved_model.load(str(tmp_path / "out")).signatures) == {*told, "harmless"}


def test_methods_are_not_called_where_one_of_their_functions_acts(tmp_path):
    network, file = Network(), tmp_path / "written"

    @tf.function
    def score(image):
        if image.shape[0] == 4:  # as many as are made up
            tf.io.write_file(str(file), "x")
        return network.scores(image)

    for batch in (4, None):
        score.get_concrete_function(tf.TensorSpec([batch, 6, 6, 3]))
    network.score = score
    serve = tf.function(network.scores).get_concrete_function(image_spec())
    tf.saved_model.save(network, str(tmp_path / "in"), {"serve": serve})
    report = mbn.rewrite_saved_model(tmp_path / "in", tmp_path / "out", "fold")
    assert not file.exists()
    assert set(report.comparisons) == {"serve"}
    assert len(report.unverified) == 2
    assert all("--trusted" in why for why in report.unverified.values())


@pytest.mark.parametrize("op", ["DatasetFromGraph", "MlirPassthroughOp", "GenerateVocabRemapping"])
def test_operations_act_that_tensorflow_calls_stateless(op):
    assert effects.acts(op)
    graph = v1.GraphDef()
    graph.node.add(name="it", op=op)
    assert [effect.node for effect in effects.in_graph(graph)] == ["it"]
    assert "than compute" not in effects.in_words(effects.in_graph(graph))


def test_auto_measures_nothing_that_acts_and_says_so(many, tmp_path):
    model = SavedModelDirectory(many / "in", None, ["writes"])
    with pytest.raises(RewriteError, match="not run, since it writes files"):
        model.running(None, Options())
    assert not (many / "written").exists()


def test_nothing_verified_is_said_and_trust_runs_it(many, tmp_path):
    report = mbn.rewrite_saved_model(many / "in", tmp_path / "o", "fold", signatures=["writes"])
    assert "NOTHING WAS VERIFIED" in str(report)
    assert not report.to_dict()["verification"]["ok"]
    assert not (many / "written").exists()
    report = mbn.rewrite_saved_model(
        many / "in", tmp_path / "out", "fold", signatures=["writes"], trusted=True
    )
    assert set(report.comparisons) == {"writes"}
    assert (many / "written").exists()
    (many / "written").unlink()


# ----------------------------------------------------------------------------- loading


class Filled(tf.saved_model.experimental.TrackableResource):
    """A table-like resource that does something when it is filled or made."""

    def __init__(self, made, filled):
        super().__init__()
        self._made, self._filled = made, filled
        assert self.resource_handle is not None  # made here, not where it is first used

    def _create_resource(self):
        self._made()
        return tf.raw_ops.HashTableV2(key_dtype=tf.string, value_dtype=tf.int64)

    def _initialize(self):
        self._filled()

    def _destroy_resource(self):
        pass


def with_resource(directory, made=lambda: None, filled=lambda: None):
    network = Network()
    network.resource = Filled(made, filled)

    @tf.function(input_signature=[image_spec()])
    def serve(image):
        size = tf.raw_ops.LookupTableSizeV2(table_handle=network.resource.resource_handle)
        return network.scores(image) + tf.cast(size, tf.float32)

    network.serve = serve
    tf.saved_model.save(network, str(directory / "in"), serve)
    return directory / "in"


@pytest.mark.parametrize("when", ["made", "filled"])
def test_models_that_act_when_they_are_loaded_are_refused(when, tmp_path):
    file = tmp_path / "written"
    source = with_resource(tmp_path, **{when: lambda: tf.io.write_file(str(file), "x")})
    file.unlink(missing_ok=True)
    with pytest.raises(RewriteError, match=r"when it is loaded: it writes files.*pass --trusted"):
        mbn.rewrite_saved_model(source, tmp_path / "out", "fold")
    assert not file.exists()
    assert mbn.rewrite_saved_model(source, tmp_path / "out", "fold", trusted=True).ok
    assert file.exists()


def test_tables_from_files_of_the_host_are_refused(tmp_path):
    words = tmp_path / "words"
    words.write_text("a\nb\n")
    network = Network()
    path = tf.constant(str(words))

    def fill():
        tf.raw_ops.InitializeTableFromTextFileV2(
            table_handle=network.resource.resource_handle, filename=path, key_index=-2,
            value_index=-1, vocab_size=-1, delimiter="\t", offset=0)  # fmt: skip

    network.resource = Filled(lambda: None, fill)

    @tf.function(input_signature=[image_spec()])
    def serve(image):
        size = tf.raw_ops.LookupTableSizeV2(table_handle=network.resource.resource_handle)
        return network.scores(image) + tf.cast(size, tf.float32)

    tf.saved_model.save(network, str(tmp_path / "in"), serve)
    with pytest.raises(RewriteError, match=r"reads files \(InitializeTableFromTextFile"):
        mbn.rewrite_saved_model(tmp_path / "in", tmp_path / "out", "fold")


def tf1_graph(directory, initializer=None, restore=None):
    """A model of TensorFlow 1 with an initializer, and something that a restore also does."""
    with tf.Graph().as_default() as graph, v1.Session() as session:
        image = v1.placeholder(tf.float32, [None, 4], "image")
        weights = v1.get_variable("weights", initializer=np.ones((4, 2), np.float32))
        scores = tf.matmul(image, weights)
        session.run(v1.global_variables_initializer())
        init = initializer() if initializer else None
        builder = v1.saved_model.Builder(str(directory))
        signature = v1.saved_model.predict_signature_def({"image": image}, {"scores": scores})
        builder.add_meta_graph_and_variables(
            session, ["serve"], {"serving_default": signature}, main_op=init
        )
        builder.save()
        node = restore().node_def if restore else None
        graph.finalize()
    if node is not None:
        file = directory / "saved_model.pb"
        proto = saved_model_pb2.SavedModel.FromString(file.read_bytes())
        (meta,) = proto.meta_graphs
        extra = [n for n in graph.as_graph_def().node if n.name.startswith("evil")]
        meta.graph_def.node.extend(extra)
        next(
            n for n in meta.graph_def.node if n.name == meta.saver_def.restore_op_name
        ).input.append("^evil")
        file.write_bytes(proto.SerializeToString())
    return directory


def test_initializers_of_tensorflow_1_that_act_are_refused(tmp_path):
    file = tmp_path / "written"
    for name, arguments in {
        "init": {"initializer": lambda: tf.io.write_file(str(file), "x")},
        "restore": {"restore": lambda: tf.io.write_file(str(file), "x", name="evil")},
    }.items():
        source = tf1_graph(tmp_path / name, **arguments)
        with pytest.raises(RewriteError, match="acts when it is loaded: it writes files"):
            mbn.rewrite_saved_model(source, tmp_path / "out", "fold")
    assert not file.exists()
    source = tf1_graph(tmp_path / "honest", lambda: v1.global_variables_initializer())
    assert mbn.rewrite_saved_model(source, tmp_path / "out", "fold").ok


def test_functions_that_call_each_other_without_end():
    meta = saved_model_pb2.SavedModel().meta_graphs.add()
    for i in range(60):
        function = meta.graph_def.library.function.add()
        function.signature.name = f"f{i}"
        for j in range(2):
            node = function.node_def.add(name=f"n{j}", op="PartitionedCall")
            node.attr["f"].func.name = f"f{i + 1 if i < 59 else 0}"  # the last calls the first
    assert effects.inlined_size(meta.graph_def) > limits.INLINED_NODES
    with pytest.raises(RewriteError, match="call each other so often"):
        load_checks.check_size(Path("model"), meta)


# ------------------------------------------------------------------------------ assets


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    directory = tmp_path_factory.mktemp("vocabulary")
    KINDS["vocabulary"].build(directory / "in")
    return directory / "in"


def copy_of(source, target):
    for path in source.rglob("*"):
        if path.is_file():
            place = target / path.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(path.read_bytes())
    return target


def linked(path, target):
    path.unlink(missing_ok=True)
    path.symlink_to(target)


def outside_link(model, secret):
    linked(next((model / "assets").iterdir()), secret)


def linked_directory(model, secret):
    (model / "assets").rename(secret.parent / "elsewhere")
    (model / "assets").symlink_to(secret.parent / "elsewhere")


def extra_link(model, secret):
    (model / "assets.extra").mkdir()
    (model / "assets.extra" / "x").symlink_to(secret)


def extra_directory(model, secret):
    (model / "assets.extra").mkdir()
    (model / "assets.extra" / "x").symlink_to(secret.parent)


def named(name):
    def edit(model, secret):
        file = model / "saved_model.pb"
        proto = saved_model_pb2.SavedModel.FromString(file.read_bytes())
        proto.meta_graphs[0].asset_file_def[0].filename = name.format(secret)
        file.write_bytes(proto.SerializeToString())

    return edit


ELSEWHERE = [outside_link, linked_directory, extra_link, extra_directory, named("{}"),
             named("../../secret"), named("file://{}")]  # fmt: skip


@pytest.mark.parametrize("edit", ELSEWHERE)
def test_assets_outside_of_the_model_are_refused(edit, vocabulary, tmp_path):
    secret = tmp_path / "host" / "secret"
    secret.parent.mkdir()
    secret.write_text("secret\n")
    model = copy_of(vocabulary, tmp_path / "in")
    edit(model, secret)
    with pytest.raises(RewriteError, match=r"lies outside of.*pass --trusted"):
        mbn.rewrite_saved_model(model, tmp_path / "out", "fold")
    assert not (tmp_path / "out").exists()


def test_no_files_of_other_kinds_are_read(vocabulary, tmp_path):
    for part in ("assets.extra", "variables"):
        model = copy_of(vocabulary, tmp_path / part)
        (model / part).mkdir(exist_ok=True)
        os.mkfifo(model / part / "pipe")
        with pytest.raises(RewriteError, match="pipe is no file"):
            files.check(model, trusted=True)
    model = copy_of(vocabulary, tmp_path / "loop")
    (model / "assets" / "again").symlink_to(model / "assets")
    with pytest.raises(RewriteError, match="a directory that it lies in"):
        files.check(model)


def test_links_that_real_models_have_are_followed(vocabulary, tmp_path):
    """A model reached by a link, and a hub's cache, whose files are links to blobs."""
    (tmp_path / "link").symlink_to(vocabulary)
    files.check(tmp_path / "link")
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "1"
    blobs.mkdir(parents=True)
    for number, path in enumerate(sorted(vocabulary.rglob("*"))):
        if path.is_file():
            (blobs / str(number)).write_bytes(path.read_bytes())
            place = snapshot / path.relative_to(vocabulary)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(blobs / str(number))
    assert mbn.rewrite_saved_model(snapshot, tmp_path / "out", "fold").ok
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))

"""SavedModels that once came out wrong, or that a rewrite could easily get wrong."""

import collections
import functools

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from tensorflow.python.saved_model.loader_impl import parse_saved_model

import mbn_rewrite as mbn
from mbn_rewrite.errors import RewriteError
from tests.cli.test_tool import nothing_left
from tests.saved_model.test_saved_models import (
    assert_close,
    contents,
    norms_in,
    read_proto,
    rewritten,
)
from tests.support.saved_models import arithmetic_norm, fused_norm, kernel, statistics

pytestmark = pytest.mark.slow

v1 = tf.compat.v1

MODES = ("fold", "depthwise")
INPUTS = 6
CHANNELS = 4


def spec(*shape, dtype=tf.float32, name=None):
    return tf.TensorSpec(shape, dtype, name)


ROWS = spec(None, INPUTS)


@pytest.fixture
def rng():
    return np.random.default_rng(11)


def data(rng, *shape, dtype=tf.float32):
    return tf.constant(rng.standard_normal(shape), dtype)


def rows(rng, batch=3):
    return data(rng, batch, INPUTS)


class Norm(tf.Module):
    """A BatchNormalization as plain variables."""

    def __init__(self, channels=CHANNELS, seed=0):
        super().__init__()
        arrays = statistics(np.random.default_rng(seed), channels)
        self.gamma, self.beta, self.mean, self.variance = map(tf.Variable, arrays)

    @property
    def arrays(self):
        return self.gamma, self.beta, self.mean, self.variance

    def __call__(self, x):
        return arithmetic_norm(x, *self.arrays)

    def fused(self, x):
        return fused_norm(x, *self.arrays)


class Dense(tf.Module):
    """A dense layer without bias, and its BatchNormalization."""

    def __init__(self, seed=0):
        super().__init__()
        self.kernel = tf.Variable(kernel(np.random.default_rng(seed), INPUTS, CHANNELS))
        self.norm = Norm(seed=seed)

    def dense(self, x):
        return x @ self.kernel

    def block(self, x):
        return self.norm(self.dense(x))


def traced(function, *specs):
    return tf.function(function, input_signature=specs or (ROWS,))


def predicting():
    """A Dense with a method, which is also what most tests have as signature."""
    root = Dense()
    root.predict = traced(root.block)
    return root


def rewrite(tmp_path, root, signatures, mode="fold", **kwargs):
    """Saves an object and rewrites it; gives the report, and both as loaded."""
    if callable(signatures):
        signatures = {"serving_default": signatures}
    tf.saved_model.save(root, str(tmp_path / "in"), signatures)
    report, model, new = rewritten(tmp_path, mode, **kwargs)
    assert report.ok
    assert report.as_it_was == {}
    assert sorted(new.signatures) == sorted(model.signatures)
    return report, model, new


def actions(report):
    return sorted(decision.action for decision in report.plan.decisions)


def assert_same(old, new, *args, **kwargs):
    """Calls two functions with the same, and gives what the first gave."""
    expected, actual = old(*args, **kwargs), new(*args, **kwargs)
    tf.nest.assert_same_structure(actual, expected, expand_composites=True)
    flat = (tf.nest.flatten(x, expand_composites=True) for x in (actual, expected))
    for a, b in zip(*flat, strict=True):
        if b is not None and tf.size(b):
            assert_close(a, b)
    return expected


def assert_same_signatures(model, new, **inputs):
    for key, signature in model.signatures.items():
        assert_same(signature, new.signatures[key], **inputs)


# --------------------------------------------------------------- methods with several traces


def test_method_traced_for_python_values(tmp_path, rng):
    """The values are part of the call, but of no tensor of the graph."""
    root = predicting()
    root.scaled = tf.function(lambda x, scale=1.0: root.block(x) * scale)
    for scale in (1.0, 2.0):
        root.scaled.get_concrete_function(ROWS, scale=scale)
    report, model, new = rewrite(tmp_path, root, root.predict)
    assert report.plan.left == 0
    x = rows(rng)
    for args, kwargs in (((x,), {}), ((x, 2.0), {}), ((x,), {"scale": 2.0}), ((x, 1.0), {})):
        assert_same(model.scaled, new.scaled, *args, **kwargs)
    assert_same(model.predict, new.predict, x)


def test_method_traced_for_shapes_ranks_and_an_optional_tensor(tmp_path, rng):
    root = predicting()
    root.masked = tf.function(lambda x, mask=None: root.block(x) * (1.0 if mask is None else mask))
    root.masked.get_concrete_function(ROWS)
    root.masked.get_concrete_function(spec(2, INPUTS))
    root.masked.get_concrete_function(ROWS, mask=spec(None, 1))
    root.masked.get_concrete_function(spec(None, None, INPUTS))
    report, model, new = rewrite(tmp_path, root, root.predict)
    assert report.plan.left == len(report.plan.decisions) > 0  # one kernel, used in two ways
    mask = data(rng, 3, 1)
    for x in (rows(rng), rows(rng, 2), data(rng, 2, 5, INPUTS)):
        assert_same(model.masked, new.masked, x)
    assert_same(model.masked, new.masked, rows(rng), mask)
    assert_same(model.masked, new.masked, rows(rng), mask=mask)
    assert_same_signatures(model, new, x=rows(rng))


def test_method_traced_for_several_dtypes(tmp_path, rng):
    root = predicting()
    root.any = tf.function(
        lambda x: root.block(tf.cast(x, tf.float32)) + tf.cast(x[0, 0], tf.float32)
    )
    for dtype in (tf.float32, tf.int32, tf.float64):
        root.any.get_concrete_function(spec(None, INPUTS, dtype=dtype))
    _, model, new = rewrite(tmp_path, root, root.predict)
    for dtype in (tf.float32, tf.int32, tf.float64):
        assert_same(model.any, new.any, tf.cast(5 * rows(rng), dtype))


@pytest.mark.parametrize(
    "shapes", [([], None), ([2, 6], [3, 6], [None, 6])], ids=["ranks", "sizes"]
)
def test_method_traced_for_tensors_that_look_alike(shapes, tmp_path, rng):
    """Of a scalar and of a tensor of unknown rank there is no size to tell."""
    root = predicting()
    root.added = tf.function(lambda x: {"sum": root.block(tf.ones((1, INPUTS))) + tf.reduce_sum(x),
                                        "known": x.shape.rank or 0})  # fmt: skip
    for shape in shapes:
        root.added.get_concrete_function(tf.TensorSpec(shape, tf.float32))
    _, model, new = rewrite(tmp_path, root, root.predict)
    for x in (tf.constant(2.0), rows(rng, 2), rows(rng), data(rng, 2, 2, 2)):
        try:
            model.added(x)
        except ValueError:
            continue  # it was not traced for this
        assert_same(model.added, new.added, x)


def test_method_traced_for_lists_of_several_lengths(tmp_path, rng):
    root = predicting()
    root.listed = tf.function(lambda arrays: root.block(tf.add_n(arrays)))
    for length in (1, 2, 3):
        root.listed.get_concrete_function([ROWS] * length)
    report, model, new = rewrite(tmp_path, root, root.predict)
    assert actions(report) == ["folded"]
    for length in (1, 2, 3):
        assert_same(model.listed, new.listed, [rows(rng) for _ in range(length)])


# For each pair of structures: what tells the second from the first.
STRUCTURES = {
    "keys": (({"a": ROWS}, {"b": ROWS}), lambda x: "b" in x),
    "kinds": (([ROWS], {"a": ROWS}), lambda x: isinstance(x, collections.abc.Mapping)),
    "nesting": (
        ([[ROWS, ROWS], ROWS], [ROWS, [ROWS, ROWS]]),
        lambda x: isinstance(x[1], collections.abc.Sequence),
    ),
    "texts": (([ROWS, "a"], [ROWS, "b"]), lambda x: x[1] == "b"),
}


def test_methods_traced_for_structures_that_hold_the_same(tmp_path, rng):
    """Flat they are the same: only the structure tells the traces apart."""
    root = predicting()

    def telling_apart(is_second):
        def called(inputs):
            return root.block(tf.nest.flatten(inputs)[0]) * (2.0 if is_second(inputs) else 1.0)

        return tf.function(called, autograph=False)

    for name, (pair, is_second) in STRUCTURES.items():
        setattr(root, name, telling_apart(is_second))
        for structure in pair:
            getattr(root, name).get_concrete_function(structure)
    _, model, new = rewrite(tmp_path, root, root.predict)
    x, wrong = rows(rng), []
    for name, (pair, _) in STRUCTURES.items():
        for structure in pair:
            inputs = tf.nest.map_structure(
                lambda s: x if isinstance(s, tf.TensorSpec) else s, structure
            )
            expected, actual = (getattr(loaded, name)(inputs) for loaded in (model, new))
            if not np.allclose(actual, expected, rtol=0, atol=1e-4):
                wrong.append((name, structure))
    assert wrong == []


def test_arguments_by_keyword_only_with_and_without_defaults(tmp_path, rng):
    root = predicting()

    @tf.function
    def scaled(x, *, scale, shift=1.0, upside_down=False):
        return (root.block(x) * scale + shift) * (-1.0 if upside_down else 1.0)

    root.scaled = scaled
    scale = spec()
    for kwargs in ({}, {"shift": 2.0}, {"upside_down": True}, {"shift": scale}):
        scaled.get_concrete_function(ROWS, scale=scale, **kwargs)
    _, model, new = rewrite(tmp_path, root, root.predict)
    x, two = rows(rng), tf.constant(2.0)
    for kwargs in ({}, {"shift": 2.0}, {"upside_down": True}, {"shift": two}):
        assert_same(model.scaled, new.scaled, x, scale=two, **kwargs)


def test_arguments_without_a_number_or_name(tmp_path, rng):
    root = predicting()
    root.total = tf.function(
        lambda *arrays, **named: root.block(tf.add_n([*arrays, *named.values()]))
    )
    root.total.get_concrete_function(ROWS, ROWS)
    root.total.get_concrete_function(ROWS, other=ROWS)
    _, model, new = rewrite(tmp_path, root, root.predict)
    assert_same(model.total, new.total, rows(rng), rows(rng))
    assert_same(model.total, new.total, rows(rng), other=rows(rng))


Pair = collections.namedtuple("Pair", ["scores", "rest"])

PACKED = {
    "tuple": lambda y: (y, [y + 1.0, {"b": y * 2.0, "a": y * 3.0}]),
    "dict": lambda y: {"z": y, "a": {"y": y * 2.0, "b": (y * 3.0,)}},
    "named_tuple": lambda y: Pair(y, None),
    "twice": lambda y: [y, y, None],
    "empty": lambda y: (),
    "none": lambda y: None,
    "composite": lambda y: (y, tf.RaggedTensor.from_tensor(y), tf.sparse.from_dense(y)),
}


def test_methods_give_structures(tmp_path, rng):
    root = predicting()

    def packing(pack):
        return traced(lambda x: pack(root.block(x)))

    for name, pack in PACKED.items():
        setattr(root, name, packing(pack))
    report, model, new = rewrite(tmp_path, root, root.predict)
    assert actions(report) == ["folded"]
    for name in PACKED:
        assert_same(getattr(model, name), getattr(new, name), rows(rng))


def test_methods_take_what_consists_of_several_tensors(tmp_path, rng):
    root = predicting()
    root.ragged = traced(lambda r: root.block(r.to_tensor(shape=[None, INPUTS])),
                         tf.RaggedTensorSpec([None, None], tf.float32))  # fmt: skip
    root.sparse = traced(
        lambda s: root.block(tf.sparse.to_dense(s)), tf.SparseTensorSpec([None, INPUTS], tf.float32)
    )
    report, model, new = rewrite(tmp_path, root, root.predict)
    assert actions(report) == ["folded"]
    x = rows(rng)
    assert_same(model.ragged, new.ragged, tf.RaggedTensor.from_tensor(x, lengths=[1, 6, 0]))
    assert_same(model.sparse, new.sparse, tf.sparse.from_dense(x))


def test_object_that_is_called(tmp_path, rng):
    root = predicting()
    root.__call__ = traced(lambda x: tf.RaggedTensor.from_tensor(root.block(x)))
    report, model, new = rewrite(tmp_path, root, root.predict)
    assert actions(report) == ["folded"]
    assert_same(model, new, rows(rng))


def test_methods_with_names_that_the_result_may_need_itself(tmp_path):
    root = predicting()
    root.table = tf.lookup.StaticHashTable(tf.lookup.KeyValueTensorInitializer(["a"], [1]), -1)
    look_up = traced(lambda s: root.table.lookup(s), spec(None, dtype=tf.string))
    names = ("resources", "initializer", "assets", "function", "save")
    for name in names:
        setattr(root, name, look_up)
    _, model, new = rewrite(tmp_path, root, root.predict)
    words = tf.constant(["a", "b"])
    assert [name for name in names if not callable(getattr(new, name))] == []
    for name in names:
        assert_same(getattr(model, name), getattr(new, name), words)


def test_method_named_variables(tmp_path, rng):
    root, inner = tf.__internal__.tracking.AutoTrackable(), Dense()
    root.inner = inner
    root.predict = traced(inner.block)
    root.variables = traced(lambda x: {"y": inner.block(x) * 2.0})
    report, model, new = rewrite(tmp_path, root, root.predict)
    assert actions(report) == ["folded"]
    assert_same(model.variables, new.variables, rows(rng))


# --------------------------------------------------------------------- who else reads a weight


GIVEN = {
    "as_it_is": lambda root: root.kernel.read_value(),
    "transposed": lambda root: tf.transpose(root.kernel),
    "reshaped": lambda root: tf.reshape(root.kernel, [-1]),
    "cast": lambda root: tf.cast(root.kernel, tf.float16),
    "parameters": lambda root: [array * 1.0 for array in root.norm.arrays],
}


@pytest.mark.parametrize("mode", MODES)
def test_weights_that_leave_as_outputs_are_as_they_were(mode, tmp_path, rng):
    root = predicting()
    for name, given in GIVEN.items():
        setattr(root, name, tf.function(functools.partial(given, root), input_signature=[]))
    report, model, new = rewrite(tmp_path, root, root.predict, mode)
    assert actions(report) == ["kept" if mode == "fold" else "depthwise"]
    for name in GIVEN:
        assert_same(getattr(model, name), getattr(new, name))
    assert_same(model.predict, new.predict, rows(rng))


@pytest.mark.parametrize("given", ["as_it_is", "transposed"])
def test_weight_that_leaves_as_output_is_said_to_be_in_the_way(given, tmp_path):
    root = predicting()
    root.given = tf.function(lambda: GIVEN[given](root), input_signature=[])
    tf.saved_model.save(root, str(tmp_path / "in"), {"serving_default": root.predict})
    report = mbn.rewrite_saved_model(tmp_path / "in", "", "fold", dry_run=True)
    assert actions(report) == ["kept"]
    assert "given()" in report.plan.decisions[0].reason


@pytest.mark.parametrize("mode", MODES)
def test_one_kernel_in_two_dtypes(mode, tmp_path, rng):
    root = Dense()

    def serve(x):
        half = tf.cast(x, tf.float16) @ tf.cast(root.kernel, tf.float16)
        return {"a": root.block(x), "b": tf.cast(half, tf.float32)}

    report, model, new = rewrite(tmp_path, root, traced(serve), mode)
    # The product in float32 gets weights of its own.
    assert actions(report) == ["folded" if mode == "fold" else "depthwise"]
    assert_same_signatures(model, new, x=rows(rng))


@pytest.mark.parametrize("mode", MODES)
def test_one_norm_on_two_ranks(mode, tmp_path, rng):
    root = Norm()

    def serve(x):
        return {"a": root(x), "b": root(tf.reshape(x, [-1, 2, 2, CHANNELS]))}

    inputs = {"x": np.ones((8, CHANNELS), "f4")}
    function = traced(serve, spec(None, CHANNELS))
    report, model, new = rewrite(tmp_path, root, function, mode, inputs=inputs)
    assert set(actions(report)) == {"kept" if mode == "fold" else "depthwise"}
    assert_same_signatures(model, new, x=data(rng, 4, CHANNELS))


def test_kernel_of_one_signature_with_a_norm_and_one_without(tmp_path, rng):
    root = Dense()
    signatures = {"serving_default": traced(root.block), "bare": traced(root.dense)}
    report, model, new = rewrite(tmp_path, root, signatures)
    assert actions(report) == ["kept"]
    assert_same_signatures(model, new, x=rows(rng))


def test_number_added_after_the_norm_in_one_function_only(tmp_path, rng):
    """The addition must not be taken for a part of the BatchNormalization."""
    root = predicting()
    report, model, new = rewrite(tmp_path, root, traced(lambda x: root.block(x) + 1.0))
    assert actions(report) == ["folded"]
    assert_same_signatures(model, new, x=rows(rng))
    assert_same(model.predict, new.predict, rows(rng))


def test_vector_added_after_the_norm_in_one_function_only(tmp_path, rng):
    root = predicting()
    serve = traced(lambda x: tf.add(root.block(x), [1.0, 2.0, 3.0, 4.0]))
    _, model, new = rewrite(tmp_path, root, serve)
    assert_same_signatures(model, new, x=rows(rng))
    assert_same(model.predict, new.predict, rows(rng))


# --------------------------------------------------------------------------------- states


@pytest.mark.parametrize("name", ["mean", "variance"])
@pytest.mark.parametrize("mode", MODES)
def test_statistics_written_by_a_nested_function_of_another_signature(mode, name, tmp_path, rng):
    root = predicting()

    @tf.function
    def update(y):
        statistic = getattr(root.norm, name)
        statistic.assign_sub(0.1 * (statistic - tf.reduce_mean(tf.square(y), 0)))
        return y * 1.0

    outer = tf.function(lambda y: update(y))
    train = traced(lambda y: {"y": outer(y)}, spec(None, CHANNELS))
    signatures = {"serving_default": root.predict, "train": train}
    report, model, new = rewrite(tmp_path, root, signatures, mode)
    if name == "variance":  # of a mean that changes, the scale may still go
        assert actions(report) == ["kept"]
    x, y = rows(rng), data(rng, 5, CHANNELS)
    before = assert_same(model.predict, new.predict, x)
    for _ in range(2):
        assert_same(model.signatures["train"], new.signatures["train"], y=y)
    after = assert_same(model.predict, new.predict, x)
    assert np.abs(before - after).max() > 1e-3
    assert_same(model.signatures["serving_default"], new.signatures["serving_default"], x=x)


def test_mutable_table_is_stored_as_it_was(tmp_path):
    """Verifying runs the signature that adds to it."""
    root = predicting()
    root.table = tf.lookup.experimental.MutableHashTable(tf.int64, tf.float32, -1.0)
    root.table.insert(tf.constant([5], tf.int64), [3.0])

    def add(keys, values):
        root.table.insert(keys, values)
        return {"size": root.table.size()}

    signatures = {
        "serving_default": root.predict,
        "add": traced(add, spec(None, dtype=tf.int64), spec(None)),
        "size": tf.function(lambda: {"size": root.table.size()}, input_signature=[]),
    }
    root.look_up = traced(lambda keys: root.table.lookup(keys), spec(None, dtype=tf.int64))
    report, model, new = rewrite(tmp_path, root, signatures)
    assert actions(report) == ["folded"]
    assert int(new.signatures["size"]()["size"]) == 1
    keys, values = tf.constant([5, 7], tf.int64), tf.constant([1.0, 2.0])
    assert_same(model.look_up, new.look_up, keys)
    assert_same(model.signatures["add"], new.signatures["add"], keys=keys, values=values)
    assert_same(model.look_up, new.look_up, keys)


def test_generator_of_random_numbers_is_stored_as_it_was(tmp_path, rng):
    root = Dense()
    root.generator = tf.random.Generator.from_seed(1)
    root.noisy = traced(lambda x: {"y": root.block(x) + root.generator.normal([CHANNELS])})
    report, model, new = rewrite(tmp_path, root, root.noisy)
    assert actions(report) == ["folded"]
    x = rows(rng)
    for _ in range(2):
        assert_same_signatures(model, new, x=x)
        assert_same(model.noisy, new.noisy, x)


def test_counters_are_stored_as_they_were(tmp_path, rng):
    """One of them is held by an inner object, one is changed by a method alone."""
    root = predicting()
    root.inner, root.calls = tf.Module(), tf.Variable(3)
    root.inner.calls = tf.Variable(5)
    root.count = tf.function(lambda: root.calls.assign_add(1), input_signature=[])
    serve = traced(lambda x: {"y": root.block(x), "n": root.inner.calls.assign_add(1)})
    report, model, new = rewrite(tmp_path, root, serve)
    assert actions(report) == ["folded"]
    for number in (4, 5):
        assert int(new.count()) == int(model.count()) == number
    for number in (6, 7):
        assert int(new.signatures["serving_default"](x=rows(rng))["n"]) == number
    assert "n" in model.signatures["serving_default"].structured_outputs


def test_variable_with_an_open_shape(tmp_path, rng):
    root = predicting()
    root.open = tf.Variable(np.ones((3, 2), "f4"), shape=[None, 2])
    serve = traced(lambda x: {"y": root.block(x), "sum": tf.reduce_sum(root.open)})
    report, model, new = rewrite(tmp_path, root, serve)
    assert actions(report) == ["folded"]
    assert_same_signatures(model, new, x=rows(rng))


# -------------------------------------------------------------------------------- compiling


def compiled_among(directory, op):
    """For each function that holds an operation: whether XLA must compile it."""
    library = read_proto(directory).meta_graphs[0].graph_def.library.function
    nodes = [node for function in library for node in function.node_def]
    called = {
        node.attr["f"].func.name
        for node in nodes
        if "f" in node.attr and "_XlaMustCompile" in node.attr and node.attr["_XlaMustCompile"].b
    }
    return [
        function.signature.name in called
        or ("_XlaMustCompile" in function.attr and function.attr["_XlaMustCompile"].b)
        for function in library
        if any(node.op == op for node in function.node_def)
    ]


@pytest.mark.parametrize("outer", ["signature", "inside_twice"])
def test_function_that_is_compiled_whole_is_still_compiled(outer, tmp_path, rng):
    root = Dense()
    inner = tf.function(root.block, jit_compile=True)
    middle = tf.function(lambda x: inner(x))
    if outer == "signature":
        serve = tf.function(root.block, jit_compile=True, input_signature=[ROWS])
    else:
        serve = traced(lambda x: {"y": middle(x)})
    report, model, new = rewrite(tmp_path, root, serve)
    assert actions(report) == ["folded"]
    assert norms_in(new.signatures["serving_default"]) == 0
    assert compiled_among(tmp_path / "out", "MatMul")
    assert all(compiled_among(tmp_path / "out", "MatMul"))
    assert_same_signatures(model, new, x=rows(rng))


def test_method_that_is_compiled_is_still_compiled(tmp_path, rng):
    root = Dense()
    root.predict = tf.function(root.block, jit_compile=True, input_signature=[ROWS])
    root.plain = traced(lambda x: {"sum": tf.reduce_sum(x)})
    report, model, new = rewrite(tmp_path, root, root.plain)
    assert actions(report) == ["folded"]
    assert all(compiled_among(tmp_path / "out", "MatMul"))
    assert_same(model.predict, new.predict, rows(rng))


def test_compiled_function_in_the_midst_of_others_is_compiled_alone(tmp_path, rng):
    """XLA knows no texts, so the rest cannot be compiled with it."""
    root = predicting()
    inner = tf.function(root.block, jit_compile=True)
    serve = traced(
        lambda s: {"y": inner(tf.io.decode_raw(s, tf.float32))}, spec(None, dtype="string")
    )
    texts = np.array([row.tobytes() for row in rows(rng).numpy()], object)
    report, model, new = rewrite(tmp_path, root, serve, inputs={"s": texts})
    assert actions(report) == ["folded"]
    assert any(compiled_among(tmp_path / "out", "MatMul"))
    assert not any(compiled_among(tmp_path / "out", "DecodeRaw"))
    assert_same_signatures(model, new, s=tf.constant(texts))
    assert_same(model.predict, new.predict, rows(rng))


def test_functions_with_gradients_of_their_own(tmp_path, rng):
    root = Dense()
    root.silu = traced(lambda x: tf.nn.silu(root.block(x)))
    root.swish = traced(lambda x: tf.nn.swish(root.block(x)))
    root.sharp = traced(lambda x: tf.nn.silu(root.block(x), 2.0))
    report, model, new = rewrite(tmp_path, root, root.silu)
    assert actions(report) == ["folded"]
    assert_same_signatures(model, new, x=rows(rng))
    for name in ("silu", "swish", "sharp"):
        assert_same(getattr(model, name), getattr(new, name), rows(rng))


def test_convolution_in_groups_runs_without_compiling(tmp_path, rng):
    """TensorFlow fuses a bias with a convolution, and cannot run that in groups on a CPU."""
    root = tf.Module()
    root.kernel, root.norm = tf.Variable(kernel(rng, 3, 3, 2, 9)), Norm(9)
    root.serve = traced(
        lambda x: root.norm(tf.nn.conv2d(x, root.kernel, 1, "VALID")), spec(None, 8, 8, INPUTS)
    )
    report, model, new = rewrite(tmp_path, root, root.serve)
    assert actions(report) == ["folded"]
    x = data(rng, 2, 8, 8, INPUTS)
    assert_same_signatures(model, new, x=x)
    assert_same(model.serve, new.serve, x)


# ---------------------------------------------------------------------- inputs and outputs


@pytest.mark.parametrize("name", ["image/encoded", "1k"])
def test_input_names_are_what_they_were(name, tmp_path, rng):
    root = Dense()
    serve = tf.function(lambda x: {"y": root.block(x)})
    concrete = serve.get_concrete_function(spec(None, INPUTS, name=name))
    report, model, new = rewrite(tmp_path, root, concrete)
    assert actions(report) == ["folded"]
    signature, written = (loaded.signatures["serving_default"] for loaded in (model, new))
    assert written.structured_input_signature == signature.structured_input_signature
    (key,) = signature.structured_input_signature[1]
    assert_same(signature, written, **{key: rows(rng)})
    before, after = (
        read_proto(tmp_path / d).meta_graphs[0].signature_def["serving_default"]
        for d in ("in", "out")
    )
    assert list(after.inputs) == list(before.inputs)
    assert list(after.outputs) == list(before.outputs)


def test_names_of_signatures_and_outputs_are_what_they_were(tmp_path, rng):
    root = Dense()
    keys = ("serving_default", "a/b", "with blank", "1", "method")
    signatures = {key: traced(lambda x: {"1/y z": root.block(x), "x": x}) for key in keys}
    _, model, new = rewrite(tmp_path, root, signatures)
    assert_same_signatures(model, new, x=rows(rng))


def test_sparse_output_of_a_signature(tmp_path, rng):
    root = Dense()
    serve = traced(lambda x: {"y": tf.sparse.from_dense(root.block(x)), "x": x})
    report, model, new = rewrite(tmp_path, root, serve)
    assert actions(report) == ["folded"]
    assert list(report.comparisons) == ["serving_default"]
    assert_same_signatures(model, new, x=rows(rng))


def test_outputs_that_are_inputs_constants_and_each_other(tmp_path, rng):
    root = Dense()

    def serve(x):
        y = root.block(x)
        return {"x": x, "y": y, "again": y, "one": tf.constant(1.0), "shape": tf.shape(y)}

    report, model, new = rewrite(tmp_path, root, traced(serve))
    assert actions(report) == ["folded"]
    assert_same_signatures(model, new, x=rows(rng))


def test_signatures_that_give_nothing_are_not_compared_and_said_so(tmp_path, rng):
    root = predicting()
    root.calls = tf.Variable(0)

    def count(x):
        root.calls.assign_add(1)
        return {}

    signatures = {
        "serving_default": root.predict,
        "count": traced(count),
        "empty": traced(lambda x: {"y": root.block(x)[:0]}),
    }
    report, model, new = rewrite(tmp_path, root, signatures)
    assert "serving_default" in report.comparisons
    assert not {"count", "empty"} & set(report.comparisons)
    assert sorted(report.unverified) == ["count", "empty"]
    assert "not verified: empty (it gives not one value" in str(report)
    assert actions(report) == ["folded"]
    assert_same_signatures(model, new, x=rows(rng))
    assert int(new.calls) == int(model.calls) == 1


def test_signature_without_inputs(tmp_path, rng):
    root = predicting()
    constant = tf.function(lambda: {"y": root.block(tf.ones((2, INPUTS)))}, input_signature=[])
    signatures = {"serving_default": root.predict, "constant": constant}
    report, model, new = rewrite(tmp_path, root, signatures)
    assert report.unverified == {}
    assert_same(model.signatures["constant"], new.signatures["constant"])
    assert_same(model.predict, new.predict, rows(rng))


# ------------------------------------------------------------------ what is next to the norm


def test_constant_joined_with_data_before_the_norm(tmp_path, rng):
    root = tf.Module()
    root.kernel, root.norm = tf.Variable(kernel(rng, 3, 3, 3, 4)), Norm(6)

    def serve(x):
        y = tf.nn.conv2d(x, root.kernel, 1, "SAME")
        return root.norm(tf.concat([y, tf.ones([1, 8, 8, 2])], -1))

    root.serve = traced(serve, spec(1, 8, 8, 3))
    _, model, new = rewrite(tmp_path, root, root.serve)
    x = data(rng, 1, 8, 8, 3)
    assert_same_signatures(model, new, x=x)
    assert_same(model.serve, new.serve, x)


def test_constant_added_to_data_before_the_norm(tmp_path, rng):
    root = Dense()
    constant = np.arange(12, dtype="f4").reshape(3, 4)  # another for each row
    root.serve = traced(lambda x: root.norm(root.dense(x) + constant), spec(3, INPUTS))
    _, model, new = rewrite(tmp_path, root, root.serve)
    assert_same_signatures(model, new, x=rows(rng))


def test_fused_norm_of_unknown_rank_in_mode_depthwise(tmp_path, rng):
    root = Norm()
    root.serve = traced(lambda x: root.fused(tf.nn.relu(x)), tf.TensorSpec(None, tf.float32))
    inputs = {"x": np.ones((2, 8, 8, CHANNELS), "f4")}
    report, model, new = rewrite(tmp_path, root, root.serve, "depthwise", inputs=inputs)
    assert set(actions(report)) == {"depthwise"}
    x = data(rng, 2, 5, 5, CHANNELS)
    assert_same_signatures(model, new, x=x)
    assert_same(model.serve, new.serve, x)


def test_root_of_a_number_is_no_norm(tmp_path, rng):
    root = Dense()
    root.serve = traced(lambda x: root.dense(x) * tf.math.rsqrt(64.0))
    report, model, new = rewrite(tmp_path, root, root.serve)
    assert report.plan.decisions == ()
    assert_same_signatures(model, new, x=rows(rng))


@pytest.mark.parametrize("mode", MODES)
def test_two_norms_in_a_row_on_different_axes_are_two(mode, tmp_path, rng):
    root = tf.Module()
    root.kernel, root.last, root.first = tf.Variable(kernel(rng, 6, 4)), Norm(4), Norm(5, seed=1)

    def serve(x):
        arrays = [tf.reshape(array, [5, 1]) for array in root.first.arrays]
        return arithmetic_norm(root.last(x @ root.kernel), *arrays)

    root.serve = traced(serve, spec(None, 5, INPUTS))
    report, model, new = rewrite(tmp_path, root, root.serve, mode)
    assert len(report.plan.decisions) == 2
    x = data(rng, 3, 5, INPUTS)
    assert_same_signatures(model, new, x=x)
    assert_same(model.serve, new.serve, x)


def test_two_norms_in_a_row_on_one_axis_are_two(tmp_path, rng):
    root = Dense()
    root.second = Norm(seed=1)
    root.serve = traced(lambda x: root.second(root.block(x)))
    report, model, new = rewrite(tmp_path, root, root.serve)
    assert len(report.plan.decisions) == 2
    assert report.plan.left == 0
    assert_same_signatures(model, new, x=rows(rng))


def test_half_precision_of_keras(tmp_path):
    layers = tf_keras.layers
    tf_keras.mixed_precision.set_global_policy("mixed_float16")
    model = tf_keras.Sequential(
        [layers.Input((INPUTS,)), layers.Dense(4), layers.BatchNormalization(), layers.Dense(3)]
    )
    model.layers[1].set_weights(statistics(np.random.default_rng(2), 4))
    model.save(tmp_path / "in", save_format="tf")
    report, _, _ = rewritten(tmp_path)
    assert report.ok
    assert actions(report) == ["folded"]


def test_smallest_norms(tmp_path, rng):
    """One channel, whose parameters are numbers to all who look at shapes."""
    root = tf.Module()
    root.kernel, root.norm = tf.Variable(kernel(rng, INPUTS, 1)), Norm(1)
    root.serve = traced(lambda x: root.norm(x @ root.kernel))
    report, model, new = rewrite(tmp_path, root, root.serve)
    assert actions(report) == ["folded"]
    assert_same_signatures(model, new, x=rows(rng, 1))


# --------------------------------------------------------------------------- frozen, nested


@pytest.mark.parametrize("mode", MODES)
def test_two_frozen_signatures_with_norms_of_the_same_names(mode, tmp_path, rng):

    def frozen(seed):
        own = np.random.default_rng(seed)
        weights, arrays = kernel(own, INPUTS, 4), statistics(own, 4)
        return traced(lambda x: {"y": fused_norm((x @ weights)[:, None, None], *arrays)})

    root, signatures = tf.Module(), {"serving_default": frozen(0), "other": frozen(1)}
    report, model, new = rewrite(tmp_path, root, signatures, mode)
    assert len(report.plan.decisions) == 2
    assert len({decision.name for decision in report.plan.decisions}) == 2
    assert_same_signatures(model, new, x=rows(rng))


def test_functions_of_inner_objects_are_carried_over(tmp_path, rng):
    """An inner object may hold another, and be held twice."""
    root, inner = predicting(), predicting()
    inner.deeper = predicting()
    root.inner = root.again = inner
    serve = traced(lambda x: root.inner.predict(x) + inner.deeper.predict(x))
    report, model, new = rewrite(tmp_path, root, serve)
    assert actions(report) == ["folded"] * 3
    x = rows(rng)
    assert_same_signatures(model, new, x=x)
    for get in (
        lambda loaded: loaded,
        lambda loaded: loaded.inner,
        lambda loaded: loaded.inner.deeper,
        lambda loaded: loaded.again,
    ):
        assert_same(get(model).predict, get(new).predict, x)


def test_model_rewritten_twice(tmp_path, rng):
    """What stays the first time is found again in the graph that was written."""
    root = predicting()
    root.also = traced(lambda x: {"features": root.dense(x)})
    first, model, _ = rewrite(tmp_path, root, {"serving_default": root.predict, "also": root.also})
    second = mbn.rewrite_saved_model(tmp_path / "out", tmp_path / "twice", "depthwise")
    assert actions(first) == ["kept"]
    assert actions(second) == ["depthwise"]
    last, x = tf.saved_model.load(str(tmp_path / "twice")), rows(rng)
    for name in ("predict", "also"):
        assert_same(getattr(model, name), getattr(last, name), x)
    assert_same_signatures(model, last, x=x)


def test_two_assets_of_the_same_name(tmp_path):
    root, tables = predicting(), []
    line, number = tf.lookup.TextFileIndex.WHOLE_LINE, tf.lookup.TextFileIndex.LINE_NUMBER
    for directory, words in (("a", "red\ngreen"), ("b", "green\nred\nblue")):
        (tmp_path / directory).mkdir()
        file = tmp_path / directory / "words.txt"
        file.write_text(words)
        to = tf.lookup.TextFileInitializer(str(file), tf.string, line, tf.int64, number)
        tables.append(tf.lookup.StaticHashTable(to, -1))
    root.tables = tables
    look_up = traced(lambda s: [t.lookup(s) for t in root.tables], spec(None, dtype=tf.string))
    root.look_up = look_up
    serve = traced(lambda s: {"y": root.block(tf.one_hot(root.tables[0].lookup(s), INPUTS))},
                   spec(None, dtype=tf.string))  # fmt: skip
    report, model, new = rewrite(tmp_path, root, serve)
    assert actions(report) == ["folded"]
    words = tf.constant(["red", "green", "blue", "never"])
    assert_same(model.look_up, new.look_up, words)
    assert_same_signatures(model, new, s=words)


# ---------------------------------------------------------------------------- TensorFlow 1


def save_tf1(directory, build, control_flow_v2=False):
    """Saves a graph with a session; `build` gives its inputs and outputs by name."""
    (v1.enable_control_flow_v2 if control_flow_v2 else v1.disable_control_flow_v2)()
    try:
        with tf.Graph().as_default(), v1.Session() as session:
            inputs, outputs = build()
            session.run(v1.global_variables_initializer())
            v1.saved_model.simple_save(session, str(directory), inputs, outputs)
    finally:
        v1.enable_control_flow_v2()


def tf1_variables(rng, *arrays):
    return [
        v1.get_variable(f"v{i}", initializer=array, use_resource=True)
        for i, array in enumerate((kernel(rng, INPUTS, 4), *statistics(rng, 4), *arrays))
    ]


def rewrite_tf1(tmp_path, build, mode="fold", control_flow_v2=False):
    save_tf1(tmp_path / "in", build, control_flow_v2)
    report, model, new = rewritten(tmp_path, mode)
    assert report.ok
    assert report.as_it_was == {}
    return report, model, new


@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize("names", [["in-1"], ["in-1", "in-2/x"]])
def test_names_of_inputs_that_are_no_identifiers(names, freeze, tmp_path, rng):
    def build():
        inputs = {name: v1.placeholder(tf.float32, [None, INPUTS]) for name in names}
        weights, *norm = tf1_variables(rng)
        return inputs, {"out-1": arithmetic_norm(sum(inputs.values()) @ weights, *norm)}

    save_tf1(tmp_path / "in", build)
    report = mbn.rewrite_saved_model(tmp_path / "in", tmp_path / "out", "fold", freeze=freeze)
    assert report.ok
    assert actions(report) == ["folded"]
    (meta_graph,) = parse_saved_model(str(tmp_path / "out")).meta_graphs
    assert sorted(meta_graph.signature_def["serving_default"].inputs) == names
    given = {name: np.ones((2, INPUTS), np.float32) for name in names}
    found = mbn.verify_saved_model(tmp_path / "in", tmp_path / "out", inputs=given)
    assert found.ok


@pytest.mark.parametrize("control_flow_v2", [True, False])
def test_fed_default_is_not_taken_for_what_is_fed(control_flow_v2, tmp_path, rng):
    """Each placeholder has a default, but is an input of the signature."""

    def build():
        on = v1.placeholder_with_default(True, [], "on")
        off = v1.placeholder_with_default(False, [], "off")
        x = v1.placeholder(tf.float32, [None, INPUTS], "x")
        weights, *norm = tf1_variables(rng)
        y = x @ weights
        y = v1.cond(on, lambda: arithmetic_norm(y, *norm), lambda: y * 3.0)
        z = v1.cond(off, lambda: arithmetic_norm(y, *norm), lambda: y * 5.0)
        return {"x": x, "on": on, "off": off}, {"z": z}

    _, model, new = rewrite_tf1(tmp_path, build, control_flow_v2=control_flow_v2)
    x, given = rows(rng), []
    for on in (True, False):
        for off in (True, False):
            signatures = (loaded.signatures["serving_default"] for loaded in (model, new))
            given.append(assert_same(*signatures, x=x, on=tf.constant(on), off=tf.constant(off)))
    sums = {round(float(np.abs(outputs["z"]).sum()), 3) for outputs in given}
    assert len(sums) == len(given)


def test_loop_of_tensorflow_1_after_the_norm(tmp_path, rng):
    def build():
        x = v1.placeholder(tf.float32, [None, INPUTS], "x")
        weights, *norm = tf1_variables(rng)
        y = arithmetic_norm(x @ weights, *norm)
        _, y = v1.while_loop(lambda i, _: i < 3, lambda i, y: (i + 1, y * 2.0), [0, y])
        return {"x": x}, {"y": y}

    report, model, new = rewrite_tf1(tmp_path, build)
    assert actions(report) == ["folded"]
    assert_same_signatures(model, new, x=rows(rng))


def test_branches_of_tensorflow_1_that_the_caller_decides(tmp_path, rng):
    """One branch normalises once more, and the other reads the weights."""

    def build():
        switch = v1.placeholder(tf.bool, [], "switch")
        x = v1.placeholder(tf.float32, [None, INPUTS], "x")
        weights, *norm = tf1_variables(rng)
        y = arithmetic_norm(x @ weights, *norm)
        y = v1.cond(switch, lambda: arithmetic_norm(y, *norm), lambda: y * weights[0])
        return {"x": x, "switch": switch}, {"y": y}

    _, model, new = rewrite_tf1(tmp_path, build)
    for switch in (True, False):
        assert_same_signatures(model, new, x=rows(rng), switch=tf.constant(switch))


# ---------------------------------------------------------------------- paths and arguments


@pytest.fixture
def source(tmp_path):
    root = predicting()
    signatures = {"serving_default": root.predict, "other": traced(lambda x: {"o": root.block(x)})}
    tf.saved_model.save(root, str(tmp_path / "in"), signatures)
    return tmp_path / "in"


@pytest.mark.parametrize("inside", ["out", "variables/out", "variables/../assets", "."])
def test_output_inside_the_input_is_refused(inside, source, tmp_path):
    before = contents(source)
    with pytest.raises(RewriteError, match=r"would lie in the input|exists"):
        mbn.rewrite_saved_model(source, source / inside, "fold")
    with pytest.raises(RewriteError, match=r"would (lie in|replace) the input|not replaced"):
        mbn.rewrite_saved_model(source, source / inside, "fold", overwrite=True)
    assert contents(source) == before
    assert nothing_left(tmp_path, source)


@pytest.mark.parametrize("moment", ["save", "load"])
def test_interrupted_rewrite_leaves_nothing(moment, source, tmp_path, monkeypatch):
    """Ctrl-C while it is written, and while what was written is loaded to be verified."""
    original, before = getattr(tf.saved_model, moment), contents(source)

    def interrupted(*args, **kwargs):
        result = original(*args, **kwargs)
        if moment == "save" or ".out." in str(args[0]):
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(tf.saved_model, moment, interrupted)
    with pytest.raises(KeyboardInterrupt):
        mbn.rewrite_saved_model(source, tmp_path / "out", "fold")
    assert nothing_left(tmp_path, source)
    assert contents(source) == before


def test_no_signature_asked_for_names_what_there_is(source, tmp_path):
    with pytest.raises(RewriteError, match="other, serving_default"):
        mbn.rewrite_saved_model(source, tmp_path / "out", "fold", signatures=[])
    assert nothing_left(tmp_path, source)


def test_one_signature_may_be_given_as_text(source, tmp_path, rng):
    report, model, new = rewritten(tmp_path, signatures="serving_default")
    assert report.ok
    assert list(new.signatures) == ["serving_default"]
    x = rows(rng)
    assert_same(model.signatures["serving_default"], new.signatures["serving_default"], x=x)
    assert report.left_out == {"signature other": "not asked for"}


def test_one_tag_may_be_given_as_text(source, tmp_path):
    assert mbn.rewrite_saved_model(source, "", "fold", dry_run=True, tags="serve").plan.left == 0

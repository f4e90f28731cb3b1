"""Models that once came out wrong, or that a rewrite could easily get wrong."""

import numpy as np
import pytest
import tensorflow as tf
import tf_keras

import mbn_rewrite as mbn
from tests.support.checks import check_rewrite, norms, outputs
from tests.support.random_models import K, randomise

B = K.BatchNormalization
MODES = ("fold", "depthwise")


@pytest.fixture
def rng():
    return np.random.default_rng(11)


def data(rng, *shape, dtype=tf.float32):
    return tf.constant(rng.standard_normal((2, *shape)), dtype)


def randomised(model, rng):
    """Random weights everywhere, in activations and custom layers too."""
    randomise(model, rng)
    for layer in norms(model):
        layer.gamma.assign(rng.uniform(0.5, 1.5, layer.gamma.shape))
        layer.moving_mean.assign(rng.normal(0, 0.5, layer.gamma.shape))
    return model


# ------------------------------------------------------------------- constants among the inputs


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "merge", ["Add", "Subtract", "Average", "Maximum", "Minimum", "Concatenate"]
)
@pytest.mark.parametrize("first", [True, False], ids=["constant_first", "constant_last"])
def test_merge_with_a_constant(first, merge, mode, rng):
    x = K.Input((5, 4), batch_size=2)
    constant, y = tf.ones((2, 5, 4)), K.Dense(4)(B()(K.ReLU()(x)))
    y = getattr(K, merge)()([constant, y] if first else [y, constant])
    model = randomised(tf_keras.Model(x, K.Dense(2)(B()(y))), rng)
    check_rewrite(model, data(rng, 5, 4), mode)


# ------------------------------------------------------------ what a configuration leaves out


@pytest.mark.parametrize("mode", MODES)
def test_activation_with_weights_in_an_edited_layer(mode, rng):
    x = K.Input((5, 4))
    y = K.Dense(3, activation=K.PReLU(shared_axes=[1]))(B()(x))
    model = tf_keras.Model(x, K.SimpleRNN(2, activation=K.PReLU())(B()(y)))
    randomised(model, rng)
    check_rewrite(model, data(rng, 5, 4), mode)


def hard_sigmoid(x):
    """Another function than the one that Keras has under this name."""
    return tf.nn.relu6(x + 3.0) / 6.0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "function",
    [hard_sigmoid, tf.sin, lambda x: x**2],
    ids=["same_name", "tensorflow", "lambda"],
)
def test_functions_as_activations(function, mode, rng):
    x = K.Input((4,))
    y = K.Activation(function)(B()(K.Dense(3)(x)))
    model = tf_keras.Model(x, K.Dense(2, activation=function)(B()(y)))
    randomised(model, rng)
    check_rewrite(model, data(rng, 4), mode)


@pytest.mark.parametrize("mode", MODES)
def test_own_initializers_regularizers_and_constraints(mode, rng):
    def start(shape, dtype=None):
        return tf.ones(shape, dtype)

    def penalty(w):
        return tf.reduce_sum(w)

    def bound(w):
        return tf.clip_by_value(w, -1.0, 1.0)

    x = K.Input((4,))
    y = B()(K.Dense(3, kernel_initializer=start)(x))
    y = K.Dense(2, kernel_initializer=start, bias_regularizer=penalty, kernel_constraint=bound)(
        K.Activation("tanh")(y)
    )
    model = randomised(tf_keras.Model(x, y), rng)
    check_rewrite(model, data(rng, 4), mode)
    last = mbn.convert(model, mode).layers[-1]
    assert last.bias_regularizer is penalty
    assert last.kernel_constraint is bound
    assert last.kernel_initializer is model.layers[-1].kernel_initializer


class Two(K.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.first, self.second = B(), B()

    def call(self, x):
        return self.second(tf.nn.relu(self.first(x)))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("frozen", ["model", "part"])
def test_frozen_layers_inside_layers(frozen, mode, rng):
    x = K.Input((4,))
    two = Two()
    model = randomised(tf_keras.Model(x, K.Dense(3)(two(x))), rng)
    (model if frozen == "model" else two.first).trainable = False
    check_rewrite(model, data(rng, 4), mode)


@pytest.mark.parametrize("mode", MODES)
def test_one_direction_frozen(mode, rng):
    x = K.Input((5, 4))
    both = K.Bidirectional(K.GRU(3))
    model = randomised(tf_keras.Model(x, both(B()(K.Activation("tanh")(x)))), rng)
    both.forward_layer.trainable = False
    check_rewrite(model, data(rng, 5, 4), mode)
    new = mbn.convert(model, mode).layers[-1]
    assert not new.forward_layer.trainable
    assert new.backward_layer.trainable


class Dense(K.Dense):
    def call(self, x):
        return super().call(x) * 2.0


@pytest.mark.parametrize("mode", MODES)
def test_own_class_with_the_name_of_a_stock_one(mode, rng):
    x = K.Input((5, 4))
    y = Dense(3)(K.TimeDistributed(K.Dense(4))(x))
    model = randomised(tf_keras.Model(x, B()(K.TimeDistributed(Dense(3))(y))), rng)
    check_rewrite(model, data(rng, 5, 4), mode)


@pytest.mark.parametrize("mode", MODES)
def test_adapted_preprocessing(mode, rng):
    values = rng.normal(3.0, 2.0, (200, 4)).astype("float32")
    scaling, bins = K.Normalization(), K.Discretization(num_bins=4)
    scaling.adapt(values)
    bins.adapt(values)
    words = K.StringLookup(output_mode="multi_hot")
    words.adapt(["red", "green", "blue"])
    x, text = K.Input((4,)), K.Input((1,), dtype="string")
    y = K.Concatenate()([scaling(x), tf.cast(bins(x), tf.float32), words(text)])
    model = randomised(tf_keras.Model([x, text], B()(K.Dense(3)(y))), rng)
    scaling.adapt(values)
    assert bins.bin_boundaries
    inputs = [tf.constant(values[:3]), tf.constant([["red"], ["blue"], ["pink"]])]
    check_rewrite(model, inputs, mode)


@pytest.mark.parametrize("mode", MODES)
def test_states_are_copied_and_left_alone(mode, rng):
    x = K.Input((5, 4), batch_size=2)
    model = tf_keras.Model(x, K.GRU(3, stateful=True)(B()(K.Activation("tanh")(x))))
    randomised(model, rng)
    model(data(rng, 5, 4))
    before = model.layers[-1].states[0].numpy()
    assert mbn.verify(model, mbn.convert(model, mode)).ok
    np.testing.assert_array_equal(model.layers[-1].states[0], before)


def test_dtype_of_a_deferred_sequential(rng):
    model = tf_keras.Sequential([K.Dense(3, dtype="float64"), B(dtype="float64")])
    inputs = data(rng, 4, dtype=tf.float64)
    model(inputs)
    randomised(model, rng)
    check_rewrite(model, inputs, "fold")
    assert mbn.convert(model, "fold").inputs[0].dtype == tf.float64


# ------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("mode", MODES)
def test_norm_that_is_given_a_mask(mode, rng):
    x, keep = K.Input((5, 4)), K.Input((5,), dtype="bool")
    y = B()(K.Conv1D(4, 1)(x), mask=keep)
    model = randomised(tf_keras.Model([x, keep], K.LSTM(3)(y)), rng)
    mask = tf.constant([[True] * 3 + [False] * 2, [True] * 5])
    check_rewrite(model, [data(rng, 5, 4), mask], mode)


@pytest.mark.parametrize("mode", MODES)
def test_shared_norm_with_a_mask_in_one_call(mode, rng):
    shared, x = B(), K.Input((5, 4))
    masked, plain = shared(K.Masking()(x)), shared(K.ReLU()(x))
    late = K.Dense(4)(K.ReLU()(K.ReLU()(K.ReLU()(plain))))
    model = randomised(tf_keras.Model(x, [K.LSTM(3)(masked), K.LSTM(3)(late)]), rng)
    sequence = data(rng, 5, 4).numpy()
    sequence[0, 3:] = 0.0
    check_rewrite(model, tf.constant(sequence), mode)


# ------------------------------------------------------------------- holders, held and visible


class Holder(K.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.inner = tf_keras.Sequential([K.Dense(4), B()])

    def call(self, x, training=None):
        return self.inner(x, training=training)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wrapped", [True, False], ids=["time_distributed", "custom"])
def test_holder_called_in_training_is_left_alone(wrapped, mode, rng):
    x = K.Input((5, 4))
    inner = tf_keras.Sequential([K.Input((4,)), K.Dense(4), B()])
    layer = K.TimeDistributed(inner) if wrapped else Holder()
    model = randomised(tf_keras.Model(x, K.Dense(3)(layer(x, training=True))), rng)
    (decision,) = mbn.plan(model, mode).decisions
    assert "training=True" in decision.reason


class Borrower(K.Layer):
    """Calls a layer that it was given; its configuration holds the layer itself."""

    def __init__(self, layer=None, **kwargs):
        super().__init__(**kwargs)
        self.layer = layer

    def call(self, x):
        return self.layer(x)

    def get_config(self):
        return {**super().get_config(), "layer": self.layer}


@pytest.mark.parametrize("mode", MODES)
def test_layer_whose_copy_would_share_is_copied_by_its_attributes(mode, rng):
    x = K.Input((4,))
    model = randomised(tf_keras.Model(x, K.Dense(3)(Borrower(Two())(x))), rng)
    new = mbn.convert(model, mode)
    assert mbn.verify(model, new).ok
    assert len(norms(model)) == 2
    assert not {id(v) for v in model.variables} & {id(v) for v in new.variables}


@pytest.mark.parametrize("held_first", [True, False])
def test_norm_that_is_called_in_sight_and_held_out_of_sight(held_first):
    shared, x = B(name="shared"), K.Input((4,))
    first, second = (Borrower(shared), shared) if held_first else (shared, Borrower(shared))
    model = tf_keras.Model(x, K.Dense(3)(second(K.Dense(4)(K.ReLU()(first(K.Dense(4)(x)))))))
    (decision,) = mbn.plan(model, "fold").decisions
    assert decision.action == "folded"
    assert mbn.verify(model, mbn.convert(model, "fold")).ok


class OwnCall(tf_keras.Model):
    def call(self, x, training=None, mask=None):
        return super().call(x, training=training, mask=mask) + 1.0


@pytest.mark.parametrize("mode", MODES)
def test_functional_model_with_a_call_of_its_own(mode, rng):
    x = K.Input((4,))
    inner = OwnCall(x, B()(K.Dense(3)(x)))
    outer = tf_keras.Model(x, K.Dense(2)(inner(x)))
    (decision,) = mbn.plan(outer, mode).decisions
    assert decision.action == "kept"
    assert "cannot be exchanged" in decision.reason


class InModule(K.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.module = tf.Module()
        self.module.norm = B()

    def call(self, x):
        return self.module.norm(x)


def test_norm_inside_a_module_is_accounted_for():
    x = K.Input((4,))
    model = tf_keras.Model(x, K.Dense(2)(InModule()(x)))
    (decision,) = mbn.plan(model, "fold").decisions
    assert decision.action == "kept"


class Named(tf_keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.norm = B()

    def call(self, x):
        return self.norm(x)


def test_name_of_a_subclassed_model_survives(rng):
    model = Named(name="mine")
    model(data(rng, 4))
    assert mbn.convert(model, "depthwise").name == "mine"


def test_subclassed_model_that_was_built_but_not_called():
    model = Named()
    model.build((None, 4))
    with pytest.raises(mbn.RewriteError, match="Call it once on data"):
        mbn.convert(model, "depthwise")
    with pytest.raises(mbn.RewriteError, match="no inputs can be made up"):
        mbn.verify(model, model)


class Traced(Named):
    @tf.function
    def call(self, x):
        return self.norm(x)


def test_traced_model_is_refused(rng):
    model = Traced()
    model(data(rng, 4))
    with pytest.raises(mbn.RewriteError, match=r"is a tf\.function"):
        mbn.convert(model, "depthwise")


def test_exchanged_call_method_is_refused(rng):
    x = K.Input((4,))
    dense = K.Dense(3)
    dense.call = lambda inputs: tf.zeros_like(inputs)
    model = tf_keras.Model(x, B()(dense(x)))
    with pytest.raises(mbn.RewriteError, match="exchanged on the object"):
        mbn.convert(model, "fold")


# ------------------------------------------------------------------------- layouts and shapes


@pytest.mark.parametrize("axis", [1, 2])
def test_channels_first_convolution_with_more_batch_axes(axis, rng):
    x = K.Input((3, 4, 6))
    conv = K.Conv1D(3 if axis == 1 else 5, 1, data_format="channels_first")
    model = randomised(tf_keras.Model(x, K.ReLU()(B(axis=axis)(conv(x)))), rng)
    check_rewrite(model, data(rng, 3, 4, 6), "fold", compiled=True)
    assert mbn.plan(model, "fold").left == (1 if axis == 1 else 0)


@pytest.mark.parametrize("bias_axes", [None, "d"])
@pytest.mark.parametrize("where", ["before", "after"])
def test_einsum_dense_with_channels_that_are_not_last(where, bias_axes, rng):
    x = K.Input((5, 4))
    einsum = K.EinsumDense("abc,bd->adc", (2, 4), bias_axes=bias_axes)
    y = einsum(B(axis=1)(K.ReLU()(x))) if where == "before" else B(axis=1)(einsum(x))
    model = randomised(tf_keras.Model(x, K.ReLU()(y)), rng)
    check_rewrite(model, data(rng, 5, 4), "fold")


def test_einsum_dense_with_the_letter_that_stands_for_the_ellipsis(rng):
    x = K.Input((5, 4))
    model = tf_keras.Model(x, K.ReLU()(B()(K.EinsumDense("...C,Cd->...d", 3)(x))))
    randomised(model, rng)
    check_rewrite(model, data(rng, 5, 4), "fold")
    assert mbn.plan(model, "fold").left == 0


@pytest.mark.parametrize("target", [(1,), (1, 1)])
def test_reshape_of_a_tensor_without_axes(target, rng):
    x = K.Input(())
    model = randomised(tf_keras.Model(x, B()(K.Reshape(target)(x))), rng)
    check_rewrite(model, data(rng), "fold")


def test_map_does_not_leave_the_dtype_it_is_computed_in(rng):
    x = K.Input((8, 8, 3))
    y = K.Activation("linear", dtype="float32")(K.Conv2D(4, 1, dtype="mixed_float16")(x))
    norm = B(dtype="float32")
    model = randomised(tf_keras.Model(x, K.ReLU()(norm(y))), rng)
    norm.gamma.assign([1e4] * 4)
    check_rewrite(model, data(rng, 8, 8, 3), "fold")
    (decision,) = mbn.plan(model, "fold").decisions
    assert "turns float16 into float32" in decision.reason


def test_huge_weights_keep_the_norm(rng):
    model = tf_keras.Sequential([K.Input((4, 4, 2)), K.Conv2D(3, 1), B()])
    conv, norm = model.layers
    conv.kernel.assign(np.full(conv.kernel.shape, 1e38))
    norm.moving_variance.assign([0, 1e-36, 1])
    (decision,) = mbn.plan(model, "fold").decisions
    assert "more than float32 can hold" in decision.reason
    assert len(norms(mbn.convert(model, "fold"))) == 1


# ------------------------------------------------------------------------------------ verify


def test_verify_draws_pixels_for_models_that_rescale():
    x = K.Input((8, 8, 3))
    model = tf_keras.Model(x, K.Conv2D(2, 3)(K.Rescaling(1 / 255)(x)))
    wrong = mbn.convert(model, "fold")
    kernel, bias = wrong.layers[-1].get_weights()
    wrong.layers[-1].set_weights([-kernel, bias])
    assert not mbn.verify(model, wrong).ok


def test_verify_reads_all_rows_of_an_embedding():
    x = K.Input((9,), dtype="int32")
    model = tf_keras.Model(x, K.Embedding(5, 3)(x))
    wrong = mbn.convert(model, "fold")
    table = wrong.layers[-1].get_weights()[0]
    table[2:] += 1.0
    wrong.layers[-1].set_weights([table])
    assert not mbn.verify(model, wrong).ok


def test_outputs_of_a_shape_without_values_are_no_proof(rng):
    model = randomised(tf_keras.Sequential([K.Input((4,)), K.Dense(3), B()]), rng)
    comparison = mbn.verify(model, mbn.convert(model, "fold"), np.zeros((0, 4), np.float32))
    assert not comparison.ok
    assert "not one value" in str(comparison)


def test_complex_outputs_are_compared_whole():
    x = K.Input((4,))
    real = tf_keras.Model(x, K.Lambda(lambda t: tf.complex(t, t))(x))
    other = tf_keras.Model(x, K.Lambda(lambda t: tf.complex(t, 2 * t))(x))
    assert mbn.verify(real, real).ok
    assert not mbn.verify(real, other).ok


def test_ragged_outputs_are_compared():
    x = K.Input((4,))
    model = tf_keras.Model(x, K.Lambda(lambda t: tf.RaggedTensor.from_tensor(t))(x))
    assert mbn.verify(model, model).ok
    assert outputs(model, tf.ones((2, 4)))[0].size == 8

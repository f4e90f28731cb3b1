"""The tf_keras front end: kinds of models, kinds of calls, and what must survive."""

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from tf_keras.src.layers.normalization import batch_normalization_v1

import mbn_rewrite as mbn
from mbn_rewrite.plans import Remap
from tests.support.checks import check_rewrite, norms, outputs
from tests.support.random_models import K, randomise

pytestmark = pytest.mark.slow

MODES = ("fold", "depthwise")


@pytest.fixture
def rng():
    return np.random.default_rng(3)


def data(rng, *shape):
    return tf.constant(rng.standard_normal((2, *shape)), tf.float32)


def conv_norm(x, channels=4, name=None):
    x = K.Conv2D(channels, 3, padding="same", use_bias=False)(x)
    return K.BatchNormalization(name=name)(x)


def small_model(shape=(8, 8, 3), **kwargs):
    x = K.Input(shape)
    y = K.ReLU()(conv_norm(x))
    return tf_keras.Model(x, K.Dense(2)(K.GlobalAveragePooling2D()(y)), **kwargs)


def reason(model, mode="fold"):
    """The reason of the one BatchNormalization that is kept."""
    (kept,) = [d for d in mbn.plan(model, mode).decisions if d.action == "kept"]
    return kept.reason


# --------------------------------------------------------------------------- kinds of models


@pytest.mark.parametrize("mode", MODES)
def test_sequential_stays_sequential(mode, rng):
    model = tf_keras.Sequential(
        [K.Input((8, 8, 3)), K.Conv2D(4, 3), K.BatchNormalization(), K.ReLU(), K.Flatten(),
         K.Dense(3), K.BatchNormalization()],
        name="net",
    )  # fmt: skip
    randomise(model, rng)
    check_rewrite(model, data(rng, 8, 8, 3), mode)
    new = mbn.convert(model, mode)
    assert type(new) is tf_keras.Sequential
    assert new.name == "net"
    assert mbn.plan(model, mode).left == 0


@pytest.mark.parametrize("mode", MODES)
def test_sequential_that_was_built_by_a_call(mode, rng):
    model = tf_keras.Sequential([K.Conv2D(4, 3), K.BatchNormalization(), K.ReLU()])
    model(data(rng, 8, 8, 3))
    randomise(model, rng)
    check_rewrite(model, data(rng, 8, 8, 3), mode)
    new = mbn.convert(model, mode)
    assert outputs(new, data(rng, 6, 6, 3))[0].shape == (2, 4, 4, 4)  # other sizes as before


@pytest.mark.parametrize("mode", MODES)
def test_nested_models(mode, rng):
    inner = tf_keras.Sequential(
        [K.Input((8, 8, 3)), K.Conv2D(4, 3), K.BatchNormalization(name="bn")], name="stem"
    )
    middle_input = K.Input((6, 6, 4))
    middle = tf_keras.Model(middle_input, conv_norm(K.ReLU()(middle_input)), name="block")
    x = K.Input((8, 8, 3))
    model = tf_keras.Model(x, K.ReLU()(K.BatchNormalization(name="last")(middle(inner(x)))))
    randomise(model, rng)
    check_rewrite(model, data(rng, 8, 8, 3), mode)
    plan = mbn.plan(model, mode)
    assert plan.left == 0
    assert [d.name for d in plan.decisions][::2] == ["stem/bn", "last"]
    new = mbn.convert(model, mode)
    assert type(new.get_layer("stem")) is tf_keras.Sequential
    assert new.get_layer("block").name == "block"


@pytest.mark.parametrize("mode", MODES)
def test_nested_model_called_twice(mode, rng):
    inner = tf_keras.Sequential([K.Input((8, 8, 4)), *shared_block()])
    x, y = K.Input((8, 8, 4)), K.Input((8, 8, 4))
    model = tf_keras.Model([x, y], K.Subtract()([inner(x), inner(y)]))
    randomise(model, rng)
    check_rewrite(model, [data(rng, 8, 8, 4), data(rng, 8, 8, 4)], mode)
    assert mbn.plan(model, mode).left == 0
    assert len(mbn.convert(model, mode).layers) == len(model.layers)


def shared_block():
    return [K.Conv2D(4, 3, padding="same"), K.BatchNormalization(), K.ReLU()]


def test_norm_behind_one_of_two_calls_of_a_nested_model_is_kept(rng):
    inner = tf_keras.Sequential([K.Input((8, 8, 4)), K.Conv2D(4, 3, padding="same")], name="net")
    x, y = K.Input((8, 8, 4)), K.Input((8, 8, 4))
    normed = K.ReLU()(K.BatchNormalization()(inner(x)))
    model = tf_keras.Model([x, y], K.Add()([normed, inner(y)]))
    randomise(model, rng)
    check_rewrite(model, [data(rng, 8, 8, 4), data(rng, 8, 8, 4)], "fold")
    assert "it is part of Sequential 'net', which is called several times" in reason(model)


@pytest.mark.parametrize("mode", MODES)
def test_inputs_and_outputs_in_dictionaries(mode, rng):
    left, right = K.Input((8, 8, 3), name="left"), K.Input((8, 8, 3), name="right")
    joined = K.Concatenate()([conv_norm(left), conv_norm(right)])
    model = tf_keras.Model(
        {"right": right, "left": left},
        {"b": K.BatchNormalization(name="b")(K.Conv2D(2, 1)(K.ReLU()(joined))),
         "a": K.ReLU(name="a")(joined)},
    )  # fmt: skip
    randomise(model, rng)
    inputs = {"left": data(rng, 8, 8, 3), "right": data(rng, 8, 8, 3)}
    check_rewrite(model, inputs, mode)
    assert sorted(mbn.convert(model, mode)(inputs)) == ["a", "b"]


@pytest.mark.parametrize("mode", MODES)
def test_mixed_precision_and_half_outputs(mode, rng):
    tf_keras.mixed_precision.set_global_policy("mixed_float16")
    model = small_model()
    randomise(model, rng)
    check_rewrite(model, data(rng, 8, 8, 3), mode)
    new = mbn.convert(model, mode)
    assert new.outputs[0].dtype == tf.float16
    assert all(w.dtype == tf.float32 for w in new.weights)


@pytest.mark.parametrize("mode", MODES)
def test_bfloat16(mode, rng):
    tf_keras.mixed_precision.set_global_policy("mixed_bfloat16")
    model = small_model()
    randomise(model, rng)
    check_rewrite(model, data(rng, 8, 8, 3), mode)


def test_pure_float16_kernel_that_would_overflow_is_kept(rng):
    tf_keras.backend.clear_session()
    tf_keras.mixed_precision.set_global_policy("float16")
    model = tf_keras.Sequential(
        [K.Input((4,), dtype="float16"), K.Dense(3), K.BatchNormalization(epsilon=1e-3)]
    )
    model.layers[0].kernel.assign(np.full((4, 3), 3000.0, np.float16))
    model.layers[1].gamma.assign([1.0, 40.0, 1.0])
    check_rewrite(model, tf.zeros((2, 4), tf.float16), "fold")
    assert "more than float16 can hold" in reason(model)


def test_norm_that_changes_the_dtype_is_kept_or_replaced_in_its_dtype(rng):
    tf_keras.mixed_precision.set_global_policy("mixed_float16")
    x = K.Input((8, 8, 3))
    y = K.BatchNormalization(dtype="float32")(K.Conv2D(4, 3)(x))
    model = tf_keras.Model(x, y)
    randomise(model, rng)
    check_rewrite(model, data(rng, 8, 8, 3), "fold")
    check_rewrite(model, data(rng, 8, 8, 3), "depthwise")
    assert "float16 into float32" in reason(model)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(6,), (6, 4), (6, 6, 4), (4, 4, 4, 3)], ids=len)
def test_all_ranks(shape, mode, rng):
    x = K.Input(shape)
    model = tf_keras.Model(x, K.ReLU()(K.BatchNormalization()(K.Dense(5)(x))))
    randomise(model, rng)
    check_rewrite(model, data(rng, *shape), mode)
    assert mbn.plan(model, mode).left == 0


def test_depthwise_uses_stock_layers_where_there_are_some(rng):
    kinds = {}
    for shape, axis in (((6,), -1), ((6, 4), -1), ((6, 6, 4), -1), ((4, 6, 6), 1)):
        x = K.Input(shape)
        new = mbn.convert(tf_keras.Model(x, K.BatchNormalization(axis, name="bn")(x)), "depthwise")
        layer = new.get_layer("bn")
        kinds[len(shape), axis] = (type(layer).__name__, getattr(layer, "data_format", None))
    assert kinds == {
        (1, -1): ("ScaleAndShift", None),
        (2, -1): ("DepthwiseConv1D", "channels_last"),
        (3, -1): ("DepthwiseConv2D", "channels_last"),
        (3, 1): ("DepthwiseConv2D", "channels_first"),
    }


def test_model_without_norm_is_copied_whole(rng):
    x = K.Input((4,))
    model = tf_keras.Model(x, K.Dense(3, activation="relu", kernel_regularizer="l2")(x))
    plan, new = mbn.plan(model, "fold"), mbn.convert(model, "fold")
    assert "nothing to do" in str(plan)
    assert plan.decisions == ()
    assert new is not model
    assert new.get_config() == model.get_config()
    for old, now in zip(model.get_weights(), new.get_weights(), strict=True):
        np.testing.assert_array_equal(old, now)


# ---------------------------------------------------------------------------- kinds of calls


@pytest.mark.parametrize("mode", MODES)
def test_layer_called_several_times(mode, rng):
    conv, norm = K.Conv2D(3, 3, padding="same"), K.BatchNormalization()
    x = K.Input((8, 8, 3))
    y = K.ReLU()(norm(conv(x)))
    model = tf_keras.Model(x, K.ReLU()(norm(conv(y))))
    randomise(model, rng)
    check_rewrite(model, data(rng, 8, 8, 3), mode)
    assert mbn.plan(model, mode).left == 0


def test_shared_convolution_before_different_norms(rng):
    """Where it stays shared, it does the map of one, and the other makes up for that."""
    conv = K.Conv2D(3, 3, padding="same", name="conv")
    x = K.Input((8, 8, 3))
    y = K.ReLU()(K.BatchNormalization()(conv(x)))
    model = tf_keras.Model(x, K.ReLU()(K.BatchNormalization()(conv(y))))
    randomise(model, rng)
    check_rewrite(model, data(rng, 8, 8, 3), "fold")
    plan = mbn.plan(model, "fold", keep_shared=True)
    assert [d.action for d in plan.decisions] == ["folded", "kept"]
    assert set(plan.of(Remap)) == {plan.decisions[1].name}


def test_shared_norm_behind_different_convolutions(rng):
    norm, x = K.BatchNormalization(), K.Input((8, 8, 3))
    branches = [K.ReLU()(norm(K.Conv2D(4, 3)(x))) for _ in range(2)]
    model = tf_keras.Model(x, K.Add()(branches))
    randomise(model, rng)
    check_rewrite(model, data(rng, 8, 8, 3), "fold")
    (decision,) = mbn.plan(model, "fold").decisions
    assert decision.action == "folded"
    assert len(decision.into) == 2


def test_norm_that_reads_its_own_output(rng):
    norm, x = K.BatchNormalization(), K.Input((8, 8, 3))
    model = tf_keras.Model(x, K.ReLU()(norm(norm(K.Conv2D(4, 3)(x)))))
    randomise(model, rng)
    check_rewrite(model, data(rng, 8, 8, 3), "fold")
    check_rewrite(model, data(rng, 8, 8, 3), "depthwise")
    assert mbn.plan(model, "fold").left == 0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("training", [True, "positional"], ids=str)
def test_norm_called_in_training_is_kept(training, mode, rng):
    x = K.Input((8, 8, 3))
    norm, y = K.BatchNormalization(), K.Conv2D(4, 3)(x)
    y = norm(y, True) if training == "positional" else norm(y, training=True)
    model = tf_keras.Model(x, K.ReLU()(y))
    randomise(model, rng)
    check_rewrite(model, data(rng, 8, 8, 3), mode)
    assert "training=True" in reason(model, mode)


def test_norm_called_at_inference_or_frozen_is_folded(rng):
    x = K.Input((8, 8, 3))
    y = K.ReLU()(K.BatchNormalization()(K.Conv2D(4, 3)(x), training=False))
    frozen = K.BatchNormalization(trainable=False)
    model = tf_keras.Model(x, K.ReLU()(frozen(K.Conv2D(4, 3)(y), training=True)))
    randomise(model, rng)
    check_rewrite(model, data(rng, 8, 8, 3), "fold")
    assert mbn.plan(model, "fold").left == 0


@pytest.mark.parametrize("mode", MODES)
def test_nested_model_called_in_training(mode, rng):
    inner = tf_keras.Sequential(
        [K.Input((8, 8, 3)), K.Conv2D(4, 3), K.BatchNormalization(name="bn")], name="net"
    )
    x = K.Input((8, 8, 3))
    model = tf_keras.Model(x, K.ReLU()(inner(x, training=True)))
    randomise(model, rng)
    check_rewrite(model, data(rng, 8, 8, 3), mode)
    assert "training=True" in reason(model, mode)


def test_dropout_that_stays_random_blocks():
    x = K.Input((8, 8, 3))
    y = K.Dropout(0.5)(K.Conv2D(4, 3)(x), training=True)
    model = tf_keras.Model(x, K.ReLU()(K.BatchNormalization()(y)))
    randomise(model, np.random.default_rng(0))
    assert "Dropout 'dropout' is random" in reason(model)


def test_training_decided_at_run_time_is_kept():
    x, training = K.Input((4,)), K.Input((), dtype="bool", batch_size=1)
    y = K.BatchNormalization()(K.Dense(3)(x), training=tf.reshape(training, ()))
    model = tf_keras.Model([x, training], y)
    assert "decided when the model is called" in reason(model)


@pytest.mark.parametrize("mode", MODES)
def test_recurrent_layers_with_states_and_masks(mode, rng):
    x, state = K.Input((7, 4)), K.Input((3,))
    y = K.BatchNormalization()(K.Masking(0.0)(x))
    y, last = K.GRU(3, return_sequences=True, return_state=True)(y, initial_state=state)
    model = tf_keras.Model([x, state], [K.LSTM(2)(K.BatchNormalization()(y)), last])
    randomise(model, rng)
    sequence = data(rng, 7, 4).numpy()
    sequence[0, 4:] = 0.0
    check_rewrite(model, [tf.constant(sequence), data(rng, 3)], mode)
    assert mbn.plan(model, mode).left == 0


@pytest.mark.parametrize("mode", MODES)
def test_extra_arguments_survive(mode, rng):
    x = K.Input((7, 4))
    y = K.BatchNormalization()(K.Dense(4)(x))
    z = K.MultiHeadAttention(2, 3)(y, y, use_causal_mask=True)
    z = tf.nn.leaky_relu(z, alpha=0.3) * 2.0
    model = tf_keras.Model(x, tf.reduce_mean(z, axis=1, keepdims=True))
    randomise(model, rng)
    check_rewrite(model, data(rng, 7, 4), mode)


def test_state_input_blocks_a_map(rng):
    x = K.Input((7, 4))
    state = K.BatchNormalization()(K.ReLU()(K.GlobalMaxPooling1D()(x)))
    model = tf_keras.Model(x, K.GRU(4)(x, initial_state=state))
    randomise(model, rng)
    check_rewrite(model, data(rng, 7, 4), "fold")
    assert "reads it as a state" in reason(model)


def test_loss_layers_do_not_count_as_readers(rng):
    x = K.Input((4,))
    y = K.Dense(3)(x)
    model = tf_keras.Model(x, K.ReLU()(K.BatchNormalization()(y)))
    model.add_loss(tf.reduce_mean(y))
    randomise(model, rng)
    check_rewrite(model, data(rng, 4), "fold")
    assert mbn.plan(model, "fold").left == 0


# -------------------------------------------------------------------- what must not be moved


def test_producer_that_is_an_output_blocks(rng):
    x = K.Input((8, 8, 3))
    y = K.Conv2D(4, 3)(x)
    model = tf_keras.Model(x, [K.ReLU()(K.BatchNormalization()(y)), y])
    randomise(model, rng)
    check_rewrite(model, data(rng, 8, 8, 3), "fold")
    assert "also an output of the model" in reason(model)


def test_producer_with_other_readers_blocks(rng):
    x = K.Input((8, 8, 3))
    y = K.Conv2D(4, 3, name="conv")(x)
    model = tf_keras.Model(x, K.Add()([K.ReLU()(K.BatchNormalization()(y)), y]))
    randomise(model, rng)
    check_rewrite(model, data(rng, 8, 8, 3), "fold")
    assert "Add 'add' joins it with values that do not have its scale" in reason(model)


def test_norm_that_is_an_output_keeps_its_name_and_place(rng):
    x = K.Input((8, 8, 3))
    first = conv_norm(x, name="first")
    model = tf_keras.Model(x, [conv_norm(K.ReLU()(first), name="second"), first])
    randomise(model, rng)
    check_rewrite(model, data(rng, 8, 8, 3), "fold")
    assert mbn.plan(model, "fold").left == 0
    assert mbn.convert(model, "fold").output_names == ["second", "first"]


def test_norm_moved_into_another_that_stays(rng):
    x = K.Input((8, 8, 3))
    y = K.Conv2D(4, 3)(x)
    z = K.BatchNormalization(scale=False, center=False, name="stays")(y)
    z = K.BatchNormalization(name="goes")(z)
    model = tf_keras.Model(x, K.Add()([K.ReLU()(z), y]))
    randomise(model, rng)
    check_rewrite(model, data(rng, 8, 8, 3), "fold")
    decisions = {d.name: (d.action, d.into) for d in mbn.plan(model, "fold").decisions}
    # The first moves forward into the second, which then has to stay.
    assert decisions == {"stays": ("folded", ("goes",)), "goes": ("kept", ())}


@pytest.mark.parametrize("mode", MODES)
def test_a_norm_over_several_axes_is_kept(mode):
    x = K.Input((8, 8, 3))
    y = K.BatchNormalization(axis=[1, 3])(K.Conv2D(4, 3)(x))
    model = tf_keras.Model(x, K.ReLU()(y))
    assert "several axes" in reason(model, mode)
    assert len(norms(mbn.convert(model, mode))) == 1


FirstVersion = batch_normalization_v1.BatchNormalization
TRAINS_OTHERWISE = {
    "renorm": (K.BatchNormalization, {"renorm": True}, "renormalisation"),
    "renorm_v1": (
        FirstVersion,
        {"renorm": True, "renorm_clipping": {"rmax": 3.0}},
        "renormalisation",
    ),
    "virtual_batch": (K.BatchNormalization, {"virtual_batch_size": 2}, "virtual batches"),
    "virtual_batch_first": (FirstVersion, {"virtual_batch_size": 2, "axis": 1}, "virtual batches"),
}


@pytest.mark.parametrize("mode", [*MODES, "strided"])
@pytest.mark.parametrize("name", TRAINS_OTHERWISE)
def test_what_trains_otherwise_is_a_scale_and_a_shift_at_inference(name, mode, rng):
    kind, options, why = TRAINS_OTHERWISE[name]
    x = K.Input((8, 8, 3), batch_size=4)
    model = tf_keras.Model(x, K.ReLU()(kind(**options)(K.Conv2D(6, 3)(x))))
    for layer in model.layers:
        layer.set_weights([rng.uniform(0.5, 1.5, w.shape) for w in layer.get_weights()])
    new, plan = mbn.convert_with_plan(model, mode)
    assert plan.verification.ok
    (decision,) = plan.decisions
    # On the CPU's own layout, a map of rows is no map of the convolution's channels.
    stays = mode == "strided" or (mode == "fold" and options.get("axis") == 1)
    assert plan.left == stays
    assert (why in decision.reason) == (mode == "strided")
    assert len(norms(new)) == stays


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("weight", ["gamma", "beta", "moving_mean", "moving_variance"])
def test_weights_that_are_not_finite_keep_the_norm(weight, value, mode):
    model = small_model()
    (norm,) = norms(model)
    getattr(norm, weight).assign([1.0, value, 1.0, 1.0])
    assert "hold NaN or infinity" in reason(model, mode)
    assert len(norms(mbn.convert(model, mode, check=False))) == 1


def test_variance_that_gives_no_finite_scale_keeps_the_norm():
    x = K.Input((8, 8, 3))
    y = K.BatchNormalization(epsilon=0.0)(K.Conv2D(4, 3)(x))
    model = tf_keras.Model(x, K.ReLU()(y))
    norms(model)[0].moving_variance.assign([1.0, 0.0, 1.0, 1.0])
    assert "give no finite scale" in reason(model)


class OtherNorm(K.BatchNormalization):
    def call(self, inputs, training=None):
        return super().call(inputs, training=training) ** 2


@pytest.mark.parametrize("mode", MODES)
def test_subclass_of_batch_normalization_is_kept(mode, rng):
    x = K.Input((8, 8, 3))
    model = tf_keras.Model(x, K.ReLU()(OtherNorm()(K.Conv2D(4, 3)(x))))
    randomise(model, rng)
    check_rewrite(model, data(rng, 8, 8, 3), mode)
    assert "OtherNorm is a class of its own" in reason(model, mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("variance", [0.0, 1e-36, 1e-12])
@pytest.mark.parametrize("epsilon", [1e-3, 1e-6])
def test_vanishing_variances(epsilon, variance, mode, rng):
    x = K.Input((8, 8, 3))
    y = K.BatchNormalization(epsilon=epsilon)(K.Conv2D(4, 3)(x))
    model = tf_keras.Model(x, K.ReLU()(y))
    randomise(model, rng)
    (norm,) = norms(model)
    norm.moving_variance.assign([variance] * 4)
    check_rewrite(model, data(rng, 8, 8, 3), mode)
    assert mbn.plan(model, mode).left == 0


# ------------------------------------------------------------- layers that cannot be seen into


@tf_keras.utils.register_keras_serializable("tests")
class Block(K.Layer):
    """Holds its layers in an attribute, a list and a dictionary."""

    def __init__(self, channels, **kwargs):
        super().__init__(**kwargs)
        self.channels = channels
        self.conv = K.Conv2D(channels, 3, padding="same")
        self.norm = K.BatchNormalization(name="norm")
        self.more = [K.Conv2D(channels, 1), K.BatchNormalization(name="listed")]
        self.named = {"last": K.BatchNormalization(name="named")}

    def call(self, x):
        x = self.norm(self.conv(x))
        for layer in self.more:
            x = layer(x)
        return self.named["last"](tf.nn.relu(x))

    def get_config(self):
        return {**super().get_config(), "channels": self.channels}


class Unregistered(Block):
    pass


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("block", [Block, Unregistered])
def test_custom_layer_that_holds_norms(block, mode, rng):
    x = K.Input((8, 8, 3))
    model = tf_keras.Model(x, K.ReLU()(conv_norm(block(4, name="block")(x), name="outer")))
    randomise(model, rng)
    check_rewrite(model, data(rng, 8, 8, 3), mode)
    plan = mbn.plan(model, mode)
    assert plan.left == (1 if mode == "fold" else 0)
    assert [d.name for d in plan.decisions] == [
        "block/norm", "block/listed", "block/named", "outer"
    ]  # fmt: skip
    assert "is an activation" in plan.decisions[2].reason or mode == "depthwise"


def test_rewritten_custom_layer_can_be_saved(rng, tmp_path):
    x = K.Input((8, 8, 3))
    model = tf_keras.Model(x, Block(4)(x))
    randomise(model, rng)
    new = mbn.convert(model, "depthwise")
    new.save(tmp_path / "saved", save_format="tf")
    loaded = tf.saved_model.load(str(tmp_path / "saved"))
    inputs = data(rng, 8, 8, 3)
    (result,) = loaded.signatures["serving_default"](inputs).values()
    np.testing.assert_allclose(result, outputs(model, inputs)[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("mode", MODES)
def test_model_under_time_distributed(mode, rng):
    inner = small_model(name="frames")
    x = K.Input((5, 8, 8, 3))
    model = tf_keras.Model(x, K.GlobalMaxPooling1D()(K.TimeDistributed(inner)(x)))
    randomise(model, rng)
    check_rewrite(model, data(rng, 5, 8, 8, 3), mode)
    assert mbn.plan(model, mode).left == 0


@pytest.mark.parametrize("mode", MODES)
def test_norm_under_time_distributed(mode, rng):
    x = K.Input((5, 8, 8, 3))
    y = K.TimeDistributed(K.BatchNormalization())(K.TimeDistributed(K.Conv2D(4, 3))(x))
    model = tf_keras.Model(x, y)
    randomise(model, rng)
    check_rewrite(model, data(rng, 5, 8, 8, 3), mode)
    assert mbn.plan(model, mode).left == 0


class Subclassed(tf_keras.Model):
    def __init__(self, channels=4, **kwargs):
        super().__init__(**kwargs)
        self.channels = channels
        self.backbone = small_backbone(channels)
        self.conv = K.Conv2D(channels, 3)
        self.norm = K.BatchNormalization(name="own")

    def call(self, x, training=False):
        return tf.nn.relu(self.norm(self.conv(self.backbone(x)), training=training))

    def get_config(self):
        return {"channels": self.channels, "name": self.name}


def small_backbone(channels):
    x = K.Input((8, 8, 3))
    return tf_keras.Model(x, K.ReLU()(conv_norm(x, channels, name="bn")), name="backbone")


@pytest.mark.parametrize("mode", MODES)
def test_subclassed_model(mode, rng):
    model = Subclassed()
    inputs = data(rng, 8, 8, 3)
    model(inputs)
    randomise(model, rng)
    expected = outputs(model, inputs)
    plan, new = mbn.plan(model, mode), mbn.convert(model, mode)
    assert {d.name: d.action for d in plan.decisions} == {
        "backbone/bn": "folded" if mode == "fold" else "depthwise",
        "own": "folded" if mode == "fold" else "depthwise",
    }
    assert type(new) is Subclassed
    assert len(norms(new)) == plan.left
    np.testing.assert_allclose(outputs(new, inputs)[0], expected[0], rtol=1e-4, atol=1e-5)
    assert mbn.verify(model, new).ok
    assert len(norms(model)) == 2


class NotCopyable(tf_keras.Model):
    """Keras cannot make another one, so that a copy is made by its attributes."""

    def __init__(self, layers_to_use):
        super().__init__()
        self.stack = layers_to_use

    def call(self, x):
        for layer in self.stack:
            x = layer(x)
        return x

    def get_config(self):
        raise NotImplementedError


@pytest.mark.parametrize("mode", MODES)
def test_subclassed_model_without_configuration(mode, rng):
    model = NotCopyable([K.Dense(3), K.BatchNormalization()])
    inputs = data(rng, 4)
    model(inputs)
    randomise(model, rng)
    new = mbn.convert(model, mode)
    np.testing.assert_allclose(outputs(new, inputs)[0], outputs(model, inputs)[0], atol=1e-5)
    assert type(new) is NotCopyable
    assert norms(new) == []
    assert not {id(v) for v in model.variables} & {id(v) for v in new.variables}
    assert [type(layer) for layer in model.stack] == [K.Dense, K.BatchNormalization]


class NoConfig(K.Layer):
    def __init__(self, helper):
        super().__init__()
        self.helper = helper

    def call(self, x):
        return x * 2.0


def test_custom_layer_without_configuration(rng):
    x = K.Input((4,))
    model = tf_keras.Model(x, K.BatchNormalization()(NoConfig(object())(x)))
    new = mbn.convert(model, "depthwise")
    assert mbn.verify(model, new).ok
    old, copied = model.layers[1], new.layers[1]
    assert copied is not old
    assert copied.helper is old.helper


@pytest.mark.parametrize("mode", MODES)
def test_lambda_layers_in_memory(mode, rng):
    factor = 3.0
    x = K.Input((8, 8, 3))
    model = tf_keras.Model(x, K.Lambda(lambda t: t * factor)(conv_norm(x)))
    randomise(model, rng)
    check_rewrite(model, data(rng, 8, 8, 3), mode)


def test_adapted_normalization_keeps_its_statistics(rng):
    scaling = K.Normalization()
    scaling.adapt(rng.normal(5, 3, (100, 4)).astype("float32"))
    model = tf_keras.Sequential([K.Input((4,)), scaling, K.Dense(3), K.BatchNormalization()])
    check_rewrite(model, data(rng, 4), "fold")


# -------------------------------------------------------------------------- what must survive


def test_untouched_weights_are_equal_bit_for_bit(rng):
    model = small_model()
    randomise(model, rng)
    new = mbn.convert(model, "fold")
    old_dense, dense = model.layers[-1], new.layers[-1]
    for old, now in zip(old_dense.get_weights(), dense.get_weights(), strict=True):
        np.testing.assert_array_equal(old, now)


def test_training_the_copy_leaves_the_original_alone(rng):
    model = small_model()
    randomise(model, rng)
    before = model.get_weights()
    new = mbn.convert(model, "depthwise")
    new.compile("sgd", "mse")
    new.fit(data(rng, 8, 8, 3), tf.ones((2, 2)), verbose=0)
    for old, now in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, now)
    assert not np.array_equal(new.layers[-1].kernel, model.layers[-1].kernel)


def test_names_flags_and_configuration_survive(rng):
    x = K.Input((8, 8, 3), name="picture")
    y = K.Conv2D(4, 3, name="conv", kernel_regularizer="l2", kernel_constraint="non_neg")(x)
    y = K.BatchNormalization(name="bn")(y)
    y = K.Dense(2, name="kept_as_it_is", kernel_regularizer="l2", trainable=False)(K.ReLU()(y))
    model = tf_keras.Model(x, y, name="net")
    model.trainable = True
    model.get_layer("kept_as_it_is").trainable = False
    randomise(model, rng)
    new = mbn.convert(model, "fold")
    assert new.name == "net"
    assert [layer.name for layer in new.layers] == ["picture", "conv", "re_lu", "kept_as_it_is"]
    # What was meant for the old kernel must not act on the folded one.
    assert new.get_layer("conv").kernel_regularizer is None
    assert new.get_layer("conv").kernel_constraint is None
    assert new.get_layer("kept_as_it_is").kernel_regularizer is not None
    assert not new.get_layer("kept_as_it_is").trainable


def test_frozen_model_stays_frozen(rng):
    model = small_model()
    model.trainable = False
    new = mbn.convert(model, "fold")
    assert not new.trainable
    assert new.trainable_weights == []


def test_class_of_a_functional_subclass_survives():
    class WithOwnTraining(tf_keras.Model):
        def train_step(self, batch):
            return super().train_step(batch)

    x = K.Input((8, 8, 3))
    model = WithOwnTraining(x, K.ReLU()(conv_norm(x)))
    assert type(mbn.convert(model, "fold")) is type(model)


def test_planning_the_same_model_twice_gives_the_same_plan(rng):
    model = small_model()
    randomise(model, rng)
    assert mbn.plan(model, "fold").to_json() == mbn.plan(model, "fold").to_json()
    norms(model)[0].gamma.assign([2.0] * 4)
    edited = mbn.plan(model, "fold").to_dict()
    assert edited["decisions"][0]["action"] == "folded"
    assert edited["edits"][0]["layer"] == "conv2d"

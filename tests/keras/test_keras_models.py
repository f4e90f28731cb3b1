"""The Keras 3 front end: kinds of models, kinds of calls, and what must survive.

What both Kerases share is tested in test_tf_keras_models.py and test_hard_cases.py; here is
what Keras 3 does in a way of its own.
"""

import inspect
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import ops

import mbn_rewrite as mbn
from mbn_rewrite.errors import UnverifiedWarning
from mbn_rewrite.frontends.keras3.inference_layers import ScaleAndShift
from tests.support import kerases
from tests.support.checks import check_rewrite, outputs
from tests.support.kerases import norms
from tests.support.random_models import randomise

K = keras.layers
B = K.BatchNormalization
MODES = ("fold", "depthwise")


@pytest.fixture(autouse=True)
def _keras_3(_fresh_keras):
    kerases.use("keras")
    yield
    kerases.use("tf_keras")


@pytest.fixture
def rng():
    return np.random.default_rng(5)


def data(rng, *shape):
    return rng.standard_normal((2, *shape)).astype(np.float32)


def masked_data(rng):
    """Sequences of which the first ends early; to be masked where all features are 0."""
    sequences = data(rng, 7, 4)
    sequences[0, 4:] = 0.0
    return sequences


def randomised(model, rng):
    randomise(model, rng)
    return model


def small_model(**kwargs):
    x = keras.Input((8, 8, 3))
    y = K.ReLU()(B()(K.Conv2D(4, 3, padding="same")(x)))
    return keras.Model(x, K.Dense(2)(K.GlobalAveragePooling2D()(y)), **kwargs)


def kinds(model):
    return [type(layer).__name__ for layer in model.layers]


def reason(model, mode="fold"):
    """The reason of the one BatchNormalization that is kept."""
    (kept,) = [d for d in mbn.plan(model, mode).decisions if d.action == "kept"]
    return kept.reason


# --------------------------------------------------------------------------- kinds of models


@pytest.mark.parametrize("mode", MODES)
def test_sequential_stays_sequential(mode, rng):
    model = keras.Sequential(
        [keras.Input((8, 8, 3)), K.Conv2D(4, 3), B(), K.ReLU(), K.Flatten(), K.Dense(3), B()],
        name="net",
    )
    check_rewrite(randomised(model, rng), data(rng, 8, 8, 3), mode)
    new = mbn.convert(model, mode)
    assert type(new) is keras.Sequential
    assert new.name == "net"
    assert new.layers[-1].name == model.layers[-1].name
    assert mbn.plan(model, mode).left == 0


@pytest.mark.parametrize("mode", MODES)
def test_sequential_that_was_built_by_a_call(mode, rng):
    model = keras.Sequential([K.Conv2D(4, 3), B(), K.ReLU()])
    model(data(rng, 8, 8, 3))
    check_rewrite(randomised(model, rng), data(rng, 8, 8, 3), mode)
    assert outputs(mbn.convert(model, mode), data(rng, 6, 6, 3))[0].shape == (2, 4, 4, 4)


class OwnSequential(keras.Sequential):
    pass


class OwnFunctional(keras.Model):
    def train_step(self, *args):
        return super().train_step(*args)


def test_classes_that_are_made_as_stock_ones_survive(rng):
    sequential = OwnSequential([keras.Input((4,)), K.Dense(3), B()])
    x = keras.Input((4,))
    functional = OwnFunctional(x, B()(K.Dense(3)(x)))
    for model in (sequential, functional):
        check_rewrite(randomised(model, rng), data(rng, 4), "fold")
        assert type(mbn.convert(model, "fold")) is type(model)


@pytest.mark.parametrize("mode", MODES)
def test_nested_models(mode, rng):
    inner = keras.Sequential(
        [keras.Input((8, 8, 4)), K.Conv2D(4, 3, padding="same"), B(name="bn"), K.ReLU()],
        name="block",
    )
    x, y = keras.Input((8, 8, 4)), keras.Input((8, 8, 4))
    model = keras.Model([x, y], B(name="last")(K.Subtract()([inner(x), inner(y)])))
    check_rewrite(randomised(model, rng), [data(rng, 8, 8, 4), data(rng, 8, 8, 4)], mode)
    assert {d.name for d in mbn.plan(model, mode).decisions} == {"block/bn", "last"}
    assert type(mbn.convert(model, mode).get_layer("block")) is keras.Sequential


@pytest.mark.parametrize("mode", MODES)
def test_inputs_and_outputs_in_dictionaries(mode, rng):
    left, right = keras.Input((8,), name="left"), keras.Input((8,), name="right")
    joined = K.Concatenate()([B()(K.Dense(3)(left)), B()(K.Dense(3)(right))])
    model = keras.Model(
        {"right": right, "left": left},
        {"b": B(name="b")(K.Dense(2)(K.ReLU()(joined))), "a": K.ReLU(name="a")(joined)},
    )
    inputs = {"left": data(rng, 8), "right": data(rng, 8)}
    check_rewrite(randomised(model, rng), inputs, mode)
    assert sorted(mbn.convert(model, mode)(inputs)) == ["a", "b"]


@pytest.mark.parametrize("mode", MODES)
def test_nested_model_of_a_list_that_is_given_a_dictionary(mode, rng):
    # It finds its inputs by their names, so they come in another order than they are given.
    first, second = keras.Input((4,), name="z"), keras.Input((4,), name="a")
    inner = keras.Model([first, second], K.Subtract()([B()(K.Dense(4)(first)), second]))
    x, y = keras.Input((4,)), keras.Input((4,))
    model = randomised(keras.Model([x, y], inner({"z": x, "a": y})), rng)
    check_rewrite(model, [data(rng, 4), data(rng, 4)], mode)
    assert "cannot be exchanged" in reason(model, mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float16", "bfloat16"])
def test_narrow_dtypes(policy, mode, rng):
    kerases.set_policy(policy)
    model = randomised(small_model(), rng)
    check_rewrite(model, data(rng, 8, 8, 3), mode)
    stored = policy if "_" not in policy else "float32"
    assert {weight.dtype for weight in mbn.convert(model, mode).weights} == {stored}


@pytest.mark.parametrize("mode", MODES)
def test_dtypes_by_layer(mode, rng):
    policies = keras.dtype_policies.DTypePolicyMap()
    policies["narrow"] = keras.dtype_policies.DTypePolicy("mixed_bfloat16")
    x = keras.Input((4,))
    y = K.Dense(3, name="narrow", dtype=policies)(K.Dense(4, name="wide", dtype=policies)(x))
    model = keras.Model(x, B(name="bn", dtype=policies)(y))
    check_rewrite(randomised(model, rng), data(rng, 4), mode)
    dtypes = [layer.compute_dtype for layer in mbn.convert(model, mode).layers]
    assert dtypes == ["float32", "float32", "bfloat16", "float32"]


@pytest.mark.parametrize("mode", MODES)
def test_model_of_a_part_of_another(mode, rng):
    x = keras.Input((8,))
    middle = K.Dense(6)(x)
    whole = keras.Model(x, B()(K.Dense(4)(K.ReLU()(B()(middle)))))
    operations = whole.operations
    part = keras.Model(middle, whole.output)
    check_rewrite(randomised(part, rng), data(rng, 6), mode)
    assert whole.operations == operations


def test_depthwise_uses_stock_layers_where_there_are_some():
    found = {}
    for shape, axis in (((6,), -1), ((6, 4), -1), ((6, 6, 4), -1), ((4, 6, 5), 1)):
        x = keras.Input(shape)
        new = mbn.convert(keras.Model(x, B(axis, name="bn")(x)), "depthwise")
        layer = new.get_layer("bn")
        found[len(shape), axis] = (type(layer).__name__, getattr(layer, "data_format", None))
    assert found == {
        (1, -1): ("ScaleAndShift", None),
        (2, -1): ("DepthwiseConv1D", "channels_last"),
        (3, -1): ("DepthwiseConv2D", "channels_last"),
        (3, 1): ("DepthwiseConv2D", "channels_first"),
    }


def test_scale_and_shift_survives_a_file(rng, tmp_path):
    model = randomised(keras.Sequential([keras.Input((4,)), K.Activation("tanh"), B()]), rng)
    new = mbn.convert(model, "depthwise")
    new.save(tmp_path / "new.keras")
    loaded = keras.models.load_model(tmp_path / "new.keras")
    assert type(loaded.layers[-1]) is ScaleAndShift
    assert mbn.verify(model, loaded).ok


def test_scale_and_shift_needs_to_know_its_channels():
    with pytest.raises(ValueError, match="needs to know how many channels"):
        ScaleAndShift(1).build((None, None))


# ------------------------------------------------------------- operations among the layers


OPERATIONS = {
    "operator_add": lambda x, y: x + y,
    "add": lambda x, y: ops.add(x, y),
    "subtract": lambda x, y: ops.subtract(x, y),
    "concatenate": lambda x, y: ops.concatenate([x, y], axis=-1),
    "stop_gradient": lambda x, y: ops.stop_gradient(x) + y,
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", OPERATIONS)
def test_norm_passes_operations(name, mode, rng):
    x = keras.Input((4,))
    y = OPERATIONS[name](K.Dense(3)(x), K.Dense(3)(x))
    model = randomised(keras.Model(x, ops.tanh(B()(y))), rng)
    check_rewrite(model, data(rng, 4), mode)
    assert mbn.plan(model, mode).left == 0


@pytest.mark.parametrize(
    ("activation", "left"),
    [
        (ops.relu, 0),
        (lambda x: ops.leaky_relu(x, 0.3), 0),
        (keras.activations.relu, 0),
        (lambda x: keras.activations.relu(x, max_value=6.0), 1),
        (lambda x: keras.activations.relu(x, threshold=1.0), 1),
        (ops.relu6, 1),
        (lambda x: x * 2.0, 0),
        (lambda x: x + 1.0, 0),
        (lambda x: ops.concatenate([x, x], axis=-1), 0),
    ],
    ids=range(9),
)
def test_operations_that_scales_pass_or_do_not(activation, left, rng):
    x = keras.Input((4,))
    model = randomised(keras.Model(x, K.Dense(2)(activation(B()(ops.tanh(x))))), rng)
    (norm,) = norms(model)
    norm.gamma.assign(rng.uniform(0.5, 1.5, 4))
    norm.beta.assign(np.zeros(4))
    norm.moving_mean.assign(np.zeros(4))
    check_rewrite(model, data(rng, 4), "fold")
    assert mbn.plan(model, "fold").left == left


def test_calls_of_the_copy_are_not_recorded_on_operations_of_the_original(rng):
    x = keras.Input((4,))
    model = randomised(keras.Model(x, ops.tanh(B()(K.Dense(3)(x)))), rng)
    operations = [operation for operation in model.operations if not isinstance(operation, K.Layer)]
    new = mbn.convert(model, "fold")
    assert [len(operation._inbound_nodes) for operation in operations] == [1]
    assert not set(operations) & set(new.operations)


def test_function_among_the_layers_is_refused():
    x, inner = keras.Input((4,)), keras.Input((4,))
    function = keras.Function(inner, K.Dense(4)(inner), name="f")
    model = keras.Model(x, B()(function(x)))
    with pytest.raises(mbn.RewriteError, match=r"Function 'f' cannot be copied.*keras\.Model"):
        mbn.convert(model, "fold")


# ---------------------------------------------------------------------- masks and training


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "flat"])
def test_masks_flow_on(nested, mode, rng):
    x, inner = keras.Input((7, 4)), keras.Input((7, 4))
    if nested:  # the Keras tensors outside do not show that a mask comes out of it
        y = keras.Model(inner, K.Dense(4)(K.Masking()(inner)))(x)
    else:
        y = K.Dense(4)(K.Masking()(x))
    model = randomised(keras.Model(x, K.LSTM(3)(B()(y))), rng)
    check_rewrite(model, masked_data(rng), mode)
    assert mbn.plan(model, mode).left == 0
    assert ("ScaleAndShift" in kinds(mbn.convert(model, mode))) == (mode == "depthwise")


def test_no_mask_no_scale_and_shift(rng):
    x = keras.Input((7, 4))
    model = keras.Model(x, K.LSTM(3)(B()(K.Add()([K.Dense(4)(x), x]))))
    assert "DepthwiseConv1D" in kinds(mbn.convert(model, "depthwise"))


@pytest.mark.parametrize("mode", MODES)
def test_norm_that_is_given_a_mask(mode, rng):
    x, keep = keras.Input((5, 4)), keras.Input((5,), dtype="bool")
    model = keras.Model([x, keep], K.LSTM(3)(B()(K.Conv1D(4, 1)(x), mask=keep)))
    mask = np.array([[True] * 3 + [False] * 2, [True] * 5])
    check_rewrite(randomised(model, rng), [data(rng, 5, 4), mask], mode)
    if mode == "fold":
        assert "given a mask" in reason(model)


@pytest.mark.parametrize("mode", MODES)
def test_masks_of_a_loaded_model(mode, rng, tmp_path):
    x = keras.Input((7, 4))
    model = keras.Model(x, K.LSTM(3)(B()(K.Dense(4)(K.Masking()(x)))))
    randomised(model, rng).save(tmp_path / "masked.keras")
    check_rewrite(keras.models.load_model(tmp_path / "masked.keras"), masked_data(rng), mode)


@pytest.mark.parametrize("mode", MODES)
def test_recurrent_layers_with_states(mode, rng):
    x, state = keras.Input((7, 4)), keras.Input((3,))
    y = B()(K.Masking()(x))
    y, last = K.GRU(3, return_sequences=True, return_state=True)(y, initial_state=state)
    model = randomised(keras.Model([x, state], [K.LSTM(2)(B()(y)), last]), rng)
    check_rewrite(model, [masked_data(rng), data(rng, 3)], mode)
    assert mbn.plan(model, mode).left == 0


@pytest.mark.parametrize("mode", MODES)
def test_states_are_copied_and_left_alone(mode, rng):
    x = keras.Input((5, 4), batch_size=2)
    model = keras.Model(x, K.GRU(3, stateful=True)(B()(K.Activation("tanh")(x))))
    randomised(model, rng)(data(rng, 5, 4))
    before = model.layers[-1].states[0].numpy()
    assert before.any()
    new = mbn.convert(model, mode)
    assert mbn.verify(model, new).ok
    np.testing.assert_array_equal(model.layers[-1].states[0].numpy(), before)
    np.testing.assert_array_equal(new.layers[-1].states[0].numpy(), before)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "flat"])
def test_norm_called_in_training_is_kept(nested, mode, rng):
    x = keras.Input((4,))
    if nested:
        inner = keras.Sequential([keras.Input((4,)), K.Dense(3), B(), K.Dropout(0.5)])
        y = inner(x, training=True)
    else:
        y = B()(K.Dense(3)(x), training=True)
    model = randomised(keras.Model(x, K.ReLU()(y)), rng)
    check_rewrite(model, data(rng, 4), mode)
    assert "training=True" in reason(model, mode)


def test_layers_of_a_nested_model_in_training_are_random():
    # Keras records training=False for the Dropout, but what the model is told overrules that.
    inner = keras.Sequential([keras.Input((4,)), K.Dense(3), K.Dropout(0.5, name="drop")])
    x = keras.Input((4,))
    model = keras.Model(x, K.ReLU()(B()(inner(x, training=True))))
    assert "Dropout 'sequential/drop' is random" in reason(model)


def test_frozen_norm_called_in_training_is_folded(rng):
    x = keras.Input((4,))
    model = keras.Model(x, K.ReLU()(B(trainable=False)(K.Dense(3)(x), training=True)))
    check_rewrite(randomised(model, rng), data(rng, 4), "fold")
    assert mbn.plan(model, "fold").left == 0


class OtherNorm(B):
    def call(self, inputs, training=None, mask=None):
        return super().call(inputs, training=training) ** 2


@pytest.mark.parametrize("mode", MODES)
def test_other_kinds_of_norm_are_kept(mode, rng):
    x = keras.Input((8, 8, 3))
    model = randomised(keras.Model(x, K.ReLU()(OtherNorm()(K.Conv2D(4, 3)(x)))), rng)
    check_rewrite(model, data(rng, 8, 8, 3), mode)
    assert "OtherNorm is a class of its own" in reason(model, mode)


@pytest.mark.skipif(
    "renorm" not in inspect.signature(B.__init__).parameters, reason="Keras before 3.14 has none"
)
def test_renormalisation_is_a_scale_and_a_shift_at_inference(rng):
    x = keras.Input((8, 8, 3))
    model = randomised(keras.Model(x, K.ReLU()(B(renorm=True)(K.Conv2D(4, 3)(x)))), rng)
    check_rewrite(model, data(rng, 8, 8, 3), "fold")
    assert mbn.plan(model, "fold").left == 0
    assert "renormalisation" in mbn.plan(model, "strided").decisions[0].reason


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_statistics_that_are_not_finite_keep_the_norm(value, mode):
    model = small_model()
    norms(model)[0].moving_mean.assign([1.0, value, 1.0, 1.0])
    assert "hold NaN or infinity" in reason(model, mode)
    assert len(norms(mbn.convert(model, mode, check=False))) == 1


# ------------------------------------------------------------- layers that cannot be seen into


class Block(K.Layer):
    """Holds its layers in an attribute, a list, a tuple and a dictionary."""

    def __init__(self, channels, **kwargs):
        super().__init__(**kwargs)
        self.channels = channels
        self.norm = B(name="norm")
        self.more = [K.Conv2D(channels, 1), B(name="listed")]
        self.pair = (B(name="paired"),)
        self.named = {"last": B(name="named")}

    def build(self, shape):
        self.norm.build(shape)
        self.more[0].build(shape)
        for layer in (self.more[1], self.pair[0], self.named["last"]):
            layer.build((*shape[:-1], self.channels))

    def call(self, x):
        x = self.norm(x)
        for layer in self.more:
            x = layer(x)
        return self.named["last"](ops.relu(self.pair[0](x)))

    def get_config(self):
        return {**super().get_config(), "channels": self.channels}


@pytest.mark.parametrize("mode", MODES)
def test_custom_layer_that_holds_norms(mode, rng, tmp_path):
    x = keras.Input((8, 8, 3))
    model = randomised(keras.Model(x, K.ReLU()(Block(4, name="block")(x))), rng)
    check_rewrite(model, data(rng, 8, 8, 3), mode)
    plan, new = mbn.plan(model, mode), mbn.convert(model, mode)
    assert [d.name for d in plan.decisions] == [
        "block/norm", "block/listed", "block/paired", "block/named"
    ]  # fmt: skip
    assert plan.left == (1 if mode == "fold" else 0)  # it is between two activations
    assert isinstance(new.layers[1].pair, tuple)
    assert [w.shape for w in new.layers[1].more[0].weights] == [(1, 1, 3, 4), (4,)]
    new.export(tmp_path / "served", verbose=False)
    inputs = data(rng, 8, 8, 3)
    served = tf.saved_model.load(str(tmp_path / "served"))
    np.testing.assert_allclose(
        served.serve(inputs), outputs(model, inputs)[0], rtol=1e-3, atol=1e-3
    )


class MadeInBuild(K.Layer):
    """Makes its layers when it is built, and leaves its configuration to Keras."""

    def build(self, shape):
        self.dense = K.Dense(4, activation="relu")
        self.dense.build(shape)
        self.norm = B(name="norm")
        self.norm.build((*shape[:-1], 4))

    def call(self, x):
        return self.norm(self.dense(x))


@pytest.mark.parametrize("mode", MODES)
def test_layers_that_are_made_in_build(mode, rng):
    x = keras.Input((3,))
    model = randomised(keras.Model(x, K.Dense(2)(MadeInBuild()(x))), rng)
    check_rewrite(model, data(rng, 3), mode)


@pytest.mark.parametrize("mode", MODES)
def test_under_time_distributed(mode, rng):
    x = keras.Input((5, 8, 8, 3))
    frames = K.TimeDistributed(small_model(name="frames"))(x)
    convolved = K.GlobalMaxPooling3D()(K.TimeDistributed(B())(K.TimeDistributed(K.ReLU())(x)))
    model = randomised(keras.Model(x, [K.GlobalMaxPooling1D()(frames), convolved]), rng)
    check_rewrite(model, data(rng, 5, 8, 8, 3), mode)
    assert mbn.plan(model, mode).left == (1 if mode == "fold" else 0)


class Subclassed(keras.Model):
    """Takes no arguments, so that what Keras puts in its configuration does not fit."""

    def __init__(self):
        super().__init__()
        self.backbone = small_model(name="backbone")
        self.norm = B(name="own")

    def call(self, x, training=False):
        return ops.relu(self.norm(self.backbone(x), training=training))


@pytest.mark.parametrize("mode", MODES)
def test_subclassed_model(mode, rng):
    model = Subclassed()
    model(data(rng, 8, 8, 3))
    randomised(model, rng)
    plan, new = mbn.plan(model, mode), mbn.convert(model, mode)
    assert [(d.name, d.action) for d in plan.decisions] == [
        ("backbone/batch_normalization", "folded" if mode == "fold" else "depthwise"),
        ("own", "kept" if mode == "fold" else "depthwise"),
    ]
    assert type(new) is Subclassed
    assert new.name == model.name
    assert len(norms(new)) == plan.left
    assert mbn.verify(model, new).ok
    assert mbn.verify(model, new, data(rng, 8, 8, 3)).ok
    assert len(norms(model)) == 2


class TwoArguments(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.norm = B()

    def call(self, x, y):
        return self.norm(x) + y


class BuiltOfTwo(TwoArguments):
    def build(self, x_shape, y_shape):
        self.norm.build(x_shape)


def test_subclassed_model_of_two_arguments(rng):
    model, inputs = BuiltOfTwo(), (data(rng, 4), data(rng, 4))
    model(*inputs)
    randomised(model, rng)
    with pytest.warns(UnverifiedWarning, match="no inputs can be made up"):
        new = mbn.convert(model, "depthwise")
    assert norms(new) == []
    np.testing.assert_allclose(new(*inputs), model(*inputs), rtol=1e-4, atol=1e-5)
    with pytest.raises(mbn.RewriteError, match="no inputs can be made up"):
        mbn.verify(model, new)


def test_subclassed_model_that_keras_cannot_build_again(rng):
    model = TwoArguments()
    model(data(rng, 4), data(rng, 4))
    with pytest.raises(mbn.RewriteError, match=r"cannot be built as.*Define build\(\)"):
        mbn.convert(model, "depthwise")


class NoConfig(K.Layer):
    def __init__(self, helper):
        super().__init__()
        self.helper = helper

    def call(self, x):
        return x * 2.0


def test_custom_layer_without_configuration():
    x = keras.Input((4,))
    model = keras.Model(x, B()(NoConfig(object())(x)))
    new = mbn.convert(model, "depthwise")
    assert mbn.verify(model, new).ok
    old, copied = model.layers[1], new.layers[1]
    assert copied is not old
    assert copied.helper is old.helper


def test_exchanged_call_method_is_refused():
    x, dense = keras.Input((4,)), K.Dense(3)
    y = B()(dense(x))
    dense.call = lambda inputs: inputs
    with pytest.raises(mbn.RewriteError, match="exchanged on the object"):
        mbn.convert(keras.Model(x, y))


# ------------------------------------------------- kernels that are computed, and functions


@pytest.mark.parametrize("mode", MODES)
def test_kernel_with_lora_weights_absorbs_nothing(mode, rng):
    x, dense = keras.Input((4,)), K.Dense(3)
    model = randomised(keras.Model(x, K.ReLU()(B()(dense(x)))), rng)
    dense.enable_lora(2)
    dense.lora_kernel_b.assign(np.ones((2, 3)))
    check_rewrite(model, data(rng, 4), mode)
    if mode == "fold":
        assert "LoRA" in reason(model)


@pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize`")
@pytest.mark.parametrize("mode", MODES)
def test_quantized_kernel_absorbs_nothing(mode, rng):
    x = keras.Input((4,))
    model = randomised(keras.Model(x, K.ReLU()(B()(K.Dense(3)(x)))), rng)
    model.quantize("int8")
    check_rewrite(model, data(rng, 4), mode)
    if mode == "fold":
        assert "is quantized" in reason(model)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.filterwarnings("ignore:.*includes a `lambda`")  # where the test asks for configs
@pytest.mark.parametrize(
    "function",
    [lambda: lambda x: x**2, lambda: ops.sin, lambda: K.PReLU()],
    ids=["lambda", "op", "layer"],
)
def test_functions_as_activations(function, mode, rng):
    if isinstance(function(), K.Layer) and not reads_layers_as_activations():
        pytest.skip("this Keras cannot read the configuration that it gives")
    factor = 3.0
    x = keras.Input((4,))
    y = K.Lambda(lambda t: t * factor)(B()(K.Dense(3, activation=function())(x)))
    model = randomised(keras.Model(x, K.Dense(2, activation=function())(B()(y))), rng)
    check_rewrite(model, data(rng, 4), mode)


def reads_layers_as_activations():
    """Whether Keras makes a layer again of its configuration."""
    try:
        K.Dense.from_config(K.Dense(3, activation=K.PReLU()).get_config())
    except (TypeError, ValueError):
        return False
    return True


def test_converting_does_not_warn_of_functions():
    x = keras.Input((4,))
    model = keras.Model(x, B()(K.Dense(3, activation=lambda x: x**2)(x)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mbn.convert(model, "fold")


# -------------------------------------------------------------------------- what must survive


@pytest.mark.parametrize("mode", MODES)
def test_adapted_preprocessing(mode, rng):
    values = rng.normal(3.0, 2.0, (200, 4)).astype("float32")
    scaling, bins = K.Normalization(), K.Discretization(num_bins=4)
    words = K.StringLookup(output_mode="multi_hot")
    bins.adapt(values)
    words.adapt(["red", "green", "blue"])
    x, text = keras.Input((4,)), keras.Input((1,), dtype="string")
    scaling.adapt(values)
    y = K.Concatenate()([scaling(x), ops.cast(bins(x), "float32"), words(text)])
    model = keras.Model([x, text], B()(K.Dense(3)(y)))
    inputs = [tf.constant(values[:3]), tf.constant([["red"], ["blue"], ["pink"]])]
    check_rewrite(model, inputs, mode)


def test_what_was_meant_for_the_old_kernel_does_not_act_on_the_folded_one(rng):
    x = keras.Input((8, 8, 3))
    y = K.Conv2D(4, 3, name="conv", kernel_regularizer="l2", kernel_constraint="non_neg")(x)
    y = K.Bidirectional(K.GRU(3, kernel_regularizer="l2"), name="both")(
        B()(K.Reshape((-1, 4))(K.Activation("tanh")(B()(y))))
    )
    y = K.Dense(2, name="as_it_is", kernel_regularizer="l2", trainable=False)(y)
    model = randomised(keras.Model(x, y), rng)
    new = mbn.convert(model, "fold")
    assert mbn.plan(model, "fold").left == 0
    conv, both = new.get_layer("conv"), new.get_layer("both")
    for kernel in (conv.kernel, both.forward_layer.cell.kernel, both.backward_layer.cell.kernel):
        assert kernel.regularizer is kernel.constraint is None
    assert conv.kernel_regularizer is conv.kernel_constraint is None
    assert new.get_layer("as_it_is").kernel.regularizer is not None
    assert not new.get_layer("as_it_is").trainable


@pytest.mark.parametrize("mode", MODES)
def test_frozen_parts_stay_frozen(mode, rng):
    x = keras.Input((8, 8, 3))
    block, dense = Block(4), K.Dense(3)
    model = randomised(keras.Model(x, dense(block(x))), rng)
    block.norm.trainable = False
    dense.bias.trainable = False
    new = mbn.convert(model, mode)
    trained = [layer for layer in norms(model) if layer.trainable] if mode == "fold" else []
    gone = sum(len(layer.trainable_weights) for layer in trained)
    assert len(new.trainable_weights) == len(model.trainable_weights) - gone
    assert not new.layers[-1].bias.trainable
    model.trainable = False
    new = mbn.convert(model, mode)
    assert not new.trainable
    assert new.trainable_weights == []


def test_training_the_copy_leaves_the_original_alone(rng):
    model = randomised(small_model(), rng)
    before = model.get_weights()
    new = mbn.convert(model, "depthwise")
    assert not new.compiled
    new.compile("sgd", "mse")
    new.fit(data(rng, 8, 8, 3), np.ones((2, 2)), verbose=0)
    for old, now in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, now)
    assert not np.array_equal(new.layers[-1].kernel, model.layers[-1].kernel)


def test_untouched_weights_are_equal_bit_for_bit(rng):
    model = randomised(small_model(), rng)
    old, new = model.layers[-1], mbn.convert(model, "fold").layers[-1]
    for weight, now in zip(old.get_weights(), new.get_weights(), strict=True):
        np.testing.assert_array_equal(weight, now)


@pytest.mark.parametrize("mode", MODES)
def test_exported_signatures_have_the_same_names(mode, rng, tmp_path):
    left, right = keras.Input((4,)), keras.Input((4,), name="right")
    model = keras.Model([left, right], {"sum": B()(K.Dense(3)(left + right))})
    signatures = []
    for each, path in ((model, tmp_path / "old"), (mbn.convert(model, mode), tmp_path / "new")):
        each.export(path, verbose=False)
        served = tf.saved_model.load(str(path)).signatures["serving_default"]
        signatures.append((sorted(served.structured_input_signature[1]), served.structured_outputs))
    assert signatures[0] == signatures[1]


def test_verify_sees_a_wrong_model(rng):
    model = randomised(small_model(), rng)
    wrong = mbn.convert(model, "fold")
    wrong.layers[1].bias.assign(wrong.layers[1].bias + 1.0)
    assert not mbn.verify(model, wrong).ok


def test_verify_leaves_moving_statistics_alone(rng):
    x = keras.Input((4,))
    model = randomised(keras.Model(x, B()(x, training=True)), rng)
    before = model.get_weights()
    assert mbn.verify(model, model).ok
    for old, now in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, now)

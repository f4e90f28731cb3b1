"""`convert` for training: every BatchNormalization gives way to a layer that samples, and back."""

import numpy as np
import pytest

import mbn_rewrite as mbn
from tests.support import kerases
from tests.support.kerases import K, Model, norms
from tests.support.random_models import randomise

pytestmark = pytest.mark.slow

MODES = ("strided", "mbn")
CLASS = {"strided": "StridedBatchNormalization", "mbn": "ModifiedBatchNormalization"}


@pytest.fixture(autouse=True)
def _keras(each_keras):
    return each_keras


@pytest.fixture
def rng():
    return np.random.default_rng(3)


def convnet():
    """One BatchNormalization of every kind that is replaced: shared, nested, frozen, bare."""
    inner = kerases.package().Sequential(
        [K.Input((8, 8, 4)), K.Conv2D(4, 1), K.BatchNormalization(name="in")]
    )
    x = K.Input((16, 16, 3), name="image")
    y = K.Conv2D(4, 3, 2, padding="same", name="first")(x)
    y = K.ReLU()(K.BatchNormalization(name="bn", momentum=0.9, epsilon=1e-5)(y))
    shared = K.BatchNormalization(name="shared", scale=False)
    y = K.Add()([shared(inner(y)), shared(y)])
    y = K.BatchNormalization(name="frozen", trainable=False, center=False)(y)
    y = K.GlobalAveragePooling2D()(y)
    return Model(x, K.Dense(5, name="head")(K.BatchNormalization(name="flat")(y)))


@pytest.fixture
def model(rng):
    model = convnet()
    randomise(model, rng)
    return model


def images(rng, count=8):
    return rng.standard_normal((count, 16, 16, 3)).astype("float32")


def arrays(variables):
    return [np.array(v.numpy()) for v in variables]


def train(model, rng, steps=3):
    model.compile(kerases.package().optimizers.SGD(0.05), "mse")
    return [
        float(model.train_on_batch(images(rng), rng.standard_normal((8, 5)).astype("float32")))
        for _ in range(steps)
    ]


# ------------------------------------------------------------------------------ the exchange


@pytest.mark.parametrize("mode", MODES)
def test_every_batch_norm_is_replaced_in_its_place(mode, model):
    before = arrays(model.weights)
    plan = mbn.plan(model, mode, stride=2)
    new = mbn.convert(model, mode, stride=2)
    assert plan.counts == {mode: 5}
    assert [d.into for d in plan.decisions] == [(d.name,) for d in plan.decisions]
    assert {type(layer).__name__ for layer in norms(new)} == {CLASS[mode]}
    assert [layer.name for layer in new.layers] == [layer.name for layer in model.layers]
    assert all(isinstance(layer, getattr(mbn, CLASS[mode])) for layer in norms(new))
    comparison = mbn.verify(model, new)
    assert comparison.ok, comparison
    for old, now in zip(before, arrays(model.weights), strict=True):
        np.testing.assert_array_equal(old, now, "the original was changed")


@pytest.mark.parametrize("mode", MODES)
def test_weights_are_those_of_the_original_in_its_order(mode, model):
    new = mbn.convert(model, mode)
    for kind in ("trainable_variables", "non_trainable_variables"):
        pairs = zip(arrays(getattr(model, kind)), arrays(getattr(new, kind)), strict=True)
        assert all(np.array_equal(old.ravel(), now.ravel()) for old, now in pairs)


@pytest.mark.parametrize("mode", MODES)
def test_configuration_is_kept(mode, model):
    new = mbn.convert(model, mode, stride=2)
    old, layer = model.get_layer("bn"), new.get_layer("bn")
    names = ("momentum", "epsilon", "scale", "center", "trainable")
    assert all(getattr(old, name) == getattr(layer, name) for name in names)
    assert new.get_layer("frozen").trainable is False
    assert layer.get_config()["stride"] == 2
    initializers = [type(x.gamma_initializer).__name__ for x in (old, layer)]
    assert initializers[0] == initializers[1]


def test_regularizers_and_constraints_are_kept(rng):
    def penalty(w):
        return kerases.package().ops.sum(w) if hasattr(kerases.package(), "ops") else sum(w[:1])

    constraint = kerases.package().constraints.NonNeg()
    x = K.Input((6, 6, 2))
    y = K.Conv2D(3, 1, kernel_regularizer=penalty)(x)
    y = K.BatchNormalization(name="bn", gamma_regularizer=penalty, beta_constraint=constraint)(y)
    new = mbn.convert(Model(x, y), "strided")
    layer = new.get_layer("bn")
    assert layer.gamma_regularizer is penalty
    assert layer.beta_constraint is constraint
    assert new.layers[1].kernel_regularizer is penalty


@pytest.mark.parametrize("mode", MODES)
def test_it_trains_and_goes_back_to_serving(mode, model, rng):
    new = mbn.convert(model, mode, stride=2)
    before = arrays(new.trainable_variables)
    losses = train(new, rng)
    assert np.all(np.isfinite(losses))
    assert all(
        not np.array_equal(old, now)
        for old, now in zip(before, arrays(new.trainable_variables), strict=True)
    )
    for serving in ("fold", "depthwise"):
        served = mbn.convert(new, serving)
        comparison = mbn.verify(new, served)
        assert comparison.ok, comparison
        assert mbn.plan(new, serving).left == len(norms(served))
    assert mbn.plan(new, "depthwise").left == 0
    assert mbn.plan(new, "fold").left == mbn.plan(model, "fold").left


def test_stride_1_trains_as_the_original(model, rng):
    new = mbn.convert(model, "strided", stride=1)
    state = rng.bit_generator.state
    expected = train(model, rng, steps=6)
    rng.bit_generator.state = state
    np.testing.assert_allclose(train(new, rng, steps=6), expected, rtol=1e-4)
    for old, now in zip(arrays(model.weights), arrays(new.weights), strict=True):
        np.testing.assert_allclose(now, old, rtol=2e-3, atol=2e-4)


def test_from_one_training_layer_to_the_other(model):
    strided = mbn.convert(model, "strided", stride=4)
    modified = mbn.convert(strided, "mbn", stride=2)
    back = mbn.convert(modified, "strided", stride=(2, 1))
    assert mbn.verify(model, back).ok
    assert back.get_layer("bn").get_config()["stride"] in ((2, 1), [2, 1])
    for old, now in zip(arrays(model.weights), arrays(back.weights), strict=True):
        np.testing.assert_array_equal(old, now)


def test_optimizer_state_fits(model, rng):
    """Slots of an optimizer can be carried over, variable by variable."""
    model.compile(kerases.package().optimizers.SGD(0.05, momentum=0.9), "mse")
    model.train_on_batch(images(rng), np.zeros((8, 5), "float32"))
    new = mbn.convert(model, "strided", stride=2)
    new.compile(kerases.package().optimizers.SGD(0.05, momentum=0.9), "mse")
    new.optimizer.build(new.trainable_variables)
    slots = [v.shape for v in model.optimizer.variables if len(v.shape)]
    assert [v.shape for v in new.optimizer.variables if len(v.shape)] == slots


# ------------------------------------------------------------------- what holds other layers


@pytest.fixture
def block():
    """A class of layers that hold layers, in the Keras in use."""

    class Block(K.Layer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.first = K.BatchNormalization()
            self.other = K.LayerNormalization()
            self.convs = [K.Conv2D(2, 1), K.Conv2D(2, 1)]
            self.norms = {"a": K.BatchNormalization(), "b": K.BatchNormalization()}

        def build(self, shape):
            for layer in (self.first, self.other, *self.convs, *self.norms.values()):
                layer.build(shape)
            self.built = True

        def call(self, x, training=None):
            x = self.other(self.first(x, training=training))
            for conv, norm in zip(self.convs, self.norms.values(), strict=True):
                x = norm(conv(x), training=training)
            return x

    return Block


@pytest.fixture
def holding(block, rng):
    x = K.Input((8, 8, 2))
    model = Model(x, K.Dense(2)(block(name="block")(x)))
    randomise(model, rng)
    return model


def pictures(rng):
    return rng.standard_normal((4, 8, 8, 2)).astype("float32")


@pytest.mark.parametrize("mode", MODES)
def test_layers_in_holders(mode, holding, rng):
    plan = mbn.plan(holding, mode, stride=2)
    assert all("save weights" in decision.reason for decision in plan.decisions)
    new = mbn.convert(holding, mode, stride=2)
    assert {type(layer).__name__ for layer in norms(new)} == {CLASS[mode]}
    assert mbn.verify(holding, new).ok
    for kind in ("trainable_variables", "non_trainable_variables"):
        pairs = zip(arrays(getattr(holding, kind)), arrays(getattr(new, kind)), strict=True)
        assert all(np.array_equal(old.ravel(), now.ravel()) for old, now in pairs)
    new.compile("sgd", "mse")
    assert np.isfinite(new.train_on_batch(pictures(rng), np.zeros((4, 8, 8, 2), "float32")))


@pytest.mark.parametrize("back", ["fold", "depthwise", "strided", "mbn"])
@pytest.mark.parametrize("mode", MODES)
def test_layers_in_holders_go_back(mode, back, holding, rng):
    trained = mbn.convert(holding, mode, stride=2)
    trained.compile("sgd", "mse")
    trained.train_on_batch(pictures(rng), np.zeros((4, 8, 8, 2), "float32"))
    new = mbn.convert(trained, back)
    assert mbn.verify(trained, new).ok
    kinds = {type(layer).__name__ for layer in norms(new)}
    assert kinds == {"fold": {CLASS[mode]}, "depthwise": set()}.get(back, {CLASS.get(back)})


def test_small_inputs_of_held_layers(block):
    """The size of their inputs is not known before they are called."""
    x = K.Input((5, 5, 2))
    new = mbn.convert(Model(x, block(name="block")(x)), "strided", stride=4)
    rng = np.random.default_rng(0)
    data = rng.standard_normal((2, 5, 5, 2)).astype("float32")
    layer = new.get_layer("block").first
    layer.momentum = 0.0
    layer(data, training=True)
    np.testing.assert_allclose(
        layer.moving_mean.numpy(), data.mean((0, 1, 2)), rtol=1e-4, atol=1e-6
    )


def test_constraints_of_a_depthwise_kernel_are_those_of_its_channels(rng):
    constraint = kerases.package().constraints.UnitNorm()
    x = K.Input((6, 6, 4))
    model = Model(x, K.BatchNormalization(name="bn", gamma_constraint=constraint)(x))
    model.get_layer("bn").gamma.assign([1.0, 2.0, 3.0, 4.0])
    data = rng.standard_normal((4, 6, 6, 4)).astype("float32")
    results = []
    for new in (mbn.convert(model, mode, stride=1) for mode in MODES):
        new.compile(kerases.package().optimizers.SGD(0.01), "mse")
        new.train_on_batch(data, np.zeros_like(data))
        results.append(arrays(new.trainable_variables)[0].ravel())
    np.testing.assert_allclose(results[0], results[1], rtol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(results[1]), 1, rtol=1e-4)


def test_after_saving_as_saved_model(model, tmp_path):
    """tf_keras leaves traces of that on layers."""
    if kerases.package().__name__ == "tf_keras":
        model.save(tmp_path / "saved", save_format="tf")
    else:
        model.export(tmp_path / "saved", verbose=False)
    assert mbn.verify(model, mbn.convert(model, "fold")).ok


def test_integer_inputs(rng):
    x = K.Input((8, 8, 3), dtype="uint8")
    model = Model(x, K.BatchNormalization(name="bn")(x))
    data = rng.integers(0, 255, (2, 8, 8, 3)).astype("uint8")
    new = mbn.convert(model, "strided")
    assert mbn.verify(model, new, inputs=data).ok


# ----------------------------------------------------------------------------------- strides


@pytest.mark.parametrize(
    ("stride", "expected"),
    [
        (None, (4, 4)),
        (3, (3, 3)),
        ((8, 1), (8, 1)),
        ({"bn": 2}, (2, 2)),
        (lambda name: 2 if name == "bn" else 1, (2, 2)),
    ],
    ids=["default", "int", "pair", "mapping", "function"],
)
def test_strides(stride, expected):
    x = K.Input((32, 32, 3))
    new = mbn.convert(Model(x, K.BatchNormalization(name="bn")(x)), "strided", stride=stride)
    assert new.get_layer("bn").strides == expected


def test_lowered_strides_are_told():
    x = K.Input((32, 32, 3))
    y = K.BatchNormalization(name="large")(x)
    y = K.BatchNormalization(name="small")(K.AveragePooling2D(4)(y))
    y = K.BatchNormalization(name="flat")(K.GlobalAveragePooling2D()(y))
    reasons = {d.name: d.reason for d in mbn.plan(Model(x, y), "strided", stride=4).decisions}
    assert reasons["large"] == "Stride 4."
    assert reasons["small"] == "Stride 4, lowered to 1: its input of 8 x 8 positions is small."
    assert "rank 2" in reasons["flat"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stride", [0, -2, 1.5, "4", (1, 2, 3), {"bn": 0}, lambda name: None])
def test_bad_strides(stride, mode):
    x = K.Input((8, 8, 3))
    model = Model(x, K.BatchNormalization(name="bn")(x))
    with pytest.raises(mbn.RewriteError, match="positive whole number"):
        mbn.convert(model, mode, stride=stride)


def test_strides_for_layers_that_there_are_not():
    x = K.Input((8, 8, 3))
    model = Model(x, K.BatchNormalization(name="bn")(x))
    with pytest.raises(mbn.RewriteError, match=r"given for b, which is no .* There is bn"):
        mbn.plan(model, "strided", stride={"b": 2})


def test_open_sizes_are_told():
    x = K.Input((None, None, 3))
    model = Model(x, K.BatchNormalization(name="bn")(x))
    (decision,) = mbn.plan(model, "strided").decisions
    assert decision.reason == "Stride 4, not lowered where the model leaves sizes open."


def test_no_stride_for_inference():
    x = K.Input((8, 8, 3))
    with pytest.raises(mbn.RewriteError, match="takes no stride"):
        mbn.convert(Model(x, K.BatchNormalization()(x)), "fold", stride=2)


# ------------------------------------------------------------------------------ what is kept


def test_kept_with_a_reason():
    class Special(K.BatchNormalization):
        pass

    x = K.Input((8, 8, 3))
    y = Special(name="special")(x)
    y = K.BatchNormalization(2, name="middle")(y)
    y = K.BatchNormalization(name="training")(y, training=True)
    plan = mbn.plan(Model(x, y), "strided", stride=2)
    reasons = {d.name: (d.action, d.reason) for d in plan.decisions}
    assert reasons["special"][0] == reasons["middle"][0] == "kept"
    assert "class of its own" in reasons["special"][1]
    assert "neither 1 nor the last" in reasons["middle"][1]
    assert reasons["training"][0] == "kept"
    assert "called with training=True" in reasons["training"][1]


def _by_the_batch(x):
    return K.BatchNormalization(name="bn")(x, training=True)


def _frozen(x):
    return K.BatchNormalization(name="bn", trainable=False)(x, training=True)


def _once_by_the_batch(x):
    norm = K.BatchNormalization(name="bn")
    return norm(K.ReLU()(norm(x)), training=True)


def _in_a_model(x):
    inner = K.Input(x.shape[1:])
    model = Model(inner, K.BatchNormalization(name="bn")(inner), name="inner")
    return model(x, training=True)


def _held(x):
    return K.TimeDistributed(K.BatchNormalization(name="bn"), name="held")(x, training=True)


@pytest.mark.parametrize("mode", ["strided", "mbn"])
@pytest.mark.parametrize(
    ("build", "action"),
    [
        (_by_the_batch, "kept"),
        (_once_by_the_batch, "kept"),
        (_in_a_model, "kept"),
        (_held, "kept"),
        (_frozen, ""),
    ],
)
def test_what_normalises_by_the_batch_at_inference_goes_on_to(build, action, mode, rng):
    x = K.Input((16, 16, 3))
    model = Model(x, build(x))
    randomise(model, rng)
    new, plan = mbn.convert_with_plan(model, mode, stride=2)
    (decision,) = plan.decisions
    assert decision.action == (action or mode)
    if action == "kept":
        assert "statistics of a sample would give other outputs" in decision.reason
    data = images(rng)
    expected = np.asarray(model(data))
    np.testing.assert_allclose(expected, np.asarray(new(data)), rtol=1e-5, atol=1e-5)


def test_plan_is_data(model):
    plan = mbn.plan(model, "mbn", stride=(2, 1))
    assert plan.to_dict()["strides"]["bn"] in ((2, 1), [2, 1])
    assert "5 mbn" in str(plan)

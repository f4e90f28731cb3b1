"""`convert(..., keep_compiled=True)`: training goes on where it was, with the optimizer's state."""

import itertools
import warnings

import numpy as np
import pytest

import mbn_rewrite as mbn
from tests.support import kerases
from tests.support.kerases import K, Model, norms
from tests.support.random_models import randomise

pytestmark = pytest.mark.slow

MODES = ("strided", "mbn")
TOLERANCE = {"float32": 1e-4, "mixed_float16": 2e-2, "mixed_bfloat16": 5e-2}


@pytest.fixture(autouse=True)
def _keras(each_keras):
    return each_keras


def is_keras_3():
    return kerases.package().__name__ == "keras"


def optimizers():
    return kerases.package().optimizers


def network(**norm):
    """A classifier with a frozen BatchNormalization, and one in a nested model."""
    inner = kerases.package().Sequential(
        [
            K.Input((8, 8, 4)),
            K.Conv2D(6, 1, use_bias=False),
            K.BatchNormalization(name="in", **norm),
        ]
    )
    x = K.Input((16, 16, 3), name="image")
    y = K.BatchNormalization(name="bn", **norm)(
        K.Conv2D(4, 3, 2, padding="same", use_bias=False)(x)
    )
    y = K.BatchNormalization(name="frozen", trainable=False)(inner(K.ReLU()(y)))
    y = K.GlobalAveragePooling2D()(K.ReLU()(y))
    model = Model(x, K.Dense(3, name="head", dtype="float32")(y))
    randomise(model, np.random.default_rng(3))
    return model


def data():
    rng = np.random.default_rng(5)
    return rng.standard_normal((24, 16, 16, 3)).astype("float32"), np.eye(3)[np.arange(24) % 3]


def losses(model, epochs=3):
    """Of each epoch."""
    x, y = data()
    return model.fit(x, y, 8, epochs, verbose=0, shuffle=False).history["loss"]


def compiled(optimizer, **options):
    model = network()
    loss = kerases.package().losses.CategoricalCrossentropy(from_logits=True)
    # Without XLA, by which Keras 3 would compile for seconds.
    model.compile(optimizer, loss, **{"jit_compile": False, **options})
    return model


def converted(model, mode="strided"):
    return mbn.convert(model, mode, stride=1, keep_compiled=True)


def goes_on(model, mode="strided", through=lambda model: model, tolerance=1e-4):
    """Trains a model, converts it, and compares how the two go on."""
    losses(model)
    new = through(converted(model, mode))
    expected = losses(model)
    np.testing.assert_allclose(losses(new), expected, rtol=tolerance)
    pairs = zip(model.trainable_variables, new.trainable_variables, strict=True)
    for old, now in pairs:
        np.testing.assert_allclose(
            now.numpy().ravel(), old.numpy().ravel(), rtol=30 * tolerance, atol=10 * tolerance
        )
    return new


def schedule():
    return optimizers().schedules.CosineDecay(0.05, 20)


OPTIMIZERS = {
    "sgd": lambda: optimizers().SGD(0.02, momentum=0.9, nesterov=True),
    "adam": lambda: optimizers().Adam(0.01),
    "adamw": lambda: optimizers().AdamW(0.01, weight_decay=0.1),
    "schedule": lambda: optimizers().SGD(schedule(), momentum=0.9),
    "rmsprop": lambda: optimizers().RMSprop(0.005, momentum=0.5, centered=True),
    "average": lambda: optimizers().Adam(
        0.01, use_ema=True, ema_momentum=0.8, ema_overwrite_frequency=4
    ),
    "nadam": lambda: optimizers().Nadam(0.05),
}


@pytest.mark.parametrize(("name", "mode"), [*zip(OPTIMIZERS, itertools.cycle(MODES))])
def test_losses_go_on(name, mode):
    new = goes_on(compiled(OPTIMIZERS[name]()), mode)
    assert all(norm.__class__.__name__.endswith("dBatchNormalization") for norm in norms(new))


def test_without_the_state_they_do_not():
    """So the test above can fail."""
    model = compiled(OPTIMIZERS["sgd"]())
    losses(model)
    new = mbn.convert(model, "strided", stride=1)
    new.compile(OPTIMIZERS["sgd"](), model.loss)
    assert not np.allclose(losses(new), losses(model), rtol=1e-2)


@pytest.mark.parametrize("name", ["SGD", "Adam", "Ftrl"])
def test_legacy_optimizers(name):
    if is_keras_3():
        pytest.skip("only tf_keras has these optimizers")
    legacy = optimizers().legacy
    made = {
        "SGD": lambda: legacy.SGD(lambda: 0.02, momentum=0.9),
        "Adam": lambda: legacy.Adam(schedule(), amsgrad=True),
        "Ftrl": lambda: legacy.Ftrl(0.05),
    }
    goes_on(compiled(made[name]()), "mbn")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision(policy, mode):
    kerases.set_policy(policy)
    model = compiled(OPTIMIZERS["sgd"]())
    scales = hasattr(model.optimizer, "inner_optimizer")
    assert scales == (policy == "mixed_float16")
    new = goes_on(model, mode, tolerance=TOLERANCE[policy])
    assert hasattr(new.optimizer, "inner_optimizer") == scales
    if scales:
        assert type(new.optimizer.inner_optimizer) is type(model.optimizer.inner_optimizer)


@pytest.mark.parametrize("legacy", [False, True], ids=["new", "legacy"])
def test_the_loss_scale_is_kept(legacy):
    if legacy and is_keras_3():
        pytest.skip("only tf_keras has these optimizers")
    kerases.set_policy("mixed_float16")
    inner = (optimizers().legacy if legacy else optimizers()).SGD(0.01)
    scaling = kerases.package().mixed_precision.LossScaleOptimizer(
        inner, initial_scale=2.0**30, dynamic_growth_steps=7
    )
    model = compiled(scaling)
    losses(model, 1)
    new = converted(model)
    kept, now = (
        [float(v.numpy()) for v in state_of_scale(each)]
        for each in (model.optimizer, new.optimizer)
    )
    assert kept == now
    assert kept[0] < 2.0**30  # so that it is one that training has found
    assert new.optimizer.dynamic_growth_steps == 7


def state_of_scale(optimizer):
    if hasattr(optimizer, "dynamic_scale"):
        return [optimizer.dynamic_scale, optimizer.step_counter]
    return [optimizer.loss_scale, optimizer.dynamic_counter]


def test_accumulated_gradients():
    if not is_keras_3():
        pytest.skip("only Keras 3 accumulates gradients")
    model = compiled(optimizers().SGD(0.02, momentum=0.9, gradient_accumulation_steps=4))
    x, y = data()
    model.fit(x, y, 8, verbose=0, shuffle=False)  # three steps, and a fourth after converting
    goes_on(model, "mbn")


def test_what_does_not_decay_does_not_decay_in_the_new_model():
    """Though gamma is called otherwise there."""
    optimizer = optimizers().AdamW(0.01, weight_decay=0.5)
    optimizer.exclude_from_weight_decay(var_names=["gamma", "beta"])
    goes_on(compiled(optimizer), "mbn")


def test_before_training_there_is_no_state():
    model = compiled(OPTIMIZERS["adamw"](), metrics=["accuracy"])
    new = converted(model)
    assert new.optimizer is not model.optimizer
    np.testing.assert_allclose(losses(new), losses(model), rtol=1e-4)


# -------------------------------------------------------------------------- what is compiled


def test_how_it_is_compiled_is_kept():
    x = K.Input((8, 8, 3))
    y = K.BatchNormalization(name="bn")(K.Conv2D(4, 3)(x))
    y = K.GlobalAveragePooling2D()(y)
    model = Model(x, [K.Dense(2, name="a")(y), K.Dense(1, name="b")(y)])

    def own_loss(true, predicted):
        return kerases.package().losses.mean_absolute_error(true, predicted)

    metrics = kerases.package().metrics
    model.compile(
        OPTIMIZERS["adam"](),
        ["mse", own_loss],
        loss_weights=[1.0, 0.25],
        metrics=[["mae"], [metrics.MeanSquaredError(name="own"), own_loss]],
        weighted_metrics=[[metrics.MeanAbsoluteError(name="weighted")], []],
        steps_per_execution=2,
    )
    rng = np.random.default_rng(2)
    images = rng.standard_normal((12, 8, 8, 3)).astype("float32")
    targets = [rng.standard_normal((12, 2)), rng.standard_normal((12, 1))]
    weights = [np.linspace(0.5, 2, 12)] * 2

    def trained(model):
        done = model.fit(images, targets, 4, 2, verbose=0, shuffle=False, sample_weight=weights)
        return done.history

    trained(model)
    new = converted(model)
    expected, found = trained(model), trained(new)
    assert expected.keys() == found.keys()
    assert {"a_mae", "b_own", "a_weighted"} <= found.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-4, err_msg=name)
    assert int(new.steps_per_execution) == 2
    kept = {id(metric) for metric in every_metric(model)}
    assert len(kept) > 3
    assert kept.isdisjoint(id(metric) for metric in every_metric(new))


def every_metric(model):
    return [m for each in model.metrics for m in (each, *getattr(each, "metrics", ()))]


@pytest.mark.parametrize(
    "how", [{"run_eagerly": True}, {"jit_compile": True}, {"jit_compile": False}], ids=str
)
def test_how_it_runs_is_kept(how):
    ((name, value),) = how.items()
    model = compiled(OPTIMIZERS["sgd"](), **how)
    new = converted(model)
    assert getattr(new, name) is value
    model = compiled(OPTIMIZERS["sgd"]())
    setattr(model, name, value)  # as Keras allows
    assert getattr(converted(model), name) is value


@pytest.mark.parametrize("name", ["model.keras", "model.h5"])
def test_after_saving_and_loading(name, tmp_path):
    if name == "model.h5" and is_keras_3():
        pytest.skip("Keras 3 itself cannot train on what it loads from such a file")

    def loaded(model):
        model.save(tmp_path / name)
        return kerases.package().models.load_model(tmp_path / name)

    model = compiled(OPTIMIZERS["adamw"]())
    losses(model)
    goes_on(loaded(model), through=loaded)


@pytest.mark.parametrize("to", ["mbn", "strided"])
def test_from_one_training_layer_to_the_other(to):
    model = compiled(OPTIMIZERS["adam"]())
    losses(model)
    other = converted(model, "mbn" if to == "strided" else "strided")
    goes_on(other, to)


def test_its_own_train_step():
    """With a metric and a variable of its own, which the copy has, too."""

    class Own(kerases.package().Model):
        def train_step(self, data):
            self.steps.assign_add(1.0)
            return super().train_step(data)

    base = network()
    model = Own(base.inputs, base.outputs)
    model.steps = (
        kerases.package().Variable(0.0, trainable=False)
        if hasattr(kerases.package(), "Variable")
        else kerases.package().backend.variable(0.0)
    )
    loss = kerases.package().losses.CategoricalCrossentropy(from_logits=True)
    model.compile(OPTIMIZERS["sgd"](), loss)
    new = goes_on(model)
    assert type(new) is Own
    assert float(new.steps.numpy()) == float(model.steps.numpy()) == 18.0


def test_weights_frozen_after_compiling():
    model = compiled(OPTIMIZERS["sgd"]())
    losses(model)
    model.get_layer("bn").trainable = False
    model.compile(model.optimizer, model.loss)
    goes_on(model)


# ------------------------------------------------------------------------ what cannot be kept


def refused(model, message, mode="strided", **options):
    with pytest.raises(mbn.RewriteError, match=message) as caught:
        mbn.convert(model, mode, keep_compiled=True, **options)
    assert "\n" not in str(caught.value)


def test_a_model_that_is_not_compiled():
    refused(network(), "is not compiled")


def test_modes_for_inference():
    refused(compiled("sgd"), "for inference", mode="fold")


def test_a_path():
    refused("saved_model", "not the path")


def test_a_compile_of_its_own():
    class Own(kerases.package().Model):
        def compile(self, optimizer, more):
            super().compile(optimizer, "mse")

    base = network()
    model = Own(base.inputs, base.outputs)
    model.compile("sgd", more=1)
    refused(model, r"a compile\(\) of its own")


def test_other_optimizers():
    class Own(kerases.package().Model):
        pass

    base = network()
    model = Own(base.inputs, base.outputs)
    model.critics = {"second": optimizers().SGD(0.1)}
    model.compile("sgd", "mse")
    refused(model, "also trains with the optimizers in critics")


def test_an_optimizer_without_a_configuration():
    class Own(optimizers().SGD):
        def __init__(self, extra, **kwargs):
            super().__init__(**kwargs)

    refused(compiled(Own(1, learning_rate=0.1)), "Own cannot be copied .* get_config")


def test_a_metric_without_a_configuration():
    class Own(kerases.package().metrics.MeanSquaredError):
        def __init__(self, extra, name="own"):
            super().__init__(name=name)

    refused(compiled("sgd", metrics=[Own(1)]), "metric Own 'own' cannot be copied .* get_config")


def test_state_of_a_weight_that_is_left_out():
    class Own(K.BatchNormalization):
        def build(self, shape):
            super().build(shape)
            self.extra = self.add_weight(shape=(2,), name="extra", initializer="zeros")

        def call(self, inputs, training=None):
            return super().call(inputs, training=training)

    x = K.Input((8, 8, 3))
    model = Model(x, Own(name="bn")(x))
    model.compile(OPTIMIZERS["sgd"](), "mse")
    images = np.zeros((4, 8, 8, 3), "float32")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no gradient
        model.fit(images, images, verbose=0)
    refused(model, "no counterpart in the new model: .*extra")


def test_state_that_depends_on_shapes():
    if not is_keras_3():
        pytest.skip("only Keras 3 has an optimizer whose state depends on shapes")
    model = compiled(optimizers().Adafactor(0.01))
    losses(model)
    refused(model, "the state of the optimizer Adafactor cannot be kept", mode="mbn")
    goes_on(model)

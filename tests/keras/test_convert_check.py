"""`convert` compares what it gives with the original, says so, and lets no wrong model out."""

import itertools
import json
import warnings

import numpy as np
import pytest
import tensorflow as tf

import mbn_rewrite as mbn
from mbn_rewrite import api
from mbn_rewrite.comparison import TOLERANCES
from mbn_rewrite.errors import UnverifiedWarning
from tests.support.kerases import K, Model, package
from tests.support.random_models import randomise

MODES = ["auto", "fold", "depthwise", "strided", "mbn"]


def conv_model():
    x = K.Input((8, 8, 3))
    model = Model(x, K.ReLU()(K.BatchNormalization()(K.Conv2D(4, 3)(x))))
    randomise(model, np.random.default_rng(0))
    return model


def of(layer, shape=(3,), **kinds):
    """A model that does what a layer does after a BatchNormalization."""
    x = K.Input(shape, **kinds)
    return Model(x, layer(K.BatchNormalization()(x)))


def layer(function):
    class Does(package().layers.Layer):
        def call(self, x):
            return function(x)

    return Does()


def wrong(monkeypatch, wrecked):
    """Has every front end write models that are wrong."""
    real = api.front_end_of

    def front_end_of(model):
        front_end = real(model)

        class Wrong:
            def __getattr__(self, name):
                return getattr(front_end, name)

            def write(self, *args):
                return wrecked(front_end.write(*args))

        return Wrong()

    monkeypatch.setattr(api, "front_end_of", front_end_of)


def with_other_weights(model):
    model.set_weights([1.5 * array for array in model.get_weights()])
    return model


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_is_checked(each_keras, mode):
    new, plan = mbn.convert_with_plan(conv_model(), mode)
    assert new is not None
    assert plan.verification.ok
    assert plan.verification.compared > 0
    assert plan.unverified == ""
    assert f"verification: {plan.verification}" in str(plan)
    assert json.loads(plan.to_json())["verification"]["ok"] is True


@pytest.mark.parametrize("mode", MODES)
def test_a_wrong_model_is_an_error(each_keras, mode, monkeypatch):
    wrong(monkeypatch, with_other_weights)
    model = conv_model()
    before = model.get_weights()
    with pytest.raises(mbn.VerificationError, match=r"max rel error.*check=False") as caught:
        mbn.convert(model, mode)
    assert not caught.value.comparison.ok
    assert caught.value.plan.mode == mode
    assert caught.value.report is None
    for old, now in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, now)


def sensitive_model(rest):
    """A network whose output is what is left of two that all but cancel out."""
    x = K.Input((4, 4, 32))
    y = K.BatchNormalization(epsilon=0.1)(K.Conv2D(2, 1, use_bias=False)(x))
    model = Model(x, K.Conv2D(1, 1, use_bias=False)(y))
    kernel = np.random.default_rng(0).uniform(0.1, 1, (1, 1, 32, 1))
    gamma, variance = np.float32([0.7, 1.9]), np.float32([1.3, 0.9])
    scale = gamma / np.sqrt(variance + 0.1)
    last = np.reshape([1 / scale[0], (rest - 1) / scale[1]], (1, 1, 2, 1))
    zero = np.zeros(2)
    model.set_weights([kernel.repeat(2, -1), gamma, zero, zero, variance, last])
    return model


def test_rounding_that_a_network_magnifies_is_no_mistake(each_keras, monkeypatch):
    model = sensitive_model(rest=3e-4)
    new, plan = mbn.convert_with_plan(model, "fold")
    verification = plan.verification
    assert not [layer for layer in new.layers if isinstance(layer, K.BatchNormalization)]
    assert verification.max_rel_error > TOLERANCES["float32"]
    assert "the original's own rounding explains it: in float64" in verification.note
    assert not mbn.verify(model, new, tolerance=TOLERANCES["float32"]).ok
    wrong(monkeypatch, with_other_weights)
    with pytest.raises(mbn.VerificationError):
        mbn.convert(model, "fold")


def test_a_network_that_is_nothing_but_rounding_proves_nothing(each_keras):
    model = sensitive_model(rest=1e-7)
    assert not mbn.verify(model, mbn.convert(model, "fold", check=False)).ok


def test_the_check_can_be_left_out(each_keras, monkeypatch):
    wrong(monkeypatch, with_other_weights)
    _, plan = mbn.convert_with_plan(conv_model(), "fold", check=False)
    assert plan.verification is None
    assert plan.unverified == ""
    assert json.loads(plan.to_json())["verification"] is None
    assert "verif" not in str(plan)


def test_a_model_that_cannot_be_called_is_an_error(each_keras, monkeypatch):
    wrong(monkeypatch, lambda new: of(K.Dense(2), (7,)))
    with pytest.raises(mbn.VerificationError, match="cannot be called") as caught:
        mbn.convert(conv_model(), "fold")
    assert caught.value.comparison is None


def test_a_plan_is_not_checked(each_keras, monkeypatch):
    monkeypatch.setattr(api, "checked", lambda *args: pytest.fail("it was run"))
    assert mbn.plan(conv_model(), "fold").verification is None


def test_what_is_given_is_what_is_compared(each_keras):
    inputs = np.zeros((3, 8, 8, 3), np.float32)
    _, plan = mbn.convert_with_plan(conv_model(), "fold", inputs=inputs)
    assert plan.verification.examples == 3
    with pytest.raises(mbn.RewriteError, match="measures nothing"):
        mbn.convert(conv_model(), "fold", inputs=inputs, check=False)
    with pytest.raises(mbn.RewriteError, match="measures nothing"):
        mbn.plan(conv_model(), "fold", inputs=inputs)


def test_one_picture_is_enough(each_keras):
    x = K.Input((130, 130, 3))
    _, plan = mbn.convert_with_plan(Model(x, K.BatchNormalization()(x)), "fold")
    assert plan.verification.examples == 1


def test_the_user_is_told_which_line_was_not_verified(each_keras):
    x = K.Input((), dtype="string")
    looked_up = layer(lambda x: tf.strings.to_number(x)[:, None])
    model = Model(x, K.BatchNormalization()(looked_up(x)))
    with pytest.warns(UnverifiedWarning, match="dtype string.*inputs=") as caught:
        mbn.convert(model, "fold")
    assert caught[0].filename == __file__
    with pytest.warns(UnverifiedWarning, match="dtype string") as caught:
        _, plan = mbn.convert_with_plan(model, "fold")
    assert caught[0].filename == __file__
    assert plan.verification is None
    assert "dtype string" in plan.unverified
    assert f"not verified: {plan.unverified}" in str(plan)
    assert json.loads(plan.to_json())["unverified"] == plan.unverified
    given = tf.constant(["1", "2"])
    _, plan = mbn.convert_with_plan(model, "fold", inputs=given)
    assert plan.verification.ok


CALLS = itertools.count()
UNVERIFIABLE = {
    "other outputs each time": lambda x: x + float(next(CALLS)),
    "NaN": lambda x: x * np.nan,
    "cannot be called": lambda x: tf.debugging.check_numerics(x * np.nan, "no numbers"),
}


@pytest.mark.parametrize("said", UNVERIFIABLE)
def test_what_cannot_be_verified_is_no_mistake(each_keras, said):
    model = of(layer(UNVERIFIABLE[said]))
    with pytest.warns(UnverifiedWarning, match=said):
        _, plan = mbn.convert_with_plan(model, "fold")
    assert plan.verification is None
    assert said in plan.unverified


def test_what_takes_positive_numbers_only_is_verified(each_keras):
    x = K.Input((3,))
    y = K.BatchNormalization()(K.Dense(2)(layer(tf.math.log)(x)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, plan = mbn.convert_with_plan(Model(x, y), "fold")
    assert plan.verification.ok


@pytest.mark.parametrize("mode", ["fold", "strided"])
def test_the_model_stays_as_it_was(each_keras, mode):
    x = K.Input(batch_shape=(2, 4, 3))
    y = K.BatchNormalization()(K.Dense(3)(x), training=True)
    model = Model(x, K.LSTM(3, stateful=True)(y))
    state = [np.array(each) for each in model.get_weights()]
    memory = [each.numpy() for each in model.layers[-1].states]
    new = mbn.convert(model, mode)
    for old, now in zip(state, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, now)
    for each in (model, new):
        for old, now in zip(memory, each.layers[-1].states, strict=True):
            np.testing.assert_array_equal(old, now.numpy())


def test_measuring_and_checking_share_what_is_given(each_keras, monkeypatch):
    seen = []
    real = api.plan_for

    def spy(model, options):
        seen.append(options.inputs)
        return real(model, options)

    monkeypatch.setattr(api, "plan_for", spy)
    inputs = np.zeros((2, 8, 8, 3), np.float32)
    mbn.convert(conv_model(), "auto", inputs=inputs)
    assert seen[0] is inputs


# ------------------------------------------------------------------------------ measuring


def test_how_much_faster_it_is_on_request(each_keras, monkeypatch):
    monkeypatch.setattr(api, "FIGURE_SECONDS", 0.1)
    model = conv_model()
    _, plan = mbn.convert_with_plan(model, "fold", measure=True, batch_size=3)
    assert [timing.form for timing in plan.speed.timings] == ["original", "rewritten"]
    assert plan.speed.run_config.batch_size == 3
    assert f"speed: {plan.speed.figure}" in str(plan)
    assert plan.to_dict()["speed"]["figure"] == plan.speed.figure
    assert mbn.convert_with_plan(model, "fold")[1].speed is None


def test_what_cannot_be_measured_says_why(each_keras):
    x = K.Input((4,))
    nothing_to_do = Model(x, K.Dense(2)(x))
    _, plan = mbn.convert_with_plan(nothing_to_do, "fold", measure=True)
    assert plan.speed.figure.startswith("not measured: nothing was changed")


def test_training_is_not_measured():
    with pytest.raises(mbn.RewriteError, match="what is measured is inference"):
        mbn.convert(conv_model(), "strided", measure=True)
    with pytest.raises(mbn.RewriteError, match="or measure=True"):
        mbn.convert(conv_model(), "fold", batch_size=3)


def test_models_are_measured_beside_the_first(each_keras):
    model = conv_model()
    found = mbn.measure(model, mbn.convert(model, "fold"), model, seconds=0.1)
    assert len({timing.form for timing in found.timings}) == 3
    assert found.timings[0].speed_up is None
    assert len(found.timings[2].seconds) == len(found.timings[0].seconds) > 0
    for wrong, said in (
        ((), "at least one"),
        ((model, "a/path"), "not both"),
        ((object(),), "model of tf_keras or Keras 3"),
    ):
        with pytest.raises(mbn.RewriteError, match=said):
            mbn.measure(*wrong)
    with pytest.raises(mbn.RewriteError, match="seconds"):
        mbn.measure(model, seconds=0)
    with pytest.raises(mbn.RewriteError, match="no signatures"):
        mbn.measure(model, signature="serve")


def test_what_one_leaves_open_is_as_the_other_has_it_in_either_order(each_keras):
    def of_size(size):
        x = K.Input((size, size, 3))
        return Model(x, K.GlobalAveragePooling2D()(x))

    models = [of_size(size) for size in (None, 20)]
    for order in (models, models[::-1]):
        assert len(mbn.measure(*order, seconds=0.1).timings) == 2

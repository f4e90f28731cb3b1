"""The training layers of Keras 3 on one backend, which KERAS_BACKEND names.

A process has one backend, so that `test_backends.py` runs this file once for each; by hand it is

    KERAS_BACKEND=jax python -m pytest tests/training/backend_checks.py

Where MBN_EXCHANGE names a folder, results and a model's file are left there for other backends, and
compared with what others left.
"""

import functools
import os
import sys
from dataclasses import replace
from pathlib import Path

BACKEND = os.environ["KERAS_BACKEND"]


class _Refused:
    """Other frameworks than this backend's, which nothing here may need."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"tensorflow", "tf_keras", "jax", "torch"} - {BACKEND}:
            raise ImportError(f"there is no {name} in this process")


if BACKEND == "jax":  # Keras on torch looks for TensorFlow's types, and TensorFlow has tf_keras
    sys.meta_path.insert(0, _Refused())

import keras
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import mbn_rewrite as mbn
from mbn_rewrite.comparison import TOLERANCES
from mbn_rewrite.training import backends
from tests.training.differentiation import differentiated
from tests.training.sampled_cases import CASES, TOLERANCE, Case, cases

# By torch, of its own code, and of gradients that nobody reads any more.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad:UserWarning"),
]

ROOM = backends.named(BACKEND, "the test")
KINDS = {
    "strided": mbn.StridedBatchNormalization,
    "mbn": mbn.ModifiedBatchNormalization,
}
EXCHANGE = os.environ.get("MBN_EXCHANGE")
# Cases that every backend has.
LOCAL = {name: case for name, case in CASES.items() if not case.synchronized}


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


def tensor(array, dtype=None):
    return keras.ops.convert_to_tensor(array, dtype or str(array.dtype))


def array(tensor):
    """A tensor as an array of numpy that is wide enough."""
    if "float16" in str(getattr(tensor, "dtype", "")):  # bfloat16 too
        tensor = keras.ops.cast(tensor, "float32")
    return np.asarray(keras.ops.convert_to_numpy(tensor), np.float64)


def numbers(shape, seed=0):
    return (np.random.default_rng(seed).standard_normal(shape) * 2 + 1).astype("float32")


# --------------------------------------------------------------------- statistics of a sample


def results(case, arrays, run=None):
    """What `sampled_cases.NAMES` say, as arrays, and x and dy as they were cast."""
    x, dy = (tensor(a, case.dtype) for a in arrays[:2])
    gamma, beta = map(tensor, arrays[2:4])
    mask = None if arrays[4] is None else tensor(arrays[4])

    def function(x, gamma, beta):
        y, moments = ROOM.normalize_by_sample(x, gamma, beta, case.sampling, mask)
        return y, moments.mean, moments.variance, moments.count

    (y, *moments), gradients = differentiated(function, [x, gamma, beta], dy, run)
    assert y.dtype == gradients[0].dtype == x.dtype
    return [array(t) for t in (y, *gradients, *moments)], (array(x), array(dy))


def check(case, run=None, seed=0, shift=0):
    with wide(case.dtype):
        x, *rest = case.arrays(seed)
        arrays = [x + np.asarray(shift, x.dtype), *rest]
        got, cast = results(case, arrays, run)
    arrays[:2] = cast
    case.check(arrays, got, case.expected(*arrays))


def wide(dtype):
    """Context manager in which the backend has a dtype."""
    import contextlib

    if BACKEND != "jax" or dtype != "float64":
        return contextlib.nullcontext()
    import jax

    return jax.enable_x64(True)


@pytest.mark.parametrize("case", LOCAL.values(), ids=LOCAL)
def test_gradient_is_exact(case):
    check(case)


@pytest.mark.parametrize("name", ["rank_4", "everything", "mask", "channels_first"])
def test_gradient_is_exact_compiled(name):
    check(CASES[name], "compiled")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize("name", ["rank_2", "rank_4", "everything", "mask", "channels_first"])
def test_dtypes(name, dtype):
    check(replace(CASES[name], dtype=dtype))


@settings(max_examples=8, phases=[Phase.generate])  # shrinking would compile for minutes
@given(cases(), st.integers(0, 1000))
def test_random_cases(case, seed):
    check(replace(case, synchronized=False), seed=seed)


@pytest.mark.parametrize("mean", [1e3, 1e4])
@pytest.mark.parametrize("strides", [(1, 1), (4, 4)])
def test_a_large_mean_cancels_nothing(strides, mean):
    """With a variance of 4: up to the rounding of the mean itself, which is x's.

    The sums of fused operations, on TensorFlow and torch, are their own.
    """
    case = Case((8, 16, 16, 4), 3, strides)
    x, *rest = case.arrays()
    arrays = [x + np.float32(mean), *rest]
    got, _ = results(case, arrays)
    expected = case.expected(*arrays)
    of_mean = mean * np.finfo(np.float32).eps  # absolute, in x - mu
    of_mean *= 1 if BACKEND == "jax" else 20
    np.testing.assert_allclose(got[5], expected[5], rtol=1e-5 + of_mean**2)
    for a, b in zip(got[:3], expected[:3], strict=True):  # y, dx, dgamma
        np.testing.assert_allclose(a, b, rtol=0, atol=4 * (of_mean + 1e-5) * np.max(np.abs(b)))


@pytest.mark.parametrize("strides", [(1, 1), (2, 2)])
def test_one_position(strides):
    """The variance of one position is 0, and its output beta."""
    case = Case((1, 1, 1, 3), 3, strides)
    arrays = case.arrays()
    (y, dx, *_, variance, count), _ = results(case, arrays)
    np.testing.assert_allclose(y[0, 0, 0], arrays[3], atol=1e-5)
    np.testing.assert_allclose(dx, 0, atol=1e-5)
    np.testing.assert_array_equal(variance, 0)
    assert count == 1


@pytest.mark.parametrize("level", [0.0, 7.0, 1e4])
def test_constant_input(level):
    case = Case((4, 8, 8, 3), 3, (1, 1))
    x, *rest = case.arrays()
    got, _ = results(case, [np.full_like(x, level), *rest])
    assert all(np.all(np.isfinite(result)) for result in got)
    # Some rounding of the level, times gamma / sqrt(epsilon).
    rounding = 1e-3 + 60 * level * np.finfo(np.float32).eps
    np.testing.assert_allclose(got[0], np.broadcast_to(rest[2], x.shape), atol=rounding)


@pytest.mark.parametrize("strides", [(1, 1), (2, 2)])
def test_no_examples(strides):
    case = Case((0, 4, 4, 3), 3, strides)
    channels = np.ones(3, "float32")
    empty = np.zeros(case.shape, "float32")
    got, _ = results(case, [empty, empty, channels, channels, None])
    assert got[0].shape == got[1].shape == case.shape
    assert got[-1] == 0


def test_everything_masked():
    case = CASES["mask"]
    arrays = case.arrays()
    got, _ = results(case, [*arrays[:4], np.zeros_like(arrays[4])])
    assert all(np.all(np.isfinite(result)) for result in got)
    assert got[-1] == 0


@pytest.mark.parametrize("case", [CASES[n] for n in ("rank_2", "rank_4", "channels_first")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_given_statistics(case, dtype):
    case = replace(case, dtype=dtype)
    with wide(dtype):
        arrays = case.arrays()
        x, gamma, beta = tensor(arrays[0], dtype), tensor(arrays[2]), tensor(arrays[3])
        mean, variance = keras.ops.zeros_like(gamma) + 0.5, keras.ops.ones_like(gamma) * 2
        y = ROOM.normalize(x, gamma, beta, mean, variance, case.sampling)
        assert y.dtype == x.dtype
        x, y = array(x), array(y)
    along = [-1 if i == case.axis else 1 for i in range(len(case.shape))]
    slope = np.float64(arrays[2]) / np.sqrt(2 + case.sampling.epsilon)
    expected = (x - 0.5) * slope.reshape(along) + arrays[3].reshape(along)
    rounding = TOLERANCE[dtype]
    np.testing.assert_allclose(y, expected, rtol=rounding, atol=rounding * 10)


def test_a_wrong_gradient_is_seen():
    """Without the share of the statistics, the gradient does not pass."""
    case = CASES["rank_4"]
    arrays = case.arrays()
    (y, _, *rest), _ = results(case, arrays)
    wrong = arrays[1] * arrays[2] / np.sqrt(rest[3] + case.sampling.epsilon)
    with pytest.raises(AssertionError, match="dx is"):
        case.check(arrays, [y, wrong, *rest], case.expected(*arrays))


# ------------------------------------------------------------------------------- the layers


def network(norm, **options):
    """A small convolutional network; the same first weights whatever the norm."""
    layers, uniform = keras.layers, functools.partial(keras.initializers.GlorotUniform, seed=1)
    return keras.Sequential(
        [
            keras.Input((12, 12, 3)),
            layers.Conv2D(6, 3, use_bias=False, kernel_initializer=uniform(), name="conv"),
            norm(momentum=0.9, name="norm", **options),
            layers.ReLU(),
            layers.GlobalAveragePooling2D(),
            layers.Dense(2, kernel_initializer=uniform(), name="dense"),
        ]
    )


def trained(model, steps, seed=0):
    """The losses of some steps, with an optimizer of its own."""
    model.compile(keras.optimizers.SGD(0.01, momentum=0.9), "mse")
    return continued(model, steps, seed)


def continued(model, steps, seed=0):
    """The losses of some steps of a compiled model."""
    losses = []
    for i in range(steps):
        x, target = numbers((8, 12, 12, 3), seed + i % 5), numbers((8, 2), 100 + seed + i % 5)
        losses.append(float(model.train_on_batch(x, target)))
    return losses


def test_50_steps_at_stride_1_are_those_of_the_original(kind):
    original, ours = network(keras.layers.BatchNormalization), network(kind, stride=1)
    expected, got = trained(original, 50), trained(ours, 50)
    np.testing.assert_allclose(got, expected, rtol=TOLERANCES["float32"])
    for name in ("moving_mean", "moving_variance"):
        a, b = (array(getattr(m.get_layer("norm"), name)) for m in (ours, original))
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_another_stride_trains_otherwise(kind):
    everything, sampled = network(kind, stride=1), network(kind, stride=2)
    assert np.max(np.abs(np.subtract(trained(everything, 2), trained(sampled, 2)))) > 1e-6
    assert sampled.get_layer("norm").strides == (2, 2)


def test_fit(kind):
    model = network(kind, stride=2)
    model.compile("sgd", "mse")
    before = [array(w) for w in model.weights]
    history = model.fit(numbers((32, 12, 12, 3)), numbers((32, 2)), batch_size=8, verbose=0)
    assert np.isfinite(history.history["loss"]).all()
    moved = [np.any(array(w) != old) for w, old in zip(model.weights, before, strict=True)]
    assert all(moved)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("stride", [1, 2])
def test_mixed_precision(kind, policy, stride):
    layer, original = kind(stride, dtype=policy), keras.layers.BatchNormalization(dtype=policy)
    x = numbers((4, 12, 12, 3))[:, ::stride, ::stride] * 100
    y, expected = (norm(x, training=True) for norm in (layer, original))
    assert keras.backend.standardize_dtype(y.dtype) == layer.compute_dtype
    if stride == 1:
        np.testing.assert_allclose(array(y), array(expected), atol=5e-2)
    assert layer.moving_variance.dtype == "float32"
    assert np.isfinite(array(layer.moving_variance)).all()


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("shape", [(8, 6), (4, 9, 6), (4, 6, 6, 6), (2, 6, 4, 5, 6)])
def test_ranks_and_layouts_as_the_original(kind, shape, axis):
    layer, original = kind(1, axis=axis), keras.layers.BatchNormalization(axis=axis)
    x = numbers(shape)
    for training in (True, False):
        got, expected = (array(norm(x, training=training)) for norm in (layer, original))
        np.testing.assert_allclose(got, expected, atol=1e-5)
    for name in ("moving_mean", "moving_variance"):
        a, b = (array(getattr(norm, name)) for norm in (layer, original))
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("functional", [False, True])
def test_mask_as_the_original(kind, functional):
    x, mask = numbers((6, 7, 4)), np.random.default_rng(1).random((6, 7)) < 0.6
    layer, original = kind(1), keras.layers.BatchNormalization()
    if functional:
        x = x * mask[..., None]
        layer, original = (
            keras.Sequential([keras.Input((7, 4)), keras.layers.Masking(), norm])
            for norm in (layer, original)
        )
        got, expected = (array(model(x, training=True)) for model in (layer, original))
    else:
        got, expected = (array(n(x, training=True, mask=mask)) for n in (layer, original))
    np.testing.assert_allclose(got, expected, atol=1e-4)
    np.testing.assert_allclose(
        *(array(m.non_trainable_variables[1]) for m in (layer, original)), rtol=1e-4
    )


@pytest.mark.parametrize("shape", [(0, 8, 8, 3), (2, 0, 8, 3)])
def test_an_empty_batch_moves_nothing(kind, shape):
    layer = kind(2)
    layer.build((None, None, 8, 3))
    before = [array(w) for w in layer.weights]
    assert layer(np.zeros(shape, "float32"), training=True).shape == shape
    for weight, old in zip(layer.weights, before, strict=True):
        np.testing.assert_array_equal(array(weight), old)


@pytest.mark.parametrize(("scale", "center"), [(False, True), (True, False), (False, False)])
def test_without_scale_or_shift(kind, scale, center):
    options = {"scale": scale, "center": center}
    layer, original = kind(1, **options), keras.layers.BatchNormalization(**options)
    x = numbers((4, 6, 6, 3))
    got, expected = (array(norm(x, training=True)) for norm in (layer, original))
    np.testing.assert_allclose(got, expected, atol=1e-5)
    assert len(layer.trainable_variables) == scale + center


def test_regularizers_and_constraints(kind):
    layer = kind(1, gamma_regularizer="l2", beta_constraint="non_neg", gamma_constraint="unit_norm")
    layer.build((None, 6, 6, 3))
    model = keras.Sequential([keras.Input((6, 6, 3)), layer])
    np.testing.assert_allclose(array(sum(model.losses)), 0.01 * 3, rtol=1e-5)
    model.compile("sgd", "mse")
    model.fit(numbers((8, 6, 6, 3)), numbers((8, 6, 6, 3), 1) - 9, verbose=0)
    scale, shift = (array(w) for w in layer.trainable_variables)
    np.testing.assert_allclose(np.linalg.norm(scale), 1, rtol=1e-4)
    assert np.min(shift) >= 0


def test_a_layer_used_twice(kind):
    x = keras.Input((8, 8, 3))
    layer = kind(2)
    model = keras.Model(x, layer(keras.layers.ReLU()(layer(x))))
    model.compile("sgd", "mse")
    data = numbers((8, 8, 8, 3))
    assert np.isfinite(model.train_on_batch(data, data))


def test_what_ran_can_be_asked(kind):
    layer = kind(2)
    assert layer.implementation is None
    ran = set()
    for training in (True, False):
        layer(numbers((4, 8, 8, 3)), training=training)
        ran.add(layer.implementation)
    assert len(ran) == 2
    assert all(ran)


# ------------------------------------------------------------------------------- conversion


@pytest.mark.parametrize("mode", ["strided", "mbn"])
def test_convert_there_and_back(mode):
    model = network(keras.layers.BatchNormalization)
    trained(model, 3)
    x = numbers((4, 12, 12, 3))
    expected = array(model(x))
    training = mbn.convert(model, mode=mode, stride=2)
    assert type(training.get_layer("norm")) is type(KINDS[mode]())
    np.testing.assert_allclose(array(training(x)), expected, atol=1e-5)
    losses = trained(training, 5)
    assert np.isfinite(losses).all()
    expected = array(training(x))
    for back in ("fold", "depthwise", "auto"):
        served = mbn.convert(training, mode=back)
        assert not any(isinstance(layer, KINDS[mode]) for layer in served.layers)
        np.testing.assert_allclose(array(served(x)), expected, atol=1e-5, err_msg=back)


@pytest.mark.parametrize("mode", ["strided", "mbn", "fold", "depthwise"])
def test_models_in_float64_convert_as_exactly_as_keras_computes(mode):
    inputs = keras.Input((6, 6, 3), dtype="float64")
    y = keras.layers.Dense(4, dtype="float64")(inputs)
    model = keras.Model(inputs, keras.layers.BatchNormalization(dtype="float64")(y))
    _, plan = mbn.convert_with_plan(model, mode)
    assert plan.verification.ok


@pytest.mark.parametrize("mode", ["strided", "mbn"])
def test_a_converted_model_trains_on_as_the_original(mode):
    model = network(keras.layers.BatchNormalization)
    trained(model, 3)
    ours = mbn.convert(model, mode=mode, stride=1)
    np.testing.assert_allclose(
        trained(ours, 20, seed=7), trained(model, 20, seed=7), rtol=TOLERANCES["float32"]
    )


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
@pytest.mark.parametrize("mode", ["strided", "mbn"])
def test_an_interrupted_training_goes_on(mode, optimizer):
    model = network(keras.layers.BatchNormalization)
    state = {"SGD": {"momentum": 0.9}, "AdamW": {"weight_decay": 0.1}}[optimizer]
    model.compile(getattr(keras.optimizers, optimizer)(0.02, **state), "mse")
    continued(model, 5)
    ours = mbn.convert(model, mode, stride=1, keep_compiled=True)
    fresh = mbn.convert(model, mode, stride=1)
    fresh.compile(type(model.optimizer)(0.02, **state), "mse")
    expected = continued(model, 10, seed=7)
    np.testing.assert_allclose(continued(ours, 10, seed=7), expected, rtol=TOLERANCES["float32"])
    assert not np.allclose(continued(fresh, 10, seed=7), expected, rtol=1e-2)


# --------------------------------------------------------------------- beside other backends


def exchanged_results():
    """Outputs and gradients of all cases, by name."""
    found = {}
    for name, case in LOCAL.items():
        values, _ = results(case, case.arrays())
        found |= {f"{name}/{i}": value for i, value in enumerate(values)}
    return found


def exchanged_model():
    """A trained model with both layers."""
    model = keras.Sequential(
        [
            keras.Input((12, 12, 3)),
            keras.layers.Conv2D(6, 3, name="conv"),
            mbn.StridedBatchNormalization(2, name="strided"),
            mbn.ModifiedBatchNormalization(2, name="modified", center=False),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(2),
        ]
    )
    trained(model, 3)
    return model


def read_what_others_left(folder):
    """Asserts that results of other backends, and what their files give, are those here."""
    ours = None
    for file in sorted(folder.glob("*.npz")):
        ours = exchanged_results() if ours is None else ours
        with np.load(file) as theirs:
            for key, value in ours.items():
                largest = max(np.max(np.abs(theirs[key])), 1)
                error = np.max(np.abs(value - theirs[key])) / largest
                assert error <= TOLERANCES["float32"], f"{key} of {file.stem} is {error:.1e} apart"
            model = keras.models.load_model(folder / f"{file.stem}.keras")
            np.testing.assert_allclose(
                array(model(numbers((4, 12, 12, 3)))), theirs["outputs"], rtol=1e-4, atol=1e-5
            )
            trained(model, 1)


@pytest.mark.skipif(EXCHANGE is None, reason="no folder was given for what others left")
def test_results_and_files_are_those_of_other_backends():
    folder = Path(EXCHANGE)
    read_what_others_left(folder)
    model = exchanged_model()
    model.save(folder / f"{BACKEND}.keras")
    outputs = array(model(numbers((4, 12, 12, 3))))
    np.savez(folder / f"{BACKEND}.npz", outputs=outputs, **exchanged_results())

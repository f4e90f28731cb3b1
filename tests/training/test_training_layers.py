"""The training layers in both Kerases: against BatchNormalization, and against numpy."""

import functools
import subprocess
import sys
from dataclasses import dataclass

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras

import mbn_rewrite as mbn
import mbn_rewrite.frontends.keras3.training_layers as keras_layers
import mbn_rewrite.frontends.tf_keras.training_layers as tf_keras_layers
from mbn_rewrite.training.strides import DEFAULT_STRIDE

pytestmark = pytest.mark.slow

CLASSES = ["StridedBatchNormalization", "ModifiedBatchNormalization"]
MODULES = {"tf_keras": (tf_keras, tf_keras_layers), "keras": (keras, keras_layers)}
MOMENTUM = 0.75


@dataclass(frozen=True)
class Kind:
    """One class of one Keras; its BatchNormalization is the one to compare with."""

    of: str
    name: str

    def __str__(self):
        return f"{self.of}-{self.name}"

    @property
    def keras(self):
        return MODULES[self.of][0]

    @property
    def original(self):
        return self.keras.layers.BatchNormalization

    def __call__(self, *args, **kwargs):
        return getattr(MODULES[self.of][1], self.name)(*args, **kwargs)


KINDS = [Kind(of, name) for of in MODULES for name in CLASSES]


@pytest.fixture(scope="module", autouse=True)
def _fresh_keras():
    """Once for all tests here: clearing takes longer than most of them, and none counts names."""
    yield
    tf_keras.backend.clear_session()


@pytest.fixture(params=KINDS, ids=str)
def kind(request):
    return request.param


def numbers(shape, seed=0, dtype="float32"):
    return (np.random.default_rng(seed).standard_normal(shape) * 2 + 1).astype(dtype)


def images(seed=0):
    return numbers((4, 8, 8, 3), seed)


def statistics(layer):
    """The moving mean and variance."""
    return np.array([layer.moving_mean.numpy(), layer.moving_variance.numpy()])


def scale_and_shift(layer):
    """The weights that scale and shift."""
    modified = hasattr(layer, "depthwise_kernel")
    return (layer.depthwise_kernel, layer.bias) if modified else (layer.gamma, layer.beta)


def expected_statistics(sample, axis, bessel):
    """The moving mean and variance after one step from 0 and 1, in float64."""
    sample = np.moveaxis(np.float64(sample), axis, -1).reshape(-1, sample.shape[axis])
    batch = np.array([sample.mean(0), sample.var(0, ddof=int(bessel))])
    return MOMENTUM * np.array([[0.0], [1.0]]) + (1 - MOMENTUM) * batch


def give_weights(layer, weights):
    layer.set_weights(
        [np.reshape(w, old.shape) for w, old in zip(weights, layer.get_weights(), strict=True)]
    )


def random_weights(layer):
    """Weights for a layer that is built; the variance is positive."""
    return [np.abs(numbers(w.shape, seed)) for seed, w in enumerate(layer.get_weights())]


RUNS = {
    "eager": lambda function: function,
    "graph": lambda function: tf.function(function),
    "xla": lambda function: tf.function(function, jit_compile=True),
}


# ------------------------------------------------------------- as BatchNormalization trains


def network(keras, norm, dtype="float32"):
    """A small convolutional network; the same first weights whatever the norm."""
    layers = keras.layers
    uniform = functools.partial(keras.initializers.GlorotUniform, seed=1)
    return keras.Sequential(
        [
            keras.Input((12, 12, 3)),
            layers.Conv2D(6, 3, use_bias=False, kernel_initializer=uniform(), dtype=dtype),
            norm(momentum=0.9, dtype=dtype),
            layers.ReLU(dtype=dtype),
            layers.GlobalAveragePooling2D(dtype=dtype),
            layers.Dense(2, kernel_initializer=uniform(), dtype=dtype),
        ]
    )


def compiled(model, keras, rate=0.01, **options):
    model.compile(keras.optimizers.SGD(rate, momentum=0.9), "mse", **options)
    return model


def batches(n):
    return [(numbers((8, 12, 12, 3), i), numbers((8, 2), 100 + i)) for i in range(n)]


@functools.cache
def trained(keras, norm, jit, steps=50):
    """The losses of all steps, and the statistics of the first norm at the end."""
    model = compiled(network(keras, norm), keras, jit_compile=jit)
    data = batches(5)
    losses = [float(model.train_on_batch(*data[i % 5])) for i in range(steps)]
    return np.array(losses), statistics(model.layers[1])


@pytest.mark.parametrize("jit", [False, True], ids=["graph", "xla"])
def test_stride_1_trains_as_the_original(kind, jit):
    losses, ends = trained(kind.keras, kind.original, jit)
    got, got_ends = trained(kind.keras, functools.partial(kind, 1), jit)
    assert losses[-1] < 0.8 * losses[0]
    np.testing.assert_allclose(got, losses, rtol=2e-4)
    np.testing.assert_allclose(got_ends, ends, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS[:1], ids=str)
def test_another_stride_trains_otherwise(kind):
    """The comparison above sees a sample in place of everything."""
    losses, _ = trained(kind.keras, kind.original, False)
    got, _ = trained(kind.keras, functools.partial(kind, 2), False, steps=10)
    assert np.max(np.abs(got / losses[:10] - 1)) > 1e-3


# --------------------------------------------------------------------------- moving statistics


@dataclass(frozen=True)
class Case:
    shape: tuple
    axis: int
    stride: int | tuple
    places: tuple


ALL = slice(None)
TWO, THREE, FOUR = (slice(None, None, stride) for stride in (2, 3, 4))
CASES = {
    "rank_2": Case((6, 5), -1, 4, (ALL, ALL)),
    "rank_3": Case((4, 15, 5), -1, 4, (ALL, FOUR, ALL)),
    "rank_3_channels_first": Case((4, 5, 15), 1, 4, (ALL, ALL, FOUR)),
    "rank_3_pair": Case((4, 15, 5), -1, (2, 3), (ALL, TWO, ALL)),
    "rank_4": Case((4, 9, 8, 5), -1, 4, (ALL, FOUR, FOUR, ALL)),
    "rank_4_everything": Case((4, 9, 8, 5), 3, 1, (ALL, ALL, ALL, ALL)),
    "rank_4_rows": Case((4, 9, 8, 5), 3, (4, 1), (ALL, FOUR, ALL, ALL)),
    "rank_4_channels_first": Case((4, 5, 9, 8), 1, 3, (ALL, ALL, THREE, THREE)),
    "rank_4_channels_first_everything": Case((4, 5, 9, 8), 1, 1, (ALL, ALL, ALL, ALL)),
    "rank_5": Case((2, 5, 6, 7, 5), 4, 2, (ALL, TWO, TWO, TWO, ALL)),
    "rank_5_pair": Case((2, 5, 6, 7, 5), -1, (2, 3), (ALL, ALL, TWO, THREE, ALL)),
    "rank_5_channels_first": Case((2, 5, 5, 6, 7), 1, 3, (ALL, ALL, THREE, THREE, THREE)),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_moving_statistics_are_those_of_the_sample(kind, case):
    x = numbers(case.shape)
    layer = kind(case.stride, min_samples=1, axis=case.axis, momentum=MOMENTUM)
    layer(x, training=True)
    fused = kind.of == "tf_keras" and len(case.shape) > 3
    expected = expected_statistics(x[case.places], case.axis, bessel=fused)
    np.testing.assert_allclose(statistics(layer), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].stride == 1])
def test_moving_statistics_are_those_of_the_original(kind, name):
    case = CASES[name]
    x = numbers(case.shape)
    layers = kind(1, axis=case.axis, momentum=MOMENTUM), kind.original(case.axis, MOMENTUM)
    outputs = [layer(x, training=True) for layer in layers]
    np.testing.assert_allclose(*outputs, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(*map(statistics, layers), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("run", ["graph", "xla"])
def test_moving_statistics_of_compiled_steps(kind, run):
    layer = kind(2, momentum=MOMENTUM)
    layer.build((None, 8, 8, 3))
    y = RUNS[run](lambda x: layer(x, training=True))(images())
    again = kind(2, momentum=MOMENTUM)
    np.testing.assert_allclose(y, again(images(), training=True), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(statistics(layer), statistics(again), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("stride", [1, 2])
def test_an_empty_batch_moves_nothing(kind, stride, run):
    layer = kind(stride)
    layer.build((None, 8, 8, 3))
    give_weights(layer, random_weights(layer))
    before = statistics(layer)
    y = RUNS[run](lambda x: layer(x, training=True))(tf.zeros([0, 8, 8, 3]))
    assert y.shape == (0, 8, 8, 3)
    np.testing.assert_array_equal(statistics(layer), before)


@pytest.mark.parametrize("stride", [1, 2])
def test_one_position(kind, stride):
    layer = kind(stride, beta_initializer="ones")
    y = layer(images()[:1, :1, :1], training=True)
    np.testing.assert_allclose(y, np.ones((1, 1, 1, 3)), atol=1e-5)
    assert np.all(np.isfinite(statistics(layer)))


# ---------------------------------------------------------------------------------- inference


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_inference_is_that_of_the_original(kind, case):
    x = numbers(case.shape)
    layer, original = kind(case.stride, axis=case.axis), kind.original(case.axis)
    original.build(case.shape)
    layer.build(case.shape)
    weights = random_weights(original)
    original.set_weights(weights)
    give_weights(layer, weights)
    np.testing.assert_allclose(layer(x), original(x), rtol=1e-5, atol=1e-5)


def test_a_frozen_layer_infers(kind):
    layer = kind(2)
    layer(images())
    layer.trainable = False
    before = statistics(layer)
    np.testing.assert_array_equal(layer(images(), training=True), layer(images()))
    np.testing.assert_array_equal(statistics(layer), before)
    assert not layer.trainable_weights


# ------------------------------------------------------------------------- saving and loading


@pytest.fixture
def model(kind):
    """A model of whose weights none is as it was made."""
    layers = kind.keras.layers
    model = kind.keras.Sequential(
        [
            kind.keras.Input((12, 12, 3)),
            kind((2, 1), min_samples=9, momentum=MOMENTUM, name="norm"),
            layers.GlobalAveragePooling2D(),
        ]
    )
    model.set_weights(random_weights(model))
    return model


def check_same(new, model):
    layer, expected = new.get_layer("norm"), model.get_layer("norm")
    assert type(layer) is type(expected)
    assert layer.get_config() == expected.get_config()
    assert layer.strides == (2, 1)
    x = tf.constant(batches(1)[0][0])
    np.testing.assert_array_equal(new(x), model(x))
    np.testing.assert_array_equal(new(x, training=True), model(x, training=True))
    np.testing.assert_array_equal(statistics(layer), statistics(expected))


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
def test_saved_and_loaded(kind, model, suffix, tmp_path):
    """Loading needs no custom_objects."""
    model.save(tmp_path / f"model{suffix}")
    check_same(kind.keras.models.load_model(tmp_path / f"model{suffix}"), model)


@pytest.mark.parametrize("kind", [k for k in KINDS if k.of == "tf_keras"], ids=str)
def test_saved_model_of_tf_keras(kind, model, tmp_path):
    model.save(tmp_path / "model", save_format="tf")
    check_same(kind.keras.models.load_model(tmp_path / "model"), model)


@pytest.mark.parametrize("kind", [k for k in KINDS if k.of == "tf_keras"], ids=str)
def test_saved_model_without_its_classes(kind, model, tmp_path):
    """What is traced into a SavedModel infers as the model does."""
    x = tf.constant(batches(1)[0][0])
    expected = model(x)
    model.export(tmp_path / "model")
    served = tf.saved_model.load(tmp_path / "model")
    np.testing.assert_allclose(served.serve(x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [k for k in KINDS if k.of == "keras"], ids=str)
def test_exported_by_keras_3(kind, model, tmp_path):
    model.export(tmp_path / "model", verbose=False)
    x = tf.constant(batches(1)[0][0])
    served = tf.saved_model.load(tmp_path / "model")
    np.testing.assert_allclose(served.serve(x), model(x), rtol=1e-5, atol=1e-6)


def test_weights_saved_and_loaded(kind, model, tmp_path):
    new = type(model).from_config(model.get_config())
    model.save_weights(tmp_path / "x.weights.h5")
    new.load_weights(tmp_path / "x.weights.h5")
    check_same(new, model)


def test_cloned(kind, model):
    new = kind.keras.models.clone_model(model)
    new.set_weights(model.get_weights())
    check_same(new, model)


@pytest.mark.parametrize("stride", [4, (8, 1)])
def test_configuration(kind, stride):
    layer = kind(stride, min_samples=5, synchronized=True, epsilon=0.1, name="norm")
    config = layer.get_config()
    again = type(layer).from_config(config)
    assert again.get_config() == config
    assert (again.stride, again.min_samples, again.synchronized) == (stride, 5, True)
    assert (again.epsilon, again.name) == (0.1, "norm")


def test_defaults(kind):
    layer = kind()
    assert (layer.stride, layer.synchronized) == (DEFAULT_STRIDE, False)
    assert isinstance(layer, kind.original)


# -------------------------------------------------------------------------------------- dtypes

# Relative to the largest value, of a few roundings.
TOLERANCE = {"mixed_float16": 4e-3, "mixed_bfloat16": 3e-2, "float32": 1e-5, "float64": 1e-12}


def variables(layer):
    """The trainable weights as TensorFlow's variables."""
    if isinstance(layer, keras.layers.Layer):
        return [weight.value for weight in layer.trainable_weights]
    return layer.trainable_weights


def step(layer, x, dy):
    """The output in training and the gradients of the trainable weights."""
    with tf.GradientTape() as tape:
        y = layer(x, training=True)
        loss = tf.reduce_sum(tf.cast(y, tf.float64) * dy)
    return y, tape.gradient(loss, variables(layer))


def check_close(got, expected, tolerance):
    got, expected = (np.asarray(tf.cast(t, tf.float64)).ravel() for t in (got, expected))
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * np.max(np.abs(expected)))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("policy", TOLERANCE)
def test_dtypes(kind, policy, stride):
    """A step of each dtype is close to that of float64, and weights have at least 32 bits."""
    # Values that all dtypes have.
    x, dy = (np.round(numbers((4, 8, 8, 3), i, "float64") * 8) / 8 for i in range(2))
    layer, reference = (kind(stride, dtype=name) for name in (policy, "float64"))
    y, gradients = step(layer, tf.cast(x, policy.removeprefix("mixed_")), dy)
    expected, expected_gradients = step(reference, x, dy)
    assert y.dtype == policy.removeprefix("mixed_")
    wide = "float64" if policy == "float64" else "float32"
    assert {weight.dtype for weight in layer.get_weights()} == {np.dtype(wide)}
    check_close(y, expected, TOLERANCE[policy])
    # Where Bessel's correction is made, float64 is not fused and has none.
    bessel = 256 / stride**2 / (256 / stride**2 - 1) if kind.of == "tf_keras" else 1
    corrected = statistics(reference)
    if policy != "float64":
        corrected[1] = 0.99 + (corrected[1] - 0.99) * bessel
    check_close(statistics(layer), corrected, 1e-5 if policy != "float64" else 1e-12)
    assert len(gradients) == 2
    for gradient, expected in zip(gradients, expected_gradients, strict=True):
        check_close(gradient, expected, 10 * TOLERANCE[policy])


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_a_model_trains_in_16_bits(kind, policy):
    norm = functools.partial(kind, 2, min_samples=1)
    models = [network(kind.keras, norm, dtype) for dtype in (policy, "float32")]
    losses = [
        compiled(model, kind.keras, run_eagerly=True).train_on_batch(*batches(1)[0])
        for model in models
    ]
    np.testing.assert_allclose(*losses, rtol=2e-2)
    np.testing.assert_allclose(*(m.get_weights()[-1] for m in models), rtol=2e-2, atol=1e-3)


# --------------------------------------------------------------------------------------- masks


def masked(shape):
    """Input of rank 3 whose masked places are -1 throughout, and the mask."""
    x = numbers(shape)
    mask = np.random.default_rng(1).random(shape[:2]) < 0.6
    mask[0, 0] = True
    return np.where(mask[..., None], x, np.float32(-1)), mask


@pytest.mark.parametrize("functional", [False, True], ids=["argument", "masking"])
def test_mask_as_the_original(kind, functional):
    x, mask = masked((4, 12, 3))
    norms = kind(1, momentum=MOMENTUM), kind.original(momentum=MOMENTUM)

    def output(norm):
        if not functional:
            return norm(x, training=True, mask=tf.constant(mask))
        inputs = kind.keras.Input((12, 3))
        outputs = norm(kind.keras.layers.Masking(-1.0)(inputs))
        return kind.keras.Model(inputs, outputs)(x, training=True)

    np.testing.assert_allclose(*map(output, norms), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(*map(statistics, norms), rtol=1e-5, atol=1e-5)


def test_mask_and_stride(kind):
    x, mask = masked((4, 12, 3))
    layer = kind(2, min_samples=1, momentum=MOMENTUM)
    layer(x, training=True, mask=tf.constant(mask))
    expected = expected_statistics(x[:, ::2][mask[:, ::2]], -1, bessel=False)
    np.testing.assert_allclose(statistics(layer), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stride", [1, 2])
def test_mask_of_images(kind, stride):
    """tf_keras ignores it, Keras 3 does not."""
    x, mask = images(), np.random.default_rng(1).random((4, 8, 8)) < 0.6
    layer = kind(stride, momentum=MOMENTUM)
    layer(x, training=True, mask=tf.constant(mask))
    counted = mask | (kind.of == "tf_keras")
    sample = x[:, ::stride, ::stride][counted[:, ::stride, ::stride]]
    expected = expected_statistics(sample, -1, bessel=kind.of == "tf_keras")
    np.testing.assert_allclose(statistics(layer), expected, rtol=1e-5, atol=1e-5)


def test_mask_is_handed_on(kind):
    x, mask = masked((4, 12, 3))
    layers = kind.keras.layers
    model = kind.keras.Sequential(
        [kind.keras.Input((12, 3)), layers.Masking(-1.0), kind(2), layers.GlobalAveragePooling1D()]
    )
    expected = [row[counts].mean(0) for row, counts in zip(x, mask, strict=True)]
    np.testing.assert_allclose(model(x), np.array(expected) / np.sqrt(1.001), rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------- strides


@pytest.mark.parametrize(
    ("stride", "min_samples", "shape", "expected"),
    [
        (8, 16, (None, 14, 14, 3), (4, 4)),
        (4, 16, (None, 7, 7, 3), (1, 1)),
        (4, 4, (None, 7, 7, 3), (4, 4)),
        (4, 16, (None, None, None, 3), (4, 4)),
        (4, 16, (None, 1, 1, 3), (1, 1)),
        ((4, 1), 16, (None, 12, 8, 3), (4, 1)),
        (4, 16, (None, 3), ()),
    ],
)
def test_stride_in_use(kind, stride, min_samples, shape, expected):
    layer = kind(stride, min_samples=min_samples)
    layer.build(shape)
    assert layer.strides == expected
    assert layer.stride == stride


def test_a_small_map_is_sampled_with_the_stride_in_use(kind):
    x = numbers((4, 14, 14, 3))
    layer = kind(8, momentum=MOMENTUM)
    layer(x, training=True)
    expected = expected_statistics(x[:, ::4, ::4], -1, bessel=kind.of == "tf_keras")
    np.testing.assert_allclose(statistics(layer), expected, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------- weights


def test_weights_are_trained(kind):
    layer = kind(2, min_samples=1)
    model = compiled(kind.keras.Sequential([layer]), kind.keras, run_eagerly=True)
    model.build((None, 8, 8, 3))
    before = model.get_weights()
    assert [w.shape for w in scale_and_shift(layer)] == (
        [(1, 1, 3, 1), (3,)] if kind.name.startswith("Modified") else [(3,), (3,)]
    )
    assert all(any(w is t for t in model.trainable_weights) for w in scale_and_shift(layer))
    assert len(model.trainable_weights) == len(model.non_trainable_weights) == 2
    model.train_on_batch(images(), images(1))
    assert all(np.all(a != b) for a, b in zip(before, model.get_weights(), strict=True))


@pytest.mark.parametrize(("scale", "center"), [(False, True), (True, False), (False, False)])
def test_without_scale_or_shift(kind, scale, center):
    layer, original = (
        make(scale=scale, center=center, gamma_initializer="zeros", beta_initializer="ones")
        for make in (functools.partial(kind, 1), kind.original)
    )
    outputs = [norm(images(), training=True) for norm in (layer, original)]
    np.testing.assert_allclose(*outputs, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(layer(images()), original(images()), rtol=1e-4, atol=1e-5)
    assert len(layer.trainable_weights) == scale + center
    assert [w is not None for w in scale_and_shift(layer)] == [scale, center]


def test_regularizers(kind):
    l2 = kind.keras.regularizers.L2
    layer = kind(2, gamma_regularizer=l2(0.5), beta_regularizer=l2(2.0), beta_initializer="ones")
    layer(images(), training=True)
    assert sorted(float(loss) for loss in layer.losses) == [1.5, 6]


@pytest.mark.parametrize("constrained", [False, True])
def test_constraints(kind, constrained):
    non_negative = kind.keras.constraints.NonNeg() if constrained else None
    layer = kind(2, gamma_constraint=non_negative, beta_constraint=non_negative)
    model = kind.keras.Sequential([layer])
    compiled(model, kind.keras, rate=10.0, run_eagerly=True)
    model.train_on_batch(images(), -images())
    least = [np.min(w.numpy()) for w in scale_and_shift(layer)]
    assert least == [0, 0] if constrained else max(least) < 0


@pytest.mark.parametrize(
    "options",
    [{"run_eagerly": True}, {"jit_compile": False}, {"jit_compile": True}],
    ids=RUNS,
)
def test_fit(kind, options):
    model = kind.keras.Sequential()
    model.add(kind.keras.Input((8, 8, 3)))
    model.add(kind(2, min_samples=1))
    compiled(model, kind.keras, rate=0.1, **options)
    history = model.fit(images(), images(), batch_size=2, epochs=3, verbose=0)
    losses = history.history["loss"]
    assert losses[2] < losses[0]


# --------------------------------------------------------------------------- second derivatives


def second_derivative(layer, x):
    x = tf.constant(x)
    with tf.GradientTape() as outer:
        outer.watch(x)
        _, gradients = step(layer, x, np.linspace(0, 1, x.shape.num_elements()).reshape(x.shape))
        total = tf.add_n([tf.reduce_sum(gradient**2) for gradient in gradients])
    return total, outer.gradient(total, x)


@pytest.mark.parametrize("stride", [1, 2])
def test_second_derivative_in_float64(kind, stride):
    x = numbers((4, 8, 8, 3), dtype="float64")
    layer = kind(stride, dtype="float64")
    _, derivative = second_derivative(layer, x)
    by = np.zeros_like(x)
    by[0, 0, 0, 0] = 1e-5
    above, below = (second_derivative(layer, x + sign * by)[0] for sign in (1, -1))
    np.testing.assert_allclose(derivative[0, 0, 0, 0], (above - below) / 2e-5, rtol=1e-4)


def test_no_second_derivative_by_kernels(kind):
    """It would be wrong: to the gradients of the kernels, statistics are constants."""
    with pytest.raises(mbn.RewriteError, match=r"no second derivative.*float64"):
        second_derivative(kind(2), images())


# ---------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("stride", [0, -1, 1.5, "2", None, True, (2,), (2, 0), (1, 2, 3)], ids=str)
def test_bad_stride(kind, stride):
    with pytest.raises(mbn.RewriteError, match=r"stride is .*positive whole number"):
        kind(stride)


@pytest.mark.parametrize("min_samples", [0, 2.5])
def test_bad_min_samples(kind, min_samples):
    with pytest.raises(mbn.RewriteError, match=r"min_samples is .*positive whole number"):
        kind(min_samples=min_samples)


def test_no_renorm(kind):
    with pytest.raises(mbn.RewriteError, match=r"has no renorm.*keep BatchNormalization"):
        kind(renorm=True)


@pytest.mark.parametrize(
    ("axis", "shape", "message"),
    [
        (2, (4, 8, 8, 3), "along one axis, 1 or the last"),
        (0, (4, 8, 8, 3), "along one axis, 1 or the last"),
        (-2, (4, 8, 8, 3), "along one axis, 1 or the last"),
        (-1, (2, 2, 2, 2, 2, 2), "rank 2 to 5"),
        (-1, (4,), "rank 2 to 5"),
        (-1, (4, 8, 8, None), "how many channels"),
        (1, (4, None, 8, 8), "how many channels"),
    ],
)
def test_bad_axis_or_shape(kind, axis, shape, message):
    with pytest.raises(mbn.RewriteError, match=f"{kind.name} 'norm'.*{message}"):
        kind(axis=axis, name="norm").build(shape)


@pytest.mark.parametrize("kind", [k for k in KINDS if k.of == "tf_keras"], ids=str)
def test_several_axes(kind):
    with pytest.raises(mbn.RewriteError, match="along one axis"):
        kind(axis=[1, 3]).build((4, 8, 8, 3))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (tf.RaggedTensor.from_tensor, "RaggedTensor.*to_tensor"),
        (tf.sparse.from_dense, "SparseTensor.*to_dense"),
    ],
)
def test_dense_tensors_are_needed(kind, make, message):
    layer = kind()
    layer.build((None, 8, 8, 3))
    with pytest.raises(mbn.RewriteError, match=message):
        layer(make(images()))


# -------------------------------------------------------------------------------- public names


@pytest.mark.parametrize("name", CLASSES)
def test_public_names_give_layers_of_tf_keras(name):
    """Where both Kerases are loaded, too."""
    public = getattr(mbn, name)
    layer = public(2, name="norm")
    assert type(layer) is getattr(tf_keras_layers, name)
    assert isinstance(layer, public)
    assert (layer.stride, layer.name) == (2, "norm")


def test_each_class_is_the_public_one(kind):
    assert isinstance(kind(), getattr(mbn, kind.name))


def test_public_names_give_layers_of_keras_3_where_it_is_alone():
    code = (
        "import keras, sys\n"
        "import mbn_rewrite as mbn\n"
        "for public in (mbn.StridedBatchNormalization, mbn.ModifiedBatchNormalization):\n"
        "    layer = public(2)\n"
        "    assert isinstance(layer, keras.layers.BatchNormalization)\n"
        "    assert isinstance(layer, public)\n"
        "assert 'tf_keras' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("backend", ["numpy", "openvino"])
@pytest.mark.parametrize("kind", [k for k in KINDS if k.of == "keras"], ids=str)
def test_other_backends_are_refused(kind, backend, monkeypatch):
    monkeypatch.setattr(keras.backend, "backend", lambda: backend)
    expected = f"needs Keras 3 on tensorflow, jax or torch; it runs on {backend}. Set KERAS_BACKEND"
    with pytest.raises(mbn.RewriteError, match=expected):
        kind()


def test_a_backend_that_cannot_be_imported_is_refused(monkeypatch):
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    monkeypatch.setitem(sys.modules, "mbn_rewrite.training.jax.sampled_batch_norm", None)
    with pytest.raises(mbn.RewriteError, match="backend jax, whose package cannot be imported"):
        keras_layers.StridedBatchNormalization()


# What runs by stride, at inference and for channels first.
RAN = {
    "StridedBatchNormalization": {
        1: "FusedBatchNormV3, with its own gradient",
        2: "FusedBatchNormV3 of the sample and of everything, FusedBatchNormGradV3, InplaceAdd",
        "inference": "FusedBatchNormV3, by given statistics",
        "channels_first": "arithmetic",
    },
    "ModifiedBatchNormalization": {
        1: "FusedBatchNormV3's statistics and gradient, DepthwiseConv2dNative",
        2: "FusedBatchNormV3 of the sample, DepthwiseConv2dNative, FusedBatchNormGradV3, "
        "InplaceAdd",
        "inference": "FusedBatchNormV3, by given statistics",
        "channels_first": "arithmetic",
    },
}


@pytest.mark.parametrize("how", [1, 2, "inference", "channels_first"])
def test_what_ran_can_be_asked(kind, how):
    first = how == "channels_first"
    layer = kind(how if isinstance(how, int) else 2, axis=1 if first else -1)
    assert layer.implementation is None
    layer(numbers((4, 3, 8, 8)) if first else images(), training=how != "inference")
    assert layer.implementation == RAN[kind.name][how]


@pytest.mark.parametrize("name", CLASSES)
def test_a_public_name_is_no_layer_to_derive_from(name):
    derived = type("Derived", (getattr(mbn, name),), {})
    with pytest.raises(mbn.RewriteError, match="Derived is no layer: derive it from"):
        derived()


def test_deriving_from_a_layer(kind):
    derived = type("Derived", (type(kind()),), {})
    layer = derived(2)
    assert layer(images(), training=True).shape == (4, 8, 8, 3)
    assert type(layer) is derived

"""Small SavedModels of many kinds, with random weights and random statistics.

Each builder writes one to a directory that does not exist yet. Most compute scores of images
by `Network`, and differ in what makes functions, variables and signatures of it.
"""

from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf
import tf_keras
from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

from tests.support.random_models import randomise

v1 = tf.compat.v1

IMAGE = (6, 6, 3)
NORM = ("gamma", "beta", "mean", "variance")
WORDS = ("red", "green", "blue")
EPSILON = 1e-3
COUNTED = 5  # what the state counter holds when it is saved


def image_spec(name="image"):
    return tf.TensorSpec([None, *IMAGE], tf.float32, name)


def kernel(rng, *shape):
    return (rng.standard_normal(shape) / np.sqrt(np.prod(shape[:-1]))).astype(np.float32)


def statistics(rng, channels):
    """gamma, beta, mean and variance of a BatchNormalization; gammas of both signs."""
    gamma = rng.uniform(0.3, 1.5, channels) * np.resize([1, -1], channels)
    arrays = (
        gamma,
        rng.normal(0, 0.5, channels),
        rng.normal(0, 0.5, channels),
        rng.uniform(0.2, 2, channels),
    )
    return [array.astype(np.float32) for array in arrays]


def arithmetic_norm(x, gamma, beta, mean, variance):
    return tf.nn.batch_normalization(x, mean, variance, beta, gamma, EPSILON)


def fused_norm(x, gamma, beta, mean, variance):
    return v1.nn.fused_batch_norm(x, gamma, beta, mean, variance, EPSILON, is_training=False)[0]


class Network(tf.Module):
    """A convolution, its BatchNormalization, ReLU and a dense layer, as plain variables."""

    def __init__(self, channels=4, seed=0):
        super().__init__()
        rng = np.random.default_rng(seed)
        gamma, beta, mean, variance = statistics(rng, channels)
        self.kernel = tf.Variable(kernel(rng, 3, 3, IMAGE[-1], channels), name="kernel")
        self.gamma = tf.Variable(gamma, name="gamma")
        self.beta = tf.Variable(beta, name="beta")
        self.mean = tf.Variable(mean, name="mean", trainable=False)
        self.variance = tf.Variable(variance, name="variance", trainable=False)
        self.weights = tf.Variable(kernel(rng, channels, 2), name="weights")
        self.bias = tf.Variable(kernel(rng, 2), name="bias")

    def convolved(self, image):
        return tf.nn.conv2d(image, self.kernel, 1, "SAME")

    def fused(self, x):
        return fused_norm(x, self.gamma, self.beta, self.mean, self.variance)

    def arithmetic(self, x):
        return arithmetic_norm(x, self.gamma, self.beta, self.mean, self.variance)

    def by_the_batch(self, x):
        return v1.nn.fused_batch_norm(x, self.gamma, self.beta, epsilon=EPSILON)

    def block(self, image):
        return tf.nn.relu(self.fused(self.convolved(image)))

    def scored(self, x):
        return tf.matmul(tf.reduce_mean(x, [1, 2]), self.weights) + self.bias

    def scores(self, image):
        return self.scored(self.block(image))


def save_with_one_signature(directory, module, function):
    """Saves a function of images as the signature that is served by default."""
    module.serve = tf.function(function, input_signature=[image_spec()])
    tf.saved_model.save(module, str(directory), {"serving_default": module.serve})


# ------------------------------------------------------------------------------- Keras


def _tf_keras_model():
    layers = tf_keras.layers
    x = layers.Input(IMAGE, name="image")
    y = layers.ReLU()(layers.BatchNormalization(name="bn")(layers.Conv2D(4, 3)(x)))
    y = layers.Dense(2, name="scores")(layers.GlobalMaxPooling2D()(y))
    model = tf_keras.Model(x, y)
    randomise(model, np.random.default_rng(1))
    model.get_layer("bn").set_weights(statistics(np.random.default_rng(2), 4))
    return model


def tf_keras_functional(directory: Path) -> None:
    _tf_keras_model().save(directory, save_format="tf")


def tf_keras_in_a_module(directory: Path) -> None:
    """Beside the function that is served, those that Keras saves of each layer."""
    root = tf.Module()
    root.model = _tf_keras_model()
    save_with_one_signature(directory, root, lambda image: {"scores": root.model(image)})


@tf_keras.utils.register_keras_serializable("saved_models")
class _Subclassed(tf_keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.conv = tf_keras.layers.Conv2D(4, 3)
        self.norm = tf_keras.layers.BatchNormalization()
        self.dense = tf_keras.layers.Dense(2)

    def call(self, image):
        x = tf.nn.relu(self.norm(self.conv(image)))
        return {"scores": self.dense(tf.reduce_mean(x, [1, 2]))}


def tf_keras_subclassed(directory: Path) -> None:
    model = _Subclassed()
    model(tf.zeros((1, *IMAGE)))
    randomise(model, np.random.default_rng(3))
    model.norm.set_weights(statistics(np.random.default_rng(4), 4))
    model.save(directory, save_format="tf")


def _keras_3_model():
    """Two BatchNormalizations: one folds; the other stays, since its input is read twice."""
    layers = keras.layers
    x = keras.Input(IMAGE, name="image")
    y = layers.ReLU()(layers.BatchNormalization()(layers.Conv2D(4, 3)(x)))
    y = layers.Conv2D(3, 3, padding="same")(y)
    y = layers.Add()([y, layers.ReLU()(layers.BatchNormalization()(y))])
    y = layers.Dense(2, name="scores")(layers.GlobalAveragePooling2D()(y))
    model = keras.Model(x, y)
    randomise_keras_3(model, np.random.default_rng(5))
    return model


def randomise_keras_3(model, rng):
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.set_weights(statistics(rng, layer.gamma.shape[0]))
        else:
            layer.set_weights([kernel(rng, *variable.shape) for variable in layer.weights])


def keras_3_exported(directory: Path) -> None:
    _keras_3_model().export(directory, verbose=False)


def keras_3_saved(directory: Path) -> None:
    tf.saved_model.save(_keras_3_model(), str(directory))


# ---------------------------------------------------------------------------- tf.Module


def module(directory: Path) -> None:
    network = Network()
    save_with_one_signature(directory, network, lambda image: {"scores": network.scores(image)})


def two_signatures(directory: Path) -> None:
    network = Network()
    network.ignored = tf.Variable(tf.ones((5, 5)))
    body = tf.function(network.scores)
    first = tf.function(lambda image: {"scores": body(image)})
    second = tf.function(lambda picture: {"chances": tf.nn.softmax(body(picture))})
    signatures = {
        "serving_default": first.get_concrete_function(image_spec()),
        "chances": second.get_concrete_function(image_spec("picture")),
    }
    tf.saved_model.save(network, str(directory), signatures)


class _Hub(Network):
    @tf.function
    def __call__(self, x, training=False):
        x = self.convolved(x)
        if training:
            x, mean, _ = self.by_the_batch(x)
            self.mean.assign(0.9 * self.mean + 0.1 * mean)
        else:
            x = self.fused(x)
        return self.scored(tf.nn.relu(x))


def hub_module(directory: Path) -> None:
    hub = _Hub()
    for training in (True, False):
        hub.__call__.get_concrete_function(image_spec("x"), training=training)
    signature = tf.function(lambda image: {"scores": hub(image)})
    tf.saved_model.save(hub, str(directory), signature.get_concrete_function(image_spec()))


def nested_functions(directory: Path) -> None:
    network = Network()
    norm = tf.function(network.fused)
    block = tf.function(lambda x: tf.nn.relu(norm(network.convolved(x))))
    body = tf.function(lambda image: network.scored(block(image)))
    save_with_one_signature(directory, network, lambda image: {"scores": body(image)})


def body_called_twice(directory: Path) -> None:
    network = Network(channels=IMAGE[-1])
    block = tf.function(network.block)
    save_with_one_signature(
        directory, network, lambda image: {"scores": network.scored(block(block(image)))}
    )


def two_networks(directory: Path) -> None:
    """Two signatures whose operations have the same names, but not the same variables."""
    root = tf.Module()
    root.networks = [Network(seed=0), Network(seed=1)]
    signatures = {
        name: tf.function(network.scores).get_concrete_function(image_spec())
        for name, network in zip(("left", "right"), root.networks, strict=True)
    }
    tf.saved_model.save(root, str(directory), signatures)


def _frozen(norm):
    network = Network()

    def scores(image):
        return network.scored(tf.nn.relu(getattr(network, norm)(network.convolved(image))))

    concrete = tf.function(scores).get_concrete_function(image_spec())
    frozen = convert_variables_to_constants_v2(concrete)
    return tf.function(lambda image: {"scores": frozen(image)[0]}, input_signature=[image_spec()])


def frozen_fused(directory: Path) -> None:
    tf.saved_model.save(tf.Module(), str(directory), {"serving_default": _frozen("fused")})


def frozen_arithmetic(directory: Path) -> None:
    tf.saved_model.save(tf.Module(), str(directory), {"serving_default": _frozen("arithmetic")})


def frozen_twice(directory: Path) -> None:
    """Two signatures with constants of their own."""
    signatures = {"fused": _frozen("fused"), "arithmetic": _frozen("arithmetic")}
    tf.saved_model.save(tf.Module(), str(directory), signatures)


@contextmanager
def _words_in_a_file(directory):
    """Gives the path of the words, one in a line, while the block lasts."""
    file = directory.with_name("words.txt")
    file.write_text("\n".join(WORDS))
    try:
        yield str(file)
    finally:
        file.unlink()


def _chances(numbers, embedding, weights, norm):
    x = tf.matmul(tf.reduce_mean(tf.gather(embedding, numbers), 1), weights)
    return tf.nn.softmax(arithmetic_norm(x, *norm))


def vocabulary(directory: Path) -> None:
    """Words in, the word of the highest score out."""
    rng = np.random.default_rng(6)
    root = tf.Module()
    root.embedding = tf.Variable(kernel(rng, len(WORDS) + 2, 4))
    root.weights = tf.Variable(kernel(rng, 4, len(WORDS)))
    root.norm = [tf.Variable(array) for array in statistics(rng, len(WORDS))]
    line, number = tf.lookup.TextFileIndex.WHOLE_LINE, tf.lookup.TextFileIndex.LINE_NUMBER

    @tf.function(input_signature=[tf.TensorSpec([None, 5], tf.string, "text")])
    def answer(text):
        chances = _chances(root.numbers.lookup(text), root.embedding, root.weights, root.norm)
        return {"chances": chances, "word": root.words.lookup(tf.argmax(chances, -1))}

    with _words_in_a_file(directory) as file:
        to_number = tf.lookup.TextFileInitializer(file, tf.string, line, tf.int64, number)
        to_word = tf.lookup.TextFileInitializer(file, tf.int64, number, tf.string, line)
        root.numbers = tf.lookup.StaticVocabularyTable(to_number, num_oov_buckets=2)
        root.words = tf.lookup.StaticHashTable(to_word, "unknown")
        root.answer = answer
        tf.saved_model.save(root, str(directory), {"serving_default": answer})


def counter(directory: Path) -> None:
    network = Network()
    network.calls = tf.Variable(COUNTED, name="calls", trainable=False)

    def serve(image):
        return {"scores": network.scores(image), "calls": network.calls.assign_add(1)}

    save_with_one_signature(directory, network, serve)


# ------------------------------------------------------------------------- TensorFlow 1


def save_tf1(directory, norm, use_resource=True, tags=("serve",), method_name=None):
    """Saves a graph with a session, as TensorFlow 1 did.

    Args:
        directory: where to.
        norm: gives the normalised tensor for a tensor, gamma, beta, mean and variance.
        use_resource: whether variables are resources, or nodes of the graph.
        tags: of the graph.
        method_name: of the signature.
    """
    with tf.Graph().as_default():
        rng = np.random.default_rng(7)

        def variable(name, array):
            return v1.get_variable(name, initializer=array, use_resource=use_resource)

        image = v1.placeholder(tf.float32, [None, *IMAGE], "image")
        x = tf.nn.conv2d(image, variable("kernel", kernel(rng, 3, 3, 3, 4)), 1, "SAME")
        x = tf.nn.relu(norm(x, *map(variable, NORM, statistics(rng, 4))))
        scores = tf.matmul(tf.reduce_mean(x, [1, 2]), variable("weights", kernel(rng, 4, 2)))
        save_graph(directory, {"image": image}, {"scores": scores}, tags, method_name)


def save_graph(directory, inputs, outputs, tags=("serve",), method_name=None):
    """Saves the graph that is being built, with its assets and tables."""
    signature = v1.saved_model.build_signature_def(
        {name: v1.saved_model.build_tensor_info(tensor) for name, tensor in inputs.items()},
        {name: v1.saved_model.build_tensor_info(tensor) for name, tensor in outputs.items()},
        method_name or v1.saved_model.PREDICT_METHOD_NAME,
    )
    with v1.Session() as session:
        session.run(v1.global_variables_initializer())
        builder = v1.saved_model.Builder(str(directory))
        builder.add_meta_graph_and_variables(
            session,
            tags,
            {"serving_default": signature},
            assets_collection=v1.get_collection(v1.GraphKeys.ASSET_FILEPATHS),
            main_op=v1.tables_initializer(),
        )
        builder.save()


def tf1_resource_variables(directory: Path) -> None:
    save_tf1(directory, arithmetic_norm)


def tf1_reference_variables(directory: Path) -> None:
    save_tf1(directory, fused_norm, use_resource=False)


def tf1_training_switch(directory: Path) -> None:
    """The BatchNormalization asks a placeholder whether to normalise by the batch."""

    def norm(x, gamma, beta, mean, variance):
        return v1.cond(
            v1.placeholder_with_default(False, [], "is_training"),
            lambda: v1.nn.fused_batch_norm(x, gamma, beta, epsilon=EPSILON)[0],
            lambda: fused_norm(x, gamma, beta, mean, variance),
        )

    v1.disable_control_flow_v2()
    try:
        save_tf1(directory, norm)
    finally:
        v1.enable_control_flow_v2()


def tf1_vocabulary(directory: Path) -> None:
    """A table that is filled from an asset when the model is loaded."""
    rng = np.random.default_rng(8)
    with tf.Graph().as_default(), _words_in_a_file(directory) as file:
        text = v1.placeholder(tf.string, [None, 5], "text")
        line, number = tf.lookup.TextFileIndex.WHOLE_LINE, tf.lookup.TextFileIndex.LINE_NUMBER
        to_number = tf.lookup.TextFileInitializer(file, tf.string, line, tf.int64, number)
        numbers = tf.lookup.StaticHashTable(to_number, 3).lookup(text)
        embedding = v1.get_variable("embedding", initializer=kernel(rng, 4, 4))
        weights = v1.get_variable("weights", initializer=kernel(rng, 4, 3))
        norm = [
            v1.get_variable(name, initializer=array)
            for name, array in zip(NORM, statistics(rng, 3), strict=True)
        ]
        save_graph(
            directory, {"text": text}, {"chances": _chances(numbers, embedding, weights, norm)}
        )


# ---------------------------------------------------------------------------- the kinds


class Kind(NamedTuple):
    """A kind of SavedModel.

    Attributes:
        build: writes one to a directory.
        norms: how many BatchNormalizations it has.
        left: how many of them mode "fold" leaves.
    """

    build: Callable[[Path], None]
    norms: int
    left: int


KINDS = {
    "tf_keras": Kind(tf_keras_functional, 1, 0),
    "tf_keras_subclassed": Kind(tf_keras_subclassed, 1, 0),
    "tf_keras_in_a_module": Kind(tf_keras_in_a_module, 1, 0),
    "keras_3_exported": Kind(keras_3_exported, 2, 1),
    "keras_3_saved": Kind(keras_3_saved, 2, 1),
    "module": Kind(module, 1, 0),
    "two_signatures": Kind(two_signatures, 1, 0),
    "two_networks": Kind(two_networks, 2, 0),
    "hub_module": Kind(hub_module, 1, 0),
    "nested_functions": Kind(nested_functions, 1, 0),
    "body_called_twice": Kind(body_called_twice, 1, 0),
    "tf1_resource_variables": Kind(tf1_resource_variables, 1, 0),
    "tf1_reference_variables": Kind(tf1_reference_variables, 1, 0),
    "tf1_training_switch": Kind(tf1_training_switch, 1, 0),
    "tf1_vocabulary": Kind(tf1_vocabulary, 1, 0),
    "frozen_fused": Kind(frozen_fused, 1, 0),
    "frozen_arithmetic": Kind(frozen_arithmetic, 1, 0),
    "frozen_twice": Kind(frozen_twice, 2, 0),
    "vocabulary": Kind(vocabulary, 1, 0),
    "counter": Kind(counter, 1, 0),
}

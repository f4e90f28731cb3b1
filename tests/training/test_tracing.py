"""Who will run what is being traced."""

import tensorflow as tf

from mbn_rewrite.training.tensorflow.xla import will_be_compiled


def seen_in(jit_compile, body=will_be_compiled):
    """What `will_be_compiled` says inside a function."""
    said = []

    @tf.function(jit_compile=jit_compile, autograph=False)
    def function(x):
        said.append(body())
        return x

    function(tf.zeros([]))
    return said[-1]


def test_eagerly():
    assert not will_be_compiled()


def test_functions():
    assert seen_in(True)
    assert not seen_in(False)
    assert not seen_in(None)


def test_functions_in_functions():
    assert seen_in(True, lambda: seen_in(None))
    assert seen_in(None, lambda: seen_in(True))
    assert not seen_in(None, lambda: seen_in(None))


def test_gradients():
    """The gradient of a compiled function is traced when it is called under a tape."""
    said = []

    @tf.custom_gradient
    def identity(x):
        def gradient(dy):
            said.append(will_be_compiled())
            return dy

        return tf.identity(x), gradient

    x = tf.Variable(1.0)
    with tf.GradientTape() as tape:
        y = tf.function(lambda: identity(x) * 2.0, jit_compile=True)()
    assert tape.gradient(y, x) == 2.0
    assert all(said)
    assert said

"""What is quoted of errors of frameworks: all that went wrong, and nothing else."""

import numpy as np
import pytest
import tensorflow as tf

from mbn_rewrite.errors import cause_of
from tests.support.kerases import K, Model


def cause(function):
    with pytest.raises(Exception) as raised:  # noqa: PT011
        function()
    said = cause_of(raised.value)
    assert "\x1b" not in said
    assert "\n" not in said
    assert said.endswith(".")
    assert not said.endswith("..")
    return said


# ------------------------------------------------------------------------ errors as they come


def test_shapes_that_were_received(each_keras):
    def add():
        return K.Add()([np.ones((2, 4, 3), "float32"), np.ones((2, 4, 2), "float32")])

    assert cause(add) == ("Inputs have incompatible shapes. Received shapes (4, 3) and (4, 2).")
    many = [np.ones((2, 4, 3 + i), "float32") for i in range(12)]
    many[1] = np.ones((2, 5, 4), "float32")
    said = cause(lambda: K.Concatenate()(many))
    assert said.startswith("A `Concatenate` layer requires inputs with matching shapes")
    assert said.endswith("(2, 4, 14)].")


def test_an_operation_within_a_layer(each_keras):
    layer = K.Lambda(lambda x: tf.matmul(x, tf.ones((9, 9))))
    assert cause(lambda: layer(tf.ones((2, 3)))) == (
        "Matrix size-incompatible: In[0]: [2,3], In[1]: [9,9]."
    )


def test_an_operation_within_a_graph(each_keras):
    x = K.Input((4,))
    size = tf.Variable(5)
    layer = K.Lambda(lambda x: tf.matmul(x, tf.ones((size, 2))), output_shape=(2,))
    model = Model(x, layer(x))
    said = cause(lambda: model.predict(np.ones((2, 4), "float32"), verbose=0))
    assert said == "Matrix size-incompatible: In[0]: [2,4], In[1]: [5,2]."


def test_an_operation_within_traced_code():
    said = cause(lambda: tf.function(lambda x: tf.reshape(x, [3]))(tf.ones(2)))
    # The kind of error comes first where AutoGraph could read the function.
    said = said.removeprefix("ValueError: ")
    assert said.startswith("Cannot reshape a tensor with 2 elements to shape [3]")
    assert "lambda" not in said
    assert "File" not in said


def test_a_class_that_cannot_be_made(each_keras):
    class Odd(K.Layer):
        def __init__(self, units, **kwargs):
            super().__init__(**kwargs)

        def get_config(self):
            return {**super().get_config(), "numbers": list(range(500))}

    said = cause(lambda: Odd.from_config(Odd(2).get_config()))
    assert said.endswith("missing 1 required positional argument: 'units'.")
    assert "499" not in said


def test_weights_that_do_not_fit(each_keras, tmp_path):
    x = K.Input((4,))
    path = str(tmp_path / "w.weights.h5")
    Model(x, K.Dense(2)(x)).save_weights(path)
    model = Model(x, K.BatchNormalization(name="bn")(x))
    said = cause(lambda: model.load_weights(path))
    assert "Layer 'bn' expected 4 variables, but received 0 variables" in said
    assert "moving_variance" in said


# ---------------------------------------------------------------------------------- made up


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "ValueError."),
        ("\n \n", "ValueError."),
        ("it failed.", "it failed."),
        ("\x1b[1;31mbad\x1b[0m \x1b[4mshape\x1b[24m", "bad shape."),
        ("Two things:\n  1. the first\n  2. the second", "Two things: 1. the first 2. the second."),
        (
            "Exception encountered when calling Add.call().",
            "Exception encountered when calling Add.call().",
        ),
        (
            "Exception encountered when calling X.call().\n\n\x1b[1mcould not\nbroadcast\x1b[0m\n\n"
            "Arguments received by X.call():\n  • inputs=3\n  • mask=None",
            "could not broadcast.",
        ),
        (
            'Traceback (most recent call last):\n  File "a.py", line 1, in f\n    g(x)\n'
            "KeyError: 'units'",
            "KeyError: 'units'.",
        ),
        ("write failed: No space left on device [Op:SaveV2]", "No space left on device."),
    ],
)  # fmt: skip
def test_forms(text, expected):
    assert cause_of(ValueError(text)) == expected


def test_long_values_lose_their_middle_and_the_cause_stays():
    shapes = [(None, i, i, 64) for i in range(300)]
    said = cause_of(ValueError(f"Shapes differ: Received shapes {shapes}, of which 7 is odd"))
    assert said.startswith("Shapes differ: Received shapes [(None, 0, 0, 64), ")
    assert said.endswith("(None, 299, 299, 64)], of which 7 is odd.")
    assert len(said) < 600
    assert len(cause_of(ValueError("word " * 5000 + "the end"))) < 2100
    assert cause_of(ValueError("word " * 5000 + "the end")).endswith("the end.")


def test_brackets_that_do_not_match():
    assert cause_of(ValueError("expected ) or ] but got ([{")) == "expected ) or ] but got ([{."

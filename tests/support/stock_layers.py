"""One instance of every stock layer class of either Keras, with options that are not the default.

What a class takes beside its required arguments is found in its signature, so that a new option
of a known name is tried too.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import tf_keras

from tests.support import kerases
from tests.support.kerases import K

FEATURES, SEQUENCE, IMAGE, VOLUME = (8,), (6, 4), (8, 8, 3), (6, 6, 6, 2)
_MOVIE_1D, _MOVIE_2D, _MOVIE_3D = (3, 8, 2), (3, 6, 6, 2), (2, 4, 4, 4, 2)


def bent(x):
    """An activation that no Keras knows by its name."""
    return x * x * 0.25


def odd_weights(shape, dtype=None, **options):
    """An initializer that no Keras knows by its name."""
    return kerases.package().initializers.Constant(0.4)(shape, dtype)


def odd_penalty(weights):
    """A regularizer that no Keras knows by its name."""
    return 0.001 * weights * weights


def odd_bound(weights):
    """A constraint that no Keras knows by its name."""
    return weights * 1.0


def halved(x, by):
    return x[..., ::by]


def half_of(shape):
    return (*shape[:-1], shape[-1] // 2)


def no_mask(inputs, mask=None):
    return None


def _cell_class() -> type:
    """A class of cells of one's own, for the Keras in use."""
    base = K.SimpleRNNCell
    if base not in _CELLS:
        _CELLS[base] = type("OwnCell", (base,), {})
    return _CELLS[base]


_CELLS: dict[type, type] = {}

# Classes of which no instance can stand in a model of its own, and why.
NO_LAYER = {
    "Layer": "the base of all",
    "Wrapper": "the base of wrappers",
    "AbstractRNNCell": "the base of cells",
    "InputLayer": "is in every model",
    "LSTMCell": "is in RNN",
    "GRUCell": "is in RNN",
    "SimpleRNNCell": "is in RNN",
    "StackedRNNCells": "is in RNN",
    "DenseFeatures": "takes feature columns, of which TensorFlow 1 is the last user",
    "JaxLayer": "needs the backend of JAX, or jax2tf",
    "FlaxLayer": "needs Flax",
    "TorchModuleWrapper": "needs PyTorch",
    "TFSMLayer": "loads a SavedModel",
    "Pipeline": "cannot be in a Functional model",
    "Equalization": "cannot be in a Functional model, which it takes for one with a cycle",
    "MaxNumBoundingBoxes": "takes dictionaries of boxes",
}

_NO_LAYER_IN_TF_KERAS = {"SpectralNormalization": "takes Keras 3, where it is, for tf_keras"}

Made = tuple[Any, Any]  # a layer, and what it is called with


def made(name: str) -> Made:
    """A layer of a class, and the inputs that it is called with."""
    entry = _TABLE.get(name, ((),))
    if callable(entry):
        # Bidirectional looks names up when it is made; what copies it must not need to.
        known = (bent, odd_weights, odd_penalty, odd_bound, _cell_class())
        scope = kerases.package().utils.custom_object_scope
        with scope({each.__name__: each for each in known}):
            return entry()
    arguments, *shapes = entry
    kind = getattr(K, name)
    layer = kind(*arguments, **_options(kind, len(arguments)))
    inputs = [K.Input(shape) for shape in shapes or [_shape_for(name)]]
    return layer, inputs[0] if len(inputs) == 1 else inputs


def nested() -> list[str]:
    """What else is in the table: layers that hold layers, and other kinds of functions."""
    return [name for name in _TABLE if " " in name]


def names() -> list[str]:
    """The names of all stock layer classes of the Keras in use, but for those that are no use."""
    layers = kerases.package().layers
    found: dict[type, str] = {}
    for name in dir(layers):
        kind = getattr(layers, name)
        if isinstance(kind, type) and issubclass(kind, layers.Layer):
            found.setdefault(kind, name)
    left_out = NO_LAYER if layers is not tf_keras.layers else {**NO_LAYER, **_NO_LAYER_IN_TF_KERAS}
    return sorted(name for name in found.values() if name not in left_out)


def _shape_for(name: str) -> tuple[int, ...]:
    rank = {"1D": SEQUENCE, "2D": IMAGE, "3D": VOLUME}
    return next((shape for part, shape in rank.items() if part in name), IMAGE)


def _options(kind: type, skip: int) -> dict[str, Any]:
    """Options that are not the default, for parameters whose names say what they take."""
    parameters = list(inspect.signature(kind.__init__).parameters)[1 + skip :]
    return {name: _option(name) for name in parameters if _option(name) is not None}


def _option(name: str) -> Any:
    package = kerases.package()
    if name in ("activation", "recurrent_activation"):
        return bent
    if name in ("kernel_initializer", "gamma_initializer", "depthwise_initializer"):
        return odd_weights
    if name.endswith("_initializer"):
        return package.initializers.Constant(0.3)
    if name in ("kernel_regularizer", "beta_regularizer"):
        return odd_penalty
    if name.endswith("_regularizer"):
        return package.regularizers.L1L2(0.01, 0.02)
    if name in ("kernel_constraint", "gamma_constraint"):
        return odd_bound
    if name.endswith("_constraint"):
        return package.constraints.MaxNorm(3.0)
    return {"epsilon": 0.25, "momentum": 0.5, "seed": 7}.get(name)


def _recurrent(kind: str) -> Any:
    return getattr(K, kind)(3, **_options(getattr(K, kind), 1))


def _cells() -> list[Any]:
    return [_recurrent("GRUCell"), _recurrent("LSTMCell"), _recurrent("SimpleRNNCell")]


def _wrapped(make: Callable[[], Any], shape: tuple[int, ...]) -> Callable[[], Made]:
    return lambda: (make(), K.Input(shape))


def _adapted(name: str, data: Any, *arguments: Any, **options: Any) -> Callable[[], Made]:
    def make() -> Made:
        layer = getattr(K, name)(*arguments, **options)
        array = np.asarray(data)
        layer.adapt(array)
        kind = {"U": "string", "i": "int64", "f": "float32"}[array.dtype.kind]
        return layer, K.Input(array.shape[1:] or (1,), dtype=kind)

    return make


def _integers(name: str, *arguments: Any, **options: Any) -> Callable[[], Made]:
    return lambda: (
        getattr(K, name)(*arguments, **options, **_options(getattr(K, name), len(arguments))),
        K.Input((5,), dtype="int64"),
    )


def _attention(name: str, *arguments: Any) -> Callable[[], Made]:
    def make() -> Made:
        kind = getattr(K, name)
        options = _options(kind, len(arguments))
        # Which it makes again, of their configuration.
        options["kernel_initializer"] = kerases.package().initializers.Constant(0.2)
        layer, x = kind(*arguments, **options), K.Input(SEQUENCE)
        return _Twice(layer), x

    return make


class _Twice:
    """A layer that is called with its input twice, query and value."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    def __call__(self, x: Any) -> Any:
        return self.layer(x, x)


# Arguments that a class needs and, where its name does not say it, the shapes of its inputs; or a
# function that gives both.
_TABLE: dict[str, Any] = {
    "Activation": ((bent,), FEATURES),
    "AdaptiveAveragePooling1D": ((2,), SEQUENCE),
    "AdaptiveAveragePooling2D": ((2,), IMAGE),
    "AdaptiveAveragePooling3D": ((2,), VOLUME),
    "AdaptiveMaxPooling1D": ((2,), SEQUENCE),
    "AdaptiveMaxPooling2D": ((2,), IMAGE),
    "AdaptiveMaxPooling3D": ((2,), VOLUME),
    "ActivityRegularization": ((0.1, 0.2), FEATURES),
    "AdditiveAttention": ((), SEQUENCE, SEQUENCE),
    "AlphaDropout": ((0.3,), FEATURES),
    "Attention": ((), SEQUENCE, SEQUENCE),
    "Bidirectional": _wrapped(
        lambda: K.Bidirectional(
            _recurrent("LSTM"),
            merge_mode="sum",
            backward_layer=K.LSTM(3, activation=bent, go_backwards=True),
        ),
        SEQUENCE,
    ),
    "AveragePooling1D": ((2,), SEQUENCE),
    "AveragePooling2D": ((2,), IMAGE),
    "AveragePooling3D": ((2,), VOLUME),
    "CategoryEncoding": _integers("CategoryEncoding", 9, output_mode="multi_hot"),
    "CenterCrop": ((4, 5), IMAGE),
    "Conv1D": ((4, 3), SEQUENCE),
    "Conv1DTranspose": ((4, 3), SEQUENCE),
    "Conv2D": ((4, 3), IMAGE),
    "Conv2DTranspose": ((4, 3), IMAGE),
    "Conv3D": ((4, 3), VOLUME),
    "Conv3DTranspose": ((4, 3), VOLUME),
    "ConvLSTM1D": ((2, 3), _MOVIE_1D),
    "ConvLSTM2D": ((2, 3), _MOVIE_2D),
    "ConvLSTM3D": ((2, 3), _MOVIE_3D),
    "Dense": ((5,), FEATURES),
    "DepthwiseConv1D": ((3,), SEQUENCE),
    "DepthwiseConv2D": ((3,), IMAGE),
    "Discretization": _adapted("Discretization", [[1.0], [2.0], [5.0], [9.0]], num_bins=3),
    "Dot": ((1,), SEQUENCE, SEQUENCE),
    "Dropout": ((0.3,), FEATURES),
    "EinsumDense": (("abc,cd->abd", (None, 5)), SEQUENCE),
    "Embedding": _integers("Embedding", 9, 4, mask_zero=True),
    "GaussianDropout": ((0.3,), FEATURES),
    "GaussianNoise": ((0.3,), FEATURES),
    "GroupNormalization": ((2,), (6, 4)),
    "GroupQueryAttention": _attention("GroupQueryAttention", 4, 4, 2),
    "GRU": ((3,), SEQUENCE),
    "HashedCrossing": lambda: (
        K.HashedCrossing(5),
        [K.Input((1,), dtype="int64"), K.Input((1,), dtype="int64")],
    ),
    "Hashing": _integers("Hashing", 7),
    "IntegerLookup": _adapted("IntegerLookup", [[5], [6], [7]]),
    "Lambda": ((bent,), FEATURES),
    "LocallyConnected1D": ((4, 3), SEQUENCE),
    "LocallyConnected2D": ((4, 3), IMAGE),
    "LSTM": ((3,), SEQUENCE),
    "Masking": ((0.5,), SEQUENCE),
    "MelSpectrogram": ((), (2048,)),
    "MultiHeadAttention": _attention("MultiHeadAttention", 2, 3),
    "Normalization": _adapted("Normalization", np.float32([[1, 2], [3, 5]])),
    "Permute": (((2, 1),), SEQUENCE),
    "RandomCrop": ((4, 5), IMAGE),
    "RandomBrightness": ((0.1,), IMAGE),
    "RandomColorDegeneration": ((0.1,), IMAGE),
    "RandomContrast": ((0.1,), IMAGE),
    "RandomFlip": (("vertical",), IMAGE),
    "RandomHeight": ((0.1,), IMAGE),
    "RandomHue": ((0.1,), IMAGE),
    "RandomPosterization": ((4,), IMAGE),
    "RandomRotation": ((0.1,), IMAGE),
    "RandomSaturation": ((0.1,), IMAGE),
    "RandomSharpness": ((0.1,), IMAGE),
    "RandomTranslation": ((0.1, 0.2), IMAGE),
    "RandomWidth": ((0.1,), IMAGE),
    "RandomZoom": ((0.1,), IMAGE),
    "RepeatVector": ((3,), FEATURES),
    "Rescaling": ((0.5, -1.0), IMAGE),
    "Reshape": (((4, 2),), FEATURES),
    "Resizing": ((4, 5), IMAGE),
    "ReversibleEmbedding": _integers("ReversibleEmbedding", 9, 4),
    "RNN": _wrapped(lambda: K.RNN(K.StackedRNNCells(_cells()), return_sequences=True), SEQUENCE),
    "SeparableConv1D": ((4, 3), SEQUENCE),
    "SeparableConv2D": ((4, 3), IMAGE),
    "SimpleRNN": ((3,), SEQUENCE),
    "SpatialDropout1D": ((0.3,), SEQUENCE),
    "SpatialDropout2D": ((0.3,), IMAGE),
    "SpatialDropout3D": ((0.3,), VOLUME),
    "SpectralNormalization": _wrapped(
        lambda: K.SpectralNormalization(K.Dense(5, **_options(K.Dense, 1)), power_iterations=2),
        FEATURES,
    ),
    "STFTSpectrogram": ((), (2048, 1)),
    "StringLookup": _adapted("StringLookup", [["a"], ["b"]]),
    "TextVectorization": _adapted("TextVectorization", ["a b", "b c"], output_sequence_length=4),
    "ThresholdedReLU": ((0.5,), FEATURES),
    "TimeDistributed": _wrapped(
        lambda: K.TimeDistributed(K.Dense(5, **_options(K.Dense, 1))), SEQUENCE
    ),
    **dict.fromkeys(
        ("Add", "Average", "Concatenate", "Maximum", "Minimum", "Multiply", "Subtract"),
        ((), FEATURES, FEATURES),
    ),
    # Nested, and with functions of other kinds.
    "Bidirectional of stacked cells": _wrapped(
        lambda: K.Bidirectional(K.RNN(K.StackedRNNCells(_cells()), return_sequences=True)),
        SEQUENCE,
    ),
    "Bidirectional of a cell of one's own": _wrapped(
        lambda: K.Bidirectional(K.RNN(_cell_class()(3, activation=bent))), SEQUENCE
    ),
    "TimeDistributed Bidirectional": _wrapped(
        lambda: K.TimeDistributed(K.Bidirectional(_recurrent("GRU"))), (2, *SEQUENCE)
    ),
    "TimeDistributed model": _wrapped(
        lambda: K.TimeDistributed(
            kerases.package().Sequential(
                [
                    K.Input((4,)),
                    K.Dense(5, **_options(K.Dense, 1)),
                    K.Dense(2, activation=K.LeakyReLU()),
                ]
            )
        ),
        SEQUENCE,
    ),
    "TimeDistributed Lambda": _wrapped(lambda: K.TimeDistributed(K.Lambda(bent)), SEQUENCE),
    "Lambda with all its functions": _wrapped(
        lambda: K.Lambda(halved, output_shape=half_of, mask=no_mask, arguments={"by": 2}), SEQUENCE
    ),
    "Lambda of a lambda": _wrapped(lambda: K.Lambda(lambda x: x * 3), SEQUENCE),
    "Dense with an activation that is a layer": _wrapped(
        lambda: K.Dense(5, activation=K.PReLU(alpha_initializer=odd_weights)), FEATURES
    ),
    "Dense with an activation by name": _wrapped(lambda: K.Dense(5, activation="elu"), FEATURES),
    "Bidirectional of mixed precision": _wrapped(
        lambda: K.Bidirectional(K.LSTM(3, activation=bent, dtype="mixed_float16")), SEQUENCE
    ),
    "TimeDistributed of another dtype": _wrapped(
        lambda: K.TimeDistributed(K.Dense(3, dtype="float64"), dtype="float64"), SEQUENCE
    ),
    "frozen Bidirectional": _wrapped(
        lambda: K.Bidirectional(K.GRU(3, bias_initializer="ones"), trainable=False), SEQUENCE
    ),
}

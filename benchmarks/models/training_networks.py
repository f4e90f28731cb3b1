"""Networks as people train them, with the BatchNormalization of a variant in them.

ResNet9 is that of the DAWNBench entries for CIFAR-10, in the sizes of the study Modified Batch
Normalization (64, 128, 256 and 256 channels, logits times 0.2); ResNet50 is that of the
`applications` of each Keras (He et al., 2015). A variant is named as on a command line:

    original     the BatchNormalization of that Keras
    stridedS     StridedBatchNormalization with stride S
    mbnS         ModifiedBatchNormalization with stride S
    none         no BatchNormalization at all: what everything else costs
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import mbn_rewrite as mbn
from benchmarks.models.floor import without_batch_norm
from mbn_rewrite.errors import RewriteError

MOMENTUM, EPSILON = 0.9, 1e-5  # of ResNet9's BatchNormalization, as in the study
LOGIT_SCALE = 0.2  # likewise
KERAS = ("tf_keras", "keras_3")
_VARIANT = re.compile(r"(original|none)|(strided|mbn)([1-9]\d*)")


def check_variant(variant: str) -> tuple[str, int | None]:
    """The mode and the stride of a variant; a stride of None where it has none.

    Raises:
        RewriteError: there is no such variant.
    """
    found = _VARIANT.fullmatch(variant)
    if not found:
        raise RewriteError(
            f"there is no variant {variant!r}. There are original, none, and strided and mbn with "
            "a stride behind them, such as strided4"
        )
    plain, mode, stride = found.groups()
    return (plain, None) if plain else (mode, int(stride))


def resnet9(keras: Any, variant: str, classes: int = 10, size: int = 32, width: float = 1.0) -> Any:
    """ResNet9 for images of `size` x `size` x 3, with channels times `width`.

    Args:
        keras: the package, tf_keras or keras.
        variant: see the module's docstring.
    """
    layers = keras.layers
    regular = variant != "none"

    def block(x: Any, name: str, channels: int, pool: bool = False) -> Any:
        x = layers.Conv2D(
            max(1, round(channels * width)),
            3,
            padding="same",
            use_bias=not regular,
            kernel_initializer="he_normal",
            name=f"{name}_conv",
        )(x)
        if regular:
            norm = layers.BatchNormalization(momentum=MOMENTUM, epsilon=EPSILON, name=f"{name}_bn")
            x = norm(x)
        x = layers.ReLU(name=f"{name}_relu")(x)
        return layers.MaxPooling2D(name=f"{name}_pool")(x) if pool else x

    def residual(x: Any, name: str, channels: int) -> Any:
        inner = block(block(x, f"{name}_res1", channels), f"{name}_res2", channels)
        return layers.Add(name=f"{name}_add")([x, inner])

    inputs = keras.Input((size, size, 3))
    x = block(inputs, "prep", 64)
    x = residual(block(x, "layer1", 128, pool=True), "layer1", 128)
    x = block(x, "layer2", 256, pool=True)
    x = residual(block(x, "layer3", 256, pool=True), "layer3", 256)
    x = layers.GlobalMaxPooling2D()(x)
    x = layers.Dense(classes, use_bias=False)(x)
    x = layers.Rescaling(LOGIT_SCALE, dtype="float32")(x)
    return varied(keras.Model(inputs, x, name="resnet9"), variant)


def resnet50(keras: Any, variant: str, classes: int = 1000, size: int = 224) -> Any:
    """ResNet50 for images of `size` x `size` x 3; gives logits."""
    model = keras.applications.ResNet50(
        weights=None, classes=classes, input_shape=(size, size, 3), classifier_activation=None
    )
    return varied(model, variant)


NETWORKS: dict[str, Callable[..., Any]] = {"ResNet9": resnet9, "ResNet50": resnet50}


def varied(model: Any, variant: str) -> Any:
    """A model with the BatchNormalization of a variant, and with the weights that it had."""
    mode, stride = check_variant(variant)
    if mode == "original":
        return model
    if mode == "none":
        return without_batch_norm(model)
    return mbn.convert(model, mode=mode, stride=stride)

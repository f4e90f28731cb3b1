"""Networks of kinds that `applications` lacks: parallel branches, wide pre-activation blocks."""

from __future__ import annotations

from typing import Any

# Ding et al., "RepVGG: Making VGG-style ConvNets Great Again" (2021), table 2: A0.
_STAGES = ((1, 48), (2, 48), (4, 96), (14, 192), (1, 1280))


def rep_vgg(keras: Any, size: int) -> Any:
    """RepVGG-A0 as it is trained: a 3x3, a 1x1 and, where shapes allow, an identity branch."""
    layers = keras.layers
    image = keras.Input((size, size, 3))
    x = image
    for count, width in _STAGES:
        for block in range(count):
            stride = 1 if block else 2
            branches = [
                layers.BatchNormalization()(
                    layers.Conv2D(width, window, stride, padding="same", use_bias=False)(x)
                )
                for window in (3, 1)
            ]
            if stride == 1 and x.shape[-1] == width:
                branches.append(layers.BatchNormalization()(x))
            x = layers.ReLU()(layers.Add()(branches))
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(image, layers.Dense(1000)(x))


def wide_resnet(keras: Any, size: int) -> Any:
    """WRN-16-4: pre-activation blocks of 3x3 convolutions that pad with zeros.

    Zagoruyko and Komodakis, "Wide Residual Networks" (2016).
    """
    layers = keras.layers

    def conv(x: Any, width: int, window: int = 3, stride: int = 1) -> Any:
        return layers.Conv2D(width, window, stride, padding="same", use_bias=False)(x)

    def activated(x: Any) -> Any:
        return layers.ReLU()(layers.BatchNormalization()(x))

    image = keras.Input((size, size, 3))
    x = conv(image, 16)
    for stage, width in enumerate((64, 128, 256)):
        for block in range(2):
            stride = 2 if stage and not block else 1
            y = activated(x)
            shortcut = x if block else conv(y, width, 1, stride)
            x = layers.Add()([shortcut, conv(activated(conv(y, width, 3, stride)), width)])
    x = layers.GlobalAveragePooling2D()(activated(x))
    return keras.Model(image, layers.Dense(10)(x))


OWN_NETWORKS = {"RepVGG-A0": rep_vgg, "WideResNet-16-4": wide_resnet}

"""Networks with the initial weights of a seed, the same for every variant.

A variant is a copy of the original by `mbn_rewrite.convert`, which carries the weights over. What a
recipe asks of layers is put into the configuration that the original is made from, so that both
Kerases, and all variants, get it the same way.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from benchmarks.models import training_networks
from study.recipes import Recipe

_KERNELS = ("Conv2D", "Dense")


def made(keras: Any, recipe: Recipe, variant: str, classes: int, width: float, seed: int) -> Any:
    """A model with new weights, ready to be compiled.

    Args:
        keras: the package, tf_keras or keras.
        recipe: its network, and what it asks of layers.
        variant: see `training_networks`.
        classes: how many.
        width: what the channels of all convolutions are multiplied by.
        seed: of the initial weights.
    """
    model = getattr(training_networks, recipe.network.lower())(
        keras, "original", classes=classes, size=recipe.size
    )
    config = model.get_config()
    for layer in config["layers"]:
        _adapt(keras, layer, recipe, width)
    keras.utils.set_random_seed(seed)
    model = type(model).from_config(config)
    if recipe.zero_gamma:
        for layer in norms(model):
            if layer.name.endswith("_3_bn"):  # the last of a residual block
                layer.gamma.assign(np.zeros(layer.gamma.shape))
    return training_networks.varied(model, variant)


def _adapt(keras: Any, layer: dict[str, Any], recipe: Recipe, width: float) -> None:
    """Puts what a recipe asks of a layer into its configuration."""
    config, kind = layer["config"], layer["class_name"]
    layer.pop("build_config", None)  # has shapes by the old width
    if kind == "Conv2D":
        config["filters"] = max(1, round(config["filters"] * width))
    if kind in _KERNELS:
        config["kernel_regularizer"] = keras.regularizers.serialize(
            keras.regularizers.L2(recipe.l2)
        )
    if kind == "Dense":
        config["dtype"] = "float32"  # logits, in mixed precision too
    if kind == "BatchNormalization":
        config["momentum"], config["epsilon"] = recipe.norm_momentum, recipe.norm_epsilon


def norms(model: Any) -> list[Any]:
    """The layers that normalise by a batch, in their order."""
    return [layer for layer in model.layers if hasattr(layer, "moving_variance")]


def strides(layer: Any) -> list[int] | None:
    """Strides of the statistics; None where the layer has none."""
    return list(layer.strides) if hasattr(layer, "min_samples") else None


def statistics(layer: Any) -> dict[str, np.ndarray]:
    """mu, sigma, beta and gamma of a layer, each of shape [C]; what it lacks is left out."""
    gamma = layer.depthwise_kernel if hasattr(layer, "depthwise_kernel") else layer.gamma
    beta = layer.bias if hasattr(layer, "depthwise_kernel") else layer.beta
    values = {"mu": layer.moving_mean, "sigma": layer.moving_variance, "beta": beta, "gamma": gamma}
    arrays = {k: np.ravel(np.asarray(v)).astype(float) for k, v in values.items() if v is not None}
    arrays["sigma"] = np.sqrt(arrays["sigma"])
    return arrays


def digest(model: Any) -> str:
    """Changes with the weights of a model; equal for variants with the same weights."""
    text = hashlib.sha256()
    for weight in model.get_weights():
        text.update(np.ascontiguousarray(weight, np.float32).tobytes())
    return text.hexdigest()[:16]


def parameters(model: Any) -> dict[str, int]:
    """Numbers of weights, trained and in all."""
    trained = sum(int(np.prod(w.shape)) for w in model.trainable_weights)
    return {"trained": trained, "all": int(model.count_params())}

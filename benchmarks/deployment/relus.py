"""ReLUs as the int8 kernels of LiteRT take them.

XNNPACK, which LiteRT runs on CPUs, has int8 kernels for a ReLU within a sum, a product or a
convolution, and none for one by itself. Where a ReLU reads a value that others read too, as in
pre-activation networks, the converter cannot put it into what gives the value. An original has a
BatchNormalization between them, in whose addition the ReLU is; folded, it is by itself, runs in
LiteRT's reference kernel, and breaks the network into parts. A product takes it in again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tensorflow as tf
import tf_keras

import mbn_rewrite as mbn
from benchmarks.common.failures import Declined
from benchmarks.peer_tools.work import Work


def relus_in_products(model: Any) -> Any:
    """A copy of a tf_keras model in which each ReLU reads a product, with the number next to 1."""

    def copied(layer: Any) -> Any:
        config = layer.get_config()
        names = ("max_value", "negative_slope", "threshold")
        is_plain = isinstance(layer, tf_keras.layers.ReLU) and not any(map(config.get, names))
        is_named = isinstance(layer, tf_keras.layers.Activation) and config["activation"] == "relu"
        if is_plain or is_named:
            return tf_keras.layers.Lambda(_relu_of_product, name=layer.name, dtype=layer.dtype)
        return type(layer).from_config(config)

    copy = tf_keras.models.clone_model(model, clone_function=copied)
    copy.set_weights(model.get_weights())
    return copy


def _relu_of_product(x: tf.Tensor) -> tf.Tensor:
    return tf.nn.relu(x * (1 + 2**-23))  # a product by 1 would be optimised away


def folded_with_products(work: Work) -> Path:
    """Folded in memory, with ReLUs in products, and saved.

    Raises:
        Declined: the original was not saved by tf_keras.
    """
    out, unfinished = work.output("ours_fold_products"), work.output("unfinished")
    if not out.exists():
        try:
            model = tf_keras.models.load_model(work.original, compile=False)
        except (OSError, ValueError) as error:
            raise Declined("it takes SavedModels of tf_keras only") from error
        relus_in_products(mbn.convert(model, mode="fold")).save(unfinished, save_format="tf")
        unfinished.rename(out)
    return out

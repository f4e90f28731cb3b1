"""Models as they come back: saved and loaded, or cloned."""

from __future__ import annotations

import tensorflow as tf

from tests.support import kerases
from tests.support.stock_layers import bent, odd_bound, odd_penalty, odd_weights

KNOWN = {each.__name__: each for each in (bent, odd_bound, odd_penalty, odd_weights)}


def through(how, model, directory):
    """What comes back of a model."""
    package = kerases.package()
    if how == "clone":
        model.save_weights(directory / "of.weights.h5")
        new = package.models.clone_model(model)
        new.load_weights(directory / "of.weights.h5")
        return new
    if how == "export":
        model.export(directory / "exported", verbose=False)
        loaded = tf.saved_model.load(directory / "exported")
        return lambda data: (loaded, loaded.serve(data))[1]
    path = directory / ("model" if how == "tf" else f"model.{how}")
    model.save(path, **({"save_format": "tf"} if how == "tf" else {}))
    with package.utils.custom_object_scope(KNOWN):
        return package.models.load_model(path)

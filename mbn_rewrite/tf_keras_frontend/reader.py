"""Reads tf_keras models into the neutral graph."""

from typing import Any

from mbn_rewrite.keras_layers import reader
from mbn_rewrite.keras_layers.reader import Reading
from mbn_rewrite.tf_keras_frontend.dialect import TF_KERAS


def read(model: Any) -> Reading:
    """What a built tf_keras model does; see `front_ends.FrontEnd`."""
    return reader.read(model, TF_KERAS)

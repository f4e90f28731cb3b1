"""Reads Keras 3 models into the neutral graph."""

from typing import Any

from mbn_rewrite.keras_frontend.dialect import KERAS_3
from mbn_rewrite.keras_layers import reader
from mbn_rewrite.keras_layers.reader import Reading


def read(model: Any) -> Reading:
    """What a built Keras 3 model does; see `front_ends.FrontEnd`."""
    return reader.read(model, KERAS_3)

"""Reads Keras 3 models into the neutral graph."""

from typing import Any

from mbn_rewrite.frontends.keras3.adapter import KERAS_3
from mbn_rewrite.frontends.keras_common import reader
from mbn_rewrite.frontends.keras_common.reader import Reading


def read(model: Any) -> Reading:
    """What a built Keras 3 model does; see `protocols.FrontEnd`."""
    return reader.read(model, KERAS_3)

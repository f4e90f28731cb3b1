"""Reads tf_keras models into the neutral graph."""

from typing import Any

from mbn_rewrite.frontends.keras_common import reader
from mbn_rewrite.frontends.keras_common.reader import Reading
from mbn_rewrite.frontends.tf_keras.adapter import TF_KERAS


def read(model: Any) -> Reading:
    """What a built tf_keras model does; see `protocols.FrontEnd`."""
    return reader.read(model, TF_KERAS)

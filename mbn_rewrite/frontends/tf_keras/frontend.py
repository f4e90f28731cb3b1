"""What the rest of the library uses of this front end; see `protocols.FrontEnd`."""

from mbn_rewrite.frontends.execution import device, set_up
from mbn_rewrite.frontends.tf_keras.execution import (
    closer_look,
    compute_dtypes,
    inputs_of_batch,
    outputs_of,
    random_inputs,
    recipe_for,
    running,
)
from mbn_rewrite.frontends.tf_keras.reader import read
from mbn_rewrite.frontends.tf_keras.writer import write

__all__ = [
    "closer_look",
    "compute_dtypes",
    "device",
    "inputs_of_batch",
    "outputs_of",
    "random_inputs",
    "read",
    "recipe_for",
    "running",
    "set_up",
    "write",
]

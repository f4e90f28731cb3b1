"""What the rest of the library uses of this front end; see `protocols.FrontEnd`."""

from mbn_rewrite.frontends.keras3.execution import (
    closer_look,
    compute_dtypes,
    device,
    inputs_of_batch,
    outputs_of,
    random_inputs,
    recipe_for,
    running,
    set_up,
)
from mbn_rewrite.frontends.keras3.reader import read
from mbn_rewrite.frontends.keras3.writer import write

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

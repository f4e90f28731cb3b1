"""What the rest of the library uses of this front end; see `front_ends.FrontEnd`."""

from mbn_rewrite.keras_frontend.reader import read
from mbn_rewrite.keras_frontend.running import (
    closer_look,
    compute_dtypes,
    device,
    inputs_of_batch,
    made_for,
    outputs_of,
    random_inputs,
    running,
    set_up,
)
from mbn_rewrite.keras_frontend.writer import write

__all__ = [
    "closer_look",
    "compute_dtypes",
    "device",
    "inputs_of_batch",
    "made_for",
    "outputs_of",
    "random_inputs",
    "read",
    "running",
    "set_up",
    "write",
]

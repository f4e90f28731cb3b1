"""What the rest of the library uses of this front end; see `front_ends.FrontEnd`."""

from typing import Any

from mbn_rewrite.decisions import Plan
from mbn_rewrite.keras_frontend.dialect import KERAS_3
from mbn_rewrite.keras_frontend.running import compute_dtypes, outputs_of, random_inputs
from mbn_rewrite.keras_models import reader, writer
from mbn_rewrite.keras_models.reader import Reading

__all__ = ["compute_dtypes", "outputs_of", "random_inputs", "read", "write"]


def read(model: Any) -> Reading:
    """A model as the planner sees it."""
    return reader.read(model, KERAS_3)


def write(model: Any, reading: Reading, plan: Plan) -> Any:
    """A copy of a model with the plan carried out; RewriteError where a layer has no copy."""
    return writer.write(model, reading, plan, KERAS_3)

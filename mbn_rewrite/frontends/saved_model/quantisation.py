"""What TensorFlow Model Optimization has quantised in training, by the scopes that it names."""

from __future__ import annotations

from mbn_rewrite.frontends.saved_model.function_graph import FunctionGraph

# Its quantisers, in whose scopes values are rounded to a grid.
_QUANTISERS = {"AllValuesQuantize", "LastValueQuant", "MovingAvgQuantize"}
_WRAPPER = "quant_"  # what the names of its wrappers begin with


def is_quantised(function: FunctionGraph) -> bool:
    """Whether a function is of a model that was trained for quantisation."""
    return any(
        op.type.startswith("FakeQuant") and not _QUANTISERS.isdisjoint(op.name.split("/"))
        for op in function.operations
    )


def wrapper_of(name: str) -> str:
    """The wrapper that an operation of such a model is in, by its name, or ""."""
    return next((part for part in name.split("/") if part.startswith(_WRAPPER)), "")

"""Operations that hide what they compute, with advice for the user."""

from __future__ import annotations

from collections.abc import Iterable

from mbn_rewrite.frontends.saved_model.function_graph import FunctionGraph
from mbn_rewrite.frontends.saved_model.inlining import bodies_called

_FROM_JAX = (
    "compiled code, as JAX exports it",
    "Rewrite the model before it is exported: a Keras model with mbn_rewrite.convert, in its own "
    "backend, or its .keras file with this tool. Where jax2tf.convert takes "
    "native_serialization=False, that exports operations that can be seen into",
)
_OF_XLA = ("compiled code", "Rewrite the model before it is compiled")
_OF_TPUS = ("code compiled for TPUs", "Rewrite the model that it was compiled from")
_OF_TENSORRT = ("an engine of TensorRT", "Rewrite the model that it was built from")
_OF_PYTHON = ("Python code", "Write what it does as operations of TensorFlow, and save that")
_OF_DEVICES = ("code compiled for a device", "Rewrite the model that it was compiled from")

# Operation -> the code that it runs, and advice for having that rewritten.
_OPAQUE = {
    "XlaCallModule": _FROM_JAX,
    **dict.fromkeys(("XlaCustomCall", "XlaCustomCallV2", "_XlaRun", "_XlaCompile"), _OF_XLA),
    **dict.fromkeys(
        ("TPUCompile", "_TPUCompileMlir", "TPUExecute", "TPUExecuteAndUpdateVariables"), _OF_TPUS
    ),
    **dict.fromkeys(("TRTEngineOp", "GetCalibrationDataOp"), _OF_TENSORRT),
    **dict.fromkeys(("PyFunc", "PyFuncStateless", "EagerPyFunc"), _OF_PYTHON),
    **dict.fromkeys(("NeuronOp", "EdgeTpuCustomOp", "edgetpu-custom-op"), _OF_DEVICES),
}
_NAMED = 3  # functions that a sentence names


def notes_on(functions: Iterable[FunctionGraph]) -> tuple[str, ...]:
    """Notes for the user on opaque operations, a sentence for each type."""
    found: dict[str, list[str]] = {}
    for function in functions:
        for kind in sorted(_kinds_in(function) & set(_OPAQUE)):
            found.setdefault(kind, []).append(f"'{function.name}'")
    return tuple(_note(kind, names) for kind, names in sorted(found.items()))


def _kinds_in(function: FunctionGraph) -> set[str]:
    """The types of all operations that a function may run."""
    kinds = set()
    for op in function.operations:
        kinds.add(op.type)
        for body in bodies_called(function.graph_def, op.node_def):
            kinds.update(node.op for node in body.node_def)
    return kinds


def _note(kind: str, names: list[str]) -> str:
    listed, more = names[:_NAMED], len(names) - _NAMED
    if more > 0:
        listed.append(f"{more} more")
    who = " and ".join(filter(None, [", ".join(listed[:-1]), listed[-1]]))
    what, way_out = _OPAQUE[kind]
    verb = "runs" if len(names) == 1 else "run"
    return (
        f"{who} {verb} {kind}: {what}, which cannot be seen into, so that what "
        f"BatchNormalization it holds stays. {way_out}"
    )

"""`verify`: a rewritten model beside the original.

The error is measured against the largest magnitude of the output that it is in,

    max |a - b| / max |b|,

since rounding in a network grows with what it adds up, not with what is left in the end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mbn_rewrite.errors import RewriteError

# The largest error, relative to the output's largest magnitude, that rounding explains.
# About 2000 units in the last place for the wide types; 10 and 6 for the narrow ones, whose
# sums are wide but whose kernels are rounded once more when a scale is folded in.
TOLERANCES = {"float64": 5e-13, "float32": 2e-4, "float16": 1e-2, "bfloat16": 5e-2}

# What stands for a size that the model leaves open.
_OPEN_SIZE = 64
_BATCH = 4


@dataclass(frozen=True)
class Comparison:
    """Outputs of two models on the same inputs.

    Attributes:
        max_abs_error: the largest absolute difference.
        max_rel_error: the largest difference relative to the largest magnitude of the
            output that it is in. Infinite where one model gives NaN or infinity.
        top1_agreement: the part of all positions at which both models have their largest
            value in the same channel, in the output where it is least; 1.0 where outputs
            have a single channel.
        tolerance: what max_rel_error may be.
        examples: how many examples were compared.
        note: what stands in the way of a comparison, or "".
    """

    max_abs_error: float
    max_rel_error: float
    top1_agreement: float
    tolerance: float
    examples: int
    note: str = ""

    @property
    def ok(self) -> bool:
        """Whether the models agree within the tolerance. False for NaN."""
        return bool(self.max_rel_error <= self.tolerance)

    def to_dict(self) -> dict[str, Any]:
        """The comparison in types that JSON knows; what is not finite as text."""
        return {"ok": self.ok} | {
            key: str(value) if isinstance(value, float) and not np.isfinite(value) else value
            for key, value in asdict(self).items()
        }

    def __str__(self) -> str:
        return (
            f"{'equal within tolerance' if self.ok else 'NOT EQUAL'}: "
            f"max abs error {self.max_abs_error:.3g}, "
            f"max rel error {self.max_rel_error:.3g} (tolerance {self.tolerance:.3g}), "
            f"top-1 agreement {self.top1_agreement:.2%} on {self.examples} examples"
            + (f"; {self.note}" if self.note else "")
        )


def verify(
    model: Any, new: Any, inputs: Any = None, *, tolerance: float | None = None, seed: int = 0
) -> Comparison:
    """Compares a rewritten model with the original, at inference.

    Args:
        model: the original tf_keras model.
        new: the rewritten one, with the same inputs and outputs.
        inputs: what to call both with. By default random values for inputs of the shapes
            and dtypes of the model's: normally distributed floats, integers 0 and 1.
        tolerance: the largest relative error to accept; by default the one of `TOLERANCES`
            for the narrowest dtype that the model computes in.
        seed: of the random inputs.

    Returns:
        A Comparison; `ok` says whether they agree.

    Raises:
        RewriteError: inputs of this dtype cannot be made up, or one of the models cannot be
            called with them.
    """
    if inputs is None:
        inputs = random_inputs(model, seed)
    return compare_outputs(
        _called(model, inputs, "the original"),
        _called(new, inputs, "the rewritten model"),
        tolerance_of(model) if tolerance is None else tolerance,
    )


def compare_outputs(
    expected: Sequence[np.ndarray], actual: Sequence[np.ndarray], tolerance: float
) -> Comparison:
    """Compares lists of outputs, pair by pair; see `Comparison`."""
    shapes, new_shapes = [a.shape for a in expected], [a.shape for a in actual]
    examples = next((len(array) for array in expected if array.ndim), 0)
    if shapes != new_shapes:
        note = f"the outputs have the shapes {new_shapes}, those of the original {shapes}"
        return Comparison(np.inf, np.inf, 0.0, tolerance, examples, note)
    worst_abs = worst_rel = 0.0
    agreement, note = 1.0, ""
    for number, (a, b) in enumerate(zip(expected, actual, strict=True)):
        if a.size == 0:
            continue
        if a.dtype.kind in "OSU":
            worst_rel = worst_rel if np.array_equal(a, b) else np.inf
            continue
        a, b = a.astype(np.float64), b.astype(np.float64)
        for who, array in (("original", a), ("rewritten model", b)):
            if not np.all(np.isfinite(array)):
                note = f"the {who} gives NaN or infinity in output {number}"
                worst_abs = worst_rel = np.inf
        if note:
            continue
        error, size = float(np.abs(a - b).max()), float(np.abs(a).max())
        worst_abs = max(worst_abs, error)
        worst_rel = max(worst_rel, error / size if size else (np.inf if error else 0.0))
        if a.ndim > 1 and a.shape[-1] > 1:
            agreement = min(agreement, float(np.mean(a.argmax(-1) == b.argmax(-1))))
    return Comparison(worst_abs, worst_rel, agreement, tolerance, examples, note)


def tolerance_of(model: Any) -> float:
    """The tolerance for the narrowest dtype that a tf_keras model computes in."""
    import tf_keras

    names = {
        layer.compute_dtype
        for layer in model._flatten_layers(include_self=False, recursive=True)
        if not isinstance(layer, (tf_keras.Model, tf_keras.layers.InputLayer))
    }
    return max((TOLERANCES[name] for name in names & set(TOLERANCES)), default=0.0)


def random_inputs(model: Any, seed: int = 0) -> Any:
    """Random inputs for a tf_keras model, in the structure in which it takes them.

    Raises:
        RewriteError: the model takes strings or tensors that are not dense.
    """
    import tensorflow as tf

    if getattr(model, "_is_graph_network", False):
        specs = model._nested_inputs
    else:
        arguments, _ = model.save_spec(dynamic_batch=False)
        if len(arguments) != 1:
            raise RewriteError(f"'{model.name}' takes several arguments: give `inputs` to verify")
        specs = arguments[0]
    rng = np.random.default_rng(seed)
    return tf.nest.map_structure(lambda spec: _random_tensor(spec, rng), specs)


def _random_tensor(spec: Any, rng: np.random.Generator) -> Any:
    import tensorflow as tf

    dtype = tf.as_dtype(spec.dtype)
    dense = not isinstance(
        getattr(spec, "type_spec", spec), (tf.SparseTensorSpec, tf.RaggedTensorSpec)
    )
    if not dense or not (dtype.is_floating or dtype.is_integer or dtype.is_bool):
        raise RewriteError(
            f"cannot make up inputs of dtype {dtype.name}{'' if dense else ' that are not dense'}. "
            "Give real ones: verify(model, new, inputs=...)"
        )
    shape = [
        (_BATCH if i == 0 else _OPEN_SIZE) if size is None else size
        for i, size in enumerate(spec.shape.as_list())
    ]
    values = rng.standard_normal(shape) if dtype.is_floating else rng.integers(0, 2, shape)
    return tf.cast(tf.constant(values), dtype)


def _called(model: Any, inputs: Any, who: str) -> list[np.ndarray]:
    """All outputs of a model as a flat list; the model stays as it is."""
    import tensorflow as tf

    # A BatchNormalization called with training=True moves its statistics even here. Values
    # read share memory with their variables until one of the two changes.
    before = [(variable, variable.read_value()) for variable in model.non_trainable_weights]
    try:
        outputs = run_anywhere(lambda data: model(data, training=False), inputs)
    except Exception as error:
        line = str(error).strip().split("\n")[0]
        raise RewriteError(
            f"{who} cannot be called with these inputs: {line}. "
            "Give inputs that it takes: verify(model, new, inputs=...)"
        ) from error
    finally:
        for variable, value in before:
            variable.assign(value)
    return [np.asarray(output) for output in tf.nest.flatten(outputs)]


def run_anywhere(function: Callable[[Any], Any], inputs: Any) -> Any:
    """Calls a function of tensors, compiled by XLA if it cannot run otherwise.

    TensorFlow's own kernels take channels-first layouts on GPUs only; XLA takes them
    everywhere.
    """
    import tensorflow as tf

    try:
        return function(inputs)
    except (tf.errors.UnimplementedError, tf.errors.InvalidArgumentError):
        if tf.config.list_physical_devices("GPU"):
            raise
        return tf.function(function, jit_compile=True, autograph=False)(inputs)


def named_inputs(inputs: Mapping[str, np.ndarray], names: Sequence[str]) -> list[np.ndarray]:
    """Arrays from a file in the order of a model's inputs.

    Raises:
        RewriteError: the names differ.
    """
    if set(inputs) != set(names):
        raise RewriteError(
            f"the inputs are named {sorted(inputs)}; the model's are named {sorted(names)}"
        )
    return [inputs[name] for name in names]

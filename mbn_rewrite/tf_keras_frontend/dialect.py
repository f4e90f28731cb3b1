"""How tf_keras says what the shared reading and writing of models needs to know."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras
from tf_keras.src.engine.functional import Functional
from tf_keras.src.engine.sequential import Sequential
from tf_keras.src.layers.core.tf_op_layer import (
    ClassMethod,
    InstanceMethod,
    InstanceProperty,
    TFOpLambda,
)
from tf_keras.src.layers.normalization.batch_normalization import BatchNormalizationBase

from mbn_rewrite.errors import RewriteError, cause_of
from mbn_rewrite.graph import Affine, Concat, Merge, Op, Opaque, PositivelyHomogeneous, Shape
from mbn_rewrite.keras_models.describe import describers
from mbn_rewrite.keras_models.dialect import Call, LayerCall
from mbn_rewrite.keras_models.holders import label
from mbn_rewrite.tf_keras_frontend.layers import ScaleAndShift
from mbn_rewrite.tf_keras_frontend.training_layers import (
    ModifiedBatchNormalization,
    StridedBatchNormalization,
)

_MERGES = {
    "__operators__.add": "add",
    "math.add": "add",
    "add": "add",
    "math.subtract": "subtract",
    "math.maximum": "maximum",
    "math.minimum": "minimum",
}


def _tensorflow_function(call: Call) -> Op:
    """Functions of tensors alone; a constant among the arguments makes them opaque."""
    symbol = call.layer.symbol
    if symbol == "concat" and len(call.arguments) == 1 and isinstance(call.arguments[0], int):
        return Concat(call.arguments[0] % len(call.output))
    if call.arguments:
        return Opaque()
    if symbol in _MERGES and len(call.inputs) == 2:
        return Merge(_MERGES[symbol])
    if symbol == "nn.relu":
        return PositivelyHomogeneous()
    if symbol in ("identity", "stop_gradient"):
        return Affine()
    return Opaque()


class TfKeras:
    """See `keras_models.dialect.Dialect`."""

    keras = tf_keras
    bookkeeping = frozenset({"_inbound_nodes_value", "_outbound_nodes_value"})
    describers = describers(tf_keras.layers)
    functions = {TFOpLambda: _tensorflow_function}  # noqa: RUF012  (never changed)
    homogeneous = (tf_keras.activations.relu, tf.nn.relu, tf.nn.leaky_relu)
    depthwise_kernel = "depthwise_kernel"
    scale_and_shift = ScaleAndShift
    training_layers = (StridedBatchNormalization, ModifiedBatchNormalization)
    batch_norms = (
        tf_keras.layers.BatchNormalization,
        tf_keras.layers.experimental.SyncBatchNormalization,
    )

    call_is_made = (TFOpLambda, ClassMethod, InstanceMethod, InstanceProperty)

    flatten = staticmethod(tf.nest.flatten)
    map_structure = staticmethod(tf.nest.map_structure)

    def is_batch_norm(self, layer: Any) -> bool:
        return isinstance(layer, BatchNormalizationBase)

    def epsilon(self, layer: Any) -> float:
        """The epsilon that TensorFlow uses for a BatchNormalization.

        Earlier releases raise the epsilon of the fused operation to 1.001e-5, the least that
        cuDNN takes; later ones take it as it is.
        """
        epsilon = float(layer.epsilon)
        raised = layer.fused and epsilon < 1.001e-5
        return max(epsilon, _least_fused_epsilon()) if raised else epsilon

    # ---- models

    def is_visible(self, layer: Any) -> bool:
        return (
            isinstance(layer, Functional)
            and bool(layer._is_graph_network)
            and type(layer).call in (Functional.call, Sequential.call)
        )

    def is_functional(self, layer: Any) -> bool:
        return isinstance(layer, Functional)

    def calls_of(self, model: Any) -> Iterator[LayerCall]:
        needed: set[int] = set()
        pending = [t._keras_history for t in (*model.inputs, *model.outputs)]
        while pending:
            history = pending.pop()
            node = history.layer._inbound_nodes[history.node_index]
            if id(node) not in needed:
                needed.add(id(node))
                pending += [t._keras_history for t in node.keras_inputs]
        for depth in sorted(model._nodes_by_depth, reverse=True):
            yield from (_call(node) for node in model._nodes_by_depth[depth] if id(node) in needed)

    def calls_on(self, layer: Any) -> list[LayerCall]:
        return [_call(node) for node in layer._inbound_nodes]

    def shape(self, tensor: Any) -> Shape:
        return () if tensor.shape.rank is None else tuple(tensor.shape.as_list())

    def dtype(self, tensor: Any) -> str:
        return str(tensor.dtype.name)

    def input_shape(self, layer: Any) -> Shape:
        spec = layer.input_spec
        return tuple(spec.axes.get(axis) for axis in range(spec.ndim))

    def submodules(self, layer: Any) -> list[Any]:
        return list(layer.submodules)

    # ---- copies

    def parts(self, layer: Any) -> list[Any]:
        return list(layer._flatten_layers(include_self=True, recursive=True))

    def rename(self, layer: Any, name: str) -> None:
        layer._name = name

    def variables(self, layer: Any) -> list[Any]:
        return [weight for weight in layer.weights if isinstance(weight, tf.Variable)]

    def own_variables(self, layer: Any) -> list[Any]:
        weights = [*layer._trainable_weights, *layer._non_trainable_weights]
        return [weight for weight in weights if isinstance(weight, tf.Variable)]

    def without_weights(self, operation: Any) -> Any:
        return None

    def exchange(self, holder: Any, attribute: str, value: Any, old: Any, new: Any) -> None:
        setattr(holder, attribute, value)

    def new_functional(self, old: Any, tensors: Mapping[int, Any]) -> Any:
        inputs, outputs = tf.nest.map_structure(
            lambda t: tensors[id(t)], (old._nested_inputs, old._nested_outputs)
        )
        return _functional_class(old)(inputs, outputs, name=old.name)

    def new_sequential(
        self,
        old: Any,
        copied: Callable[[Any], Any],
        layers: Iterator[Any],
        finish: Callable[[], None],
    ) -> Any:
        new = tf_keras.Sequential(name=old.name)
        if old._has_explicit_input_shape:
            new.add(copied(old.inputs[0]._keras_history.layer))
        for layer in layers:
            new.add(layer)
            if new.built:
                finish()
        if not new.built:
            # As `build` does, which has no argument for the dtype.
            new._build_graph_network_for_inferred_shape(old.input_shape, old.inputs[0].dtype)
        return new

    def call_as_before(self, old: Any, new: Any) -> None:
        spec = old.save_spec(dynamic_batch=False)
        if spec is None:
            raise RewriteError(
                f"{label(old)} was built but never called, so it is not known how to call its "
                "copy. Call it once on data"
            )
        arguments, keywords = tf.nest.map_structure(_zeros, spec)
        try:
            new(*arguments, **keywords)
        except Exception as error:
            raise RewriteError(
                f"the copy of {label(old)} cannot be called as the original was: "
                f"{cause_of(error)} Check that its get_config() describes it fully"
            ) from error

    def set_own_trainable(self, layer: Any, trainable: bool) -> None:
        layer._trainable = trainable

    def is_traced(self, layer: Any) -> bool:
        return hasattr(type(layer).call, "get_concrete_function")


def _call(node: Any) -> LayerCall:
    return LayerCall(
        node.layer,
        list(node.keras_inputs),
        tf.nest.flatten(node.outputs),
        tuple(node.call_args or ()),
        node.call_kwargs or {},
        node.is_input,
        any(getattr(t, "_keras_mask", None) is not None for t in node.keras_inputs),
    )


@cache
def _least_fused_epsilon() -> float:
    """What the installed TensorFlow makes of a fused epsilon of 0, seen in a result."""
    one, zero = np.ones((1,), np.float32), np.zeros((1,), np.float32)
    variance = np.full((1,), 1e-5, np.float32)
    y, *_ = tf.compat.v1.nn.fused_batch_norm(
        np.ones((1, 1, 1, 1), np.float32), one, zero, zero, variance, 1e-12, is_training=False
    )
    return 1.001e-5 if float(y[0, 0, 0, 0]) < 300.0 else 0.0  # 1/sqrt(1e-5) is 316


def _functional_class(model: Any) -> type:
    """The model's class where it is made as Functional models are, or else Functional."""
    arguments = inspect.getfullargspec(type(model).__init__).args
    made_alike = arguments == ["self", "inputs", "outputs", "name", "trainable"]
    return type(model) if made_alike else tf_keras.Model


def _zeros(spec: Any) -> Any:
    if not isinstance(spec, tf.TensorSpec):
        return spec
    return tf.zeros([1 if size is None else size for size in spec.shape], spec.dtype)


TF_KERAS = TfKeras()

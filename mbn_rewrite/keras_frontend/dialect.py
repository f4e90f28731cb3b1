"""How Keras 3 says what the shared reading and writing of models needs to know.

Nothing here depends on the backend, except the training layers, which check it themselves.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import keras
from keras.src import ops
from keras.src.models.functional import Functional
from keras.src.ops import nn, numpy
from keras.src.ops.node import Node

from mbn_rewrite.errors import RewriteError, cause_of
from mbn_rewrite.graph import Concat, Merge, Op, Opaque, PositivelyHomogeneous, Shape
from mbn_rewrite.keras_frontend.layers import ScaleAndShift
from mbn_rewrite.keras_frontend.training_layers import (
    ModifiedBatchNormalization,
    StridedBatchNormalization,
)
from mbn_rewrite.keras_models.describe import describers
from mbn_rewrite.keras_models.dialect import Call, Describer, LayerCall
from mbn_rewrite.keras_models.holders import label


def _merge(kind: str) -> Describer:
    """Functions of two tensors; a constant among the arguments makes them opaque."""

    def describer(call: Call) -> Op:
        return Opaque() if call.arguments or len(call.inputs) != 2 else Merge(kind)

    return describer


def _concatenate(call: Call) -> Op:
    return Opaque() if call.arguments else Concat(call.layer.axis % len(call.output))


def _relu(call: Call) -> Op:
    return PositivelyHomogeneous()


class Keras3:
    """See `keras_models.dialect.Dialect`."""

    keras = keras
    bookkeeping = frozenset(
        {"_inbound_nodes", "_outbound_nodes", "_tracker", "_layers", "_metrics", "_functional"}
    )
    describers = describers(keras.layers)
    functions: Mapping[type, Describer] = {
        numpy.Add: _merge("add"),
        numpy.Subtract: _merge("subtract"),
        numpy.Maximum: _merge("maximum"),
        numpy.Minimum: _merge("minimum"),
        numpy.Concatenate: _concatenate,
        nn.Relu: _relu,
    }
    homogeneous = (keras.activations.relu, keras.activations.leaky_relu, ops.relu, ops.leaky_relu)
    depthwise_kernel = "kernel"
    scale_and_shift = ScaleAndShift
    training_layers = (StridedBatchNormalization, ModifiedBatchNormalization)
    batch_norms = (keras.layers.BatchNormalization,)
    call_is_made = ()

    flatten = staticmethod(keras.tree.flatten)
    map_structure = staticmethod(keras.tree.map_structure)

    def is_batch_norm(self, layer: Any) -> bool:
        return isinstance(layer, keras.layers.BatchNormalization)

    def epsilon(self, layer: Any) -> float:
        return float(layer.epsilon)

    # ---- models

    def is_visible(self, layer: Any) -> bool:
        if isinstance(layer, keras.Sequential):
            own_call = type(layer).call is not keras.Sequential.call
            return layer._functional is not None and not own_call
        return isinstance(layer, Functional) and type(layer).call is Functional.call

    def is_functional(self, layer: Any) -> bool:
        return isinstance(layer, (Functional, keras.Sequential))

    def calls_of(self, model: Any) -> Iterator[LayerCall]:
        if isinstance(model, keras.Sequential):
            model = model._functional
        calls: dict[int, LayerCall] = {}
        pending = [_node(t) for t in (*model.inputs, *model.outputs)]
        while pending:
            node = pending.pop()
            if id(node) not in calls:
                calls[id(node)] = _call(node)
                pending += [_node(t) for t in calls[id(node)].tensors]
        for depth in sorted(model._nodes_by_depth, reverse=True):
            for node in model._nodes_by_depth[depth]:
                if id(node) in calls:
                    yield calls[id(node)]

    def calls_on(self, layer: Any) -> list[LayerCall]:
        return [_call(node) for node in layer._inbound_nodes]

    def shape(self, tensor: Any) -> Shape:
        return tuple(tensor.shape)

    def dtype(self, tensor: Any) -> str:
        return str(keras.backend.standardize_dtype(tensor.dtype))

    def input_shape(self, layer: Any) -> Shape:
        spec = layer.input_spec
        sizes = {axis % spec.ndim: size for axis, size in spec.axes.items()}
        return tuple(sizes.get(axis) for axis in range(spec.ndim))

    def submodules(self, layer: Any) -> list[Any]:
        return self.parts(layer)[1:]

    # ---- copies

    def parts(self, layer: Any) -> list[Any]:
        if not isinstance(layer, keras.layers.Layer):
            return [layer]
        return list(layer._flatten_layers(include_self=True, recursive=True))

    def rename(self, layer: Any, name: str) -> None:
        layer.name = name

    def variables(self, layer: Any) -> list[Any]:
        return list(layer.weights)

    def own_variables(self, layer: Any) -> list[Any]:
        seeds = [generator.state for generator in layer._seed_generators]
        return [*layer._trainable_variables, *layer._non_trainable_variables, *seeds]

    def without_weights(self, operation: Any) -> Any:
        if isinstance(operation, keras.layers.Layer):
            return None
        new = copy.copy(operation)  # called again, the original would remember it
        new._inbound_nodes, new._outbound_nodes = [], []
        return new

    def exchange(self, holder: Any, attribute: str, value: Any, old: Any, new: Any) -> None:
        tracker = holder._tracker
        locked = tracker.locked
        tracker.unlock()
        # In its place among what the holder tracks, so that the order of weights stays.
        tracker.replace_tracked_value("layers", old, new)
        setattr(holder, attribute, value)
        tracker.locked = locked

    def new_functional(self, old: Any, tensors: Mapping[int, Any]) -> Any:
        inputs, outputs = keras.tree.map_structure(
            lambda t: tensors[id(t)], (old._inputs_struct, old._outputs_struct)
        )
        with warnings.catch_warnings():
            # About names of inputs, which are those of the original.
            warnings.simplefilter("ignore")
            return _functional_class(old)(inputs, outputs, name=old.name)

    def new_sequential(
        self,
        old: Any,
        copied: Callable[[Any], Any],
        layers: Iterator[Any],
        finish: Callable[[], None],
    ) -> Any:
        # Built at once: every rebuilding calls all layers again.
        return keras.Sequential([copied(old._layers[0]), *layers], name=old.name)

    def call_as_before(self, old: Any, new: Any) -> None:
        config = old.get_build_config()
        if not config:
            raise RewriteError(
                f"{label(old)} was built but never called, so it is not known how to build its "
                "copy. Call it once on data"
            )
        try:
            new.build_from_config(config)
        except Exception as error:
            raise RewriteError(
                f"the copy of {label(old)} cannot be built as the original was: "
                f"{cause_of(error)} Check that its get_config() describes it fully"
            ) from error

    def set_own_trainable(self, layer: Any, trainable: bool) -> None:
        layer._trainable = trainable
        for variable in layer._trainable_variables:
            variable.trainable = trainable

    def is_traced(self, layer: Any) -> bool:
        return hasattr(type(layer).call, "get_concrete_function")


def _node(tensor: Any) -> Node:
    history = tensor._keras_history
    return history.operation._inbound_nodes[history.node_index]


def _call(node: Node) -> LayerCall:
    arguments = node.arguments
    kwargs = {name: value for name, value in arguments.kwargs.items() if value is not None}
    given = keras.tree.flatten((arguments.args, kwargs))
    masks = [keras.src.backend.get_keras_mask(t) for t in given if _is_tensor(t)]
    own = {id(mask) for mask in masks if mask is not None}
    # A mask that travels with a tensor is passed by Keras, in the copy too.
    passed = [
        name
        for name, value in kwargs.items()
        if name.endswith("mask") and any(id(t) in own for t in keras.tree.flatten(value))
    ]
    for name in passed:
        del kwargs[name]
    tensors = [t for t in keras.tree.flatten((arguments.args, kwargs)) if _is_tensor(t)]
    return LayerCall(
        node.operation,
        tensors,
        list(node.outputs),
        tuple(arguments.args),
        kwargs,
        node.is_input,
        bool(own),
    )


def _is_tensor(value: Any) -> bool:
    return isinstance(value, keras.KerasTensor)


def _functional_class(model: Any) -> type:
    """The model's class where it is made as Functional models are, or else Functional."""
    arguments = inspect.getfullargspec(type(model).__init__).args
    return type(model) if arguments[:4] == ["self", "inputs", "outputs", "name"] else keras.Model


KERAS_3 = Keras3()

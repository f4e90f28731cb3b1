"""Adapter of Keras 3: its differences from tf_keras; see `keras_common.adapter`."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cache, partial
from typing import Any

import keras
import numpy as np
from keras.dtype_policies import DTypePolicyMap
from keras.src.models.functional import Functional, functional_like_constructor
from keras.src.saving.serialization_lib import SafeModeScope

from mbn_rewrite.errors import RewriteError
from mbn_rewrite.frontends.keras3 import tracing
from mbn_rewrite.frontends.keras3.inference_layers import (
    BiasedConvolution,
    BorderedConvolution,
    ChannelClip,
    PassThrough,
    ScaleAndShift,
)
from mbn_rewrite.frontends.keras3.operations import CLIPS, OPERATIONS, describe
from mbn_rewrite.frontends.keras3.training_layers import (
    ModifiedBatchNormalization,
    StridedBatchNormalization,
)
from mbn_rewrite.frontends.keras_common.adapter import KerasAdapter
from mbn_rewrite.frontends.keras_common.calls import Call, Record
from mbn_rewrite.frontends.keras_common.cloning import is_stock, label, parts
from mbn_rewrite.frontends.keras_common.op_table import layer_table
from mbn_rewrite.frontends.keras_common.probing import Trace
from mbn_rewrite.ir.graph import Affine, Op, Opaque, Several, Shape
from mbn_rewrite.ir.reasons import Obstacle, Reason


class Keras3(KerasAdapter):
    """Adapter of Keras 3, on any backend."""

    package = "keras"
    layers = keras.layers
    model = keras.Model
    functional = Functional
    sequential = keras.Sequential
    batch_norms = (keras.layers.BatchNormalization,)
    batch_norm_base = keras.layers.BatchNormalization
    linear = staticmethod(keras.activations.linear)
    homogeneous = (
        keras.activations.relu,
        keras.activations.leaky_relu,
        keras.ops.relu,
        keras.ops.leaky_relu,
    )
    clips = tuple(
        (getattr(functions, name), bounds)
        for name, bounds in CLIPS.items()
        for functions in (keras.activations, keras.ops)
    )
    depthwise_kernel = "kernel"
    scale_and_shift = ScaleAndShift
    channel_clip = ChannelClip
    pass_through = PassThrough
    bordered_convolution = BorderedConvolution
    biased_convolution = BiasedConvolution
    training_layers = (StridedBatchNormalization, ModifiedBatchNormalization)
    # `_layers` lists the layers in the other attributes.
    private = frozenset(
        {
            *("_layers", "_functional", "_inbound_nodes", "_outbound_nodes", "_parent_path"),
            *("_operations", "_operations_by_depth", "_nodes", "_nodes_by_depth", "_tracker"),
            *("_inputs", "_outputs", "_inputs_struct", "_outputs_struct"),
        }
    )
    layer_lists = ("_layers", "_operations")
    model_attributes = frozenset(
        {
            *("_inputs", "_outputs", "_inputs_struct", "_outputs_struct"),
            *("_compile_config", "_compiled_trainable_state", "optimizer"),
            *("_eval_epoch_iterator", "history"),
            *("stop_evaluating", "stop_predicting", "stop_training"),
        }
    )
    metric = keras.Metric
    optimizers = (keras.Optimizer,)
    how_to_export = "write a SavedModel (export)"
    export_call = 'model.export("saved_model")'

    def __init__(self) -> None:
        self.describers = {
            **layer_table(keras.layers),
            **OPERATIONS,
            PassThrough: lambda call: Affine(),
        }

    # -- structures and tensors ------------------------------------------------------------

    def flatten(self, structure: Any) -> list[Any]:
        return keras.tree.flatten(structure)

    def map_structure(self, function: Callable[[Any], Any], structure: Any) -> Any:
        return keras.tree.map_structure(function, structure)

    def shape_of(self, tensor: Any) -> Shape:
        return tuple(tensor.shape)

    def dtype_of(self, tensor: Any) -> str:
        return str(tensor.dtype)

    def is_symbolic(self, value: Any) -> bool:
        return isinstance(value, keras.KerasTensor)

    def tensor_like(self, shape: Shape, dtype: str) -> Any:
        return keras.KerasTensor(shape, dtype=dtype, name="traced")

    def may_pass_mask(self, layer: Any) -> bool:
        # Nested models are recorded without the masks that they are called with.
        return bool(getattr(layer, "supports_masking", False))

    # -- models ----------------------------------------------------------------------------

    def is_visible(self, layer: Any) -> bool:
        if isinstance(layer, keras.Sequential):
            is_complete = layer._functional is not None
            return is_complete and type(layer).call is keras.Sequential.call
        return isinstance(layer, Functional) and type(layer).call is Functional.call

    def has_calls_on_record(self, layer: Any) -> bool:
        return isinstance(layer, (Functional, keras.Sequential))

    def has_stock_constructor(self, kind: type) -> bool:
        if issubclass(kind, keras.Sequential):
            return kind.__init__ is keras.Sequential.__init__  # type: ignore[misc]
        return bool(functional_like_constructor(kind))

    def interface_of(self, model: Any) -> tuple[Any, Any]:
        return model._inputs_struct, model._outputs_struct

    def calls_of(self, model: Any) -> Iterator[Record]:
        graph = functional_of(model)
        # Not all nodes of the graph: masks are computed again where they are passed on.
        records: dict[int, Record] = {}
        pending = [*graph.inputs, *graph.outputs]
        while pending:
            history = pending.pop()._keras_history
            node = history.operation._inbound_nodes[history.node_index]
            if id(node) not in records:
                records[id(node)] = _record(node)
                pending += records[id(node)].inputs
        for depth in sorted(graph._nodes_by_depth, reverse=True):
            nodes = graph._nodes_by_depth[depth]
            yield from (records[id(node)] for node in nodes if id(node) in records)

    def all_calls_of(self, layer: Any) -> list[Record]:
        return [_record(node) for node in layer._inbound_nodes]

    def traced(self, record: Record, probe: Any, size: int | None = None) -> Trace:
        return tracing.traced(record, probe, _record, size)

    def watched(
        self, is_watched: Callable[[], bool], note_read: Callable[[Any], None]
    ) -> AbstractContextManager[None]:
        return tracing.watched(is_watched, note_read)

    def set_apart(self) -> AbstractContextManager[None]:
        return tracing.set_apart()

    def read_as(self, variable: Any) -> int:
        return id(variable)

    def called_on_record(
        self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any
    ) -> Any:
        return tracing.called_on_record(layer, args, kwargs, outputs)

    def give_outputs_of(self, layer: Any, probe: Any) -> None:
        vars(probe)["compute_output_spec"] = partial(tracing.outputs_of, layer)

    def call_of(self, model: Any) -> Record | None:
        return tracing.call_of(model)

    def training(self, own: Any, inherited: bool | None) -> Any:
        # A Functional model passes its own argument on to all its layers, whatever is on record.
        return own if inherited is False and own is not None else inherited

    def takes_inputs_in_order(self, model: Any, record: Record) -> bool:
        # A model with a list of inputs also takes a dictionary, by their names.
        structure = functional_of(model)._inputs_struct
        given = record.args[0] if record.args else record.kwargs.get("inputs")
        return isinstance(given, dict) == isinstance(structure, dict)

    def tensors_at(self, model: Any, shapes: list[Shape]) -> dict[int, Any]:
        declared = [tuple(t.shape) for t in model.inputs]
        if all(map(_agree, declared, shapes)):
            return {}
        given = zip(model.inputs, shapes, strict=True)
        found = {id(t): keras.KerasTensor(shape, dtype=t.dtype) for t, shape in given}
        with tracing.at_other_sizes():
            for record in self.calls_of(model):
                if record.inputs:
                    args, kwargs = keras.tree.map_structure(
                        lambda value: found.get(id(value), value), (record.args, record.kwargs)
                    )
                    outputs = keras.tree.flatten(record.layer.compute_output_spec(*args, **kwargs))
                    found.update(zip(map(id, record.outputs), outputs, strict=True))
        return found

    def all_layers_in(self, layer: Any) -> list[Any]:
        return parts(layer)[1:] if isinstance(layer, keras.layers.Layer) else []

    # -- descriptions ----------------------------------------------------------------------

    def describe(self, call: Call) -> Op | Several | None:
        layers = parts(call.layer) if isinstance(call.layer, keras.layers.Layer) else []
        if any(getattr(part, "lora_enabled", False) for part in layers):
            return Opaque("computes its kernel from LoRA weights")
        if any(part.quantization_mode is not None for part in layers):
            return Opaque("is quantized")
        return describe(call)

    def reason_to_stay(self, layer: Any) -> Reason | None:
        return None

    def trains_otherwise(self, layer: Any) -> Reason | None:
        # Releases before 3.14 lack this attribute.
        return Reason(Obstacle.RENORM) if getattr(layer, "renorm", False) else None

    def axis_of(self, layer: Any) -> int:
        return int(layer.axis) % int(layer.input_spec.ndim)

    def epsilon_of(self, layer: Any) -> float:
        return float(layer.epsilon)

    def has_fused_operation(self) -> bool:
        return bool(keras.backend.backend() == "tensorflow")

    def misplaces_bias(self, axis: int, shape: Shape) -> bool:
        return self.may_misplace_bias(axis, shape) and _adds_along_the_last_axis()

    def may_misplace_bias(self, axis: int, shape: Shape) -> bool:
        # On TensorFlow, `keras.ops.add` takes a tensor with nothing but a channel axis for a
        # bias, and adds it along the last axis wherever that is as long.
        *_, last = shape
        return axis != len(shape) - 1 and shape[axis] != 1 and last in (None, shape[axis])

    # -- copies ----------------------------------------------------------------------------

    def config_of(self, layer: Any) -> dict[str, Any]:
        with warnings.catch_warnings():
            # The function itself is shared with the copy, not deserialized from its byte code.
            warnings.filterwarnings("ignore", ".*includes a `lambda`", UserWarning)
            config = layer.get_config()
        if "dtype" in config and isinstance(layer.dtype_policy, DTypePolicyMap):
            config["dtype"] = layer.dtype_policy  # its own configuration would lose its policies
        if not is_stock(type(layer)):
            return _without_unknown_arguments(type(layer), config)
        return config

    def without_functions(self, config: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(config.get("function"), dict):
            return config
        left = {key: config[key] for key in config if key not in ("output_shape", "mask")}
        return {**left, "function": keras.saving.serialize_keras_object(self.linear)}

    def scope(self, objects: dict[str, Any]) -> AbstractContextManager[Any]:
        scope = ExitStack()
        scope.enter_context(keras.saving.CustomObjectScope(objects))
        # Any code that the model contains is already running.
        scope.enter_context(SafeModeScope(safe_mode=False))
        return scope

    def rename(self, layer: Any, name: str) -> None:
        layer.name = name

    def copy_operation(self, operation: Any) -> Any:
        if isinstance(operation, keras.Function):
            raise RewriteError(
                f"{label(operation)} cannot be copied: it shares its layers with the function "
                "that it was made of. Make it a keras.Model"
            )
        new = copy.copy(operation)  # it has no weights
        new._inbound_nodes, new._outbound_nodes = [], []
        return new

    @contextmanager
    def replacing(self, parent: Any, old: Any, new: Any) -> Iterator[None]:
        tracker = parent._tracker
        was_locked = tracker.locked
        tracker.unlock()
        if tracker.is_in_store("layers", old) and not tracker.is_in_store("layers", new):
            tracker.replace_tracked_value("layers", old, new)  # keeps their order
        yield
        tracker.locked = was_locked

    def build_copy(self, old: Any, new: Any) -> None:
        if not new.built:
            new.build_from_config(old.get_build_config() or {})

    def reloaded(self, model: Any, classes: dict[str, type]) -> Any:
        with self.scope(classes):
            return keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(model))

    def is_variable(self, value: Any) -> bool:
        return isinstance(value, keras.Variable)

    def copy_variable(self, variable: Any) -> Any:
        value = keras.ops.convert_to_numpy(variable)
        return keras.Variable(
            value, dtype=variable.dtype, trainable=variable.trainable, name=variable.name
        )

    def draws_seeds(self, value: Any) -> bool:
        return isinstance(value, keras.random.SeedGenerator)

    def copy_seeds(self, value: Any) -> Any:
        new = keras.random.SeedGenerator.from_config(value.get_config())
        _set(new.state, value.state)
        return new

    def own_variables(self, layer: Any) -> list[Any]:
        return [*layer._trainable_variables, *layer._non_trainable_variables]

    def variables(self, layer: Any) -> list[Any]:
        return list(layer.weights)

    def states(self, layer: Any) -> list[Any]:
        kept = getattr(layer, "states", None) if getattr(layer, "stateful", False) else None
        seeds = [generator.state for generator in layer._seed_generators]
        return [*seeds, *keras.tree.flatten(kept or [])]

    def assign(self, target: Any, source: Any) -> None:
        _set(target, source)
        target.trainable = source.trainable

    # -- compiled models -------------------------------------------------------------------

    def is_compiled(self, model: Any) -> bool:
        return bool(model.compiled)

    def compile_arguments(self, model: Any) -> dict[str, Any]:
        given = {k: v for k, v in model._compile_config.config.items() if k != "optimizer"}
        now = ("run_eagerly", "steps_per_execution", "jit_compile")  # which may be set later
        # The optimizer scales losses already if it is to.
        return given | {name: getattr(model, name) for name in now} | {"auto_scale_loss": False}

    def inner_optimizer(self, optimizer: Any) -> Any:
        scales = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
        return optimizer.inner_optimizer if scales else optimizer

    def functions_of(self, optimizer: Any) -> dict[str, Any]:
        rate = getattr(optimizer, "_learning_rate", None)
        return {"learning_rate": rate} if callable(rate) else {}

    def known_variables(self, optimizer: Any, variables: list[Any]) -> list[Any] | None:
        return list(optimizer._trainable_variables) if optimizer.built else None

    def build_optimizer(self, optimizer: Any, variables: list[Any]) -> None:
        optimizer.build(variables)

    def optimizer_state(self, optimizer: Any) -> list[Any]:
        return list(optimizer.variables)


def _set(target: Any, source: Any) -> None:
    # On JAX both would hold one array, which training either of them takes from the other.
    target.assign(keras.ops.copy(keras.ops.convert_to_tensor(source)))


@cache
def _adds_along_the_last_axis() -> bool:
    """Whether the installed Keras adds a bias of axis 1 along another axis of the same size."""
    bias = np.array([[[0], [1]]], np.float32)
    added = keras.ops.add(np.zeros((1, 2, 2), np.float32), bias)
    return bool(keras.ops.convert_to_numpy(added)[0, 0, 1])


def _agree(one: Shape, other: Shape) -> bool:
    """Whether two shapes may be those of one tensor."""
    return len(one) == len(other) and all(
        None in (a, b) or a == b for a, b in zip(one, other, strict=True)
    )


def functional_of(model: Any) -> Any:
    """The Functional model that a visible model is, or has inside if it is Sequential."""
    return model._functional if isinstance(model, keras.Sequential) else model


def _record(node: Any) -> Record:
    args, kwargs = tuple(node.arguments.args), dict(node.arguments.kwargs)
    for name in [name for name in kwargs if name == "mask" or name.endswith("_mask")]:
        if _comes_with_inputs(name, kwargs[name], node.operation, args, kwargs):
            del kwargs[name]
    inputs = [t for t in keras.tree.flatten((args, kwargs)) if isinstance(t, keras.KerasTensor)]
    return Record(node.operation, args, kwargs, tuple(inputs), tuple(node.outputs))


def _comes_with_inputs(
    name: str, mask: Any, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> bool:
    """Whether a recorded mask is just the one that came with the tensors it belongs to.

    Keras finds such masks when a layer is called, and records them as if the caller had passed
    them.
    """
    data = args[0] if args else None
    if name != "mask":
        data = inspect.signature(layer.call).bind(*args, **kwargs).arguments.get(name[:-5])
    carried = [getattr(t, "_keras_mask", None) for t in keras.tree.flatten(data)]
    given = keras.tree.flatten(mask)
    return all(value is None for value in given) or list(map(id, given)) == list(map(id, carried))


def _without_unknown_arguments(kind: type, config: dict[str, Any]) -> dict[str, Any]:
    """An automatic configuration, reduced to the arguments that the constructor accepts."""
    parameters = inspect.signature(kind).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return config
    common = {"name", "trainable", "dtype"} - set(parameters)
    return {key: value for key, value in config.items() if key not in common}


KERAS_3 = Keras3()

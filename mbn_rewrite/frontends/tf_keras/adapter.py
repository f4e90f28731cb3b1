"""Adapter of tf_keras: its differences from Keras 3; see `keras_common.adapter`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cache
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras
from tf_keras.src.engine.functional import Functional, has_functional_like_constructor
from tf_keras.src.engine.keras_tensor import KerasTensor
from tf_keras.src.engine.sequential import Sequential
from tf_keras.src.layers.core.tf_op_layer import (
    ClassMethod,
    InstanceMethod,
    InstanceProperty,
    TFOpLambda,
)
from tf_keras.src.layers.normalization import batch_normalization_v1
from tf_keras.src.layers.normalization.batch_normalization import BatchNormalizationBase
from tf_keras.src.mixed_precision.loss_scale_optimizer import (
    LossScaleOptimizer,
    LossScaleOptimizerV3,
)
from tf_keras.src.optimizers.legacy.optimizer_v2 import _var_key as legacy_key
from tf_keras.src.saving.legacy.saved_model.utils import in_tf_saved_model_scope
from tf_keras.src.saving.serialization_lib import SafeModeScope

from mbn_rewrite.frontends.keras_common.adapter import KerasAdapter
from mbn_rewrite.frontends.keras_common.calls import Call, Record
from mbn_rewrite.frontends.keras_common.cloning import share_config_objects
from mbn_rewrite.frontends.keras_common.op_table import layer_table
from mbn_rewrite.frontends.keras_common.probing import Trace
from mbn_rewrite.frontends.tf_keras import model_optimization, tracing
from mbn_rewrite.frontends.tf_keras.functions import describe
from mbn_rewrite.frontends.tf_keras.inference_layers import (
    BorderedConvolution,
    ChannelClip,
    PassThrough,
    ScaleAndShift,
)
from mbn_rewrite.frontends.tf_keras.training_layers import (
    ModifiedBatchNormalization,
    StridedBatchNormalization,
)
from mbn_rewrite.ir.graph import Affine, Op, Opaque, Several, Shape
from mbn_rewrite.ir.reasons import Obstacle, Reason

# Both classes of optimizers that scale losses, for legacy optimizers and for others.
_SCALING = (LossScaleOptimizer, LossScaleOptimizerV3)
# Layers that Keras makes of TensorFlow functions have their `call` set by their constructor.
_CALL_IS_MADE = (TFOpLambda, ClassMethod, InstanceMethod, InstanceProperty)


class TfKeras(KerasAdapter):
    """Adapter of tf_keras, that is, Keras 2."""

    package = "tf_keras"
    layers = tf_keras.layers
    model = tf_keras.Model
    functional = Functional
    sequential = tf_keras.Sequential
    batch_norms = (
        tf_keras.layers.BatchNormalization,
        tf_keras.layers.experimental.SyncBatchNormalization,
        batch_normalization_v1.BatchNormalization,
    )
    batch_norm_base = BatchNormalizationBase
    linear = staticmethod(tf_keras.activations.linear)
    homogeneous = (tf_keras.activations.relu, tf.nn.relu, tf.nn.leaky_relu)
    clips = (
        (tf_keras.activations.relu, (0.0, None)),
        (tf.nn.relu, (0.0, None)),
        (tf.nn.relu6, (0.0, 6.0)),
    )
    depthwise_kernel = "depthwise_kernel"
    scale_and_shift = ScaleAndShift
    channel_clip = ChannelClip
    pass_through = PassThrough
    bordered_convolution = BorderedConvolution
    training_layers = (StridedBatchNormalization, ModifiedBatchNormalization)
    private = frozenset(
        {
            *("_obj_reference_counts", "_inbound_nodes", "_outbound_nodes", "_layer_call_argspecs"),
            *("_input_layers", "_output_layers", "_input_coordinates", "_output_coordinates"),
            *("_nodes_by_depth", "_network_nodes", "_unconditional_checkpoint_dependencies"),
        }
    )
    layer_lists = ("_self_tracked_trackables",)
    model_attributes = frozenset(
        {
            *("inputs", "outputs", "_nested_inputs", "_nested_outputs", "_feed_inputs"),
            *("_output_mask_cache", "_output_tensor_cache"),
            *("_compile_config", "_pss_evaluation_shards", "loss"),
        }
    )
    metric = tf_keras.metrics.Metric
    optimizers = (tf_keras.optimizers.Optimizer, tf_keras.optimizers.legacy.Optimizer)
    how_to_export = 'write a SavedModel (save_format="tf"; tf.saved_model.load takes it)'
    export_call = 'model.save("saved_model", save_format="tf")'

    def __init__(self) -> None:
        self.describers = {**layer_table(tf_keras.layers), PassThrough: lambda call: Affine()}

    # -- structures and tensors ------------------------------------------------------------

    def flatten(self, structure: Any) -> list[Any]:
        return tf.nest.flatten(structure)

    def map_structure(self, function: Callable[[Any], Any], structure: Any) -> Any:
        return tf.nest.map_structure(function, structure)

    def shape_of(self, tensor: Any) -> Shape:
        if _is_none(tensor):
            return ()
        shape = tensor.shape
        return () if shape.rank is None else tuple(shape.as_list())

    def dtype_of(self, tensor: Any) -> str:
        return "none" if _is_none(tensor) else tensor.dtype.name

    def is_symbolic(self, value: Any) -> bool:
        return isinstance(value, KerasTensor)

    def tensor_like(self, shape: Shape, dtype: str) -> Any:
        return KerasTensor(tf.TensorSpec(shape, dtype))

    # -- models ----------------------------------------------------------------------------

    def is_visible(self, layer: Any) -> bool:
        return (
            isinstance(layer, Functional)
            and bool(layer._is_graph_network)
            and type(layer).call in (Functional.call, Sequential.call)
        )

    def has_calls_on_record(self, layer: Any) -> bool:
        return isinstance(layer, Functional)

    def has_stock_constructor(self, kind: type) -> bool:
        if issubclass(kind, Sequential):
            return kind.__init__ is Sequential.__init__  # type: ignore[misc]
        return bool(has_functional_like_constructor(kind))

    def interface_of(self, model: Any) -> tuple[Any, Any]:
        return model._nested_inputs, model._nested_outputs

    def calls_of(self, model: Any) -> Iterator[Record]:
        # Not all nodes of the model: the layers behind `add_loss` are among them too.
        needed: set[int] = set()
        pending = [t._keras_history for t in (*model.inputs, *model.outputs)]
        while pending:
            history = pending.pop()
            node = history.layer._inbound_nodes[history.node_index]
            if id(node) not in needed:
                needed.add(id(node))
                pending += [t._keras_history for t in node.keras_inputs]
        for depth in sorted(model._nodes_by_depth, reverse=True):
            yield from (_record(n) for n in model._nodes_by_depth[depth] if id(n) in needed)

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
        return id(variable.handle) if isinstance(variable, tf.Variable) else id(variable)

    def called_on_record(
        self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any
    ) -> Any:
        return tracing.called_on_record(layer, args, kwargs, outputs)

    def give_outputs_of(self, layer: Any, probe: Any) -> None:
        vars(probe)["_infer_output_signature"] = layer._infer_output_signature

    def call_of(self, model: Any) -> Record | None:
        return tracing.call_of(model)

    def all_layers_in(self, layer: Any) -> list[Any]:
        return list(layer.submodules)

    # -- descriptions ----------------------------------------------------------------------

    def describe(self, call: Call) -> Op | Several | None:
        why = model_optimization.why_opaque(call.layer)
        return Opaque(why) if why else describe(call)

    def reason_within(self, layer: Any) -> Reason | None:
        return model_optimization.reason_within(layer)

    def trains_otherwise(self, layer: Any) -> Reason | None:
        if layer.renorm:
            return Reason(Obstacle.RENORM)
        if layer.virtual_batch_size is not None:
            return Reason(Obstacle.VIRTUAL_BATCHES)
        return None

    def reason_to_stay(self, layer: Any) -> Reason | None:
        if layer.adjustment is not None:
            return Reason(Obstacle.ADJUSTMENT)
        if len(layer.axis) != 1:
            return Reason(Obstacle.SEVERAL_AXES, str(tuple(layer.axis)))
        return None

    def axis_of(self, layer: Any) -> int:
        (axis,) = layer.axis
        return int(axis) - (layer.virtual_batch_size is not None)  # which adds an axis before it

    def epsilon_of(self, layer: Any) -> float:
        """Epsilon that TensorFlow uses for this layer.

        Earlier releases raise the epsilon of the fused operation to 1.001e-5, the least that
        cuDNN accepts; later ones use it as it is.
        """
        epsilon = float(layer.epsilon)
        is_raised = layer.fused and epsilon < 1.001e-5
        return max(epsilon, _least_fused_epsilon()) if is_raised else epsilon

    def fuses(self, layer: Any) -> bool:
        return bool(layer.fused)

    # -- copies ----------------------------------------------------------------------------

    def config_of(self, layer: Any) -> dict[str, Any]:
        config = layer.get_config()
        if getattr(layer, "virtual_batch_size", None) is not None:
            # Building such a BatchNormalization shifts its axes by one.
            config["axis"] = [axis - 1 for axis in layer.axis]
        return config

    def scope(self, objects: dict[str, Any]) -> AbstractContextManager[Any]:
        scope = ExitStack()
        scope.enter_context(tf_keras.utils.custom_object_scope(objects))
        # Any code that the model contains is already running.
        scope.enter_context(SafeModeScope(safe_mode=False))
        return scope

    def rename(self, layer: Any, name: str) -> None:
        layer._name = name

    def assigns_its_own_call(self, layer: Any) -> bool:
        return isinstance(layer, _CALL_IS_MADE)

    def build_copy(self, old: Any, new: Any) -> None:
        if not new.built:
            with tf.init_scope():
                new.build_from_config(old.get_build_config() or {})

    def reloaded(self, model: Any, classes: dict[str, type]) -> Any:
        with self.scope(classes):
            config = tf_keras.saving.serialize_keras_object(model)
            return tf_keras.saving.deserialize_keras_object(config, safe_mode=False)

    def network_config(self, model: Any) -> dict[str, Any] | None:
        if not in_tf_saved_model_scope():
            return None
        if not isinstance(model, Functional):
            return dict(type(model).get_config(model))
        base = Sequential if isinstance(model, Sequential) else Functional
        config: dict[str, Any] = base.get_config(model)
        return config

    def is_variable(self, value: Any) -> bool:
        return isinstance(value, tf.Variable)

    def copy_variable(self, variable: Any) -> Any:
        name = variable.name.partition(":")[0]
        return tf.Variable(variable, trainable=variable.trainable, name=name)

    def copy_of_wrapper(self, layer: Any) -> tuple[Any, Callable[[], None]] | None:
        is_one = model_optimization.is_quantising(layer)
        return model_optimization.copy_of(layer) if is_one else None

    def sync_config(self, layer: Any) -> None:
        if not isinstance(layer, tf_keras.layers.Bidirectional):
            return
        share_config_objects(layer.layer, layer.forward_layer, self)
        kept = getattr(layer, "_backward_layer_config", None)
        if kept is not None:
            config = {**self.config_of(layer.backward_layer), "name": kept["config"]["name"]}
            layer._backward_layer_config = {**kept, "config": config}

    def own_variables(self, layer: Any) -> list[Any]:
        return _variables([*layer._trainable_weights, *layer._non_trainable_weights])

    def variables(self, layer: Any) -> list[Any]:
        return _variables(layer.weights)

    def states(self, layer: Any) -> list[Any]:
        if not getattr(layer, "stateful", False):
            return []
        states = getattr(layer, "states", None)
        return [] if states is None else tf.nest.flatten(states)

    def assign(self, target: Any, source: Any) -> None:
        target.assign(source)

    # -- compiled models -------------------------------------------------------------------

    def is_compiled(self, model: Any) -> bool:
        return bool(model._is_compiled)

    def compile_arguments(self, model: Any) -> dict[str, Any]:
        given = {k: v for k, v in model._compile_config.config.items() if k != "optimizer"}
        # Which may be set later.
        now = {"run_eagerly": model._run_eagerly, "jit_compile": model.jit_compile}
        if given["steps_per_execution"] != "auto":
            now["steps_per_execution"] = int(model.steps_per_execution)
        return given | now

    def name_given(self, model: Any, metric: Any) -> str:
        # Where there are several outputs, Keras puts their names before those of metrics.
        outputs = sorted(model.output_names or (), key=len, reverse=True)
        several = len(outputs) > 1 and model.compiled_metrics.built
        before = [f"{name}_" for name in outputs if metric.name.startswith(f"{name}_")]
        return str(metric.name.removeprefix(before[0]) if several and before else metric.name)

    def inner_optimizer(self, optimizer: Any) -> Any:
        return optimizer.inner_optimizer if isinstance(optimizer, _SCALING) else optimizer

    def functions_of(self, optimizer: Any) -> dict[str, Any]:
        if isinstance(optimizer, tf_keras.optimizers.legacy.Optimizer):
            held = dict(optimizer._hyper)
        else:
            held = {"learning_rate": getattr(optimizer, "_learning_rate", None)}
        return {name: value for name, value in held.items() if callable(value)}

    def known_variables(self, optimizer: Any, variables: list[Any]) -> list[Any] | None:
        optimizer = self.inner_optimizer(optimizer)
        if isinstance(optimizer, tf_keras.optimizers.legacy.Optimizer):
            built, keys, key_of = bool(optimizer._weights), optimizer._slots, legacy_key
        else:
            built = bool(getattr(optimizer, "_built", False))
            keys, key_of = getattr(optimizer, "_index_dict", {}), optimizer._var_key
        by_key = {key_of(variable): variable for variable in variables}
        return [by_key.get(key) for key in keys] if built else None

    def build_optimizer(self, optimizer: Any, variables: list[Any]) -> None:
        optimizer = self.inner_optimizer(optimizer)
        is_legacy = isinstance(optimizer, tf_keras.optimizers.legacy.Optimizer)
        with tf.init_scope():
            (optimizer._create_all_weights if is_legacy else optimizer.build)(variables)

    def optimizer_state(self, optimizer: Any) -> list[Any]:
        inner = self.inner_optimizer(optimizer)
        state = list(inner.variables())
        if hasattr(inner, "_u_product"):  # which Nadam does not count among them
            state.append(inner._u_product)
        if isinstance(optimizer, _SCALING) and optimizer.dynamic:
            return [*state, optimizer._loss_scale.current_loss_scale, optimizer.dynamic_counter]
        return state

    def naming_like(self, layer: Any) -> AbstractContextManager[Any]:
        if not layer.variables:
            return nullcontext()
        prefix, _, _ = layer.variables[0].name.rpartition("/")
        return tf.name_scope(f"{prefix}/" if prefix else None)  # a slash for exactly that name

    @contextmanager
    def replacing(self, parent: Any, old: Any, new: Any) -> Iterator[None]:
        before = list(parent._self_tracked_trackables)
        yield
        # The new layer is tracked last, but the order of the weights must not change.
        tracked = parent._self_tracked_trackables
        gone = [i for i, x in enumerate(before) if not any(x is other for other in tracked)]
        come = [x for x in tracked if not any(x is other for other in before)]
        if len(gone) == len(come) == 1:
            tracked[:] = [x for x in tracked if x is not come[0]]
            tracked.insert(gone[0], come[0])


def _record(node: Any) -> Record:
    outputs = tuple(tf.nest.flatten(node.outputs))
    return Record(node.layer, node.call_args, node.call_kwargs, tuple(node.keras_inputs), outputs)


def _is_none(tensor: Any) -> bool:
    """Whether a Keras tensor stands for a None that a layer returns."""
    return isinstance(getattr(tensor, "type_spec", None), tf.NoneTensorSpec)


def _variables(things: list[Any]) -> list[Any]:
    return [thing for thing in things if isinstance(thing, tf.Variable)]


@cache
def _least_fused_epsilon() -> float:
    """Least epsilon that the installed TensorFlow uses if fused, as a result of it shows."""
    one, zero = np.ones((1,), np.float32), np.zeros((1,), np.float32)
    variance = np.full((1,), 1e-5, np.float32)
    y, *_ = tf.compat.v1.nn.fused_batch_norm(
        np.ones((1, 1, 1, 1), np.float32), one, zero, zero, variance, 1e-12, is_training=False
    )
    return 1.001e-5 if float(y[0, 0, 0, 0]) < 300.0 else 0.0  # 1/sqrt(1e-5) is 316


TF_KERAS = TfKeras()

"""Traces of tf_keras layers that call others in Python code; see `keras_common.tracing`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest import mock

import tensorflow as tf
import tf_keras
from tensorflow.python.framework.func_graph import FuncGraph
from tf_keras.src import backend
from tf_keras.src.engine.keras_tensor import KerasTensor, keras_tensor_from_type_spec
from tf_keras.src.engine.node import Node

from mbn_rewrite.frontends.keras_common.calls import Record
from mbn_rewrite.frontends.keras_common.cloning import stock_call
from mbn_rewrite.frontends.keras_common.probing import NotTraceable, Trace, in_order, set_method


def traced(
    record: Record, probe: Any, record_of: Callable[[Any], Record], size: int | None = None
) -> Trace:
    """Trace of one call of a layer.

    Args:
        record: the call.
        probe: what to call in the layer's place.
        record_of: reads a node that Keras has made for a call.
        size: what to take for the sizes that are open, but for the number of examples; or None.
    """
    inputs = [tf_keras.Input(type_spec=_with_sizes(t.type_spec, size)) for t in record.inputs]
    places = dict(zip(map(id, record.inputs), inputs, strict=True))
    args, kwargs = tf.nest.map_structure(
        lambda value: places.get(id(value), value), (record.args, record.kwargs)
    )
    if not probe._call_spec.arg_was_passed("training", args, kwargs, inputs_in_args=True):
        kwargs = {**kwargs, "training": False}  # layers that do not take it hand it on
    found: list[tuple[list[Record], list[Any]]] = []

    def call(self: Any, inputs_: Any, masks: Any, args: Any, kwargs: Any) -> Any:
        result = self.call(_cast(self, inputs_), *args, **kwargs)
        outputs = tf.nest.flatten(result)
        if not all(isinstance(t, KerasTensor) for t in outputs):
            raise NotTraceable("it returns something that is no tensor")
        # Before Keras makes the call itself what gave its results.
        found.append((in_order(outputs, inputs, lambda t: record_of(_node_of(t))), outputs))
        return result

    set_method(probe, "_keras_tensor_symbolic_call", call)
    stock_call(probe)(probe, *args, **kwargs)
    ((records, outputs),) = found
    given = (value for each in records for value in tf.nest.flatten((each.args, each.kwargs)))
    reads = {id(value) for value in given if isinstance(value, tf.Variable)}
    return Trace(tuple(inputs), tuple(records), tuple(outputs), frozenset(reads))


def watched(
    is_watched: Callable[[], bool], note_read: Callable[[Any], None]
) -> AbstractContextManager[Any]:
    """See `KerasAdapter.watched`."""
    capture = FuncGraph.capture

    def noted(self: Any, tensor: Any, *args: Any, **kwargs: Any) -> Any:
        if is_watched():
            note_read(tensor)
        return capture(self, tensor, *args, **kwargs)

    return mock.patch.object(FuncGraph, "capture", noted)


@contextmanager
def set_apart() -> Iterator[None]:
    """See `KerasAdapter.set_apart`."""
    # In a graph, nothing is assigned to variables and no numbers are drawn. It captures the handles
    # of variables that code reads, and so do the graphs in it in which layers run.
    with _names_as_they_were(), _seeds_as_they_were(), FuncGraph("trace").as_default():
        yield


def called_on_record(
    layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any
) -> Any:
    """See `KerasAdapter.called_on_record`."""
    new = tf.nest.map_structure(lambda t: keras_tensor_from_type_spec(t.type_spec), outputs)
    Node(layer, args, kwargs, new)
    return new


def call_of(model: Any) -> Record | None:
    """A call of a subclassed model, as it was called first; None if it never was."""
    spec = model.save_spec(dynamic_batch=True)
    if spec is None:
        return None
    with _names_as_they_were():
        args, kwargs = tf.nest.map_structure(_as_keras_tensor, spec)
    given = [t for t in tf.nest.flatten((args, kwargs)) if isinstance(t, KerasTensor)]
    return Record(model, args, kwargs, tuple(given), ())


def _as_keras_tensor(spec: Any) -> Any:
    return tf_keras.Input(type_spec=spec) if isinstance(spec, tf.TypeSpec) else spec


def _with_sizes(spec: Any, size: int | None) -> Any:
    """A specification with a size in the place of those that are open, but for the first."""
    if size is None or not isinstance(spec, tf.TensorSpec) or not spec.shape.rank:
        return spec
    first, *rest = spec.shape
    return tf.TensorSpec([first, *(size if each is None else each for each in rest)], spec.dtype)


def _cast(layer: Any, inputs: Any) -> Any:
    """Inputs as Keras casts them where layers compute in another dtype."""
    dtype = layer._compute_dtype_object
    if not layer._autocast or dtype is None or not dtype.is_floating:
        return inputs
    return tf.nest.map_structure(
        lambda t: (
            tf.cast(t, dtype)
            if isinstance(t, KerasTensor) and t.dtype.is_floating and t.dtype != dtype
            else t
        ),
        inputs,
    )


def _node_of(tensor: Any) -> Any:
    history = tensor._keras_history
    return history.layer._inbound_nodes[history.node_index]


@contextmanager
def _names_as_they_were() -> Iterator[None]:
    """Context manager after which new layers are named as they would have been."""
    numbers = backend.PER_GRAPH_OBJECT_NAME_UIDS
    with tf.init_scope():
        eager = backend.get_graph()
    # Other threads count in graphs of their own, and go on.
    graphs = {id(graph): graph for graph in (eager, backend.get_graph())}.values()
    before = [(graph, dict(numbers.get(graph, {}))) for graph in graphs]
    observed = set(backend.OBSERVED_NAMES)
    try:
        yield
    finally:
        for graph, names in before:
            if graph in numbers:
                numbers[graph].clear()
                numbers[graph].update(names)
        backend.OBSERVED_NAMES.intersection_update(observed)


@contextmanager
def _seeds_as_they_were() -> Iterator[None]:
    """Context manager after which Keras draws the seeds that it would have drawn."""
    generator = getattr(backend._SEED_GENERATOR, "generator", None)
    before = generator.getstate() if generator else None
    try:
        yield
    finally:
        if generator:
            generator.setstate(before)
        elif hasattr(backend._SEED_GENERATOR, "generator"):
            del backend._SEED_GENERATOR.generator

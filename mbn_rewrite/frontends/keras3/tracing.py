"""Traces of Keras 3 layers that call others in Python code; see `keras_common.tracing`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest import mock

import keras
from keras.layers import Layer
from keras.src import backend
from keras.src.backend.common import global_state
from keras.src.ops.node import Node

from mbn_rewrite.frontends.keras_common.calls import Record
from mbn_rewrite.frontends.keras_common.tracing import NotTraceable, Trace, in_order, set_method


class _Reads(keras.StatelessScope):
    """Scope in which no variable changes, and which notes those that are read.

    What layers read that are called is not among them, since Keras runs these in their own scopes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.read: set[int] = set()

    def get_current_value(self, variable: Any) -> Any:
        self.read.add(id(variable))
        return super().get_current_value(variable)


class _Caller(Layer):
    """Layer that calls one that takes no `training`, but whose layers learn of it."""

    def call(self, *, function: Callable[[], Any], training: bool | None = None) -> None:
        function()


@cache
def _caller() -> _Caller:
    return _Caller(name="caller", dtype="float32")


def traced(record: Record, probe: Any, record_of: Callable[[Any], Record]) -> Trace:
    """Trace of one call of a layer.

    Args:
        record: the call.
        probe: what to call in the layer's place.
        record_of: reads a node that Keras has made for a call.
    """
    inputs = [keras.KerasTensor(t.shape, dtype=t.dtype, name="traced") for t in record.inputs]
    places = dict(zip(map(id, record.inputs), inputs, strict=True))
    args, kwargs = keras.tree.map_structure(
        lambda value: places.get(id(value), value), (record.args, record.kwargs)
    )
    found: list[tuple[list[Record], list[Any]]] = []

    def symbolic_call(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = self.call(*args, **kwargs)
        outputs = keras.tree.flatten(result)
        if not all(isinstance(t, keras.KerasTensor) for t in outputs):
            raise NotTraceable("it returns something that is no tensor")
        # Before Keras makes the call itself what gave its results.
        found.append((in_order(outputs, inputs, lambda t: record_of(_node_of(t))), outputs))
        return result

    set_method(probe, "symbolic_call", symbolic_call)
    with _names_as_they_were(), _Reads() as scope:
        if probe._call_has_training_arg:
            probe(*args, **{**kwargs, "training": False})
        else:
            _caller()(function=lambda: probe(*args, **kwargs), training=False)
    ((records, outputs),) = found
    given = {
        id(value)
        for each in records
        for value in keras.tree.flatten((each.args, each.kwargs))
        if isinstance(value, keras.Variable)  # it is not read here
    }
    return Trace(tuple(inputs), tuple(records), tuple(outputs), frozenset(scope.read | given))


def called_on_record(
    layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any
) -> Any:
    """See `KerasAdapter.called_on_record`."""
    new = keras.tree.map_structure(lambda t: keras.KerasTensor(t.shape, dtype=t.dtype), outputs)
    Node(layer, args, kwargs, new)
    return new


def call_of(model: Any) -> Record | None:
    """A call of a subclassed model, as it was built; None if that is not known."""
    config = model.get_build_config() or {}
    shapes = config.get("shapes_dict") or {"input_shape": config.get("input_shape")}
    if None in shapes.values():
        return None
    given = {
        name.removesuffix("_shape"): keras.tree.map_shape_structure(
            lambda shape: keras.KerasTensor(shape, dtype=model.input_dtype, name="traced"), shape
        )
        for name, shape in shapes.items()
    }
    args = tuple(given.values()) if len(given) == 1 else ()
    kwargs = {} if args else given
    return Record(model, args, kwargs, tuple(keras.tree.flatten((args, kwargs))), ())


@contextmanager
def as_with_other_tensors() -> Iterator[None]:
    """Context manager in which layers take whatever Keras tensors they take other tensors of.

    Sequential models take other sizes than they declare, since their code does not check what it is
    given. Where what a layer says of its output cannot be had, its code is asked.
    """
    specified, symbolic_call = keras.Sequential.compute_output_spec, Layer.symbolic_call

    def as_it_runs(self: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        network = self._functional
        ranks = [len(t.shape) for t in keras.tree.flatten(inputs)]
        if network is None or ranks != [len(t.shape) for t in network.inputs]:
            return specified(self, inputs, *args, **kwargs)
        return network._run_through_graph(inputs, lambda layer: layer.compute_output_spec)

    def by_its_code(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return symbolic_call(self, *args, **kwargs)
        except NotTraceable:
            raise
        except Exception as error:  # the user's code may raise anything
            try:
                return backend.compute_output_spec(self.call, *args, **kwargs)
            except Exception:
                raise error from None

    with (
        mock.patch.object(keras.Sequential, "compute_output_spec", as_it_runs),
        mock.patch.object(Layer, "symbolic_call", by_its_code),
    ):
        yield


def _node_of(tensor: Any) -> Any:
    history = tensor._keras_history
    if history.operation is None:
        raise NotTraceable("it uses a Keras tensor of another model")
    return history.operation._inbound_nodes[history.node_index]


@contextmanager
def _names_as_they_were() -> Iterator[None]:
    """Context manager after which new layers and tensors are named as they would have been."""
    numbers = global_state.get_global_attribute("object_name_uids")
    before = dict(numbers or {})
    try:
        yield
    finally:
        numbers = global_state.get_global_attribute("object_name_uids")
        if numbers is not None:
            numbers.clear()
            numbers.update(before)

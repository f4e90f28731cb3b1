"""Traces of Keras 3 layers that call others in Python code; see `keras_common.tracing`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, partial
from typing import Any
from unittest import mock

import keras
from keras.src import backend
from keras.src.backend.common import global_state
from keras.src.ops.node import Node

from mbn_rewrite.frontends.keras_common.calls import Record
from mbn_rewrite.frontends.keras_common.cloning import stock_call
from mbn_rewrite.frontends.keras_common.probing import NotTraceable, Trace, in_order, set_method


class _Caller(keras.layers.Layer):
    """Layer that calls one that takes no `training`, but whose layers learn of it."""

    def call(self, *, function: Callable[[], Any], training: bool | None = None) -> None:
        function()


@cache
def _caller() -> _Caller:
    return _Caller(name="caller", dtype="float32")


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
    shapes = [
        [size if each is None and axis else each for axis, each in enumerate(t.shape)]
        for t in record.inputs
    ]
    inputs = [
        keras.KerasTensor(shape, dtype=t.dtype, name="traced")
        for shape, t in zip(shapes, record.inputs, strict=True)
    ]
    places = dict(zip(map(id, record.inputs), inputs, strict=True))
    args, kwargs = keras.tree.map_structure(
        lambda value: places.get(id(value), value), (record.args, record.kwargs)
    )
    if probe._call_has_training_arg:
        kwargs["training"] = False
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
    with keras.StatelessScope():
        if probe._call_has_training_arg:
            stock_call(probe)(probe, *args, **kwargs)
        else:
            call = partial(stock_call(probe), probe, *args, **kwargs)
            _caller()(function=call, training=False)
    ((records, outputs),) = found
    given = {
        id(value)
        for each in records
        for value in keras.tree.flatten((each.args, each.kwargs))
        if isinstance(value, keras.Variable)  # it is not read here
    }
    return Trace(tuple(inputs), tuple(records), tuple(outputs), frozenset(given))


@contextmanager
def watched(is_watched: Callable[[], bool], note_read: Callable[[Any], None]) -> Iterator[None]:
    """See `KerasAdapter.watched`."""
    get_current_value = keras.StatelessScope.get_current_value
    symbolic_call = keras.layers.Layer.symbolic_call

    def noted(self: Any, variable: Any) -> Any:
        if is_watched():
            note_read(variable)
        return get_current_value(self, variable)

    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        return (outputs_of if is_watched() else symbolic_call)(self, *args, **kwargs)

    with (
        at_other_sizes(is_watched),
        mock.patch.object(keras.StatelessScope, "get_current_value", noted),
        mock.patch.object(keras.layers.Layer, "symbolic_call", called),
    ):
        yield


@contextmanager
def set_apart() -> Iterator[None]:
    """See `KerasAdapter.set_apart`."""
    with _names_as_they_were(), _without_effects():
        yield


@contextmanager
def at_other_sizes(is_meant: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """Context manager in which Sequential models take Keras tensors of other sizes than declared.

    They do so with other tensors, since their code does not check what it is given.

    Args:
        is_meant: whether they are to do so where they are called.
    """
    specified = keras.Sequential.compute_output_spec

    def as_it_runs(self: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        network = self._functional
        ranks = [len(t.shape) for t in keras.tree.flatten(inputs)]
        is_alike = network is not None and ranks == [len(t.shape) for t in network.inputs]
        if not is_alike or not is_meant():
            return specified(self, inputs, *args, **kwargs)
        return network._run_through_graph(inputs, lambda layer: layer.compute_output_spec)

    with mock.patch.object(keras.Sequential, "compute_output_spec", as_it_runs):
        yield


def outputs_of(layer: Any, *args: Any, **kwargs: Any) -> Any:
    """What a layer gives on Keras tensors, by its code where its own word cannot be had."""
    try:
        return layer.compute_output_spec(*args, **kwargs)
    except NotTraceable:
        raise
    except Exception as error:  # the user's code may raise anything
        try:
            return backend.compute_output_spec(layer.call, *args, **kwargs)
        except Exception:
            raise error from None


def _without_effects() -> AbstractContextManager[Any]:
    """Context manager in which functions of the backend change neither variables nor seeds."""
    if keras.backend.backend() == "tensorflow":
        from tensorflow.python.framework.func_graph import FuncGraph

        return FuncGraph("trace").as_default()
    if keras.backend.backend() == "torch":
        import torch

        return torch.random.fork_rng(devices=[])
    return nullcontext()


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

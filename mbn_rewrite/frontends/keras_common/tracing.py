"""Traces of layers that call other layers in Python code: what they call, at inference.

The `call` of such a layer is run once on Keras tensors, and Keras records what it calls. It runs on
a probe: an object of a class derived from the layer's, with the layer's attributes. Neither the
layer nor anything in it is changed: what Keras notes at the layers that are called is taken back.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mbn_rewrite.errors import cause_of
from mbn_rewrite.frontends.keras_common.calls import Record
from mbn_rewrite.frontends.keras_common.cloning import parts

if TYPE_CHECKING:
    from mbn_rewrite.frontends.keras_common.adapter import KerasAdapter


class NotTraceable(Exception):  # noqa: N818 - what a layer is, not what went wrong
    """A layer's calls cannot be traced; the message says why, as a phrase."""


@dataclass(frozen=True, eq=False)
class Trace:
    """What a layer calls.

    Attributes:
        inputs: Keras tensors that stand for those it was called with, as `Record.inputs` has them.
        records: its calls, each after those on which it depends; those that nothing depends on are
            left out.
        outputs: what it returns, flattened.
        reads: ids of variables that its code reads itself, so that they cannot be changed.
    """

    inputs: tuple[Any, ...]
    records: tuple[Record, ...]
    outputs: tuple[Any, ...]
    reads: frozenset[int]


def probe_of(layer: Any, methods: dict[str, Callable[..., Any]], *bases: type) -> Any:
    """An object that is like a layer but for some methods.

    Its attributes are those of the layer. Lists, dictionaries and sets of attributes are its own.
    It takes no losses and metrics, which would be kept in the layer.

    Args:
        layer: the layer.
        methods: by name.
        bases: classes that come after the layer's own, and before those that these have in common.
    """
    kind = type(layer)
    methods = {"add_loss": _does_nothing, "add_metric": _does_nothing, **methods}
    made = types.new_class(
        kind.__name__, (kind, *bases), exec_body=lambda body: body.update(methods)
    )
    probe: Any = object.__new__(made)
    for name, value in vars(layer).items():
        own = next((each for each in (list, dict, set) if isinstance(value, each)), None)
        vars(probe)[name] = own(value) if own else value
    return probe


def _does_nothing(*_: Any, **__: Any) -> None:
    """Takes the place of a method that changes the layer."""


@contextmanager
def left_as_it_is(layer: Any) -> Iterator[None]:
    """Context manager that takes back what calls do to the attributes of a layer's sublayers."""
    before = [(vars(part), dict(vars(part))) for part in parts(layer)]
    lists = [
        (value, list(value))
        for _, kept in before
        for value in kept.values()
        if isinstance(value, list) and not hasattr(value, "_storage")  # tf_keras copies these
    ]
    try:
        yield
    finally:
        for attributes, kept in before:
            attributes.clear()
            attributes.update(kept)
        for value, items in lists:
            list.__setitem__(
                value, slice(None), items
            )  # those of Keras 3 track what they are given


def trace(record: Record, keras: KerasAdapter, outputs: tuple[Any, ...] | None) -> Trace:
    """Traces one call of a layer, at inference.

    Args:
        record: the call.
        keras: the adapter of its Keras.
        outputs: what it gave, flattened, if that is known.

    Raises:
        NotTraceable: its code cannot be run on Keras tensors, or gives something else on them.
    """
    layer = record.layer
    try:
        with left_as_it_is(layer):
            found = keras.traced(record)
    except NotTraceable:
        raise
    except Exception as error:  # the user's code may raise anything
        told = cause_of(error).removesuffix(".")
        raise NotTraceable(f"its code fails on Keras tensors ({told})") from error
    given, gives = (
        [(keras.shape_of(t), keras.dtype_of(t)) for t in tensors]
        for tensors in (outputs or (), found.outputs)
    )
    if outputs is not None and given != gives:
        raise NotTraceable("it gives something else when its code is run on Keras tensors")
    return found


def in_order(
    outputs: list[Any], inputs: list[Any], record_of: Callable[[Any], Record]
) -> list[Record]:
    """The calls on which Keras tensors depend, each after those on which it depends itself.

    Args:
        outputs: the Keras tensors.
        inputs: Keras tensors at which to stop.
        record_of: the call that gave a Keras tensor.
    """
    known = set(map(id, inputs))
    records: list[Record] = []
    pending = [(tensor, False) for tensor in reversed(outputs)]
    while pending:
        tensor, visited = pending.pop()
        if id(tensor) in known:
            continue
        record = record_of(tensor)
        missing = [t for t in record.inputs if id(t) not in known]
        if missing and not visited:
            pending.append((tensor, True))
            pending += [(t, False) for t in reversed(missing)]
            continue
        records.append(record)
        known.update(map(id, record.outputs))
    return records

"""What calls of layers gave on Keras tensors, so that the same calls need not be made again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mbn_rewrite.frontends.keras_common.adapter import KerasAdapter

_Told = tuple[Any, ...]  # shapes and dtypes of Keras tensors, and other arguments, as they nest


class _ValuesDecide(Exception):  # noqa: N818 - what a call is, not what went wrong
    """A call has arguments that shapes and dtypes do not tell apart."""


class KnownResults:
    """Results of calls of layers.

    Args:
        keras: the adapter of their Keras.
    """

    def __init__(self, keras: KerasAdapter) -> None:
        self._keras = keras
        self._known: dict[int, list[tuple[_Told, Any]]] = {}

    def note(self, layer: Any, args: Any, kwargs: Any, outputs: Any) -> None:
        """Notes what a call gave, if another call can be told to be the same."""
        told = self._told(args, kwargs)
        if told is not None and all(map(self._is_plain, self._keras.flatten(outputs))):
            self._known.setdefault(id(layer), []).append((told, outputs))

    def of(self, layer: Any, args: Any, kwargs: Any) -> Any:
        """What such a call of a layer gave; None if that is not known."""
        known = self._known.get(id(layer))
        told = self._told(args, kwargs) if known else None
        if told is None:
            return None
        return next((outputs for other, outputs in known or () if other == told), None)

    def _told(self, args: Any, kwargs: Any) -> _Told | None:
        """What a layer is called with, to be compared; None where values decide."""
        try:
            return self._described((args, kwargs))
        except _ValuesDecide:
            return None

    def _described(self, value: Any) -> _Told:
        kind = type(value)
        if kind is dict:
            return (kind, *((key, self._described(inner)) for key, inner in value.items()))
        if kind in (list, tuple):
            return (kind, *map(self._described, value))
        if value is None or kind in (bool, int, str):
            return kind, value
        if self._is_plain(value):
            return self._keras.shape_of(value), self._keras.dtype_of(value)
        raise _ValuesDecide

    def _is_plain(self, value: Any) -> bool:
        """Whether something is a Keras tensor without a mask."""
        return self._keras.is_symbolic(value) and not self._keras.carries_mask(value)

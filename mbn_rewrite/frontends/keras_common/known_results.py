"""What calls of layers gave on Keras tensors, so that the same calls need not be made again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mbn_rewrite.frontends.keras_common.cloning import is_stock, parts

if TYPE_CHECKING:
    from mbn_rewrite.frontends.keras_common.adapter import KerasAdapter

_Told = list[Any]  # shapes and dtypes of Keras tensors, and other arguments


class KnownResults:
    """Results of calls of layers.

    Args:
        keras: the adapter of their Keras.
    """

    def __init__(self, keras: KerasAdapter) -> None:
        self._keras = keras
        self._known: dict[int, list[tuple[_Told, Any]]] = {}
        self._layers: dict[int, Any] = {}  # so that no other object takes the id of one

    def note(self, layer: Any, args: Any, kwargs: Any, outputs: Any) -> None:
        """Notes what a call gave, if another call can be told to be the same."""
        told = self._told(args, kwargs)
        if told is not None and all(map(self._is_plain, self._keras.flatten(outputs))):
            self._known.setdefault(id(layer), []).append((told, outputs))
            self._layers[id(layer)] = layer

    def of(self, layer: Any, args: Any, kwargs: Any) -> Any:
        """What such a call of a layer gave; None if that is not known."""
        known = self._known.get(id(layer))
        told = self._told(args, kwargs) if known else None
        if told is None:
            return None
        return next((outputs for other, outputs in known or () if other == told), None)

    def _told(self, args: Any, kwargs: Any) -> _Told | None:
        """What a layer is called with, to be compared; None where values decide."""
        told: _Told = [len(args), *sorted(kwargs)]
        for value in self._keras.flatten((args, sorted(kwargs.items()))):
            if self._is_plain(value):
                told.append((self._keras.shape_of(value), self._keras.dtype_of(value)))
            elif value is None or isinstance(value, (bool, int, str)):
                told.append(value)
            else:
                return None
        return told

    def _is_plain(self, value: Any) -> bool:
        """Whether something is a Keras tensor without a mask."""
        return self._keras.is_symbolic(value) and not self._keras.carries_mask(value)


class KnownSimpleResults(KnownResults):
    """Results of calls of Keras's own layers that hold no others: arguments alone decide these.

    Code in code in code calls such a layer once for each of the three that is traced.
    """

    def __init__(self, keras: KerasAdapter) -> None:
        super().__init__(keras)
        self._simple: dict[int, tuple[Any, bool]] = {}  # layers, and whether they are

    def is_simple(self, layer: Any) -> bool:
        """Whether a layer is one of these."""
        if id(layer) not in self._simple:
            is_simple = is_stock(type(layer)) and len(parts(layer)) == 1
            self._simple[id(layer)] = layer, is_simple
        return self._simple[id(layer)][1]

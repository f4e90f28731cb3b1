"""Arrays that a SavedModel stores, or computes of such alone, and tensors that hold them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mbn_rewrite.frontends.saved_model.function_graph import FunctionGraph
from mbn_rewrite.ir.channel_map import Array
from mbn_rewrite.ir.kernels import Kernel


@dataclass(frozen=True)
class Computed:
    """Place of an array that a function computes of stored ones.

    Attributes:
        function: the function.
        tensor: the name of the tensor.
        of_variables: whether any of them is a variable.
    """

    function: FunctionGraph
    tensor: str
    of_variables: bool


@dataclass(frozen=True)
class Row:
    """Place of an array that is a row of another.

    Attributes:
        whole: the other.
        number: of the row.
    """

    whole: Stored
    number: int


@dataclass(frozen=True)
class Stored:
    """An array that the model stores, or computes of such alone.

    Attributes:
        key: identifies it.
        name: its name for the user.
        shape: its shape.
        dtype: the name of its dtype.
        read: gives its value.
        place: the tf.Variable, the (function, name of the node) of a constant, `Computed` or `Row`.
    """

    key: Any
    name: str
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], Array]
    place: Any

    @property
    def is_variable(self) -> bool:
        if isinstance(self.place, Computed):
            return self.place.of_variables
        return bool(self.key[0] != "constant")


@dataclass(frozen=True)
class Weight:
    """A tensor that holds a stored array, perhaps in another shape and dtype.

    Attributes:
        stored: the array.
        view: a shape of it; the tensor is `stored.reshape(view).transpose(order)`.
        order: see `view`.
        dtype: the narrowest dtype that it has on the way.
    """

    stored: Stored
    view: tuple[int, ...]
    order: tuple[int, ...]
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.view[axis] for axis in self.order)

    @property
    def is_plain(self) -> bool:
        """Whether the elements are in the order in which they are stored."""
        return self.order == tuple(range(len(self.order)))

    def keeps_window(self, axes: int) -> bool:
        """Whether the first axes of the tensor, those of a window, are stored in their order."""
        window = self.order[:axes]
        return list(window) == sorted(window)

    def laid_out(self, kernel: Kernel) -> Kernel | None:
        """A layout of the tensor as one of the stored array; None where there is none."""
        if self.is_plain:
            return kernel
        out_dims = tuple(self.order[axis] for axis in kernel.out_dims)
        if len(kernel.view) != len(self.order) or list(out_dims) != sorted(out_dims):
            return None
        in_dims = tuple(self.order[axis] for axis in kernel.in_dims)
        return Kernel(kernel.name, self.view, in_dims, out_dims)

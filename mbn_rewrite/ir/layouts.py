"""Layouts of the kernels of TensorFlow's linear operations, by channel. numpy only.

Keras layers and graph operations store the same arrays, so both kinds of front end describe
them by these functions. Each takes the name of the array and its shape as the operation
reads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mbn_rewrite.ir.kernels import Kernel


def conv(name: str, shape: Sequence[int], groups: int = 1) -> Kernel:
    """(*window, input channels of a group, output channels)"""
    *window, inputs, outputs = shape
    n = len(window)
    if groups == 1:
        return Kernel(name, (*window, inputs, outputs), (n,), (n + 1,))
    # input channel g * inputs + i, output channel g * outputs/groups + o
    return Kernel(name, (*window, inputs, groups, outputs // groups), (n + 1, n), (n + 1, n + 2))


def conv_transpose(name: str, shape: Sequence[int]) -> Kernel:
    """(*window, output channels, input channels)"""
    n = len(shape) - 2
    return Kernel(name, tuple(shape), (n + 1,), (n,))


def depthwise(name: str, shape: Sequence[int]) -> Kernel:
    """(*window, channels, multiplier); output channel = channel * multiplier + m"""
    n = len(shape) - 2
    return Kernel(name, tuple(shape), (n,), (n, n + 1))


def matrix(name: str, shape: Sequence[int], transposed: bool = False) -> Kernel:
    """(inputs, outputs), or (outputs, inputs) where transposed"""
    return Kernel(name, tuple(shape), (int(transposed),), (int(not transposed),))


def table(name: str, shape: Sequence[int]) -> Kernel:
    """(rows, channels) of an embedding"""
    return Kernel(name, tuple(shape), (), (1,), is_table=True)


@dataclass(frozen=True)
class Einsum:
    """A product of data with a kernel, one letter per axis.

    Attributes:
        inputs, kernel, outputs: the letters of each; digits stand for an ellipsis.
        channels: the letters of the output channels, those in kernel and output that the data does
            not have, in one order in both.
    """

    inputs: str
    kernel: str
    outputs: str
    channels: str

    @property
    def in_axis(self) -> int | None:
        """The axis of the input channels, or None where there are several."""
        summed = [axis for axis, letter in enumerate(self.inputs) if letter in self.kernel]
        return summed[0] if len(summed) == 1 else None

    @property
    def out_axis(self) -> int | None:
        """The axis of the output channels, or None where there are several."""
        return self.outputs.index(self.channels) if len(self.channels) == 1 else None

    def layout(self, name: str, shape: Sequence[int]) -> Kernel:
        """Layout of the kernel."""
        axis = self.in_axis
        in_dims = () if axis is None else (self.kernel.index(self.inputs[axis]),)
        out_dims = tuple(map(self.kernel.index, self.channels))
        return Kernel(name, tuple(shape), in_dims, out_dims)


def einsum(equation: str, input_rank: int, output_rank: int) -> Einsum | str:
    """Reads an equation such as "abc,cd->abd", data first.

    Returns:
        What it says, or why such a product cannot absorb a map, as a phrase that completes
        "<layer> ...".
    """
    inputs, kernel, outputs = _terms(equation)
    if "..." in kernel or len(set(kernel)) < len(kernel):
        return "has a kernel with repeated axes"
    inputs, outputs = _spelled_out(inputs, input_rank), _spelled_out(outputs, output_rank)
    if len(set(inputs)) < len(inputs) or len(set(outputs)) < len(outputs):
        return "has repeated axes"
    made = "".join(letter for letter in kernel if letter in outputs)
    if not made or set(made) & set(inputs) or (len(made) > 1 and not outputs.endswith(made)):
        return "has no axes of output channels of its own, in the kernel's order"
    if set(inputs) - set(kernel) - set(outputs):
        return "sums over positions"
    if set(kernel) - set(inputs) - set(outputs):
        return "sums over its kernel"
    return Einsum(inputs, kernel, outputs, made)


def einsum_channels(equation: str) -> str:
    """The letter of the output channels of an equation that `einsum` accepts."""
    inputs, kernel, outputs = _terms(equation)
    return next(letter for letter in kernel if letter in outputs and letter not in inputs)


def _terms(equation: str) -> tuple[str, str, str]:
    factors, _, outputs = equation.replace(" ", "").partition("->")
    inputs, _, kernel = factors.partition(",")
    return inputs, kernel, outputs


def _spelled_out(axes: str, rank: int) -> str:
    """Axes with digits, which no equation has, in place of an ellipsis."""
    missing = rank - len(axes.replace("...", ""))
    return axes.replace("...", "0123456789"[:missing])

"""Linear maps of one value that are added up, as one linear map. numpy only, float64 inside.

With maps p x + q before and s y + t after the weights of each branch,

    sum (s (W (p x + q) + b) + t)  =  (sum s W p) x + sum (s (W q + b) + t)

Each s W p stands in the widest window of them all, at the places that it reads there. A branch
without weights is a diagonal W of one place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from mbn_rewrite.ir.algebra import fold
from mbn_rewrite.ir.channel_map import Array, ChannelMap
from mbn_rewrite.ir.kernels import Kernel

Read = Callable[[str, str], Array]  # (owner, name) -> a weight
Places = tuple[tuple[int, ...], ...]  # in a window, for each of its axes


@dataclass(frozen=True, eq=False)
class Branch:
    """One linear map of a sum.

    Attributes:
        owner: the layer whose weights it has; "" for a branch without weights.
        kernel: its layout; None without weights.
        bias: the name of the bias, or None.
        before: a map of its input, or None.
        after: a map of its output; without weights all that it does.
        places: for each axis of positions, the places in the window of the sum at which those of
            its own window stand, in order.
    """

    owner: str
    kernel: Kernel | None
    bias: str | None
    before: ChannelMap | None
    after: ChannelMap
    places: Places

    @property
    def adds_constant(self) -> bool:
        """Whether the sum needs a bias for it."""
        shifts = [m for m in (self.before, self.after) if m is not None and m.has_shift]
        return self.bias is not None or bool(shifts)

    def within(self, places: Places, before: ChannelMap | None, after: ChannelMap) -> Branch:
        """The branch as one of a larger sum.

        Args:
            places: those of the sum that it was part of.
            before: a map of the input of that sum, or None.
            after: a map of its output.
        """
        own_places = tuple(
            tuple(outer[place] for place in own)
            for own, outer in zip(self.places, places, strict=True)
        )
        if before is None:
            return replace(self, after=self.after.then(after), places=own_places)
        if self.kernel is None:
            return replace(self, after=before.then(self.after).then(after), places=own_places)
        first = before if self.before is None else before.then(self.before)
        return replace(self, before=first, after=self.after.then(after), places=own_places)

    def weights(self, read: Read) -> tuple[Array | None, Array]:
        """The kernel and the bias that do all of the branch, in float64."""
        if self.kernel is None:
            return None, self.after.shift
        kernel = read(self.owner, self.kernel.name).astype(np.float64)
        bias = read(self.owner, self.bias).reshape(-1) if self.bias else None
        arrays, new_bias = fold([(self.kernel, kernel)], bias, before=self.before, after=self.after)
        return arrays[0], new_bias


@dataclass(frozen=True, eq=False)
class Branches:
    """Branches whose sum the weights of one layer stand for.

    Attributes:
        branches: that of the layer itself among them.
        stands_for: the layers that go, other than BatchNormalizations, in the model's order.
    """

    branches: tuple[Branch, ...]
    stands_for: tuple[str, ...]

    def kernel(self, layout: Kernel, shape: tuple[int, ...], read: Read) -> Array:
        """The kernel of the sum.

        Args:
            layout: of the kernel of the layer that stands for the sum.
            shape: that in which it is stored.
            read: gives the weights of the branches.
        """
        total = np.zeros(layout.view)
        for branch in self.branches:
            array, _ = branch.weights(read)
            if branch.kernel is None or array is None:
                total[_diagonal(layout, branch.places)] += branch.after.scale
            else:
                places = np.ix_(*_places(layout, branch.places))
                total[places] += _arranged(branch.kernel, array, layout)
        return total.reshape(shape)

    def within(
        self, places: Places, before: ChannelMap | None, after: ChannelMap
    ) -> tuple[Branch, ...]:
        """The branches as some of a larger sum; see `Branch.within`. One of them shifts."""
        first, *others = self.branches
        bare = after.without_shift()
        return (
            first.within(places, before, after),
            *(branch.within(places, before, bare) for branch in others),
        )

    def bias(self, channels: int, read: Read) -> Array:
        """The bias of the sum, of shape (channels,)."""
        total = np.zeros(channels)
        for branch in self.branches:
            total += branch.weights(read)[1]
        return total


# -------------------------------------------------------------------------- kernels as maps


def alike(kernel: Kernel, other: Kernel) -> bool:
    """Whether two kernels join the same channels, whatever their windows and storage."""
    return _structure(kernel) == _structure(other)


def has_diagonal(kernel: Kernel) -> bool:
    """Whether a kernel can leave each channel as it is."""
    if kernel.in_channels != kernel.out_channels:
        return False
    ins, outs = _coordinates(kernel, kernel.in_dims), _coordinates(kernel, kernel.out_dims)
    return all(np.array_equal(ins[dim], outs[dim]) for dim in ins.keys() & outs.keys())


def _roles(kernel: Kernel) -> list[str]:
    """What each axis of the view counts."""
    roles, window = [], 0
    for dim in range(len(kernel.view)):
        channels = "in" * (dim in kernel.in_dims) + "out" * (dim in kernel.out_dims)
        roles.append(channels or f"window {window}")
        window += not channels
    return roles


def _structure(kernel: Kernel) -> tuple[list[tuple[str, int]], ...]:
    """What the input channels and the output channels count, in order, with sizes."""
    roles = _roles(kernel)
    return tuple(
        [(roles[dim], kernel.view[dim]) for dim in dims]
        for dims in (kernel.in_dims, kernel.out_dims)
    )


def _arranged(kernel: Kernel, array: Array, layout: Kernel) -> Array:
    """An array with the axes in the order of another layout."""
    roles = _roles(kernel)
    return array.reshape(kernel.view).transpose([roles.index(role) for role in _roles(layout)])


def _places(layout: Kernel, places: Places) -> list[tuple[int, ...]]:
    """The indices along each axis of the view: those of the window, and all channels."""
    window = iter(places)
    return [
        next(window) if role.startswith("window") else tuple(range(size))
        for role, size in zip(_roles(layout), layout.view, strict=True)
    ]


def _diagonal(layout: Kernel, places: Places) -> tuple[Array, ...]:
    """Index of the weights that join each channel to itself, at the one place of a window."""
    own = _coordinates(layout, layout.in_dims) | _coordinates(layout, layout.out_dims)
    along = _places(layout, places)
    channels = np.arange(layout.in_channels)
    return tuple(
        own[dim] if dim in own else np.full_like(channels, along[dim][0])
        for dim in range(len(layout.view))
    )


def _coordinates(kernel: Kernel, dims: tuple[int, ...]) -> dict[int, Array]:
    """Index of each channel along the axes that count channels."""
    sizes = [kernel.view[dim] for dim in dims]
    indices = np.unravel_index(np.arange(int(np.prod(sizes))), sizes)
    return dict(zip(dims, indices, strict=True))

"""The neutral graph that front ends read and passes decide on.

A graph is a read-only view of a model: nodes are calls of layers (or single operations),
values are the tensors between them, numbered from 0. It holds no framework object. A
front end describes each node by one of the operations below; all else is `Opaque`.

Axes are counted from 0, the batch, and are never negative.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from mbn_rewrite.enums import Name
from mbn_rewrite.ir.branches import Branches, Read
from mbn_rewrite.ir.channel_map import Array, ChannelMap
from mbn_rewrite.ir.kernels import Kernel, Window
from mbn_rewrite.ir.reasons import Change, Reason

Shape = tuple[int | None, ...]

_FUSED_DTYPES = ("float16", "bfloat16", "float32")

# Kernels in the order in which they are applied, and the name of the bias added last,
# or None where there is none yet.
Chain = tuple[tuple[Kernel, ...], str | None]


@dataclass(frozen=True)
class Value:
    """A tensor of the model.

    Attributes:
        shape: its shape, None where a size is not known.
        dtype: its dtype.
        masked: whether a mask may come with it.
    """

    shape: Shape
    dtype: str
    masked: bool = False


@dataclass(frozen=True)
class Op:
    """Operation of a node, as far as scales and shifts of its channels are concerned."""

    @property
    def chains(self) -> tuple[Chain, ...]:
        """The weights that can absorb a map; none for most operations."""
        return ()

    def reads(self, place: int) -> bool:
        """Whether a chain, by its place among `chains`, reads the input."""
        return True

    def gives(self, place: int) -> bool:
        """Whether a chain gives the output."""
        return True

    def weight(self, owner: str, name: str, read: Read) -> Array:
        """A weight as maps are folded into it.

        Args:
            owner: the layer.
            name: of the weight.
            read: gives stored weights.
        """
        return read(owner, name)


@dataclass(frozen=True)
class Input(Op):
    """An input of the model."""


@dataclass(frozen=True)
class Opaque(Op):
    """Anything that the algebra does not know.

    Attributes:
        why: a phrase that completes "<layer> ..." in a reason.
    """

    why: str = "is no operation that a per-channel scale and shift can move through"


class Activation(Name):
    """Activation that a linear operation applies to its result."""

    LINEAR = "linear"
    HOMOGENEOUS = "homogeneous"  # see `PositivelyHomogeneous`
    OTHER = "other"


SPREADS = "adds up another number of inputs for one output than for the next"


@dataclass(frozen=True)
class Linear(Op):
    """A convolution or matrix product, perhaps with a bias and a fused activation.

    Attributes:
        kernels: in the order in which they are applied.
        bias: the name of the bias, or None where there is none yet.
        in_axis: the axis of the input that holds the input channels, or None where they
            lie on several.
        out_axis: the axis of the output that holds the output channels, or None where they lie on
            several, its last ones.
        pads: whether a constant input does not give a constant output, most often because
            zeros are read around it.
        activation: what it applies to its result.
        windows: of a convolution that can add a border map: how it reads each axis of
            positions. No part of what tells calls apart: passes compare them where
            they matter.
        bias_doubt: why a bias of its own might not be added per channel, as a phrase that
            completes "<layer> ...", or "". A layer that stands for it then adds the bias. No part
            of what tells calls apart either.
        uneven: why a constant input does not, where `pads`, as such a phrase.
        position_alone: whether it is a product with a matrix at each position, the positions
            left where they are. No part of what tells calls apart.
        sums: the parallel branches whose sum it is, where they were merged.
    """

    kernels: tuple[Kernel, ...]
    bias: str | None
    in_axis: int | None
    out_axis: int | None
    pads: bool = False
    activation: Activation = Activation.LINEAR
    windows: tuple[Window, ...] = field(default=(), compare=False)
    bias_doubt: str = field(default="", compare=False)
    uneven: str = field(default="pads its input with zeros", compare=False)
    position_alone: bool = field(default=False, compare=False)
    sums: Branches | None = field(default=None, compare=False)

    @property
    def chains(self) -> tuple[Chain, ...]:
        return ((self.kernels, self.bias),)

    def weight(self, owner: str, name: str, read: Read) -> Array:
        if self.sums is None:
            return read(owner, name)
        (kernel,) = self.kernels
        if name == self.bias:
            return self.sums.bias(kernel.out_channels, read)
        return self.sums.kernel(kernel, read(owner, name).shape, read)


@dataclass(frozen=True)
class Recurrent(Op):
    """The input products of recurrent layers that read one sequence (two if bidirectional).

    Attributes:
        branches: for each direction its input kernel and bias.
        in_axis: the axis of the input that holds the features.
        uneven: why a constant input does not give constant products, as a phrase, or "".
    """

    branches: tuple[Chain, ...]
    in_axis: int
    uneven: str = ""

    @property
    def chains(self) -> tuple[Chain, ...]:
        return self.branches


@dataclass(frozen=True)
class Attention(Op):
    """An attention layer: products of what it reads with weights, and one that gives the output.

    Attributes:
        projections: of the query, the key and the value; none unless all are of one tensor, so
            that they take on the same maps.
        output: the product that gives the output.
        axis: the axis of the channels, before and after it.
    """

    projections: tuple[Chain, ...]
    output: Chain
    axis: int

    @property
    def chains(self) -> tuple[Chain, ...]:
        return (*self.projections, self.output)

    def reads(self, place: int) -> bool:
        return place < len(self.projections)

    def gives(self, place: int) -> bool:
        return place == len(self.projections)


@dataclass(frozen=True, eq=False)
class BatchNorm(Op):
    """A BatchNormalization at inference.

    Attributes:
        map: what it does, per channel; None where `reason` rules out its replacement.
        reason: why it stays, or None where nothing keeps it.
        axis: the axis of the channels, or None where that is not one axis.
        fusible: whether it runs as arithmetic, and TensorFlow's fused operation could do its
            work.
        convolvable: whether a depthwise 1x1 convolution could.
        trains_otherwise: why no layer with statistics of a sample trains like it, whatever it does
            at inference; or None.
    """

    map: ChannelMap | None
    reason: Reason | None = None
    axis: int | None = None
    fusible: bool = False
    convolvable: bool = False
    trains_otherwise: Reason | None = None

    def __post_init__(self) -> None:
        if (self.map is None) != (self.why_not(Change.REPLACE) is not None):
            raise ValueError(f"a BatchNormalization has a map or cannot be replaced, not {self}")

    def why_not(self, change: Change) -> Reason | None:
        """Reason that rules out a change, or None."""
        if change is Change.SAMPLE and self.trains_otherwise:
            return self.trains_otherwise
        return self.reason if self.reason and self.reason.rules_out(change) else None


def fused_operation_takes(dtype: str, axis: int | None, rank: int) -> bool:
    """Whether TensorFlow's fused operation can normalise such a tensor, seen as images."""
    return dtype in _FUSED_DTYPES and axis == rank - 1 and 2 <= rank <= 5


class MergeKind(Name):
    """Elementwise operation of a merge."""

    ADD = "add"
    SUBTRACT = "subtract"
    AVERAGE = "average"
    MAXIMUM = "maximum"
    MINIMUM = "minimum"
    MULTIPLY = "multiply"  # inputs of one position may be repeated over all


@dataclass(frozen=True)
class Merge(Op):
    """An elementwise merge of inputs."""

    kind: MergeKind


@dataclass(frozen=True)
class Concat(Op):
    """Concatenation along an axis."""

    axis: int


@dataclass(frozen=True)
class Stack(Op):
    """Tensors of one shape, one after the other along a new axis."""

    axis: int


@dataclass(frozen=True)
class ChannelPreserving(Op):
    """Works on each channel alone, the same in each.

    Attributes:
        in_axis: the channel axis of the input, or None where any axis can be one and
            stays where it is (elementwise operations).
        out_axis: the channel axis of the output, likewise.
        axes: where any of some axes can be one, each with the axis of the output that it is there.
    """

    in_axis: int | None = None
    out_axis: int | None = None
    axes: tuple[tuple[int, int], ...] = ()


class Affine(ChannelPreserving):
    """Weighted means, selections and copies of positions: f(s x + t) = s f(x) + t."""


@dataclass(frozen=True)
class Monotone(ChannelPreserving):
    """Maxima or minima over positions: f(s x + t) = s f(x) + t where s >= 0.

    Attributes:
        doing: what it does, as a phrase.
    """

    doing: str = "takes a maximum"


@dataclass(frozen=True)
class Total(ChannelPreserving):
    """Sums over positions: f(s x + t) = s f(x) + count * t.

    Attributes:
        count: how many are added up, or None where that is not known.
    """

    count: int | None = None


@dataclass(frozen=True, eq=False)
class ConstantMap(ChannelPreserving):
    """Constants in code that multiply and are added: f(x) = scale * x + shift.

    Attributes:
        scale: a number, or one for each channel on `in_axis`; none is 0.
        shift: likewise.
    """

    scale: Array = field(default_factory=lambda: np.ones(()))
    shift: Array = field(default_factory=lambda: np.zeros(()))


@dataclass(frozen=True)
class ZeroPadding(ChannelPreserving):
    """Zeros around the tensor: f(s x) = s f(x).

    Attributes:
        amounts: for each axis of the tensor, how many are put before and after; none where that is
            not known.
    """

    amounts: tuple[tuple[int, int], ...] = ()


class PositivelyHomogeneous(ChannelPreserving):
    """LeakyReLU and its kin: f(s x) = s f(x) where s >= 0."""


@dataclass(frozen=True)
class Clip(ChannelPreserving):
    """ReLU, ReLU6 and others that clip each element: f(x) = min(max(x, lower), upper).

    Attributes:
        lower: the lower bound, -inf where there is none.
        upper: the upper bound, inf where there is none; not less than the lower one.
        why: why a scale and shift cannot pass, unless `is_homogeneous`, as a phrase that
            completes "<layer> ...". No part of what tells clips apart.
    """

    in_axis: int | None = field(default=None, init=False)  # it works on each element
    out_axis: int | None = field(default=None, init=False)
    axes: tuple[tuple[int, int], ...] = field(default=(), init=False)
    lower: float = 0.0
    upper: float = math.inf
    why: str = field(default=Opaque.why, compare=False)

    @property
    def is_homogeneous(self) -> bool:
        """Whether f(s x) = s f(x) where s >= 0."""
        return self.lower in (0.0, -math.inf) and self.upper in (0.0, math.inf)


def clip(lower: float, upper: float, why: str = Opaque.why) -> Op:
    """Clip between two bounds, as far as it is one.

    Args:
        lower: the lower bound, or -inf.
        upper: the upper bound, or inf.
        why: see `Clip`.
    """
    if lower == -math.inf and upper == math.inf:
        return Affine()
    # Where they cross, or are no numbers, it matters which of them comes first.
    return Clip(lower, upper, why) if lower <= upper else Opaque(why)


@dataclass(frozen=True)
class Reshape(Op):
    """The same elements in the same order in another shape; the batch axis stays."""


@dataclass(frozen=True)
class Selection(Op):
    """Some of the elements along each axis, perhaps in another order or repeatedly.

    Attributes:
        axes: axes of the input, each with that of the output that it is there, and the places that
            are taken along it; None for all, as they are.
        inverse: whether it is the other way round: the input would be such a selection of the
            output, as where channels become positions.
    """

    axes: tuple[tuple[int, int, tuple[int, ...] | None], ...]
    inverse: bool = False


@dataclass(frozen=True)
class Several:
    """One operation for each output of a call."""

    ops: tuple[Op, ...]


@dataclass(frozen=True)
class Permute(Op):
    """A transposition: axis i of the output is axis `order[i]` of the input."""

    order: tuple[int, ...]


@dataclass(frozen=True)
class Node:
    """One call of a layer, or one operation.

    Attributes:
        owner: the unique name of the layer whose weights the call uses. Calls of one layer
            have the same owner.
        kind: the layer's class, as its user knows it.
        op: what it does.
        inputs: the values it reads, the data first.
        outputs: the values it gives.
        dtype: the narrowest dtype that its weights are stored or used in.
        held: whether code may call the layer, too, so that it can be exchanged but not left out.
        caller: label of the layer whose code makes this call, or "" for one of the model's own.
        why_shared: why the call cannot have weights of its own, as a clause, or "". It matters
            where a layer is called several times.
        place: of the call among those of its owner, in the order in which they were made.
        function: number of the function that makes the call, in a model that has several.
    """

    owner: str
    kind: str
    op: Op
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    dtype: str = "float32"
    held: bool = False
    caller: str = ""
    why_shared: str = ""
    place: int = 0
    function: int = 0

    @property
    def label(self) -> str:
        return f"{self.kind} '{self.owner}'"


@dataclass(frozen=True)
class HiddenBatchNorm:
    """A BatchNormalization held by a layer whose calls cannot be seen.

    Attributes:
        owner: its unique name.
        holder: the label of the layer that holds it.
        op: the map itself.
        rank: the number of dimensions of its input, or None where that is not known.
        dtype: as in `Node`.
        why: why its calls cannot be seen, as a clause, or "".
    """

    owner: str
    holder: str
    op: BatchNorm
    rank: int | None
    dtype: str
    why: str = ""


def _no_weights(owner: str, name: str) -> np.ndarray:
    raise KeyError(f"{owner}/{name}")


@dataclass(frozen=True)
class Graph:
    """A model as passes see it.

    Attributes:
        values: the tensors; nodes name them by index.
        nodes: in an order in which every value is given before it is read.
        outputs: the values that are outputs of the model (or of a part of it that is
            called by something that cannot be seen).
        hidden: BatchNormalizations that are not nodes.
        read_weight: (owner, name) -> a weight as numpy array. Called rarely; slow is fine.
    """

    values: tuple[Value, ...]
    nodes: tuple[Node, ...]
    outputs: frozenset[int]
    hidden: tuple[HiddenBatchNorm, ...] = ()
    read_weight: Callable[[str, str], np.ndarray] = field(
        default=_no_weights, compare=False, repr=False
    )

    def uses(self) -> Mapping[str, int]:
        """Number of nodes of each owner."""
        counts: dict[str, int] = {}
        for node in self.nodes:
            counts[node.owner] = counts.get(node.owner, 0) + 1
        return counts

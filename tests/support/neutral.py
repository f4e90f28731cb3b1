"""Random neutral graphs, and an interpreter of them in numpy: plans without a framework.

Weights, statistics and inputs are whole numbers and powers of two, so that nothing is rounded and
plans can be compared bit for bit.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import reduce

import numpy as np

from mbn_rewrite.ir import graph as ir
from mbn_rewrite.ir.algebra import fold
from mbn_rewrite.ir.channel_map import ChannelMap
from mbn_rewrite.ir.kernels import Kernel, Window
from mbn_rewrite.plans import Action, Fold, Plan, Remap, Remove

POSITIONS = 4
AXIS = 2  # of the channels in (batch, position, channel)


@dataclass
class Builder:
    """Builder of a neutral graph over tensors of shape (batch, position, channel).

    Attributes:
        rng: source of weights.
        weights: by owner and name.
    """

    rng: np.random.Generator
    nodes: list[ir.Node] = field(default_factory=list)
    values: list[ir.Value] = field(default_factory=list)
    weights: dict[tuple[str, str], np.ndarray] = field(default_factory=dict)

    def channels(self, value: int) -> int:
        size = self.values[value].shape[-1]
        assert size is not None
        return size

    def add(
        self, op: ir.Op, *inputs: int, channels: int, owner: str = "", kind: str = "", rank: int = 3
    ) -> int:
        """Adds a node, and returns its value."""
        shape = (None, POSITIONS, channels) if rank == 3 else (None, channels)
        self.values.append(ir.Value(shape, "float64"))
        value = len(self.values) - 1
        owner = owner or f"{type(op).__name__.lower()}_{value}"
        kind = kind or type(op).__name__
        self.nodes.append(ir.Node(owner, kind, op, inputs, (value,), "float64"))
        return value

    def source(self, channels: int) -> int:
        return self.add(ir.Input(), channels=channels)

    def linear(
        self,
        x: int,
        channels: int,
        window: int = 1,
        activation: ir.Activation = ir.Activation.LINEAR,
        owner: str = "",
    ) -> int:
        """A convolution of one or of three positions; three are padded with zeros."""
        rank = len(self.values[x].shape)
        shape = (window, self.channels(x), channels)
        op = ir.Linear(
            (Kernel("kernel", shape, (1,), (2,)),),
            "bias",
            rank - 1,
            rank - 1,
            pads=window > 1,
            activation=activation,
            windows=(Window(window, 1, 1, "same"),),
        )
        owner = owner or f"conv_{len(self.values)}"
        if (owner, "kernel") not in self.weights:
            self.weights[owner, "kernel"] = self.rng.integers(-2, 3, shape).astype(np.float64)
            self.weights[owner, "bias"] = self.rng.integers(-2, 3, channels).astype(np.float64)
        return self.add(op, x, channels=channels, owner=owner, kind="Conv1D", rank=rank)

    def norm(
        self,
        x: int,
        signs: bool = False,
        zeros: bool = False,
        owner: str = "",
        axis: int | None = None,
    ) -> int:
        """A BatchNormalization whose scales are powers of two, perhaps negative or 0."""
        shape = self.values[x].shape
        axis = len(shape) - 1 if axis is None else axis
        count = shape[axis]
        assert count is not None
        scale = 2.0 ** self.rng.integers(-1, 2, count)
        if signs:
            scale *= self.rng.choice([1.0, 1.0, -1.0], count)
        if zeros:
            scale *= self.rng.random(count) > 0.3
        shift = self.rng.integers(-2, 3, count).astype(np.float64)
        op = ir.BatchNorm(ChannelMap(scale, shift, axis), axis=axis)
        owner = owner or f"bn_{len(self.values)}"
        kind = "BatchNormalization"
        return self.add(op, x, channels=self.channels(x), owner=owner, kind=kind, rank=len(shape))

    def relu(self, x: int, upper: float = np.inf) -> int:
        return self.add(ir.Clip(0.0, upper), x, channels=self.channels(x), kind="ReLU")

    def leaky_relu(self, x: int) -> int:
        op = ir.PositivelyHomogeneous()
        return self.add(op, x, channels=self.channels(x), kind="LeakyReLU")

    def tanh(self, x: int) -> int:
        """Anything opaque. It is computed as a sign, which keeps whole numbers whole."""
        return self.add(ir.Opaque(), x, channels=self.channels(x), kind="Sign")

    def shifted(self, x: int) -> int:
        """A mean over positions, rolled by one: something affine."""
        return self.add(ir.Affine(AXIS, AXIS), x, channels=self.channels(x), kind="Roll")

    def computed(self, x: int) -> int:
        """Constants that multiply and are added, by channel or one for all."""
        count = self.channels(x) if self.rng.random() < 0.5 else 1
        axis = AXIS if count > 1 else None
        size = count if count > 1 else ()
        scale = 2.0 ** self.rng.integers(-1, 2, size) * self.rng.choice([1.0, -1.0], size)
        shift = self.rng.integers(-2, 3, size) * float(self.rng.random() < 0.7)
        op = ir.ConstantMap(axis, axis, scale=np.asarray(scale), shift=np.asarray(shift))
        return self.add(op, x, channels=self.channels(x), kind="Constants")

    def pooled(self, x: int) -> int:
        """A maximum over all positions, at every position."""
        return self.add(ir.Monotone(AXIS, AXIS), x, channels=self.channels(x), kind="MaxPool")

    def padded(self, x: int) -> int:
        """A zero at the first position, in place of what is there."""
        return self.add(
            ir.ZeroPadding(AXIS, AXIS), x, channels=self.channels(x), kind="ZeroPadding"
        )

    def merged(self, kind: ir.MergeKind, *inputs: int) -> int:
        return self.add(ir.Merge(kind), *inputs, channels=self.channels(inputs[0]), kind="Merge")

    def joined(self, *inputs: int) -> int:
        return self.add(ir.Concat(AXIS), *inputs, channels=sum(map(self.channels, inputs)))

    def flat(self, x: int) -> int:
        return self.add(ir.Reshape(), x, channels=POSITIONS * self.channels(x), rank=2)

    def graph(self, *outputs: int) -> ir.Graph:
        return ir.Graph(
            tuple(self.values),
            tuple(self.nodes),
            frozenset(outputs),
            read_weight=lambda owner, name: self.weights[owner, name],
        )


def run(graph: ir.Graph, x: np.ndarray, plan: Plan | None = None) -> list[np.ndarray]:
    """Outputs of a graph, as it is or with a plan carried out."""
    plan = plan or Plan("fold", ())
    calls: Counter[str] = Counter()
    values: dict[int, np.ndarray] = {}
    for node in graph.nodes:
        inputs = [values[i] for i in node.inputs]
        action = plan.actions.get(plan.maker(node.owner, calls[node.owner]))
        calls[node.owner] += 1
        values[node.outputs[0]] = _computed(graph, node, inputs, x, action)
    return [values[output] for output in sorted(graph.outputs)]


def _computed(
    graph: ir.Graph, node: ir.Node, inputs: list[np.ndarray], x: np.ndarray, action: Action | None
) -> np.ndarray:
    op = node.op
    if isinstance(action, Remove):
        return inputs[action.keeps]
    match op:
        case ir.Input():
            return x
        case ir.Linear():
            return _linear(graph, node, inputs[0], action)
        case ir.BatchNorm():
            m = action.map if isinstance(action, Remap) else op.map
            assert m is not None
            spread = [-1 if i == m.axis else 1 for i in range(inputs[0].ndim)]
            return inputs[0] * m.scale.reshape(spread) + m.shift.reshape(spread)
        case ir.Opaque():
            return np.sign(inputs[0])
        case ir.Monotone():
            return np.broadcast_to(inputs[0].max(axis=1, keepdims=True), inputs[0].shape)
        case ir.ZeroPadding():
            return np.concatenate([np.zeros_like(inputs[0][:, :1]), inputs[0][:, 1:]], axis=1)
        case ir.PositivelyHomogeneous():
            return np.maximum(inputs[0], 0.5 * inputs[0])
        case ir.Clip():
            bounds = action or op
            lower = -np.inf if bounds.lower is None else bounds.lower
            return np.minimum(
                np.maximum(inputs[0], lower), np.inf if bounds.upper is None else bounds.upper
            )
        case ir.Affine():
            return np.roll(inputs[0], 1, axis=1)
        case ir.ConstantMap():
            return inputs[0] * op.scale + op.shift
        case ir.Concat():
            return np.concatenate(inputs, axis=AXIS)
        case ir.Reshape():
            return inputs[0].reshape(len(x), -1)
        case ir.Merge():
            return _merged(op.kind, inputs)
    raise AssertionError(op)


def _linear(graph: ir.Graph, node: ir.Node, x: np.ndarray, action: Action | None) -> np.ndarray:
    op = node.op
    assert isinstance(op, ir.Linear)
    kernel, bias = (graph.read_weight(node.owner, name) for name in ("kernel", "bias"))
    if isinstance(action, Fold):
        kernel, bias = (
            action.op.weight(node.owner, name, graph.read_weight) for name in ("kernel", "bias")
        )
        (kernel,), bias = fold(
            [(op.kernels[0], kernel)],
            bias,
            before=action.before,
            after=action.after,
            border=action.border,
        )
    if x.ndim == 2:
        result = x @ kernel[0] + bias
    else:
        padding = len(kernel) // 2
        x = np.pad(x, ((0, 0), (padding, padding), (0, 0)))
        windows = [x[:, i : i + POSITIONS] @ kernel[i] for i in range(len(kernel))]
        result = sum(windows) + bias
    return np.maximum(result, 0) if op.activation is ir.Activation.HOMOGENEOUS else result


def _merged(kind: ir.MergeKind, inputs: list[np.ndarray]) -> np.ndarray:
    match kind:
        case ir.MergeKind.ADD:
            return sum(inputs[1:], inputs[0])
        case ir.MergeKind.SUBTRACT:
            return inputs[0] - inputs[1]
        case ir.MergeKind.AVERAGE:
            return sum(inputs[1:], inputs[0]) / len(inputs)
        case ir.MergeKind.MAXIMUM:
            return np.maximum.reduce(inputs)
        case ir.MergeKind.MINIMUM:
            return np.minimum.reduce(inputs)
        case ir.MergeKind.MULTIPLY:
            return reduce(np.multiply, inputs)


def random_graph(seed: int, steps: int = 14, constants: int = 0) -> ir.Graph:
    """A random network with shared trunks, several readers, branches and concatenations.

    Args:
        seed: of the network and its weights.
        steps: how many operations are drawn.
        constants: how often constants in code are drawn, beside 18 others.
    """
    rng = np.random.default_rng(seed)
    b = Builder(rng)
    signs, zeros = rng.random() < 0.3, rng.random() < 0.15
    width = int(rng.integers(1, 4))
    values = [b.linear(b.source(2), width)]
    shared = 0

    def pick(channels: int | None = None) -> int:
        fitting = [v for v in values if channels is None or b.channels(v) == channels]
        return fitting[-1] if rng.random() < 0.5 else int(rng.choice(fitting))

    for _ in range(steps):
        x = pick()
        match rng.choice(
            ["norm"] * 4
            + ["conv"] * 4
            + ["relu"] * 3
            + ["add"] * 3
            + [
                "pool",
                "roll",
                "pad",
                "sign",
                "concat",
                "extremum",
                "subtract",
                "shared",
                "fused",
                "gate",
                "leaky",
                *["constants"] * constants,
            ]
        ):
            case "norm":
                new = b.norm(x, signs, zeros)
            case "conv":
                new = b.linear(x, width, window=int(rng.choice([1, 1, 3])))
            case "fused":
                new = b.linear(x, width, activation=ir.Activation.HOMOGENEOUS)
            case "shared":
                shared += 1
                a, owner = b.linear(x, width, owner=f"shared_{shared}"), f"shared_{shared}"
                y = pick(b.channels(x))
                values += [a]
                new = b.linear(y, width, owner=owner)
            case "relu":
                new = b.relu(x, rng.choice([np.inf, np.inf, 6.0]))
            case "leaky":
                new = b.leaky_relu(x)
            case "constants":
                new = b.computed(x)
            case "pool":
                new = b.pooled(x)
            case "roll":
                new = b.shifted(x)
            case "pad":
                new = b.padded(x)
            case "sign":
                new = b.tanh(x)
            case "concat":
                new = b.joined(x, pick()) if b.channels(x) < 9 else b.relu(x)
            case "add":
                new = b.merged(ir.MergeKind.ADD, x, pick(b.channels(x)))
            case "subtract":
                new = b.merged(ir.MergeKind.SUBTRACT, x, pick(b.channels(x)))
            case "gate":
                gate = b.tanh(b.pooled(x)) if rng.random() < 0.5 else pick(b.channels(x))
                new = b.merged(ir.MergeKind.MULTIPLY, x, gate)
            case "extremum":
                kind = ir.MergeKind.MAXIMUM if rng.random() < 0.5 else ir.MergeKind.MINIMUM
                new = b.merged(kind, x, pick(b.channels(x)))
        values.append(new)
    last = b.linear(values[-1], width)
    if rng.random() < 0.3:
        last = b.linear(b.flat(last), 2)
    outputs = {last}
    if rng.random() < 0.2:
        outputs.add(int(rng.choice(values)))
    return b.graph(*outputs)

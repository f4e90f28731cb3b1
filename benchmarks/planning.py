#!/usr/bin/env python3
"""Time of planning, by the number of layers: the solver alone, without TensorFlow.

    python benchmarks/planning.py [FLAGS]

Neutral graphs of several kinds are planned in mode fold, with --sizes BatchNormalizations each:

    chain            convolution, BatchNormalization and ReLU, one after the other
    trunk            a pre-activation residual network: one value is read by all blocks
    concatenations   as in a DenseNet: what a block gives is joined with all before it; of an
                     eighth of the size, since its channels grow with its layers
    sums             residual blocks of BatchNormalizations alone, whose origins add up
    norms            BatchNormalizations alone, between two convolutions
    contradictions   BatchNormalizations between activations that nothing passes: none goes

The columns are median milliseconds over --repeats, BatchNormalizations left, and the exponent of
the number of layers over the larger half of the sizes: 1 for time that is linear in it.

Example:
    python benchmarks/planning.py --sizes=100,400,1600 --json=planning.json
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# The repository's own package comes first, so that the tool runs without installation.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from absl import app, flags

from benchmarks.common import results
from benchmarks.common.console import progress
from benchmarks.common.flags import check_usage
from mbn_rewrite.ir import layouts
from mbn_rewrite.ir.channel_map import ChannelMap
from mbn_rewrite.ir.graph import (
    BatchNorm,
    Clip,
    Concat,
    Graph,
    Input,
    Linear,
    Merge,
    MergeKind,
    Node,
    Op,
    Opaque,
    Value,
)
from mbn_rewrite.passes.planner import make_plan
from mbn_rewrite.tables import table

CHANNELS = 32
GROWTH = 4  # channels that a block of a DenseNet adds
AXIS = 2

FLAGS = flags.FLAGS
flags.DEFINE_list("sizes", ["100", "200", "400", "800", "1600"], "Numbers of BatchNormalizations.")
flags.DEFINE_integer("repeats", 3, "How often each is planned.", lower_bound=1)
flags.DEFINE_string("json", None, "Write the results to this file, as JSON.")


@dataclass
class Network:
    """Network under construction; each method adds a layer and returns what it gives."""

    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    nodes: list[Node] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)
    kernels: dict[str, np.ndarray] = field(default_factory=dict)

    def add(self, op: Op, *inputs: int, channels: int) -> int:
        value = len(self.values)
        self.values.append(Value((None, 8, channels), "float32"))
        kind = type(op).__name__
        self.nodes.append(Node(f"{kind}_{value}", kind, op, inputs, (value,)))
        return value

    def channels(self, value: int) -> int:
        size = self.values[value].shape[-1]
        assert size is not None
        return size

    def source(self) -> int:
        return self.add(Input(), channels=CHANNELS)

    def conv(self, x: int, channels: int = CHANNELS) -> int:
        shape = (1, self.channels(x), channels)
        op = Linear((layouts.conv("kernel", shape),), None, AXIS, AXIS)
        value = self.add(op, x, channels=channels)
        self.kernels[f"Linear_{value}"] = np.ones(shape, np.float32)
        return value

    def norm(self, x: int) -> int:
        channels = self.channels(x)
        scale, shift = self.rng.uniform(0.5, 1.5, (2, channels))
        return self.add(BatchNorm(ChannelMap(scale, shift, AXIS), axis=AXIS), x, channels=channels)

    def relu(self, x: int) -> int:
        return self.add(Clip(), x, channels=self.channels(x))

    def tanh(self, x: int) -> int:
        return self.add(Opaque(), x, channels=self.channels(x))

    def sum(self, *inputs: int) -> int:
        return self.add(Merge(MergeKind.ADD), *inputs, channels=self.channels(inputs[0]))

    def joined(self, *inputs: int) -> int:
        return self.add(Concat(AXIS), *inputs, channels=sum(map(self.channels, inputs)))

    def graph(self, output: int) -> Graph:
        return Graph(
            tuple(self.values),
            tuple(self.nodes),
            frozenset([output]),
            read_weight=lambda owner, name: self.kernels[owner],
        )


def chain(net: Network, size: int) -> int:
    x = net.source()
    for _ in range(size):
        x = net.relu(net.norm(net.conv(x)))
    return x


def trunk(net: Network, size: int) -> int:
    x = net.conv(net.source())
    for _ in range(size // 2):
        y = net.conv(net.relu(net.norm(x)))
        x = net.sum(x, net.conv(net.relu(net.norm(y))))
    return net.conv(x)


def concatenations(net: Network, size: int) -> int:
    x = net.conv(net.source())
    for _ in range(size // 8):
        x = net.joined(x, net.conv(net.relu(net.norm(x)), GROWTH))
    return net.conv(x)


def sums(net: Network, size: int) -> int:
    x = net.conv(net.source())
    for _ in range(size):
        x = net.sum(x, net.norm(x))
    return net.conv(x)


def norms(net: Network, size: int) -> int:
    x = net.conv(net.source())
    for _ in range(size):
        x = net.norm(x)
    return net.conv(x)


def contradictions(net: Network, size: int) -> int:
    x = net.source()
    for _ in range(size):
        x = net.norm(net.tanh(x))
    return net.tanh(x)


KINDS: dict[str, Callable[[Network, int], int]] = {
    each.__name__: each for each in (chain, trunk, concatenations, sums, norms, contradictions)
}


def measured(kind: str, size: int, repeats: int) -> dict[str, Any]:
    """Median seconds of a plan for a network of some kind, and what it leaves."""
    net = Network()
    graph = net.graph(KINDS[kind](net, size))
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        plan = make_plan(graph, "fold")
        seconds.append(time.perf_counter() - start)
    return {"seconds": statistics.median(seconds), "left": plan.left, "of": len(plan.decisions)}


def exponent(sizes: list[int], seconds: list[float]) -> float:
    """Exponent of the size in times, over the larger half of the sizes."""
    half = len(sizes) // 2
    return float(np.polyfit(np.log(sizes[half:]), np.log(seconds[half:]), 1)[0])


def main(arguments: list[str]) -> None:
    check_usage(arguments[1:], FLAGS.json)
    sizes = sorted(map(int, FLAGS.sizes))
    if len(sizes) < 3 or sizes[0] < 8:
        raise app.UsageError("--sizes takes three numbers or more, none below 8")
    rows = []
    found: dict[str, dict[int, dict[str, Any]]] = {kind: {} for kind in KINDS}
    for kind, each in found.items():
        for size in sizes:
            each[size] = measured(kind, size, FLAGS.repeats)
            progress(f"{kind}, {size}: {each[size]['seconds']:.2f} s")
        seconds = [each[size]["seconds"] for size in sizes]
        last = each[sizes[-1]]
        cells = [f"{1e3 * value:.0f}" for value in seconds]
        left = f"{last['left']} of {last['of']}"
        rows.append([kind, *cells, left, f"{exponent(sizes, seconds):.2f}"])
    print(table(["network", *map(str, sizes), "left", "exponent"], rows))
    results.keep(FLAGS.json, found)


if __name__ == "__main__":
    app.run(main)

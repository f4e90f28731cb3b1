"""What ran in a call of a TensorFlow function, for how long, and for which BatchNormalization.

    times = profiled(lambda: step(x, y), calls=10)                   # list[OpTime]
    layers = by_layer(times, model, step.get_concrete_function(x, y))   # ByLayer
    layers["conv1_bn"].forward_milliseconds
    bn_ops_of(layers)["conv1_bn"]                                    # the kinds that ran

TensorFlow's profiler writes events: on a CPU one for each operation that ran, called "name:Kind"
by its name in the graph; on a GPU one for each kernel, which knows the name and kind of its
operation. Times are those of the events alone: gaps between them, and what the host does before
a GPU's kernels start, are in none of them. Operations that run at the same time count in full.

**To which layer an operation belongs** is read from the graph that was traced:

- Those that a layer's call has made, and TensorFlow's own gradients of them
  ("gradient_tape/..."), have the layer's name scope. TensorFlow counts up the names of scopes,
  and Keras 3 enters each twice, so that the layer "bn" may be found in "bn_1" beside a layer
  "bn_1"; which scope is whose is therefore told by the variable in it: the moving mean.
- Those of a custom gradient, and the sums of gradients (AddN), have no scope. They belong to the
  layer whose operations they read, directly or through others of their kind, or whose gradient
  alone reads them. A sum does if it adds up nothing else. One that reads of several layers is
  *unattributed*, as is an operation without a scope that is not in the graph, and any
  BatchNormalization outside all layers.

Backward is what depends on the gradient of the loss, forward is the rest. A sample that both
need is taken once, and counted forward. Where TensorFlow fuses an activation into the operation
before it (..Ex), its time is in that of the layer.
"""

from __future__ import annotations

import itertools
import re
import statistics
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.timing import synchronize

# Kernels that are not listed: what moves nothing, what looks after variables, and plain arithmetic,
# most of which is of vectors with one element for each channel.
UNLISTED = {
    *("Const", "Identity", "IdentityN", "NoOp", "_Arg", "_Retval", "DeviceIndex", "Cast"),
    *("Reshape", "ExpandDims", "Squeeze", "Shape", "ShapeN", "Size", "Prod", "Pack", "Fill"),
    *("Switch", "_SwitchN", "Merge", "Tile", "Snapshot"),
    *("ReadVariableOp", "AssignVariableOp", "AssignSubVariableOp", "AssignAddVariableOp"),
    *("Mul", "Sub", "AddV2", "AddN", "Neg", "RealDiv", "DivNoNan", "Maximum", "Minimum"),
    *("Greater", "SelectV2", "Square", "Rsqrt", "RsqrtGrad", "Sqrt", "Reciprocal"),
}
# Their time is that of what they call, which has events of its own.
_CONTAINERS = {
    *("If", "StatelessIf", "Case", "StatelessCase", "While", "StatelessWhile"),
    *("PartitionedCall", "StatefulPartitionedCall"),
}
_SUM = "AddN"  # as a tape sums gradients
_BACKWARD_SCOPE = "gradient_tape"

# ------------------------------------------------------------------------------ what ran


@dataclass(frozen=True)
class OpTime:
    """An operation as it ran under the profiler, or one of its kernels on a GPU.

    Attributes:
        name: that in the graph; "" where a kernel has none.
        op: its kind, as FusedBatchNormV3; that of oneDNN is so marked.
        kernel: the name of the kernel on a GPU, else "".
        times: how long each of its runs took, in milliseconds, over all calls; () for what was
            compiled and not profiled.
        calls: how many calls were profiled.
    """

    name: str
    op: str
    kernel: str = ""
    times: tuple[float, ...] = ()
    calls: int = 1

    @property
    def count(self) -> int:
        """How often it runs in a call. The profiler now and then misses an event."""
        return round(len(self.times) / self.calls)

    @property
    def milliseconds(self) -> float:
        """Its time in a call: the median of a run, times the runs."""
        return statistics.median(self.times) * self.count if self.times else 0.0

    @property
    def listed(self) -> bool:
        """Whether it is worth listing; see UNLISTED."""
        return self.op not in UNLISTED


def profiled(
    function: Callable[[], object],
    calls: int,
    directory: str | Path | None = None,
    device: bool = True,
) -> list[OpTime]:
    """Calls a function under TensorFlow's profiler, and lists what ran.

    It has to have been called before, or tracing is profiled too.

    Args:
        function: without arguments; what it returns is thrown away.
        calls: how often it is called.
        directory: where the profile is kept, for TensorBoard; None keeps it nowhere.
        device: on a GPU, list its kernels, and not what the host does to start them.

    Raises:
        RuntimeError: there is a GPU, and the profiler has seen no kernel.
    """
    if directory is None:
        with tempfile.TemporaryDirectory() as temporary:
            return profiled(function, calls, temporary, device)
    import tensorflow as tf
    from tensorflow.tsl.profiler.protobuf import xplane_pb2

    # Level 3 has cheap operations, too.
    options = tf.profiler.experimental.ProfilerOptions(
        host_tracer_level=3, python_tracer_level=0, device_tracer_level=int(device)
    )
    before = set(Path(directory).rglob("*.xplane.pb"))
    synchronize()
    with tf.profiler.experimental.Profile(str(directory), options):
        for _ in range(calls):
            function()
        synchronize()
    (path,) = set(Path(directory).rglob("*.xplane.pb")) - before
    ran = read(xplane_pb2.XSpace.FromString(path.read_bytes()), calls)
    if device and tf.config.list_logical_devices("GPU") and not any(op.kernel for op in ran):
        raise RuntimeError(
            "the profiler saw no kernel of the GPU; may this user read its counters?"
        )
    return ran


def read(space: Any, calls: int) -> list[OpTime]:
    """What a profile (XSpace) of some calls says ran.

    Where there are events of a GPU, those alone: what the host does for them is not work.
    """
    on_gpu = [plane for plane in space.planes if plane.name.startswith("/device:GPU:")]
    found = list(itertools.chain.from_iterable(map(_kernels, on_gpu)))
    if not found:
        found = list(itertools.chain.from_iterable(map(_host_operations, space.planes)))
    times: dict[tuple[str, str, str], list[float]] = {}
    for key, milliseconds in found:
        times.setdefault(key, []).append(milliseconds)
    return [OpTime(*key, tuple(each), calls) for key, each in times.items()]


def _host_operations(plane: Any) -> Iterator[tuple[tuple[str, str, str], float]]:
    for event in itertools.chain.from_iterable(line.events for line in plane.lines):
        # Operations are "path/of/name:Kind"; other events have spaces, or none of this.
        name, op = _split(plane.event_metadata[event.metadata_id].name)
        if op and op not in _CONTAINERS:
            yield (name, op, ""), event.duration_ps / 1e9


def _kernels(plane: Any) -> Iterator[tuple[tuple[str, str, str], float]]:
    # Other lines are summaries of the streams.
    streams = (line for line in plane.lines if line.name.startswith("Stream"))
    for event in itertools.chain.from_iterable(line.events for line in streams):
        metadata = plane.event_metadata[event.metadata_id]
        name = op = ""
        for stat in itertools.chain(event.stats, metadata.stats):
            if plane.stat_metadata[stat.metadata_id].name == "tf_op":
                text = stat.str_value or plane.stat_metadata[stat.ref_value].name
                name, op = _split(text)
        yield (name, op, metadata.name), event.duration_ps / 1e9


def _split(text: str) -> tuple[str, str]:
    """The name and the kind of an operation; "" and "" where a text is not that of one."""
    found = re.fullmatch(r"([\w./>-]+):(\w+)", text)
    return (found[1], re.sub("^_Mkl(Native)?(.*)", r"\2 (oneDNN)", found[2])) if found else ("", "")


def compiled(function: Any, *arguments: Any) -> list[OpTime]:
    """The operations that XLA compiles for a tf.function with jit_compile=True, without times.

    They are those that the module of the compiled function names as its instructions' origins:
    XLA fuses instructions of several operations, so it knows no times of single ones.
    """
    module = function.experimental_get_compiler_ir(*arguments)(stage="hlo")
    pairs = re.findall(r'op_type="([^"]+)" op_name="([^"]+)"', module)
    return [OpTime(name, op) for op, name in dict.fromkeys(pairs) if op not in _CONTAINERS]


# ---------------------------------------------------------------------- which layer's it is


@dataclass(frozen=True)
class LayerTime:
    """What ran for one BatchNormalization.

    Attributes:
        name: that of the layer.
        forward, backward: what ran; see the module's docstring.
    """

    name: str
    forward: tuple[OpTime, ...]
    backward: tuple[OpTime, ...]

    @property
    def forward_milliseconds(self) -> float:
        """In a call."""
        return total(self.forward)

    @property
    def backward_milliseconds(self) -> float:
        """In a call."""
        return total(self.backward)


@dataclass(frozen=True)
class ByLayer:
    """Operations by the BatchNormalization that they belong to.

    Attributes:
        layers: by name, in the order of the model, each with what ran for it, if only nothing.
        elsewhere: what belongs to no BatchNormalization.
        unattributed: what may or may not belong to one.
    """

    layers: Mapping[str, LayerTime]
    elsewhere: tuple[OpTime, ...]
    unattributed: tuple[OpTime, ...]

    def __getitem__(self, name: str) -> LayerTime:
        return self.layers[name]

    @property
    def milliseconds(self) -> float:
        """All operations in a call."""
        return self.bn_milliseconds + total(self.elsewhere) + total(self.unattributed)

    @property
    def bn_milliseconds(self) -> float:
        """All that belongs to a BatchNormalization, in a call."""
        return sum(
            layer.forward_milliseconds + layer.backward_milliseconds
            for layer in self.layers.values()
        )

    @property
    def unattributed_share(self) -> float:
        """The part of all time that may or may not belong to a BatchNormalization."""
        return total(self.unattributed) / self.milliseconds if self.milliseconds else 0.0


def total(ops: Iterable[OpTime]) -> float:
    """Milliseconds of operations in a call."""
    return sum(op.milliseconds for op in ops)


def norms_of(model: Any) -> list[Any]:
    """The BatchNormalization layers of a Keras model, of whatever class, in its order."""
    layers = model._flatten_layers(include_self=False, recursive=True)
    return [layer for layer in layers if hasattr(layer, "moving_mean")]


def by_layer(ops: Iterable[OpTime], model: Any, function: Any) -> ByLayer:
    """Finds the BatchNormalization that each operation belongs to.

    Args:
        ops: what ran, of `profiled` or `compiled`.
        model: a built model of either Keras.
        function: the concrete function that ran, which calls the model.

    Raises:
        ValueError: the function does not call one of the layers.
    """
    places = _Places.of(model, function.graph)
    names = [layer.name for layer in norms_of(model)]
    forward: dict[str, list[OpTime]] = {name: [] for name in names}
    backward: dict[str, list[OpTime]] = {name: [] for name in names}
    elsewhere, unattributed = [], []
    for op in ops:
        owner, is_backward = places.of_operation(op.name)
        if owner is _UNKNOWN or (owner is None and "BatchNorm" in op.op):
            unattributed.append(op)
        elif owner is None:
            elsewhere.append(op)
        else:
            (backward if is_backward else forward)[owner].append(op)
    layers = {name: LayerTime(name, tuple(forward[name]), tuple(backward[name])) for name in names}
    return ByLayer(layers, tuple(elsewhere), tuple(unattributed))


def bn_ops_of(layers: ByLayer) -> dict[str, dict[str, list[str]]]:
    """The kinds of operations that ran, by layer, "forward" and "backward", sorted.

    Plain arithmetic is left out: it is mostly of one element for each channel, and the same work
    may be written in many ways.
    """
    return {
        name: {"forward": _kinds(layer.forward), "backward": _kinds(layer.backward)}
        for name, layer in layers.layers.items()
    }


def _kinds(ops: Iterable[OpTime]) -> list[str]:
    return sorted({op.op for op in ops if op.listed})


def counted(ops: Iterable[OpTime]) -> dict[str, int]:
    """How often each listed kind of operation, or kernel of a GPU, ran in a call, sorted."""
    counts: Counter[str] = Counter()
    for op in ops:
        if op.listed:
            counts[op.kernel or op.op] += op.count
    return dict(sorted(counts.items()))


_UNKNOWN = ""  # an owner that cannot be told; no layer is called so
_Owner = str | None  # the name of a layer, None for no layer


@dataclass(frozen=True)
class _Places:
    """Where the operations of a graph belong.

    Attributes:
        scopes: layers by name scope.
        owners: by the name of an operation in the graph.
        backward: the names of those that depend on the gradient of the loss.
    """

    scopes: Mapping[str, str]
    owners: Mapping[str, _Owner]
    backward: frozenset[str]

    @classmethod
    def of(cls, model: Any, graph: Any) -> _Places:
        scopes = _scopes(model, graph)
        owners: dict[str, _Owner] = {}
        backward: set[str] = set()
        ops = graph.get_operations()
        # Operations are in the order in which they were made: inputs before their readers.
        for op in ops:
            inputs = [tensor.op.name for tensor in op.inputs]
            if op.name.startswith(_BACKWARD_SCOPE) or not backward.isdisjoint(inputs):
                backward.add(op.name)
            owners[op.name] = (
                _by_scope(op.name, scopes)
                if _has_scope(op.name)
                else _by_inputs(op.type, {owners.get(name, _UNKNOWN) for name in inputs})
            )
        for op in reversed(ops):
            if owners[op.name] is None and not _has_scope(op.name) and op.name not in backward:
                owners[op.name] = _by_readers(op, owners)
        return cls(scopes, owners, frozenset(backward))

    def of_operation(self, name: str) -> tuple[_Owner, bool]:
        """The layer that what ran under a name belongs to, and whether it is backward."""
        # What changes the layout for an operation is called after it, with a hyphen.
        for known in (name, name.partition("-")[0]):
            if known in self.owners:
                return self.owners[known], known in self.backward
        owner = _by_scope(name, self.scopes) if _has_scope(name) else _UNKNOWN
        return owner, _BACKWARD_SCOPE in name


def _by_scope(name: str, scopes: Mapping[str, str]) -> _Owner:
    parts = name.split("/")
    for start, end in itertools.combinations(range(len(parts)), 2):
        found = scopes.get("/".join(parts[start:end]))
        if found:
            return found
    return None


def _by_inputs(kind: str, owners: set[_Owner]) -> _Owner:
    layers = owners - {None}
    if not layers:
        return None
    mixed = kind == _SUM and None in owners
    return _UNKNOWN if mixed or len(layers) > 1 else layers.pop()


def _by_readers(op: Any, owners: Mapping[str, _Owner]) -> _Owner:
    """The layer whose gradient alone reads an operation that reads nothing of the layer's.

    So is a sample taken of the layer's input.
    """
    readers = [reader.name for output in op.outputs for reader in output.consumers()]
    found = {owners[name] for name in readers}
    return found.pop() if len(found) == 1 and not any(map(_has_scope, readers)) else None


def _has_scope(name: str) -> bool:
    return "/" in name


def _scopes(model: Any, graph: Any) -> dict[str, str]:
    """The name scopes of the calls of BatchNormalization layers, by what reads their variables.

    Raises:
        ValueError: a layer is not called in the graph.
    """
    readers: dict[int, list[Any]] = {}
    for external, internal in graph.captures:
        readers[id(external)] = internal.consumers()
    scopes: dict[str, str] = {}
    for layer in norms_of(model):
        mean = layer.moving_mean
        # A variable of Keras 3 holds one of TensorFlow.
        handle = mean.handle if hasattr(mean, "handle") else mean.value.handle
        found = {_scope(op.name, layer.name) for op in readers.get(id(handle), [])} - {""}
        if not found:
            raise ValueError(f"the function does not call the layer '{layer.name}' of the model")
        scopes |= dict.fromkeys(found, layer.name)
    return scopes


def _scope(name: str, layer: str) -> str:
    """The part of an operation's name up to the scope of a layer; "" where that is not in it."""
    found = re.match(rf"(?:.*/)?{re.escape(layer)}(?:_\d+)*(?=/)", name)
    return found[0] if found else ""


# ----------------------------------------------------------------------------- for people


def as_dict(layers: ByLayer) -> dict[str, Any]:
    """Times for JSON, in milliseconds in a call, with all operations of the layers."""
    return {
        "milliseconds": layers.milliseconds,
        "bn_milliseconds": layers.bn_milliseconds,
        "unattributed_share": layers.unattributed_share,
        "unattributed": list(map(_op_as_dict, layers.unattributed)),
        "layers": [
            {
                "layer": layer.name,
                "forward_milliseconds": layer.forward_milliseconds,
                "backward_milliseconds": layer.backward_milliseconds,
                "forward": list(map(_op_as_dict, layer.forward)),
                "backward": list(map(_op_as_dict, layer.backward)),
            }
            for layer in layers.layers.values()
        ],
    }


def _op_as_dict(op: OpTime) -> dict[str, Any]:
    return {
        "name": op.name,
        "op": op.op,
        "kernel": op.kernel,
        "count": op.count,
        "milliseconds": op.milliseconds,
    }


def layer_table(variants: Mapping[str, ByLayer], title: str) -> str:
    """Milliseconds of each layer, forward + backward, for each variant of one model."""
    from mbn_rewrite.tables import table

    names = dict.fromkeys(itertools.chain.from_iterable(one.layers for one in variants.values()))
    rows = [[name, *(_cell(one.layers.get(name)) for one in variants.values())] for name in names]
    rows += [
        ["all BN", *(f"{one.bn_milliseconds:.3g}" for one in variants.values())],
        ["all operations", *(f"{one.milliseconds:.3g}" for one in variants.values())],
        ["not attributed", *(f"{one.unattributed_share:.2%}" for one in variants.values())],
    ]
    return table(["layer", *variants], rows, title, width=max(100, 24 + 18 * len(variants)))


def _cell(layer: LayerTime | None) -> str:
    if layer is None:
        return "-"
    return f"{layer.forward_milliseconds:.3g} + {layer.backward_milliseconds:.3g}"


def chart_data(
    variants: Mapping[str, ByLayer],
) -> tuple[list[str], dict[str, tuple[Sequence[float], Sequence[float]]]]:
    """Names of layers, and for each variant with any their times forward and backward."""
    used = {variant: one for variant, one in variants.items() if one.layers}
    names = list(dict.fromkeys(itertools.chain.from_iterable(one.layers for one in used.values())))
    none = LayerTime("", (), ())
    series = {}
    for variant, one in used.items():
        layers = [one.layers.get(name, none) for name in names]
        series[variant] = (
            [layer.forward_milliseconds for layer in layers],
            [layer.backward_milliseconds for layer in layers],
        )
    return names, series

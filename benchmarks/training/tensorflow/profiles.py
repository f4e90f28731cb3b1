"""Operations that run in a call of a TensorFlow function, and their times.

    times = profiled(lambda: step(x, y), calls=10)                   # list[OpTime]

TensorFlow's profiler writes events: on a CPU one for each operation that ran, called "name:Kind"
by its name in the graph; on a GPU one for each kernel, which knows the name and kind of its
operation. Times are those of the events alone: gaps between them, and what the host does before
a GPU's kernels start, are in none of them. Operations that run at the same time count in full.

For which BatchNormalization they ran is told by attribution.py.
"""

from __future__ import annotations

import itertools
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.common.devices import synchronize
from benchmarks.training.operations import OpTime

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
    """Operations in a profile (XSpace) of some calls.

    Where there are events of a GPU, those alone: what the host does for them is not work.
    """
    on_gpu = [plane for plane in space.planes if plane.name.startswith("/device:GPU:")]
    found = list(itertools.chain.from_iterable(map(_kernels, on_gpu)))
    if not found:
        found = list(itertools.chain.from_iterable(map(_host_operations, space.planes)))
    times: dict[tuple[str, str, str], list[float]] = {}
    for key, milliseconds in found:
        times.setdefault(key, []).append(milliseconds)
    return [OpTime(*key, tuple(each), calls, key[1] not in UNLISTED) for key, each in times.items()]


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
    return [
        OpTime(name, op, listed=op not in UNLISTED)
        for op, name in dict.fromkeys(pairs)
        if op not in _CONTAINERS
    ]

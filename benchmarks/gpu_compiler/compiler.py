"""XLA's compiler for a GPU, in a process of its own: `python -m benchmarks.gpu_compiler.compiler`.

TensorFlow and JAX each bring an XLA of their own, whose flags are read from the environment at the
start, so JAX has a process without TensorFlow. What passes between the two are lines of JSON: a
`Job` on its standard input, and what became of it on its standard output.

The compiler needs neither a GPU nor its driver. What needs one is left out: nothing runs, and no
kernel is chosen by trying several, so there are no times of convolutions.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.gpu_compiler import hlo
from benchmarks.gpu_compiler.targets import TARGETS

EXTRA = "pip install '.[gpu-compiler]'"
_PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda13-pjrt")
_FLAGS = "--xla_gpu_collect_cost_model_stats=true"
_ROOT = Path(__file__).resolve().parents[2]


def versions() -> str:
    """The version of JAX and its plugin for CUDA.

    Raises:
        ValueError: one is missing, or they are of several versions.
    """
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            raise ValueError(f"{package} is not installed; {EXTRA} brings it (1.1 GB)") from None
    if len(set(found.values())) > 1:
        each = ", ".join(f"{package} is {version}" for package, version in found.items())
        raise ValueError(f"{each}; they must be of one version: {EXTRA} brings them")
    return found["jax"]


@dataclass(frozen=True)
class Compiled:
    """What XLA made of a program.

    Attributes:
        kernels: how many.
        convolutions, products: how many of them are calls of cuDNN, and products of matrices.
        loop_fusions: how many are elementwise fusions.
        of_weights: how many compute the same at every call, from weights alone: transpositions,
            conversions and scales that constants would spare.
        read, written: bytes; see hlo.py.
        elsewhere: bytes read and written by all but convolutions and products.
        temporary: bytes of memory for intermediate results.
        microseconds: XLA's estimates for all but convolutions and products, in total.
        unestimated: how many of these it makes no estimate for.
    """

    kernels: int
    convolutions: int
    products: int
    loop_fusions: int
    of_weights: int
    read: int
    written: int
    elsewhere: int
    temporary: int
    microseconds: float
    unestimated: int


def summary(kernels: list[hlo.Kernel], temporary: int) -> Compiled:
    """What kernels come to."""
    counts = [kernel.kind for kernel in kernels]
    elsewhere = [one for one in kernels if one.kind not in ("convolution", "product")]
    estimates = [one.microseconds for one in elsewhere]
    return Compiled(
        kernels=len(kernels),
        convolutions=counts.count("convolution"),
        products=counts.count("product"),
        loop_fusions=counts.count("loop fusion"),
        of_weights=sum(kernel.of_weights for kernel in kernels),
        read=sum(kernel.read for kernel in kernels),
        written=sum(kernel.written for kernel in kernels),
        elsewhere=sum(kernel.read + kernel.written for kernel in elsewhere),
        temporary=temporary,
        microseconds=sum(one for one in estimates if one is not None),
        unestimated=estimates.count(None),
    )


class Compiler:
    """A running compiler, as a context manager.

    Args:
        target: a key of `TARGETS`.
    """

    def __init__(self, target: str) -> None:
        self._command = [sys.executable, "-m", "benchmarks.gpu_compiler.compiler", target]

    def __enter__(self) -> Compiler:
        # JAX's own devices are not asked for, and need not be there.
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": _FLAGS}
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=_ROOT,
            env=environment,
        )
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()

    def compile(self, program: bytes, inputs: int, place: Path) -> Compiled:
        """What a program is compiled to.

        Args:
            program: a serialised `HloModuleProto`.
            inputs: how many of its parameters are data.
            place: of a file to pass it in.

        Raises:
            ValueError: XLA does not compile it.
            RuntimeError: the compiler has ended.
        """
        assert self._process.stdin
        assert self._process.stdout
        place.write_bytes(program)
        job = {"program": str(place), "inputs": inputs}
        try:
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            code = self._process.wait()
            raise RuntimeError(f"the compiler has ended with code {code}")
        result = json.loads(answer)
        if "error" in result:
            raise ValueError(result["error"])
        return Compiled(**result)


# ------------------------------------------------------------------- in the other process


def _serve(target: str) -> None:
    devices = _devices(target)
    for line in sys.stdin:
        job = json.loads(line)
        try:
            text, temporary = _compiled(Path(job["program"]).read_bytes(), devices)
            result = asdict(summary(hlo.kernels(text, job["inputs"]), temporary))
        except Exception as error:  # whatever XLA cannot compile is said, and the next one tried
            result = {"error": " ".join(str(error).split())[:300] or type(error).__name__}
        print(json.dumps(result), flush=True)


def _devices(target: str) -> Any:
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(
        platform="cuda", target_config=TARGETS[target].text(), topology="1x1x1"
    )
    return topology.devices[:1]


def _compiled(program: bytes, devices: Any) -> tuple[str, int]:
    """Optimised HLO, and bytes of temporary memory.

    JAX compiles for a GPU that is not there only what it has traced itself; its client, which is
    private, compiles any StableHLO.
    """
    from jax._src.interpreters import mlir
    from jax._src.lib import _jax, xla_client
    from jaxlib.mlir import ir

    with mlir.make_ir_context():
        module = ir.Module.parse(_jax.mlir.hlo_to_stablehlo(program))
        _without_copies(module.operation)
        executable = devices[0].client.compile(
            module,
            executable_devices=xla_client.DeviceList(tuple(devices)),
            compile_options=xla_client.CompileOptions(),
        )
    text = executable.hlo_modules()[0].to_string()
    return text, executable.get_compiled_memory_stats().temp_size_in_bytes


def _without_copies(operation: Any) -> None:
    """Takes out copies, which TensorFlow puts before results, and of which StableHLO has none."""
    copies = []
    operation.walk(lambda one: _found(one, copies))
    for copy in copies:
        copy.results[0].replace_all_uses_with(copy.operands[0])
        copy.erase()


def _found(operation: Any, copies: list[Any]) -> Any:
    from jaxlib.mlir import ir

    if operation.name == "mhlo.copy":
        copies.append(operation.operation)
    return ir.WalkResult.ADVANCE


if __name__ == "__main__":
    _serve(sys.argv[1])

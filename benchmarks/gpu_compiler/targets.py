"""GPUs as XLA's compiler knows them.

The figures are those of h100_sxm.txtpb and a100_sxm_80.txtpb, in
xla/backends/gpu/target_config/specs of https://github.com/openxla/xla; cuDNN 9.10 and CUDA 13 are
what a program would run with.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """A GPU.

    Attributes:
        name: as its maker calls it.
        capability: the major version of its compute capability.
        cores: streaming multiprocessors.
        fpus: units for float32 in each.
        clock: of a core, in GHz.
        bandwidth: of its memory, in bytes a second.
        memory: in bytes.
        l2_cache: in bytes.
        shared_memory: of a core, in bytes; a block may have 1 KiB less of it.
    """

    name: str
    capability: int
    cores: int
    fpus: int
    clock: float
    bandwidth: int
    memory: int
    l2_cache: int
    shared_memory: int

    def text(self) -> str:
        """The target as XLA reads it: a `GpuTargetConfigProto`, as text."""
        return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {self.shared_memory}
  shared_memory_per_block_optin: {self.shared_memory - 1024}
  threads_per_core_limit: 2048
  core_count: {self.cores}
  fpus_per_core: {self.fpus}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {self.bandwidth}
  l2_cache_size: {self.l2_cache}
  clock_rate_ghz: {self.clock}
  device_memory_size: {self.memory}
  cuda_compute_capability {{ major: {self.capability} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 13 minor: 0 patch: 0 }}
device_description_str: "{self.name}"
"""


TARGETS = {
    "h100": Target(
        "NVIDIA H100 80GB HBM3",
        capability=9,
        cores=132,
        fpus=128,
        clock=1.98,
        bandwidth=3_352_320_000_000,
        memory=84_942_979_072,
        l2_cache=52_428_800,
        shared_memory=233_472,
    ),
    "a100": Target(
        "NVIDIA A100-SXM4-80GB",
        capability=8,
        cores=108,
        fpus=64,
        clock=1.41,
        bandwidth=2_039_040_000_000,
        memory=85_100_068_864,
        l2_cache=41_943_040,
        shared_memory=167_936,
    ),
}

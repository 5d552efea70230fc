"""NVIDIA GPUs that are not there: jax's CUDA plugin compiles with no GPU and no driver.

What it compiles is as it would run, but for what XLA chooses by trying on a GPU: tiles, and which
of several kernels. So there are no times.
"""

from __future__ import annotations

import importlib.metadata
import os

import jax
from jax.experimental import topologies

from unclip_jax.common import extras
from unclip_jax.errors import UserError, one_line

PLUGINS = ("jax-cuda12-plugin", "jax-cuda13-plugin")
MEMORY = 84_929_347_584  # bytes of an H100 with 80 GB
# XLA's description of an H100 SXM (xla/tools/hlo_opt has the same for other GPUs).
H100 = f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 device_memory_size: {MEMORY}
  cuda_compute_capability {{ major: 9 }}
}}
platform_name: "CUDA" runtime_version {{ major: 12 minor: 9 }}
dnn_version_info {{ major: 9 minor: 10 }} device_description_str: "NVIDIA H100 80GB HBM3"
"""
# Without a GPU no tile is found for some of Triton's products; cuBLAS has them all.
OPTIONS = {"xla_gpu_enable_triton_gemm": "False"}


def devices(each: int, hosts: int) -> list[jax.Device]:
    """`hosts` hosts of so many H100s each, to compile for.

    UserError if the plugin is not installed.
    """
    check_compiler()
    # It would ask the driver which GPUs there are.
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    try:
        return list(
            topologies.get_topology_desc(
                "h100", "cuda", target_config=H100, topology=f"1x{hosts}x{each}"
            ).devices
        )
    except Exception as error:  # the compiler's errors share no class
        raise UserError(
            f"--topology=h100:{each}x{hosts}: the CUDA compiler knows no such GPUs"
            f" ({one_line(error)}); try one such as h100:8x8"
        ) from error


def check_compiler() -> None:
    """Raise UserError unless jax's CUDA plugin is installed."""
    if not any(list(importlib.metadata.distributions(name=plugin)) for plugin in PLUGINS):
        install = f"{extras.how('gpu')}, which needs no GPU"
        raise UserError(f"CUDA: jax's plugin is not installed, and it is the compiler; {install}")

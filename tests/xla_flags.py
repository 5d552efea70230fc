"""XLA's flags in the tests. No JAX is imported here: it reads them as it starts."""

from __future__ import annotations

import os
from importlib import metadata

# The first writes loops one by one instead of fused ones: half the time to compile. The second
# compiles a program in one piece: threads for its pieces gain nothing where every core is busy.
# Later versions lack the first.
_HASTE = " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
_KNOWS_THEM = metadata.version("jaxlib").startswith("0.10.")


def xla_flags(devices: int = 1) -> str:
    """For so many CPU devices; in haste to compile, but for `make test-all`."""
    return f"--xla_force_host_platform_device_count={devices}{haste()}"


def haste() -> str:
    """The flags that say nothing of devices."""
    in_haste = os.environ.get("JAX_DISABLE_MOST_OPTIMIZATIONS") == "1"
    return _HASTE if in_haste and _KNOWS_THEM else ""

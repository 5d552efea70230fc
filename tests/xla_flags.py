"""XLA's flags in the tests. No JAX is imported here: it reads them as it starts."""

from __future__ import annotations

import os
from importlib import metadata

# It writes loops one by one instead of fused ones: half the time to compile. Later ones lack it.
_KNOWS_EMITTERS = metadata.version("jaxlib").startswith("0.10.")


def xla_flags(devices: int = 1) -> str:
    """For so many CPU devices; in haste to compile, but for `make test-all`."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    in_haste = os.environ.get("JAX_DISABLE_MOST_OPTIMIZATIONS") == "1"
    return f"{flags} --xla_cpu_use_fusion_emitters=false" if in_haste and _KNOWS_EMITTERS else flags

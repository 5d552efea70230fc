"""Attention by fused kernels, which never write the scores to memory: on TPUs and NVIDIA GPUs.

FlashAttention (Dao et al. 2022, arXiv 2205.14135): keys are read in blocks, the softmax is kept as
a running maximum and sum, and the backward pass computes the scores again. The kernels are JAX's
own: splash attention in Pallas for TPUs, and cuDNN's for GPUs. Here are their conditions, and what
lies between them and `attention`: padding to blocks, masks, fully masked rows, and the mesh, whose
devices each call the kernel for their own examples, heads and rows of pixels, as XLA cannot split
a kernel.

The kernel for TPUs is tested in Pallas's interpreter and compiled by libtpu. The one for GPUs is
compiled, and has not been run: its conditions are those that JAX's source states.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from unclip_jax.parallel import axes

# Queries and keys from which on a kernel is taken: 32 x 32 positions of an image. By the bytes that
# it saves (docs/performance.md) it would pay at 16 x 16, too, but they are few, and it is untimed.
LEAST = 1024
TPU_LANES = 128  # what the lengths of blocks are multiples of
TPU_BLOCK = 512  # queries or keys, at most, whose scores are computed at once
TPU_KEYS = 2048  # keys, at most, that lie in the core's memory at once

Kernel = Callable[..., jax.Array]


# ---------------------------------------------------------------- conditions


def pays(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None) -> bool:
    """Whether sequences are so long that a kernel pays, and the mask is one over keys alone.

    Args:
        q, k, v, mask: as in `attention`; a mask over keys is `[b or 1, 1, 1, m]`.
    """
    long = all(isinstance(n, int) and n >= LEAST for n in (q.shape[2], k.shape[2]))
    by_key = mask is None or mask.shape[1:] == (1, 1, k.shape[2])
    return long and by_key and q.dtype == k.dtype == v.dtype


def fits(platform: str, q: jax.Array, k: jax.Array) -> bool:
    """Whether the kernel for `platform`, a key of `KERNELS`, takes these sizes and this dtype.

    Products of queries and keys of another than JAX's default precision are left to the reference.
    """
    mesh, (b, n, length, dim) = axes.current(), q.shape
    if mesh is not None and (b % axes.split(mesh, "batch") or n % axes.split(mesh, "heads")):
        return False
    if mesh is not None:
        length = NamedSharding(mesh, _queries(mesh, q)).shard_shape(q.shape)[2]
    if jax.config.jax_default_matmul_precision not in (None, "default"):
        return False
    if platform == "cuda":
        half = q.dtype in (jnp.bfloat16, jnp.float16)
        return half and dim % 8 == 0 and dim <= 128 and length % 2 == 0
    return q.dtype in (jnp.bfloat16, jnp.float32) and dim % 8 == 0 and dim <= 256


def has_cudnn(gpu: jax.Device) -> bool:
    """Whether a GPU runs cuDNN's kernel: one of NVIDIA's, Ampere or later."""
    # A GPU that is only compiled for has its name for a version.
    if "cuda" not in gpu.client.platform_version and not gpu.device_kind.startswith("NVIDIA"):
        return False
    return tuple(int(part) for part in gpu.compute_capability.split(".")) >= (8, 0)


# ---------------------------------------------------------------- kernels


def tpu_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None, *, scale: float
) -> jax.Array:
    """`attention` by JAX's splash attention, a Pallas kernel with a backward pass of its own.

    Args:
        q, k, v: as in `attention`, bfloat16 or float32.
        mask: `[b or 1, 1, 1, m]` booleans, or None.
        scale: factor on the products of queries and keys.

    Returns:
        `[b, n, l, k]` in the dtype of `v`.
    """
    return _on_each_device(_splash, (q * scale).astype(q.dtype), k, v, _seen(k, mask))


def gpu_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None, *, scale: float
) -> jax.Array:
    """`attention` by cuDNN, in bfloat16 or float16; arguments and result as of `tpu_attention`.

    It must not be traced without `has_cudnn`: JAX asks cuDNN for its version.
    """
    return _on_each_device(partial(_cudnn, scale=scale), q, k, v, _seen(k, mask))


KERNELS: dict[str, Kernel] = {"tpu": tpu_attention, "cuda": gpu_attention}


def _seen(k: jax.Array, mask: jax.Array | None) -> jax.Array | None:
    """The keys that an example's queries attend to, `[b, m]` booleans; None for all."""
    return None if mask is None else jnp.broadcast_to(mask[:, 0, 0], (k.shape[0], k.shape[2]))


def _on_each_device(
    kernel: Kernel, q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array | None
) -> jax.Array:
    """`kernel(q, k, v, seen)`, on a mesh by each device for its own examples, heads and queries.

    Where an example sees no key, the result is zero.
    """
    mesh = axes.current()
    if mesh is not None and mesh.size > 1:
        queries = _queries(mesh, q)
        heads, rows = axes.spec(("batch", "heads", None, None)), axes.spec(("batch", None))
        kernel = jax.shard_map(
            kernel, mesh=mesh, in_specs=(queries, heads, heads, rows), out_specs=queries,
            check_vma=False,
        )  # fmt: skip
    out = kernel(q, k, v, seen)
    if seen is None:
        return out
    return jnp.where(seen.any(-1)[:, None, None, None], out, jnp.zeros((), out.dtype))


def _queries(mesh: Mesh, q: jax.Array) -> PartitionSpec:
    """Where the mesh splits queries, which are an image's rows of pixels one after the other."""
    return axes.fitting(mesh, q.shape, ("batch", "heads", "height", None))


def _padded(x: jax.Array, size: int, axis: int) -> jax.Array:
    """`x` with zeros, or False, after its end, so that `axis` has this size."""
    widths = [(0, size - x.shape[axis] if i == axis else 0) for i in range(x.ndim)]
    return jnp.pad(x, widths)


def block_length(length: int) -> int:
    """The length of blocks that makes the least work of `length`, padding included.

    For its running maximum and sums, a block is counted as half a row of lanes longer than it is.
    """
    sizes = range(TPU_LANES, TPU_BLOCK + 1, TPU_LANES)
    return min(sizes, key=lambda size: math.ceil(length / size) * (size + TPU_LANES // 2))


def _splash(q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array | None) -> jax.Array:
    """Splash attention of scaled queries, lengths padded to whole blocks; `seen` as in `_seen`."""
    # Pallas takes a second to import, and nothing else here needs it.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    (b, n, length, dim), keys = q.shape, k.shape[2]
    block_q, block_k = block_length(length), block_length(keys)
    rows = math.ceil(length / block_q) * block_q
    blocks = math.ceil(keys / block_k)
    columns = blocks * block_k
    # The backward pass writes a gradient of the queries for each block of keys in memory, and adds
    # them up afterwards. Larger blocks in memory make fewer.
    held = max(i for i in range(1, blocks + 1) if blocks % i == 0 and i * block_k <= TPU_KEYS)
    # Memory pads the last axis to whole lanes: heads of 64 would take twice their size there.
    layout = kernels.QKVLayout.SEQ_MINOR if dim % TPU_LANES else kernels.QKVLayout.HEAD_DIM_MINOR
    sizes = kernels.BlockSizes(
        block_q=block_q, block_kv=held * block_k, block_kv_compute=block_k,
        block_q_dkv=block_q, block_kv_dkv=held * block_k, block_kv_dkv_compute=block_k,
        use_fused_bwd_kernel=True, q_layout=layout, k_layout=layout, v_layout=layout,
    )  # fmt: skip
    kernel = kernels.make_splash_mha(
        masks.MultiHeadMask([masks.FullMask((rows, columns))] * n),
        block_sizes=sizes, head_shards=1, q_seq_shards=1,
    )  # fmt: skip
    ids = ()
    if seen is not None or columns > keys:
        # Queries see the keys of their own segment: those that are there and unmasked.
        own = jnp.ones((b, keys), bool) if seen is None else seen
        segments = _padded(own, columns, 1).astype(jnp.int32)
        ids = (kernels.SegmentIds(jnp.ones((b, rows), jnp.int32), segments),)
    q, k, v = _padded(q, rows, 2), _padded(k, columns, 2), _padded(v, columns, 2)
    return jax.vmap(kernel)(q, k, v, *ids)[:, :, :length]


def _cudnn(
    q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array | None, *, scale: float
) -> jax.Array:
    """cuDNN's attention, whose backward pass wants an even number of keys where there is a mask."""
    b, _, length, _ = q.shape
    keys = k.shape[2]
    if keys % 2:
        own = jnp.ones((b, keys), bool) if seen is None else seen
        k, v, seen = _padded(k, keys + 1, 2), _padded(v, keys + 1, 2), _padded(own, keys + 1, 1)
    mask = None
    if seen is not None:
        mask = jnp.broadcast_to(seen[:, None, None], (b, 1, length, seen.shape[1]))
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    out = jax.nn.dot_product_attention(q, k, v, mask=mask, scale=scale, implementation="cudnn")
    return out.swapaxes(1, 2)

"""Attention: one function for all the networks, and which program computes it.

Attention is heads first, `[b, n, l, k]`. `reference_attention` is a few lines of plain JAX, right
for any sizes on any platform. Where sequences are long, a kernel of the platform takes its place
(`fused_attention`): the same values, but the scores are never written to memory. `implementation`
switches that off.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp

from unclip_jax.common import checks
from unclip_jax.models import fused_attention
from unclip_jax.parallel import axes
from unclip_jax.parallel.axes import constrain

IMPLEMENTATIONS = ("auto", "reference", "fused")

# What jax.jit knows of: a function is traced again where this differs.
_implementation = jax.make_user_context("auto")


@contextlib.contextmanager
def implementation(name: str) -> Iterator[None]:
    """While this is in force, `attention` is computed as `name` says.

    It is no field of a config, since it is no property of a model: a checkpoint samples alike with
    any. Around a whole program it needs no other change:

        with attention.implementation("reference"):
            images = model.generate(captions)

    A program lowered for several platforms at once needs "reference", or a machine without
    kernels: JAX would lower one platform's kernel for all of them, and fail.

    Args:
        name: "auto", the default, takes the kernels of the mesh's devices, or of this machine's
            where there is no mesh. "reference" takes no kernel. "fused" takes kernels for every
            platform that a program may be lowered for: for `jax.export` to TPUs.

    Raises:
        UserError: there is no such implementation.
    """
    checks.choice("attention implementation", name, IMPLEMENTATIONS)
    with _implementation(name):
        yield


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | None = None,
    *,
    bias: jax.Array | None = None,
    scale: float | None = None,
) -> jax.Array:
    """Softmax attention; the softmax is in float32.

    A query whose mask is False everywhere gets zeros, never NaN and never a masked value. Where a
    kernel computes it, only its first derivative in reverse mode is there, and in bfloat16 none in
    forward mode.

    Args:
        q: `[b, n, l, k]` queries.
        k: `[b, n, m, k]` keys.
        v: `[b, n, m, k]` values.
        mask: boolean, of rank 4 and broadcastable to `[b, n, l, m]`; True = attend.
        bias: float32 of rank 4, broadcastable likewise, added to the scaled scores; None for none.
        scale: factor on the products of queries and keys; None stands for 1/sqrt(head dim).

    Returns:
        `[b, n, l, k]` in the dtype of `v`.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    reference = partial(reference_attention, bias=bias, scale=scale)
    kernels = {}
    if bias is None and fused_attention.pays(q, k, v, mask):
        kernels = {
            platform: partial(kernel, scale=scale)
            for platform, kernel in fused_attention.KERNELS.items()
            if _wanted(platform) and fused_attention.fits(platform, q, k)
        }
    if not kernels:
        return reference(q, k, v, mask)
    return jax.lax.platform_dependent(q, k, v, mask, **kernels, default=reference)


def _wanted(platform: str) -> bool:
    """Whether a program traced here and now may run on `platform` and is to have its kernel.

    It is asked before `jax.lax.platform_dependent`, which decides when the program is lowered: that
    alone would trace kernels on machines without any, and JAX lowers what it has traced for every
    platform of an export to several.
    """
    chosen = _implementation.value
    if chosen == "reference":
        return False
    if platform == "cuda":
        return _backend() == "gpu" and fused_attention.has_cudnn(_device())
    return chosen == "fused" or _backend() == platform


def _device() -> jax.Device:
    """The mesh's first device, or where there is no mesh this machine's."""
    mesh = axes.current()
    return jax.local_devices()[0] if mesh is None else mesh.devices.flat[0]


def _backend() -> str:
    """The platform of the mesh's devices, or where there is no mesh of this machine's."""
    return jax.default_backend() if axes.current() is None else _device().platform


def reference_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | None,
    *,
    bias: jax.Array | None,
    scale: float,
) -> jax.Array:
    """`attention` in plain JAX, on any platform and for any sizes.

    The division by the softmax's sum comes after the second product, where there is less to divide.
    """
    scores = _product("bnlk,bnmk->bnlm", q, k) * scale
    if bias is not None:
        scores = scores + bias
    lowest = jnp.finfo(jnp.float32).min
    if mask is not None:
        scores = jnp.where(mask, scores, lowest)
    # A fully masked row peaks at `lowest`; half of it as a floor sends its weights to exactly 0.
    peak = jnp.maximum(jax.lax.stop_gradient(scores).max(-1, keepdims=True), lowest / 2)
    weights = jnp.exp(scores - peak)
    total = weights.sum(-1, keepdims=True)
    mixed = _product("bnlm,bnmk->bnlk", weights.astype(v.dtype), v)
    return (mixed / jnp.where(total > 0, total, 1.0)).astype(v.dtype)


def _product(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """An einsum of two with a float32 result."""
    if a.dtype == b.dtype == jnp.float32:
        return _summed(subscripts, a, b)
    return _narrow_product(subscripts, a, b)


def _summed(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _narrow_product(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """`_product` whose gradients are products of the same narrow dtype.

    JAX would widen both sides of them, since the result's gradient is float32.
    """
    return _summed(subscripts, a, b)


def _narrow_forward(subscripts, a, b):
    return _summed(subscripts, a, b), (a, b)


def _narrow_backward(subscripts, operands, gradient):
    a, b = operands
    left, right, out = subscripts.replace("->", ",").split(",")
    of_a = _summed(f"{out},{right}->{left}", gradient.astype(b.dtype), b)
    of_b = _summed(f"{left},{out}->{right}", a, gradient.astype(a.dtype))
    return of_a.astype(a.dtype), of_b.astype(b.dtype)


_narrow_product.defvjp(_narrow_forward, _narrow_backward)


def split_heads(stacked: jax.Array) -> jax.Array:
    """Several projections side by side, `[b, l, s, n, k]`, heads first: `[s, b, n, l, k]`."""
    return constrain(jnp.moveaxis(stacked, (2, 3), (0, 2)), None, "batch", "heads", None, None)


def caption_mask(text_mask: jax.Array, after: int) -> jax.Array:
    """A mask over keys `[b, 1, 1, l + after]`: captions' own `[b, l]`, then True."""
    return jnp.pad(text_mask, ((0, 0), (0, after)), constant_values=True)[:, None, None, :]


def causal_mask(length: int) -> jax.Array:
    """`[1, 1, length, length]` booleans, True where the key is not after the query."""
    return jnp.tril(jnp.ones((length, length), bool))[None, None]

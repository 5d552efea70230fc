"""The few layers all the networks are made of.

Norms run in float32 whatever the compute dtype; parameters are always float32. A deep Transformer
is one block scanned over a leading layer axis, so its compile time does not grow with its depth.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from unclip_jax.common import checks
from unclip_jax.errors import wrong
from unclip_jax.models.attention import attention, split_heads
from unclip_jax.parallel.axes import constrain

DTYPES = ("float32", "bfloat16")
REMAT_POLICIES = ("none", "full", "dots")
ACTIVATIONS = {
    "gelu": partial(jax.nn.gelu, approximate=False),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}
NORM_EPS = 1e-5

# Keys and values, each `[b, n, m, k]`; of a scanned stack, with a leading layer axis.
Cache = tuple[jax.Array, jax.Array]


# ---------------------------------------------------------------- what a config must satisfy


def check(config: Any, field: str, ok: bool, expected: str) -> None:
    """Raise a `UserError` naming `config.field` and its value unless `ok`."""
    if not ok:
        raise wrong(f"{type(config).__name__}.{field}", getattr(config, field), expected)


def check_counts(config: Any, *fields: str, least: int = 1) -> None:
    """Every named field of `config` must be an integer of at least `least`."""
    for field in fields:
        checks.count(f"{type(config).__name__}.{field}", getattr(config, field), least)


def check_heads(config: Any, width: str, heads: str) -> None:
    """The field named by `width` must be a multiple of the field named by `heads`."""
    n = getattr(config, heads)
    check(config, width, getattr(config, width) % n == 0, f"a multiple of {heads} = {n}")


def check_hidden(config: Any, ratio: str, features: int) -> None:
    """The field named by `ratio` must leave a perceptron inner features; it leaves so many."""
    check(config, ratio, features > 0, "more, for a perceptron of one hidden feature at least")


def check_compute(config: Any) -> None:
    """The fields `dtype` and `remat` must name a compute dtype and a remat policy."""
    for field, choices in (("dtype", DTYPES), ("remat", REMAT_POLICIES)):
        checks.choice(f"{type(config).__name__}.{field}", getattr(config, field), choices)


def as_tuple(config: Any, field: str) -> None:
    """Turn a list read from a file into the tuple that a hashable config needs."""
    value = getattr(config, field)
    check(config, field, isinstance(value, list | tuple), "a sequence")
    object.__setattr__(config, field, tuple(value))


# ---------------------------------------------------------------- recomputation in the backward


def _is_product(primitive: Any, *_: Any, **params: Any) -> bool:
    """Whether a primitive is a weight's product: a convolution, or a matmul with no batch dims."""
    if primitive is jax.lax.conv_general_dilated_p:
        return True
    if primitive is jax.lax.dot_general_p:
        _, (batch_dims, _) = params["dimension_numbers"]
        return not batch_dims
    return False


def remat(module: type[nn.Module], policy: str, *, scanned: bool = False) -> type[nn.Module]:
    """`module`, recomputed in the backward pass as `policy` says.

    Args:
        module: a Linen module class whose `__call__` takes positional arrays.
        policy: "none" keeps every activation; "full" keeps only the module's input; "dots" also
            keeps the results of matrix products and convolutions with weights.
        scanned: whether the module is the body of a scan, whose backward loop is apart from its
            forward loop. Elsewhere the compiler must be kept from merging the two computations.

    Returns:
        A module class with the same parameters and results.
    """
    if policy == "none":
        return module
    keep = _is_product if policy == "dots" else None
    return nn.remat(module, prevent_cse=not scanned, policy=keep)


def scanned(block: type[nn.Module], layers: int, remat_policy: str, in_axes: Any) -> Any:
    """`nn.scan` of so many blocks, each `remat`: every param has a layer axis first."""
    return nn.scan(
        remat(block, remat_policy, scanned=True),
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=in_axes,
        length=layers,
    )


# ---------------------------------------------------------------- time


def timestep_embedding(t: jax.Array, dim: int) -> jax.Array:
    """Timesteps `[b]` to sinusoids `[b, dim]` float32, with an even `dim`.

    They are `[cos, sin]` at the frequencies exp(-ln 10000 * i / (dim / 2)).
    """
    if dim % 2:
        raise wrong("timestep_embedding's dim", dim, "an even number")
    half = dim // 2
    freqs = jnp.exp(-math.log(10000.0) / half * jnp.arange(half, dtype=jnp.float32))
    angles = t.astype(jnp.float32)[:, None] * freqs[None, :]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class TimeEmbedding(nn.Module):
    """Sinusoids of `dim` features, then Linear, SiLU, Linear of `features`; all in float32."""

    dim: int
    features: int

    @nn.compact
    def __call__(self, t: jax.Array) -> jax.Array:
        """`[b]` timesteps to `[b, features]`."""
        h = nn.Dense(self.features, name="linear_1")(timestep_embedding(t, self.dim))
        return nn.Dense(self.features, name="linear_2")(nn.silu(h))


# ---------------------------------------------------------------- norms


def layer_norm(name: str) -> nn.LayerNorm:
    """A float32 LayerNorm over the last axis, eps 1e-5, its variance taken about the mean."""
    return nn.LayerNorm(epsilon=NORM_EPS, dtype=jnp.float32, use_fast_variance=False, name=name)


class GroupNorm(nn.Module):
    """GroupNorm of images in float32, its variance taken about the mean.

    Channels are averaged over their group, and groups handed back to their channels, by products
    with a small matrix, after pixels are reduced. The images are never reshaped, and in what XLA
    computes pixel by pixel each channel has its own mean and gain.
    """

    groups: int
    eps: float = NORM_EPS

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[b, h, w, c]` of any float dtype to the same shape in float32."""
        mean, gain, bias = self.measure(x)
        return (x.astype(jnp.float32) - mean) * gain + bias

    @nn.compact
    def measure(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """What the norm does to `x`: its mean, gain and bias, the result (x - mean) * gain + bias.

        Each is float32 `[b or 1, 1, 1, c]`. They serve parts of `x`, too.
        """
        b, _, _, c = x.shape
        scale = self.param("scale", nn.initializers.ones, (c,))
        bias = self.param("bias", nn.initializers.zeros, (c,))
        member = jnp.repeat(jnp.eye(self.groups), c // self.groups, axis=0)  # [c, groups]
        dot = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)

        def group_mean(y: jax.Array) -> jax.Array:
            per_group = dot(y.mean((1, 2)), member) / (c // self.groups)
            return dot(per_group, member.T).reshape(b, 1, 1, c)

        x = x.astype(jnp.float32)
        mean = group_mean(x)
        gain = jax.lax.rsqrt(group_mean((x - mean) ** 2) + self.eps)
        return mean, gain * scale.reshape(1, 1, 1, c), bias.reshape(1, 1, 1, c)


# ---------------------------------------------------------------- tokens


class Embed(nn.Module):
    """A table of token embeddings, which start with a standard deviation of 0.02.

    On a mesh the table stays split by its features. Each device looks up its part of the features
    for all examples of its copy of the model, and they exchange what they found; the gradient goes
    the same way back. So no device ever holds the table whole, or its gradient.
    """

    rows: int
    features: int

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """`[b, l]` int tokens to `[b, l, features]` float32."""
        init = nn.initializers.normal(0.02)
        table = self.param("embedding", init, (self.rows, self.features))
        table, tokens = constrain(table, "vocab", "embed"), constrain(tokens, "copy", None)
        found = jnp.take(table, tokens, axis=0)
        return constrain(constrain(found, "copy", None, "embed"), "batch", None, None)


# ---------------------------------------------------------------- Transformer


class TransformerBlock(nn.Module):
    """Pre-LayerNorm residual block: self-attention, then a two-layer perceptron.

    Attributes:
        heads: attention heads; they divide the width.
        depth: blocks in the whole stack; the projections into the residual stream start
            1/sqrt(2 * depth) as large, so that the stream's variance does not grow with depth.
        mlp_ratio: hidden width of the perceptron over the width.
        activation: a name in `ACTIVATIONS`.
        dtype: compute dtype.
        caches: whether the keys and values of x come out, too.
    """

    heads: int
    depth: int
    mlp_ratio: float = 4.0
    activation: str = "gelu"
    dtype: str = "float32"
    caches: bool = False

    @nn.compact
    def __call__(
        self, x: jax.Array, mask: jax.Array | None, past: Cache | None = None
    ) -> tuple[jax.Array, Cache | None]:
        """Attend to what came before and to x itself.

        Args:
            x: `[b, l, d]`.
            mask: boolean, broadcastable to `[b, n, l, m + l]`, or None; the past comes first.
            past: keys and values of what came before x, each `[b, n, m, k]`; None for nothing.

        Returns:
            The pair that `nn.scan` wants: `[b, l, d]`, and the keys and values of x alone, or None.
        """
        x = constrain(x, "batch", None, None)
        width, scale = x.shape[-1], 0.5 / self.depth
        into_stream = nn.initializers.variance_scaling(scale, "fan_in", "truncated_normal")
        dense = partial(nn.DenseGeneral, dtype=self.dtype)
        h = layer_norm("norm_1")(x).astype(self.dtype)
        q, k, v = split_heads(dense((3, self.heads, width // self.heads), name="qkv")(h))
        own = (k, v) if self.caches else None
        if past is not None:
            k, v = (jnp.concatenate(pair, axis=2) for pair in zip(past, (k, v), strict=True))
        h = jnp.moveaxis(attention(q, k, v, mask), 1, 2)
        x = x + dense(width, axis=(-2, -1), kernel_init=into_stream, name="out")(h)
        h = layer_norm("norm_2")(x).astype(self.dtype)
        h = ACTIVATIONS[self.activation](dense(int(width * self.mlp_ratio), name="up")(h))
        h = constrain(h, "batch", None, "mlp")
        x = x + dense(width, kernel_init=into_stream, name="down")(h)
        return constrain(x, "batch", None, None), own


def transformer_blocks(layers: int, remat_policy: str, **settings: Any) -> nn.Module:
    """`scanned` `TransformerBlock`s, which are called like one; `settings` are all but the depth.

    `past` and the cache that comes out have a layer axis first, too.
    """
    blocks = scanned(TransformerBlock, layers, remat_policy, (nn.broadcast, 0))
    return blocks(depth=layers, **settings)


class Transformer(nn.Module):
    """`transformer_blocks` as a module of its own: what they are given are its fields.

    The residual stream is in `dtype`, too.
    """

    layers: int
    heads: int
    mlp_ratio: float = 4.0
    activation: str = "gelu"
    dtype: str = "float32"
    remat: str = "none"
    caches: bool = False

    def setup(self) -> None:
        """Name the blocks."""
        block = {"heads": self.heads, "mlp_ratio": self.mlp_ratio, "activation": self.activation}
        block |= {"dtype": self.dtype, "caches": self.caches}
        self.blocks = transformer_blocks(self.layers, self.remat, **block)

    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """`[b, l, d]` to `[b, l, d]` in `dtype`; `mask` as in `attention`."""
        return self.extend(x, mask)[0]

    def extend(
        self, x: jax.Array, mask: jax.Array | None, past: Cache | None = None
    ) -> tuple[jax.Array, Cache | None]:
        """Likewise, with what came before x, and the keys and values of x; as for one block."""
        return self.blocks(x.astype(self.dtype), mask, past)

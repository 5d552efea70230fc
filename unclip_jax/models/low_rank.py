"""Layers with low-rank adapters beside their kernels (LoRA, arXiv 2106.09685)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from unclip_jax.models.convolution import Conv

A, B = "lora_a", "lora_b"  # params beside a layer's "kernel": [in, rank] and [rank, out]


def apply(network: nn.Module, params: Mapping[str, Any], *inputs: Any, **named: Any) -> Any:
    """`network.apply`, for params in which some kernels have adapters beside them, or none.

    A layer h = W x then gives W x + B A x (equation 3), added in float32 and rounded once to the
    layer's dtype. The sum of W and B A is never made: in bfloat16 it would lose whatever is below
    the last bit of W.
    """
    with nn.intercept_methods(_add_low_rank):
        return network.apply({"params": params}, *inputs, **named)


def _add_low_rank(
    method: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext
) -> Any:
    layer = context.module
    known = isinstance(layer, nn.Dense | nn.DenseGeneral | nn.Conv | Conv)
    if context.method_name != "__call__" or not known or not layer.has_variable("params", A):
        return method(*args, **kwargs)
    kernel, a, b = (layer.get_variable("params", name) for name in ("kernel", A, B))
    axes = getattr(layer, "axis", -1)
    inputs = 3 if isinstance(layer, nn.Conv | Conv) else 1 if isinstance(axes, int) else len(axes)
    down = _through(layer, args[0], a.reshape(*kernel.shape[:inputs], -1), inputs)
    change = jnp.tensordot(down, b.reshape(-1, *kernel.shape[inputs:]), 1)
    if jnp.dtype(layer.dtype or jnp.float32) == jnp.float32:
        return method(*args, **kwargs) + change
    y = _through(layer, args[0], kernel, inputs) + change
    if layer.has_variable("params", "bias"):
        bias = layer.get_variable("params", "bias").astype(jnp.float32)
        y = y + jnp.broadcast_to(bias, y.shape)
    return y.astype(layer.dtype)


def _through(layer: nn.Module, x: jax.Array, kernel: jax.Array, inputs: int) -> jax.Array:
    """What the layer makes of x with a kernel of so many input axes, float32 and without bias."""
    dtype = layer.dtype or jnp.float32
    x, kernel = x.astype(dtype), kernel.astype(dtype)
    if isinstance(layer, nn.Conv | Conv):
        x, kernel = x.astype(jnp.float32), kernel.astype(jnp.float32)
    if isinstance(layer, Conv):
        return layer.convolve(x, kernel)
    if isinstance(layer, nn.Conv):
        strides, dims = layer.strides or (1, 1), ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, kernel, strides, layer.padding, dimension_numbers=dims
        )
    return jnp.tensordot(x, kernel, inputs, preferred_element_type=jnp.float32)

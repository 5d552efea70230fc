"""Layers with low-rank adapters beside their kernels (LoRA, arXiv 2106.09685)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from unclip_jax.common.params import Params, flatten, unflatten
from unclip_jax.models.convolution import Conv
from unclip_jax.parallel import axes

A, B = "lora_a", "lora_b"  # params beside a layer's "kernel": [in, rank] and [rank, out]


def matrix_shape(
    name: str, shape: tuple[int, ...], convolutions: bool = False
) -> tuple[int, ...] | None:
    """A kernel's shape as a matrix: [in, out], or [layers, in, out] where layers are stacked.

    Projections made as one, such as queries, keys and values, are one matrix: they share their A.

    Args:
        name: of the param, its path joined by "/".
        shape: of the param.
        convolutions: whether a convolution's kernel counts.

    Returns:
        None where the param is not adapted: biases, norms, embeddings, positions.

    Raises:
        UserError: no row of `axes.PARAM_AXES` is for it.
    """
    names, inputs, outputs = axes.of_param(tuple(name.split("/")), len(shape))
    if not outputs or ("window" in names and not convolutions):
        return None
    size = lambda part: math.prod(shape[axis] for axis in part)  # noqa: E731
    return (*shape[: inputs[0]], size(inputs), size(outputs))


def merged(network: Params, adapters: Params, scale: float = 1.0) -> Params:
    """The network with its adapters added: kernel + scale * A B, float32 whatever the kernel is.

    So nothing of the product is rounded away. With B at zero it has the network's values.
    """
    flat = flatten(adapters)

    def changed(name: str, value: jax.Array) -> jax.Array:
        where = name.removesuffix("kernel")
        if where + A not in flat:
            return value
        a, b = flat[where + A], flat[where + B]
        product = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
        return value.astype(jnp.float32) + scale * product.reshape(value.shape)

    return unflatten({name: changed(name, value) for name, value in flatten(network).items()})


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

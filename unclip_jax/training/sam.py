"""Sharpness-aware minimisation (SAM, Foret et al. 2021), with which the paper trains CLIP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from unclip_jax.common.params import Params


def gradient(
    gradients: Callable[[Params], tuple[Any, Any, Params]],
    params: Params,
    grads: Params,
    rho: float,
) -> Params:
    """The gradient where the loss is about highest within `rho` of the params.

    It is taken at params + rho g / |g| (arXiv 2010.01412, equations 2 and 3), with the same
    examples and noise. |g| is over the whole batch and all that is trained. Where g is zero, the
    gradient is taken at the params.

    Args:
        gradients: params to (loss, metrics, gradient).
        params: where the step began.
        grads: g, the gradient there.
        rho: the radius; the paper's is 0.1.
    """
    norm = optax.tree.norm(grads)
    scale = rho / jnp.where(norm > 0, norm, 1.0)
    climbed = jax.tree.map(lambda p, g: (p + scale * g).astype(p.dtype), params, grads)
    return gradients(climbed)[2]

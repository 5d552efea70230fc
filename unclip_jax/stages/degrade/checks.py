"""What every corruption demands of its images."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from unclip_jax.errors import UserError


def check_images(images: jax.Array) -> None:
    """Raise `UserError` unless `images` is floating point `[b, h, w, c]` with a pixel in it."""
    floating = jnp.issubdtype(images.dtype, jnp.floating)
    if images.ndim != 4 or not floating or 0 in images.shape[1:]:
        raise UserError(
            f"images of shape {images.shape} and dtype {images.dtype}: expected floating point "
            "[b, h, w, c]"
        )


def check_rgb(images: jax.Array) -> None:
    """Raise `UserError` unless `images` is floating point `[b, h, w, 3]`."""
    check_images(images)
    if images.shape[-1] != 3:
        raise UserError(f"images of shape {images.shape}: expected 3 channels, red green blue")


def check_one_per_image(name: str, values: jax.Array, images: jax.Array) -> None:
    """Raise `UserError` unless `values` is `[b]` for images `[b, ...]`."""
    if values.shape != images.shape[:1]:
        raise UserError(
            f"{name} of shape {values.shape}: expected one per image {images.shape[:1]}"
        )

"""Diffusion of pictures, or of what an autoencoder makes of them; and the sizes of both.

What goes in and what comes out are pixels, whichever it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp

from unclip_jax.common import checks
from unclip_jax.errors import wrong
from unclip_jax.models.movq import MoVQ
from unclip_jax.parallel.axes import checked
from unclip_jax.stages.conditioning import Params
from unclip_jax.stages.guided import GuidedDiffusion
from unclip_jax.stages.pixels import check_channels

# Latents of a picture that are decoded at once; more are taken in bands of rows.
LATENTS_AT_ONCE = 96 * 96


class OfPictures(GuidedDiffusion):
    """A guided diffusion of arrays of pixels or latents.

    It has the fields `autoencoder`, `canvas` and `sides`; the decoder says what they are. Its
    model has `unet` and `x_channels`.
    """

    def check_pictures(self) -> None:
        """Raise UserError where channels or sides do not fit; the sides become a tuple."""
        latents = self.autoencoder.latent_channels if self.autoencoder else 0
        if self.model.x_channels != (latents or 3):
            of = "the autoencoder's latents" if latents else "pixels"
            raise wrong("stage.model.x_channels", self.model.x_channels, f"{latents or 3}, of {of}")
        given = self.model.unet.out_channels, self.diffusion, "stage.model.unet"
        check_channels(*given, self.model.x_channels, spare=bool(latents))
        object.__setattr__(self, "sides", self._checked(self.sides, "stage.sides"))

    @property
    def size_multiple(self) -> int:
        """What the sides of its pictures are multiples of."""
        return (self.unet.size_multiple if self.unet else 1) * self._pixels_a_latent

    @property
    def _pixels_a_latent(self) -> int:
        return self.autoencoder.factor if self.autoencoder else 1

    @property
    def picture_size(self) -> tuple[int, int]:
        """Height and width of its pictures."""
        side = self.model.unet.image_size * self._pixels_a_latent
        return self.sides or (side, side)

    @property
    def image_size(self) -> int:
        """The longer side of its pictures."""
        return max(self.picture_size)

    @property
    def feature_rows(self) -> int:
        """Rows of the U-Net's first feature map; 0 where there is none."""
        if self.unet is None:
            return 0
        return self.picture_size[0] // self._pixels_a_latent // self.model.unet.patch

    @property
    def x_shape(self) -> tuple[int, ...]:
        """The shape of one x_t."""
        height, width = (side // self._pixels_a_latent for side in self.picture_size)
        return height, width, self.model.x_channels

    def of_size(self, size: int | Sequence[int], field: str = "size") -> Self:
        """The stage that draws pictures of another size: a side, or height and width.

        Raises:
            UserError: the network has one size alone, or it is no multiple of `size_multiple`.
        """
        sides = size if isinstance(size, list | tuple) else (size, size)
        return dataclasses.replace(self, sides=self._checked(sides, field))

    def _checked(self, size: Sequence[int], field: str) -> tuple[int, ...]:
        """Height and width, or () for the U-Net's own; `field` is what the user knows them by."""
        if not size:
            return ()
        if len(size) != 2:
            raise wrong(field, size, "height and width")
        height, width = size = tuple(checks.count(field, side) for side in size)
        unet, multiple = self.unet, self.size_multiple
        free = unet is not None and (unet.any_size or not unet.attention_sizes)
        if self.canvas or not free:
            side = self.model.unet.image_size * self._pixels_a_latent
            if size != (side, side):
                expected = f"{side} x {side}, the one size of this decoder"
                raise wrong(field, f"{height} x {width}", expected)
        if height % multiple or width % multiple:
            near = (max(multiple, round(side / multiple) * multiple) for side in size)
            do = "give {} x {}".format(*near)
            raise wrong(field, f"{height} x {width}", f"multiples of {multiple} px", do)
        return size

    def check_untrained(self) -> None:
        """Raise UserError unless it can be trained from random params."""
        super().check_untrained()
        if self.autoencoder:
            expected = "none without config.init: it is never trained here, only taken over"
            raise wrong("config.stage.autoencoder", self.autoencoder, expected)

    def data_power(self, normalised: str | None) -> float | None:
        """1 for pixels, which lie in [-1, 1]; None for latents."""
        return None if self.autoencoder else super().data_power(normalised)

    def fresh_autoencoder(self, key: jax.Array) -> Params:
        """Random params of the autoencoder."""
        picture = jnp.zeros((1, *[self._pixels_a_latent] * 2, 3))
        return {"network": checked(MoVQ(self.autoencoder).init(key, picture)["params"])}

    def x_0_of(self, params: Params, images: jax.Array) -> jax.Array:
        """Pictures [b, h, w, 3] in [-1, 1], or their latents where there is an autoencoder."""
        if self.autoencoder is None:
            return images
        own = {"params": params["autoencoder"]["network"]}
        return MoVQ(self.autoencoder).apply(own, images, method="encode")

    def images_of(self, params: Params, x_0: jax.Array) -> jax.Array:
        """The pictures [b, h, w, 3], about in [-1, 1], of x_0: itself, or decoded latents.

        Large ones are decoded in bands of rows, which changes the memory and not the picture.
        """
        if self.autoencoder is None:
            return x_0
        rows, columns = x_0.shape[1:3]
        fits = (n for n in range(1, rows + 1) if rows % n == 0)
        bands = next(n for n in fits if rows // n * columns <= LATENTS_AT_ONCE or n == rows)
        own = {"params": params["autoencoder"]["network"]}
        return MoVQ(self.autoencoder, bands).apply(own, x_0, method="decode")

    def denoise(self, params: Params, x_t: jax.Array, *rest: Any, **named: Any) -> jax.Array:
        """The network's output for x_t; a fixed variance has no use for variance channels."""
        output = super().denoise(params, x_t, *rest, **named)
        return output if self.diffusion.learned_variance else output[..., : x_t.shape[-1]]

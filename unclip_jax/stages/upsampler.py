"""An upsampler as a stage: p(x_high | x_low), section 2.1 of the paper.

An ADM U-Net of convolutions only, without caption or guidance. It trains on random crops of a
quarter of the side and runs at full size. In training the low-resolution image is corrupted
slightly, so that at sampling time the decoder's own flaws are nothing new.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from unclip_jax import degrade, samplers
from unclip_jax import diffusion as dm
from unclip_jax.errors import UserError
from unclip_jax.losses import losses
from unclip_jax.models.unet import UNet, UNetConfig
from unclip_jax.stages.conditioning import Params, initial_noise, random_timesteps
from unclip_jax.stages.decoder import check_channels
from unclip_jax.stages.images import resize, to_float


@dataclasses.dataclass(frozen=True)
class UpsamplerStage:
    """One upsampler: network, diffusion and sampling settings together.

    Attributes:
        model: the U-Net; its image_size is the size it makes, its in_channels are 6.
        low_size: side of the image it starts from.
        diffusion: schedule, prediction, variance and loss.
        sampling: method, number of steps and clipping.
        crop: training crop's side as a fraction of image_size.
        blur_probability: how often training blurs the low-resolution image.
        blur_sigma: range of the blur's standard deviation, in low-resolution pixels.
    """

    kind: ClassVar[str] = "upsampler"

    model: UNetConfig
    low_size: int
    diffusion: dm.Diffusion = dm.Diffusion()
    sampling: samplers.Sampling = samplers.Sampling(method="ddim", spacing="27", clip_x_0=1.0)
    crop: float = 0.25
    blur_probability: float = 0.5
    blur_sigma: tuple[float, float] = (0.4, 0.6)

    def __post_init__(self) -> None:
        """Check the fields that no part checks alone."""
        size = self.model.image_size
        if self.model.in_channels != 6:
            raise UserError(
                f"stage.model.in_channels: got {self.model.in_channels}, expected 6"
                " (the noisy image and the upsampled low-resolution one)"
            )
        check_channels(self.model.out_channels, self.diffusion, "stage.model")
        if self.low_size < 1 or size % self.low_size:
            raise UserError(
                f"stage.low_size: got {self.low_size}, expected a divisor of"
                f" stage.model.image_size = {size}"
            )
        if not 0.0 < self.crop <= 1.0 or (self.crop * size) % 1:
            raise UserError(
                f"stage.crop: got {self.crop}, expected a fraction in (0, 1] that gives a whole"
                f" number of the {size} pixels"
            )

    @property
    def network(self) -> UNet:
        """The Linen module."""
        return UNet(self.model)

    @property
    def image_size(self) -> int:
        """Side, in pixels, of the images this stage makes."""
        return self.model.image_size

    def init(self, key: jax.Array) -> Params:
        """Random params."""
        side = int(self.crop * self.image_size)
        images = jnp.zeros((1, side, side, 6))
        return {"network": self.network.init(key, images, jnp.zeros((1,), jnp.int32))["params"]}

    def denoise(
        self,
        params: Params,
        x_t: jax.Array,
        t: jax.Array,
        low: jax.Array,
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        """The network's output for x_t [b, h, w, 3] beside `low`, already upsampled to its size."""
        return self.network.apply(
            {"params": params["network"]},
            jnp.concatenate([x_t, low.astype(x_t.dtype)], axis=-1),
            t,
            deterministic=dropout_key is None,
            rngs={} if dropout_key is None else {"dropout": dropout_key},
        )

    def low_resolution(self, key: jax.Array, images: jax.Array) -> jax.Array:
        """Images [b, h, w, 3] made small, corrupted, and upsampled back to their size."""
        low = resize(images, self.low_size)
        low = degrade.random_gaussian_blur(
            jax.random.split(key, len(images)), low, self.blur_sigma, self.blur_probability
        )
        return resize(low, self.image_size)

    def loss(
        self, params: Params, batch: dict[str, jax.Array], key: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Loss of a batch {"image": uint8 [b, h, w, 3]} of full-size images, on random crops."""
        t_key, noise_key, blur_key, crop_key, dropout_key = jax.random.split(key, 5)
        images = to_float(batch["image"])
        pair = jnp.concatenate([images, self.low_resolution(blur_key, images)], axis=-1)
        crops = random_crops(crop_key, pair, int(self.crop * self.image_size))
        x_0, low = crops[..., :3], crops[..., 3:]
        terms = losses(
            self.diffusion,
            lambda x_t, t: self.denoise(params, x_t, t, low, dropout_key),
            x_0,
            random_timesteps(t_key, len(x_0), self.diffusion.steps),
            jax.random.normal(noise_key, x_0.shape),
        )
        metrics = {name: jnp.mean(value) for name, value in terms.items() if name != "loss"}
        return jnp.mean(terms["loss"]), metrics

    def sample(
        self,
        params: Params,
        keys: jax.Array,
        low: jax.Array,
        *,
        eta: float | jax.Array = 0.0,
        progress: samplers.Progress | None = None,
    ) -> jax.Array:
        """Images [b, size, size, 3] from low-resolution ones [b, low_size, low_size, 3].

        Args:
            params: as `init` made them.
            keys: one typed key per example [b].
            low: images in [-1, 1]; values outside are clipped.
            eta: DDIM's noise, for sampling.method "ddim".
            progress: called as progress(step, steps) while sampling.

        Raises:
            UserError: `low` has another size than low_size.
        """
        if low.shape[1:] != (self.low_size, self.low_size, 3):
            raise UserError(
                f"low-resolution images: got {low.shape[1:]}, expected"
                f" {(self.low_size, self.low_size, 3)}; resize them first"
            )
        size = self.image_size
        low = resize(jnp.clip(low, -1.0, 1.0), size)
        x_T, keys = initial_noise(keys, (size, size, 3))
        return samplers.sample(
            lambda x_t, t: self.denoise(params, x_t, t, low),
            x_T,
            keys,
            self.diffusion,
            self.sampling,
            eta=eta,
            progress=progress,
        )


def random_crops(key: jax.Array, images: jax.Array, side: int) -> jax.Array:
    """One random square crop of each image: [b, h, w, c] -> [b, side, side, c]."""
    b, h, w, c = images.shape
    row_key, column_key = jax.random.split(key)
    rows = jax.random.randint(row_key, (b,), 0, h - side + 1)
    columns = jax.random.randint(column_key, (b,), 0, w - side + 1)

    def crop(image: jax.Array, row: jax.Array, column: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(image, (row, column, 0), (side, side, c))

    return jax.vmap(crop)(images, rows, columns)

"""An upsampler as a stage: p(x_high | x_low), section 2.1 of the paper.

An ADM U-Net of convolutions only, without caption or guidance. It trains on random crops of a
quarter of the side and runs at full size. In training the low-resolution image is corrupted
slightly, so that at sampling time the decoder's own flaws are nothing new.

Noise-conditioning augmentation (cascaded diffusion, arXiv 2106.15282, section 4.2; Imagen) does so
in another way, alone or on top: the low-resolution image z is noised to a random level s in
training, z_s ~ q(z_s | z), and the network is told s. Sampling noises the finished image before it,
the paper's non-truncated form, to one level of the user's choice: more noise hides more flaws, and
more of the picture.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.common import checks
from unclip_jax.diffusion import gaussian, samplers
from unclip_jax.diffusion.progress import Loop, whole
from unclip_jax.errors import UserError, wrong
from unclip_jax.models.unet import UNet, UNetConfig
from unclip_jax.stages import degrade
from unclip_jax.stages.base import (
    Batch,
    Loss,
    Setting,
    Stage,
)
from unclip_jax.stages.conditioning import Field, Params, initial_noise
from unclip_jax.stages.denoising import Denoising, denoising_loss, dropout
from unclip_jax.stages.pixels import check_channels, resize, to_float

CORRUPTIONS = ("none", "gaussian", "bsr")


@dataclasses.dataclass(frozen=True)
class UpsamplerStage(Stage):
    """One upsampler: network, diffusion and sampling settings together.

    Attributes:
        model: the U-Net; its image_size is the size it makes, its in_channels are 6.
        low_size: side of the image it starts from.
        diffusion: schedule, prediction, variance and loss.
        sampling: method, number of steps and clipping.
        crop: training crop's side as a fraction of image_size.
        corruption: of the low-resolution image in training: "none", "gaussian" (blur) or "bsr",
            which is costly enough to be done to the crop alone.
        blur_probability: how often "gaussian" blurs the low-resolution image.
        blur_sigma: range of the blur's standard deviation, in low-resolution pixels.
        bsr: ranges of the "bsr" degradation.
        noise_max: the highest level of noise-conditioning augmentation in training, as a fraction
            of the diffusion's steps; 0 for no such noise, and no params for its level.
        noise_level: the level that sampling uses unless told otherwise, at most noise_max.
        last_steps: how many steps at the end of sampling a second network does, `last_network` in
            the params (Karlo: one). Training leaves that network as it is: Karlo's was trained
            adversarially, not as a denoiser.
    """

    kind: ClassVar[str] = "upsampler"
    module: ClassVar[type] = UNet
    figures: ClassVar[tuple[str, ...]] = ("heldout_loss", "psnr")
    preview: ClassVar[str] = "upsampled"
    makes: ClassVar[tuple[str, str]] = ("images", "RGB in [-1, 1]")

    model: UNetConfig
    low_size: int
    diffusion: gaussian.Diffusion = gaussian.Diffusion()
    sampling: samplers.Sampling = samplers.Sampling(method="ddim", spacing="27", clip_x_0=1.0)
    crop: float = 0.25
    corruption: str = "gaussian"
    blur_probability: float = 0.5
    blur_sigma: tuple[float, float] = (0.4, 0.6)
    bsr: degrade.BSR = dataclasses.field(default_factory=degrade.BSR)
    noise_max: float = 0.0
    noise_level: float = 0.0
    last_steps: int = 0

    def __post_init__(self) -> None:
        """Check the fields that no part checks alone."""
        size = self.model.image_size
        if self.model.in_channels != 6:
            expected = "6 (the noisy image and the upsampled low-resolution one)"
            raise wrong("stage.model.in_channels", self.model.in_channels, expected)
        check_channels(self.model.out_channels, self.diffusion, "stage.model")
        if self.low_size < 1 or size % self.low_size:
            expected = f"a divisor of stage.model.image_size = {size}"
            raise wrong("stage.low_size", self.low_size, expected)
        if not 0.0 < self.crop <= 1.0 or (self.crop * size) % 1:
            expected = f"a fraction in (0, 1] that gives a whole number of the {size} pixels"
            raise wrong("stage.crop", self.crop, expected)
        checks.choice("stage.corruption", self.corruption, CORRUPTIONS)
        if self.corruption == "bsr" and self.crop_size * self.low_size % size:
            raise UserError(
                f"stage.crop: got {self.crop}, a crop of {self.crop_size} pixels; for"
                f' corruption="bsr" expected a multiple of {size // self.low_size}, so that it has'
                " a whole number of low-resolution pixels"
            )
        steps = self.diffusion.process(self.sampling.spacing).steps
        if not 0 <= self.last_steps <= steps:
            spacing = f"stage.sampling.spacing={self.sampling.spacing!r}"
            raise wrong("stage.last_steps", self.last_steps, f"0 to the {steps} steps of {spacing}")
        checks.number("stage.noise_max", self.noise_max, least=0, most=1)
        self._check_level(self.noise_level, "stage.noise_level")

    def _check_level(self, level: float, name: str) -> None:
        if not 0.0 <= level <= self.noise_max:
            expected = f"0 to stage.noise_max = {self.noise_max}, the highest in training"
            raise wrong(name, level, expected)

    @property
    def conditions(self) -> dict[str, Field]:
        """The images to enlarge."""
        return {"images": Field((self.low_size, self.low_size, 3), "float32", "RGB in [-1, 1]")}

    def condition_of(self, batch: Batch, mask: None = None) -> jax.Array:
        """The images to enlarge, [b, low_size, low_size, 3]."""
        return batch["images"]

    def batch_spec(self, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Full-size images alone: training makes the small ones of them."""
        return {"image": super().batch_spec(rows)["image"]}

    @property
    def settings(self) -> dict[str, Setting]:
        """The level of noise-conditioning augmentation, where training knew it."""
        if not self.noise_max:
            return {}
        meaning = f"of the noise-conditioning augmentation, 0 to {self.noise_max}"
        return {"noise_level": Setting(self.noise_level, meaning)}

    @property
    def crop_size(self) -> int:
        """Side, in pixels, of the crops that training sees."""
        return int(self.crop * self.image_size)

    def init(self, key: jax.Array) -> Params:
        """Random params."""
        images = jnp.zeros((1, self.crop_size, self.crop_size, 6))
        t = jnp.zeros((1,), jnp.int32)
        level = t if self.noise_max else None
        params = {"network": self.fresh(key, images, t, level=level)}
        if self.last_steps:
            last_key = jax.random.fold_in(key, 1)
            params["last_network"] = self.fresh(last_key, images, t, level=level)
        return params

    def denoise(
        self,
        params: Params,
        x_t: jax.Array,
        t: jax.Array,
        low: jax.Array,
        level: jax.Array | None = None,
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        """The network's output for x_t [b, h, w, 3] beside `low`, already upsampled to its size.

        `level` [b] is the timestep that `low` was noised to, where noise_max is above 0.
        """
        return self.apply(
            params,
            jnp.concatenate([x_t, low.astype(x_t.dtype)], axis=-1),
            t,
            level=level,
            **dropout(dropout_key),
        )

    def corrupt(self, key: jax.Array, images: jax.Array) -> jax.Array:
        """Images [b, h, h, 3] made as small as low_size is to image_size, and corrupted."""
        keys = jax.random.split(key, len(images))
        side = images.shape[1] * self.low_size // self.image_size
        if self.corruption == "bsr":
            return degrade.bsr(keys, images, side, self.bsr)
        low = resize(images, side)
        if self.corruption == "gaussian":
            low = degrade.random_gaussian_blur(keys, low, self.blur_sigma, self.blur_probability)
        return low

    def pairs(
        self, corrupt_key: jax.Array, crop_key: jax.Array, images: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """Random crops of full-size images, and the low-resolution image beside them.

        Returns:
            x_0 and the corrupted image upsampled, [b, crop, crop, 3] both, and the timestep that
            it was noised to, int32 [b], or None without noise_max.
        """
        crop_first = self.corruption == "bsr"
        if crop_first:
            images = random_crops(crop_key, images, self.crop_size)
        if self.noise_max:
            corrupt_key, level_key, noise_key = jax.random.split(corrupt_key, 3)
        low, level = self.corrupt(corrupt_key, images), None
        if self.noise_max:
            highest = self._timestep(self.noise_max)
            level = jax.random.randint(level_key, (len(low),), 0, highest + 1)
            low = self._noised(low, level, jax.random.normal(noise_key, low.shape))
        low = resize(low, images.shape[1])
        if crop_first:
            return images, low, level
        crops = random_crops(crop_key, jnp.concatenate([images, low], axis=-1), self.crop_size)
        return crops[..., :3], crops[..., 3:], level

    def _timestep(self, level: float | jax.Array) -> jax.Array:
        """The timestep at a fraction of the diffusion's steps: 0 the first, 1 the last."""
        return jnp.round(level * (self.diffusion.steps - 1)).astype(jnp.int32)

    def _noised(self, low: jax.Array, t: jax.Array, noise: jax.Array) -> jax.Array:
        return gaussian.q_sample(self.diffusion.process(), low, t, noise)

    def denoising(self, params: Params, batch: Batch, key: jax.Array) -> Denoising:
        """x_0 [b, ...] of a batch, and what makes `denoise(x_t, t)` of params; see the base."""
        x_0, low, level = self.pairs(*jax.random.split(key), to_float(batch["image"]))
        return x_0, lambda params, scale: lambda x_t, t: self.denoise(params, x_t, t, low, level)

    def loss(self, params: Params, batch: Batch, key: jax.Array) -> Loss:
        """Loss of a batch {"image": uint8 [b, h, w, 3]} of full-size images, on random crops."""
        t_key, noise_key, corrupt_key, crop_key, dropout_key = jax.random.split(key, 5)
        x_0, low, level = self.pairs(corrupt_key, crop_key, to_float(batch["image"]))

        def denoise(x_t: jax.Array, t: jax.Array) -> jax.Array:
            return self.denoise(params, x_t, t, low, level, dropout_key)

        return denoising_loss(self.diffusion, denoise, x_0, t_key, noise_key)

    def sample(
        self,
        params: Params,
        keys: jax.Array,
        low: jax.Array,
        *,
        eta: float | jax.Array = 0.0,
        noise_level: float | jax.Array | None = None,
        noise: jax.Array | None = None,
        loop: Loop = whole,
    ) -> jax.Array:
        """Images [b, size, size, 3] from low-resolution ones [b, low_size, low_size, 3].

        Args:
            params: as `init` made them.
            keys: one typed key per example [b].
            low: images in [-1, 1]; values outside are clipped.
            eta: DDIM's noise, for sampling.method "ddim".
            noise_level: of the noise-conditioning augmentation of `low`, from 0 to noise_max, one
                for all or one per example [b]; None takes the stage's own. Those that are traced
                are not checked.
            noise: as for `GuidedDiffusion.draw`.
            loop: what does the steps, see `samplers.sample`.

        Raises:
            UserError: `low` has another size than low_size, or training saw no such noise_level.
        """
        checks.shape("low", low, (None, self.low_size, self.low_size, 3))
        given = noise_level is not None
        if given and not self.noise_max and not isinstance(noise_level, int | float):
            raise UserError(
                "noise_level: given, but stage.noise_max is 0: this upsampler was trained without"
                " noise-conditioning augmentation; leave it out"
            )
        if given and not isinstance(noise_level, jax.core.Tracer):
            for level in np.ravel(noise_level).tolist():
                self._check_level(level, "noise_level")
        size, low = self.image_size, jnp.clip(low, -1.0, 1.0)
        x_T, step_keys, step_noise = initial_noise(keys, (size, size, 3), noise)
        level = None
        if self.noise_max:
            left = keys if step_keys is None else step_keys
            low_noise, rest, _ = initial_noise(left, low.shape[1:])
            step_keys = None if step_keys is None else rest
            fraction = self.noise_level if noise_level is None else noise_level
            level = jnp.full(low.shape[:1], self._timestep(fraction))
            low = self._noised(low, level, low_noise)
        low = loop.once(resize, low, size)
        return samplers.sample(
            self._denoiser(params, low, level),
            x_T,
            step_keys,
            self.diffusion,
            self.sampling,
            noise=step_noise,
            eta=eta,
            loop=loop,
        )

    def _denoiser(
        self, params: Params, low: jax.Array, level: jax.Array | None
    ) -> gaussian.Denoise:
        """`denoise(x_t, t)`, with the second network where t is among the last steps."""

        def first(x_t: jax.Array, t: jax.Array) -> jax.Array:
            return self.denoise(params, x_t, t, low, level)

        if not self.last_steps:
            return first

        def last(x_t: jax.Array, t: jax.Array) -> jax.Array:
            network = {"network": params["last_network"]}
            return self.denoise(network, x_t, t, low, level)

        kept = self.diffusion.process(self.sampling.spacing).timesteps
        until = kept[self.last_steps - 1]
        return lambda x_t, t: jax.lax.cond(t[0] <= until, last, first, x_t, t)


def random_crops(key: jax.Array, images: jax.Array, side: int) -> jax.Array:
    """One random square crop of each image: [b, h, w, c] -> [b, side, side, c]."""
    b, h, w, c = images.shape
    row_key, column_key = jax.random.split(key)
    rows = jax.random.randint(row_key, (b,), 0, h - side + 1)
    columns = jax.random.randint(column_key, (b,), 0, w - side + 1)

    def crop(image: jax.Array, row: jax.Array, column: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(image, (row, column, 0), (side, side, c))

    return jax.vmap(crop)(images, rows, columns)

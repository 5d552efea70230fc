"""The decoder as a stage: p(x | z_i, y) at 64 px, section 2.1 of the paper.

An ADM U-Net with learned variance. With z_i dropped it is GLIDE; with both dropped it is an
unconditional model, which is what classifier-free guidance leads away from.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from unclip_jax import diffusion as dm
from unclip_jax import samplers
from unclip_jax.errors import UserError
from unclip_jax.losses import losses
from unclip_jax.models.decoder import Decoder, DecoderConfig
from unclip_jax.stages import embedding
from unclip_jax.stages.conditioning import (
    Condition,
    Params,
    initial_noise,
    keep,
    random_timesteps,
    text_mask,
)
from unclip_jax.stages.images import to_float


@dataclasses.dataclass(frozen=True)
class DecoderStage:
    """The decoder: network, diffusion and sampling settings together.

    Attributes:
        model: U-Net, caption Transformer and conditioning.
        diffusion: schedule, prediction, variance and loss.
        sampling: method, number of steps and clipping.
        z_i_drop: how often training drops the image embedding.
        caption_drop: how often training drops the caption.
        guidance_scale: the classifier-free guidance that sampling uses unless told otherwise.
    """

    kind: ClassVar[str] = "decoder"

    model: DecoderConfig
    diffusion: dm.Diffusion = dm.Diffusion(variance="learned_range", loss="hybrid")
    sampling: samplers.Sampling = samplers.Sampling(method="ddpm", spacing="250", clip_x_0=1.0)
    z_i_drop: float = 0.1
    caption_drop: float = 0.5
    guidance_scale: float = 3.0

    def __post_init__(self) -> None:
        """Check that the network has the channels that the diffusion needs."""
        for name in ("z_i_drop", "caption_drop"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise UserError(f"stage.{name}: got {getattr(self, name)}, expected 0 <= p < 1")
        check_channels(self.model.unet.out_channels, self.diffusion, "stage.model.unet")

    @property
    def network(self) -> Decoder:
        """The Linen module."""
        return Decoder(self.model)

    @property
    def context(self) -> tuple[int, int]:
        """Context length and vocabulary size of the tokens this stage reads."""
        return self.model.text.context_length, self.model.text.vocab_size

    @property
    def image_size(self) -> int:
        """Side, in pixels, of the images this stage makes."""
        return self.model.unet.image_size

    def init(self, key: jax.Array) -> Params:
        """Random params, with the identity as normalisation until it is replaced."""
        size, e = self.image_size, self.model.embed_dim
        tokens = jnp.zeros((1, self.context[0]), jnp.int32)
        cond = self.condition(tokens, jnp.zeros((1, e)))
        images = jnp.zeros((1, size, size, 3))
        variables = self.network.init(key, images, jnp.zeros((1,), jnp.int32), cond)
        return {"network": variables["params"], "normalisation": embedding.identity(e)}

    def condition(self, tokens: jax.Array, z_i: jax.Array) -> Condition:
        """Condition from caption tokens [b, l] and z_i [b, e] in CLIP's coordinates."""
        return {
            "tokens": tokens,
            "text_mask": text_mask(tokens, self.context[1]),
            "z_i": z_i,
            "z_i_mask": jnp.ones(len(z_i), bool),
        }

    def null(self, cond: Condition) -> Condition:
        """The condition with both z_i and the caption dropped."""
        return cond | {
            "text_mask": jnp.zeros_like(cond["text_mask"]),
            "z_i_mask": jnp.zeros_like(cond["z_i_mask"]),
        }

    def encode(self, params: Params, cond: Condition) -> dict[str, jax.Array]:
        """All of the conditioning that depends on neither x_t nor t, computed once."""
        z_i = embedding.normalise(params["normalisation"], cond["z_i"])
        return self.network.apply(
            {"params": params["network"]}, cond | {"z_i": z_i}, method=self.network.encode
        )

    def denoise(
        self,
        params: Params,
        x_t: jax.Array,
        t: jax.Array,
        encoded: dict[str, jax.Array],
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        """The network's output [b, h, w, 3 or 6]; a dropout key means training."""
        return self.network.apply(
            {"params": params["network"]},
            x_t,
            t,
            encoded,
            deterministic=dropout_key is None,
            rngs={} if dropout_key is None else {"dropout": dropout_key},
            method=self.network.denoise,
        )

    def loss(
        self, params: Params, batch: dict[str, jax.Array], key: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Loss of {"image": uint8 [b,h,w,3], "tokens": int32 [b,l], "z_i": [b,e]}."""
        t_key, noise_key, z_i_key, caption_key, dropout_key = jax.random.split(key, 5)
        x_0 = to_float(batch["image"])
        t = random_timesteps(t_key, len(x_0), self.diffusion.steps)
        noise = jax.random.normal(noise_key, x_0.shape)
        cond = self.condition(batch["tokens"], batch["z_i"])
        cond["z_i_mask"] = keep(z_i_key, len(x_0), self.z_i_drop)
        cond["text_mask"] &= keep(caption_key, len(x_0), self.caption_drop)[:, None]
        encoded = self.encode(params, cond)
        terms = losses(
            self.diffusion,
            lambda x_t, t: self.denoise(params, x_t, t, encoded, dropout_key),
            x_0,
            t,
            noise,
        )
        metrics = {name: jnp.mean(value) for name, value in terms.items() if name != "loss"}
        return jnp.mean(terms["loss"]), metrics

    def sample(
        self,
        params: Params,
        keys: jax.Array,
        cond: Condition,
        *,
        guidance_scale: float | jax.Array = 1.0,
        null: Condition | None = None,
        eta: float | jax.Array = 0.0,
        progress: samplers.Progress | None = None,
    ) -> jax.Array:
        """Images [b, h, w, 3] in [-1, 1] for b conditions, one typed key each.

        Args:
            params: as `init` made them.
            keys: one typed key per example [b].
            cond: as `condition` makes it.
            guidance_scale: classifier-free guidance; 1 is the conditional model. May be traced.
            null: what guidance leads away from; by default z_i and the caption dropped.
            eta: DDIM's noise, for sampling.method "ddim".
            progress: called as progress(step, steps) while sampling.
        """
        null = self.null(cond) if null is None else null
        size = self.image_size
        denoise = samplers.classifier_free(
            lambda x_t, t, encoded: self.denoise(params, x_t, t, encoded),
            self.encode(params, cond),
            self.encode(params, null),
            guidance_scale,
            learned_variance=self.diffusion.learned_variance,
        )
        x_T, keys = initial_noise(keys, (size, size, 3))
        return samplers.sample(
            denoise, x_T, keys, self.diffusion, self.sampling, eta=eta, progress=progress
        )


def check_channels(out_channels: int, diffusion: dm.Diffusion, path: str) -> None:
    """A learned variance needs a second set of output channels; a fixed one must not have it.

    Raises:
        UserError: out_channels is neither.
    """
    expected = 6 if diffusion.learned_variance else 3
    if out_channels != expected:
        raise UserError(
            f"{path}.out_channels: got {out_channels}, expected {expected} with"
            f" diffusion.variance={diffusion.variance!r}"
        )

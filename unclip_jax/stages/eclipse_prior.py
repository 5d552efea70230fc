"""The prior in one forward pass: ECLIPSE (Patel et al. 2023, arXiv 2312.04655).

No diffusion: the network of the diffusion prior maps noise and a caption to z_i at once. It learns
z_i itself by its squared error (the projection loss, eq. 6), whose best answer is the mean of all
z_i of a caption, and to be nearer to its own caption's z_t than to those of the other rows (the
contrastive loss, eq. 7), which keeps what the mean would blur. Here equal captions are no
negatives of each other.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from unclip_jax.common import checks
from unclip_jax.diffusion.gaussian import normal
from unclip_jax.diffusion.progress import Loop, whole
from unclip_jax.errors import wrong
from unclip_jax.models.prior import Prior, PriorConfig
from unclip_jax.stages import normalisation
from unclip_jax.stages.base import Batch, Loss, Stage
from unclip_jax.stages.conditioning import Condition, Params, blank
from unclip_jax.stages.prior import OfCaptions


@dataclasses.dataclass(frozen=True)
class EclipsePriorStage(OfCaptions, Stage):
    """A prior without diffusion: one call of the network for each z_i, and no guidance.

    Attributes:
        model: the Transformer's size. It is asked at timestep 0, with noise for the noised z_i.
        contrast: lambda, the weight of the contrastive loss.
        temperature: of the contrastive loss's cosines.
        unit_embeddings: whether CLIP's embeddings have length one here; a sample then has, too.
    """

    kind: ClassVar[str] = "eclipse_prior"
    module: ClassVar[type] = Prior
    figures: ClassVar[tuple[str, ...]] = ("prior_cosines", "heldout_loss")
    drops: ClassVar[tuple[str, ...]] = ()
    normalisations: ClassVar[tuple[str, ...]] = normalisation.NAMES

    model: PriorConfig
    contrast: float = 0.2
    temperature: float = 0.07
    unit_embeddings: bool = True

    def __post_init__(self) -> None:
        """Check the fields that no part checks alone."""
        checks.number("stage.contrast", self.contrast, least=0)
        if not checks.number("stage.temperature", self.temperature, least=0):
            raise wrong("stage.temperature", self.temperature, "a positive number")

    def init(self, key: jax.Array) -> Params:
        """Random params, with the identity as normalisation of z_i until it is replaced."""
        e = self.model.embed_dim
        x, t = jnp.zeros((1, e)), jnp.zeros((1,), jnp.int32)
        network = self.fresh(key, x, t, *self.text(blank(self.conditions)))
        return {"network": network, "normalisation": normalisation.identity(e)}

    def predict(self, params: Params, noise: jax.Array, cond: Condition) -> jax.Array:
        """The normalised z_i [b, e] of noise [b, e] and a condition."""
        return self.apply(params, noise, jnp.zeros(len(noise), jnp.int32), *self.text(cond))

    def loss(self, params: Params, batch: Batch, key: jax.Array) -> Loss:
        """Loss of {"tokens": int32 [b, l], "z_i": [b, e], "z_t": [b, e]}, rows against each other.

        A prior that reads CLIP's text states takes "text_states" [b, l, d] and "text_mask" [b, l]
        in place of tokens. With `train.grad_accum` the rows of a microbatch stand against each
        other.
        """
        stats, z_t = params["normalisation"], batch["z_t"]
        found = self.predict(params, jax.random.normal(key, z_t.shape), self.condition_of(batch))
        projection = jnp.mean((found - normalisation.normalise(stats, batch["z_i"])) ** 2)
        ours = normalisation.unit(normalisation.denormalise(stats, found))
        logits = jnp.einsum("ie,je->ij", ours, normalisation.unit(z_t)) / self.temperature
        same = jnp.all(z_t[:, None] == z_t[None], axis=-1)
        own = jax.nn.logsumexp(jnp.where(same, logits, -jnp.inf), axis=1)
        contrast = jnp.mean(jax.nn.logsumexp(logits, axis=1) - own)
        told = {"projection": projection, "contrast": contrast}
        return projection + self.contrast * contrast, told

    def sample(
        self, params: Params, keys: jax.Array, cond: Condition, *, loop: Loop = whole
    ) -> jax.Array:
        """z_i [b, e] in CLIP's coordinates, for b conditions and typed keys [b]: one call."""
        drawn = normal(keys, (self.model.embed_dim,))
        found = loop(lambda _, noise: self.predict(params, noise, cond), drawn, 1)
        z_i = normalisation.denormalise(params["normalisation"], found)
        return normalisation.unit(z_i) if self.unit_embeddings else z_i

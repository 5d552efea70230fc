"""CLIP as a stage: contrastive training, and the frozen encoders every other stage stands on."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.errors import wrong
from unclip_jax.models.clip import Clip, ClipConfig
from unclip_jax.parallel.axes import constrain
from unclip_jax.stages.base import Batch, Loss, Stage
from unclip_jax.stages.conditioning import Field, Params, image_field, tokens_field
from unclip_jax.stages.normalisation import unit
from unclip_jax.stages.pixels import resize, squared, to_float


def contrastive_loss(
    z_i: jax.Array, z_t: jax.Array, logit_scale: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Symmetric cross-entropy over the whole batch (Radford et al. 2021, figure 3).

    On a mesh every device compares its own images with all captions: it holds its rows of the
    [b, b] similarities, and sums over columns go from device to device.

    Args:
        z_i: unit image embeddings [b, e].
        z_t: unit text embeddings [b, e]; row i belongs to row i of z_i.
        logit_scale: the learned inverse temperature, a scalar.

    Returns:
        The mean loss, and the fraction of rows whose own partner is nearest (both directions).
    """
    z_t = constrain(z_t, None, None)
    similar = jnp.einsum("ie,je->ij", z_i, z_t, preferred_element_type=jnp.float32)
    logits = constrain(logit_scale * similar, "batch", None)
    # Not the diagonal of the logits, to pick which the compiler would gather them.
    own = logit_scale * jnp.einsum("ie,ie->i", z_i, z_t, preferred_element_type=jnp.float32)
    to_text = jax.nn.logsumexp(logits, axis=1) - own
    to_image = jax.nn.logsumexp(logits, axis=0) - own
    hits = (jnp.argmax(logits, axis=1) == jnp.arange(len(own))).astype(jnp.float32)
    hits_back = (jnp.argmax(logits, axis=0) == jnp.arange(len(own))).astype(jnp.float32)
    return 0.5 * jnp.mean(to_text + to_image), 0.5 * jnp.mean(hits + hits_back)


@dataclasses.dataclass(frozen=True)
class ClipStage(Stage):
    """CLIP: two towers into one space.

    Attributes:
        model: the towers' sizes.
        unit_embeddings: whether z_i and z_t leave here with length one (the paper) or as
            projected (Karlo). Everything downstream takes what this stage gives.
    """

    kind: ClassVar[str] = "clip"
    module: ClassVar[type] = Clip
    figures: ClassVar[tuple[str, ...]] = ("retrieval",)
    preview: ClassVar[str] = "found"
    keeps_fingerprint: ClassVar[bool] = True

    model: ClipConfig
    unit_embeddings: bool = True

    @property
    def learns(self) -> dict[str, Field]:
        """Pictures and their captions."""
        return image_field(self.image_size) | tokens_field(*self.context)

    def guesses(self, rows: int) -> tuple[int, str]:
        """The partner of each picture and caption."""
        return rows, f"among the {rows} pairs of a microbatch"

    def init(self, key: jax.Array) -> Params:
        """Random params."""
        images = jnp.zeros((1, self.image_size, self.image_size, 3))
        tokens = jnp.zeros((1, self.context[0]), jnp.int32)
        if self.model.towers == "both":
            return {"network": self.fresh(key, images, tokens)}
        if self.model.towers == "text":
            return {"network": self.fresh(key, tokens, method="encode_text")}
        return {"network": self.fresh(key, images, method="encode_image")}

    def loss(self, params: Params, batch: Batch, key: jax.Array) -> Loss:
        """Contrastive loss of a batch {"image": uint8 [b,h,w,3], "tokens": int32 [b,l]}."""
        del key  # nothing here is random
        images, tokens = to_float(batch["image"]), batch["tokens"]
        z_i, z_t, logit_scale = self.apply(params, images, tokens)
        loss, accuracy = contrastive_loss(unit(z_i), unit(z_t), logit_scale)
        return loss, {"accuracy": accuracy, "logit_scale": logit_scale}

    def prepare(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Pictures of any sizes as the image tower reads them: uint8 [b, s, s, 3], see `Fit`.

        The one way from a picture to `encode_image`. On the host, so that a new size compiles
        nothing; data made for this stage come so already.

        Raises:
            UserError: no pictures, or one that is none.
        """
        return squared(images, self.image_size, self.model.fit)

    def encode_image(self, params: Params, images: jax.Array) -> jax.Array:
        """Images [b, h, h, 3] in [-1, 1], of the tower's size or resized to it -> z_i [b, e].

        Raises:
            UserError: they are not squares, which `prepare` makes of them.
        """
        if images.shape[1] != images.shape[2]:
            raise wrong("images' shape", images.shape, "squares", "see ClipStage.prepare")
        images = resize(images, self.model.image_size)
        z_i = self.apply(params, images, method="encode_image")
        return unit(z_i) if self.unit_embeddings else z_i

    def encode_text(self, params: Params, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Tokens [b, l] int32 -> z_t [b, e] and the tokens' states [b, l, d]."""
        z_t, states = self.apply(params, tokens, method="encode_text")
        return (unit(z_t) if self.unit_embeddings else z_t), states


@functools.partial(jax.jit, static_argnames="stage")
def encode_text(stage: ClipStage, params, tokens: jax.Array) -> jax.Array:
    """Compiled `ClipStage.encode_text`, without the token states: [b, l] -> z_t [b, e]."""
    return stage.encode_text(params, tokens)[0]


@functools.partial(jax.jit, static_argnames="stage")
def encode_image(stage: ClipStage, params, images: jax.Array) -> jax.Array:
    """Compiled `ClipStage.encode_image` of prepared uint8 images [b, s, s, 3] -> z_i [b, e]."""
    return stage.encode_image(params, to_float(images))

"""CLIP as a stage: contrastive training, and the frozen encoders every other stage stands on."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.errors import wrong
from unclip_jax.models.clip import Clip, ClipConfig
from unclip_jax.parallel.axes import constrain
from unclip_jax.stages.base import Batch, JointLoss, Loss, Stage
from unclip_jax.stages.conditioning import Field, Params, image_field, tokens_field
from unclip_jax.stages.normalisation import unit
from unclip_jax.stages.pixels import resize, squared, to_float


def marks(rows: jax.Array) -> jax.Array:
    """64 bits for each row of an array [b, ...], as uint32 [b, 2]: the same for equal rows.

    Different rows have the same with a chance of about 2^-64.
    """
    flat = rows.reshape(len(rows), -1)
    if jnp.issubdtype(flat.dtype, jnp.floating):
        flat = flat.astype(jnp.float32)
        flat = jax.lax.bitcast_convert_type(jnp.where(flat == 0, 0.0, flat), jnp.uint32)
    flat, place = flat.astype(jnp.uint32), jnp.arange(flat.shape[1], dtype=jnp.uint32)[None]

    def mixed(seed: int) -> jax.Array:  # MurmurHash3's finaliser, at every place another
        x = flat ^ ((place + jnp.uint32(seed)) * jnp.uint32(0x9E3779B1))
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 0x27D4EB2F)):
            x = (x ^ (x >> shift)) * jnp.uint32(factor)
        return jnp.sum(x ^ (x >> 15), axis=1, dtype=jnp.uint32)

    return jnp.stack([mixed(0), mixed(0x51ED270B)], axis=1)


def belonging(pictures: jax.Array, captions: jax.Array) -> jax.Array:
    """Which captions of a batch are true of which of its pictures, bool [b, b].

    Caption j is true of picture i where some row holds this picture beside this caption: its own
    row, that of an equal picture or one with an equal caption.

    Args:
        pictures: uint32 [b, k], equal for equal pictures, as `marks` gives.
        captions: the same of the captions, row by row.
    """

    def equal(x: jax.Array) -> jax.Array:
        found = jnp.all(x[:, None] == constrain(x, None, None)[None], axis=2)
        return constrain(found, "batch", None)

    # The first row with the same caption stands for all of them.
    first = constrain(jnp.argmax(equal(captions), axis=1), None)
    same = equal(pictures).astype(jnp.int32)
    held = constrain(jnp.zeros_like(same).at[:, first].add(same), "batch", None)
    return constrain(held[:, first] > 0, "batch", None)


class Compared(NamedTuple):
    """What comes of a batch's comparison: see `compare`."""

    loss: jax.Array
    accuracy: jax.Array
    guess_loss: jax.Array


def compare(
    z_i: jax.Array, z_t: jax.Array, logit_scale: jax.Array, pictures: jax.Array, captions: jax.Array
) -> Compared:
    """Symmetric cross-entropy over the whole batch (Radford et al. 2021, figure 3).

    A picture's target is spread evenly over the captions that `belonging` finds true of it, and a
    caption's over its pictures, as in UniCL (Yang et al. 2022, arXiv 2204.03610). The targets'
    entropy is taken off, so that 0 is the least; the gradient is that of the cross-entropy. Without
    repeated pictures or captions it is the paper's loss, bit for bit.

    On a mesh every device compares its own images with all captions: it holds its rows of the
    [b, b] similarities, and sums over columns go from device to device.

    Args:
        z_i: unit image embeddings [b, e].
        z_t: unit text embeddings [b, e]; row i belongs to row i of z_i.
        logit_scale: the learned inverse temperature, a scalar.
        pictures: uint32 [b, k], equal for equal pictures.
        captions: the same of the captions.

    Returns:
        The mean loss; the fraction of rows whose nearest belongs to them; and the loss of guessing.
        Each is the mean of both directions.
    """
    z_t = constrain(z_t, None, None)
    similar = jnp.einsum("ie,je->ij", z_i, z_t, preferred_element_type=jnp.float32)
    logits = constrain(logit_scale * similar, "batch", None)
    # Not the diagonal of the logits, to pick which the compiler would gather them.
    own = logit_scale * jnp.einsum("ie,ie->i", z_i, z_t, preferred_element_type=jnp.float32)
    belongs = belonging(pictures, captions)
    rows = jnp.arange(len(own))
    losses, hits, guesses = [], [], []
    for axis in (1, 0):
        count = jnp.sum(belongs, axis=axis).astype(jnp.float32)
        several = jnp.sum(jnp.where(belongs, logits, 0.0), axis=axis) / count
        target = jnp.where(count == 1.0, own, several)
        losses.append(jax.nn.logsumexp(logits, axis=axis) - target - jnp.log(count))
        nearest = jnp.expand_dims(jnp.argmax(logits, axis=axis), axis)
        chosen = nearest == jnp.expand_dims(rows, 1 - axis)
        hits.append(jnp.any(chosen & belongs, axis=axis).astype(jnp.float32))
        guesses.append(jnp.log(len(own) / count))
    to_text, to_image = losses
    return Compared(
        0.5 * jnp.mean(to_text + to_image), 0.5 * jnp.mean(sum(hits)), 0.5 * jnp.mean(sum(guesses))
    )


def contrastive_loss(
    z_i: jax.Array,
    z_t: jax.Array,
    logit_scale: jax.Array,
    pictures: jax.Array | None = None,
    captions: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The loss and the accuracy of `compare`.

    Without `pictures` or `captions` those with equal embeddings are equal; but where all embeddings
    of a side are the same, that side has collapsed, and they count as different.
    """

    def told(given: jax.Array | None, z: jax.Array) -> jax.Array:
        if given is not None:
            return given.reshape(len(z), -1)
        found = marks(jax.lax.stop_gradient(z))
        collapsed = jnp.all(found == found[:1])
        rows = jnp.arange(len(z), dtype=jnp.uint32)[:, None]
        return jnp.where(collapsed, rows, found)

    compared = compare(z_i, z_t, logit_scale, told(pictures, z_i), told(captions, z_t))
    return compared.loss, compared.accuracy


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
        return rows, f"among the {rows} pairs of a batch"

    def init(self, key: jax.Array) -> Params:
        """Random params."""
        images = jnp.zeros((1, self.image_size, self.image_size, 3))
        tokens = jnp.zeros((1, self.context[0]), jnp.int32)
        if self.model.towers == "both":
            return {"network": self.fresh(key, images, tokens)}
        if self.model.towers == "text":
            return {"network": self.fresh(key, tokens, method="encode_text")}
        return {"network": self.fresh(key, images, method="encode_image")}

    @property
    def loss(self) -> JointLoss:
        """Contrastive loss of a batch {"image": uint8 [b,h,w,3], "tokens": int32 [b,l]}.

        Equal pictures and equal captions are positives, see `compare`. Where training changes
        pictures, the batch's "picture", int32 [b], says which are the same.
        """
        return JointLoss(self._towers, self._compared)

    def _towers(self, params: Params, batch: Batch) -> tuple[Any, Any]:
        """Unit embeddings of each row, and what tells equal pictures and captions."""
        images, tokens = batch["image"], batch["tokens"]
        z_i, z_t, _ = self.apply(params, to_float(images), tokens)
        return (unit(z_i), unit(z_t)), (marks(batch.get("picture", images)), marks(tokens))

    def _compared(self, params: Params, z: Any, told: Any) -> Loss:
        """The loss of a whole batch's embeddings."""
        logit_scale = self.apply(params, method="logit_scale")
        loss, accuracy, guess_loss = compare(*z, logit_scale, *told)
        found = {"accuracy": accuracy, "logit_scale": logit_scale, "guess_loss": guess_loss}
        return loss, found

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

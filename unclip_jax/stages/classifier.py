"""A classifier of noised images as a stage: p(y | x_t), whose gradient guides a diffusion.

ADM (Dhariwal & Nichol 2021, arXiv 2105.05233), section 4: trained with cross-entropy on images
noised to uniform timesteps, by the same diffusion as the model that it is to guide.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from unclip_jax.diffusion import gaussian
from unclip_jax.errors import wrong
from unclip_jax.models.classifier import Classifier, check_classifier
from unclip_jax.models.unet import UNetConfig
from unclip_jax.stages.base import Batch, Loss, Stage
from unclip_jax.stages.conditioning import Field, Params, image_field, random_timesteps
from unclip_jax.stages.denoising import dropout
from unclip_jax.stages.pixels import to_float


@dataclasses.dataclass(frozen=True)
class ClassifierStage(Stage):
    """The classifier: network and the diffusion that noises its images.

    Attributes:
        model: the U-Net whose encoder half it is; its out_channels are the classes.
        diffusion: schedule and steps; what is predicted, and how it is trained, is not used.
    """

    kind: ClassVar[str] = "classifier"
    module: ClassVar[type] = Classifier
    figures: ClassVar[tuple[str, ...]] = ("heldout_loss", "clean_accuracy")
    preview: ClassVar[str] = "guessed"
    classes_field: ClassVar[str] = "out_channels"

    model: UNetConfig
    diffusion: gaussian.Diffusion = gaussian.Diffusion()

    def __post_init__(self) -> None:
        """Check what makes a U-Net's encoder a classifier of images."""
        check_classifier(self.model)
        if self.model.in_channels != 3:
            raise wrong("stage.model.in_channels", self.model.in_channels, "3, an image's")

    @property
    def learns(self) -> dict[str, Field]:
        """Images and their classes."""
        label = Field((), "int32", "the class of the image", self.num_classes)
        return image_field(self.image_size) | {"label": label}

    def guesses(self, rows: int) -> tuple[int, str]:
        """A class."""
        return self.num_classes, "a class"

    def init(self, key: jax.Array) -> Params:
        """Random params."""
        images = jnp.zeros((1, self.image_size, self.image_size, 3))
        return {"network": self.fresh(key, images, jnp.zeros((1,), jnp.int32))}

    def logits(
        self,
        params: Params,
        x_t: jax.Array,
        t: jax.Array,
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        """Logits [b, num_classes] of images x_t [b, h, w, 3]; a dropout key means training."""
        return self.apply(params, x_t, t, **dropout(dropout_key))

    def log_prob(self, params: Params, x_t: jax.Array, t: jax.Array, label: jax.Array) -> jax.Array:
        """log p(y | x_t) [b] of classes int32 [b], for `guidance.classifier_guided`."""
        return _pick(jax.nn.log_softmax(self.logits(params, x_t, t)), label)

    def loss(self, params: Params, batch: Batch, key: jax.Array) -> Loss:
        """Cross-entropy of {"image": uint8 [b, h, w, 3], "label": int32 [b]}, and the accuracy.

        Both at uniform timesteps: at the noisiest, nobody can do better than the classes' shares.
        """
        t_key, noise_key, dropout_key = jax.random.split(key, 3)
        x_0, label = to_float(batch["image"]), batch["label"]
        t = random_timesteps(t_key, len(x_0), self.diffusion)
        noise = jax.random.normal(noise_key, x_0.shape)
        x_t = gaussian.q_sample(self.diffusion.process(), x_0, t, noise)
        log_p = jax.nn.log_softmax(self.logits(params, x_t, t, dropout_key))
        accuracy = jnp.mean(jnp.argmax(log_p, axis=-1) == label)
        return -jnp.mean(_pick(log_p, label)), {"accuracy": accuracy}


def _pick(rows: jax.Array, label: jax.Array) -> jax.Array:
    """rows [b, n] at label [b]: [b]."""
    return jnp.take_along_axis(rows, label[:, None], axis=-1)[:, 0]

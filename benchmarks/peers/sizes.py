"""What is compared: networks of Karlo's shape, scaled to the machine, and their inputs."""

from __future__ import annotations

import dataclasses

import numpy as np

from tests.karlo_folders import Tiny
from unclip_jax.models import ClipConfig, DecoderConfig, PriorConfig, UNetConfig

# The row, and whether it is measured in batches, or rather in whole pictures.
ROWS = (
    "clip_text", "clip_image", "prior_sample", "decoder_forward", "decoder_train",
    "super_res_forward", "super_res_train", "text_to_image",
)  # fmt: skip
TRAINING = ("decoder_train", "super_res_train")
CEILING = "matmul"  # a product of two large matrices: what the machine can do
MATRIX_SIDE = {"cpu": 4096, "gpu": 8192}
LEARNING_RATE = 1e-4
STEPS = {"prior": 25, "decoder": 25, "super_res": 7}  # Karlo's own
GUIDANCE = {"prior": 4.0, "decoder": 8.0}
PROMPTS = ("a red apple", "two dogs on the moon", "an oil painting of the sea", "a teapot")


def karlo(scale: str) -> Tiny:
    """The networks: "cpu" in seconds a step on two cores, "gpu" as they were published."""
    small = scale == "cpu"
    e = 384 if small else 768
    return Tiny(
        clip=ClipConfig(
            image_size=224,
            patch=32 if small else 14,
            vision_width=384 if small else 1024,
            vision_layers=6 if small else 24,
            vision_heads=6 if small else 16,
            text_width=e,
            text_layers=6 if small else 12,
            text_heads=e // 64,
            vocab_size=49408,
            context_length=77,
            embed_dim=e,
            activation="quick_gelu",
        ),
        prior=PriorConfig(
            embed_dim=e,
            width=512 if small else 2048,
            layers=8 if small else 20,
            heads=8 if small else 32,
            context_length=77,
            vocab_size=0,
            text_width=e,
        ),
        decoder=DecoderConfig(
            unet=UNetConfig(
                image_size=64,
                channels=64 if small else 320,
                channel_mults=(1, 2, 3, 4),
                res_blocks=2 if small else 3,
                attention_sizes=(32, 16, 8),
                head_channels=64,
                context_dim=384 if small else 1536,
                groups=32,
            ),
            text_width=e,
            embed_dim=e,
            use_z_t=True,
            learned_null=True,
        ),
        super_res=UNetConfig(
            image_size=256,
            in_channels=6,
            out_channels=3,
            channels=32 if small else 320,
            channel_mults=(1, 2, 3, 4),
            res_blocks=1 if small else 3,
            attention_sizes=(),
            scale_shift=False,
            groups=8 if small else 32,
        ),
    )


def matrices(scale: str) -> tuple[np.ndarray, np.ndarray]:
    """Two float32 matrices for `CEILING`, whose product has entries of about 1."""
    side = MATRIX_SIDE[scale]
    both = np.random.default_rng(0).standard_normal((2, side, side), np.float32)
    return tuple(both / np.float32(side**0.25))


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Arrays of a batch, channels last; both sides are given the same."""

    prompts: list[str]
    tokens: np.ndarray  # int32 [b, 77]
    mask: np.ndarray  # bool [b, 77]
    pixels: np.ndarray  # float32 [b, 224, 224, 3] in [-1, 1]
    z_i: np.ndarray  # float32 [b, e]
    z_t: np.ndarray  # float32 [b, e]
    states: np.ndarray  # float32 [b, 77, e]
    t: np.ndarray  # int32 [b]
    x_t: np.ndarray  # float32 [b, 64, 64, 3]
    target: np.ndarray  # float32 [b, 64, 64, 6]
    high: np.ndarray  # float32 [b, 256, 256, 6]
    high_target: np.ndarray  # float32 [b, 256, 256, 3]


def inputs(sizes: Tiny, batch: int) -> Inputs:
    """The inputs of a batch, the same in every process."""
    rng = np.random.default_rng(batch)
    normal = lambda *shape: rng.standard_normal(shape, np.float32)  # noqa: E731
    e, low, high = sizes.clip.embed_dim, sizes.decoder.unet.image_size, sizes.super_res.image_size
    end = sizes.clip.vocab_size - 1
    lengths = rng.integers(5, 30, batch)
    tokens = np.zeros((batch, 77), np.int32)
    for row, length in zip(tokens, lengths, strict=True):
        row[:length] = rng.integers(1, end - 1, length)
        row[0], row[length - 1] = end - 1, end
    side = sizes.clip.image_size
    return Inputs(
        prompts=list(PROMPTS[:batch]),
        tokens=tokens,
        mask=np.arange(77)[None] < lengths[:, None],
        pixels=np.tanh(normal(batch, side, side, 3)),
        z_i=normal(batch, e),
        z_t=normal(batch, e),
        states=normal(batch, 77, e),
        t=rng.integers(0, 1000, batch).astype(np.int32),
        x_t=normal(batch, low, low, 3),
        target=normal(batch, low, low, 6),
        high=normal(batch, high, high, 6),
        high_target=normal(batch, high, high, 3),
    )

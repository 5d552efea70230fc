"""CLIPs of random weights as their publishers lay them out, and what they say of pictures."""

from __future__ import annotations

import dataclasses
import json

import jax.numpy as jnp
import numpy as np

from tests import karlo_folders
from tests.networks import normal, relative_error
from unclip_jax.models import ClipConfig

torch = karlo_folders.torch
TOLERANCE = 1e-5

# As OpenAI's file can be: 64 features a head.
CONFIG = ClipConfig(
    image_size=14,
    patch=7,
    vision_width=128,
    vision_layers=2,
    vision_heads=2,
    text_width=64,
    text_layers=3,
    text_heads=1,
    vocab_size=40,
    context_length=9,
    embed_dim=11,
)
TOKENS = jnp.array([[38, 5, 7, 39, 0, 0, 0, 0, 0], [38, 1, 2, 3, 4, 5, 6, 7, 39]])
IMAGES = jnp.tanh(normal(0, 2, 14, 14, 3))


class QuickGELU(torch.nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class Block(torch.nn.Module):
    """The residual block that OpenAI's and OpenCLIP's checkpoints are laid out for."""

    def __init__(self, width, heads, activation, hidden=0):
        super().__init__()
        linear = torch.nn.Linear
        self.attn = torch.nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_1, self.ln_2 = torch.nn.LayerNorm(width), torch.nn.LayerNorm(width)
        hidden = hidden or 4 * width
        layers = {"c_fc": linear(width, hidden), "gelu": activation}
        self.mlp = torch.nn.Sequential()
        for name, layer in (layers | {"c_proj": linear(hidden, width)}).items():
            self.mlp.add_module(name, layer)

    def forward(self, x, mask):
        h = self.ln_1(x)
        x = x + self.attn(h, h, h, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class Tower(torch.nn.Module):
    def __init__(self, width, layers, heads, activation, hidden=0):
        super().__init__()
        blocks = [Block(width, heads, activation, hidden) for _ in range(layers)]
        self.resblocks = torch.nn.ModuleList(blocks)

    def forward(self, x, mask):
        for block in self.resblocks:
            x = block(x, mask)
        return x


class Visual(torch.nn.Module):
    def __init__(self, c, activation):
        super().__init__()
        width, tokens = c.vision_width, (c.image_size // c.patch) ** 2 + 1
        self.conv1 = torch.nn.Conv2d(3, width, c.patch, c.patch, bias=False)
        self.class_embedding = torch.nn.Parameter(torch.zeros(width))
        self.positional_embedding = torch.nn.Parameter(torch.zeros(tokens, width))
        self.ln_pre, self.ln_post = torch.nn.LayerNorm(width), torch.nn.LayerNorm(width)
        hidden = int(width * (c.vision_mlp_ratio or c.mlp_ratio))
        self.transformer = Tower(width, c.vision_layers, c.vision_heads, activation, hidden)
        self.proj = torch.nn.Parameter(torch.zeros(width, c.embed_dim))

    def forward(self, pixels):
        x = self.conv1(pixels).flatten(2).mT
        first = self.class_embedding.expand(x.shape[0], 1, -1)
        x = self.ln_pre(torch.cat([first, x], dim=1) + self.positional_embedding)
        return self.ln_post(self.transformer(x, None)[:, 0]) @ self.proj


class TheirClip(torch.nn.Module):
    """CLIP as its paper describes it, with the names of OpenAI's file."""

    def __init__(self, c, activation):
        super().__init__()
        self.visual = Visual(c, activation)
        self.transformer = Tower(c.text_width, c.text_layers, c.text_heads, activation)
        self.token_embedding = torch.nn.Embedding(c.vocab_size, c.text_width)
        self.positional_embedding = torch.nn.Parameter(torch.zeros(c.context_length, c.text_width))
        self.ln_final = torch.nn.LayerNorm(c.text_width)
        self.text_projection = torch.nn.Parameter(torch.zeros(c.text_width, c.embed_dim))
        self.logit_scale = torch.nn.Parameter(torch.zeros(()))
        for name in ("input_resolution", "context_length", "vocab_size"):
            self.register_buffer(name, torch.tensor(7))

    def forward(self, pixels, tokens):
        length = tokens.shape[1]
        mask = torch.full((length, length), float("-inf")).triu(1)
        x = self.token_embedding(tokens) + self.positional_embedding
        x = self.ln_final(self.transformer(x, mask))
        ends = tokens.argmax(dim=-1)
        z_t = x[torch.arange(x.shape[0]), ends] @ self.text_projection
        return self.visual(pixels), z_t


def their_clip(activation, config=CONFIG):
    torch.manual_seed(0)
    layer = QuickGELU() if activation == "quick_gelu" else torch.nn.GELU()
    return karlo_folders.randomise(TheirClip(config, layer), 0)


def pixels_of(images, c=CONFIG):
    mean, std = (np.array(s).reshape(1, 1, 1, 3) for s in (c.pixel_mean, c.pixel_std))
    pixels = ((np.asarray(images) + 1) / 2 - mean) / std
    return torch.from_numpy(pixels.transpose(0, 3, 1, 2).astype(np.float32))


def check_embeddings(part, z_i, z_t, tokens=TOKENS):
    stage = dataclasses.replace(part.stage, unit_embeddings=False)
    assert relative_error(stage.encode_image(part.params, IMAGES), z_i) < TOLERANCE
    assert relative_error(stage.encode_text(part.params, tokens)[0], z_t) < TOLERANCE


def embeddings(model, config=CONFIG):
    with torch.no_grad():
        return model(pixels_of(IMAGES, config), torch.from_numpy(np.array(TOKENS)).long())


def openclip_settings(config=CONFIG):
    """model_cfg of OpenCLIP."""
    heads = config.vision_width // config.vision_heads
    image = {"image_size": config.image_size, "layers": config.vision_layers}
    image |= {"width": config.vision_width, "patch_size": config.patch, "head_width": heads}
    text = {"context_length": config.context_length, "vocab_size": config.vocab_size}
    text |= {"width": config.text_width, "heads": config.text_heads, "layers": config.text_layers}
    if config.vision_mlp_ratio:
        image["mlp_ratio"] = config.vision_mlp_ratio
    settings = {"embed_dim": config.embed_dim, "vision_cfg": image, "text_cfg": text}
    return settings | ({"quick_gelu": True} if config.activation == "quick_gelu" else {})


def save_openclip(model, folder, settings, preprocess=None):
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    constants = ("input_resolution", "context_length", "vocab_size")
    state = {k: v for k, v in model.state_dict().items() if k not in constants}
    save_file(state, folder / "open_clip_model.safetensors")
    text = json.dumps({"model_cfg": settings, "preprocess_cfg": preprocess or {}})
    (folder / "open_clip_config.json").write_text(text)

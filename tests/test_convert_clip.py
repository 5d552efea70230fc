"""CLIP from every publisher: the same pictures and captions get the same embeddings."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from tests.networks import normal, relative_error
from unclip_jax.errors import UserError
from unclip_jax.models import ClipConfig
from unclip_jax.weights.convert import clip
from unclip_jax.weights.convert.command import main as convert
from unclip_jax.weights.trained import load_part

karlo_folders = pytest.importorskip("tests.karlo_folders")
torch, transformers = karlo_folders.torch, karlo_folders.transformers
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

    def __init__(self, width, heads, activation):
        super().__init__()
        linear = torch.nn.Linear
        self.attn = torch.nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_1, self.ln_2 = torch.nn.LayerNorm(width), torch.nn.LayerNorm(width)
        layers = {"c_fc": linear(width, 4 * width), "gelu": activation}
        self.mlp = torch.nn.Sequential()
        for name, layer in (layers | {"c_proj": linear(4 * width, width)}).items():
            self.mlp.add_module(name, layer)

    def forward(self, x, mask):
        h = self.ln_1(x)
        x = x + self.attn(h, h, h, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class Tower(torch.nn.Module):
    def __init__(self, width, layers, heads, activation):
        super().__init__()
        blocks = [Block(width, heads, activation) for _ in range(layers)]
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
        self.transformer = Tower(width, c.vision_layers, c.vision_heads, activation)
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


def their_clip(activation):
    torch.manual_seed(0)
    layer = QuickGELU() if activation == "quick_gelu" else torch.nn.GELU()
    return karlo_folders.randomise(TheirClip(CONFIG, layer), 0)


def pixels_of(images):
    mean, std = (np.array(s).reshape(1, 1, 1, 3) for s in (CONFIG.pixel_mean, CONFIG.pixel_std))
    pixels = ((np.asarray(images) + 1) / 2 - mean) / std
    return torch.from_numpy(pixels.transpose(0, 3, 1, 2).astype(np.float32))


def check_embeddings(part, z_i, z_t):
    stage = dataclasses.replace(part.stage, unit_embeddings=False)
    assert relative_error(stage.encode_image(part.params, IMAGES), z_i) < TOLERANCE
    assert relative_error(stage.encode_text(part.params, TOKENS)[0], z_t) < TOLERANCE


def embeddings(model):
    with torch.no_grad():
        return model(pixels_of(IMAGES), torch.from_numpy(np.array(TOKENS)).long())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("form", ["TorchScript", "state dict"])
def test_openai(form, tmp_path):
    """Sizes come from the shapes alone; the constants beside the weights are left out."""
    model = their_clip("quick_gelu")
    path = tmp_path / "ViT.pt"
    if form == "TorchScript":
        inputs = pixels_of(IMAGES), torch.from_numpy(np.array(TOKENS)).long()
        torch.jit.save(torch.jit.trace(model, inputs, check_trace=False), path)
    else:
        torch.save(model.state_dict(), path)
    part = clip.load(path)
    assert part.stage.model == CONFIG
    check_embeddings(part, *embeddings(model))


def test_openai_in_half_precision(tmp_path):
    """Its files are: the matrices in float16, the norms in float32."""
    model = their_clip("quick_gelu")
    for name, parameter in model.named_parameters():
        if "ln_" not in name:
            parameter.data = parameter.data.half()
    torch.save(model.state_dict(), tmp_path / "ViT.pt")
    part = clip.load(tmp_path / "ViT.pt")
    assert part.params["network"]["vision"]["patches"]["kernel"].dtype == np.float32
    check_embeddings(part, *embeddings(model.float()))


@pytest.mark.parametrize("quick", [True, False])
def test_openclip(quick, tmp_path):
    from safetensors.torch import save_file

    model = their_clip("quick_gelu" if quick else "gelu")
    constants = ("input_resolution", "context_length", "vocab_size")
    state = {k: v for k, v in model.state_dict().items() if k not in constants}
    save_file(state, tmp_path / "open_clip_model.safetensors")
    settings = {
        "embed_dim": 11,
        "vision_cfg": {"image_size": 14, "layers": 2, "width": 128, "patch_size": 7},
        "text_cfg": {
            "context_length": 9,
            "vocab_size": 40,
            "width": 64,
            "heads": 1,
            "layers": 3,
        },
    } | ({"quick_gelu": True} if quick else {})
    config = tmp_path / "open_clip_config.json"
    config.write_text(json.dumps({"model_cfg": settings, "preprocess_cfg": {}}))
    part = clip.load(tmp_path)
    assert part.stage.model.activation == ("quick_gelu" if quick else "gelu")
    check_embeddings(part, *embeddings(model))
    settings["vision_cfg"]["timm_model_name"] = "convnext"
    config.write_text(json.dumps({"model_cfg": settings}))
    with pytest.raises(UserError, match="timm_model_name"):
        clip.load(tmp_path)


def huggingface(activation="quick_gelu"):
    text, vision = karlo_folders.clip_settings(dataclasses.replace(CONFIG, activation=activation))
    settings = transformers.CLIPConfig(
        projection_dim=CONFIG.embed_dim, text_config=text, vision_config=vision
    )
    return karlo_folders.randomise(transformers.CLIPModel(settings), 0)


def hf_embeddings(model):
    with torch.no_grad():
        text = model.text_model(torch.from_numpy(np.array(TOKENS)))
        vision = model.vision_model(pixels_of(IMAGES))
        z_i = model.visual_projection(vision.pooler_output)
        return z_i, model.text_projection(text.pooler_output)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_huggingface_by_the_command(activation, tmp_path):
    model = huggingface(activation)
    model.save_pretrained(tmp_path / "theirs")
    convert(["clip", str(tmp_path / "theirs"), "--out", str(tmp_path / "ours")])
    part = load_part(tmp_path / "ours", kind="clip")
    assert part.stage.unit_embeddings
    check_embeddings(part, *hf_embeddings(model))


def test_towers_cut_apart(tmp_path):
    """As Karlo's image-variation repository keeps them; joined, only the temperature is lost."""
    model = huggingface()
    kinds = {
        "text": (transformers.CLIPTextModelWithProjection, model.config.text_config),
        "image": (transformers.CLIPVisionModelWithProjection, model.config.vision_config),
    }
    for name, (kind, settings) in kinds.items():
        tower = kind(settings)
        tower.load_state_dict(model.state_dict(), strict=False)
        tower.save_pretrained(tmp_path / name)
    z_i, z_t = hf_embeddings(model)
    check_embeddings(clip.load_huggingface([tmp_path / "text", tmp_path / "image"]), z_i, z_t)
    text = clip.load(tmp_path / "text")
    stage = dataclasses.replace(text.stage, unit_embeddings=False)
    assert relative_error(stage.encode_text(text.params, TOKENS)[0], z_t) < TOLERANCE
    with pytest.raises(UserError, match="image tower is needed"):
        stage.encode_image(text.params, IMAGES)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("model_type", "siglip", "model_type 'siglip'"),
        ("vision_config", None, "no vision_config"),
        ("projection_dim", 12, "do not fit"),
    ],
)
def test_what_is_no_clip(field, value, message, tmp_path):
    huggingface().save_pretrained(tmp_path / "theirs")
    path = tmp_path / "theirs" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(UserError, match=message):
        clip.load(tmp_path / "theirs")


def test_a_resnet_is_refused_in_words(tmp_path):
    torch.save({"visual.layer1.0.conv1.weight": torch.zeros(2, 2)}, tmp_path / "RN50.pt")
    with pytest.raises(UserError, match=r"visual.conv1.weight.*expected OpenAI's CLIP with a ViT"):
        clip.load(tmp_path / "RN50.pt")

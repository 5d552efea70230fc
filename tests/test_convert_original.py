"""Karlo in its original layout: three checkpoints, a statistics file and OpenAI's CLIP."""

import dataclasses

import jax
import numpy as np
import pytest

from tests.networks import size
from unclip_jax.common.params import flatten
from unclip_jax.errors import UserError
from unclip_jax.models import DecoderConfig, PriorConfig, UNetConfig, presets
from unclip_jax.pipeline.unclip import UnCLIP
from unclip_jax.stages import DecoderStage, PriorStage, UpsamplerStage
from unclip_jax.weights.convert import karlo, karlo_names
from unclip_jax.weights.convert.tables import to_theirs

torch = pytest.importorskip("torch")
clips = pytest.importorskip("tests.clip_files")

E, CONTEXT = 64, 9
CLIP = dataclasses.replace(clips.CONFIG, vocab_size=600, embed_dim=E)
PRIOR = PriorConfig(
    embed_dim=E, width=24, layers=2, heads=3, context_length=CONTEXT, vocab_size=0, text_width=E
)
DECODER = DecoderConfig(
    unet=UNetConfig(
        image_size=8,
        channels=12,
        channel_mults=(1, 2),
        res_blocks=1,
        attention_sizes=(4,),
        head_channels=6,
        context_dim=10,
        groups=3,
    ),
    text_width=E,
    embed_dim=E,
    use_z_t=True,
    learned_null=True,
)
SUPER_RES = UNetConfig(
    image_size=32,
    in_channels=6,
    out_channels=3,
    channels=6,
    channel_mults=(1, 2),
    res_blocks=1,
    attention_sizes=(),
    scale_shift=False,
    groups=3,
)


def random_params(stage):
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(stage.init, jax.random.key(0))
    return jax.tree.map(lambda s: (0.1 * rng.standard_normal(s.shape)).astype(np.float32), shapes)


def to_torch(tensors, prefix=""):
    return {prefix + n: torch.from_numpy(tensors.read(n).copy()) for n in tensors.shapes}


@pytest.fixture
def tiny_presets(monkeypatch):
    monkeypatch.setattr(presets, "KARLO_PRIOR", PRIOR)
    monkeypatch.setattr(presets, "KARLO_DECODER", DECODER)
    monkeypatch.setattr(presets, "KARLO_SUPER_RES", SUPER_RES)


@pytest.fixture
def params():
    return {
        "prior": random_params(PriorStage(PRIOR)),
        "decoder": random_params(DecoderStage(DECODER)),
        "upsampler": random_params(UpsamplerStage(SUPER_RES, low_size=8, last_steps=1)),
    }


@pytest.fixture
def folder(tmp_path, params):
    """The files as PyTorch Lightning writes them, training's leftovers included."""

    def save(name, state):
        optimizer = {"state": [torch.zeros(3)], "epoch": 4}
        torch.save({"state_dict": state, "global_step": 7, "optimizer": optimizer}, tmp_path / name)

    prior = to_torch(to_theirs(karlo_names.original_prior(), params["prior"]))
    stats = prior.pop("stats.0"), prior.pop("stats.1")
    torch.save(stats, tmp_path / "ViT-L-14_stats.th", _use_new_zipfile_serialization=False)
    prior = {f"model.{name}": value for name, value in prior.items()}
    save("prior-ckpt-step=01000000-of-01000000.ckpt", prior)
    decoder = to_theirs(karlo_names.original_decoder(DECODER), params["decoder"]["network"])
    save("decoder-ckpt-step=01000000-of-01000000.ckpt", to_torch(decoder, "model."))
    super_res = to_theirs(karlo_names.original_super_res(SUPER_RES), params["upsampler"])
    save("improved-sr-ckpt-step=1.2M.ckpt", to_torch(super_res))
    torch.manual_seed(0)
    model = clips.karlo_folders.randomise(clips.TheirClip(CLIP, clips.QuickGELU()), 0)
    torch.save(model.state_dict(), tmp_path / "ViT-L-14.pt")
    return tmp_path


def test_every_weight_arrives_and_it_runs(tiny_presets, folder, params):
    found = dict(karlo.read([folder]))
    assert found["clip"].stage.model == CLIP
    for name, key in (("prior", "network"), ("prior", "normalisation"), ("decoder", "network")):
        ours = flatten(found[name].params[key])
        expected = flatten(params[name][key])
        assert all(np.array_equal(ours[leaf], expected[leaf]) for leaf in expected), (name, key)
    upsampler = flatten(found["upsampler_32"].params)
    expected = flatten(params["upsampler"])
    assert all(np.array_equal(upsampler[leaf], expected[leaf]) for leaf in expected)
    # The original program's own settings: x_0 of the prior clipped at 10, not at diffusers' 5.
    assert found["prior"].stage.sampling.clip_x_0 == 10.0
    assert (found["prior"].stage.guidance_scale, found["decoder"].stage.guidance_scale) == (4, 8)
    assert found["decoder"].stage.diffusion.variance == "learned_range"
    spacings = [found[name].stage.sampling.spacing for name in ("prior", "decoder", "upsampler_32")]
    assert spacings == ["25", "25", "7"]
    model = UnCLIP.load(folder)
    pictures = model.generate(jax.random.key(0), ["a cat"])
    assert pictures.shape == (1, 32, 32, 3)
    assert model.variations(jax.random.key(0), pictures, num=1).shape == (1, 32, 32, 3)
    assert size(model.decoder.params["network"]) == size(params["decoder"]["network"])


def test_of_two_layouts_the_one_with_weights_counts(tiny_presets, folder):
    """An index of diffusers without its networks is no reason to leave the weights unread."""
    (folder / karlo.INDEX).write_text('{"_class_name": "UnCLIPPipeline"}')
    assert set(dict(karlo.read([folder]))) == {"clip", "prior", "decoder", "upsampler_32"}
    (folder / "decoder").mkdir()
    (folder / "decoder" / "diffusion_pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="no folder 'text_encoder'"):
        list(karlo.read([folder]))


def rename(folder, one, other):
    one, other = (next(folder.glob(pattern)) for pattern in (one, other))
    kept = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(kept)


class Attack:
    def __reduce__(self):
        return (print, ("executed",))


def poison(folder):
    path = next(folder.glob("decoder*"))
    torch.save({"state_dict": {"model.cf_param": torch.zeros(2)}, "callbacks": Attack()}, path)


def drop_a_tensor(folder):
    path = next(folder.glob("decoder*"))
    state = torch.load(path)["state_dict"]
    del state["model.clip_emb.bias"]
    state["model.clip_em.bias"] = torch.zeros(3)
    torch.save({"state_dict": state}, path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: next(f.glob("prior*")).unlink(), "no prior-ckpt-step.*the prior"),
        (lambda f: (f / "ViT-L-14_stats.th").unlink(), "no ViT-L-14_stats.th, the statistics"),
        (lambda f: rename(f, "prior*", "decoder*"), "holds decoder, expected Karlo's prior"),
        (lambda f: rename(f, "prior*", "improved*"), "holds super-resolution, expected"),
        (lambda f: rename(f, "ViT-L-14.pt", "decoder*"), "holds clip, expected Karlo's decoder"),
        (poison, "decoder.*print"),
        (drop_a_tensor, "1 missing .clip_emb.bias.; 1 unexpected .clip_em.bias."),
        (lambda f: (f / "ViT-L-14.pt").write_bytes(b"<html>"), "a web page"),
    ],
)
def test_damaged_files_are_one_line(tiny_presets, folder, capsys, damage, message):
    damage(folder)
    with pytest.raises(UserError, match=message) as error:
        list(karlo.read([folder]))
    assert "\n" not in str(error.value)
    assert "executed" not in capsys.readouterr().out


def test_full_size_is_expected_otherwise(folder):
    """Without the tiny presets these are not Karlo's sizes, and that is said."""
    with pytest.raises(UserError, match=r"prior.*do not fit.*transformer.resblocks"):
        list(karlo.read([folder]))

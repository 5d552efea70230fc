"""Kandinsky 2.2's repositories: read, converted, sent home, and damaged in many ways."""

import json
import shutil

import numpy as np
import pytest

from unclip_jax.common.params import flatten
from unclip_jax.errors import UserError
from unclip_jax.weights.convert import kandinsky
from unclip_jax.weights.convert.command import main as convert
from unclip_jax.weights.export.command import main as export

kandinsky_folders = pytest.importorskip("tests.kandinsky_folders")
torch, diffusers = kandinsky_folders.torch, kandinsky_folders.diffusers


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """diffusers' pipelines, and where they are saved: prior, decoder, inpaint."""
    base = tmp_path_factory.mktemp("kandinsky")
    return kandinsky_folders.pipelines(base), base


def tensors_of(folder):
    """Every tensor in a repository, by component and name."""
    from safetensors.numpy import load_file

    found = {}
    for path in sorted(folder.rglob("*.safetensors")):
        named = load_file(path).items()
        found |= {f"{path.parent.name}/{name}": array for name, array in named}
    return found


def same(one, other):
    one, other = flatten(one), flatten(other)
    return set(one) == set(other) and all(np.array_equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("which", ["decoder", pytest.param("inpaint", marks=pytest.mark.slow)])
def test_round_trip_is_exact(reference, which, tmp_path):
    """diffusers to ours by the command, and back: every tensor bit for bit, every setting."""
    pipelines, base = reference
    ours, theirs = str(tmp_path / "ours"), tmp_path / "theirs"
    convert(["kandinsky", str(base / which), str(base / "prior"), "--out", ours])
    export(["diffusers", "--model", ours, "--out", str(theirs)])
    for name, source in (("prior", "prior"), ("decoder", which)):
        before, after = tensors_of(base / source), tensors_of(theirs / name)
        assert set(before) == set(after)
        for tensor, array in before.items():
            np.testing.assert_array_equal(after[tensor], array, err_msg=tensor)
        loaded = type(pipelines[source]).from_pretrained(theirs / name)
        assert set(loaded.components) == set(pipelines[source].components)
        for component, kept in pipelines[source].components.items():
            if not hasattr(kept, "save_config"):  # one of transformers
                continue
            found, expected = dict(getattr(loaded, component).config), dict(kept.config)
            changed = {k for k in expected if k[0] != "_" and found.get(k) != expected[k]}
            assert changed <= {"sample_size", "scaling_factor", "vq_embed_dim"}, component
    with pytest.raises(UserError, match="exists"):
        export(["diffusers", "--model", ours, "--out", str(theirs)])


def test_what_guidance_leads_away_from(reference):
    """z_i of zeros after normalisation, as the pipeline gives it; settings as published."""
    pipelines, base = reference
    found = dict(kandinsky.read([base / "prior", base / "decoder"]))
    expected = pipelines["prior"].get_zero_embed()[0].detach().numpy()
    nothing = found["decoder"].params["null_z_i"]
    np.testing.assert_allclose(nothing, expected, atol=2e-6 * np.abs(expected).max())
    stage = found["decoder"].stage
    assert (stage.sampling.spacing, stage.guidance_scale) == ("leading:100:1", 4.0)
    assert (found["prior"].stage.sampling.spacing, found["prior"].stage.guidance_scale) == ("25", 4)
    marks = {part.description.get("clip_fingerprint") for part in found.values()} - {None}
    assert marks == {found["clip"].description["fingerprint"]}


SLOW = (pytest.param(form, marks=pytest.mark.slow) for form in ("fp16 variant", "old names"))


@pytest.mark.parametrize("form", ["bin", *SLOW])
def test_every_form_of_file_gives_the_same(reference, form, tmp_path):
    pipelines, base = reference
    settings = {"bin": {"safe_serialization": False}, "fp16 variant": {"variant": "fp16"}}
    where = [tmp_path / name for name in ("prior", "decoder")]
    for name, path in zip(("prior", "decoder"), where, strict=True):
        pipelines[name].save_pretrained(path, **settings.get(form, {}))
    if form == "bin":  # transformers 5 writes safetensors whatever it is asked
        for name in ("text_encoder", "image_encoder"):
            state, folder = getattr(pipelines["prior"], name).state_dict(), where[0] / name
            torch.save(state, folder / "pytorch_model.bin")
            (folder / "model.safetensors").unlink(missing_ok=True)
        assert not list(tmp_path.rglob("*.safetensors"))
    if form == "old names":
        rename(where[1] / "movq", {"to_q": "query", "to_out.0": "proj_attn"})
    expected = dict(kandinsky.read([base / "prior", base / "decoder"]))
    found = dict(kandinsky.read(where))
    for name, part in expected.items():
        assert same(part.params, found[name].params), name


def rename(folder, names):
    from safetensors.numpy import load_file, save_file

    path = folder / "diffusion_pytorch_model.safetensors"
    arrays = load_file(path)
    for old, new in names.items():
        arrays = {name.replace(old, new): array for name, array in arrays.items()}
    save_file(arrays, path)


@pytest.mark.slow
def test_half_precision_stays_half(reference, tmp_path):
    """fp16 files to fp16 params, whose constants stay float32, and to the same files again."""
    where = [tmp_path / name for name in ("prior", "decoder")]
    kinds = diffusers.KandinskyV22PriorPipeline, diffusers.KandinskyV22Pipeline
    for path, kind in zip(where, kinds, strict=True):
        saved = kind.from_pretrained(reference[1] / path.name, torch_dtype=torch.float16)
        saved.save_pretrained(path)
    parts = dict(kandinsky.read(where))
    decoder = parts["decoder"].params
    kernels = decoder["network"]["unet"], decoder["autoencoder"]["network"]["decoder"]
    assert {tree["conv_in"]["kernel"].dtype.name for tree in kernels} == {"float16"}
    assert decoder["null_z_i"].dtype == np.float32 and np.isfinite(decoder["null_z_i"]).all()
    assert parts["prior"].params["normalisation"]["mean"].dtype == np.float32
    convert(["kandinsky", *map(str, where), "--out", str(tmp_path / "ours")])
    export(["diffusers", "--model", str(tmp_path / "ours"), "--out", str(tmp_path / "theirs")])
    for path in where:
        before, after = tensors_of(path), tensors_of(tmp_path / "theirs" / path.name)
        assert {name: (x.dtype, x.tobytes()) for name, x in before.items()} == {
            name: (x.dtype, x.tobytes()) for name, x in after.items()
        }


# ---------------------------------------------------------------- damaged and hostile folders


def without(name):
    return lambda base: shutil.rmtree(base / name)


def swap(one, other):
    def damage(base):
        (base / one).rename(base / "aside")
        (base / other).rename(base / one)
        (base / "aside").rename(base / other)

    return damage


def setting(path, **fields):
    def damage(base):
        found = json.loads((base / path).read_text())
        (base / path).write_text(json.dumps(found | fields))

    return damage


def old_prior(base):
    """A prior of another size of z_i, as 2.1's, and its CLIP."""
    setting("prior/prior/config.json", embedding_dim=10)(base)


def drop(path):
    return lambda base: (base / path).unlink()


class Attack:
    def __reduce__(self):
        return (print, ("executed",))


def poison(base):
    movq = base / "decoder/movq"
    torch.save({"state": Attack()}, movq / "diffusion_pytorch_model.bin")
    (movq / "diffusion_pytorch_model.safetensors").unlink()


WEIGHTS = "diffusion_pytorch_model.safetensors"
UNET, MOVQ = "decoder/unet/config.json", "decoder/movq/config.json"
SCHEDULER = "decoder/scheduler/scheduler_config.json"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without("prior"), "prior': no such folder"),
        (without("decoder/movq"), "decoder': no folder 'movq'"),
        (without("prior/image_encoder"), "prior': no folder 'image_encoder'"),
        (without("decoder/scheduler"), "no folder 'scheduler'"),
        (drop("decoder/model_index.json"), "model_index.json: missing"),
        (drop(f"decoder/unet/{WEIGHTS}"), "unet: no weights, found config.json"),
        (drop(SCHEDULER), "scheduler_config.json: missing"),
        (swap("prior/prior", "decoder/unet"), "_class_name: got 'UNet2DConditionModel'"),
        (swap("prior/scheduler", "decoder/scheduler"), "_class_name: got 'DDPMScheduler'"),
        (swap(f"prior/prior/{WEIGHTS}", f"decoder/unet/{WEIGHTS}"), "prior.*do not fit.*missing"),
        (swap(f"decoder/movq/{WEIGHTS}", f"decoder/unet/{WEIGHTS}"), "do not fit.*missing"),
        (old_prior, "the prior draws z_i of 10 dimensions, the decoder reads 12"),
        (
            setting("prior/model_index.json", _class_name="KandinskyPriorPipeline"),
            "expected one of Kandinsky 2.2, KandinskyV22...; no other version is read",
        ),
        (
            setting(UNET, addition_embed_type="text_image", encoder_hid_dim_type="text_image_proj"),
            "addition_embed_type: got 'text_image', expected that of Kandinsky 2.2; this is 2.1's",
        ),
        (setting(SCHEDULER, new_trick=7), "field 'new_trick' is 7.*does not know"),
        (setting(SCHEDULER, _class_name="DDIMScheduler"), "_class_name: got 'DDIMScheduler'"),
        (setting(UNET, new_trick=7), "field 'new_trick' is 7.*does not know"),
        (setting(UNET, in_channels=5), "in_channels and out_channels: got '5 and 8'"),
        (setting(UNET, act_fn="gelu"), "act_fn is 'gelu'"),
        (setting(UNET, encoder_hid_dim=None), "encoder_hid_dim: got None"),
        (setting(MOVQ, norm_type="group"), "norm_type is 'group'"),
        (setting(MOVQ, latent_channels=3), "vq_embed_dim is 4"),
        (setting(MOVQ, lookup_from_codebook=True), "lookup_from_codebook is True"),
        (setting(MOVQ, norm_num_groups=16), "norm_num_groups is 16"),
        (poison, "movq.*print"),
    ],
)
def test_a_damaged_folder_is_one_line(reference, tmp_path, capsys, damage, message):
    for name in ("prior", "decoder"):
        shutil.copytree(reference[1] / name, tmp_path / name)
    damage(tmp_path)
    folders = [tmp_path / "prior", tmp_path / "decoder"]
    with pytest.raises(UserError, match=message) as error:
        dict(kandinsky.read(folders))
    assert "\n" not in str(error.value)
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["prior"], "0 repositories with a decoder among them, expected one; give kandinsky-2-2-d"),
        (["decoder"], "0 repositories with a prior among them"),
        (
            ["prior", "prior"],
            "2 repositories with a prior.*leave out all but one of .*prior",
        ),
        (["prior", "decoder", "inpaint"], "2 repositories with a decoder"),
        ([], "nothing: 0 repositories"),
    ],
)
def test_a_missing_repository_is_one_line(reference, names, message):
    with pytest.raises(UserError, match=message) as error:
        next(kandinsky.read([reference[1] / name for name in names]))
    assert "\n" not in str(error.value)

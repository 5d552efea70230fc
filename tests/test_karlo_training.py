"""Fine-tuning a tiny Karlo from its published form to pictures, whole and with adapters."""

import dataclasses
import importlib

import jax
import numpy as np
import pytest
from PIL import Image

from tests import karlo_folders
from unclip_jax import stages
from unclip_jax.common.params import flatten
from unclip_jax.errors import UserError
from unclip_jax.pipeline.unclip import UnCLIP
from unclip_jax.training import loop, lora, prepare
from unclip_jax.weights import folder as model_folder
from unclip_jax.weights.convert.command import main as convert
from unclip_jax.weights.export.command import main as export
from unclip_jax.weights.trained import load_part, tokenizer

# One level in each U-Net, and one block: the decoder makes 6 px, the upsampler 24.
SIZES = karlo_folders.tiny(12, 3, 35, (1,), (6,), 6, 1, "quick_gelu")
FOLDERS = {"prior": "prior", "decoder": "decoder", "upsampler": "upsampler_24"}
STEPS = 3

# The prior trains as its config says. The others leave out what only takes longer to compile.
NO_FIGURES = {"train.eval_every": 0, "train.preview_every": 0}
QUICK = {
    "prior": {},
    "decoder": NO_FIGURES | {"stage.model.unet.remat": "none"},
    "upsampler": NO_FIGURES | {"stage.model.remat": "none"},
}


pytestmark = pytest.mark.usefixtures("no_curves")


@pytest.fixture(scope="module")
def karlo(tmp_path_factory):
    """A tiny Karlo, converted; what it was converted from lies beside it."""
    base = tmp_path_factory.mktemp("karlo")
    for name, pipeline in zip(
        ("text2im", "variations"),
        karlo_folders.pipelines(SIZES, base / "tokenizer"),
        strict=True,
    ):
        pipeline.save_pretrained(base / name)
    convert(["karlo", str(base / "text2im"), str(base / "variations"), "--out", str(base / "ours")])
    return base / "ours"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Eight pictures with captions, also the folder that embeddings are kept in."""
    folder = tmp_path_factory.mktemp("pictures")
    for i, caption in enumerate(["a red apple", "two dogs", "the moon", "black ink"] * 2):
        pixels = np.random.default_rng(i).integers(0, 256, (44, 44, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(caption)
    return folder


def config_of(name, karlo, pictures, **changes):
    """The smoke variant of a stage's config, on the pictures; `changes` by dotted name."""
    config = importlib.import_module(f"configs.karlo.{name}").get_config("smoke")
    config.data.update(
        name=str(pictures), split="all", cache_dir=str(pictures.parent / "cache"), cache_bytes=0
    )
    config.heldout_split = "all"
    config.previews = 2
    config.init = str(karlo / FOLDERS[name])
    config.clip = "" if name == "upsampler" else str(karlo / "clip")
    config.train.update(batch_size=4, steps=STEPS, learning_rate=1e-2)
    config.update_from_flattened_dict(changes)
    return config


def train(config, workdir):
    """What train.py does; returns the run and the state at its end."""
    run = prepare.prepare(config)

    def export(params, step):
        model_folder.save_stage(
            workdir / "model", params=run.export(params), description=run.description
        )

    state = loop.train(
        loss_fn=run.loss, init_params=run.init_params, batches=run.batches(), config=run.train,
        workdir=workdir, description=run.description, evaluate=run.evaluate, preview=run.preview,
        export=export,
    )  # fmt: skip
    return run, state


@pytest.fixture(scope="module")
def mine(karlo, pictures, tmp_path_factory):
    """Every stage after some steps with adapters, in a model folder; and run and state of each."""
    out = tmp_path_factory.mktemp("mine")
    trained = {
        name: train(config_of(name, karlo, pictures, **QUICK[name]), out / folder)
        for name, folder in FOLDERS.items()
    }
    (out / "clip").symlink_to(karlo / "clip")
    return out, trained


def flat(params):
    return {name: np.asarray(value) for name, value in flatten(params).items()}


def changed(before, after):
    """Names of the params that differ in any bit."""
    before, after = flat(before), flat(after)
    assert before.keys() == after.keys()
    return {name for name in before if before[name].tobytes() != after[name].tobytes()}


# ---------------------------------------------------------------- from Karlo to pictures


@pytest.mark.slow
def test_a_fine_tuned_karlo_makes_pictures_and_goes_home_to_diffusers(mine, tmp_path):
    out, _ = mine
    pictures = UnCLIP.load(out).generate(jax.random.key(0), ["a red apple"])
    assert pictures.shape == (1, 24, 24, 3) and pictures.std() > 0
    export(["diffusers", "--model", str(out), "--out", str(tmp_path / "theirs")])
    assert (tmp_path / "theirs" / "model_index.json").is_file()


@pytest.mark.parametrize("name", FOLDERS)
def test_adapters_come_to_be_an_ordinary_stage(name, mine, karlo):
    """Kernel + scale * A B on the weights as they were read: never on those rounded to bfloat16."""
    out, trained = mine
    run, state = trained[name]
    config = lora.Lora(**run.description["lora"])
    assert config.dtype == "bfloat16" and config.rank == 4
    stage, after, description = load_part(out / FOLDERS[name])
    _, before, source = load_part(karlo / FOLDERS[name])
    assert stage == run.stage and description["init"]["fingerprint"]
    assert description.get("clip_fingerprint") == source.get("clip_fingerprint")

    adapters = flat(state.ema_params["network"])
    adapted = {f"network/{name.rsplit('/', 1)[0]}/kernel" for name in adapters}
    assert changed(before, after) == adapted
    before, after = flat(before), flat(after)
    for kernel in adapted:
        a, b = (adapters[kernel[8:-6] + part].astype(np.float64) for part in ("lora_a", "lora_b"))
        expected = before[kernel] + config.alpha / 4 * (a @ b).reshape(before[kernel].shape)
        np.testing.assert_allclose(after[kernel], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", FOLDERS)
def test_only_adapters_moved(name, mine, karlo):
    _, trained = mine
    run, state = trained[name]
    begin = run.init_params()
    frozen = [part for part in begin if part != "network"]
    assert "base_network" in frozen
    assert not changed(*({part: tree[part] for part in frozen} for tree in (begin, state.params)))
    networks = {part: tree for part, tree in begin.items() if part.endswith("_network")}
    assert {str(x.dtype) for x in jax.tree.leaves(networks)} == {"bfloat16"}
    constants = {part: tree for part, tree in begin.items() if not part.endswith("network")}
    published = load_part(karlo / FOLDERS[name]).params
    assert not changed(constants, {part: published[part] for part in constants})


@pytest.mark.parametrize(
    "name", ["prior", *(pytest.param(n, marks=pytest.mark.slow) for n in ("decoder", "upsampler"))]
)
def test_a_stage_trained_whole(name, karlo, pictures, tmp_path):
    changes = QUICK[name] | NO_FIGURES | {"lora.rank": 0}
    run, state = train(config_of(name, karlo, pictures, **changes), tmp_path)
    before, after = (load_part(folder).params for folder in (karlo / FOLDERS[name], tmp_path))
    moved = changed(before, after)
    assert {name.split("/")[0] for name in moved} == {"network"}
    assert len(moved) > 0.9 * len(flat(before["network"]))
    assert not changed(after, state.averaged)
    assert "lora" not in run.description


def test_merged_and_saved_it_predicts_what_it_did_in_training(karlo, pictures, tmp_path):
    """With a base of float32 the loss of the saved stage is that of the adapters beside it."""
    changes = {"lora.dtype": "float32", "stage.model.dtype": "float32"}
    run = prepare.prepare(config_of("prior", karlo, pictures, **changes))
    rng, params = np.random.default_rng(0), run.init_params()
    params["network"] = jax.tree.map(
        lambda x: 0.3 * rng.normal(size=x.shape).astype(np.float32), params["network"]
    )
    model_folder.save_stage(
        tmp_path / "mine", params=run.export(params), description=run.description
    )
    mine, published = load_part(tmp_path / "mine"), load_part(karlo / "prior")
    batch, key = dict(next(run.batches())), jax.random.key(4)
    during, after, before = (
        float(jax.jit(loss)(params, batch, key)[0])
        for loss, params in (
            (run.loss, params),
            (mine.stage.loss, mine.params),
            (mine.stage.loss, published.params),
        )
    )
    assert after == pytest.approx(during, rel=1e-5)
    assert abs(after - before) > 1e-3 * before

    again = config_of("prior", karlo, pictures, init=str(tmp_path / "mine"))
    assert prepare.prepare(again).description["init"] != run.description["init"]


# ---------------------------------------------------------------- what is computed from CLIP


def test_batches_carry_what_the_published_text_tower_says(mine, karlo):
    run, _ = mine[1]["decoder"]
    batch = next(run.batches())
    text_encoder = karlo_folders.transformers.CLIPTextModelWithProjection.from_pretrained(
        karlo.parent / "text2im" / "text_encoder"
    )
    tokens = karlo_folders.torch.tensor(np.asarray(batch["tokens"])).long()
    with karlo_folders.torch.no_grad():
        found = text_encoder(tokens)
    mask = np.asarray(batch["text_mask"])
    states = np.asarray(batch["text_states"])
    np.testing.assert_allclose(states[mask], found.last_hidden_state.numpy()[mask], atol=1e-4)
    np.testing.assert_allclose(batch["z_t"], found.text_embeds.numpy(), atol=1e-4)


def test_a_karlo_from_the_beginning_takes_its_constants_from_data_and_clip(karlo, pictures):
    config = config_of("prior", karlo, pictures, init="")
    published = load_part(karlo / "prior")
    with config.unlocked():
        config.stage = stages.describe(published.stage)
    config.lora.rank = 0
    run = prepare.prepare(config)
    params = run.init_params()
    null = params["null_caption"]
    for name, value in published.params["null_caption"].items():
        np.testing.assert_allclose(null[name], value, atol=1e-5)
    z_i = np.concatenate([z_i for z_i, _ in run.source.chunks()])
    np.testing.assert_allclose(params["normalisation"]["mean"], z_i.mean(0), rtol=1e-4)


# ---------------------------------------------------------------- what cannot be


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "prior",
            {"init": "FOLDER/decoder"},
            r"config\.init: '.*decoder' holds a decoder, exp.*a p",
        ),
        ("prior", {"init": "FOLDER/nowhere"}, r"nowhere.*no such folder"),
        ("prior", {"clip": ""}, r"config\.clip: empty"),
        ("prior", {"t5": "t5"}, r"config\.t5: got 't5', but this prior reads CLIP's text states"),
    ],
)
def test_folders_that_do_not_fit_are_named(name, changes, message, karlo, pictures):
    changes = {k: v.replace("FOLDER", str(karlo)) for k, v in changes.items()}
    with pytest.raises(UserError, match=message):
        prepare.prepare(config_of(name, karlo, pictures, **changes))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"layers": 3}}, r"model\.layers is 3, but there 2; leave out what the folder"),
        ({"diffusion": {"prediction": "v"}}, r"diffusion\.prediction is 'v', but there 'x_0'"),
        ({"empty_null": False}, r"empty_null is False, but there True"),
        ({"model": {"depth": 3}}, r"config\.stage\.model\.depth: no such field"),
    ],
)
def test_what_weights_mean_cannot_be_changed(change, message, karlo, pictures):
    config = config_of("prior", karlo, pictures)
    with config.unlocked():
        config.stage = {"kind": "prior", **change}
    with pytest.raises(UserError, match=message):
        prepare.prepare(config)


def test_another_clip_is_refused(karlo, pictures, tmp_path):
    clip = load_part(karlo / "clip")
    params = jax.tree.map(lambda x: x * 1.01, clip.params)
    description = {k: v for k, v in clip.description.items() if k != "fingerprint"}
    model_folder.save_stage(tmp_path / "clip", params=params, description=description)
    config = config_of("prior", karlo, pictures, clip=str(tmp_path / "clip"))
    with pytest.raises(
        UserError, match=r"config\.clip: .* holds CLIP \w+, but .*prior' was trained"
    ):
        prepare.prepare(config)


def test_a_converted_clip_trains_on_in_its_own_tokens(karlo, pictures, tmp_path):
    """Whatever reads captions for it does so with the tokenizer that its folder brought."""
    clip = load_part(karlo / "clip")
    config = importlib.import_module("configs.emoji.clip").get_config("smoke")
    config.data.update(name=str(pictures), split="all", cache_dir=str(tmp_path), cache_bytes=0)
    config.update_from_flattened_dict({"heldout_split": "all", "init": str(karlo / "clip")})
    config.stage = {"kind": "clip"}
    config.train.batch_size = 4
    run = prepare.prepare(config)
    assert run.description["tokenizer"] == clip.description["tokenizer"]
    batch = next(run.batches())
    captions = [run.source[int(i)]["caption"] for i in batch["index"]]
    np.testing.assert_array_equal(batch["tokens"], tokenizer(clip).encode(captions))
    assert (batch["tokens"][:, -1] == clip.stage.model.end).all()  # padding as theirs, not 0


def test_what_needs_a_folder_to_start_from_says_so(karlo, pictures):
    for name, rank, message in (
        ("prior", 4, r"config\.lora\.rank: got 4, but config\.init is empty"),
        ("upsampler", 0, r"config\.stage\.last_steps: got 1, expected 0 without config\.init"),
    ):
        config = config_of(name, karlo, pictures, init="")
        with config.unlocked():
            config.stage = stages.describe(load_part(karlo / FOLDERS[name]).stage)
        config.lora.rank = rank
        with pytest.raises(UserError, match=message):
            prepare.prepare(config)


def test_a_folder_that_changes_while_training_is_named(mine, karlo, tmp_path):
    run, state = mine[1]["upsampler"]
    origin = run.export.func.__self__
    _, params, description = load_part(karlo / FOLDERS["upsampler"])
    params |= {"network": params["last_network"]}
    model_folder.save_stage(tmp_path / "m", params=params, description=description)
    moved = dataclasses.replace(origin, folder=tmp_path / "m")
    with pytest.raises(UserError, match=r"config\.init: the weights in .* have changed"):
        moved.merged(lora.Lora(rank=4), state.averaged)


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("variant", ["", "lora", "whole", "smoke"])
def test_every_variant_is_a_config(name, variant, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(f"configs.karlo.{name}")
    config = module.get_config(variant)
    given = prepare.settings.build(prepare.Settings, config)
    assert given.stage["kind"] == name and given.init.startswith(f"runs/karlo/{name}")
    with pytest.raises(UserError, match=r"runs/karlo/\w+'?: no such folder"):
        prepare.prepare(config)
    assert bool(given.lora.rank) == (variant != "whole")
    assert given.train.batch_size % given.train.grad_accum == 0
    with pytest.raises(ValueError, match="'full'"):
        module.get_config("full")

"""Wrong inputs to every command: one line that names what is wrong, an exit status, no traceback.

The commands run in forks of one process that has imported them already: each has an exit status
and a stderr of its own, and none waits for JAX to be imported again.
"""

import dataclasses
import functools
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from tests import tiny
from unclip_jax import stages
from unclip_jax.common.params import fingerprint
from unclip_jax.models.decoder import DecoderConfig
from unclip_jax.weights import folder as model_folder

ROOT = Path(__file__).parent.parent
ENVIRONMENT = os.environ | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}

# One level, as the decoder has: the commands trace these networks again and again.
UPSAMPLER = dataclasses.replace(
    tiny.UPSAMPLER, model=dataclasses.replace(tiny.UPSAMPLER.model, channel_mults=(1,))
)

# Reads [[command, *arguments], ...], writes [[status, stderr], ...].
FORKS = """
import gc, json, os, sys, tempfile, traceback
sys.path.insert(0, os.getcwd())
import unclip_jax.evaluate.command
import unclip_jax.weights.convert.command, unclip_jax.weights.export.command
import unclip_jax.pipeline.class_conditional, unclip_jax.pipeline.tasks.run
import unclip_jax.training.analytic, unclip_jax.training.embed, unclip_jax.training.save
import unclip_jax.training.loop, demo
import unclip_jax.configs.base, unclip_jax.plan.command, ml_collections.config_flags, PIL.Image
try:
    import gradio
except ImportError:
    pass
PIL.Image.init()
from unclip_jax.__main__ import dispatch
from unclip_jax.errors import run_command

def run(*argv):
    sys.argv = list(argv)
    status = 1
    try:
        main, words = (demo.main, argv[1:]) if argv[0] == "demo" else (dispatch, argv)
        run_command(main, list(words))
        status = 0
    except SystemExit as error:
        status = error.code
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(status)

outcomes = []
gc.disable()  # a collection would copy all that a fork shares
for command in json.load(sys.stdin):
    with tempfile.TemporaryFile() as stderr:
        child = os.fork()
        if not child:
            os.dup2(stderr.fileno(), 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            run(*command)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        stderr.seek(0)
        outcomes.append([status, stderr.read().decode()])
json.dump(outcomes, sys.stdout)
"""

TRAIN = "train --config=emoji/{}:smoke --workdir={{new}} --config.data.name={{pictures}} "
TRAIN += "--config.data.split=all --config.heldout_split=all --config.train.batch_size=2 "
TRAIN_CLIP, TRAIN_PRIOR, TRAIN_DECODER = (
    TRAIN.format(stage) for stage in ("clip", "prior", "decoder")
)
EMBED = "embed --data {pictures} --split all --out {new} "
ANALYTIC = "analytic --stage {model}/prior --data {pictures} --split all "
CLASSES = "class_conditional --decoder {classes} --out {new}.png "
EXPORT = "export program --model {model} --out {new} "
EVALUATE = "evaluate --model {model} --data {pictures} --heldout_split all --split all "
PLAN = "plan --config=paper/prior --topology=v5e:2x2 "

# Command and arguments, exit status, and what the line names.
ROWS = [
    # train
    ("train --workdir={new}", 1, "--config: missing"),
    ("train --config=emoji/clop --workdir={new}", 1, "did you mean emoji/clip?"),
    ("train --config=configs/emoji/ar_prio.py:smoke", 1, "did you mean emoji/ar_prior?"),
    ("trian --config=emoji/clip", 1, "did you mean train?"),
    ("train --config=configs/emoji/nothing.py --workdir={new}", 1, "nothing.py"),
    ("train --config=configs/emoji/prior.py --workdir={new}", 1, "config.clip: empty"),
    (TRAIN_CLIP + "--config.train.learning_rat=1", 1, "learning_rat"),
    (TRAIN_CLIP + "--config.train.steps=many", 1, "steps"),
    (TRAIN_CLIP + "--config.train.steps=0", 1, "train.steps"),
    (TRAIN_CLIP + "--config.data.name=./no_such_folder", 1, "no_such_folder"),
    (TRAIN_CLIP + "--config.stage.model.patch=7", 1, "patch"),
    (TRAIN_CLIP + "surplus", 1, "argument 'surplus'"),
    (TRAIN_CLIP + "--no_such_flag=1", 1, "no_such_flag"),
    ("train --config=README.md --workdir={new}", 1, "README.md"),
    ("train --config={model}/clip/config.json --workdir={new}", 1, "config.json"),
    (TRAIN_CLIP + "--workdir={picture}", 1, "red.png"),
    (TRAIN_CLIP + "--config.data.split=evening", 1, "evening"),
    (TRAIN_CLIP + "--config.heldout_split=evening", 1, "evening"),
    (TRAIN_CLIP + "--config.train.batch_size=0", 1, "train.batch_size: got 0"),
    (TRAIN_CLIP + "--config.train.learning_rate=nan", 1, "train.learning_rate: got nan"),
    (TRAIN_CLIP + "--config.train.ema_decay=1.0", 1, "train.ema_decay: got 1.0"),
    (TRAIN_CLIP + "--config.train.schedule=linear", 1, "train.schedule: got 'linear'"),
    (TRAIN_CLIP + "--config.train.warmup_steps=1000", 1, "train.warmup_steps: got 1000"),
    (TRAIN_CLIP + "--config.train.seed=-1", 1, "train.seed: got -1"),
    (TRAIN_CLIP + "--config.mesh.data=3", 1, "mesh: got"),
    (TRAIN_CLIP + "--config.mesh.tensor=0", 1, "mesh.tensor: got 0"),
    (TRAIN_CLIP + "--config.stage.kind=vae", 1, "kind: got 'vae'"),
    (TRAIN_CLIP + "--config.stage.model.dtype=float8", 1, "float8"),
    (TRAIN_CLIP + "--config.stage.model.text_heads=3", 1, "text_heads"),
    (TRAIN_CLIP + "--config.stage.model.vocab_size=-5", 1, "vocab_size"),
    (TRAIN_CLIP + "--config.previews=0", 1, "config.previews: got 0"),
    (TRAIN_CLIP + "--config.lora.rank=4", 1, "config.lora.rank: got 4"),
    (TRAIN_CLIP + "--config.embeddings={new}", 1, "config.embeddings: got"),
    (TRAIN_CLIP + "--config.t5={new}", 1, "config.t5: got"),
    (TRAIN_CLIP + "--config.init={pictures}", 1, "model folder"),
    (TRAIN_CLIP + "--num_processes=2", 1, "--coordinator_address: missing"),
    (TRAIN_CLIP + "--distributed=off --process_id=0", 1, "--distributed=off: contradicts"),
    (TRAIN_PRIOR + "--config.clip=no_clip", 1, "no_clip"),
    (TRAIN_PRIOR + "--config.clip={model}/decoder", 1, "holds a decoder, expected a clip"),
    (TRAIN_PRIOR + "--config.clip={model}/clip", 1, "config.stage.model.embed_dim"),
    (TRAIN_PRIOR + "--config.normalisation=none_of_them", 1, "config.normalisation: got"),
    (TRAIN_DECODER + "--config.clip={model}/clip --config.stage.model.embed_dim=8"
     " --config.stage.sampling.spacing=5000", 1, "spacing: got '5000'"),
    (TRAIN_DECODER + "--config.stage.diffusion.schedule=sine", 1, "sine"),
    (TRAIN_DECODER + "--config.stage.caption_drop=1.5", 1, "caption_drop: got 1.5"),
    # sample.py
    ("sample", 2, "sample"),
    ("sample text2img", 2, "text2img"),
    ("sample text2im --model {model}", 1, "no caption"),
    ("sample text2im --model {model} --prompt ''", 1, "prompts[0]"),
    ("sample text2im --model {model} --prompt x --out {new}.gif", 1, ".png"),
    ("sample text2im --model {model} --prompts no.txt", 1, "no.txt"),
    ("sample text2im --model {model} --prompt x --out {new}.png --dtype int8", 2, "--dtype"),
    ("sample text2im --model {model} --prompt x --out {new}.png --surplus", 2, "--surplus"),
    ("sample text2im --model= --prompt x --out {new}.png", 1, "model"),
    ("sample probe --model {model}", 2, "PROBE"),
    ("sample text2im --model {picture} --prompt x --out {new}.png", 1, "red.png"),
    ("sample text2im --model {model}/clip --prompt x --out {new}.png", 1, "no trained stage"),
    ("sample text2im --model {halved} --prompt x --out {new}.png", 1, "damaged or cut short"),
    ("sample text2im --model {model} --prompt x --out {pictures}", 1, ".png"),
    ("sample text2im --model {model} --prompt x --out {picture}/a.png", 1, "cannot be written"),
    ("sample text2im --model {model} --prompt x --out {new}.png --num 0", 1, "num: got 0"),
    ("sample text2im --model {model} --prompt x --out {new}.png --batch_size 0", 1, "batch_size"),
    ("sample text2im --model {model} --prompt x --out {new}.png --seed -1", 1, "--seed: got -1"),
    ("sample text2im --model {model} --prompt x --out {new}.png --seed 9223372036854775808", 1,
     "--seed: got 9223372036854775808"),
    ("sample text2im --model {model} --prompt x --out {new}.png --prior_steps 0", 1, "'0'"),
    ("sample text2im --model {model} --prompt x --out {new}.png --decoder_steps 9999", 1, "9999"),
    ("sample text2im --model {model} --prompt x --out {new}.png --upsampler_steps few", 1, "few"),
    ("sample text2im --model {model} --prompt x --out {new}.png --guidance_scale nan", 2,
     "guidance_scale"),
    ("sample text2im --model {model} --prompt x --out {new}.png --t5 {pictures}", 1, "T5"),
    ("sample text2im --model {model} --out {new}.png --prompts {picture}", 1, "--prompts"),
    ("sample text2im --model {model} --out {new}.png --prompts {empty}", 1, "no caption"),
    ("sample variations --model {model} --out {new}.png", 2, "--image"),
    ("sample variations --model {model} --image {empty} --out {new}.png", 1, "empty.txt"),
    ("sample variations --model {model} --image no.png --out {new}.png", 1, "no.png"),
    ("sample variations --model {model} --image {pictures} --out {new}.png", 1, "--image"),
    ("sample variations --model {model} --image {picture} --out {new}.png --eta 2", 1, "eta"),
    ("sample variations --model {model} --image {picture} --out {new}.png --num 0", 1, "num"),
    ("sample reconstruct --model {model} --image {picture} --out {new}.png --steps 0", 1, "steps"),
    ("sample reconstruct --model {model} --image {picture} --out {new}.png --steps 2000", 1,
     "2000"),
    ("sample interpolate --model {model} --image {picture} --out {new}.png", 1, "expected two"),
    ("sample interpolate --model {model} --image {picture} {picture} --out {new}.png --frames 0",
     1, "frames"),
    ("sample textdiff --model {model} --image {picture} --out {new}.png", 2, "--to"),
    ("sample textdiff --model {model} --image {picture} --out {new}.png --to x --theta_max 2", 1,
     "--theta_max: got 2.0"),
    ("sample textdiff --model {model} --image {picture} --out {new}.png --to ''", 1, "''"),
    ("sample inpaint --model {model} --image {picture} --out {new}.png", 2, "--mask"),
    ("sample inpaint --model {model} --image {picture} --mask no.png --out {new}.png", 1,
     "--mask 'no.png'"),
    ("sample inpaint --model {model} --image {picture} --mask {black} --out {new}.png", 1, "mask"),
    ("sample upscale --model {small} --image {picture} --out {new}.png", 1, "upsampler"),
    ("sample probe typographic --model {model} --image {picture} --label a --label b", 2, "--word"),
    ("sample probe binding --model {model} --prompt a --out {new}.png", 1, "label"),
    # evaluate
    ("evaluate --model nowhere", 1, "nowhere"),
    ("evaluate --model {model} --num many", 2, "--num"),
    ("evaluate --model {model} --data no_data", 1, "no_data"),
    ("evaluate --model {model} --data {pictures} --num 0", 1, "num: got 0"),
    ("evaluate --model {model} --sweep 1,some", 1, "--sweep: got '1,some'"),
    ("evaluate --model {picture}", 1, "red.png"),
    (EVALUATE + "--batch_size 0", 1, "--batch_size: got 0"),
    (EVALUATE + "--sweep 1,nan", 1, "guidance scale: got nan"),
    (EVALUATE + "--guidance_scale inf", 1, "guidance scale: got inf"),
    (EVALUATE + "--features fancy", 1, "fancy"),
    (EVALUATE + "--features inception:nowhere", 1, "nowhere"),
    (EVALUATE + "--dtype float16", 1, "float16"),
    (EVALUATE + "--seed -1", 1, "--seed"),
    (EVALUATE + "--template plain", 1, "--template"),
    (EVALUATE + "--class_pictures -1", 1, "--class_pictures"),
    (EVALUATE + "--split noon", 1, "noon"),
    (EVALUATE + "--clip nowhere", 1, "nowhere"),
    (EVALUATE + "--out {picture}", 1, "red.png"),
    # plan
    ("plan --topology=v5e:2x2", 1, "--config"),
    ("plan --config=configs/paper/prior.py", 1, "--topology"),
    ("plan --config=nowhere.py --topology=v5e:2x2", 1, "nowhere.py"),
    (PLAN + "--topology=v9:2x2", 1, "--topology: got 'v9:2x2'"),
    (PLAN + "--topology=v5e:2x2x2", 1, "--topology: got 'v5e:2x2x2'"),
    (PLAN + "--topology=v5e:0x2", 1, "--topology: got 'v5e:0x2'"),
    (PLAN + "--mesh=pipe=2", 1, "--mesh=pipe=2"),
    (PLAN + "--mesh=fsdp=--8", 1, "--mesh=fsdp=--8"),
    (PLAN + "--fit --mesh=fsdp=2", 1, "--fit, --mesh"),
    (PLAN + "--blocks --whole", 1, "--blocks, --whole"),
    (PLAN + "--sample=-1", 1, "--sample: got -1"),
    (PLAN + "--json={picture}/plan.json", 1, "--json"),
    (PLAN + "--json={pictures}", 1, "--json"),
    (PLAN + "--config.train.steps=some", 1, "steps"),
    ("plan --table=nowhere", 1, "--table=nowhere"),
    # doctor, app
    ("doctor", 2, "--workdir"),
    ("doctor --workdir nowhere", 1, "nowhere"),
    ("doctor --workdir {pictures}", 1, "pictures"),
    ("app --model nowhere", 1, "nowhere"),
    ("app --model {picture}", 1, "red.png"),
    ("app --port=some", 2, "--port"),
    ("app --port=99999999", 1, "--port"),
    # analytic
    ("analytic", 2, "--stage"),
    (ANALYTIC + "--method eulerian", 2, "--method"),
    (ANALYTIC + "--stage {model}/upsampler", 1, "holds a upsampler"),
    (ANALYTIC + "--stage nowhere", 1, "nowhere"),
    (ANALYTIC + "--num 0", 1, "--num: got 0"),
    (ANALYTIC + "--batch_size 0", 1, "--batch_size: got 0"),
    (ANALYTIC + "--clip {model}/prior", 1, "holds a prior, expected a clip"),
    (ANALYTIC + "--data no_data", 1, "no_data"),
    (ANALYTIC + "--seed -1", 1, "seed: got -1"),
    ("analytic --stage {model}/prior", 1, "--data"),
    (ANALYTIC.replace("{model}/prior", "{alone}/decoder"), 1, "0 CLIPs"),
    # class_conditional
    ("class_conditional --label red", 2, "--decoder"),
    (CLASSES + "--label red --out out.gif", 1, ".png"),
    (CLASSES, 1, "label: none given"),
    (CLASSES + "--label mauve", 1, "'mauve' is no class"),
    (CLASSES + "--label red --num 0", 1, "num: got 0"),
    (CLASSES + "--label red --batch_size 0", 1, "batch_size: got 0"),
    (CLASSES + "--label red --steps none", 1, "none"),
    (CLASSES + "--label red --classifier_scale inf", 1, "classifier_scale: got inf"),
    (CLASSES + "--label red --seed 99999999999999999999", 1, "--seed: got 9999"),
    (CLASSES + "--label red --classifier {classes}", 1, "expected a classifier"),
    (CLASSES + "--label red --upsampler {model}/upsampler --decoder {model}/decoder", 1, "reads"),
    (CLASSES + "--label red --decoder {model}/clip", 1, "holds a clip, expected a decoder"),
    # convert
    ("convert", 2, "KIND"),
    ("convert vae x --out {new}", 2, "vae"),
    ("convert clip {empty}", 2, "--out"),
    ("convert clip {empty} --out {new} --dtype int8", 2, "--dtype"),
    ("convert clip {empty} --out {new}", 1, "empty.txt"),
    ("convert clip {pictures} --out {new}", 1, "config.json"),
    ("convert clip nowhere --out {new}", 1, "'nowhere' is no folder"),
    ("convert karlo {pictures} --out {new}", 1, "Karlo"),
    ("convert karlo nowhere --out {new}", 1, "'nowhere' is no folder"),
    ("export diffusers --model {model} --out {pictures}", 1, "exists"),
    ("export diffusers --model {model} --out {new}", 1, "another form than Karlo's"),
    ("convert diffusers {model} --out {new}", 1, "write unclip export diffusers --model"),
    # save
    ("save --out {new}", 2, "--workdir"),
    ("save --workdir {model} --out {new} --dtype int8", 2, "--dtype"),
    ("save --workdir {model} --out {new}", 1, "has no checkpoints"),
    ("save --workdir {unsaved} --out {new}", 1, "no whole checkpoint yet"),
    # embed
    (EMBED, 2, "--clip"),
    (EMBED + "--clip {model}/clip --dtype int8", 2, "--dtype"),
    (EMBED + "--clip {model}/clip --captions some", 2, "--captions"),
    (EMBED + "--clip {model}/clip --shards none", 2, "--shards"),
    (EMBED + "--clip {model}/prior", 1, "holds a prior, expected a clip"),
    (EMBED + "--clip nowhere", 1, "nowhere"),
    (EMBED + "--clip {model}/clip --batch_size 0", 1, "--batch_size: got 0"),
    (EMBED + "--clip {model}/clip --shards 0", 1, "shards"),
    (EMBED + "--clip {model}/clip --data no_data", 1, "no_data"),
    (EMBED + "--clip {model}/clip --split noon", 1, "noon"),
    (EMBED + "--clip {model}/clip --coordinator_address here --num_processes 2 --process_id 0", 1,
     "--coordinator_address: got 'here'"),
    (EMBED + "--clip {model}/clip --coordinator_address a:1 --num_processes 2 --process_id 2", 1,
     "--process_id: got 2"),
    # export
    ("export --model {model} --out {new}", 1, "write unclip export program"),
    ("export program --model {model} --out {new}", 2, "--stage"),
    ("export clip --model {model} --out {pictures}", 1, "exists"),
    ("export clip --model {model}/prior --out {new}", 1, "holds a prior, expected a clip"),
    (EXPORT + "--stage vae", 2, "--stage"),
    (EXPORT + "--stage prior --dtype float16", 2, "--dtype"),
    (EXPORT + "--stage upsampler --upsampler large", 2, "--upsampler"),
    (EXPORT + "--stage upsampler --upsampler 7", 1, "--upsampler: got 7, expected one of 32"),
    (EXPORT + "--stage prior --upsampler 32", 1, "--upsampler: got 32"),
    (EXPORT + "--stage prior --platforms cpu,abacus", 1, "--platforms: got 'cpu,abacus'"),
    (EXPORT + "--stage prior --out {pictures}", 1, "exists"),
    (EXPORT + "--stage prior --out {picture}/out", 1, "--out"),
    (EXPORT + "--stage ar_prior", 1, "0 of kind ar_prior"),
    (EXPORT + "--stage prior --steps some", 1, "some"),
    (EXPORT + "--stage clip_text --steps 9", 1, "--steps: got 9"),
    (EXPORT + "--stage prior --model {pictures}", 1, "no trained stage"),
    (EXPORT + "--stage clip_image --model {model}/prior", 1, "holds a prior, expected a clip"),

    # styles
    ("styles raze", 2, "raze"),
    ("styles build --size 0 --cache_dir {new}", 1, "image_size: got 0"),
    ("styles build --cache_dir {picture}/art", 1, "cache_dir"),

    # demo.py
    ("demo surplus --out {new}", 2, "surplus"),
    ("demo --out {picture}/out", 1, "--out"),
    ("demo --out {new} --model {new}/none", 1, "is no folder"),
]  # fmt: skip


def name_of(row) -> str:
    return row[0].replace("{", "").replace("}", "")[-60:]


@functools.cache
def noise(stage: stages.Stage) -> dict:
    """Params drawn by NumPy; their constants are noise as well, as nothing here is sampled."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(stage.init, jax.random.key(0))
    return jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(x.dtype), shapes)


def save(folder: Path, stage: stages.Stage, **about) -> None:
    description = {"stage": stages.describe(stage)} | about
    model_folder.save_stage(folder, params=noise(stage), description=description)


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, Path]:
    """What the rows name: a tiny model, a part of it, one that is damaged, pictures, no text."""
    here = tmp_path_factory.mktemp("places")
    places = {
        name: here / name for name in ("model", "small", "alone", "halved", "classes", "pictures")
    }
    clip = noise(tiny.CLIP)
    mark = {"clip_fingerprint": fingerprint(clip)}
    for model in ("model", "halved"):
        save(places[model] / "clip", tiny.CLIP)
        save(places[model] / "prior", tiny.PRIOR, **mark)
        save(places[model] / "decoder", tiny.DECODER, **mark)
        save(places[model] / "upsampler", UPSAMPLER)
    weights = places["halved"] / "clip" / "params.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    save(places["small"] / "clip", tiny.CLIP)
    save(places["small"] / "decoder", tiny.DECODER, **mark)
    save(places["alone"] / "decoder", tiny.DECODER, **mark)
    unet = dataclasses.replace(tiny.DECODER.model.unet, context_dim=0)
    by_class = stages.DecoderStage(model=DecoderConfig(unet=unet, num_classes=2))
    save(places["classes"], by_class, classes=["blue", "red"])
    places["pictures"].mkdir()
    for name in ("red", "blue", "black"):
        Image.new("RGB", (16, 16), name).save(places["pictures"] / f"{name}.png")
        (places["pictures"] / f"{name}.txt").write_text(f"a {name} square")
    places |= {"picture": places["pictures"] / "red.png", "black": places["pictures"] / "black.png"}
    (here / "empty.txt").touch()
    (here / "unsaved" / "checkpoints").mkdir(parents=True)
    return places | {"empty": here / "empty.txt", "unsaved": here / "unsaved"}


def command(row, places) -> list[str]:
    """Command and arguments; {new} is a path of the row's own."""
    new = places["model"].parent / f"new{ROWS.index(row)}"
    return [word.format(new=new, **places) for word in shlex.split(row[0])]


@pytest.fixture(scope="module")
def outcomes(places) -> dict[str, tuple[int, str]]:
    """Exit status and stderr of every row."""
    commands = [command(row, places) for row in ROWS]
    done = subprocess.run(
        [sys.executable, "-c", FORKS], input=json.dumps(commands), capture_output=True, text=True,
        cwd=ROOT, env=ENVIRONMENT, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return dict(zip((row[0] for row in ROWS), json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_wrong_input_is_one_line_that_names_it(row, outcomes):
    text, status, fragment = row
    found, stderr = outcomes[text]
    assert "Traceback" not in stderr, stderr
    lines = [line for line in stderr.splitlines() if line.strip()]
    assert found == status, stderr
    assert fragment in lines[-1], stderr
    if status == 1:
        assert len(lines) == 1 and lines[0].startswith("error: "), stderr


def test_nothing_is_written(outcomes, places):
    assert not [path.name for path in places["model"].parent.iterdir() if "new" in path.name]


@pytest.mark.parametrize(
    ("arguments", "start"),
    [
        (["train.py"], TRAIN_CLIP + "surplus"),
        (["-m", "unclip_jax", "export"], EXPORT + "--stage vae"),
        pytest.param(["sample.py"], "sample interpolate", marks=pytest.mark.slow),
        pytest.param(
            ["-m", "unclip_jax", "convert"], "convert karlo nowhere", marks=pytest.mark.slow
        ),
    ],
)
def test_a_command_by_itself_says_the_same(arguments, start, outcomes, places):
    row = next(row for row in ROWS if row[0].startswith(start))
    done = subprocess.run(
        [sys.executable, *arguments, *command(row, places)[1:]],
        cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    status, stderr = outcomes[row[0]]
    assert (done.returncode, done.stderr.splitlines()[-1]) == (status, stderr.splitlines()[-1])

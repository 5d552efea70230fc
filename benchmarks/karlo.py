"""Karlo at full size with random weights: convert it, and take every stage through a step.

    python benchmarks/karlo.py make WORK      # 7.2 GB of random bfloat16 weights in WORK/theirs
    python benchmarks/karlo.py convert WORK   # to WORK/ours, as unclip convert does
    python benchmarks/karlo.py step WORK      # one picture, the fewest steps of each stage

Each prints seconds and the peak of its process's memory. What it measured is in docs/karlo.md.
`step` reads the weights straight from WORK/theirs and computes in float32.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import time
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from unclip_jax.data.tokenizer import Tokenizer
from unclip_jax.diffusion.gaussian import Diffusion
from unclip_jax.diffusion.samplers import Sampling
from unclip_jax.models import presets
from unclip_jax.pipeline.unclip import UnCLIP
from unclip_jax.stages import ClipStage, DecoderStage, PriorStage, UpsamplerStage
from unclip_jax.weights.convert import clip_names, karlo, karlo_configs, karlo_names
from unclip_jax.weights.convert.command import main as convert
from unclip_jax.weights.convert.tables import their_shapes
from unclip_jax.weights.export import diffusers, folders

FEWEST = {"prior": "1", "decoder": "1", "upsampler": "2"}  # two, so that both networks run


def report(what: str, since: float) -> None:
    """Print seconds, and the peak of this process's memory so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{what:<24}{time.perf_counter() - since:8.1f} s   peak {peak:6.2f} GiB", flush=True)


def write(folder: Path, file: str, table, tree, settings, rng) -> None:
    """One network with random weights of the scale of trained ones, in bfloat16."""
    folder.mkdir(parents=True)
    arrays = {}
    for name, leaf in their_shapes(table, tree).items():
        fan_in = int(np.prod(leaf.shape[1:])) or 1
        noise = rng.standard_normal(leaf.shape, np.float32) / max(fan_in, 1) ** 0.5
        arrays[name] = noise.astype(ml_dtypes.bfloat16)
    save_file(arrays, folder / file, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(settings, indent=2))


def make(work: Path) -> None:
    """A text-to-image Karlo in diffusers' layout."""
    rng, out = np.random.default_rng(0), work / "theirs"
    network = diffusers.NETWORK_FILE

    def shapes(stage):
        return jax.eval_shape(stage.init, jax.random.key(0))

    clip = dataclasses.replace(presets.CLIP_VIT_L14, towers="text")
    tree = shapes(ClipStage(clip))["network"]
    settings = folders.text_settings(clip)
    write(
        out / "text_encoder",
        "model.safetensors",
        clip_names.huggingface_text(),
        tree,
        settings,
        rng,
    )
    prior = presets.KARLO_PRIOR
    tree, settings = shapes(PriorStage(prior)), karlo_configs.prior_settings(prior)
    write(out / "prior", network, karlo_names.diffusers_prior(), tree, settings, rng)
    decoder = presets.KARLO_DECODER
    tree = shapes(DecoderStage(decoder))["network"]
    table = karlo_names.diffusers_decoder(decoder)
    settings = karlo_configs.decoder_settings(decoder.unet)
    unet = {"unet": tree["unet"]}
    write(
        out / "decoder",
        network,
        [r for r in table if r.ours.startswith("unet/")],
        unet,
        settings,
        rng,
    )
    rest = {name: part for name, part in tree.items() if name != "unet"}
    rows = [
        r._replace(theirs=tuple(n.removeprefix("text_proj.") for n in r.theirs))
        for r in table
        if not r.ours.startswith("unet/")
    ]
    settings = karlo_configs.text_proj_settings(decoder)
    write(out / "text_proj", network, rows, rest, settings, rng)
    unet = presets.KARLO_SUPER_RES
    tree = shapes(UpsamplerStage(unet, low_size=64))["network"]
    settings = karlo_configs.super_res_settings(unet)
    for place in ("first", "last"):
        table = karlo_names.diffusers_unet(unet)
        write(out / f"super_res_{place}", network, table, tree, settings, rng)
    Tokenizer().save(out / "tokenizer")
    cosine, clipped = Diffusion(variance="fixed_small_log"), Sampling(clip_x_0=1.0)
    for name, diffusion, sampling in (
        ("prior", dataclasses.replace(cosine, prediction="x_0"), Sampling(clip_x_0=5.0)),
        ("decoder", Diffusion(variance="learned_range"), clipped),
        ("super_res", cosine, clipped),
    ):
        folder = out / f"{name}_scheduler"
        folder.mkdir()
        settings = karlo_configs.scheduler_settings(diffusion, sampling)
        (folder / "scheduler_config.json").write_text(json.dumps(settings))
    (out / karlo.INDEX).write_text(json.dumps({"_class_name": "UnCLIPPipeline"}))


def respaced(part, spacing: str):
    """A part that samples in so many steps."""
    sampling = dataclasses.replace(part.stage.sampling, spacing=spacing)
    return part._replace(stage=dataclasses.replace(part.stage, sampling=sampling))


def step(work: Path) -> None:
    """One caption through every stage; each program runs twice, to tell compiling from running."""
    since = time.perf_counter()
    model = UnCLIP.load(work / "theirs")
    model = dataclasses.replace(
        model,
        prior=respaced(model.prior, FEWEST["prior"]),
        decoder=respaced(model.decoder, FEWEST["decoder"]),
        upsamplers=tuple(respaced(part, FEWEST["upsampler"]) for part in model.upsamplers),
    )
    report("load", since)
    keys, prompts = jax.random.split(jax.random.key(0), 1), ["a red apple"]
    for again in ("first", "again"):
        since = time.perf_counter()
        model.embed_text(prompts).block_until_ready()
        report(f"CLIP text, {again}", since)
        since = time.perf_counter()
        z_i = model.sample_prior(keys, prompts).block_until_ready()
        report(f"prior, {again}", since)
        since = time.perf_counter()
        small = model.decode(keys, z_i, prompts).block_until_ready()
        report(f"decoder, {again}", since)
        since = time.perf_counter()
        images = model.upsample(keys, small).block_until_ready()
        report(f"super-resolution, {again}", since)
    assert images.shape == (1, 256, 256, 3)
    assert bool(np.isfinite(np.asarray(images)).all())


def main() -> None:
    """Run one of the three."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("make", "convert", "step"))
    parser.add_argument("work", type=Path)
    args = parser.parse_args()
    since = time.perf_counter()
    if args.what == "convert":
        convert(["karlo", str(args.work / "theirs"), "--out", str(args.work / "ours")])
    else:
        {"make": make, "step": step}[args.what](args.work)
    report(args.what, since)


if __name__ == "__main__":
    main()

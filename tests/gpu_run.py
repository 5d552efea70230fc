"""A small bfloat16 decoder compiled for 8 GPUs that are not there; test_gpus.py runs this.

Prints one JSON object.
"""

import dataclasses
import json

import jax

from tests import tiny
from unclip_jax import stages
from unclip_jax.plan import kept
from unclip_jax.plan.analysis import OPTIONS
from unclip_jax.plan.chips import Topology
from unclip_jax.plan.programs import Plan, device_bytes

CHANNELS = 32
SIDE = 32  # pixels: 1024 positions, from which on attention has a kernel


def main() -> None:
    """The train step: what it multiplies, sends and keeps."""
    jax.config.update("jax_platforms", "cpu")
    unet = dataclasses.replace(
        tiny.DECODER.model.unet, image_size=SIDE, channels=CHANNELS, channel_mults=(1,),
        attention_sizes=(SIDE,), head_channels=32, context_dim=32, dtype="bfloat16", remat="full",
    )  # fmt: skip
    text = dataclasses.replace(tiny.DECODER.model.text, width=32, dtype="bfloat16", remat="full")
    model = dataclasses.replace(tiny.DECODER.model, unet=unet, text=text)
    stage = dataclasses.replace(tiny.DECODER, model=model)
    config = {
        "stage": stages.describe(stage),
        "train": {"batch_size": 16},
        "mesh": {"data": 2, "fsdp": 4},
    }
    topology = Topology.parse("h100:8x1")
    plan = Plan.of(config, topology.devices())
    step = kept.compiled(plan.lowered_step(), plan.mesh, OPTIONS["gpu"])
    print(json.dumps({"step": dataclasses.asdict(step), "state": device_bytes(plan.state())}))


if __name__ == "__main__":
    main()

"""Sampling computes once what depends on neither x_t nor t, by the compiled program."""

import dataclasses
import re

import jax
import jax.numpy as jnp

from tests import tiny
from tests.compiling import optimised
from unclip_jax.diffusion.samplers import Sampling
from unclip_jax.parallel import flops


def loop_and_rest(text: str) -> tuple[str, str]:
    """Of a program's HLO the bodies of its loops, and the computation that it enters by."""
    bodies = set(re.findall(r"body=%([\w.\-]+)", text))
    computations = dict(re.findall(r"^(?:ENTRY )?%([\w.\-]+) \(.*?\{\n(.*?)^\}", text, re.M | re.S))
    (entry,) = re.findall(r"^ENTRY %([\w.\-]+) ", text, re.M)
    assert bodies and bodies <= computations.keys()
    return "\n".join(computations[name] for name in bodies), computations[entry]


def test_the_decoders_loop_projects_no_caption():
    """XLA moves keys and values of the context, which are written inside the loop, out of it."""
    stage, params, batch = tiny.DECODER, tiny.params(tiny.DECODER), tiny.batch(2, 16)
    keys, cond = jax.random.split(jax.random.key(0), 2), stage.condition_of(batch)

    @jax.jit
    def sample(params, keys, cond, scale):
        return stage.sample(params, keys, cond, guidance_scale=scale)

    with optimised():
        text = sample.lower(params, keys, cond, jnp.float32(3.0)).compile().as_text()
    loop, rest = loop_and_rest(text)
    blocks = sum("attention" in name for name in params["network"]["unet"])
    assert len(set(re.findall(r"/(\w+)/qkv/dot_general", loop))) == blocks  # it finds products
    assert "context_kv/dot_general" not in loop and "text/" not in loop
    assert len(set(re.findall(r"/(\w+)/context_kv/dot_general", rest))) == blocks


def test_a_step_of_the_prior_computes_three_tokens():
    stage, params, batch = tiny.PRIOR, tiny.params(tiny.PRIOR), tiny.batch(2, 16)
    cond = stage.condition(batch["tokens"], batch["z_t"])

    def of(steps: int) -> int:
        sampling = Sampling(method="ddim", spacing=str(steps))
        made = dataclasses.replace(stage, sampling=sampling, draws=1)
        return flops.count(made.sample, params, jax.random.split(jax.random.key(0), 2), cond)

    network = {"params": params["network"]}
    x_t, text = batch["z_i"], (cond["z_t"], cond["tokens"], cond["text_mask"])
    whole = flops.count(stage.network.apply, network, x_t, jnp.zeros(2), *text)
    last_three = (of(12) - of(2)) / 10
    tokens = stage.model.context_length + 4
    assert 3 / tokens * 0.9 < last_three / whole < 3 / tokens * 1.5

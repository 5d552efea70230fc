"""The rows in JAX, by the functions that the package itself samples and trains with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.peers.sizes import GUIDANCE, LEARNING_RATE, Inputs
from unclip_jax.convert import karlo
from unclip_jax.pipeline import UnCLIP
from unclip_jax.plan import flops

Work = Callable[[], Any]


class Ours:
    """A model folder's networks, doing one row after the other."""

    def __init__(self, folders: list[Path], dtype: str) -> None:
        """Load them; `dtype` is "" for float32."""
        parts = karlo.load(folders, dtype)
        self.model = UnCLIP(**parts)
        self.flops = 0

    def work(self, row: str, given: Inputs) -> Work:
        """What the row does, compiled at its first call; `flops` are then those of a call."""
        arrays = {
            name: jnp.asarray(value) for name, value in vars(given).items() if name != "prompts"
        }
        self.flops = 0
        return getattr(self, f"_{row}")(arrays, given.prompts)

    def _clip_text(self, x, prompts) -> Work:
        stage, params, _ = self.model.clip
        return self._compiled(lambda p, t: stage.encode_text(p, t)[0], params, x["tokens"])

    def _clip_image(self, x, prompts) -> Work:
        stage, params, _ = self.model.clip
        return self._compiled(stage.encode_image, params, x["pixels"])

    def _prior_sample(self, x, prompts) -> Work:
        stage, params, _ = self.model.prior
        keys = jax.random.split(jax.random.key(0), len(x["t"]))

        def sample(params, x):
            cond = stage.condition(x["states"], x["z_t"], x["mask"])
            return stage.sample(params, keys, cond, guidance_scale=GUIDANCE["prior"])

        return self._compiled(sample, params, x)

    def _decoder_condition(self, params, x) -> dict[str, jax.Array]:
        stage = self.model.decoder.stage
        return stage.encode(params, stage.condition(x["states"], x["z_i"], x["z_t"], x["mask"]))

    def _decoder_forward(self, x, prompts) -> Work:
        stage, params, _ = self.model.decoder
        encoded = self._decoder_condition(params, x)
        return self._compiled(stage.denoise, params, x["x_t"], x["t"], encoded)

    def _decoder_train(self, x, prompts) -> Work:
        stage, params, _ = self.model.decoder
        encoded = self._decoder_condition(params, x)

        def predict(network, x_t, t):
            return stage.denoise(params | {"network": network}, x_t, t, encoded)

        return self._trained(predict, params["network"], x["x_t"], x["t"], x["target"])

    def _super_res_forward(self, x, prompts) -> Work:
        stage, params, _ = self.model.upsamplers[0]
        predict = lambda network, x, t: stage.network.apply({"params": network}, x, t)  # noqa: E731
        return self._compiled(predict, params["network"], x["high"], x["t"])

    def _super_res_train(self, x, prompts) -> Work:
        stage, params, _ = self.model.upsamplers[0]
        predict = lambda network, x, t: stage.network.apply({"params": network}, x, t)  # noqa: E731
        return self._trained(predict, params["network"], x["high"], x["t"], x["high_target"])

    def _text_to_image(self, x, prompts) -> Work:
        key = jax.random.key(0)
        return lambda: self.model.generate(key, prompts, batch_size=len(prompts)) / np.float32(255)

    def _compiled(self, function, *args) -> Work:
        self.flops = flops.count(function, *args)
        compiled = jax.jit(function)
        return lambda: jax.block_until_ready(compiled(*args))

    def _trained(self, predict, params, x_t, t, target) -> Work:
        """A step of AdamW on the mean squared error; each call goes on from the one before."""
        optimizer = optax.adamw(LEARNING_RATE, weight_decay=0.01)

        def step(params, state):
            def loss(params):
                error = predict(params, x_t, t).astype(jnp.float32) - target
                return jnp.mean(jnp.square(error))

            value, gradient = jax.value_and_grad(loss)(params)
            updates, state = optimizer.update(gradient, state, params)
            return optax.apply_updates(params, updates), state, value

        held = [jax.tree.map(jnp.copy, params), optimizer.init(params)]
        self.flops = flops.count(step, *held)
        compiled = jax.jit(step, donate_argnums=(0, 1))

        def work() -> jax.Array:
            held[0], held[1], value = compiled(*held)
            return value.block_until_ready()

        return work

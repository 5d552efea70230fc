"""The rows in JAX, by the functions that the package itself samples and trains with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from benchmarks.peers import sizes
from benchmarks.peers.sizes import GUIDANCE, LEARNING_RATE, Inputs
from unclip_jax.parallel import axes, flops, sharding
from unclip_jax.parallel.cpu import devices as cpu_devices
from unclip_jax.parallel.cpu import memory as host_memory
from unclip_jax.pipeline.unclip import UnCLIP
from unclip_jax.weights.convert import karlo

Work = Callable[[], Any]


class Ours:
    """A model folder's networks, doing one row after the other, where the commands would."""

    def __init__(self, folders: list[Path], dtype: str, *, training: bool) -> None:
        """Load them; `dtype` is "" for float32, and `training` keeps memory as train.py does."""
        cpu_devices.use()
        if training:
            host_memory.keep_freed()
        mesh = cpu_devices.make_mesh()
        self.model = UnCLIP(**karlo.load(folders, dtype, mesh), mesh=mesh)
        self.dtype, self.flops = dtype or "float32", 0

    def work(self, row: str, given: Inputs) -> Work:
        """What the row does, compiled at its first call; `flops` are then those of a call."""
        arrays = {
            name: jnp.asarray(value) for name, value in vars(given).items() if name != "prompts"
        }
        self.flops = 0
        return getattr(self, f"_{row}")(arrays, given.prompts)

    def _matmul(self, x, prompts) -> Work:
        backend = "cpu" if jax.default_backend() == "cpu" else "gpu"
        a, b = (jnp.asarray(m, self.dtype) for m in sizes.matrices(backend))
        mesh = self.model.mesh
        a = jax.device_put(a, sharding.batch_sharding(mesh))
        return self._compiled(mesh, jnp.matmul, a, jax.device_put(b, sharding.replicated(mesh)))

    def _clip_text(self, x, prompts) -> Work:
        stage = self.model.clip.stage
        params, tokens, mesh = self.model.lay(self.model.clip, x["tokens"], len(prompts))
        return self._compiled(mesh, lambda p, t: stage.encode_text(p, t)[0], params, tokens)

    def _clip_image(self, x, prompts) -> Work:
        stage = self.model.clip.stage
        params, pixels, mesh = self.model.lay(self.model.clip, x["pixels"], len(prompts))
        return self._compiled(mesh, stage.encode_image, params, pixels)

    def _prior_sample(self, x, prompts) -> Work:
        stage = self.model.prior.stage
        keys = jax.random.split(jax.random.key(0), len(prompts))
        params, given, mesh = self.model.lay(self.model.prior, (keys, x), len(prompts))

        def sample(params, keys, x):
            cond = stage.condition(x["states"], x["z_t"], x["mask"])
            return stage.sample(params, keys, cond, guidance_scale=GUIDANCE["prior"])

        return self._compiled(mesh, sample, params, *given)

    def _decoder(self, x, prompts, lay) -> tuple[Any, dict[str, jax.Array], Mesh]:
        """The decoder's params, its inputs with what is encoded once a picture, and where."""
        stage = self.model.decoder.stage
        params, x, mesh = lay(self.model.decoder, x, len(prompts))

        def encode(params, x):
            return stage.encode(params, stage.condition(x["states"], x["z_i"], x["z_t"], x["mask"]))

        return params, x | {"encoded": jax.jit(encode)(params, x)}, mesh

    def _decoder_forward(self, x, prompts) -> Work:
        stage = self.model.decoder.stage
        params, x, mesh = self._decoder(x, prompts, self.model.lay)
        return self._compiled(mesh, stage.denoise, params, x["x_t"], x["t"], x["encoded"])

    def _decoder_train(self, x, prompts) -> Work:
        stage = self.model.decoder.stage
        params, x, mesh = self._decoder(x, prompts, self._lay_as_train)

        def predict(network, x):
            return stage.denoise(params | {"network": network}, x["x_t"], x["t"], x["encoded"])

        return self._trained(mesh, predict, params["network"], x, x["target"])

    def _super_res_forward(self, x, prompts) -> Work:
        params, x, mesh = self.model.lay(self.model.upsamplers[0], x, len(prompts))
        return self._compiled(mesh, self._super_res, params["network"], x)

    def _super_res_train(self, x, prompts) -> Work:
        part = self.model.upsamplers[0]
        params, x, mesh = self._lay_as_train(part, x, len(prompts), spatial=True)
        return self._trained(mesh, self._super_res, params["network"], x, x["high_target"])

    def _lay_as_train(self, part, given, rows: int, *, spatial=False) -> tuple[Any, Any, Mesh]:
        """As train.py does; `spatial`: with mesh.spatial where the devices do not divide rows."""
        mesh = self.model.mesh
        if spatial and rows % mesh.size:
            mesh = sharding.make_mesh(sharding.MeshConfig(spatial=-1, data=1), mesh.devices.flat)
            params = sharding.place(part.params, sharding.tree_shardings(part.params, mesh))
        else:
            params, mesh = cpu_devices.for_rows(part.params, rows, mesh)
        return params, sharding.spread(given, rows, mesh), mesh

    def _super_res(self, network, x) -> jax.Array:
        stage = self.model.upsamplers[0].stage
        return stage.network.apply({"params": network}, x["high"], x["t"])

    def _text_to_image(self, x, prompts) -> Work:
        key = jax.random.key(0)
        return lambda: self.model.generate(key, prompts, batch_size=len(prompts)) / np.float32(255)

    def _compiled(self, mesh: Mesh, function, *args) -> Work:
        def on_mesh(*args):
            with axes.on(mesh):
                return function(*args)

        self.flops = flops.count(function, *args)
        compiled = jax.jit(on_mesh)
        return lambda: jax.block_until_ready(compiled(*args))

    def _trained(self, mesh: Mesh, predict, params, x, target) -> Work:
        """A step of AdamW on the mean squared error; each call goes on from the one before."""
        optimizer = optax.adamw(LEARNING_RATE, weight_decay=0.01)

        def step(params, state, x, target):
            def loss(params):
                error = predict(params, x).astype(jnp.float32) - target
                return jnp.mean(jnp.square(error))

            with axes.on(mesh):
                value, gradient = jax.value_and_grad(loss)(params)
            updates, state = optimizer.update(gradient, state, params)
            return optax.apply_updates(params, updates), state, value

        held = jax.device_put(
            [jax.tree.map(jnp.copy, params), optimizer.init(params)], sharding.replicated(mesh)
        )
        self.flops = flops.count(step, *held, x, target)
        compiled = jax.jit(step, donate_argnums=(0, 1))

        def work() -> jax.Array:
            held[0], held[1], value = compiled(*held, x, target)
            return value.block_until_ready()

        return work

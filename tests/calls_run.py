"""A walk on two devices, on meshes of both kinds and under shard_map, beside one on one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from unclip_jax.diffusion import Diffusion, Sampling, guidance, sample

DIFFUSION = Diffusion(prediction="v")
KEY = jax.random.key(5)
X_T = jax.random.normal(jax.random.key(1), (4, 6))
MIX = jax.random.normal(jax.random.key(2), (6, 6)) / 3
DDPM = Sampling("ddpm", "5")


def network(x_t, t):
    """A network without a condition."""
    return jnp.tanh(x_t @ MIX + 1e-3 * t[:, None])


def conditional(x_t, t, cond):
    """One with a condition like x_t."""
    return network(x_t + cond, t)


def draw(x_T=X_T, keys=KEY, sampling=DDPM, denoise=network, diffusion=DIFFUSION, **more):
    """`sample` with all that it needs."""
    return sample(denoise, x_T, keys, diffusion, sampling, **more)


def everything(x, keys):
    """A walk with its trajectory, under guidance in an interval of noise levels."""
    scale = guidance.interval(3.0, DIFFUSION, sigma=(0.2, 5.0))
    denoise = guidance.classifier_free(conditional, x, 0 * x, scale)
    return draw(x, keys, denoise=denoise, return_trajectory=True)


def check(found, expected, name):
    """Both halves are on both devices, and the numbers are the same."""
    for a, b in zip(found, expected, strict=True):
        assert len(a.sharding.device_set) == 2
        np.testing.assert_allclose(a, b, atol=1e-5)
    print(name)


def main():
    """Each way in turn."""
    keys, rows = jax.random.split(KEY, 4), PartitionSpec("data")
    expected = everything(X_T, keys)
    for kind in (AxisType.Explicit, AxisType.Auto):
        mesh = jax.make_mesh((2,), ("data",), axis_types=(kind,))
        with jax.set_mesh(mesh):
            given = (jax.device_put(each, NamedSharding(mesh, rows)) for each in (X_T, keys))
            check(jax.jit(everything)(*given), expected, kind.name)
    out = (rows, PartitionSpec(None, "data"))
    split = jax.shard_map(everything, mesh=mesh, in_specs=(rows, rows), out_specs=out)
    check(jax.jit(split)(X_T, keys), expected, "shard_map")


if __name__ == "__main__":
    main()

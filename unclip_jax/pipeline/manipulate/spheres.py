"""Spherical interpolation (slerp) of embeddings and of noise, and spherical means of many."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from unclip_jax.errors import UserError
from unclip_jax.metrics.vectors import unit


@jax.jit
def slerp(a: jax.Array, b: jax.Array, theta: float | jax.Array) -> jax.Array:
    """From a to b on the sphere, by the fraction theta of the angle between them.

    With u and v the directions of a and b, w that of v's part orthogonal to u, and omega the angle
    between u and v, the direction is cos(theta omega) u + sin(theta omega) w: it turns at constant
    speed, whatever omega. Where v is parallel to u, omega is 0 and nothing turns. Where v is
    opposite to u, every half circle is as short as any other; w is then along the axis on which u
    is smallest, orthogonal to u, so that the way is always the same one.

    The length goes from |a| to |b| linearly: embeddings need not be of length one (Karlo's are
    not), nor is noise. A zero vector has no direction; it takes the other's.

    Args:
        a: float [b, ...], one vector per row, of any shape.
        b: the same shape.
        theta: scalar or [b], traced; 0 gives exactly a, 1 exactly b.

    Returns:
        float32, the shape of a.

    Raises:
        UserError: a and b, or theta and they, differ in shape.
    """
    theta = jnp.asarray(theta, jnp.float32)
    if a.shape != b.shape or a.ndim < 2 or theta.shape not in ((), a.shape[:1]):
        raise UserError(
            f"slerp: got {a.shape} and {b.shape} with theta {theta.shape}, expected two equal"
            " shapes [b, ...] and one theta for all or for each row"
        )
    shape, rows = a.shape, len(a)
    a = a.astype(jnp.float32).reshape(rows, -1)
    b = b.astype(jnp.float32).reshape(rows, -1)
    theta = jnp.broadcast_to(theta, (rows,))[:, None]

    a_length, b_length = (jnp.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    u, v = (x / jnp.where(n > 0, n, 1.0) for x, n in ((a, a_length), (b, b_length)))
    u = jnp.where(a_length > 0, u, v)
    v = jnp.where(b_length > 0, v, u)
    along = jnp.sum(u * v, axis=1, keepdims=True)
    across = v - along * u
    across_length = jnp.linalg.norm(across, axis=1, keepdims=True)
    omega = jnp.arctan2(across_length, along)

    axis = jax.nn.one_hot(jnp.argmin(jnp.abs(u), axis=1), u.shape[1])
    any_w = unit(axis - jnp.sum(axis * u, axis=1, keepdims=True) * u)
    w = jnp.where(across_length > 1e-6, unit(across), any_w)

    length = (1 - theta) * a_length + theta * b_length
    turned = length * (jnp.cos(theta * omega) * u + jnp.sin(theta * omega) * w)
    turned = jnp.where(theta == 0, a, jnp.where(theta == 1, b, turned))
    return turned.reshape(shape)


_ITERATIONS = 64  # each halves the error and more; float32 has long been reached


def spherical_mean(vectors: jax.Array, weights: jax.Array) -> jax.Array:
    """The weighted mean of n vectors on the sphere, with the weighted mean of their lengths.

    Its direction u is where the weighted sum of squared angles to theirs is least (Buss & Fillmore
    2001, "Spherical averages"), so that the pulls w_i log_u(v_i) are in balance; found by moving u
    along their sum until it stands still, beginning at the direction of the plain mean. Of two
    vectors it is `slerp`. A zero vector has no direction and counts for the length alone.

    Args:
        vectors: float [n, ..., e].
        weights: float [n], traced; 0 or more and not all 0. Their sum makes no difference.

    Returns:
        float32 [..., e]. Where the plain mean is 0 (opposite vectors of equal weights) every
        direction may be as good; the first vector's then begins.
    """
    return _mean(jnp.asarray(vectors, jnp.float32), jnp.asarray(weights, jnp.float32))


@jax.jit
def _mean(vectors: jax.Array, weights: jax.Array) -> jax.Array:
    w = (weights / jnp.sum(weights)).reshape(-1, *(1,) * (vectors.ndim - 1))
    lengths = jnp.linalg.norm(vectors, axis=-1, keepdims=True)
    v, pulling = unit(vectors), w * (lengths > 0)

    def nearer(_: int, u: jax.Array) -> jax.Array:
        along = jnp.sum(u[None] * v, axis=-1, keepdims=True)
        across = v - along * u[None]
        sine = jnp.linalg.norm(across, axis=-1, keepdims=True)
        angle = jnp.arctan2(sine, along)
        pull = jnp.sum(pulling * angle * across / jnp.maximum(sine, 1e-12), axis=0)
        far = jnp.linalg.norm(pull, axis=-1, keepdims=True)
        return unit(jnp.cos(far) * u + jnp.sin(far) * pull / jnp.maximum(far, 1e-12))

    plain = jnp.sum(pulling * v, axis=0)
    found = jnp.linalg.norm(plain, axis=-1, keepdims=True) > 1e-6
    u = jax.lax.fori_loop(0, _ITERATIONS, nearer, unit(jnp.where(found, plain, v[0])))
    return jnp.sum(w * lengths, axis=0) * u

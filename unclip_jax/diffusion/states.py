"""What samplers are given, in the forms that people have it: keys, states, networks' answers.

One key or one for each example, typed or legacy; an array or a pytree of arrays; and a network that
returns one array, as solvers need it, or says plainly what else it returned.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.errors import UserError, wrong


def many_keys(keys: Any) -> jax.Array:
    """Typed keys `[b]` of typed or legacy ones (uint32 `[b, 2]`).

    Raises:
        UserError: they are something else.
    """
    keys = typed(keys)
    if keys.ndim != 1:
        raise _no_keys(keys)
    return keys


def key_each(keys: Any, rows: int) -> jax.Array:
    """Typed keys `[rows]`: those given, or the `split` of one; either kind may be legacy.

    Raises:
        UserError: they are no keys, or of another number.
    """
    keys = typed(keys)
    if keys.ndim == 0:
        return jax.random.split(keys, rows)
    if keys.shape != (rows,):
        raise wrong("keys' shape", keys.shape, f"one key, or one per example of x_T: {(rows,)}")
    return keys


def typed(keys: Any) -> jax.Array:
    """Typed keys of typed or legacy ones, of any number of axes; UserError for anything else."""
    if not isinstance(keys, jax.Array | np.ndarray):
        raise wrong("keys", type(keys).__name__, "a key", "write jax.random.key(0)")
    if keys.dtype == np.uint32 and keys.ndim:
        data = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0))).shape
        if keys.shape[-1:] == data:
            return jax.random.wrap_key_data(jnp.asarray(keys))
    if not jnp.issubdtype(keys.dtype, jax.dtypes.prng_key):
        raise _no_keys(keys)
    return keys


def _no_keys(keys: Any) -> UserError:
    return UserError(
        f"keys: got {keys.dtype}{list(keys.shape)}, expected one typed key per example; make them"
        " with jax.random.split(jax.random.key(0), batch)"
    )


def one_array(output: Any, name: str = "network output") -> jax.Array:
    """What a network returned, if it is one array of real numbers.

    Raises:
        UserError: it is something else, such as a tuple.
    """
    if not isinstance(output, jax.Array | np.ndarray):
        kind = type(output).__name__
        found = f"a {kind} of {len(output)}" if isinstance(output, tuple | list | dict) else kind
        do = "return the prediction alone: lambda x_t, t: network(x_t, t)[0]"
        raise UserError(f"{name}: got {found}, expected one array; {do}")
    if not jnp.issubdtype(output.dtype, jnp.floating):
        raise wrong(f"{name}'s dtype", output.dtype, "floating point")
    return output


class Packing:
    """A pytree of arrays `[b, ...]` as one array `[b, n]`, and back; an array stays as it is."""

    def __init__(self, state: Any) -> None:
        """Of states like this one.

        Raises:
            UserError: it has no arrays, or not all have as many rows.
        """
        leaves, self._tree = jax.tree.flatten(state)
        self._plain = jax.tree_util.treedef_is_leaf(self._tree)
        self._shapes = [jnp.shape(leaf)[1:] for leaf in leaves]
        rows = {jnp.shape(leaf)[:1] for leaf in leaves}
        if len(rows) != 1 or rows == {()}:
            found = [jnp.shape(leaf) for leaf in leaves]
            raise wrong("x_T's shape" if self._plain else "x_T's shapes", found, "arrays [b, ...]")

    def pack(self, state: Any, name: str, axes: int = 1) -> jax.Array:
        """One array, whose first `axes` axes are those of all leaves."""
        if self._plain:
            return jnp.asarray(state)
        leaves, tree = jax.tree.flatten(state)
        if tree != self._tree:
            raise wrong(f"{name}'s structure", tree, f"that of x_T, {self._tree}")
        flat = [jnp.reshape(leaf, (*jnp.shape(leaf)[:axes], -1)) for leaf in leaves]
        return jnp.concatenate(flat, axis=-1)

    def unpack(self, x: jax.Array, axes: int = 1) -> Any:
        """The pytree again."""
        if self._plain:
            return x
        ends = np.cumsum([int(np.prod(shape)) for shape in self._shapes])[:-1]
        parts = zip(jnp.split(x, ends, axis=-1), self._shapes, strict=True)
        leaves = [part.reshape(*part.shape[:axes], *shape) for part, shape in parts]
        return jax.tree.unflatten(self._tree, leaves)

    def unpack_output(self, output: jax.Array, learned_variance: bool) -> Any:
        """A packed network's output as a network of pytrees gives it, the inverse of `packed`."""
        halves = jnp.split(output, 2 if learned_variance else 1, axis=-1)
        trees = [self.unpack(half) for half in halves]
        return jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=-1), *trees)

    def packed(
        self, denoise: Callable[..., Any], learned_variance: bool, name: str = "network output"
    ) -> Callable[..., Any]:
        """The network as one of packed states; each leaf's variance channels go behind all."""
        if self._plain:
            return denoise
        times = 2 if learned_variance else 1

        def packed(x: jax.Array, t: jax.Array) -> jax.Array:
            output = denoise(self.unpack(x), t)
            leaves, tree = jax.tree.flatten(output)
            if tree != self._tree:
                raise wrong(f"{name}'s structure", tree, f"that of x_T, {self._tree}")
            found = [one_array(leaf).shape for leaf in leaves]
            expected = [
                (len(x), *shape[:-1], *(times * size for size in shape[-1:]))
                for shape in self._shapes
            ]
            if found != expected:
                raise wrong(f"{name}'s shapes", found, str(expected))
            halves = zip(*(jnp.split(leaf, times, axis=-1) for leaf in leaves), strict=True)
            trees = [jax.tree.unflatten(self._tree, half) for half in halves]
            return jnp.concatenate([self.pack(each, "output") for each in trees], axis=-1)

        return packed

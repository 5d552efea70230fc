"""What the readers of whole public models share: tensors of several files to parts of ours."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from unclip_jax import stages
from unclip_jax.parallel import sharding
from unclip_jax.parallel.cpu import memory as host_memory
from unclip_jax.stages import normalisation
from unclip_jax.weights.convert.tables import Row, to_ours
from unclip_jax.weights.convert.tensor_files import Tensors, open_tensors
from unclip_jax.weights.trained import Part


def part(
    stage: stages.Stage,
    table: list[Row],
    files: Mapping[str, Path],
    dtype: str,
    params: Mapping[str, Any] | None = None,
    about: Mapping[str, Any] | None = None,
    rename: Callable[[str], str] = str,
) -> Part:
    """A stage with the weights in some files.

    Args:
        stage: the stage. A decoder's z_i is taken as it is.
        table: the key map of all that the files hold.
        files: weight files by the prefix that the names in each get.
        dtype: of the weights; "" stands for the narrowest that holds all of theirs.
        params: what goes into the params as it is.
        about: what goes into the description as it is.
        rename: the name that the table has for one in the files, with its prefix.

    Raises:
        UserError: tensors are missing, unexpected or misshapen.
    """
    shapes = jax.eval_shape(stage.init, jax.random.key(0))
    filled = {row.ours.split("/")[0] for row in table}
    target = {name: shapes[name] for name in shapes if name in filled}
    with contextlib.ExitStack() as stack:
        opened = {prefix: stack.enter_context(open_tensors(path)) for prefix, path in files.items()}
        each = (found.of_training("model.").prefixed(prefix) for prefix, found in opened.items())
        tensors = functools.reduce(Tensors.join, each).select(rename)
        found = to_ours(table, tensors, target, dtype)
    if stage.kind == "decoder":
        found["normalisation"] = normalisation.identity(stage.model.embed_dim)
    if "normalisation" in found:
        stats = found["normalisation"].items()
        found["normalisation"] = {name: np.asarray(x, np.float32) for name, x in stats}
    said = {"stage": stages.describe(stage), "converted_from": tensors.origin}
    return Part(stage, found | dict(params or {}), said | dict(about or {}))


def of_unclip(parts: Iterable[tuple[str, Part]], mesh: Mesh | None) -> dict[str, Any]:
    """Parts by their names, placed, as the fields of `UnCLIP`.

    `mesh` are devices that the weights go to, see `sharding.tree_shardings`; else the default one.
    """
    found = {name: _on_devices(one, mesh) for name, one in parts}
    upsamplers = tuple(one for name, one in found.items() if name.startswith("upsampler"))
    return {
        "clip": found["clip"],
        "prior": found.get("prior"),
        "decoder": found["decoder"],
        "upsamplers": upsamplers,
    }


def _on_devices(one: Part, mesh: Mesh | None) -> Part:
    """The same part; its arrays are replaced one by one, so that no two copies of all exist."""

    def place(tree: dict[str, Any], where: dict[str, Any] | None) -> None:
        for name, value in tree.items():
            there = where and where[name]
            if isinstance(value, dict):
                place(value, there)
            else:
                tree[name] = host_memory.place(value, there) if there else jnp.asarray(value)

    place(one.params, mesh and sharding.tree_shardings(one.params, mesh))
    return one

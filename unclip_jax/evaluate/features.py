"""The networks whose features a Fréchet distance may be of."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from unclip_jax.errors import wrong
from unclip_jax.models.features.efficientnet import EfficientNetLite0, EfficientNetLite2
from unclip_jax.models.features.inception import Inception
from unclip_jax.parallel import sharding
from unclip_jax.parallel.cpu import memory as host_memory
from unclip_jax.stages.pixels import to_float
from unclip_jax.weights.convert.feature_networks import (
    load_efficientnet_lite0,
    load_efficientnet_lite2,
    load_inception,
)
from unclip_jax.weights.trained import Part

OWN_CLIP, INCEPTION = "own-clip", "inception"
LITE = {
    "efficientnet-lite0": (EfficientNetLite0, load_efficientnet_lite0),
    "efficientnet-lite2": (EfficientNetLite2, load_efficientnet_lite2),
}
MIN_SIZE, MAX_SIZE = 32, 1024  # px inside these, which halve them five times


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureNetwork:
    """A frozen network that turns pictures into vectors.

    Attributes:
        name: as the command line has it; figures of different networks are not comparable.
        params: its weights.
        apply: compiled (params, uint8 [b, h, w, 3]) -> [b, d].
        mesh: the devices that share each batch; None for the default device.
        prepare: what `apply` is given of pictures.
    """

    name: str
    params: Any
    apply: Callable[[Any, jax.Array], jax.Array]
    mesh: jax.sharding.Mesh | None
    prepare: Callable[[np.ndarray], np.ndarray] = np.asarray

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Features float32 [b, d] of uint8 images [b, h, w, 3] of any one size."""
        images = self.prepare(images)
        if self.mesh is not None:
            images = sharding.spread(images, len(images), self.mesh)
        return np.asarray(self.apply(self.params, images), np.float32)


def of_clip(clip: Part, mesh: jax.sharding.Mesh | None = None) -> FeatureNetwork:
    """A CLIP's image tower: z_i as the CLIP gives it."""

    @jax.jit
    def apply(params: Any, images: jax.Array) -> jax.Array:
        return clip.stage.encode_image(params, to_float(images))

    return FeatureNetwork(OWN_CLIP, clip.params, apply, mesh, clip.stage.prepare)


def load(name: str, clip: FeatureNetwork) -> FeatureNetwork:
    """The network that --features names; `clip` is the one that measures.

    UserError for another name, or for weights that are missing or of another network.
    """
    kind, colon, rest = name.partition(":")
    if name == OWN_CLIP:
        return clip
    if kind in LITE and (not colon or (rest.isdecimal() and MIN_SIZE <= int(rest) <= MAX_SIZE)):
        of, load_params = LITE[kind]
        network, kind, params = of(int(rest)) if colon else of(), name, load_params()
    elif kind == INCEPTION and rest:
        network, params = Inception(), load_inception(rest)
    else:
        file = "pytorch-fid's weight file (pt_inception-2015-12-05-6726825d.pth)"
        expected = (
            f"{OWN_CLIP}, {' or '.join(LITE)}, either with :PIXELS ({MIN_SIZE} to {MAX_SIZE}), or"
            f" {INCEPTION}:PATH, where PATH is {file}"
        )
        raise wrong("--features", name, expected)
    if clip.mesh is not None:
        params = host_memory.place(params, sharding.tree_shardings(params, clip.mesh))

    @jax.jit
    def apply(params: Any, images: jax.Array) -> jax.Array:
        return network.apply({"params": params}, images)

    return FeatureNetwork(kind, params, apply, clip.mesh)

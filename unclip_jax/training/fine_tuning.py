"""Start from a trained stage in place of random weights: whole, or through low-rank adapters.

The stage is the one that its folder describes. A config says only what is to differ, and that may
be how it trains and samples, never what its weights mean.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from unclip_jax import stages
from unclip_jax.common.params import TRAINED, flatten, in_weights, unflatten
from unclip_jax.errors import UserError
from unclip_jax.models.dit import DiTConfig
from unclip_jax.models.unet import UNetConfig
from unclip_jax.training import lora
from unclip_jax.training.lora import Lora
from unclip_jax.weights import adapters
from unclip_jax.weights import folder as model_folder
from unclip_jax.weights.trained import Part, read_stage, stage_folder

Params = dict[str, Any]

# Settings of a stage that a fine-tuned one may change, by the first or the last name of their path:
# how it samples and trains, and in which precision; and so may any NAME_drop. All others say what
# its weights mean.
FREE = frozenset({
    "sampling", "guidance_scale", "from_canvas", "draws", "sides", "dtype", "remat", "dropout",
    "loss", "min_snr_gamma", "timestep_shift", "crop", "corruption", "blur_probability",
    "blur_sigma", "bsr", "noise_level", "canvas_noise", "z_i_noise", "input_noise", "penalty",
})  # fmt: skip

# Settings that a fine-tuned stage may raise from 0: what they add begins as nothing. A decoder
# without a canvas may be given one: the input's new channels count for nothing at first.
GROWING = frozenset({"pixel_channels"})

_LISTED = 3


@dataclasses.dataclass(frozen=True)
class Origin:
    """The trained stage that a run starts from.

    Attributes:
        folder: its model folder.
        trained: the stage that the folder holds.
        stage: the stage to train: with the same weights, and perhaps more.
        fingerprint: of those weights.
        description: what the folder says of itself.
        replaced: constants to take in place of the folder's: the canvas of config.canvas.
    """

    folder: Path
    trained: stages.Stage
    stage: stages.Stage
    fingerprint: str
    description: dict[str, Any]
    replaced: Params = dataclasses.field(default_factory=dict)

    @classmethod
    def read(cls, folder: str, overrides: Mapping[str, Any]) -> Origin:
        """Read what a folder says of its stage, and change some settings.

        Args:
            folder: a stage folder, or a workdir that training wrote.
            overrides: settings of the stage that are to differ from the folder's, nested as in
                `stages.describe`; what is left out is as the folder says. "kind" is what is
                expected there.

        Raises:
            UserError: not a stage folder, of another kind, or a setting that must not differ.
        """
        path = stage_folder(folder)
        trained, description = read_stage(path)
        kind = overrides.get("kind", trained.kind)
        if kind != trained.kind:
            raise UserError(f"config.init: {folder!r} holds a {trained.kind}, expected a {kind}")
        stage = stages.build(_overlaid(stages.describe(trained), overrides))
        _check_same_weights(stages.describe(trained), stages.describe(stage), folder)
        fingerprint = model_folder.read_fingerprint(path)
        return cls(path, trained, stage, fingerprint, description)

    def check_clip(self, fingerprint: str, folder: str) -> None:
        """Raise UserError unless the CLIP in `folder` is the one that the stage stands on."""
        own = self.description.get("clip_fingerprint")
        if fingerprint != own:
            raise UserError(
                f"config.clip: {folder!r} holds CLIP {fingerprint}, but {str(self.folder)!r} was"
                f" trained with CLIP {own}; give that one"
            )

    def params(self, dtype: str = "") -> Params:
        """The stage's params; `dtype` is that of its weights in memory, "" for float32.

        What is `replaced` keeps its own dtype. What the stage has more than the folder is drawn at
        random, the same each time.

        Raises:
            UserError: the folder is damaged, or has changed since it was read.
        """
        if model_folder.read_fingerprint(self.folder) != self.fingerprint:
            raise UserError(
                f"config.init: the weights in {str(self.folder)!r} have changed since this run"
                f" began, when their fingerprint was {self.fingerprint}; put those back and run"
                " the same command again"
            )
        key = jax.random.key(0)
        params, _ = model_folder.load_stage(
            self.folder, jax.eval_shape(self.trained.init, key), dtype
        )
        if self.stage.canvas and not self.trained.canvas:
            unet = widened(params[TRAINED]["unet"], self.trained.model.unet, self.stage.model.unet)
            params = params | {TRAINED: params[TRAINED] | {"unet": unet}}
        known = flatten(params | self.replaced)

        def lacking(key: jax.Array) -> Params:
            drawn = flatten(self.stage.init(key))
            return {name: x for name, x in drawn.items() if name not in known}

        fresh = jax.jit(lacking)(key)
        rounded = {n: x.astype(dtype or x.dtype) if in_weights(n) else x for n, x in fresh.items()}
        return unflatten(known | rounded)

    def adapted(self, config: Lora, key: jax.Array) -> Params:
        """The params to train with low-rank adapters: theirs, and the frozen network's."""
        return lora.attach(config, key, self.params(config.dtype))

    def merged(self, config: Lora, params: Params) -> Params:
        """What to save of `adapted` params: `params()`, rounded nowhere, and the adapters in it."""
        whole = self.params()
        return whole | {TRAINED: lora.merge(config, whole[TRAINED], params[TRAINED])}

    def save_adapters(
        self, path: Path, config: Lora, params: Params, description: Mapping[str, Any]
    ) -> None:
        """Write the adapters of `adapted` params alone, see `weights.adapters`.

        `description` is the run's, with the step.
        """
        base = Part(self.stage, self.params(), {})
        names = ("lora", "data", "data_fingerprint", "init", "canvas", "step")
        about = {name: description[name] for name in names if name in description}
        adapters.save_adapters(path, base, params[TRAINED], config.scale, about)


def _overlaid(settings: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings with others on top."""

    def is_group(value: Any) -> bool:
        return isinstance(value, Mapping | ConfigDict)

    found = dict(settings)
    for name, value in overrides.items():
        both = is_group(value) and is_group(found.get(name))
        found[name] = _overlaid(found[name], value) if both else value
    return found


def widened(unet: Params, old: UNetConfig | DiTConfig, new: UNetConfig | DiTConfig) -> Params:
    """A network's params for an input of more channels, which count for nothing at first.

    Args:
        unet: the params, of a U-Net or of a Transformer over patches.
        old: its config.
        new: the same with more `in_channels`; what else it has more is left out here.
    """

    def wide(layer: Params, pixels: int) -> Params:
        """A layer that sees so many pixels of the input first, and other features then."""
        *window, _, features = layer["kernel"].shape
        known, rest = jnp.split(layer["kernel"], [pixels * old.in_channels], axis=-2)
        known = known.reshape(*window, pixels, old.in_channels, features)
        none = [(0, 0)] * len(window)
        known = jnp.pad(known, [*none, (0, 0), (0, new.in_channels - old.in_channels), (0, 0)])
        known = known.reshape(*window, pixels * new.in_channels, features)
        return layer | {"kernel": jnp.concatenate([known, rest], axis=-2)}

    first = next(name for name in ("conv_in", "narrow", "from_pixels") if name in unet)
    found = unet | {first: wide(unet[first], old.patch**2)}
    if head := unet.get("pixels"):
        found["pixels"] = head | {"conv_in": wide(head["conv_in"], 1)}
    return found


def _check_same_weights(trained: Mapping[str, Any], asked: Mapping[str, Any], folder: str) -> None:
    before, now = flatten(trained), flatten(asked)
    if before.get("canvas", "") is None and "canvas" not in now:
        before = {n: x for n, x in before.items() if n not in ("canvas", "model/unet/in_channels")}
        now = {n: x for n, x in now.items() if not n.startswith("canvas/")}
        now.pop("model/unet/in_channels", None)
    differing = [
        f"{name.replace('/', '.')} is {now.get(name)!r}, but there {before.get(name)!r}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
        and not name.endswith("_drop")
        and FREE.isdisjoint({name.split("/")[0], name.split("/")[-1]})
        and not (name.split("/")[-1] in GROWING and before.get(name) == 0)
    ]
    if differing:
        more = len(differing) - _LISTED
        raise UserError(
            f"config.stage: is not the stage in config.init={folder!r}:"
            f" {'; '.join(differing[:_LISTED])}{f' and {more} more' if more > 0 else ''}; leave out"
            " what the folder says, or train from the beginning without config.init"
        )

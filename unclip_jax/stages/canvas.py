"""The canvas as a stage: z_i and z_t in, a small picture out, by regression alone.

It draws the mean of the pictures that its inputs may be of: the layout, without detail. A decoder
takes it as further channels beside x_t (`DecoderStage.canvas`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.common import checks
from unclip_jax.errors import wrong
from unclip_jax.metrics.vectors import Gather, alone, unit
from unclip_jax.models.canvas import Canvas, CanvasConfig
from unclip_jax.stages import normalisation
from unclip_jax.stages.base import Batch, Chunks, Loss, Stage
from unclip_jax.stages.conditioning import Condition, Field, Params, keep, z_i_field, z_t_field
from unclip_jax.stages.pixels import to_float

PENALTIES = ("squared", "charbonnier")
KNEE = 0.03  # where Charbonnier's penalty turns from a square to an absolute value

Z_T_WEIGHT = 2.0  # of z_t in first centres: z_i as a prior draws it says less of the picture

INPUTS = {"z_i": "normalisation", "z_t": "z_t_normalisation"}  # each with its normalisation


@dataclasses.dataclass(frozen=True)
class CanvasStage(Stage):
    """A canvas and how it is trained.

    Attributes:
        model: the perceptron.
        image_size: side of the pictures it learns from, averaged down to `model.size`.
        penalty: of a pixel that is off by d: "squared", d^2, or "charbonnier", sqrt(d^2 + 0.03^2),
            which lets go of the few pixels that nobody could foresee.
        input_noise: standard deviation of the noise on both normalised inputs in training.
        z_i_noise: of further noise, on the normalised z_i alone.
        z_i_drop: how often training drops z_i, which then is zero once normalised.
        z_t_drop: likewise of z_t.
    """

    kind: ClassVar[str] = "canvas"
    module: ClassVar[type] = Canvas
    preview: ClassVar[str] = "drawn"
    makes: ClassVar[tuple[str, str]] = ("images", "RGB, about in [-1, 1]")
    drops: ClassVar[tuple[str, ...]] = tuple(INPUTS)
    normalisations: ClassVar[tuple[str, ...]] = normalisation.NAMES
    dense: ClassVar[bool] = True

    model: CanvasConfig
    image_size: int = 64
    penalty: str = "squared"
    input_noise: float = 0.05
    z_i_noise: float = 0.0
    z_i_drop: float = 0.15
    z_t_drop: float = 0.15

    def __post_init__(self) -> None:
        """Check the fields that no part checks alone."""
        size = self.model.size
        if checks.count("stage.image_size", self.image_size) % size:
            expected = f"a multiple of stage.model.size = {size}"
            raise wrong("stage.image_size", self.image_size, expected)
        checks.choice("stage.penalty", self.penalty, PENALTIES)
        for name in ("input_noise", "z_i_noise"):
            checks.number(f"stage.{name}", getattr(self, name), least=0)
        self.check_drops(*self.drops)

    @property
    def conditions(self) -> dict[str, Field]:
        """CLIP's embeddings."""
        return z_i_field(self.model.embed_dim) | z_t_field(self.model.embed_dim)

    def data_power(self, normalised: str | None) -> None:
        """None: it denoises nothing."""

    def init(self, key: jax.Array) -> Params:
        """Random params, with the identity as both normalisations until they are replaced."""
        e = self.model.embed_dim
        constants = {name: normalisation.identity(e) for name in INPUTS.values()}
        return {"network": self.fresh(key, jnp.zeros((1, 2 * e)))} | constants

    def fit_constants(self, name: str, chunks: Chunks, gather: Gather = alone) -> Params:
        """Both normalisations of that name; and where there are centres, pairs to begin as them.

        These are spread evenly over the pictures, see `one_a_picture`; some more than once where
        those are fewer. UserError if there are no pairs at all.
        """
        e = self.model.embed_dim
        found: Params = {
            stats: normalisation.fit(name, e, (pair[i] for pair in chunks()), gather)
            for i, stats in enumerate(INPUTS.values())
        }
        if self.model.centres:
            pairs = one_a_picture(self.model.centres, chunks, gather)
            z_i, z_t = np.split(pairs, 2, axis=1)
            z_i = normalisation.normalise(found["normalisation"], z_i)
            z_t = normalisation.normalise(found["z_t_normalisation"], z_t)
            centres = unit(jnp.concatenate([z_i, Z_T_WEIGHT * z_t], axis=1))
            found["network"] = {"basis": {"centres": {"kernel": centres.T}}}
        return found

    def measures(self, name: str) -> list[Any] | None:
        """See the base."""
        centres = self.model.centres
        return [name, self.model.embed_dim, centres] if centres else super().measures(name)

    def draw(
        self,
        params: Params,
        cond: Condition,
        kept: Condition | None = None,
        noise: jax.Array | float = 0.0,
    ) -> jax.Array:
        """Pictures [b, size, size, 3], float32 and not clipped.

        Args:
            params: as `init` made them.
            cond: z_i and z_t, each [b, e], in CLIP's coordinates.
            kept: False where an input is dropped, bool [b], by its name; by default nothing is.
            noise: added to the normalised inputs, [b, 2 * e].
        """
        inputs = []
        for name, stats in INPUTS.items():
            z = normalisation.normalise(params[stats], cond[name])
            inputs.append(z if kept is None else jnp.where(kept[name][:, None], z, 0.0))
        return self.apply(params, jnp.concatenate(inputs, axis=-1) + noise)

    def loss(self, params: Params, batch: Batch, key: jax.Array) -> Loss:
        """Loss of {"image": uint8 [b, h, h, 3], "z_i": [b, e], "z_t": [b, e]}; its mean square."""
        noise_key, z_i_key, *drop_keys = jax.random.split(key, 4)
        cond = self.condition_of(batch)
        rows, e = cond["z_i"].shape
        drops = zip(self.drops, drop_keys, strict=True)
        kept = {name: keep(k, rows, getattr(self, f"{name}_drop")) for name, k in drops}
        cond["z_i"] = noised(z_i_key, cond["z_i"], params["normalisation"], self.z_i_noise)
        noise = self.input_noise * jax.random.normal(noise_key, (rows, 2 * e))
        off = self.draw(params, cond, kept, noise) - self.small(to_float(batch["image"]))
        squared = jnp.mean(off**2)
        if self.penalty == "squared":
            return squared, {}
        return jnp.mean(jnp.sqrt(off**2 + KNEE**2)), {"squared_error": squared}

    def small(self, images: jax.Array) -> jax.Array:
        """Pictures [b, h, h, 3] averaged down to [b, size, size, 3]."""
        s, times = self.model.size, self.image_size // self.model.size
        return images.reshape(-1, s, times, s, times, 3).mean((2, 4))

    def sample(
        self, params: Params, keys: jax.Array, cond: Condition, **settings: Any
    ) -> jax.Array:
        """What `draw` draws, as large as the pictures it learned from, [b, h, h, 3].

        Neither keys nor settings change anything.
        """
        return enlarge(self.draw(params, cond), self.image_size)


def enlarge(images: jax.Array, size: int) -> jax.Array:
    """Pictures [b, s, s, 3] to [b, size, size, 3], bilinear."""
    return jax.image.resize(images, (images.shape[0], size, size, 3), "linear")


def noised(
    key: jax.Array, z: jax.Array, stats: normalisation.Normalisation, size: float
) -> jax.Array:
    """z [b, e] in CLIP's coordinates with normal noise of that size on what it is normalised to."""
    return z + size * stats["std"][None] * jax.random.normal(key, z.shape) if size else z


def one_a_picture(count: int, chunks: Chunks, gather: Gather = alone) -> np.ndarray:
    """So many pairs of z_i and z_t, joined [count, 2 * e], spread evenly over all pictures.

    Of the captions of a picture, which follow each other, it is the first. No picture is taken
    twice before all are taken once. Of several processes each offers evenly spaced ones of its
    own, in proportion to how many it has. The arguments are those of `Stage.fit_constants`.

    Raises:
        UserError: no process has any pair.
    """

    def firsts() -> Iterator[np.ndarray]:
        before = None
        for z_i, z_t in chunks():
            same = np.all(z_i[1:] == z_i[:-1], axis=1)
            again = before is not None and np.array_equal(z_i[0], before)
            yield np.concatenate([z_i, z_t], axis=1)[~np.concatenate([[again], same])]
            before = z_i[-1]

    own = sum(map(len, firsts()))
    total = sum(int(told["pictures"]) for told in gather({"pictures": np.array(own)}))
    if not total:
        raise wrong("embeddings", 0, "at least 1, to begin centres as", "use a larger data set")
    offered = min(own, -(-count * own // total))  # together as many as asked for, or all there are
    wanted, begun, chosen = np.arange(offered) * own // max(offered, 1), 0, []
    for part in firsts():
        chosen.append(part[wanted[(wanted >= begun) & (wanted < begun + len(part))] - begun])
        begun += len(part)
    found = gather({"pairs": np.concatenate(chosen)} if chosen else {})
    every = np.concatenate([told["pairs"] for told in found if told])
    return every[np.arange(count) * len(every) // count]

"""What every stage says of itself, so that nobody else need know its kind.

`Stage` stands under all of them. It has no fields: a stage's settings are its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.common import checks
from unclip_jax.errors import UserError, wrong
from unclip_jax.metrics.vectors import Gather, alone
from unclip_jax.models import low_rank
from unclip_jax.models.canvas import CanvasConfig
from unclip_jax.models.unet import UNetConfig
from unclip_jax.parallel.axes import checked
from unclip_jax.stages import normalisation
from unclip_jax.stages.conditioning import (
    Field,
    Params,
    image_field,
    text_mask,
)

Batch = Mapping[str, jax.Array]
Loss = tuple[jax.Array, dict[str, jax.Array]]  # and what else is measured, by name
Chunks = Callable[[], Iterable[tuple[np.ndarray, np.ndarray]]]


@dataclasses.dataclass(frozen=True)
class JointLoss:
    """A loss, without noise, for which all rows of a batch matter to each, in two parts.

    So a batch can be read in parts and compared as a whole, see `training.step`.

    Attributes:
        rows: (params, batch) -> what the network makes of each row, arrays [b, ...], and arrays
            [b, ...] that the loss reads besides and no gradient passes.
        together: (params, both of these) -> the loss and what else is measured.
    """

    rows: Callable[[Params, Batch], tuple[Any, Any]]
    together: Callable[[Params, Any, Any], Loss]

    def __call__(self, params: Params, batch: Batch, key: jax.Array) -> Loss:
        """The loss of a batch; the key is of no use."""
        return self.together(params, *self.rows(params, batch))

    def of(self, change: Callable[[Params], Params]) -> JointLoss:
        """The loss of the params that `change` makes."""
        return JointLoss(
            lambda params, batch: self.rows(change(params), batch),
            lambda params, made, told: self.together(change(params), made, told),
        )


class Setting(NamedTuple):
    """A number that `sample` takes by name: the stage's own, and what it means."""

    default: float
    meaning: str


class Stage:
    """A network and how it trains and samples. A kind overrides what is not so for it.

    Attributes:
        model: the network's config.
        kind: its name in descriptions.
        module: makes the network of its config.
        figures: what is measured of it on held-out pairs, in order: `training.heldout.FIGURES`.
        preview: what is shown of it: `training.heldout.PREVIEWS`.
        makes: the name and the meaning of what `sample` returns; None where it draws nothing.
        conditions: what `sample` draws from.
        drops: the conditions that training drops, each as often as the field NAME_drop says.
        obeys: what the predictions of a guided diffusion follow, in a word.
        normalisations: those of z_i that training can begin with.
        dense: whether an example meets each weight once. Moving the weights then takes as long as
            the products, and a CPU's devices, each of which moves all of them, only slow it down.
        keeps_fingerprint: whether others name it by the fingerprint that its weights had at first.
        text_encoder: whose states of captions it reads: "clip", "t5", or "" for none.
        classes_field: the field of `model` that says how many classes it knows.
        sampling: how a diffusion is walked.
        analytic: whether the statistic of the analytic variance is in its params.
        last_steps: how many steps of sampling a network does that is never trained here.
        canvas: the perceptron whose picture it sees, see `DecoderStage`; None for none.
        autoencoder: what its pictures go through, see `DecoderStage`; None where it sees pixels.
    """

    model: Any
    kind: ClassVar[str]
    module: ClassVar[Callable[[Any], Any]]
    figures: ClassVar[tuple[str, ...]] = ("heldout_loss",)
    preview: ClassVar[str]
    makes: ClassVar[tuple[str, str] | None] = None
    conditions: ClassVar[Mapping[str, Field]] = {}
    drops: ClassVar[tuple[str, ...]] = ()
    obeys: ClassVar[str] = ""
    normalisations: ClassVar[tuple[str, ...]] = ()
    dense: ClassVar[bool] = False
    keeps_fingerprint: ClassVar[bool] = False
    text_encoder: ClassVar[str] = ""
    classes_field: ClassVar[str] = "num_classes"
    sampling = None
    analytic = False
    last_steps = 0
    canvas = None
    autoencoder = None

    @property
    def network(self) -> Any:
        """The Linen module."""
        return self.module(self.model)

    @property
    def unet(self) -> UNetConfig | None:
        """The config of its U-Net; None where it has none."""
        config = getattr(self.model, "unet", self.model)
        return config if isinstance(config, UNetConfig) else None

    @property
    def image_size(self) -> int:
        """Side, in pixels, of the images that it sees or makes; 0 for none."""
        return getattr(getattr(self.model, "unet", self.model), "image_size", 0)

    @property
    def picture_size(self) -> tuple[int, int]:
        """Height and width of the same: squares, unless it draws at another size."""
        return self.image_size, self.image_size

    @property
    def feature_rows(self) -> int:
        """Rows of the first feature map of its U-Net; 0 for none."""
        return self.unet.feature_size(0) if self.unet else 0

    @property
    def context(self) -> tuple[int, int]:
        """Context length of its captions, and vocabulary size of their tokens; 0 for none."""
        return getattr(self.model, "context_length", 0), getattr(self.model, "vocab_size", 0)

    @property
    def num_classes(self) -> int:
        """How many classes it knows."""
        return getattr(self.model, self.classes_field, 0)

    @property
    def settings(self) -> dict[str, Setting]:
        """What `sample` takes by name: the scale of guidance, where there is any."""
        scale = getattr(self, "guidance_scale", None)
        meaning = "classifier-free guidance; 1 is the conditional model"
        return {} if scale is None else {"guidance_scale": Setting(scale, meaning)}

    def guided_by(self, scale: float | None = None) -> dict[str, jax.Array]:
        """What `sample` is told of guidance: the scale, to be traced, or nothing.

        Nothing where there is no guidance, and of a scale of 1: `sample` then runs the network once
        for each example, not twice. That is another program, and all other scales share one.

        Args:
            scale: of any numeric type; None for the stage's own.

        Raises:
            UserError: it is no finite number.
        """
        scale = getattr(self, "guidance_scale", 1.0) if scale is None else scale
        scale = checks.number("guidance_scale", scale)
        guided = "guidance_scale" in self.settings and scale != 1
        return {"guidance_scale": jnp.float32(scale)} if guided else {}

    @property
    def learns(self) -> dict[str, Field]:
        """What training reads besides the conditions."""
        return image_field(self.image_size)

    @property
    def reads(self) -> frozenset[str]:
        """The entries of a batch that `loss` reads."""
        return frozenset(self.batch_spec(1))

    @property
    def reads_captions(self) -> bool:
        """Whether `loss` reads captions in any form; else pictures without one will do."""
        return self.reads_states or not self.reads.isdisjoint(("tokens", "text_states", "z_t"))

    def batch_spec(self, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
        """The batch of so many rows that `loss` reads."""
        fields = {**self.learns, **self.conditions}
        if "tokens" in fields:  # of which the mask follows
            fields.pop("text_mask", None)
        return {n: jax.ShapeDtypeStruct((rows, *f.shape), f.dtype) for n, f in fields.items()}

    @property
    def reads_states(self) -> bool:
        """Whether captions come as another network's states; else as tokens."""
        return bool(self.text_encoder)

    def fresh(self, key: jax.Array, *inputs: Any, **named: Any) -> Params:
        """Random weights of the network, which `inputs` show the shapes of what it reads."""
        return checked(self.network.init(key, *inputs, **named)["params"])

    def apply(self, params: Params, *inputs: Any, **named: Any) -> Any:
        """What the network makes of its inputs; `method` names another of its methods."""
        return low_rank.apply(self.network, params["network"], *inputs, **named)

    def condition_of(self, batch: Batch, mask: jax.Array | None = None) -> Any:
        """What `sample` takes of a batch; the rest of it is left out.

        Args:
            batch: the arrays that `conditions` names.
            mask: True on the captions' tokens [b, l]. None takes the batch's where captions come as
                states, and works it out of tokens.
        """
        if "text_mask" in self.conditions:
            if mask is None and self.reads_states:
                mask = batch["text_mask"]
            elif mask is None:
                mask = text_mask(batch["tokens"], self.context[1])
            batch = {**batch, "text_mask": mask}
        if missing := [name for name in self.conditions if batch.get(name) is None]:
            raise UserError(f"{self.kind}: reads {', '.join(missing)}, and none is given")
        return {name: batch[name] for name in self.conditions}

    def check_drops(self, *names: str) -> None:
        """Raise UserError unless the probabilities of dropping these are in [0, 1)."""
        for name in (f"{name}_drop" for name in names):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise wrong(f"stage.{name}", getattr(self, name), "0 <= p < 1")

    def guesses(self, rows: int) -> tuple[int, str] | None:
        """Among how many of what it guesses, in a batch of so many rows; None for no guesser."""

    def data_power(self, normalised: str | None) -> float | None:
        """E x_0^2 per dimension of what it denoises, or at most that; None where it is not known.

        `normalised` names the normalisation of z_i. Pixels lie in [-1, 1].
        """
        return 1.0

    def fit_constants(self, name: str, chunks: Chunks, gather: Gather = alone) -> Params:
        """The constants measured on embeddings: here z_i's normalisation of that name.

        `chunks` begins a pass over z_i [n, e] and z_t [n, e]; where each of several processes
        passes over its own, `gather` brings together what they found.
        """
        e = self.model.embed_dim
        return {"normalisation": normalisation.fit(name, e, (z_i for z_i, _ in chunks()), gather)}

    def measures(self, name: str) -> list[Any] | None:
        """What `fit_constants` depends on beside the data; None where it reads no data."""
        return [name, self.model.embed_dim] if name == "whiten" else None

    def with_canvas(self, canvas: CanvasConfig) -> Stage:
        """The stage with a canvas of that size; UserError unless it can have it."""
        raise UserError(f"config.canvas: given, but a {self.kind} takes no canvas; leave it out")

    def check_untrained(self) -> None:
        """Raise UserError unless it can be trained from random params."""
        if self.last_steps:
            raise UserError(
                f"config.stage.last_steps: got {self.last_steps}, expected 0 without config.init:"
                " the network of the last steps is never trained here, only taken over"
            )
        if self.analytic:
            raise UserError(
                "config.stage.analytic: got True, expected False without config.init: the"
                " statistic is measured on the trained stage, by unclip analytic"
                " --stage DIR"
            )

"""The autoregressive prior as a stage: p(z_i | y) code by code, section 2.2 of the paper.

z_i is projected onto its first principal components, each coordinate is quantised into one of
`buckets` codes, and a causal Transformer predicts the codes by falling eigenvalue. It also reads a
token for the dot product z_i . z_t: the true one in training; when sampling, one from the top half
of the distribution, which asks for a picture that its caption describes well.

What turns z_i into codes and back, the quantiser, is measured on the training set once. It lives
in the stage's params under the key `normalisation`, which the optimizer leaves alone and a
checkpoint carries along.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.common import checks
from unclip_jax.diffusion import guidance
from unclip_jax.diffusion.progress import Loop, whole
from unclip_jax.errors import UserError, wrong
from unclip_jax.metrics import pca
from unclip_jax.metrics.vectors import Gather, alone
from unclip_jax.models.ar_prior import ARPrior, ARPriorConfig
from unclip_jax.stages import normalisation
from unclip_jax.stages.base import Batch, Chunks, Loss, Stage
from unclip_jax.stages.conditioning import Condition, Params, blank, drop_caption, keep
from unclip_jax.stages.prior import OfCaptions

Quantiser = dict[str, jax.Array]

# The narrowest component that is kept, as a fraction of the widest's variance: what varies less
# than this is rounding of the float32 embeddings.
NARROWEST = 1e-12

DOTS = 2**22  # dot products that quantiles are taken of: 1 in 4000 of a fraction off, at most


def fit_quantiser(model: ARPriorConfig, chunks: Chunks, gather: Gather = alone) -> Quantiser:
    """Measure the quantiser on a data set that is read twice, in chunks.

    The first pass finds the principal components. The second finds the least and the greatest
    coordinate along each, between which its buckets lie evenly: no embedding of the data set is
    clipped, the error is half a bucket at most, and two numbers per dimension say it all.
    Quantiles would even out how often the codes occur, at the price of coarse tails, which is
    where the embeddings differ most. The dot product's buckets, though, are quantiles: its top
    half is to be the top half of the distribution, and each of its tokens must be learned. Of more
    than `DOTS` pairs they are those of evenly spaced ones, so many at most.

    Args:
        model: gives the numbers of dimensions and buckets.
        chunks: begins a pass over (z_i [n, e], z_t [n, e]) in CLIP's coordinates.
        gather: where each of several processes has some of the chunks, what brings them together.

    Returns:
        `mean` [e], `components` [k, e], `low` [k] (the lower edge of each first bucket), `step`
        [k] (the buckets' width) and `dot_edges` [dot_buckets - 1], all float32.

    Raises:
        UserError: fewer than two embeddings, or embeddings of fewer dimensions than `code_dims`.
    """
    moments = pca.Moments.together((pca.Moments.of(z_i) for z_i, _ in chunks()), gather)
    components = pca.fit(moments)
    widest = components.eigenvalues[0]
    varying = int(np.sum(components.eigenvalues > NARROWEST * widest))
    dims = model.code_dims
    if varying < dims:
        raise UserError(
            f"config.stage.model.code_dims: got {dims}, but the {moments.count} embeddings vary in"
            f" only {varying} dimensions; lower it, or use a larger data set"
        )
    low, high = np.full(dims, np.inf), np.full(dims, -np.inf)
    dots = _Dots()
    for z_i, z_t in chunks():
        coordinates = components.project(z_i, dims)
        low = np.minimum(low, coordinates.min(axis=0))
        high = np.maximum(high, coordinates.max(axis=0))
        dots.add(np.einsum("be,be->b", z_i, z_t))
    told = gather({"low": low, "high": high, "dots": dots.kept, "every": np.array(dots.every)})
    low = functools.reduce(np.minimum, (t["low"] for t in told))
    high = functools.reduce(np.maximum, (t["high"] for t in told))
    every = max(int(t["every"]) for t in told)
    alike = [t["dots"][:: every // int(t["every"])] for t in told]
    fractions = np.arange(1, model.dot_buckets) / model.dot_buckets
    measured = {
        "mean": components.mean,
        "components": components.components[:dims],
        "low": low,
        "step": (high - low) / model.buckets,
        "dot_edges": np.quantile(np.concatenate(alike), fractions),
    }
    return {name: jnp.asarray(value, jnp.float32) for name, value in measured.items()}


class _Dots:
    """Every k-th of numbers that come in parts, with the least power of two k that `DOTS` allow."""

    def __init__(self) -> None:
        self._parts, self.every, self._next = [np.zeros(0, np.float32)], 1, 0

    @property
    def kept(self) -> np.ndarray:
        """Those taken so far."""
        return np.concatenate(self._parts)

    def add(self, numbers: np.ndarray) -> None:
        """Take the next part."""
        self._parts.append(numbers[self._next :: self.every])
        self._next = (self._next - len(numbers)) % self.every
        while (count := sum(map(len, self._parts))) > DOTS:
            self._next += self.every * (count % 2)
            self._parts, self.every = [self.kept[::2]], 2 * self.every


def quantise(quantiser: Quantiser, z_i: jax.Array, buckets: int) -> jax.Array:
    """z_i [b, e] -> codes [b, k] int32 in 0..buckets-1; what lies outside takes the last bucket."""
    coordinates = jnp.einsum(
        "be,ke->bk", z_i - quantiser["mean"][None], quantiser["components"], precision="highest"
    )
    codes = jnp.floor((coordinates - quantiser["low"][None]) / quantiser["step"][None])
    return jnp.clip(codes, 0, buckets - 1).astype(jnp.int32)


def dequantise(quantiser: Quantiser, codes: jax.Array) -> jax.Array:
    """Codes [b, k] -> z_i [b, e], each coordinate in the middle of its bucket."""
    coordinates = quantiser["low"][None] + (codes + 0.5) * quantiser["step"][None]
    z_i = jnp.einsum("bk,ke->be", coordinates, quantiser["components"], precision="highest")
    return z_i + quantiser["mean"][None]


def dot_bucket(quantiser: Quantiser, z_i: jax.Array, z_t: jax.Array) -> jax.Array:
    """The bucket [b] int32 of the dot product of z_i [b, e] and z_t [b, e]."""
    dots = jnp.sum(z_i * z_t, axis=1)
    return jnp.searchsorted(quantiser["dot_edges"], dots, side="right").astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class ARPriorStage(OfCaptions, Stage):
    """The autoregressive prior: network and sampling settings together.

    Attributes:
        model: the causal Transformer's size, and those of the codes.
        caption_drop: how often training drops the caption (tokens and z_t together).
        unit_embeddings: whether CLIP's embeddings have length one here; a sample then has, too.
        guidance_scale: the classifier-free guidance that sampling uses unless told otherwise.
        temperature: of the codes' distribution; 0 takes the likeliest code each time.
        top_p: the codes are drawn from the likeliest ones that together hold this probability.
    """

    kind: ClassVar[str] = "ar_prior"
    module: ClassVar[type] = ARPrior
    figures: ClassVar[tuple[str, ...]] = ("prior_cosines", "heldout_loss", "codes")
    normalisations: ClassVar[tuple[str, ...]] = ("codes",)

    model: ARPriorConfig
    caption_drop: float = 0.1
    unit_embeddings: bool = True
    guidance_scale: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        """Check the fields that no part checks alone."""
        self.check_drops("caption")
        checks.number("stage.temperature", self.temperature, least=0)
        if not 0.0 < self.top_p <= 1.0:
            raise wrong("stage.top_p", self.top_p, "0 < p <= 1")

    def guesses(self, rows: int) -> tuple[int, str]:
        """Each code among the buckets."""
        return self.model.buckets, "a code"

    def fit_constants(self, name: str, chunks: Chunks, gather: Gather = alone) -> Params:
        """The quantiser of the data set, see `fit_quantiser`."""
        return {"normalisation": fit_quantiser(self.model, chunks, gather)}

    def measures(self, name: str) -> list[Any] | None:
        """The sizes of the codes."""
        m = self.model
        return [name, m.embed_dim, m.code_dims, m.buckets, m.dot_buckets]

    def init(self, key: jax.Array) -> Params:
        """Random params, with a quantiser of [-1, 1] along the axes until it is replaced."""
        m = self.model
        codes = jnp.zeros((1, m.code_dims), jnp.int32)
        network = self.fresh(key, codes, *self.text(blank(self.conditions)))
        quantiser = {
            "mean": jnp.zeros(m.embed_dim),
            "components": jnp.eye(m.code_dims, m.embed_dim),
            "low": jnp.full(m.code_dims, -1.0),
            "step": jnp.full(m.code_dims, 2.0 / m.buckets),
            "dot_edges": jnp.linspace(-1.0, 1.0, m.dot_buckets + 1)[1:-1],
        }
        return {"network": network, "normalisation": quantiser}

    def logits(
        self, params: Params, codes: jax.Array, dot: jax.Array, cond: Condition
    ) -> jax.Array:
        """Logits [b, k, buckets] of every code, given those before it.

        Args:
            params: as `init` made them.
            codes: the true codes [b, k].
            dot: bucket of the dot product [b].
            cond: as `condition` makes it.
        """
        latents = jnp.concatenate([self.model.buckets + dot[:, None], codes[:, :-1]], axis=1)
        return self.apply(params, latents, *self.text(cond))

    def loss(self, params: Params, batch: Batch, key: jax.Array) -> Loss:
        """Cross-entropy, in nats per code, of {"tokens": int32 [b,l], "z_i": [b,e], "z_t": [b,e]}.

        A dropped caption takes its tokens and z_t along; the dot product's token stays.
        """
        quantiser = params["normalisation"]
        codes = quantise(quantiser, batch["z_i"], self.model.buckets)
        dot = dot_bucket(quantiser, batch["z_i"], batch["z_t"])
        cond = drop_caption(self.condition_of(batch), keep(key, len(codes), self.caption_drop))
        logits = self.logits(params, codes, dot, cond)
        own = jnp.take_along_axis(logits, codes[:, :, None], axis=2)[:, :, 0]
        hits = (jnp.argmax(logits, axis=2) == codes).astype(jnp.float32)
        return jnp.mean(jax.nn.logsumexp(logits, axis=2) - own), {"accuracy": jnp.mean(hits)}

    def sample(
        self, params: Params, keys: jax.Array, cond: Condition, **settings: Any
    ) -> jax.Array:
        """z_i [b, e], in CLIP's coordinates, of codes drawn as `draw_codes` does."""
        codes = self.draw_codes(params, keys, cond, **settings)
        z_i = dequantise(params["normalisation"], codes)
        return normalisation.unit(z_i) if self.unit_embeddings else z_i

    def draw_codes(
        self,
        params: Params,
        keys: jax.Array,
        cond: Condition,
        *,
        guidance_scale: float | jax.Array = 1.0,
        null: Condition | None = None,
        loop: Loop = whole,
    ) -> jax.Array:
        """The codes [b, k] int32 of one embedding per condition, one after the other over a cache.

        Guidance acts on the logits: cond + (scale - 1) (cond - null), both having the same dot
        product and codes before them.

        Args:
            params: as `init` made them.
            keys: one typed key per example [b].
            cond: a condition of b rows.
            guidance_scale: classifier-free guidance; 1 is the conditional model. Scalar or [b],
                may be traced.
            null: what guidance leads away from; by default the condition without its caption.
            loop: what draws one code after the other, see `diffusion.progress`.
        """
        m = self.model
        asked, times = cond, 1
        if not guidance.changes_nothing(guidance_scale):
            null = self.null(params, cond) if null is None else null
            # Each example and its null lie side by side, so that a batch spread over devices stays.
            asked, times = jax.tree.map(guidance.interleave, cond, null), 2
        cache = self.apply(params, *self.text(asked), method="prefill")
        extra = jnp.reshape(jnp.asarray(guidance_scale, jnp.float32), (-1, 1)) - 1.0

        def step(i, carry):
            latent, cache, codes = carry
            rows, mask = jnp.repeat(latent, times), asked["text_mask"]
            logits, cache = self.apply(params, rows, i, cache, mask, method="step")
            if times == 2:
                conditional, unconditional = logits[::2], logits[1::2]
                logits = conditional + extra * (conditional - unconditional)
            code = self._draw(jax.vmap(lambda key: jax.random.fold_in(key, i))(keys), logits)
            return code, cache, codes.at[:, i].set(code)

        none = jnp.zeros((keys.shape[0], m.code_dims), jnp.int32)
        return loop(step, (self._first(keys), cache, none), m.code_dims)[2]

    def _first(self, keys: jax.Array) -> jax.Array:
        """The latent [b] of a dot product from the top half of the distribution."""
        half = self.model.dot_buckets // 2

        def draw(key: jax.Array) -> jax.Array:
            key = jax.random.fold_in(key, self.model.code_dims)  # code i draws with fold_in(key, i)
            return jax.random.randint(key, (), half, 2 * half)

        return self.model.buckets + jax.vmap(draw)(keys)

    def _draw(self, keys: jax.Array, logits: jax.Array) -> jax.Array:
        """A code [b] int32 from logits [b, buckets] by temperature and top_p."""
        if self.temperature == 0.0:
            return jnp.argmax(logits, axis=1).astype(jnp.int32)
        logits = logits / self.temperature
        if self.top_p < 1.0:
            logits = nucleus(logits, self.top_p)
        return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def nucleus(logits: jax.Array, top_p: float) -> jax.Array:
    """Logits [b, n], -inf but for the fewest that together hold the probability `top_p`.

    Nucleus sampling (Holtzman et al. 2020, arXiv 1904.09751). The likeliest one always stays, and
    so do all that tie with the last one kept.
    """
    falling = jnp.sort(logits, axis=1, descending=True)
    probabilities = jax.nn.softmax(falling, axis=1)
    before = jnp.cumsum(probabilities, axis=1) - probabilities
    last = jnp.min(jnp.where(before < top_p, falling, jnp.inf), axis=1, keepdims=True)
    return jnp.where(logits >= last, logits, -jnp.inf)

"""The autoregressive prior: codes, causality, the cached decoder, guidance, and its paper size."""

import dataclasses
import functools
import importlib
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests import tiny
from tests.networks import random_params, shapes, size
from unclip_jax import stages
from unclip_jax.common import config as settings
from unclip_jax.errors import UserError
from unclip_jax.metrics.pca import fit
from unclip_jax.metrics.prior_cosines import prior_cosines
from unclip_jax.metrics.vectors import Moments
from unclip_jax.models import presets
from unclip_jax.models.ar_prior import ARPrior, ARPriorConfig
from unclip_jax.pipeline.drawing import sample_stage
from unclip_jax.pipeline.unclip import UnCLIP
from unclip_jax.stages import ar_prior, normalisation
from unclip_jax.stages.conditioning import example_keys
from unclip_jax.training import prepare
from unclip_jax.weights import folder as model_folder
from unclip_jax.weights.trained import Part, load_part

MODEL = ARPriorConfig(
    embed_dim=tiny.DIM, width=16, layers=2, heads=2, context_length=tiny.CONTEXT,
    vocab_size=tiny.VOCAB, code_dims=5, buckets=16, dot_buckets=4,
)  # fmt: skip
STAGE = stages.ARPriorStage(model=MODEL, guidance_scale=1.5)


@pytest.fixture(scope="module")
def params():
    """Random params of a network that minds its tokens, a quantiser of random embeddings."""
    cond, (codes, _) = conditions(1), some_codes(1)
    network = random_params(STAGE.network, codes, cond["z_t"], cond["tokens"], cond["text_mask"])
    for table in ("tokens", "latents"):
        network[table] = jax.tree.map(lambda x: 20.0 * x, network[table])
    quantiser = ar_prior.fit_quantiser(MODEL, chunked(*gaussian_pairs(200)))
    return {"network": network, "normalisation": quantiser}


@functools.partial(jax.jit, static_argnames=("stage", "method"))
def call(stage, method, *args, **settings):
    """A method of a stage, compiled quickly."""
    return getattr(stage, method)(*args, **settings)


def conditions(n, seed=0):
    batch = tiny.batch(n, 16, seed=seed)
    return STAGE.condition(batch["tokens"], batch["z_t"])


def some_codes(n, seed=0):
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, MODEL.buckets, (n, MODEL.code_dims))
    return jnp.asarray(codes, jnp.int32), jnp.asarray(rng.integers(0, 4, n), jnp.int32)


def gaussian_pairs(n, seed=0):
    """z_i of falling variances off the origin, and z_t that correlate with them."""
    rng = np.random.default_rng(seed)
    z_i = rng.normal(size=(n, tiny.DIM)) * np.logspace(0, -3, tiny.DIM)[None] + 0.5
    z_t = z_i + rng.normal(size=z_i.shape)
    return z_i.astype(np.float32), z_t.astype(np.float32)


def chunked(*arrays, parts=7):
    return lambda: zip(*(np.array_split(array, parts) for array in arrays), strict=True)


# The codes


def test_codes_keep_what_the_components_keep_to_half_a_bucket():
    z_i, z_t = gaussian_pairs(3000)
    quantiser = ar_prior.fit_quantiser(MODEL, chunked(z_i, z_t))
    codes = ar_prior.quantise(quantiser, jnp.asarray(z_i), MODEL.buckets)
    assert codes.dtype == jnp.int32
    # The range is the data's: every first and last bucket is used, and nothing lies outside.
    np.testing.assert_array_equal(codes.min(axis=0), 0)
    np.testing.assert_array_equal(codes.max(axis=0), MODEL.buckets - 1)
    components = fit(Moments.of(z_i))
    exact = components.project(z_i, MODEL.code_dims)
    again = components.project(ar_prior.dequantise(quantiser, codes), MODEL.code_dims)
    half = np.ptp(exact, axis=0) / MODEL.buckets / 2
    assert np.all(np.abs(again - exact) <= half[None] * (1 + 1e-3) + 1e-6)
    # A uniform error within a bucket has a twelfth of its square as variance.
    np.testing.assert_allclose(np.mean((again - exact) ** 2, axis=0), half**2 / 3, rtol=0.1)


def test_the_quantiser_does_not_depend_on_the_chunks():
    pairs = gaussian_pairs(200)
    one, many = (ar_prior.fit_quantiser(MODEL, chunked(*pairs, parts=n)) for n in (1, 50))
    for name, value in one.items():
        assert value.dtype == jnp.float32
        np.testing.assert_allclose(many[name], value, rtol=1e-4, atol=1e-6)


def test_quantising_is_the_inverse_of_dequantising():
    quantiser = ar_prior.fit_quantiser(MODEL, chunked(*gaussian_pairs(200)))
    codes, _ = some_codes(100)
    again = ar_prior.quantise(quantiser, ar_prior.dequantise(quantiser, codes), MODEL.buckets)
    np.testing.assert_array_equal(again, codes)


def test_what_lies_outside_takes_the_last_bucket():
    quantiser = ar_prior.fit_quantiser(MODEL, chunked(*gaussian_pairs(200)))
    far = 1e6 * quantiser["components"][:1]
    assert ar_prior.quantise(quantiser, far, MODEL.buckets)[0, 0] == MODEL.buckets - 1
    assert ar_prior.quantise(quantiser, -far, MODEL.buckets)[0, 0] == 0


def test_every_bucket_of_the_dot_product_is_as_frequent():
    z_i, z_t = gaussian_pairs(4000)
    quantiser = ar_prior.fit_quantiser(MODEL, chunked(z_i, z_t))
    buckets = ar_prior.dot_bucket(quantiser, jnp.asarray(z_i), jnp.asarray(z_t))
    np.testing.assert_allclose(np.bincount(buckets), 1000, atol=5)
    dots = np.sum(z_i * z_t, axis=1)
    assert dots[np.asarray(buckets) == 2].min() >= np.median(dots) - 1e-5


@pytest.mark.parametrize(
    ("z_i", "message"),
    [
        (gaussian_pairs(4)[0], "code_dims: got 5, but the 4 embeddings vary in only 3"),
        (np.full((9, tiny.DIM), 0.1, np.float32), "collapsed"),
        (np.full((9, tiny.DIM), np.inf, np.float32), "not finite"),
    ],
)
def test_embeddings_that_make_no_codes(z_i, message):
    with pytest.raises(UserError, match=message):
        ar_prior.fit_quantiser(MODEL, chunked(z_i, z_i, parts=1))


# The network


def test_the_logits_of_a_code_depend_on_what_comes_before_it_alone(params):
    cond, (codes, dot) = conditions(2), some_codes(2)
    logits = call(STAGE, "logits", params, codes, dot, cond)
    assert logits.shape == (2, MODEL.code_dims, MODEL.buckets) and logits.dtype == jnp.float32
    for i in range(MODEL.code_dims):
        changed = codes.at[:, i].set((codes[:, i] + 5) % MODEL.buckets)
        other = call(STAGE, "logits", params, changed, dot, cond)
        np.testing.assert_array_equal(other[:, : i + 1], logits[:, : i + 1])
        if i + 1 < MODEL.code_dims:
            assert np.abs(other[:, i + 1] - logits[:, i + 1]).max() > 1e-3
    other = call(STAGE, "logits", params, codes, (dot + 1) % 4, cond)
    assert np.abs(other - logits).max(axis=2).min() > 1e-3  # every code hears the dot product


def test_a_dropped_caption_is_not_heard_and_padding_never_is(params):
    codes, dot = some_codes(2)
    first, second = conditions(2), conditions(2, seed=9)
    heard = [call(STAGE, "logits", params, codes, dot, c) for c in (first, second)]
    assert np.abs(heard[0] - heard[1]).max() > 1e-2
    nulls = [STAGE.null(params, c) for c in (first, second)]
    dropped = [call(STAGE, "logits", params, codes, dot, c) for c in nulls]
    np.testing.assert_allclose(*dropped, atol=1e-6)
    padded = first | {"tokens": jnp.where(first["text_mask"], first["tokens"], 7)}
    other = call(STAGE, "logits", params, codes, dot, padded)
    np.testing.assert_allclose(other, heard[0], atol=1e-6)


def test_decoding_with_the_cache_equals_the_whole_forward_pass(params):
    cond, (codes, dot) = conditions(3), some_codes(3)
    cond["text_mask"] = cond["text_mask"].at[2].set(False)  # one caption is dropped
    expected = call(STAGE, "logits", params, codes, dot, cond)
    network, variables = STAGE.network, {"params": params["network"]}

    @jax.jit
    def decode(codes):
        cache = network.apply(
            variables, cond["z_t"], cond["tokens"], cond["text_mask"], method=network.prefill
        )
        latents = jnp.concatenate([MODEL.buckets + dot[:, None], codes[:, :-1]], axis=1)

        def step(cache, inputs):
            latent, i = inputs
            logits, cache = network.apply(
                variables, latent, i, cache, cond["text_mask"], method=network.step
            )
            return cache, logits

        return jax.lax.scan(step, cache, (latents.T, jnp.arange(MODEL.code_dims)))[1]

    found = jnp.moveaxis(decode(codes), 0, 1)
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_bfloat16_and_recomputation_change_rounding_only(params):
    batch = tiny.batch(4, 16)

    def loss_and_gradient(stage):
        def loss(network):
            return stage.loss(params | {"network": network}, batch, jax.random.key(0))[0]

        return jax.jit(jax.value_and_grad(loss))(params["network"])

    exact, gradient = loss_and_gradient(STAGE)
    full = dataclasses.replace(STAGE, model=dataclasses.replace(MODEL, remat="full"))
    recomputed, same = loss_and_gradient(full)
    assert recomputed == pytest.approx(float(exact), rel=1e-6)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(same), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
    assert all(np.any(np.asarray(g)) for g in jax.tree.leaves(gradient))  # every weight learns
    half = dataclasses.replace(STAGE, model=dataclasses.replace(MODEL, dtype="bfloat16"))
    rounded, _ = call(half, "loss", params, batch, jax.random.key(0))
    assert float(rounded) == pytest.approx(float(exact), rel=0.05)


# The loss


def test_a_network_that_says_nothing_pays_the_logarithm_of_the_buckets(params):
    silent = params | {"network": jax.tree.map(jnp.zeros_like, params["network"])}
    loss, _ = call(STAGE, "loss", silent, tiny.batch(4, 16), jax.random.key(0))
    assert float(loss) == pytest.approx(math.log(MODEL.buckets), rel=1e-6)


def test_the_loss_drops_captions_by_its_key(params):
    batch = tiny.batch(64, 16)
    always = dataclasses.replace(STAGE, caption_drop=0.0)
    kept = [float(call(always, "loss", params, batch, jax.random.key(i))[0]) for i in (0, 1)]
    dropped = [float(call(STAGE, "loss", params, batch, jax.random.key(i))[0]) for i in (0, 1)]
    assert kept[0] == kept[1]
    assert dropped[0] != dropped[1]


def test_the_quantiser_gets_no_gradient(params):
    def loss(quantiser):
        tree = params | {"normalisation": quantiser}
        return STAGE.loss(tree, tiny.batch(4, 16), jax.random.key(0))[0]

    gradient = jax.jit(jax.grad(loss))(params["normalisation"])
    assert not any(np.any(np.asarray(g)) for g in jax.tree.leaves(gradient))


@pytest.mark.slow
def test_it_learns_what_the_caption_says():
    """Sixteen captions, eight noisy pictures of each: samples lie where the caption's do."""
    rng = np.random.default_rng(0)
    z_t, centres = rng.normal(size=(2, 16, tiny.DIM)).astype(np.float32)
    z_t, centres = (np.asarray(normalisation.unit(jnp.asarray(z))) for z in (z_t, centres))
    z_i = np.repeat(centres, 8, axis=0) + 0.1 * rng.normal(size=(128, tiny.DIM))
    pairs = z_i.astype(np.float32), np.repeat(z_t, 8, axis=0)
    model = dataclasses.replace(MODEL, width=32, layers=1, code_dims=7, buckets=12)
    stage = stages.ARPriorStage(model=model)
    quantiser = ar_prior.fit_quantiser(model, chunked(*pairs))
    captions = tiny.batch(16, 16)["tokens"]
    batch = {"tokens": jnp.repeat(captions, 8, axis=0), "z_i": pairs[0], "z_t": pairs[1]}

    optimizer = optax.adam(5e-3)

    @jax.jit
    def step(network, opt_state, key):
        def loss(network):
            return stage.loss({"network": network, "normalisation": quantiser}, batch, key)[0]

        value, gradient = jax.value_and_grad(loss)(network)
        updates, opt_state = optimizer.update(gradient, opt_state)
        return optax.apply_updates(network, updates), opt_state, value

    network = jax.jit(stage.init)(jax.random.key(0))["network"]
    opt_state, losses = optimizer.init(network), []
    for i in range(100):
        network, opt_state, loss = step(network, opt_state, jax.random.key(i))
        losses.append(float(loss))
    assert losses[0] > 0.9 * math.log(12) and losses[-1] < losses[0] - 0.8

    keys = example_keys(jax.random.key(1), 16)
    cond = stage.condition(captions, jnp.asarray(z_t))
    drawn = call(stage, "sample", {"network": network, "normalisation": quantiser}, keys, cond)
    figures = prior_cosines(np.asarray(drawn), centres, z_t)
    assert figures["cosine_z_i"] > 0.6
    assert abs(figures["cosine_z_i_shuffled"]) < 0.2


# Sampling


def codes_of(params, keys, cond, stage=STAGE, **options):
    return np.asarray(call(stage, "draw_codes", params, keys, cond, **options))


def test_a_sample_depends_on_its_own_key_and_caption_alone(params):
    cond, keys = conditions(4), example_keys(jax.random.key(1), 4)
    together = codes_of(params, keys, cond, guidance_scale=2.0)
    row = jax.tree.map(lambda x: x[2:3], cond)
    alone = codes_of(params, keys[2:3], row, guidance_scale=2.0)
    np.testing.assert_array_equal(together[2:3], alone)
    assert np.any(codes_of(params, keys[3:4], row, guidance_scale=2.0) != alone)


def test_samples_are_unit_vectors_that_the_codes_say(params):
    cond, keys = conditions(3), example_keys(jax.random.key(1), 3)
    z_i = call(STAGE, "sample", params, keys, cond)
    np.testing.assert_allclose(jnp.linalg.norm(z_i, axis=1), 1.0, rtol=1e-5)
    codes = jnp.asarray(codes_of(params, keys, cond))
    said = ar_prior.dequantise(params["normalisation"], codes)
    np.testing.assert_allclose(z_i, normalisation.unit(said), atol=1e-6)
    raw = dataclasses.replace(STAGE, unit_embeddings=False)
    np.testing.assert_allclose(call(raw, "sample", params, keys, cond), said, atol=1e-6)


def test_codes_are_drawn_with_the_probabilities_that_the_network_gives(params):
    """4000 draws of the first code against the mixture over the two upper dot products."""
    n = 4000
    cond = jax.tree.map(lambda x: jnp.repeat(x, n, axis=0), conditions(1))
    drawn = codes_of(params, example_keys(jax.random.key(2), n), cond)
    both = jax.tree.map(lambda x: x[:2], cond)
    logits = call(STAGE, "logits", params, some_codes(2)[0], jnp.asarray([2, 3]), both)
    expected = np.asarray(jax.nn.softmax(logits[:, 0]).mean(axis=0), np.float64)
    found = np.bincount(drawn[:, 0], minlength=MODEL.buckets) / n
    assert np.all(np.abs(found - expected) < 5 * np.sqrt(expected * (1 - expected) / n) + 1e-3)


def greedy_by_hand(params, cond, dot, scale):
    """One code after the other from the uncached forward pass, guided on the logits."""
    codes = jnp.zeros((len(dot), MODEL.code_dims), jnp.int32)
    null = STAGE.null(params, cond)
    for i in range(MODEL.code_dims):
        said, unsaid = (call(STAGE, "logits", params, codes, dot, c) for c in (cond, null))
        guided = unsaid[:, i] + scale * (said[:, i] - unsaid[:, i])
        codes = codes.at[:, i].set(jnp.argmax(guided, axis=1))
    return np.asarray(codes)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_greedy_sampling_is_the_guided_argmax_of_the_whole_forward_pass(params, scale):
    greedy = dataclasses.replace(STAGE, temperature=0.0)
    cond, keys = conditions(8), example_keys(jax.random.key(1), 8)
    found = codes_of(params, keys, cond, greedy, guidance_scale=scale)
    by_hand = [greedy_by_hand(params, cond, jnp.full(8, dot, jnp.int32), scale) for dot in range(4)]
    for row, code in enumerate(found):
        # Which of the upper two dot products was drawn is the key's secret.
        assert any(np.array_equal(code, by_hand[dot][row]) for dot in (2, 3))
    assert not np.array_equal(by_hand[0], by_hand[3])


def test_guidance_of_one_ignores_the_null_and_may_differ_by_example(params):
    cond, keys = conditions(2), example_keys(jax.random.key(1), 2)
    plain = codes_of(params, keys, cond, guidance_scale=1.0)
    np.testing.assert_array_equal(
        codes_of(params, keys, cond, guidance_scale=1.0, null=conditions(2, seed=9)), plain
    )
    strong = codes_of(params, keys, cond, guidance_scale=6.0)
    mixed = codes_of(params, keys, cond, guidance_scale=jnp.asarray([1.0, 6.0]))
    np.testing.assert_array_equal(mixed, np.stack([plain[0], strong[1]]))
    assert np.any(strong != plain)


def test_another_guidance_scale_compiles_nothing_and_progress_counts_the_codes(params):
    cond, keys, before = conditions(2), example_keys(jax.random.key(1), 2), None
    for scale in (1.0, 2.5):
        seen, settings = [], {"guidance_scale": jnp.float32(scale)}
        z_i = sample_stage(
            STAGE,
            params,
            keys,
            cond,
            progress=lambda *step, seen=seen: seen.append(step),
            **settings,
        )
        assert before in (None, sample_stage.programs())
        before = sample_stage.programs()
        assert seen[0] == (1, 5) and seen[-1] == (5, 5) and seen == sorted(set(seen))
        np.testing.assert_allclose(z_i, STAGE.sample(params, keys, cond, **settings), atol=1e-6)


def test_the_nucleus_is_the_fewest_codes_that_hold_the_probability():
    logits = jnp.log(jnp.asarray([[0.1, 0.4, 0.2, 0.3], [0.97, 0.01, 0.01, 0.01]]))
    for top_p, kept in (
        (1e-6, [[0, 1, 0, 0], [1, 0, 0, 0]]),
        (0.45, [[0, 1, 0, 1], [1, 0, 0, 0]]),
        (0.85, [[0, 1, 1, 1], [1, 0, 0, 0]]),
        (0.95, [[1, 1, 1, 1], [1, 0, 0, 0]]),
    ):
        np.testing.assert_array_equal(
            jnp.isfinite(ar_prior.nucleus(logits, top_p)), np.asarray(kept, bool)
        )


def test_a_tiny_nucleus_and_a_tiny_temperature_are_greedy(params):
    cond, keys = conditions(4), example_keys(jax.random.key(1), 4)
    greedy, narrow, cold = (
        codes_of(params, keys, cond, dataclasses.replace(STAGE, **change))
        for change in ({"temperature": 0.0}, {"top_p": 1e-6}, {"temperature": 1e-6})
    )
    np.testing.assert_array_equal(greedy, narrow)
    np.testing.assert_array_equal(greedy, cold)


# The whole model


def test_a_model_may_have_it_in_place_of_the_diffusion_prior(params, tmp_path):
    """Saved, found by its kind, loaded, and drawn from; a sample hangs on seed and caption."""
    about = {"stage": stages.describe(STAGE)}
    model_folder.save_stage(tmp_path / "prior", params=params, description=about)
    prior = load_part(tmp_path / "prior", kind="ar_prior")
    assert prior.stage == STAGE
    images, tokens = jnp.zeros((1, 16, 16, 3)), jnp.zeros((1, tiny.CONTEXT), jnp.int32)
    clip = {"network": random_params(tiny.CLIP.network, images, tokens)}
    nothing = Part(tiny.DECODER, {}, {})  # drawing embeddings takes no decoder
    model, loaded = (
        UnCLIP(clip=Part(tiny.CLIP, clip, {}), prior=part, decoder=nothing)
        for part in (Part(STAGE, params, about), prior)
    )
    keys = example_keys(jax.random.key(0), 2)
    z_i = model.sample_prior(keys, ["a dog", "a cat"], guidance_scale=2.0)
    again = loaded.sample_prior(keys, ["a dog", "a cat"], guidance_scale=2.0)
    np.testing.assert_array_equal(z_i, again)
    np.testing.assert_allclose(jnp.linalg.norm(z_i, axis=1), 1.0, rtol=1e-5)
    others = model.sample_prior(keys, ["a dog", "a red apple"], guidance_scale=2.0)
    np.testing.assert_allclose(others[0], z_i[0], atol=1e-6)


# Settings


def test_describe_and_build_are_inverse():
    again = stages.build(stages.describe(STAGE))
    assert again == STAGE and hash(again) == hash(STAGE)
    assert stages.describe(STAGE)["kind"] == "ar_prior"


def normalised(name, stage):
    """Begin to train a stage with a normalisation of its embeddings."""
    given = settings.build(
        prepare.Settings,
        {"stage": stages.describe(stage), "data": {}, "train": {}, "normalisation": name},
    )
    prepare.check_from_the_beginning(given, stage)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: dataclasses.replace(STAGE, caption_drop=1.0), "stage.caption_drop: got 1.0"),
        (lambda: dataclasses.replace(STAGE, temperature=-1.0), "stage.temperature: got -1.0"),
        (lambda: dataclasses.replace(STAGE, top_p=0.0), "stage.top_p: got 0.0"),
        (
            lambda: dataclasses.replace(MODEL, code_dims=9),
            "code_dims: got 9, .*at most embed_dim = 8",
        ),
        (
            lambda: dataclasses.replace(MODEL, dot_buckets=5),
            "dot_buckets: got 5, .*even",
        ),
        (
            lambda: dataclasses.replace(MODEL, heads=3),
            "width: got 16, .*multiple of heads = 3",
        ),
        (lambda: normalised("whiten", STAGE), "'whiten', expected one of codes"),
        (lambda: normalised("codes", tiny.PRIOR), "'codes', expected one of whiten"),
    ],
)
def test_wrong_settings_are_named(change, message):
    with pytest.raises(UserError, match=message):
        change()


def load(monkeypatch, name):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent))
    config = importlib.import_module("configs." + name.replace("/", ".")).get_config()
    given = settings.build(prepare.Settings, config)
    return given, stages.build(given.stage)


def test_paper_settings(monkeypatch):
    """Table 3 of the paper, its first column."""
    given, stage = load(monkeypatch, "paper/ar_prior")
    train, model = given.train, stage.model
    found = (
        train.batch_size, train.steps, train.learning_rate, train.b1, train.b2, train.eps,
        train.ema_decay, train.weight_decay, stage.caption_drop,
    )  # fmt: skip
    assert found == (4096, 1_000_000, 1.6e-4, 0.9, 0.91, 1e-10, 0.999, 4e-2, 0.1)
    assert (model.width, model.layers, model.heads) == (1664, 24, 26)
    assert (model.embed_dim, model.code_dims, model.buckets) == (1024, 319, 1024)
    assert given.normalisation == "codes"


def test_paper_size():
    """888 M parameters against "1 B".

    The table's latent decoder alone, 24 blocks of 12 * 1664^2 parameters, is 0.80 B, and tokens,
    codes and z_t bring it to 0.89 B. The text Transformer of the same column, 2048 wide and 24
    deep, has 1.21 B more: with one of its own the prior would have 2.1 B, so that here, as in the
    diffusion prior, the caption's tokens go straight into the one Transformer. Its context of 384
    is then 64 of the caption, z_t, the dot product and all of the 319 codes but the last.
    """
    c = presets.PAPER_AR_PRIOR
    text, mask = jnp.zeros((1, 64), jnp.int32), jnp.ones((1, 64), bool)
    tree = shapes(ARPrior(c), text[:, :1].repeat(319, axis=1), jnp.zeros((1, 1024)), text, mask)
    count = size(tree)
    d = 1664
    by_hand = 24 * 12 * d**2 + 49408 * d + 2048 * d + 1024 * d + 1024 * d + 384 * d
    assert abs(count / by_hand - 1) < 0.01
    assert tree["positions"].shape == (384, d)
    assert abs(count - 1e9) < abs(count + 24 * 12 * 2048**2 - 1e9)


def test_emoji_keeps_the_papers_share_of_dimensions(monkeypatch):
    _, stage = load(monkeypatch, "emoji/ar_prior")
    paper = presets.PAPER_AR_PRIOR
    assert stage.model.code_dims == round(stage.model.embed_dim * paper.code_dims / paper.embed_dim)

"""The Transformer over patches: against diffusers' DiT, its variants, and in a decoder."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from unclip_jax import stages
from unclip_jax.diffusion import Diffusion, Sampling
from unclip_jax.errors import UserError
from unclip_jax.models.decoder import DecoderConfig
from unclip_jax.models.dit import DiT, DiTConfig, positions, turned
from unclip_jax.models.text_encoder import TextConfig
from unclip_jax.parallel import axes
from unclip_jax.stages import DecoderStage

TINY = DiTConfig(image_size=12, patch=2, width=24, layers=2, heads=3)
JIT = replace(TINY, norm="rms", mlp="swiglu", qk_norm=True, rope=True, bottleneck=8)
VARIANTS = {
    "dit": TINY,
    "shared": replace(TINY, modulation="shared"),
    "jit": JIT,
    "told": replace(JIT, context_dim=10, pixel_channels=4, in_channels=6),
}


def inputs(config, rows=2):
    keys = jax.random.split(jax.random.key(1), 4)
    x = jax.random.normal(keys[0], (rows, config.image_size, config.image_size, config.in_channels))
    t = jnp.arange(rows) * 300 + 7
    emb = jax.random.normal(keys[1], (rows, config.width))
    context = mask = None
    if config.context_dim:
        context = jax.random.normal(keys[2], (rows, 5, config.context_dim))
        mask = jnp.arange(5)[None] < jnp.array([[3], [5]])
    return x, t, emb, context, mask


def randomised(params, key=0):
    """Params without the zeros that many begin as, so that every one of them counts."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(key), len(leaves))
    drawn = [
        leaf + 0.2 * jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(tree, drawn)


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request):
    config = VARIANTS[request.param]
    params = jax.jit(DiT(config).init)(jax.random.key(0), *inputs(config))["params"]
    return config, params, randomised(params)


def test_every_param_has_axes_and_counts(variant):
    config, _, params = variant
    axes.checked(params)

    def loss(params):
        return jnp.sum(DiT(config).apply({"params": params}, *inputs(config)) ** 2)

    grads = traverse_util.flatten_dict(jax.jit(jax.grad(loss))(params), sep="/")
    still = [name for name, g in grads.items() if not np.any(g)]
    assert not still


def test_fresh_it_predicts_zero(variant):
    config, fresh, _ = variant
    assert not np.any(jax.jit(DiT(config).apply)({"params": fresh}, *inputs(config)))


def test_masked_context_is_not_read(variant):
    config, _, params = variant
    if not config.context_dim:
        pytest.skip("without a context")
    x, t, emb, context, mask = inputs(config)
    apply = jax.jit(DiT(config).apply)
    one = apply({"params": params}, x, t, emb, context, mask)
    other = apply({"params": params}, x, t, emb, context.at[0, 3:].add(9.0), mask)
    seen = apply({"params": params}, x, t, emb, context.at[0, 0].add(9.0), mask)
    np.testing.assert_array_equal(one, other)
    assert np.abs(one - seen).max() > 1e-3


def test_rope_depends_on_the_distance_alone():
    """A turned query's product with a turned key, one patch further in both directions."""
    side, k = 5, 8
    q, key = jax.random.normal(jax.random.key(0), (2, k))
    everywhere = [jnp.broadcast_to(v, (1, 1, side * side, k)) for v in (q, key)]
    q, key = (turned(v, side)[0, 0].reshape(side, side, k) for v in everywhere)
    products = jnp.einsum("rck,RCk->rcRC", q, key)
    np.testing.assert_allclose(products[0, 1, 2, 2], products[1, 2, 3, 3], rtol=1e-5)
    np.testing.assert_allclose(products[3, 0, 1, 4], products[2, 0, 0, 4], rtol=1e-5)
    assert abs(products[0, 0, 0, 1] - products[0, 0, 1, 0]) > 1e-3


def test_as_diffusers_has_it():
    """The same output as DiTTransformer2DModel's with the same weights."""
    torch = pytest.importorskip("torch")
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    theirs = DiTTransformer2DModel(
        num_attention_heads=3,
        attention_head_dim=8,
        in_channels=3,
        out_channels=3,
        num_layers=2,
        attention_bias=True,
        sample_size=12,
        patch_size=2,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=10,
        norm_eps=1e-6,
    ).eval()
    with torch.no_grad():
        for value in theirs.parameters():
            value.add_(0.1 * torch.randn_like(value))
    first = theirs.transformer_blocks[0].norm1.emb
    for block in theirs.transformer_blocks:
        block.norm1.emb = first  # one embedding of time and class for all, as in DiT itself
    first.time_proj.downscale_freq_shift = 0

    w = {name: value.detach().numpy() for name, value in theirs.state_dict().items()}

    def dense(name):
        return {"kernel": w[f"{name}.weight"].T, "bias": w[f"{name}.bias"]}

    def block(i):
        at = f"transformer_blocks.{i}."
        q, k, v = (dense(f"{at}attn1.to_{x}") for x in "qkv")
        return {
            "modulation": dense(f"{at}norm1.linear"),
            "qkv": {
                "kernel": np.stack([x["kernel"].reshape(24, 3, 8) for x in (q, k, v)], 1),
                "bias": np.stack([x["bias"].reshape(3, 8) for x in (q, k, v)]),
            },
            "out": {
                "kernel": w[f"{at}attn1.to_out.0.weight"].T.reshape(3, 8, 24),
                "bias": w[f"{at}attn1.to_out.0.bias"],
            },
            "up": dense(f"{at}ff.net.0.proj"),
            "down": dense(f"{at}ff.net.2"),
        }

    embedder = "transformer_blocks.0.norm1.emb."
    patches = w["pos_embed.proj.weight"].transpose(2, 3, 1, 0).reshape(-1, 24)
    params = {
        "time": {f"linear_{i}": dense(f"{embedder}timestep_embedder.linear_{i}") for i in (1, 2)},
        "from_pixels": {"kernel": patches, "bias": w["pos_embed.proj.bias"]},
        "blocks": jax.tree.map(lambda *x: np.stack(x), block(0), block(1)),
        "modulation_out": dense("proj_out_1"),
        "to_pixels": dense("proj_out_2"),
    }
    x = np.random.default_rng(0).standard_normal((2, 12, 12, 3)).astype(np.float32)
    labels, t = np.array([3, 8]), np.array([17, 900])
    emb = w[f"{embedder}class_embedder.embedding_table.weight"][labels]
    ours = jax.jit(DiT(TINY).apply)({"params": params}, x, t, emb)
    with torch.no_grad():
        out = theirs(
            torch.from_numpy(x.transpose(0, 3, 1, 2)), torch.from_numpy(t), torch.from_numpy(labels)
        ).sample
    want = out.numpy().transpose(0, 2, 3, 1)
    assert np.abs(ours - want).max() < 1e-5 * np.abs(want).max()


def test_positions_are_those_of_a_square():
    found = positions(3, 8).reshape(3, 3, 8)
    np.testing.assert_array_equal(found[0, :, :4], found[2, :, :4])  # the column
    np.testing.assert_array_equal(found[:, 0, 4:], found[:, 2, 4:])  # the row
    np.testing.assert_allclose(found[1, 2, :2], np.sin([2.0, 2.0 / 100]), rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"patch": 5}, "DiTConfig.image_size: got 12, expected a multiple of patch = 5"),
        ({"heads": 5}, "DiTConfig.width: got 24"),
        ({"width": 18, "heads": 3}, "DiTConfig.width: got 18, expected a multiple of 4"),
        ({"heads": 4, "rope": True}, "DiTConfig.rope: got True, expected False, as a head has 6"),
        ({"mlp": "relu"}, "DiTConfig.mlp: got 'relu'"),
        ({"layers": 0}, "DiTConfig.layers: got 0"),
        ({"mlp_ratio": 0.04}, "DiTConfig.mlp_ratio: got 0.04, expected more, for a perceptron of"),
        ({"mlp_ratio": 0.05, "mlp": "swiglu"}, "DiTConfig.mlp_ratio: got 0.05, expected more"),
    ],
)
def test_a_config_that_makes_no_network(changes, words):
    with pytest.raises(UserError, match=words):
        replace(TINY, **changes)


def decoder(prediction="x_0"):
    return DecoderStage(
        model=DecoderConfig(
            unet=replace(JIT, context_dim=16, pixel_channels=4, out_channels=3),
            text=TextConfig(vocab_size=20, context_length=6, width=16, layers=1, heads=2),
            embed_dim=8,
        ),
        diffusion=Diffusion(prediction=prediction, variance="fixed_small"),
        sampling=Sampling(spacing="2"),
    )


def test_a_decoder_of_it_trains_and_draws():
    stage = decoder()
    params = jax.jit(stage.init)(jax.random.key(0))
    cond = {
        "z_i": jax.random.normal(jax.random.key(1), (2, 8)),
        "tokens": jnp.ones((2, 6), jnp.int32),
    }
    batch = cond | {"image": jnp.full((2, 12, 12, 3), 200, jnp.uint8)}
    loss, grads = jax.jit(jax.value_and_grad(lambda p: stage.loss(p, batch, jax.random.key(2))[0]))(
        params
    )
    assert np.isfinite(loss)
    assert np.any(grads["network"]["unet"]["to_pixels"]["kernel"])
    told = stage.condition(cond["tokens"], cond["z_i"])
    drawn = jax.jit(stage.sample)(params, jax.random.split(jax.random.key(3), 2), told)
    assert drawn.shape == (2, 12, 12, 3)
    assert np.isfinite(drawn).all()


def test_its_settings_come_back_from_plain_ones():
    stage = decoder("v")
    assert stages.build(stages.describe(stage)) == stage
    plain = stages.describe(stage)
    plain["model"]["unet"]["depth"] = 3
    with pytest.raises(UserError, match=r"model\.unet\.depth: no such field"):
        stages.build(plain)

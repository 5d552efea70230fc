"""Key maps: one to one at full size, exact in both directions, strict."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip_jax.errors import UserError
from unclip_jax.models import ClipConfig, DecoderConfig, PriorConfig, UNetConfig, presets
from unclip_jax.stages import ClipStage, DecoderStage, PriorStage, UpsamplerStage
from unclip_jax.weights.convert import clip_names, karlo_names
from unclip_jax.weights.convert.tables import Tensors, row, their_shapes, to_ours, to_theirs

MANIFESTS = Path(__file__).parent / "karlo_manifests"
ORIGINAL_UNETS = ("model_first_steps.", "model_last_step.")


def manifest(name, prefix=""):
    found = json.loads((MANIFESTS / f"{name}.json").read_text())
    return {prefix + tensor: tuple(shape) for tensor, shape in found.items()}


def target(stage, *names):
    tree = jax.eval_shape(stage.init, jax.random.key(0))
    return tree if not names else {name: tree[name] for name in names}


def karlo(which, layout):
    """Our tree of one of Karlo's networks at full size, and the table of a layout."""
    if which == "prior":
        tree = target(PriorStage(presets.KARLO_PRIOR), "network", "normalisation")
        return tree, getattr(karlo_names, f"{layout}_prior")()
    if which == "decoder":
        stage = DecoderStage(presets.KARLO_DECODER)
        table = getattr(karlo_names, f"{layout}_decoder")(presets.KARLO_DECODER)
        return target(stage, "network")["network"], table
    stage = UpsamplerStage(presets.KARLO_SUPER_RES, low_size=64, last_steps=1)
    return target(stage), getattr(karlo_names, f"{layout}_super_res")(presets.KARLO_SUPER_RES)


STATISTICS = {"stats.0": (768,), "stats.1": (768,)}


@pytest.mark.parametrize(
    ("which", "layout", "published"),
    [
        ("prior", "diffusers", manifest("diff_prior")),
        ("prior", "original", manifest("orig_prior") | STATISTICS),
        (
            "decoder",
            "diffusers",
            manifest("diff_decoder") | manifest("diff_text_proj", "text_proj."),
        ),
        ("decoder", "original", manifest("orig_decoder")),
        (
            "super_res",
            "diffusers",
            manifest("diff_super_res", "first.") | manifest("diff_super_res", "last."),
        ),
        (
            "super_res",
            "original",
            manifest("orig_sr", ORIGINAL_UNETS[0]) | manifest("orig_sr", ORIGINAL_UNETS[1]),
        ),
    ],
)
def test_karlo_maps_one_to_one_at_full_size(which, layout, published):
    """Every published tensor has one place in our tree, of its shape, and every leaf is filled."""
    tree, table = karlo(which, layout)
    found = {name: s.shape for name, s in their_shapes(table, tree).items()}
    assert found == published
    count = sum(int(np.prod(shape)) for shape in published.values())
    assert count == sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def test_published_counts():
    """The parameter counts in Karlo's and diffusers' own descriptions."""
    counts = {
        name: sum(int(np.prod(shape)) for shape in manifest(name).values())
        for name in ("orig_prior", "diff_prior", "orig_decoder", "diff_decoder", "orig_sr")
    }
    assert counts == {
        "orig_prior": 1_022_028_544,
        "diff_prior": 1_022_030_080,
        "orig_decoder": 893_318_086,
        "diff_decoder": 885_439_686,
        "orig_sr": 691_579_523,
    }


# ---------------------------------------------------------------- both directions

TINY_CLIP = ClipConfig(
    image_size=21,
    patch=7,
    vision_width=24,
    vision_layers=3,
    vision_heads=3,
    text_width=20,
    text_layers=2,
    text_heads=5,
    vocab_size=31,
    context_length=9,
    embed_dim=13,
)
TINY_PRIOR = PriorConfig(
    embed_dim=12, width=24, layers=3, heads=3, context_length=7, vocab_size=0, text_width=12
)
TINY_DECODER = DecoderConfig(
    unet=UNetConfig(
        image_size=12,
        channels=12,
        channel_mults=(1, 2),
        res_blocks=2,
        attention_sizes=(6,),
        head_channels=4,
        context_dim=10,
        groups=3,
    ),
    text_width=12,
    embed_dim=12,
    use_z_t=True,
    learned_null=True,
)
TABLES = {
    "huggingface clip": (ClipStage(TINY_CLIP), "network", clip_names.huggingface()),
    "openai clip": (ClipStage(TINY_CLIP), "network", clip_names.openai()),
    "diffusers prior": (PriorStage(TINY_PRIOR), "", karlo_names.diffusers_prior()),
    "original prior": (PriorStage(TINY_PRIOR), "", karlo_names.original_prior()),
    "diffusers decoder": (
        DecoderStage(TINY_DECODER),
        "network",
        karlo_names.diffusers_decoder(TINY_DECODER),
    ),
    "original decoder": (
        DecoderStage(TINY_DECODER),
        "network",
        karlo_names.original_decoder(TINY_DECODER),
    ),
}


def random_tree(stage, name):
    tree = target(stage)
    rng = np.random.default_rng(0)
    tree = jax.tree.map(lambda s: rng.standard_normal(s.shape).astype(np.float32), tree)
    return tree[name] if name else tree


def all_of(tensors):
    return {name: tensors.read(name) for name in tensors.shapes}


@pytest.mark.parametrize("name", list(TABLES))
def test_there_and_back_is_exact(name):
    stage, part, table = TABLES[name]
    tree = random_tree(stage, part)
    theirs = to_theirs(table, tree)
    arrays = all_of(theirs)
    assert {n: a.shape for n, a in arrays.items()} == {n: s.shape for n, s in theirs.shapes.items()}
    back = to_ours(table, Tensors.of(arrays, "there"), tree)
    assert jax.tree.all(jax.tree.map(np.array_equal, back, tree))
    assert sum(a.size for a in arrays.values()) == sum(a.size for a in jax.tree.leaves(tree))


def test_original_attention_is_interleaved_head_by_head():
    """Rows of c_qkv and qkv: q, k and v of the first head, then those of the second."""
    tree = random_tree(PriorStage(TINY_PRIOR), "")
    arrays = all_of(to_theirs(karlo_names.original_prior(), tree))
    kernel = tree["network"]["transformer"]["blocks"]["qkv"]["kernel"]  # [L, d, 3, heads, k]
    layers, _, _, heads, _ = kernel.shape
    for layer in range(layers):
        theirs = arrays[f"transformer.resblocks.{layer}.attn.c_qkv.weight"]
        rows = [kernel[layer, :, j, h].T for h in range(heads) for j in range(3)]
        np.testing.assert_array_equal(theirs, np.concatenate(rows))
    tree = random_tree(DecoderStage(TINY_DECODER), "network")
    arrays = all_of(to_theirs(karlo_names.original_decoder(TINY_DECODER), tree))
    attention = tree["unet"]["middle_attention"]
    heads = attention["context_kv"]["kernel"].shape[-2]
    rows = [attention["context_kv"]["kernel"][:, j, h].T for h in range(heads) for j in range(2)]
    theirs = arrays["middle_block.1.encoder_kv.weight"]
    np.testing.assert_array_equal(theirs, np.concatenate(rows)[:, :, None])
    biases = [attention["qkv"]["bias"][j, h] for h in range(heads) for j in range(3)]
    np.testing.assert_array_equal(arrays["middle_block.1.qkv.bias"], np.concatenate(biases))


# ---------------------------------------------------------------- strictness

SMALL = {"dense": {"kernel": jnp.zeros((3, 2)), "bias": jnp.zeros(2)}}
SMALL_TABLE = [row("linear", "dense", "fc")]


def small(**changes):
    arrays = {"fc.weight": np.zeros((2, 3), np.float32), "fc.bias": np.zeros(2, np.float32)}
    arrays = {name: a for name, a in (arrays | changes).items() if a is not None}
    return Tensors.of(arrays, "weights.bin")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fc.bias": None}, r"weights.bin.*1 missing \(fc.bias\)"),
        ({"extra": np.zeros(1)}, r"1 unexpected \(extra\)"),
        (
            {"fc.weight": np.zeros((3, 2), np.float32)},
            r"fc.weight is float32\[3, 2\], expected float32\[2, 3\]",
        ),
        ({"fc.bias": np.zeros(2, np.int32)}, r"fc.bias is int32\[2\]"),
    ],
)
def test_what_does_not_fit_is_listed(changes, message):
    with pytest.raises(UserError, match=message):
        to_ours(SMALL_TABLE, small(**changes), SMALL)


def test_a_tree_has_one_dtype():
    """The narrowest that holds all: mixed half formats need float32."""
    half = small(**{"fc.weight": np.zeros((2, 3), np.float16)})
    assert to_ours(SMALL_TABLE, half, SMALL)["dense"]["kernel"].dtype == np.float32
    both = small(**{"fc.weight": np.zeros((2, 3), np.float16), "fc.bias": np.zeros(2, np.float16)})
    assert to_ours(SMALL_TABLE, both, SMALL)["dense"]["bias"].dtype == np.float16
    assert to_ours(SMALL_TABLE, both, SMALL, "bfloat16")["dense"]["bias"].dtype == jnp.bfloat16


def test_a_wrong_table_is_our_own_mistake():
    with pytest.raises(ValueError, match="nothing fills"):
        their_shapes([row("projection", "dense", "fc")], SMALL)
    with pytest.raises(ValueError, match="named twice"):
        their_shapes([*SMALL_TABLE, *SMALL_TABLE], SMALL)
    with pytest.raises(ValueError, match="have no"):
        their_shapes([row("norm", "dense", "fc")], SMALL)

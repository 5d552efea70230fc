"""A CLIP trained here, read by transformers: the same embeddings, the same tokens."""

import dataclasses

import jax
import numpy as np
import pytest

from tests.networks import relative_error
from unclip_jax import stages
from unclip_jax.data.tokenizer import clean
from unclip_jax.errors import UserError
from unclip_jax.models import ClipConfig
from unclip_jax.pipeline.unclip import UnCLIP
from unclip_jax.stages.pixels import to_float
from unclip_jax.weights import box
from unclip_jax.weights import folder as model_folder
from unclip_jax.weights.convert import clip as convert_clip
from unclip_jax.weights.export import clip
from unclip_jax.weights.export.command import main as export
from unclip_jax.weights.trained import Part, load_part, tokenizer

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
TOLERANCE = 1e-5

# Another head width, another perceptron in each tower, other pixels than OpenAI's.
CONFIG = ClipConfig(
    image_size=21, patch=7, vision_width=24, vision_layers=2, vision_heads=2, text_width=20,
    text_layers=2, text_heads=4, vocab_size=700, context_length=12, embed_dim=9, activation="gelu",
    mlp_ratio=3.0, vision_mlp_ratio=2.75, pixel_mean=(0.5, 0.4, 0.3), pixel_std=(0.2, 0.3, 0.4),
)  # fmt: skip

CAPTIONS = [
    "a photo of a cat", "", "  TWO   dogs\n", "it's what they'll say: 'tis", "naïve café, Ångström",
    "日本の写真 한국어", "שלום مرحبا", "🍎🇩🇿👩‍🚒 red apple 👍🏽", "3.14 ½ ², #tag @me http://a.b/c",
    " ".join(["a very long caption"] * 50), "e\u0301clair",
]  # fmt: skip
# Where `clean` changes more than CLIPTokenizer does.
OTHERWISE = [
    "the “curly” quote’s", "fish &amp; chips", "schÃ¶n", "ΟΣ", "ﬁne ａｂｃ", "x\u200by\x07z",
]  # fmt: skip


def random_part(config):
    stage = stages.ClipStage(model=config)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: (x + 0.2 * rng.standard_normal(x.shape)).astype(np.float32),
        stage.init(jax.random.key(0)),
    )
    params["network"]["log_scale"] = np.float32(5.0)  # beyond the limit, ln 100
    return Part(stage, params, {"stage": stages.describe(stage)})


@pytest.fixture(scope="module", params=["random", "box"])
def exported(request, tmp_path_factory):
    """A CLIP of ours, and the folder that it was written to."""
    folder = tmp_path_factory.mktemp("clip")
    if request.param == "box":
        export(["clip", "--out", str(folder / "out")])
        return load_part(box.folder() / "clip"), folder / "out"
    part = random_part(CONFIG)
    model_folder.save_stage(
        folder / "model" / "clip", params=part.params, description=part.description
    )
    export(["clip", "--model", str(folder / "model"), "--out", str(folder / "out")])
    return part, folder / "out"


@pytest.mark.filterwarnings("ignore:.*longer than")
def test_transformers_gives_our_embeddings(exported):
    """From captions and pictures as they are, through its processor."""
    part, folder = exported
    size = part.stage.image_size
    images = np.random.default_rng(1).integers(0, 256, (3, size, size, 3), dtype=np.uint8)
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    processor = transformers.CLIPProcessor.from_pretrained(folder)
    inputs = processor(
        text=CAPTIONS, images=list(images), return_tensors="pt", padding=True, truncation=True
    )
    with torch.no_grad():
        found = model(**inputs)
    stage, ids = dataclasses.replace(part.stage, unit_embeddings=True), tokenizer(part)
    z_i = stage.encode_image(part.params, to_float(images))
    z_t, _ = stage.encode_text(part.params, ids.encode(CAPTIONS))
    assert relative_error(found.image_embeds.numpy(), z_i) < TOLERANCE
    assert relative_error(found.text_embeds.numpy(), z_t) < TOLERANCE
    scale = float(stage.network.apply({"params": part.params["network"]}, method="logit_scale"))
    logits = scale * np.asarray(z_i) @ np.asarray(z_t).T
    assert relative_error(found.logits_per_image.numpy(), logits) < TOLERANCE


@pytest.mark.filterwarnings("ignore:.*longer than")
def test_transformers_gives_our_tokens(exported):
    """Of captions as they are; where `clean` does more than CLIPTokenizer, of cleaned ones."""
    part, folder = exported
    ours = tokenizer(part)
    for kind in (transformers.CLIPTokenizer, transformers.AutoTokenizer):
        theirs = kind.from_pretrained(folder)
        assert theirs.model_max_length == ours.context_length

        def ids(text, theirs=theirs):
            return theirs(text, truncation=True).input_ids

        for text in CAPTIONS + [clean(text) for text in OTHERWISE]:
            (row,) = ours.encode([text])
            assert row[: len(ids(text))].tolist() == ids(text), text
            assert not row[len(ids(text)) :].any()
        for text in OTHERWISE:
            assert ours.encode([text])[0, : len(ids(text))].tolist() != ids(text), text


def test_the_folder_comes_back_as_it_was(exported):
    part, folder = exported
    again = convert_clip.load(folder)
    assert again.stage.model == part.stage.model
    for path, expected in jax.tree_util.tree_leaves_with_path(part.params["network"]):
        found = again.params["network"]
        for key in path:
            found = found[key.key]
        limit = np.log(100.0) if path[-1].key == "log_scale" else np.inf
        np.testing.assert_allclose(found, np.minimum(expected, limit), rtol=1e-7)


def test_a_converted_clip_goes_home_with_its_own_tokenizer(exported, tmp_path):
    _, folder = exported
    part = convert_clip.load(folder)
    clip.write(tmp_path / "again", part)
    first, again = (
        transformers.AutoTokenizer.from_pretrained(path) for path in (folder, tmp_path / "again")
    )
    texts = CAPTIONS + OTHERWISE
    assert first(texts, truncation=True).input_ids == again(texts, truncation=True).input_ids
    assert again.pad_token_id == first.pad_token_id


def test_what_cannot_be_written_is_named(tmp_path):
    part = random_part(dataclasses.replace(CONFIG, towers="both"))
    model = dataclasses.replace(CONFIG, towers="text")
    half = part._replace(stage=dataclasses.replace(part.stage, model=model))
    with pytest.raises(UserError, match="has the text tower alone, expected both"):
        clip.write(tmp_path / "out", half)
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="exists"):
        clip.write(tmp_path / "there", part)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_the_box_is_drawn_with_todays_tokens():
    """A folder without a tokenizer of its own has this package's."""
    model = UnCLIP.load()
    assert "tokenizer" not in model.clip.description
    tokens = model.tokens(model.clip, ["the “curly” quote"])
    np.testing.assert_array_equal(tokens, model.tokens(model.clip, ['the "curly" quote']))

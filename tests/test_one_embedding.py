"""One picture, one embedding: every route to CLIP prepares pictures as public processors do."""

import dataclasses

import jax
import numpy as np
import pytest
from PIL import Image

from tests import tiny
from unclip_jax import stages
from unclip_jax.app import tasks as page
from unclip_jax.data.datasets import DataConfig
from unclip_jax.data.embeddings.store import EmbeddingStore
from unclip_jax.data.images import Fit, square
from unclip_jax.errors import UserError
from unclip_jax.evaluate import features
from unclip_jax.evaluate.pictures import Measurer
from unclip_jax.models import ClipConfig
from unclip_jax.pipeline import manipulate
from unclip_jax.stages.clip import encode_image
from unclip_jax.training import embed

SIDE = 64
RNG = np.random.default_rng(0)
PICTURE = np.asarray(
    Image.fromarray(RNG.integers(0, 256, (9, 9, 3), np.uint8)).resize((SIDE, SIDE))
)


def padded(picture):
    """The picture in the middle of one twice as wide."""
    wide = np.full((SIDE, 2 * SIDE, 3), 255, np.uint8)
    wide[:, SIDE // 2 : SIDE // 2 + SIDE] = picture
    return wide


@pytest.fixture(scope="module")
def model():
    return tiny.model()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """The tiny model, and both pictures as files with captions."""
    root = tmp_path_factory.mktemp("one")
    model.save(root / "model")
    (root / "data").mkdir()
    for name, picture in (("a", PICTURE), ("b", padded(PICTURE))):
        Image.fromarray(picture).save(root / "data" / f"{name}.png")
        (root / "data" / f"{name}.txt").write_text(name)
    return root


def by_embed_image(model, folder):
    return np.concatenate([model.embed_image(x[None]) for x in (PICTURE, padded(PICTURE))])


def by_a_list(model, folder):
    return model.embed_image([PICTURE, padded(PICTURE)])


def by_manipulate(model, folder):
    return manipulate.embed(model, [PICTURE, padded(PICTURE)])


def by_evaluation(model, folder):
    clip = features.of_clip(model.clip)
    return np.concatenate([clip(x[None]) for x in (PICTURE, padded(PICTURE))])


def by_evaluation_of_data(model, folder):
    clip = features.of_clip(model.clip)
    data = DataConfig(name=str(folder / "data"), split="all", image_size=16, fit=model_fit(model))
    return Measurer(model, model.clip, clip, clip, 2).read(data).vectors.z_i


def model_fit(model):
    return model.clip.stage.model.fit


def by_training(model, folder):
    out = folder / f"store-{model_fit(model).resize_mode}"
    model.save(folder / out.name.replace("store", "model"))
    clip = folder / out.name.replace("store", "model") / "clip"
    embed.main(["--clip", str(clip), "--data", str(folder / "data"), "--split", "all", "--out",
                str(out), "--batch_size", "2", "--distributed", "off"])  # fmt: skip
    store = EmbeddingStore.open(out, cache_dir=out)
    return np.stack([store[i].z_i for i in range(2)])


ROUTES = [
    by_embed_image, by_a_list, by_manipulate, by_evaluation, by_evaluation_of_data, by_training
]  # fmt: skip


def as_read(model, picture):
    """z_i of a picture made ready by Pillow alone."""
    image = Image.fromarray(picture).resize((16, 16), Image.Resampling.BICUBIC)
    return np.asarray(encode_image(model.clip.stage, model.clip.params, np.asarray(image)[None]))


@pytest.mark.parametrize("route", ROUTES)
def test_a_padded_square_has_the_embedding_of_the_square_by_every_route(route, model, folder):
    z_i = np.asarray(route(model, folder))
    assert z_i[0] @ z_i[1] == pytest.approx(1, abs=1e-3)
    np.testing.assert_allclose(z_i[:1], as_read(model, PICTURE), atol=1e-5)


@pytest.mark.parametrize("route", ROUTES)
def test_a_clip_of_squashed_pictures_sees_them_squashed_by_every_route(route, model, folder):
    squash = dataclasses.replace(model.clip.stage.model, resize_mode="squash")
    stage = dataclasses.replace(model.clip.stage, model=squash)
    about = model.clip.description | {"stage": stages.describe(stage)}
    clip = model.clip._replace(stage=stage, description=about)
    squashing = dataclasses.replace(model, clip=clip)
    z_i = np.asarray(route(squashing, folder))
    np.testing.assert_allclose(z_i[1:], as_read(model, padded(PICTURE)), atol=1e-5)
    assert z_i[0] @ z_i[1] < 0.999


def test_variations_and_the_page_see_what_embed_image_sees(model, folder):
    key = jax.random.key(0)
    made = [model.variations(key, x[None], upsample=False) for x in (PICTURE, padded(PICTURE))]
    assert np.abs(made[0].astype(int) - made[1]).mean() < 1
    chances = []
    for name in "ab":
        served = page.Served(model)
        form = [str(folder / "data" / f"{name}.png"), "a dog\na cat", "", 0, 0, 10, None, True]
        drawn = page.labels(served, *form).draw(lambda *_: None)
        chances.append([value for (value,) in drawn.chances.values()])
    np.testing.assert_allclose(*chances, atol=1e-2)


def test_a_new_size_compiles_nothing(model):
    model.embed_image(PICTURE[None])
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: "backend_compile" in event and compiled.append(event)
    )
    for height, width in ((5, 9), (40, 31), (16, 16), (1, 1), (200, 30)):
        model.embed_image(np.zeros((1, height, width, 3), np.uint8))
    assert not compiled


FITS = {
    "crop": (Fit(), {"size": {"shortest_edge": 24}}),
    "a cut of something larger": (Fit(resize_to=28), {"size": {"shortest_edge": 28}}),
    "bilinear": (Fit(interpolation="bilinear"), {"size": {"shortest_edge": 24}, "resample": 2}),
    "squash": (Fit("squash"), {"size": {"height": 24, "width": 24}, "do_center_crop": False}),
    "squash and cut": (Fit("squash", 28), {"size": {"height": 28, "width": 28}}),
}


@pytest.mark.parametrize("name", FITS)
@pytest.mark.parametrize("shape", [(25, 33), (50, 67), (100, 37), (64, 64), (7, 24), (299, 301)])
def test_a_picture_is_prepared_as_transformers_prepares_it(name, shape):
    transformers = pytest.importorskip("transformers")
    kind = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    fit, settings = FITS[name]
    plain = {"do_normalize": False, "do_rescale": False, "crop_size": {"height": 24, "width": 24}}
    picture = np.random.default_rng(1).integers(0, 256, (*shape, 3), np.uint8)
    found = kind(**plain | settings)(images=Image.fromarray(picture), return_tensors="np")
    theirs = np.asarray(found["pixel_values"])[0].transpose(1, 2, 0)
    assert np.abs(square(picture, 24, fit) - theirs.astype(int)).max() <= 1


@pytest.mark.parametrize(("height", "width"), [(40, 20), (20, 41), (1, 300), (24, 24), (9, 8)])
def test_a_picture_is_padded_as_openclip_pads_it(height, width):
    made = square(np.full((height, width, 3), 200, np.uint8), 24, Fit("longest", fill=7))
    ratio = max(height, width) / 24
    h, w = (max(1, round(side / ratio)) for side in (height, width))
    expected = np.full((24, 24, 3), 7)
    expected[(24 - h) // 2 :, (24 - w) // 2 :][:h, :w] = 200
    np.testing.assert_array_equal(made, expected)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Fit("stretch"), "fit.resize_mode: got 'stretch'"),
        (lambda: Fit(interpolation="lanczos"), "fit.interpolation"),
        (lambda: Fit(resize_to=-1), "fit.resize_to: got -1"),
        (lambda: ClipConfig(resize_to=200), "image_size = 224"),
    ],
)
def test_a_fit_that_is_none_is_named(make, words):
    with pytest.raises(UserError, match=words):
        make()


def test_pictures_that_are_not_squares_are_not_squashed(model):
    with pytest.raises(UserError, match="squares"):
        model.clip.stage.encode_image(model.clip.params, np.zeros((1, 8, 16, 3), np.float32))

"""Class-conditional diffusion with classifier guidance: labels, both networks, and pictures."""

import dataclasses
import functools
import importlib
import io
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from tests.networks import integers, normal, random_params
from unclip_jax import stages
from unclip_jax.common.params import flatten
from unclip_jax.data.datasets import DataConfig, load
from unclip_jax.data.emoji.catalogue import catalogue, groups
from unclip_jax.data.records import BadRecord
from unclip_jax.diffusion.gaussian import Diffusion
from unclip_jax.diffusion.samplers import Sampling
from unclip_jax.errors import UserError
from unclip_jax.models.decoder import DecoderConfig
from unclip_jax.models.unet import UNetConfig
from unclip_jax.pipeline import class_conditional
from unclip_jax.training import prepare
from unclip_jax.weights import folder as model_folder
from unclip_jax.weights.trained import Part

SIDE, COUNT = 8, 3
NAMES = ["black", "blue", "white"]
UNET = UNetConfig(
    image_size=SIDE, out_channels=3, channels=16, channel_mults=(1,), res_blocks=1,
    attention_sizes=(SIDE // 4,), head_channels=8, groups=4, patch=4,
)  # fmt: skip
DIFFUSION = Diffusion(steps=100, prediction="x_0")
CLASSIFIER = stages.ClassifierStage(model=UNET, diffusion=DIFFUSION)
DECODER = stages.DecoderStage(
    model=DecoderConfig(unet=UNET, num_classes=COUNT),
    diffusion=DIFFUSION,
    sampling=Sampling(method="ddim", spacing="5", clip_x_0=1.0),
    guidance_scale=1.0,
)
# Of one patch: it trains in a third of the time, and draws even pictures as well.
ONE_PATCH = dataclasses.replace(UNET, patch=SIDE, attention_sizes=())
UNCONDITIONAL = dataclasses.replace(DECODER, model=DecoderConfig(unet=ONE_PATCH))


def part(stage, params):
    return Part(stage, params, {"classes": NAMES} if stage.num_classes else {})


@pytest.fixture(scope="module")
def decoder():
    """With every leaf random, so that no layer that starts at zero hides a mistake."""
    x_t, t = jnp.zeros((1, SIDE, SIDE, 3)), jnp.zeros((1,), jnp.int32)
    label = {"label": jnp.zeros((1,), jnp.int32)}
    return part(DECODER, {"network": random_params(DECODER.network, x_t, t, label)})


def shades(key, size):
    """Pictures all black (class 0), middle grey (1) or white (2), and their classes."""
    label = jax.random.randint(key, (size,), 0, COUNT)
    level = jnp.asarray([0, 128, 255], jnp.uint8)[label]
    return {"image": jnp.broadcast_to(level[:, None, None, None], (size, SIDE, SIDE, 3)),
            "label": label}  # fmt: skip


def trained(stage):
    """A stage trained for a moment on `shades`."""
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, 300))

    @jax.jit
    def step(params, state, key):
        grads = jax.grad(lambda p: stage.loss(p, shades(key, 32), key)[0])(params)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state

    key = jax.random.key(0)
    params = jax.jit(stage.init)(key)
    state = optimizer.init(params)
    for step_key in jax.random.split(key, 300):
        params, state = step(params, state, step_key)
    return part(stage, params)


@pytest.fixture(scope="module")
def classifier():
    return trained(CLASSIFIER)


@pytest.fixture(scope="module")
def unconditional():
    return trained(UNCONDITIONAL)


# ------------------------------------------------------------------------------------- labels


def paint(path, colour):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 20), colour).save(path)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder with a sub-folder for each class, and a caption for one picture only."""
    folder = tmp_path_factory.mktemp("pictures")
    for colour, name in (((0, 0, 0), "black"), ((30, 60, 255), "blue"), ((255,) * 3, "white")):
        for i in range(8):
            paint(folder / name / f"{i}.png", colour)
    (folder / "blue" / "0.txt").write_text("a blue square")
    return folder


@pytest.mark.parametrize("split", ["train", "heldout", "all"])
def test_a_folders_classes_are_its_sub_folders_in_every_split(pictures, split):
    source = load(DataConfig(name=str(pictures), split=split, labels=True))
    assert source.classes == tuple(NAMES)
    for i in range(len(source)):
        record = source[i]
        name = record["name"].split("/")[0]
        assert source.classes[record["label"]] == name
        own = record["name"] == "blue/0.png"
        assert record["caption"] == ("a blue square" if own else name)
    assert "label" not in load(DataConfig(name=str(pictures), split="all"))[0]


def test_a_picture_in_no_sub_folder_is_named(tmp_path):
    paint(tmp_path / "red" / "1.png", (255, 0, 0))
    paint(tmp_path / "stray.png", (0, 0, 0))
    with pytest.raises(UserError, match=r"labels: .*stray\.png lies in no sub-folder"):
        load(DataConfig(name=str(tmp_path), labels=True))


class Shapes(tfds.core.GeneratorBasedBuilder):
    """Pictures of a class, with no caption; the class of the last is unknown."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(),
            "label": tfds.features.ClassLabel(names=["round", "square"]),
            "number": tfds.features.Scalar(np.int32),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i, label in enumerate(["square", "round", "square", -1]):
            file = io.BytesIO()
            Image.new("RGB", (4, 4), (i, i, i)).save(file, "PNG")
            file.seek(0)
            yield i, {"image": file, "label": label, "number": i}


def test_a_tfds_class_label_is_read_and_stands_for_a_caption(tmp_path):
    Shapes(data_dir=str(tmp_path), file_format="array_record").download_and_prepare()
    config = DataConfig(name="tfds:shapes", cache_dir=str(tmp_path), labels=True)
    source, found = load(config), []
    assert source.classes == ("round", "square")
    for i in range(4):
        try:
            found.append((source[i]["caption"], int(source[i]["label"])))
        except BadRecord as error:
            assert "no known class" in str(error)
    assert sorted(found) == [("round", 0), ("square", 1), ("square", 1)]
    for key, message in (
        ("kind", "got 'kind', expected a feature of .*it has label"),
        ("number", "expected a feature of .* with classes that have names; it has label"),
    ):
        with pytest.raises(UserError, match=message):
            load(dataclasses.replace(config, label_key=key))


def test_an_emojis_class_is_its_group(tmp_path):
    source = load(DataConfig(image_size=4, cache_dir=str(tmp_path), captions="first", labels=True))
    group = {emoji.codepoints: emoji.category for emoji in catalogue()}
    assert source.classes == groups() and len(set(group.values())) == len(groups())
    for i in range(0, len(source), 50):
        record = source[i]
        assert source.classes[record["label"]] == group[record["name"]]


def test_a_class_is_known_by_the_beginning_of_its_name():
    known = ["Food & Drink", "Flags", "Flag", "Smileys & Emotion"]
    assert [class_conditional.number(n, known) for n in (" smileys", "FOOD", "flag", "flags")] == [
        3,
        0,
        2,
        1,
    ]
    for name, why in (("fl", "begins 2 classes"), ("dog", "is no class"), ("", "is no class")):
        with pytest.raises(UserError, match=f"{why}; expected one of: Food & Drink, Flags"):
            class_conditional.number(name, known)


# ----------------------------------------------------------------------------------- networks


def test_every_weight_of_the_classifier_learns():
    x_t, t = normal(0, 6, SIDE, SIDE, 3), integers(1, 100, 6)
    params = random_params(CLASSIFIER.network, x_t, t)
    loss = lambda p: -CLASSIFIER.log_prob({"network": p}, x_t, t, integers(2, COUNT, 6)).mean()  # noqa: E731
    grads = flatten(jax.jit(jax.grad(loss))(params))
    zero = [name for name, grad in grads.items() if np.abs(grad).max() < 1e-7]
    # A bias of the keys moves every score alike, which softmax does not see.
    assert {name.split("/")[-1] for name in zero} <= {"bias"}


def test_the_classifiers_probabilities_sum_to_1_and_know_clean_from_noise(classifier):
    """Near x_0 the classes are plain to see; of pure noise nobody knows more than 1 in 3."""
    batch, every = shades(jax.random.key(5), 20), jnp.tile(jnp.arange(COUNT), 20)
    x_0 = batch["image"].astype(jnp.float32) / 127.5 - 1.0

    @jax.jit
    def log_p(x_t, t):
        rows = jnp.repeat(x_t, COUNT, axis=0), jnp.full(20 * COUNT, t)
        return CLASSIFIER.log_prob(classifier.params, *rows, every).reshape(20, COUNT)

    clean = log_p(x_0, 0)
    np.testing.assert_allclose(jnp.exp(clean).sum(1), 1.0, rtol=1e-5)
    assert jnp.mean(jnp.argmax(clean, axis=1) == batch["label"]) > 0.95
    pure = log_p(normal(6, *x_0.shape), DIFFUSION.steps - 1)
    # -log p of all classes is log 3 on average where they are even, and more everywhere else.
    assert -float(pure.mean()) == pytest.approx(np.log(COUNT), abs=0.2)


@functools.partial(jax.jit, static_argnames="stage")
def predict(stage, params, x_t, label):
    encoded = stage.encode(params, stage.condition(label=label))
    return stage.denoise(params, x_t, jnp.full(len(x_t), 50), encoded)


def test_each_class_and_none_are_their_own(decoder):
    x_t = jnp.broadcast_to(normal(0, 1, SIDE, SIDE, 3), (COUNT + 1, SIDE, SIDE, 3))
    every = jnp.arange(COUNT + 1)
    outputs = predict(DECODER, decoder.params, x_t, every)
    for i in range(COUNT + 1):
        for j in range(i):
            assert jnp.abs(outputs[i] - outputs[j]).max() > 1e-3
    null = DECODER.null(decoder.params, DECODER.condition(label=every))
    np.testing.assert_array_equal(null["label"], np.full(COUNT + 1, COUNT))


@pytest.mark.parametrize(("drop", "learning"), [(0.0, [1, 1, 1, 0]), (0.9, [1, 1, 1, 1])])
def test_training_drops_the_class_as_often_as_asked(decoder, drop, learning):
    """The embeddings that a loss moves: with no drop, the null class is never met."""
    stage = dataclasses.replace(DECODER, label_drop=drop)
    batch = {"image": jnp.zeros((48, SIDE, SIDE, 3), jnp.uint8), "label": jnp.arange(48) % COUNT}
    grads = jax.jit(jax.grad(lambda p: stage.loss(p, batch, jax.random.key(0))[0]))(decoder.params)
    rows = grads["network"]["label_to_emb"]["embedding"]
    assert [int(np.any(row)) for row in np.asarray(rows)] == learning


# ----------------------------------------------------------------------------------- pictures


def brightness(images):
    return images.astype(np.float64).mean((1, 2, 3))


def test_a_classifier_leads_a_model_of_no_class(unconditional, classifier):
    """The decoder has learned black, grey and white and draws any; the gradient chooses."""
    draw = functools.partial(
        class_conditional.generate, jax.random.key(0), unconditional, ["black", "white"], num=8,
        classifier=classifier,
    )  # fmt: skip
    unguided = brightness(draw(classifier_scale=0.0))
    np.testing.assert_array_equal(unguided[:8], unguided[8:])
    assert np.ptp(unguided) > 85
    guided = brightness(draw(classifier_scale=2.0))
    assert np.mean(guided[:8] < 85) > 0.8 and np.mean(guided[8:] > 170) > 0.8
    assert np.mean(unguided < 85) < 0.5 and np.mean(unguided > 170) < 0.5


def test_a_picture_depends_on_its_number_and_class_alone(decoder, classifier):
    draw = functools.partial(
        class_conditional.generate, jax.random.key(3), decoder, guidance_scale=2.0,
        classifier=classifier, num=2, batch_size=3,
    )  # fmt: skip
    all_three = draw(["black", "blue", "white"])
    assert all_three.shape == (6, SIDE, SIDE, 3) and all_three.dtype == np.uint8
    again = draw(["white", "bla"])
    assert np.abs(again[:2].astype(int) - all_three[4:]).max() <= 1
    assert np.abs(again[2:].astype(int) - all_three[:2]).max() <= 1
    assert np.abs(all_three[0].astype(int) - all_three[1]).max() > 5, "samples differ"
    without = draw(["white"], classifier=None)
    assert np.abs(without.astype(int) - all_three[4:]).max() > 1


def test_what_does_not_belong_together_is_named(decoder, classifier):
    draw = functools.partial(class_conditional.generate, jax.random.key(0))
    nobody = part(UNCONDITIONAL, {})
    other = classifier._replace(description={"classes": ["a", "b", "c"]})
    changed = dataclasses.replace(CLASSIFIER, diffusion=Diffusion(steps=50))
    reader = dataclasses.replace(DECODER, model=DecoderConfig(
        unet=dataclasses.replace(UNET, context_dim=8), embed_dim=4))  # fmt: skip
    for arguments, options, message in (
        ((decoder, ["dog"]), {}, "'dog' is no class; expected one of: black, blue, white"),
        ((decoder, []), {}, "none given; expected one of: black"),
        ((decoder, ["white"]), {"num": 0}, "num: got 0"),
        ((decoder, ["white"]), {"classifier_scale": float("nan")}, "classifier_scale: got nan"),
        ((decoder, ["white"]), {"classifier": other}, "knows a, b, c; expected .*: black, blue"),
        (
            (decoder, ["white"]),
            {"classifier": classifier._replace(stage=changed)},
            "its diffusion.steps is 50, expected the decoder's 100",
        ),
        ((decoder._replace(description={}), ["white"]), {}, "names 0 classes, expected 3"),
        ((nobody, ["white"]), {}, "reads no class; give a classifier"),
        ((part(reader, {}), ["white"]), {}, "reads z_i, expected one that reads a class alone"),
    ):
        with pytest.raises(UserError, match=message):
            draw(*arguments, **options)
    with pytest.raises(UserError, match="unclip class_conditional"):
        DECODER.condition()
    with pytest.raises(UserError, match="out_channels: got 1, expected the number of classes"):
        stages.ClassifierStage(model=dataclasses.replace(UNET, out_channels=1))


# ---------------------------------------------------------------- from a config to pictures


def smoke(name, pictures, cache):
    """A config's smoke variant on the pictures, with a U-Net of one level."""
    config = importlib.import_module(f"configs.emoji.{name}").get_config("smoke")
    config.data.update({"name": str(pictures), "split": "all", "cache_dir": str(cache)})
    config.heldout_split = "all"
    config.train.update({"batch_size": 4, "steps": 2})
    unet = config.stage.model.unet if name == "class_decoder" else config.stage.model
    unet.update({
        "image_size": 32, "channels": 32, "channel_mults": (1,), "attention_sizes": (8,)
    })  # fmt: skip
    if name == "class_decoder":
        config.stage.model.num_classes = COUNT
    else:
        config.stage.model.out_channels = COUNT
    return config


def test_both_configs_train_and_their_folders_draw(pictures, tmp_path, capsys):
    for name in ("class_decoder", "classifier"):
        run = prepare.prepare(smoke(name, pictures, tmp_path))
        assert run.description["classes"] == NAMES
        params = run.init_params()
        loss, _ = jax.jit(run.loss)(params, next(run.batches()), jax.random.key(0))
        assert jnp.isfinite(loss)
        model_folder.save_stage(tmp_path / name, params=params, description=run.description)
    assert 0 <= run.evaluate(params, 0)["clean_accuracy"] <= 1
    assert all(text.split(" → ")[1] in NAMES for _, text in run.preview(params, 0))

    out = tmp_path / "white.png"
    class_conditional.main([
        "--decoder", str(tmp_path / "class_decoder"), "--classifier", str(tmp_path / "classifier"),
        "--label", "white", "--num", "2", "--steps", "3", "--out", str(out),
    ])  # fmt: skip
    assert "2 pictures of 32 px" in capsys.readouterr().out
    assert Image.open(out).width > 64


def test_data_of_other_classes_is_refused(pictures, tmp_path):
    config = smoke("classifier", pictures, tmp_path)
    run = prepare.prepare(config)
    model_folder.save_stage(
        tmp_path / "model", params=run.init_params(), description=run.description
    )
    config.stage.model.out_channels = 5
    with pytest.raises(UserError, match=r"has 3 classes \(black, blue, white\); set .*=3"):
        prepare.prepare(config)
    others = shutil.copytree(pictures, tmp_path / "others")
    (others / "white").rename(others / "zebra")
    config = smoke("classifier", others, tmp_path)
    config.init = str(tmp_path / "model")
    with pytest.raises(UserError, match=r"black, blue, zebra, but .* learned black, blue, white"):
        prepare.prepare(config)

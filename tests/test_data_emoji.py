"""The emoji data set, and TFDS data sets in general."""

import collections
import io
import os
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from unclip_jax.data.datasets import DataConfig, load
from unclip_jax.data.emoji.catalogue import catalogue
from unclip_jax.data.images import square
from unclip_jax.data.records import BadRecord, is_heldout
from unclip_jax.errors import UserError

SIZE = 32


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("cache"))
    load(DataConfig(image_size=SIZE, cache_dir=folder))
    return folder


def emoji(cache, **options):
    return load(DataConfig(**{"image_size": SIZE, "cache_dir": cache, **options}))


@pytest.mark.parametrize("skin_tones", [False, True])
def test_a_concept_and_its_variants_fall_on_one_side(skin_tones):
    """Witness by names: "man X", "woman X", "X", "person X", in any tone, agree."""
    side = {e.captions[0]: is_heldout(e.concept) for e in catalogue(skin_tones)}
    checked = 0
    for name, heldout in side.items():
        if not name.startswith("man "):
            continue
        base, variants = name.removeprefix("man "), ("woman {}", "{}", "person {}", "man {}")
        for variant in variants:
            for ending in ("", " light skin tone", " facing right", " dark skin tone"):
                other = side.get(variant.format(base) + ending, heldout)
                assert other == heldout, (name, variant)
                checked += other is not heldout
    families = {heldout for name, heldout in side.items() if name.startswith("family")}
    couples = {heldout for name, heldout in side.items() if name.startswith("couple with heart")}
    assert len(families) == len(couples) == 1
    pairs = [("prince", "princess"), ("boy", "girl"), ("Santa Claus", "Mrs. Claus"),
             ("old man", "old woman"), ("merman", "mermaid"), ("man", "woman"),
             ("pregnant man", "pregnant woman"), ("men holding hands", "people holding hands"),
             ("man dancing", "woman dancing")]  # fmt: skip
    assert all(side[a] == side[b] for a, b in pairs)


def test_skin_tones_move_no_concept():
    plain = {e.codepoints: e.concept for e in catalogue(False)}
    toned = {e.codepoints: e.concept for e in catalogue(True)}
    assert plain.items() <= toned.items()
    assert set(toned.values()) == set(plain.values())


def test_no_caption_has_two_pictures_nor_any_shortcode_marks():
    owners = collections.Counter(c.casefold() for e in catalogue() for c in e.captions)
    assert max(owners.values()) == 1
    assert not any(mark in caption for caption in owners for mark in "_:")
    names = {e.codepoints: e.captions for e in catalogue()}
    assert names["1f34e"][:2] == ("red apple", "apple")
    assert names["1f1e9-1f1ff"][0] == "flag of Algeria"
    assert names["1f44d"] == ("thumbs up", "thumbsup")  # "+1" describes nothing


def test_splits_part_the_emoji(cache):
    sizes = {split: emoji(cache, split=split).image_count for split in ("train", "heldout", "all")}
    assert sizes["train"] + sizes["heldout"] == sizes["all"] == len(catalogue())
    assert 0.07 < sizes["heldout"] / sizes["all"] < 0.13
    captions = [
        {r["caption"].casefold() for r in map(source.__getitem__, range(len(source)))}
        for source in (emoji(cache, split="train"), emoji(cache, split="heldout"))
    ]
    assert not captions[0] & captions[1]


def test_every_caption_is_a_pair_and_pairs_share_their_image(cache):
    pairs, firsts = emoji(cache, split="all"), emoji(cache, split="all", captions="first")
    expected = {e.codepoints: e.captions for e in catalogue()}
    found = collections.defaultdict(list)
    for index in range(len(pairs)):
        record = pairs[index]
        assert record["index"] == index
        found[record["name"]].append(record["caption"])
    assert {name: tuple(captions) for name, captions in found.items()} == expected
    assert len(firsts) == firsts.image_count == len(expected)
    assert all(firsts[i]["caption"] == expected[firsts[i]["name"]][0] for i in range(50))
    assert [pairs.image_of(i) for i in range(len(pairs))] == sorted(
        map(pairs.image_of, range(len(pairs)))
    )


def test_pictures_show_what_they_say(cache):
    source = emoji(cache, split="all", captions="first")
    by_name = {source[i]["caption"]: i for i in range(len(source))}

    def picture(caption):
        image = Image.open(io.BytesIO(source[by_name[caption]]["image"]))
        assert (image.mode, image.size, image.format) == ("RGB", (SIZE, SIZE), "PNG")
        return np.asarray(image).astype(int)

    red, blue = picture("red square"), picture("blue square")
    assert (red[8:24, 8:24, 0] > red[8:24, 8:24, 2] + 80).all()
    assert (blue[8:24, 8:24, 2] > blue[8:24, 8:24, 0] + 80).all()
    japan = picture("flag of Japan")
    assert japan[SIZE // 2, SIZE // 2, 0] > japan[SIZE // 2, SIZE // 2, 1] + 80
    assert (japan[0] == 255).all()  # white where the art is transparent


def test_the_fingerprint_knows_the_pairs_and_not_the_size(cache):
    prints = {
        emoji(cache, split=split, captions=captions).fingerprint
        for split in ("train", "heldout", "all")
        for captions in ("all", "first")
    }
    assert len(prints) == 6
    assert emoji(cache, image_size=8).fingerprint == emoji(cache).fingerprint


def test_the_art_is_attributed(cache):
    builder = tfds.builder_from_directory(f"{cache}/emoji/{SIZE}/1.0.0")
    notice = builder.info.description + builder.info.redistribution_info.license
    assert "Twitter" in notice
    assert "CC-BY 4.0" in notice


def test_two_processes_may_prepare_at_once(tmp_path):
    script = (
        "from unclip_jax.data.datasets import DataConfig, load;"
        f"s = load(DataConfig(image_size=8, cache_dir={str(tmp_path)!r}));"
        "print(s.fingerprint, len(s))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment
        )
        for _ in range(2)
    ]
    printed = [process.communicate(timeout=120)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert printed[0] == printed[1]
    assert os.listdir(tmp_path / "emoji" / "8") == ["1.0.0"]  # nothing half-made is left


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"split": "test"}, "split: got 'test'.*train, heldout"),
        ({"image_size": 0}, "image_size"),
        ({"image_size": 10**6}, "image_size"),
        ({"captions": "some"}, "captions"),
        ({"augment": 1.0}, "augment"),
        ({"cache_dir": "/proc/nowhere"}, "cache_dir: /proc/nowhere"),
    ],
)
def test_bad_options_are_named(cache, options, field):
    with pytest.raises(UserError, match=field):
        emoji(cache, **options)


class Tiny(tfds.core.GeneratorBasedBuilder):
    """Eight grey pictures, captioned once at the top and several times in a nested list."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "picture": tfds.features.Image(),
                    "title": tfds.features.Text(),
                    "notes": tfds.features.Sequence({"text": tfds.features.Text()}),
                }
            ),
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for level in range(8):
            file = io.BytesIO()
            Image.new("L", (6, 4), level * 30).save(file, "PNG")
            file.seek(0)
            title = "" if level == 3 else f"grey é {level}"
            notes = [{"text": f"note {n} of {level}"} for n in range(level % 3)]
            yield level, {"picture": file, "title": title, "notes": notes}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("tfds"))
    Tiny(data_dir=folder, file_format="array_record").download_and_prepare()
    return DataConfig(name="tfds:tiny", cache_dir=folder, image_key="picture", caption_key="title")


def test_a_tfds_data_set_by_name(tiny):
    source = load(tiny)
    assert len(source) == 8
    good = {}
    for index in range(8):
        try:
            good[source[index]["caption"]] = int(square(source[index]["image"], 4).mean())
        except BadRecord as error:
            assert "empty caption" in str(error)
    assert good == {f"grey é {level}": level * 30 for level in range(8) if level != 3}


def test_a_tfds_data_set_with_lists_of_captions(tiny):
    source = load(DataConfig(**{**vars(tiny), "caption_key": "notes/text"}))
    captions = sorted(source[i]["caption"] for i in range(len(source)))
    assert captions == sorted(f"note {n} of {lev}" for lev in range(8) for n in range(lev % 3))
    assert source.image_count == 8
    assert len(source.skipped) == 3  # levels 0, 3 and 6 have no note


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"caption_key": "caption"},
            "caption_key: got 'caption'.*picture, title, notes/text|notes/text",
        ),
        ({"image_key": "image"}, "image_key: got 'image'"),
        ({"split": "test"}, "split: got 'test'.*train"),
        ({"name": "tfds:no_such_set"}, "not prepared in.*check the name"),
        ({"name": "tfds:mnist", "cache_dir": "/nowhere-at-all"}, "not prepared.*array_record"),
    ],
)
def test_tfds_mistakes_are_named(tiny, change, message):
    with pytest.raises(UserError, match=message) as caught:
        load(DataConfig(**{**vars(tiny), **change}))
    assert "\n" not in str(caught.value)


def test_damaged_data_are_named(tmp_path):
    config = DataConfig(image_size=4, cache_dir=str(tmp_path), captions="first")
    load(config)
    (file,) = tmp_path.glob("emoji/4/1.0.0/*train*")
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(UserError, match=r"damaged.*delete .*emoji/4/1\.0\.0"):
        load(config)
    for file in tmp_path.glob("emoji/4/1.0.0/*"):
        file.unlink()
    with pytest.raises(UserError, match=r"nothing in .*; delete .*emoji/4/1\.0\.0 to prepare"):
        load(config)


@pytest.mark.parametrize(
    ("name", "advice"),
    [("emojis", r"did you mean emoji\?"), ("zzzqq", "a data set of TFDS is tfds:zzzqq")],
)
def test_an_unknown_name_says_what_names_there_are(name, advice):
    expected = f"got '{name}', expected a folder, .* or one of emoji, emoji_styles, .*; {advice}"
    with pytest.raises(UserError, match=expected):
        load(DataConfig(name=name))
